// The words of `simd.h` on a CPU with AVX-512, VNNI and bfloat16: a register holds sixteen numbers.

#pragma once

namespace motet {

constexpr int kRows = 12;  // with two columns 24 sums; two weights and an input fill the 32 registers
constexpr int kColumns = 2;
constexpr int kQuantizedRows = 6;  // 12 sums in integers, 12 in float32
constexpr int kFewQuantizedRows = 8;
constexpr int kLoraTokens = 4;  // times as many rows of A
constexpr int kLoraStrips = 4;
constexpr int64_t kGroupBytes = 448 << 10;  // of weights that stay in L2 while all rows pass them

// The CPU itself fetches weights best for few rows. Where more rows pass, L1 is full of inputs and L2 near
// enough.
constexpr int kFewRows = 5;
constexpr int kAhead = 40;  // tuples of each output
inline void fetch_weights(const void* p) { fetch_far(p); }

using Floats = __m512;
using Ints = __m512i;
using Lanes = __mmask16;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const float* p, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Floats x, Lanes lanes) { _mm512_mask_storeu_ps(p, lanes, x); }
inline float first(Floats x) { return _mm512_cvtss_f32(x); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats abs(Floats x) { return _mm512_abs_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats nearest(Floats x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline Lanes less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Lanes not_at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline Floats select(Lanes lanes, Floats yes, Floats no) { return _mm512_mask_blend_ps(lanes, no, yes); }

inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Ints x) { _mm512_storeu_si512(p, x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
inline int32_t sum_of(Ints x) { return _mm512_reduce_add_epi32(x); }
inline Lanes at_most(Ints a, Ints b) { return _mm512_cmple_epi32_mask(a, b); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline Ints load_bytes(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
// As bytes, which they fit in.
inline void store_bytes(int8_t* p, Ints x, Lanes lanes) { _mm512_mask_cvtsepi32_storeu_epi8(p, lanes, x); }

// sum += the four products of bytes in each lane, `w` without a sign. GCC 12 makes two copies of every sum of
// the intrinsic.
inline Ints add_quads(Ints sum, Ints w, Ints x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

// Weights of eight bits are w - 128. Here w is multiplied, and sums begin at what corrects that.
constexpr int32_t kByteOffset = 128;
inline Ints add_byte_quads(Ints sum, Ints w, Ints x) { return add_quads(sum, w, x); }

inline Ints lower_halves(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline Ints upper_halves(Ints bytes) { return lower_halves(_mm512_srli_epi16(bytes, 4)); }

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
  static Tuples in_all_lanes(const Number* p) { return (Tuples)all(four_bytes(p)); }

  // With zero for all but the first number of each tuple.
  static Tuples firsts(Tuples x) { return (Tuples)_mm512_maskz_mov_epi16(0x55555555, (__m512i)x); }

  static Floats add_products(Floats sum, Tuples a, Tuples b) { return _mm512_dpbf16_ps(sum, a, b); }

  // The next 32 columns, or `count`, of two rows as pairs. Their sums come in an order of their own.
  static Woven weave(const Number* row, int64_t stride, int64_t count) {
    const __m512i first = (__m512i)load(row, count);
    const __m512i second = stride ? (__m512i)load(row + stride, count) : _mm512_setzero_si512();
    return {(Tuples)_mm512_unpacklo_epi16(first, second), (Tuples)_mm512_unpackhi_epi16(first, second)};
  }
  static void unravel(Floats low, Floats high, Floats* sums) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    sums[0] = _mm512_permutex2var_ps(low, first, high);
    sums[1] = _mm512_permutex2var_ps(low, second, high);
  }

  static float widen(Number x) { return widened(x); }
  static Number narrow(float x) {
    return (Number)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0);
  }
  static Floats rounded(Floats x) { return widen((__m256i)_mm512_cvtneps_pbh(x)); }
  static Floats read(const Number* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static Floats read(const Number* p, Lanes lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, p)); }
  static void write(Number* p, Floats x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
  static void write(Number* p, Floats x, Lanes lanes) {
    _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(x));
  }
  static void write_exact(Number* p, const Floats (&x)[2]) {
    alignas(64) static constexpr Number kUpper[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                    23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                    45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i upper = _mm512_load_si512(kUpper);
    _mm512_storeu_si512(
        p, _mm512_permutex2var_epi16(_mm512_castps_si512(x[0]), upper, _mm512_castps_si512(x[1])));
  }

 private:
  static Floats widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
};

}  // namespace motet
