// torch_gradmatch::interpolate_ on a CPU: one pass over memory, all tensors in one flat index space.
//
// The step is bound by memory, so what matters is to read and write each element once, on all threads, whatever the
// sizes of the tensors. The loops are plain C++ that the compiler vectorizes, compiled once for each of three levels of
// x86-64; which one runs is decided when the library is loaded. Elsewhere there is the compiler's baseline (NEON on Arm).
#include "../interpolate.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define TORCH_GRADMATCH_X86_LEVELS 1
#include <immintrin.h>
#else
#define TORCH_GRADMATCH_X86_LEVELS 0
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

namespace torch_gradmatch {
namespace {

// ---------------------------------------------------------------------------------------- conversions that vectorize

ALWAYS_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

ALWAYS_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

ALWAYS_INLINE float load(float value) { return value; }
ALWAYS_INLINE double load(double value) { return value; }
ALWAYS_INLINE float load(BFloat16 value) { return as_float(static_cast<uint32_t>(value.x) << 16); }

// Half to float without branches: normal numbers by rescaling, subnormal ones by a float subtraction.
ALWAYS_INLINE float load(Half value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t twice = bits + bits;
  const float normal = as_float((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = as_float((twice >> 17) | (126u << 23)) - 0.5f;
  return as_float(sign | (twice < (1u << 27) ? as_bits(subnormal) : as_bits(normal)));
}

template <typename Stored, typename Math>
struct Store {
  static ALWAYS_INLINE Stored from(Math value) { return value; }
};

// Round to nearest, ties to even; NaN stays NaN.
template <>
struct Store<BFloat16, float> {
  static ALWAYS_INLINE BFloat16 from(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return BFloat16(static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded), BFloat16::from_bits());
  }
};

// Scale up to overflow and down again, so that float addition rounds to eleven bits; ties to even, NaN stays NaN.
template <>
struct Store<Half, float> {
  static ALWAYS_INLINE Half from(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t twice = bits + bits;
    const float scaled = as_float(bits & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
    const uint32_t exponent = twice & 0xFF000000u;
    const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
    const uint32_t sum = as_bits(as_float((bias >> 1) + 0x07800000u) + scaled);
    const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
    return Half(
        static_cast<uint16_t>((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : magnitude)), Half::from_bits());
  }
};

// ------------------------------------------------------------------------------------------------------ the pass

// Exact at weight 0 and 1, where it copies; in between the formula whose smaller factor multiplies the difference.
template <typename Slow, typename Fast, typename Math>
ALWAYS_INLINE void interpolate_span(Slow* __restrict__ slow, Fast* __restrict__ fast, int64_t n, double weight) {
  const Math w = static_cast<Math>(weight);
  const Math rest = static_cast<Math>(1.0 - weight);
  const auto put = [&](int64_t i, Slow moved) __attribute__((always_inline)) {
    slow[i] = moved;
    if constexpr (std::is_same_v<Slow, Fast>) {
      fast[i] = moved;
    } else {
      fast[i] = Store<Fast, Math>::from(load(moved));
    }
  };
  if (weight == 0.0) {
    for (int64_t i = 0; i < n; ++i) {
      put(i, slow[i]);
    }
  } else if (weight == 1.0) {
    for (int64_t i = 0; i < n; ++i) {
      put(i, Store<Slow, Math>::from(load(fast[i])));
    }
  } else if (weight < 0.5) {
    for (int64_t i = 0; i < n; ++i) {
      const Math s = load(slow[i]);
      const Math f = load(fast[i]);
      put(i, Store<Slow, Math>::from(s + w * (f - s)));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Math s = load(slow[i]);
      const Math f = load(fast[i]);
      put(i, Store<Slow, Math>::from(f - (f - s) * rest));
    }
  }
}

using SpanFunction = void (*)(char*, char*, int64_t, double);

template <typename Pair>
ALWAYS_INLINE void interpolate_pair(char* slow, char* fast, int64_t n, double weight) {
  using Slow = typename Pair::Slow;
  using Fast = typename Pair::Fast;
  interpolate_span<Slow, Fast, typename Pair::Math>(
      reinterpret_cast<Slow*>(slow), reinterpret_cast<Fast*>(fast), n, weight);
}

template <typename Pair>
void span_baseline(char* slow, char* fast, int64_t n, double weight) {
  interpolate_pair<Pair>(slow, fast, n, weight);
}

#if TORCH_GRADMATCH_X86_LEVELS

// Half precision on x86-64: the processor's own conversions, through blocks of floats that stay in the first cache.
constexpr int64_t kBlock = 1024;

__attribute__((target("avx2,f16c"))) void widen(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) {
    to[i] = load(from[i]);
  }
}

__attribute__((target("avx2,f16c"))) void narrow(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), rounded);
  }
  for (; i < n; ++i) {
    to[i] = Store<Half, float>::from(from[i]);
  }
}

template <typename Pair>
ALWAYS_INLINE void interpolate_x86(char* slow_bytes, char* fast_bytes, int64_t n, double weight) {
  using Slow = typename Pair::Slow;
  using Fast = typename Pair::Fast;
  if constexpr (!std::is_same_v<Fast, Half>) {
    interpolate_pair<Pair>(slow_bytes, fast_bytes, n, weight);
  } else {
    auto* slow = reinterpret_cast<Slow*>(slow_bytes);
    auto* fast = reinterpret_cast<Half*>(fast_bytes);
    alignas(64) float wide_slow[kBlock];
    alignas(64) float wide_fast[kBlock];
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t m = std::min(kBlock, n - begin);
      widen(fast + begin, wide_fast, m);
      if constexpr (std::is_same_v<Slow, Half>) {
        widen(slow + begin, wide_slow, m);
        interpolate_span<float, float, float>(wide_slow, wide_fast, m, weight);
        narrow(wide_slow, slow + begin, m);
        std::memcpy(static_cast<void*>(fast + begin), slow + begin, m * sizeof(Half));
      } else {
        interpolate_span<float, float, float>(slow + begin, wide_fast, m, weight);
        narrow(slow + begin, fast + begin, m);
      }
    }
  }
}

template <typename Pair>
__attribute__((target("avx2,fma,f16c"))) void span_avx2(char* slow, char* fast, int64_t n, double weight) {
  interpolate_x86<Pair>(slow, fast, n, weight);
}

template <typename Pair>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
void span_avx512(char* slow, char* fast, int64_t n, double weight) {
  interpolate_x86<Pair>(slow, fast, n, weight);
}

#endif

enum class Level { baseline, avx2, avx512 };

// TORCH_GRADMATCH_CPU_LEVEL=baseline|avx2|avx512 lowers what the processor offers, so that every level can be tested.
Level choose_level() {
#if TORCH_GRADMATCH_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("TORCH_GRADMATCH_CPU_LEVEL");
  const bool at_most_avx2 = asked != nullptr && std::strcmp(asked, "avx512") != 0;
  const bool at_most_baseline = at_most_avx2 && std::strcmp(asked, "avx2") != 0;
  if (avx512 && !at_most_avx2) {
    return Level::avx512;
  }
  if (avx2 && !at_most_baseline) {
    return Level::avx2;
  }
#endif
  return Level::baseline;
}

template <typename Pair>
SpanFunction span_function() {
  static const Level level = choose_level();
#if TORCH_GRADMATCH_X86_LEVELS
  if (level == Level::avx512) {
    return span_avx512<Pair>;
  }
  if (level == Level::avx2) {
    return span_avx2<Pair>;
  }
#endif
  return span_baseline<Pair>;
}

constexpr int64_t kGrain = 1 << 16;  // elements for which a second thread is worth waking

void interpolate_cpu(std::vector<Tensor> slow, std::vector<Tensor> fast, double weight) {
  for (const Group& group : make_groups(slow, fast, weight, /*on_cuda=*/false)) {
    visit_dtype_pair(group.slow_dtype, group.fast_dtype, [&](auto pair) {
      using Pair = decltype(pair);
      const SpanFunction run = span_function<Pair>();
      torch::stable::parallel_for(0, group.numel, kGrain, [&](int64_t begin, int64_t end) {
        const auto after = [](int64_t position, const Span& span) { return position < span.start; };
        auto span = std::upper_bound(group.spans.begin(), group.spans.end(), begin, after) - 1;
        for (; begin < end; ++span) {
          const int64_t offset = begin - span->start;
          const int64_t n = std::min(end - begin, span->numel - offset);
          run(span->slow + offset * static_cast<int64_t>(sizeof(typename Pair::Slow)),
              span->fast + offset * static_cast<int64_t>(sizeof(typename Pair::Fast)), n, weight);
          begin += n;
        }
      });
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_gradmatch, CPU, m) {
  m.impl("interpolate_", TORCH_BOX(&interpolate_cpu));
}

}  // namespace torch_gradmatch
