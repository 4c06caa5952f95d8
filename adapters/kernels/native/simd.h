// The words that all kernels are written in, sixteen numbers at a time, and the two kinds of numbers they
// know.
//
// Each instruction set has a file that says what they mean there; all else is written once. Sums are float32.
// What is multiplied lies in tuples of neighbouring inputs, one tuple for each sum: [k / tuple][lane][tuple].
// In bfloat16 a tuple is a pair, in float32 it is a single number.
//
//   Floats, Ints    sixteen of them
//   Lanes           which of sixteen: a bit for each
//   Bf16, F32       a kind of numbers: how they are read, written and multiplied
//
//   load, store     neighbouring numbers, or those of some lanes; other lanes are zeros, and stay as they are
//   fma(a, b, c)    a b + c, rounded once
//   write_exact     sixteen tuples, of numbers that the kind holds as they are
//   max(a, b)       b where one of them is NaN
//
// An instruction set also says how much of a product its registers hold: `kRows` rows times `kColumns`
// registers of outputs, and the weights and inputs that meet. And where weights are fetched to, and how far
// ahead (`kAhead`), for products of more than `kFewRows` rows.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace motet {

constexpr int kLanes = 16;

// What lies there: a tuple, or as many bytes.
inline int32_t four_bytes(const void* p) {
  int32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  return bytes;
}

// The number that a bfloat16 is.
inline float widened(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

// Four times four of four bytes each, from rows to columns.
inline void transpose(const void* from, int64_t stride, void* to, int64_t to_stride) {
  __m128 row[4];
  for (int i = 0; i < 4; i++) row[i] = _mm_loadu_ps((const float*)from + i * stride);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int i = 0; i < 4; i++) _mm_storeu_ps((float*)to + i * to_stride, row[i]);
}

// Into L1, or into L2.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void fetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace motet

// Sums stay in registers only where every loop over them is written out.
#define MOTET_EACH _Pragma("GCC unroll 16")

#if defined(__AVX512BF16__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#else
#error "these kernels want -march=x86-64-v4 -mavx512bf16 -mavx512vnni, or -mavx2 -mfma"
#endif

namespace motet {

inline Lanes first_lanes(int64_t n) { return n >= kLanes ? 0xffff : (Lanes)((1u << (n < 0 ? 0 : n)) - 1); }

struct F32 {
  using Number = float;
  using Tuples = Floats;
  static constexpr int kTuple = 1;
  struct Woven {
    Tuples first, second;
  };

  static Tuples load(const Number* p) { return motet::load(p); }
  static Tuples load(const Number* p, int64_t count) { return motet::load(p, first_lanes(count)); }
  static Tuples in_all_lanes(const Number* p) { return all(*p); }
  static Tuples firsts(Tuples x) { return x; }
  static Floats add_products(Floats sum, Tuples a, Tuples b) { return fma(a, b, sum); }

  static Woven weave(const Number* row, int64_t, int64_t count) {
    return {load(row, count), load(row + kLanes, count - kLanes)};
  }
  static void unravel(Floats low, Floats high, Floats* sums) {
    sums[0] = low;
    sums[1] = high;
  }

  static float widen(Number x) { return x; }
  static Number narrow(float x) { return x; }
  static Floats rounded(Floats x) { return x; }
  static Floats read(const Number* p) { return motet::load(p); }
  static Floats read(const Number* p, Lanes lanes) { return motet::load(p, lanes); }
  static void write(Number* p, Floats x) { store(p, x); }
  static void write(Number* p, Floats x, Lanes lanes) { store(p, x, lanes); }
  static void write_exact(Number* p, const Floats (&x)[1]) { store(p, x[0]); }
};

// e^x for x <= 0, to about 2e-7 of it, by the polynomial of Cephes; below -87 it is e^-87. NaN stays NaN.
inline Floats exponential(Floats x) {
  x = max(all(-87.0f), x);
  const Floats n = nearest(mul(x, all(1.44269504088896341f)));
  // what is left of x, with ln 2 in two parts so that nothing is lost
  Floats f = fnma(n, all(0.693359375f), x);
  f = fnma(n, all(-2.12194440e-4f), f);
  Floats p = all(1.9875691500e-4f);
  p = fma(p, f, all(1.3981999507e-3f));
  p = fma(p, f, all(8.3334519073e-3f));
  p = fma(p, f, all(4.1665795894e-2f));
  p = fma(p, f, all(1.6666665459e-1f));
  p = fma(p, f, all(5.0000001201e-1f));
  p = fma(mul(f, f), p, add(f, all(1.0f)));
  return times_power_of_two(p, n);
}

inline float exponential(float x) { return first(exponential(all(x))); }

template <int M>
using Rows = std::integral_constant<int, M>;

// function(Rows<rows>), or of kMost if there are more: the compiler writes it out for each number.
template <int kMost, class F>
inline void for_rows(int64_t rows, F&& function) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return for_rows<kMost - 1>(rows, function);
  }
  function(Rows<kMost>{});
}

}  // namespace motet
