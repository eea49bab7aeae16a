// torch_gradmatch::interpolate_ on an NVIDIA GPU: one pass over memory, up to 128 tensors in a launch.
//
// The table of tensors travels as a kernel argument, so nothing is copied to the device beforehand, nothing is waited
// for, and a CUDA graph captures the launch with it. A block works on one chunk of one tensor; which one it finds by
// bisection in the table. Chunks begin at multiples of the vector width, so an aligned tensor is read and written 16
// bytes at a time but for its tail; a misaligned one goes element by element.
#include "../interpolate.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace torch_gradmatch {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;
constexpr int kTableSize = 128;  // 128 x 26 bytes stay below the 4 KiB that every GPU takes as arguments

struct Table {
  int64_t slow[kTableSize];
  int64_t fast[kTableSize];
  uint32_t numel_low[kTableSize];   // numel = high << 32 | low
  uint16_t numel_high[kTableSize];
  uint32_t first_block[kTableSize];
  int32_t size;
};
static_assert(sizeof(Table) <= 4096 - 3 * 16, "the table has to fit into the kernel's arguments");

template <typename Slow, typename Fast>
struct Vector {
  static constexpr int kSmaller = sizeof(Slow) < sizeof(Fast) ? sizeof(Slow) : sizeof(Fast);
  static constexpr int kWidth = 16 / kSmaller;  // elements; both sides are whole 16-byte words
  static constexpr int64_t kChunk = static_cast<int64_t>(kThreads) * kVectorsPerThread * kWidth;
};

template <typename T, int N>
struct alignas(16) Words {
  T element[N];
};

__device__ __forceinline__ float to_math(float v) { return v; }
__device__ __forceinline__ double to_math(double v) { return v; }
__device__ __forceinline__ float to_math(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_math(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_math(float v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

template <typename T>
__device__ __forceinline__ T from_math(double v) {
  return v;
}

// The formula whose smaller factor multiplies the difference; at weight 0 and 1 a copy.
template <typename Slow, typename Fast, typename Math>
__device__ __forceinline__ void interpolate_element(Slow& slow, Fast& fast, Math weight, Math rest) {
  const Math s = to_math(slow);
  const Math f = to_math(fast);
  Math moved;
  if (weight == Math(0)) {
    moved = s;
  } else if (rest == Math(0)) {
    moved = f;
  } else {
    moved = weight < Math(0.5) ? s + weight * (f - s) : f - (f - s) * rest;
  }
  slow = from_math<Slow>(moved);
  fast = from_math<Fast>(to_math(slow));
}

template <typename Slow, typename Fast, typename Math>
__global__ void __launch_bounds__(kThreads) interpolate_kernel(const Table table, Math weight, Math rest) {
  using V = Vector<Slow, Fast>;
  int low = 0;
  int high = table.size - 1;
  while (low < high) {  // the last tensor whose first block is not after this one
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  Slow* slow = reinterpret_cast<Slow*>(table.slow[low]);
  Fast* fast = reinterpret_cast<Fast*>(table.fast[low]);
  const int64_t numel = static_cast<int64_t>(table.numel_high[low]) << 32 | table.numel_low[low];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[low]) * V::kChunk;
  const int64_t end = begin + V::kChunk < numel ? begin + V::kChunk : numel;

  const bool aligned = ((table.slow[low] | table.fast[low]) & 15) == 0;
  if (aligned && end - begin == V::kChunk) {
    using SlowWords = Words<Slow, V::kWidth>;
    using FastWords = Words<Fast, V::kWidth>;
    SlowWords* slow_words = reinterpret_cast<SlowWords*>(slow + begin) + threadIdx.x;
    FastWords* fast_words = reinterpret_cast<FastWords*>(fast + begin) + threadIdx.x;
    SlowWords s[kVectorsPerThread];
    FastWords f[kVectorsPerThread];
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {  // all loads before the first use: enough bytes in flight
      s[i] = slow_words[i * kThreads];
      f[i] = fast_words[i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < V::kWidth; ++j) {
        interpolate_element(s[i].element[j], f[i].element[j], weight, rest);
      }
      slow_words[i * kThreads] = s[i];
      fast_words[i * kThreads] = f[i];
    }
    return;
  }
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    interpolate_element(slow[i], fast[i], weight, rest);
  }
}

template <typename T>
struct OnDevice {
  using type = T;
};
template <>
struct OnDevice<BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct OnDevice<Half> {
  using type = __half;
};

template <typename Pair>
void launch(const Group& group, double weight, cudaStream_t stream) {
  using Slow = typename OnDevice<typename Pair::Slow>::type;
  using Fast = typename OnDevice<typename Pair::Fast>::type;
  using Math = typename Pair::Math;
  constexpr int64_t kChunk = Vector<Slow, Fast>::kChunk;
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  Table table;
  table.size = 0;
  int64_t blocks = 0;
  const auto flush = [&] {
    if (table.size > 0) {
      interpolate_kernel<Slow, Fast, Math><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
          table, static_cast<Math>(weight), static_cast<Math>(1.0 - weight));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    table.size = 0;
    blocks = 0;
  };
  for (const Span& span : group.spans) {
    const int64_t needed = (span.numel + kChunk - 1) / kChunk;
    STD_TORCH_CHECK(needed <= kMaxBlocks, "interpolate_: a tensor of ", span.numel, " elements is too large");
    if (table.size == kTableSize || blocks + needed > kMaxBlocks) {
      flush();
    }
    table.slow[table.size] = reinterpret_cast<int64_t>(span.slow);
    table.fast[table.size] = reinterpret_cast<int64_t>(span.fast);
    table.numel_low[table.size] = static_cast<uint32_t>(span.numel);
    table.numel_high[table.size] = static_cast<uint16_t>(span.numel >> 32);
    table.first_block[table.size] = static_cast<uint32_t>(blocks);
    ++table.size;
    blocks += needed;
  }
  flush();
}

void run_groups(const std::vector<Group>& groups, double weight) {
  for (const Group& group : groups) {
    const torch::stable::accelerator::DeviceGuard guard(group.device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(group.device, &stream));
    visit_dtype_pair(group.slow_dtype, group.fast_dtype, [&](auto pair) {
      launch<decltype(pair)>(group, weight, static_cast<cudaStream_t>(stream));
    });
  }
}

void interpolate_cuda(std::vector<Tensor> slow, std::vector<Tensor> fast, double weight) {
  run_groups(make_groups(slow, fast, weight, /*on_cuda=*/true), weight);
}

std::vector<int64_t> interpolate_taken_cuda(std::vector<Tensor> slow, std::vector<Tensor> fast, double weight) {
  const Shares shares = share_out(slow, fast, weight, /*on_cuda=*/true);
  run_groups(shares.groups, weight);
  return shares.left;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_gradmatch, CUDA, m) {
  m.impl("interpolate_", TORCH_BOX(&interpolate_cuda));
  m.impl("interpolate_taken_", TORCH_BOX(&interpolate_taken_cuda));
}

}  // namespace torch_gradmatch
