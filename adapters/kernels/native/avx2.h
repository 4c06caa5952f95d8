// The words of `simd.h` on a CPU with AVX2 and FMA: two registers hold sixteen numbers.
//
// There is no product of bfloat16: pairs are widened to float32, the weight's once for all rows that meet it.
// Nor is there one of four bytes at once: products of two neighbours are added in sixteen bits, where those
// of unsigned bytes with a sign's 127 would not fit. So weights of eight bits get their sign back, and give
// theirs to the inputs' absolute values.

#pragma once

namespace motet {

constexpr int kRows = 4;  // 8 registers of sums; four of a widened weight, two of an input
constexpr int kColumns = 1;
constexpr int kQuantizedRows = 4;
constexpr int kFewQuantizedRows = 4;
constexpr int kLoraTokens = 2;  // times as many rows of A
constexpr int kLoraStrips = 2;
constexpr int64_t kGroupBytes = 192 << 10;  // of weights that stay in L2 while all rows pass them

// For any number of rows.
constexpr int kFewRows = 0;
constexpr int kAhead = 64;  // tuples of each output
inline void fetch_weights(const void* p) { fetch(p); }

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
using Lanes = uint32_t;

// Lanes of eight numbers, from a bit for each.
inline __m256i spread(Lanes lanes) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)lanes), bits), bits);
}
inline Lanes bits_of(__m256 low, __m256 high) {
  return (Lanes)_mm256_movemask_ps(low) | (Lanes)_mm256_movemask_ps(high) << 8;
}

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const float* p, Lanes lanes) {
  if (lanes == 0xffff) return load(p);
  return {_mm256_maskload_ps(p, spread(lanes)), _mm256_maskload_ps(p + 8, spread(lanes >> 8))};
}
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline void store(float* p, Floats x, Lanes lanes) {
  if (lanes == 0xffff) return store(p, x);
  _mm256_maskstore_ps(p, spread(lanes), x.low);
  _mm256_maskstore_ps(p + 8, spread(lanes >> 8), x.high);
}
inline float first(Floats x) { return _mm256_cvtss_f32(x.low); }

inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats nearest(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
// n whole, -126..127.
inline Floats times_power_of_two(Floats x, Floats n) {
  const auto power = [](__m256 n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(x.low, power(n.low)), _mm256_mul_ps(x.high, power(n.high))};
}
inline float sum_of(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest_of(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Lanes less(Floats a, Floats b) {
  return bits_of(_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ));
}
inline Lanes not_at_most(Floats a, Floats b) {
  return bits_of(_mm256_cmp_ps(a.low, b.low, _CMP_NLE_UQ), _mm256_cmp_ps(a.high, b.high, _CMP_NLE_UQ));
}
inline Floats select(Lanes lanes, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.low, yes.low, _mm256_castsi256_ps(spread(lanes))),
          _mm256_blendv_ps(no.high, yes.high, _mm256_castsi256_ps(spread(lanes >> 8)))};
}

inline Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints lane_numbers() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
inline Ints load(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline void store(void* p, Ints x) {
  _mm256_storeu_si256((__m256i*)p, x.low);
  _mm256_storeu_si256((__m256i*)p + 1, x.high);
}
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
inline Ints min(Ints a, Ints b) { return {_mm256_min_epi32(a.low, b.low), _mm256_min_epi32(a.high, b.high)}; }
inline int32_t sum_of(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline Lanes at_most(Ints a, Ints b) {
  return 0xffff ^ bits_of(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.low, b.low)),
                          _mm256_castsi256_ps(_mm256_cmpgt_epi32(a.high, b.high)));
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Ints load_bytes(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
// As bytes, which they fit in.
inline void store_bytes(int8_t* p, Ints x, Lanes lanes) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (lanes == 0xffff) return _mm_storeu_si128((__m128i*)p, bytes);
  alignas(16) int8_t each[kLanes];
  _mm_store_si128((__m128i*)each, bytes);
  for (int i = 0; i < kLanes; i++)
    if (lanes >> i & 1) p[i] = each[i];
}

// sum += the four products of bytes in each lane, `w` in 0..127.
inline Ints add_quads(Ints sum, Ints w, Ints x) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(_mm256_maddubs_epi16(w.low, x.low), ones)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(_mm256_maddubs_epi16(w.high, x.high), ones))};
}

// Weights of eight bits are w - 128, and are multiplied as such. `x` in -127..127.
constexpr int32_t kByteOffset = 0;
inline Ints add_byte_quads(Ints sum, Ints w, Ints x) {
  const __m256i top = _mm256_set1_epi8(-128);
  const auto with_sign_of = [&](__m256i w, __m256i x) {
    return _mm256_sign_epi8(_mm256_xor_si256(w, top), x);
  };
  return add_quads(sum, {_mm256_abs_epi8(x.low), _mm256_abs_epi8(x.high)},
                   {with_sign_of(w.low, x.low), with_sign_of(w.high, x.high)});
}

inline Ints lower_halves(Ints bytes) {
  const __m256i lower = _mm256_set1_epi8(15);
  return {_mm256_and_si256(bytes.low, lower), _mm256_and_si256(bytes.high, lower)};
}
inline Ints upper_halves(Ints bytes) {
  return lower_halves({_mm256_srli_epi16(bytes.low, 4), _mm256_srli_epi16(bytes.high, 4)});
}

struct Bf16 {
  using Number = uint16_t;
  using Tuples = Ints;  // pairs
  static constexpr int kTuple = 2;
  struct Woven {
    Tuples first, second;
  };

  static Tuples load(const Number* p) { return motet::load((const void*)p); }
  static Tuples load(const Number* p, int64_t count) {
    if (count >= 32) return load(p);
    alignas(32) Number some[32] = {};
    if (count > 0) memcpy(some, p, count * sizeof *p);
    return load(some);
  }

  // The tuple at p in every lane.
  static Tuples in_all_lanes(const Number* p) { return all(four_bytes(p)); }

  // With zero for all but the first number of each tuple.
  static Tuples firsts(Tuples x) {
    const __m256i firsts = _mm256_set1_epi32(0xffff);
    return {_mm256_and_si256(x.low, firsts), _mm256_and_si256(x.high, firsts)};
  }

  static Floats add_products(Floats sum, Tuples a, Tuples b) {
    const auto add = [](__m256 sum, __m256i a, __m256i b) {
      return _mm256_fmadd_ps(second(a), second(b), _mm256_fmadd_ps(first(a), first(b), sum));
    };
    return {add(sum.low, a.low, b.low), add(sum.high, a.high, b.high)};
  }

  // The next 32 columns, or `count`, of two rows as pairs. Their sums come in an order of their own.
  static Woven weave(const Number* row, int64_t stride, int64_t count) {
    const Tuples a = load(row, count), b = stride ? load(row + stride, count) : all(0);
    return {{_mm256_unpacklo_epi16(a.low, b.low), _mm256_unpackhi_epi16(a.low, b.low)},
            {_mm256_unpacklo_epi16(a.high, b.high), _mm256_unpackhi_epi16(a.high, b.high)}};
  }
  static void unravel(Floats low, Floats high, Floats* sums) {
    const auto in_order = [](Floats x) -> Floats {
      return {_mm256_permute2f128_ps(x.low, x.high, 0x20), _mm256_permute2f128_ps(x.low, x.high, 0x31)};
    };
    sums[0] = in_order(low);
    sums[1] = in_order(high);
  }

  static float widen(Number x) { return widened(x); }
  static Number narrow(float x) {
    return (Number)_mm256_cvtsi256_si32(upper(_mm256_castps_si256(_mm256_set1_ps(x))));
  }
  static Floats rounded(Floats x) {
    const auto half = [](__m256 x) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(upper(_mm256_castps_si256(x)), 16));
    };
    return {half(x.low), half(x.high)};
  }
  static Floats read(const Number* p) {
    const auto half = [](const Number* p) {
      return _mm256_castsi256_ps(
          _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    };
    return {half(p), half(p + 8)};
  }
  static Floats read(const Number* p, Lanes lanes) {
    if (lanes == 0xffff) return read(p);
    Number some[kLanes] = {};
    for (int i = 0; i < kLanes; i++)
      if (lanes >> i & 1) some[i] = p[i];
    return read(some);
  }
  static void write(Number* p, Floats x) {
    const __m256i low = upper(_mm256_castps_si256(x.low)), high = upper(_mm256_castps_si256(x.high));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
  }
  static void write(Number* p, Floats x, Lanes lanes) {
    if (lanes == 0xffff) return write(p, x);
    Number some[kLanes];
    write(some, x);
    for (int i = 0; i < kLanes; i++)
      if (lanes >> i & 1) p[i] = some[i];
  }
  static void write_exact(Number* p, const Floats (&x)[2]) {
    const auto upper = [](__m256 x) { return _mm256_srli_epi32(_mm256_castps_si256(x), 16); };
    for (int i = 0; i < 2; i++) {
      const __m256i both = _mm256_packus_epi32(upper(x[i].low), upper(x[i].high));
      _mm256_storeu_si256((__m256i*)(p + i * kLanes), _mm256_permute4x64_epi64(both, 0xd8));
    }
  }

 private:
  static __m256 first(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static __m256 second(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
  }
  // The upper halves of float32, rounded to nearest, to even between two; NaN stays NaN.
  static __m256i upper(__m256i x) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i more = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 number = _mm256_castsi256_ps(x);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(number, number, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(more, quiet, nan), 16);
  }
};

}  // namespace motet
