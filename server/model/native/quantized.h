// y = x W^T + b over weights of eight or four bits.
//
//   x    scale of the group x p             p in -127..127, a group is 128 neighbouring inputs of a row
//   W8   scale of the output x (q - 128)    panels of 32 outputs: [in / 4][32][4] bytes
//   W4   scale of the block x (q - 8)       panels of 32 outputs: [in / 8][32][4] bytes, each an input in its
//   lower
//                                           half and the one four further in its upper; a block is 32 inputs
//
// One instruction (`vpdpbusd`) adds four products of a byte without a sign and one with a sign to each of
// sixteen sums, twice as many as in bfloat16. Weights are the ones without a sign: what corrects that depends
// on the row alone, and is where its sums begin. Sums of a block are exact and blocks are added in their
// order, so a row has the same bits in any company here too.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "adapters/kernels/native/simd.h"
#include "linear.h"

namespace motet {

constexpr int64_t kQuad = 4;
constexpr int64_t kGroup = 128;
constexpr int64_t kBlock = 32;
constexpr int kQuantizedRows = 6;  // at once: 12 sums in integers, 12 in float32

// Sums stay in registers only where every loop over them is written out.
#define MOTET_EACH _Pragma("GCC unroll 8")

inline int64_t quads(int64_t in) { return (in + 7) / 8 * 2; }  // whole pairs of them
inline int64_t groups_of(int64_t in) { return (in + kGroup - 1) / kGroup; }
inline int64_t blocks_of(int64_t in) { return (in + kBlock - 1) / kBlock; }
inline int64_t panel_bytes(int64_t in, int64_t bits) { return kPanel * quads(in) * kQuad * bits / 8; }

// Rows of a product, quantised. The rest of the last quads is zeros.
struct QuantizedRows {
  int8_t* numbers;  // [rows, 4 quads]
  float* scales;    // [rows, groups]
  int32_t* sums;    // [rows, blocks] of p
};

template <class T>
struct QuantizedProduct {
  using Number = typename T::Number;
  QuantizedRows x;
  const uint8_t* w;    // panels
  const void* scales;  // W8: float [out], W4: bfloat16 [panels, blocks, 32]; filled up to whole panels
  const Number* bias;  // [out] or null
  Number* y;           // [rows, out]
  int64_t y_stride;
  int64_t in, out, bits;
};

// Four products to each of sixteen sums. Of the intrinsic GCC 12 makes two copies of every sum.
inline __m512i add_quads(__m512i sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

// NaN in a group makes a row of NaN.
template <class T>
void quantize_row(const typename T::Number* x, int64_t in, int64_t row, const QuantizedRows& to) {
  int8_t* numbers = to.numbers + row * quads(in) * kQuad;
  float* scales = to.scales + row * groups_of(in);
  int32_t* sums = to.sums + row * blocks_of(in);
  for (int64_t begin = 0; begin < in; begin += kGroup, scales++) {
    const int64_t end = std::min(begin + kGroup, in);
    __m512 most = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (int64_t i = begin; i < end; i += kLanes) {
      const __m512 v = T::read(x + i, first_lanes(end - i));
      odd |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      most = _mm512_max_ps(most, _mm512_abs_ps(v));
    }
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    *scales = odd ? NAN : largest / 127.0f;
    for (int64_t block = begin; block < end; block += kBlock) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = block; i < std::min(block + kBlock, end); i += kLanes) {
        const __mmask16 lanes = first_lanes(end - i);
        const __m512i p = _mm512_cvtps_epi32(_mm512_mul_ps(T::read(x + i, lanes), inverse));
        sum = _mm512_add_epi32(sum, p);
        _mm512_mask_cvtsepi32_storeu_epi8(numbers + i, lanes, p);
      }
      *sums++ = _mm512_reduce_add_epi32(sum);
    }
  }
  for (int64_t i = in; i < quads(in) * kQuad; i++) numbers[i] = 0;
}

// An output's weights into its lane of a panel.
template <class T>
void quantize_to_bytes(const typename T::Number* w, int64_t in, int64_t output, uint8_t* packed,
                       float* scales) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < in; i += kLanes)
    most = _mm512_max_ps(most, _mm512_abs_ps(T::read(w + i, first_lanes(in - i))));
  const float largest = _mm512_reduce_max_ps(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
  scales[output] = largest / 127.0f;
  uint8_t* to = packed + output / kPanel * panel_bytes(in, 8) + output % kPanel * kQuad;
  for (int64_t i = 0; i < in; i++)
    to[i / kQuad * kQuad * kPanel + i % kQuad] = (uint8_t)(128 + std::lrint(T::widen(w[i]) * inverse));
}

// Whole numbers -8..7 for 32 weights at a scale, and the square of what is lost.
inline float rounded_block(const __m512 v[2], float scale, __m512i q[2]) {
  const __m512 inverse = _mm512_set1_ps(scale != 0 ? 1.0f / scale : 0.0f), step = _mm512_set1_ps(scale);
  __m512 lost = _mm512_setzero_ps();
  for (int h = 0; h < 2; h++) {
    q[h] = _mm512_cvtps_epi32(_mm512_mul_ps(v[h], inverse));
    q[h] = _mm512_max_epi32(_mm512_set1_epi32(-8), _mm512_min_epi32(_mm512_set1_epi32(7), q[h]));
    const __m512 difference = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q[h]), step, v[h]);
    lost = _mm512_fmadd_ps(difference, difference, lost);
  }
  return _mm512_reduce_add_ps(lost);
}

// The same with four bits: for each block the scale, of either sign, that loses least of those that are
// tried.
template <class T>
void quantize_to_nibbles(const typename T::Number* w, int64_t in, int64_t output, uint8_t* packed,
                         uint16_t* scales) {
  constexpr float kTried[] = {8.0f, 7.6f, 7.2f, 6.8f, 6.4f, -7.2f, -7.6f, -8.0f};
  uint8_t* to = packed + output / kPanel * panel_bytes(in, 4) + output % kPanel * kQuad;
  scales += output / kPanel * blocks_of(in) * kPanel + output % kPanel;
  for (int64_t begin = 0; begin < in; begin += kBlock, scales += kPanel) {
    const __m512 v[2] = {T::read(w + begin, first_lanes(in - begin)),
                         T::read(w + begin + kLanes, first_lanes(in - begin - kLanes))};
    const float largest =
        std::max(_mm512_reduce_max_ps(_mm512_abs_ps(v[0])), _mm512_reduce_max_ps(_mm512_abs_ps(v[1])));
    __m512i q[2];
    float least = INFINITY, best = 0;
    for (float tried : kTried) {
      const float scale = Bf16::widen(Bf16::narrow(largest / tried));
      const float lost = rounded_block(v, scale, q);
      if (lost < least) least = lost, best = scale;
    }
    rounded_block(v, best, q);
    *scales = Bf16::narrow(best);
    alignas(64) int32_t numbers[kBlock];
    _mm512_store_si512(numbers, q[0]);
    _mm512_store_si512(numbers + kLanes, q[1]);
    for (int64_t i = begin; i < std::min(begin + kBlock, quads(in) * kQuad); i += 8, to += kQuad * kPanel)
      for (int j = 0; j < kQuad; j++)
        to[j] = (uint8_t)((numbers[i - begin + j] + 8) | (numbers[i - begin + kQuad + j] + 8) << 4);
  }
}

// The way back, to the nearest numbers that there are.
template <class T>
void dequantize_output(const uint8_t* packed, const void* scales, int64_t bits, int64_t in, int64_t output,
                       typename T::Number* w) {
  const uint8_t* from = packed + output / kPanel * panel_bytes(in, bits) + output % kPanel * kQuad;
  const float* whole = (const float*)scales + output;
  const uint16_t* blocks =
      (const uint16_t*)scales + output / kPanel * blocks_of(in) * kPanel + output % kPanel;
  for (int64_t i = 0; i < in; i++) {
    if (bits == 8) {
      w[i] = T::narrow(*whole * (float)(from[i / kQuad * kQuad * kPanel + i % kQuad] - 128));
    } else {
      const uint8_t both = from[i / 8 * kQuad * kPanel + i % kQuad];
      const int q = i % 8 < kQuad ? both & 15 : both >> 4;
      w[i] = T::narrow(Bf16::widen(blocks[i / kBlock * kPanel]) * (float)(q - 8));
    }
  }
}

// The four bytes at p in every lane.
inline __m512i quad_in_all_lanes(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, sizeof quad);
  return _mm512_set1_epi32(quad);
}

// Panels that all rows pass before the next: they stay in L2.
inline int64_t panels_at_once(int64_t in, int64_t bits) {
  return std::max<int64_t>(1, kGroupBytes / panel_bytes(in, bits));
}

// Two lines of weights are to be multiplied with rows from `row` on. The first rows wait for the memory and
// fetch what they need next; the second have the weights in L2 and fetch half of the next panels meanwhile,
// so that memory and arithmetic are both at work.
inline void fetch_ahead(const uint8_t* w, int64_t row, int64_t next) {
  if (row == 0) {
    _mm_prefetch((const char*)(w + kAhead * kQuad * kPanel), _MM_HINT_T0);
    _mm_prefetch((const char*)(w + kAhead * kQuad * kPanel + 64), _MM_HINT_T0);
  } else if (row == kQuantizedRows) {
    _mm_prefetch((const char*)(w + next), _MM_HINT_T1);
  }
}

// Rows [row, row + M) of one panel.
template <class T, int M>
void multiply_bytes(const QuantizedProduct<T>& p, int64_t panel, int64_t row) {
  const int64_t depth = quads(p.in), stride = depth * kQuad, groups = groups_of(p.in),
                blocks = blocks_of(p.in);
  const uint8_t* w = p.w + panel * panel_bytes(p.in, 8);
  const int64_t next = panels_at_once(p.in, 8) * panel_bytes(p.in, 8);
  const int8_t* x = p.x.numbers + row * stride;
  const float* scales = p.x.scales + row * groups;
  const int32_t* sums = p.x.sums + row * blocks;
  __m512 low[M], high[M];
  MOTET_EACH
  for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_ps();
  for (int64_t group = 0; group < groups; group++) {
    __m512i a[M], b[M];
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      int32_t sum = 0;
      for (int64_t i = 4 * group; i < std::min(4 * group + 4, blocks); i++) sum += sums[m * blocks + i];
      a[m] = b[m] = _mm512_set1_epi32(-128 * sum);
    }
    const int64_t end = std::min((group + 1) * (kGroup / kQuad), depth);
    for (int64_t k = group * (kGroup / kQuad); k < end; k++, w += kQuad * kPanel) {
      fetch_ahead(w, row, next);
      const __m512i w_low = _mm512_loadu_si512(w), w_high = _mm512_loadu_si512(w + 64);
      MOTET_EACH
      for (int m = 0; m < M; m++) {
        const __m512i input = quad_in_all_lanes(x + m * stride + k * kQuad);
        a[m] = add_quads(a[m], w_low, input);
        b[m] = add_quads(b[m], w_high, input);
      }
    }
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      const __m512 scale = _mm512_set1_ps(scales[m * groups + group]);
      low[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[m]), scale, low[m]);
      high[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b[m]), scale, high[m]);
    }
  }
  write_rows<T, M>(low, high, (const float*)p.scales, p.bias, panel, p.out, p.y + row * p.y_stride,
                   p.y_stride);
}

template <class T, int M>
void multiply_nibbles(const QuantizedProduct<T>& p, int64_t panel, int64_t row) {
  const int64_t depth = quads(p.in), stride = depth * kQuad, groups = groups_of(p.in),
                blocks = blocks_of(p.in);
  const uint8_t* w = p.w + panel * panel_bytes(p.in, 4);
  const int64_t next = panels_at_once(p.in, 4) * panel_bytes(p.in, 4);
  const uint16_t* w_scales = (const uint16_t*)p.scales + panel * blocks * kPanel;
  const int8_t* x = p.x.numbers + row * stride;
  const float* scales = p.x.scales + row * groups;
  const int32_t* sums = p.x.sums + row * blocks;
  const __m512i lower = _mm512_set1_epi8(15);
  __m512 low[M], high[M];
  MOTET_EACH
  for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; block++, w_scales += kPanel) {
    __m512i a[M], b[M];
    MOTET_EACH
    for (int m = 0; m < M; m++) a[m] = b[m] = _mm512_set1_epi32(-8 * sums[m * blocks + block]);
    const int64_t end = std::min((block + 1) * (kBlock / kQuad), depth);
    for (int64_t k = block * (kBlock / kQuad); k < end; k += 2, w += kQuad * kPanel) {
      fetch_ahead(w, row, next);
      const __m512i low_pair = _mm512_loadu_si512(w), high_pair = _mm512_loadu_si512(w + 64);
      const __m512i low_first = _mm512_and_si512(low_pair, lower),
                    high_first = _mm512_and_si512(high_pair, lower);
      const __m512i low_second = _mm512_and_si512(_mm512_srli_epi16(low_pair, 4), lower);
      const __m512i high_second = _mm512_and_si512(_mm512_srli_epi16(high_pair, 4), lower);
      MOTET_EACH
      for (int m = 0; m < M; m++) {
        const __m512i first = quad_in_all_lanes(x + m * stride + k * kQuad);
        const __m512i second = quad_in_all_lanes(x + m * stride + (k + 1) * kQuad);
        a[m] = add_quads(add_quads(a[m], low_first, first), low_second, second);
        b[m] = add_quads(add_quads(b[m], high_first, first), high_second, second);
      }
    }
    const __m512 scale_low = Bf16::read(w_scales), scale_high = Bf16::read(w_scales + kLanes);
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      const __m512 scale = _mm512_set1_ps(scales[m * groups + block / (kGroup / kBlock)]);
      low[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[m]), _mm512_mul_ps(scale, scale_low), low[m]);
      high[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b[m]), _mm512_mul_ps(scale, scale_high), high[m]);
    }
  }
  write_rows<T, M>(low, high, nullptr, p.bias, panel, p.out, p.y + row * p.y_stride, p.y_stride);
}

template <class T, int M>
void multiply_quantized(const QuantizedProduct<T>& p, int64_t panel, int64_t row) {
  if (p.bits == 8)
    multiply_bytes<T, M>(p, panel, row);
  else
    multiply_nibbles<T, M>(p, panel, row);
}

// Panels [begin, end), all rows.
template <class T>
void multiply_quantized_panels(const QuantizedProduct<T>& p, int64_t rows, int64_t begin, int64_t end) {
  const int64_t group = panels_at_once(p.in, p.bits);
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = std::min(first + group, end);
    for (int64_t row = 0; row < rows; row += kQuantizedRows)
      for (int64_t panel = first; panel < last; panel++)
        switch (std::min<int64_t>(rows - row, kQuantizedRows)) {
          case 1: multiply_quantized<T, 1>(p, panel, row); break;
          case 2: multiply_quantized<T, 2>(p, panel, row); break;
          case 3: multiply_quantized<T, 3>(p, panel, row); break;
          case 4: multiply_quantized<T, 4>(p, panel, row); break;
          case 5: multiply_quantized<T, 5>(p, panel, row); break;
          default: multiply_quantized<T, kQuantizedRows>(p, panel, row);
        }
  }
}

}  // namespace motet
