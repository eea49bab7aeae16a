// The CUDA kernel on a CPU. As a shared library it is what tests/slow/test_kernel_on_host.py calls; as a program it
// checks the kernel on tensors of exactly their size, which is for sanitizers:
//
//   g++ -std=c++17 -g -Wno-unknown-pragmas -fsanitize=address,undefined -Icsrc/cuda tests/slow/on_host/on_host.cpp
#include "on_host.h"

#include "kernel.h"

#include <cstdio>
#include <memory>

namespace torch_gradmatch {
namespace {

struct Span {
  char* slow;
  char* fast;
  int64_t numel;
};

// What a launch was told of a span.
struct Planned {
  int64_t launch;
  int64_t blocks;  // of the whole launch
  int64_t first_block;
  int64_t slow;
  int64_t fast;
  int64_t numel;
};

template <typename SlowType, typename FastType>
struct Pair {
  using Slow = SlowType;
  using Fast = FastType;
  using Math = std::conditional_t<std::is_same_v<SlowType, double>, double, float>;
};

constexpr int kPairs = 6;

// In the order of the tests' KERNEL_PAIRS.
template <typename Visitor>
auto visit_pair(int pair, const Visitor& visit) {
  switch (pair) {
    case 0:
      return visit(Pair<float, float>{});
    case 1:
      return visit(Pair<double, double>{});
    case 2:
      return visit(Pair<__nv_bfloat16, __nv_bfloat16>{});
    case 3:
      return visit(Pair<__half, __half>{});
    case 4:
      return visit(Pair<float, __nv_bfloat16>{});
    default:
      return visit(Pair<float, __half>{});
  }
}

// Calls launch(table, blocks) as interpolate.cu does. Returns the number of launches; -1 - i if span i is refused.
template <typename Pair, typename Launch>
int64_t count_launches(const std::vector<Span>& spans, const Launch& launch) {
  int64_t launches = 0;
  const Span* refused = cuda::for_each_launch<typename Pair::Slow, typename Pair::Fast>(
      spans, [&](const cuda::Table& table, unsigned blocks) {
        launch(table, blocks);
        ++launches;
      });
  return refused == nullptr ? launches : -1 - (refused - spans.data());
}

template <typename Pair>
void run_blocks(const cuda::Table& table, const std::vector<unsigned>& blocks, double weight, uint64_t seed) {
  using Math = typename Pair::Math;
  launch_on_host(blocks, cuda::kThreads, seed, [&] {
    cuda::interpolate_kernel<typename Pair::Slow, typename Pair::Fast, Math>(
        table, static_cast<Math>(weight), static_cast<Math>(1.0 - weight));
  });
}

template <typename Pair>
int64_t run(const std::vector<Span>& spans, double weight, uint64_t seed) {
  return count_launches<Pair>(spans, [&](const cuda::Table& table, unsigned blocks) {
    std::vector<unsigned> all(blocks);
    std::iota(all.begin(), all.end(), 0u);
    run_blocks<Pair>(table, all, weight, seed);
  });
}

// ------------------------------------------------------------------------------------------------- as a program

float widen(float value) { return value; }
float widen(double value) { return static_cast<float>(value); }
float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
float widen(__half value) { return __half2float(value); }

// Small multiples of 1/2: every result at weight 1/2 is exact in every dtype.
float slow_value(int64_t i) { return static_cast<float>(i % 8); }
float fast_value(int64_t i) { return static_cast<float>(i % 5); }

template <typename T>
void fill(char* memory, int64_t numel, float (*value)(int64_t)) {
  for (int64_t i = 0; i < numel; ++i) {
    const T element = cuda::from_math<T>(value(i));
    std::memcpy(memory + i * sizeof(T), &element, sizeof(T));
  }
}

template <typename T>
bool is_moved(const char* memory, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    T element;
    std::memcpy(&element, memory + i * sizeof(T), sizeof(T));
    if (widen(element) != (slow_value(i) + fast_value(i)) / 2) {
      return false;
    }
  }
  return true;
}

// Tensors of sizes around those of vectors and chunks, aligned and misaligned, in more than one launch.
template <typename Pair>
bool check() {
  using Slow = typename Pair::Slow;
  using Fast = typename Pair::Fast;
  constexpr int64_t kWidth = cuda::Shape<Slow, Fast>::kWidth;
  constexpr int64_t kChunk = cuda::Shape<Slow, Fast>::kChunk;
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<Span> spans;
  const auto allocate = [&](int64_t bytes) {
    memory.emplace_back(new char[bytes]);
    return memory.back().get();
  };
  for (const int64_t numel :
       {int64_t{1}, kWidth - 1, kWidth, kWidth + 1, 2 * kWidth, int64_t{cuda::kThreads}, kChunk - kWidth - 1, kChunk - 1,
        kChunk, kChunk + 1, kChunk + kWidth, 2 * kChunk, 3 * kChunk + kWidth + 1}) {
    for (int offset = 0; offset < 12; ++offset) {  // each of the four alignments three times: over 128 tensors
      char* const slow = allocate((numel + offset % 2) * sizeof(Slow)) + offset % 2 * sizeof(Slow);
      char* const fast = allocate((numel + offset / 2 % 2) * sizeof(Fast)) + offset / 2 % 2 * sizeof(Fast);
      fill<Slow>(slow, numel, slow_value);
      fill<Fast>(fast, numel, fast_value);
      spans.push_back({slow, fast, numel});
    }
  }
  if (run<Pair>(spans, 0.5, /*seed=*/1) != 2) {
    return false;
  }
  return std::all_of(spans.begin(), spans.end(), [](const Span& span) {
    return is_moved<Slow>(span.slow, span.numel) && is_moved<Fast>(span.fast, span.numel);
  });
}

}  // namespace
}  // namespace torch_gradmatch

int main() {
  for (int pair = 0; pair < torch_gradmatch::kPairs; ++pair) {
    if (!torch_gradmatch::visit_pair(pair, [](auto p) { return torch_gradmatch::check<decltype(p)>(); })) {
      std::fprintf(stderr, "pair %d of dtypes: wrong result\n", pair);
      return 1;
    }
  }
  return 0;
}

// ------------------------------------------------------------------------------------------- as a shared library

#define EXPORTED extern "C" __attribute__((visibility("default")))

using torch_gradmatch::Planned;
using torch_gradmatch::Span;

EXPORTED int64_t chunk_of(int pair) {
  return torch_gradmatch::visit_pair(pair, [](auto p) -> int64_t {
    return torch_gradmatch::cuda::Shape<typename decltype(p)::Slow, typename decltype(p)::Fast>::kChunk;
  });
}

// The whole of it.
EXPORTED int64_t run(int pair, const Span* spans, int64_t size, double weight, uint64_t seed) {
  return torch_gradmatch::visit_pair(pair, [&](auto p) {
    return torch_gradmatch::run<decltype(p)>({spans, spans + size}, weight, seed);
  });
}

// Some blocks of the first launch only: for tensors larger than the memory that is there.
EXPORTED int64_t run_blocks(
    int pair, const Span* spans, int64_t size, double weight, const uint32_t* blocks, int64_t number_of_blocks) {
  return torch_gradmatch::visit_pair(pair, [&](auto p) {
    bool first = true;
    return torch_gradmatch::count_launches<decltype(p)>({spans, spans + size}, [&](const auto& table, unsigned) {
      if (first) {
        torch_gradmatch::run_blocks<decltype(p)>(table, {blocks, blocks + number_of_blocks}, weight, /*seed=*/0);
      }
      first = false;
    });
  });
}

// Runs nothing: what would be launched, in `planned`, which has room for `size`.
EXPORTED int64_t plan(int pair, const Span* spans, int64_t size, Planned* planned) {
  return torch_gradmatch::visit_pair(pair, [&](auto p) {
    int64_t launch = 0;
    return torch_gradmatch::count_launches<decltype(p)>({spans, spans + size}, [&](const auto& table, unsigned blocks) {
      for (int i = 0; i < table.size; ++i) {
        const int64_t numel = static_cast<int64_t>(table.numel_high[i]) << 32 | table.numel_low[i];
        *planned++ = {launch, blocks, table.first_block[i], table.slow[i], table.fast[i], numel};
      }
      ++launch;
    });
  });
}

EXPORTED void from_half_precision(int is_bfloat16, const uint16_t* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[i] = is_bfloat16 ? __bfloat162float({from[i]}) : __half2float({from[i]});
  }
}

EXPORTED void to_half_precision(int is_bfloat16, const float* from, uint16_t* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[i] = is_bfloat16 ? __float2bfloat16_rn(from[i]).bits : __float2half_rn(from[i]).bits;
  }
}
