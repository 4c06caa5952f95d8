// The few words of AVX-512 that all kernels here are written in.
//
// Numbers are bfloat16 in memory and float32 in sums. One instruction, `vdpbf16ps`, adds two products to each
// of sixteen sums, so everything is laid out in pairs of inputs: [k / 2][lane][2].

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace motet {

using Bf16 = uint16_t;

constexpr int kLanes = 16;
constexpr int kRows = 12;  // at once: with two columns 24 sums, which with two weights and a pair fill the 32 registers

inline __m512bh load_pairs(const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// The pair at p in every lane.
inline __m512bh all_lanes(const Bf16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m512 load_widened(const Bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }

inline __m512 load_widened(const Bf16* p, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, p));
}

inline void store_narrowed(Bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

inline void store_narrowed(Bf16* p, __m512 x, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

inline __mmask16 first_lanes(int64_t n) { return n >= kLanes ? 0xffff : (__mmask16)((1u << (n < 0 ? 0 : n)) - 1); }

// The pairs with nothing but zero as their second number.
inline __m512bh first_halves(__m512bh pairs) { return (__m512bh)_mm512_maskz_mov_epi16(0x55555555, (__m512i)pairs); }

// e^x for x <= 0, to about 2e-7 of it; below -87 it is e^-87.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
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
#define MOTET_FOR_ROWS(function, rows, ...)     \
  switch (rows) {                               \
    case 1: function<1>(__VA_ARGS__); break;    \
    case 2: function<2>(__VA_ARGS__); break;    \
    case 3: function<3>(__VA_ARGS__); break;    \
    case 4: function<4>(__VA_ARGS__); break;    \
    case 5: function<5>(__VA_ARGS__); break;    \
    case 6: function<6>(__VA_ARGS__); break;    \
    case 7: function<7>(__VA_ARGS__); break;    \
    case 8: function<8>(__VA_ARGS__); break;    \
    case 9: function<9>(__VA_ARGS__); break;    \
    case 10: function<10>(__VA_ARGS__); break;  \
    case 11: function<11>(__VA_ARGS__); break;  \
    default: function<12>(__VA_ARGS__); break;  \
  }

}  // namespace motet
