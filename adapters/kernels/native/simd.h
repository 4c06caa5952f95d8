// The few words of AVX-512 that all kernels here are written in, and the two kinds of numbers they know.
//
// Sums are float32, sixteen in a register. What is multiplied lies in tuples of neighbouring inputs, one
// tuple for each sum: [k / tuple][lane][tuple]. In bfloat16 a tuple is a pair, because one instruction
// (`vdpbf16ps`) adds two products to each sum; in float32 it is a single number.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace motet {

constexpr int kLanes = 16;
constexpr int kRows =
    12;  // at once: with two columns 24 sums; two weights and an input fill the 32 registers

inline __mmask16 first_lanes(int64_t n) {
  return n >= kLanes ? 0xffff : (__mmask16)((1u << (n < 0 ? 0 : n)) - 1);
}

struct Bf16 {
  using Number = uint16_t;
  using Tuples = __m512bh;
  static constexpr int kTuple = 2;
  struct Woven {
    Tuples first, second;
  };

  static Tuples load(const Number* p) { return (Tuples)_mm512_loadu_si512(p); }
  static Tuples load(const Number* p, int64_t count) {
    if (count == 32) return load(p);
    return (Tuples)_mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, p);
  }

  // The tuple at p in every lane.
  static Tuples in_all_lanes(const Number* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (Tuples)_mm512_set1_epi32(pair);
  }

  // With zero for all but the first number of each tuple.
  static Tuples firsts(Tuples x) { return (Tuples)_mm512_maskz_mov_epi16(0x55555555, (__m512i)x); }

  static __m512 add_products(__m512 sum, Tuples a, Tuples b) { return _mm512_dpbf16_ps(sum, a, b); }

  // The next 32 columns, or `count`, of two rows as pairs. Their sums come in an order of their own.
  static Woven weave(const Number* row, int64_t stride, int64_t count) {
    const __m512i first = (__m512i)load(row, count);
    const __m512i second = stride ? (__m512i)load(row + stride, count) : _mm512_setzero_si512();
    return {(Tuples)_mm512_unpacklo_epi16(first, second), (Tuples)_mm512_unpackhi_epi16(first, second)};
  }
  static void unravel(__m512 low, __m512 high, __m512* sums) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    sums[0] = _mm512_permutex2var_ps(low, first, high);
    sums[1] = _mm512_permutex2var_ps(low, second, high);
  }

  static float widen(Number x) {
    const uint32_t bits = (uint32_t)x << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
  }
  static __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static __m512 rounded(__m512 x) { return widen((__m256i)_mm512_cvtneps_pbh(x)); }
  static __m512 read(const Number* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static __m512 read(const Number* p, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, p)); }
  static Number narrow(float x) {
    return (Number)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0);
  }
  static void write(Number* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
  static void write(Number* p, __m512 x, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(x));
  }
};

struct F32 {
  using Number = float;
  using Tuples = __m512;
  static constexpr int kTuple = 1;
  struct Woven {
    Tuples first, second;
  };

  static Tuples load(const Number* p) { return _mm512_loadu_ps(p); }
  static Tuples load(const Number* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
  static Tuples in_all_lanes(const Number* p) { return _mm512_set1_ps(*p); }
  static Tuples firsts(Tuples x) { return x; }
  static __m512 add_products(__m512 sum, Tuples a, Tuples b) { return _mm512_fmadd_ps(a, b, sum); }

  static Woven weave(const Number* row, int64_t, int64_t count) {
    return {load(row, count), load(row + kLanes, count - kLanes)};
  }
  static void unravel(__m512 low, __m512 high, __m512* sums) {
    sums[0] = low;
    sums[1] = high;
  }

  static float widen(Number x) { return x; }
  static __m512 rounded(__m512 x) { return x; }
  static __m512 read(const Number* p) { return _mm512_loadu_ps(p); }
  static __m512 read(const Number* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
  static Number narrow(float x) { return x; }
  static void write(Number* p, __m512 x) { _mm512_storeu_ps(p, x); }
  static void write(Number* p, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(p, lanes, x); }
};

// e^x for x <= 0, to about 2e-7 of it, by the polynomial of Cephes; below -87 it is e^-87. NaN stays NaN.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // of NaN and a number the second
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // what is left of x, with ln 2 in two parts so that nothing is lost
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(f, f), p, _mm512_add_ps(f, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline float exponential(float x) { return _mm512_cvtss_f32(exponential(_mm512_set1_ps(x))); }

// The compiler writes out `function` for each number of rows.
#define MOTET_FOR_ROWS(function, rows, ...)       \
  switch (rows) {                                 \
    case 1: function<T, 1>(__VA_ARGS__); break;   \
    case 2: function<T, 2>(__VA_ARGS__); break;   \
    case 3: function<T, 3>(__VA_ARGS__); break;   \
    case 4: function<T, 4>(__VA_ARGS__); break;   \
    case 5: function<T, 5>(__VA_ARGS__); break;   \
    case 6: function<T, 6>(__VA_ARGS__); break;   \
    case 7: function<T, 7>(__VA_ARGS__); break;   \
    case 8: function<T, 8>(__VA_ARGS__); break;   \
    case 9: function<T, 9>(__VA_ARGS__); break;   \
    case 10: function<T, 10>(__VA_ARGS__); break; \
    case 11: function<T, 11>(__VA_ARGS__); break; \
    default: function<T, 12>(__VA_ARGS__); break; \
  }

}  // namespace motet
