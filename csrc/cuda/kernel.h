// The CUDA kernel of torch_gradmatch::interpolate_ and how tensors are cut into launches. Nothing of torch: this text is
// compiled by nvcc for a GPU and, with tests/slow/on_host/ in place of CUDA, by a C++ compiler for its tests.
//
//   slow <- slow + weight (fast - slow);  fast <- cast(slow)
//
// The table of tensors is a kernel argument, so nothing is copied to the device beforehand, nothing synchronizes, and a
// CUDA graph captures the launch with it. A block works on one chunk of one tensor, which it finds by bisection in the
// table. Chunks begin at multiples of the vector width, so an aligned tensor is read and written a
// vector at a time, but for its last few elements; a misaligned one goes element by element.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <type_traits>

namespace torch_gradmatch {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;
constexpr int kBlocksPerSM = 4;  // leaves a thread 64 registers, so that its vectors stay in them
constexpr int kTableSize = 128;  // 128 x 26 bytes stay below the 4 KiB that every GPU takes as arguments
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

struct Table {
  int64_t slow[kTableSize];
  int64_t fast[kTableSize];
  uint32_t numel_low[kTableSize];  // numel = high << 32 | low
  uint16_t numel_high[kTableSize];
  uint32_t first_block[kTableSize];
  int32_t size;
};
static_assert(sizeof(Table) <= 4096 - 3 * 16, "the table has to fit into the kernel's arguments");

// What a thread reads of each tensor at a time: 16 bytes of the wider dtype. Neighbouring threads then touch
// neighbouring bytes of both; were it 16 bytes of the narrower one, a warp's access to the other would have gaps.
template <typename Slow, typename Fast>
struct Shape {
  static constexpr int kWider = sizeof(Slow) > sizeof(Fast) ? sizeof(Slow) : sizeof(Fast);
  static constexpr int kWidth = 16 / kWider;  // elements in a vector
  static constexpr int kChunk = kThreads * kVectorsPerThread * kWidth;  // elements for a block
};

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
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

// s + weight (f - s) below weight 0.5 and f - (1 - weight) (f - s) from there on, so that the smaller factor multiplies
// the difference; at weight 0 and 1 a copy, since the difference of two finite numbers may be infinite. One formula for
// all of it, without branches: these cost registers where many elements are in flight.
template <typename Math>
struct Formula {
  Math factor;
  bool from_slow;
  bool copies;

  __device__ __forceinline__ Formula(Math weight, Math rest)
      : factor(weight < Math(0.5) ? weight : -rest),
        from_slow(weight < Math(0.5)),
        copies(weight == Math(0) || rest == Math(0)) {}

  __device__ __forceinline__ Math operator()(Math s, Math f) const {
    const Math from = from_slow ? s : f;
    const Math moved = from + factor * (f - s);
    return copies ? from : moved;
  }
};

template <typename Slow, typename Fast, typename Math>
__device__ __forceinline__ void interpolate_element(Slow& slow, Fast& fast, const Formula<Math>& formula) {
  slow = from_math<Slow>(formula(to_math(slow), to_math(fast)));
  fast = from_math<Fast>(to_math(slow));
}

template <typename Slow, typename Fast, int N, typename Math>
__device__ __forceinline__ void interpolate_vector(
    Vector<Slow, N>& slow, Vector<Fast, N>& fast, const Formula<Math>& formula) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    interpolate_element(slow.element[j], fast.element[j], formula);
  }
}

template <typename Slow, typename Fast, typename Math>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    interpolate_kernel(const __grid_constant__ Table table, const Math weight, const Math rest) {
  constexpr int kWidth = Shape<Slow, Fast>::kWidth;
  constexpr int kChunk = Shape<Slow, Fast>::kChunk;
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
  const int64_t numel = static_cast<int64_t>(table.numel_high[low]) << 32 | table.numel_low[low];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[low]) * kChunk;
  Slow* const slow = reinterpret_cast<Slow*>(table.slow[low]) + begin;
  Fast* const fast = reinterpret_cast<Fast*>(table.fast[low]) + begin;
  const int n = numel - begin < kChunk ? static_cast<int>(numel - begin) : kChunk;
  const int thread = static_cast<int>(threadIdx.x);
  const Formula<Math> formula(weight, rest);

  using SlowVector = Vector<Slow, kWidth>;
  using FastVector = Vector<Fast, kWidth>;
  int done = 0;
  if (table.slow[low] % sizeof(SlowVector) == 0 && table.fast[low] % sizeof(FastVector) == 0) {
    SlowVector* const slow_vectors = reinterpret_cast<SlowVector*>(slow);
    FastVector* const fast_vectors = reinterpret_cast<FastVector*>(fast);
    const int vectors = n / kWidth;
    if (n == kChunk) {
      SlowVector s[kVectorsPerThread];
      FastVector f[kVectorsPerThread];
#pragma unroll
      for (int i = 0; i < kVectorsPerThread; ++i) {  // all loads before the first use: enough bytes in flight
        s[i] = slow_vectors[i * kThreads + thread];
        f[i] = fast_vectors[i * kThreads + thread];
      }
#pragma unroll
      for (int i = 0; i < kVectorsPerThread; ++i) {
        interpolate_vector(s[i], f[i], formula);
        slow_vectors[i * kThreads + thread] = s[i];
        fast_vectors[i * kThreads + thread] = f[i];
      }
      return;
    }
#pragma unroll 1
    for (int v = thread; v < vectors; v += kThreads) {  // the last block of a tensor
      SlowVector s = slow_vectors[v];
      FastVector f = fast_vectors[v];
      interpolate_vector(s, f, formula);
      slow_vectors[v] = s;
      fast_vectors[v] = f;
    }
    done = vectors * kWidth;
  }
#pragma unroll 4
  for (int i = done + thread; i < n; i += kThreads) {  // what is left of it, or all that is misaligned
    interpolate_element(slow[i], fast[i], formula);
  }
}

// Cuts tensors into launches of at most kTableSize tensors and kMaxBlocks blocks, and calls launch(table, blocks) for
// each. `spans` are structs with pointers `slow` and `fast` and an int64_t `numel` > 0, below 2^48. Returns nullptr, or
// the first span that no launch takes; nothing was launched then.
template <typename Slow, typename Fast, typename Spans, typename Launch>
auto for_each_launch(const Spans& spans, const Launch& launch) -> decltype(spans.data()) {
  constexpr int64_t kChunk = Shape<Slow, Fast>::kChunk;
  const auto blocks_for = [](int64_t numel) { return (numel + kChunk - 1) / kChunk; };
  for (const auto& span : spans) {
    if (blocks_for(span.numel) > kMaxBlocks) {
      return &span;
    }
  }
  Table table;
  table.size = 0;
  int64_t blocks = 0;
  for (const auto& span : spans) {
    const int64_t needed = blocks_for(span.numel);
    if (table.size == kTableSize || blocks + needed > kMaxBlocks) {
      launch(table, static_cast<unsigned>(blocks));
      table.size = 0;
      blocks = 0;
    }
    table.slow[table.size] = reinterpret_cast<int64_t>(span.slow);
    table.fast[table.size] = reinterpret_cast<int64_t>(span.fast);
    table.numel_low[table.size] = static_cast<uint32_t>(span.numel);
    table.numel_high[table.size] = static_cast<uint16_t>(span.numel >> 32);
    table.first_block[table.size] = static_cast<uint32_t>(blocks);
    ++table.size;
    blocks += needed;
  }
  if (table.size > 0) {
    launch(table, static_cast<unsigned>(blocks));
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace torch_gradmatch
