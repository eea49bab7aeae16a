// What kernel.h uses of CUDA, in C++17, so that its text runs on a CPU: under sanitizers, and where there is no GPU.
//
// What this covers: arithmetic and rounding, indexing, alignment, the table of tensors, the cutting into launches. What
// it does not: races (one thread runs at a time, in an order of the caller's choice), what nvcc makes of the text, the
// limits and the behaviour of a driver and a device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index blockIdx{0};
inline Index threadIdx{0};

// Runs kernel() as each thread of the given blocks. No order is promised on a GPU: seed 0 is the ascending one, any
// other shuffles all threads of all blocks.
template <typename Kernel>
void launch_on_host(const std::vector<unsigned>& blocks, unsigned threads, uint64_t seed, const Kernel& kernel) {
  std::vector<uint64_t> order(blocks.size() * threads);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (seed != 0) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  }
  for (const uint64_t at : order) {
    blockIdx.x = blocks[at / threads];
    threadIdx.x = static_cast<unsigned>(at % threads);
    kernel();
  }
}

// ------------------------------------------------------------------------ conversions, by their definition, not fast

struct __nv_bfloat16 {  // the upper half of a float
  uint16_t bits;
};

struct __half {  // 1 bit of sign, 5 of exponent, 10 of fraction
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) {
    return {0x7FFF};
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t lower = bits & 0xFFFFu;
  uint32_t upper = bits >> 16;
  if (lower > 0x8000u || (lower == 0x8000u && upper % 2 == 1)) {
    ++upper;  // a carry into the exponent is right, up to infinity
  }
  return {static_cast<uint16_t>(upper)};
}

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 0x1F;
  const int fraction = value.bits & 0x3FF;
  float magnitude;
  if (exponent == 0x1F) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(0x400 + fraction), exponent - 25);
  }
  return std::copysign(magnitude, value.bits >> 15 == 0 ? 1.0f : -1.0f);
}

inline __half __float2half_rn(float value) {
  if (std::isnan(value)) {
    return {0x7FFF};
  }
  const float magnitude = std::fabs(value);
  int bits;
  if (magnitude >= 65536.0f) {
    bits = 0x7C00;
  } else {
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);  // that of the subnormal ones at least
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // ties to even
    bits = (exponent + 14) * 0x400 + units;  // units count from 0x400; 0x800 carries into the exponent, up to infinity
  }
  return {static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) + bits)};
}
