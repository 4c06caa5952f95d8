// y = x W^T + b over weights of eight or four bits.
//
//   x    scale of the group x p             p in -127..127, a group is 128 neighbouring inputs of a row
//   W8   scale of the output x (q - 128)    panels of some outputs: [in / 4][outputs][4] bytes
//   W4   scale of the block x (q - 8)       the same, [in / 8][outputs][4] bytes: each an input in its lower
//                                           half and the one four further in its upper; a block is 32 inputs
//
// Four products of bytes are added to each sum at once (`add_quads`), twice as many as in bfloat16. Weights
// have no sign: what corrects that depends on the row alone, and is where its sums begin. Sums of a block are
// exact and blocks are added in their order, so a row has the same bits in any company here too.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bytes.h"
#include "linear.h"

namespace motet {

constexpr int64_t kQuad = 4;
constexpr int64_t kGroup = 128;
constexpr int64_t kBlock = 32;

inline int64_t quads(int64_t in) { return (in + 7) / 8 * 2; }  // whole pairs of them
inline int64_t groups_of(int64_t in) { return (in + kGroup - 1) / kGroup; }
inline int64_t blocks_of(int64_t in) { return (in + kBlock - 1) / kBlock; }
inline int64_t panel_bytes(int64_t in, int64_t bits) { return kPanel * quads(in) * kQuad * bits / 8; }

// Rows of a product, quantised. The rest of the last quads is zeros.
struct QuantizedRows {
  int8_t* numbers;  // [rows, 4 quads]
  float* scales;    // [rows, groups]
  int32_t* sums;    // [rows, blocks] of p

  // Those from a row on.
  QuantizedRows from(int64_t row, int64_t in) const {
    return {numbers + row * quads(in) * kQuad, scales + row * groups_of(in), sums + row * blocks_of(in)};
  }
};

template <class T>
struct QuantizedProduct {
  using Number = typename T::Number;
  QuantizedRows x;
  const uint8_t* w;    // panels
  const void* scales;  // W8: float [out], W4: bfloat16 [panels, blocks, outputs]; filled up to whole panels
  const Number* bias;  // [out] or null
  Number* y;           // [rows, out]
  int64_t y_stride;
  int64_t in, out, bits;
};

// What is not finite makes a row of NaN.
template <class T>
void quantize_row(const typename T::Number* x, int64_t in, int64_t row, const QuantizedRows& to) {
  auto [numbers, scales, sums] = to.from(row, in);
  for (int64_t begin = 0; begin < in; begin += kGroup, scales++) {
    const int64_t end = std::min(begin + kGroup, in);
    const float largest = largest_magnitude<T>(x + begin, end - begin);
    const Rounding rounded(largest);
    *scales = largest / 127.0f;
    for (int64_t block = begin; block < end; block += kBlock) {
      Ints sum = all(0);
      for (int64_t i = block; i < std::min(block + kBlock, end); i += kLanes) {
        const Lanes lanes = first_lanes(end - i);
        const Ints p = rounded(T::read(x + i, lanes));
        sum = add(sum, p);
        store_bytes(numbers + i, p, lanes);
      }
      *sums++ = sum_of(sum);
    }
  }
  for (int64_t i = in; i < quads(in) * kQuad; i++) numbers[i] = 0;
}

// An output's weights into its lane of a panel.
template <class T>
void quantize_to_bytes(const typename T::Number* w, int64_t in, int64_t output, uint8_t* packed,
                       float* scales) {
  Floats most = zeros();
  for (int64_t i = 0; i < in; i += kLanes) most = max(most, abs(T::read(w + i, first_lanes(in - i))));
  const float largest = largest_of(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
  scales[output] = largest / 127.0f;
  uint8_t* to = packed + output / kPanel * panel_bytes(in, 8) + output % kPanel * kQuad;
  for (int64_t i = 0; i < in; i++)
    to[i / kQuad * kQuad * kPanel + i % kQuad] = (uint8_t)(128 + std::lrint(T::widen(w[i]) * inverse));
}

// Whole numbers -8..7 for 32 weights at a scale, and the square of what is lost.
inline float rounded_block(const Floats v[2], float scale, Ints q[2]) {
  const Floats inverse = all(scale != 0 ? 1.0f / scale : 0.0f), step = all(scale);
  Floats lost = zeros();
  for (int h = 0; h < 2; h++) {
    q[h] = max(all(-8), min(all(7), to_ints(mul(v[h], inverse))));
    const Floats difference = fnma(to_floats(q[h]), step, v[h]);
    lost = fma(difference, difference, lost);
  }
  return sum_of(lost);
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
    const Floats v[2] = {T::read(w + begin, first_lanes(in - begin)),
                         T::read(w + begin + kLanes, first_lanes(in - begin - kLanes))};
    const float largest = largest_of(max(abs(v[0]), abs(v[1])));
    Ints q[2];
    float least = INFINITY, best = 0;
    for (float tried : kTried) {
      const float scale = Bf16::widen(Bf16::narrow(largest / tried));
      const float lost = rounded_block(v, scale, q);
      if (lost < least) least = lost, best = scale;
    }
    rounded_block(v, best, q);
    *scales = Bf16::narrow(best);
    int32_t numbers[kBlock];
    store(numbers, q[0]);
    store(numbers + kLanes, q[1]);
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

// So many of some rows pass a panel together. The first wait for the memory, so while there are few it is
// better to do more meanwhile, though not all sums fit the registers then: eight rows of 8 bits took 16.6
// instead of 22.0 ms, sixteen 22.1 instead of 24.2, and 256 with eight at once 299 instead of 279.
inline int64_t rows_at_once(int64_t rows) {
  return rows <= 2 * kFewQuantizedRows ? kFewQuantizedRows : kQuantizedRows;
}

// Lines of weights are to be multiplied with M rows from `row` on. The first rows wait for the memory and
// fetch what they need next; the second have the weights in L2 and fetch a line of the next panels for each
// step meanwhile, so that memory and arithmetic are both at work. `next`: how far they are; 0: others fetch
// them, or there are none.
template <int M>
void fetch_ahead(const uint8_t* w, int64_t row, int64_t next) {
  constexpr int kLine = kQuad * kLanes, kWidth = kColumns * kLine;
  if (row == 0) {
    if constexpr (M > kFewRows) {
      MOTET_EACH
      for (int c = 0; c < kColumns; c++) fetch_weights(w + kAhead * kWidth + c * kLine);
    }
  } else if (next) {
    fetch_far(w + next);
  }
}

// Rows [row, row + M) of one panel.
template <class T, int M>
void multiply_bytes(const QuantizedProduct<T>& p, int64_t panel, int64_t row, int64_t next) {
  constexpr int kLine = kQuad * kLanes;
  const int64_t depth = quads(p.in), stride = depth * kQuad, groups = groups_of(p.in),
                blocks = blocks_of(p.in);
  const uint8_t* w = p.w + panel * panel_bytes(p.in, 8);
  const auto [x, scales, sums_of_x] = p.x.from(row, p.in);
  Floats sums[M][kColumns];
  clear(sums);
  for (int64_t group = 0; group < groups; group++) {
    Ints counted[M][kColumns];
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      int32_t sum = 0;
      for (int64_t i = 4 * group; i < std::min(4 * group + 4, blocks); i++) sum += sums_of_x[m * blocks + i];
      MOTET_EACH
      for (int c = 0; c < kColumns; c++) counted[m][c] = all(-kByteOffset * sum);
    }
    const int64_t end = std::min((group + 1) * (kGroup / kQuad), depth);
    for (int64_t k = group * (kGroup / kQuad); k < end; k++, w += kColumns * kLine) {
      fetch_ahead<M>(w, row, next);
      Ints weights[kColumns];
      MOTET_EACH
      for (int c = 0; c < kColumns; c++) weights[c] = load(w + c * kLine);
      MOTET_EACH
      for (int m = 0; m < M; m++) {
        const Ints input = all(four_bytes(x + m * stride + k * kQuad));
        MOTET_EACH
        for (int c = 0; c < kColumns; c++) counted[m][c] = add_byte_quads(counted[m][c], weights[c], input);
      }
    }
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      const Floats scale = all(scales[m * groups + group]);
      MOTET_EACH
      for (int c = 0; c < kColumns; c++) sums[m][c] = fma(to_floats(counted[m][c]), scale, sums[m][c]);
    }
  }
  write_rows<T, M>(sums, (const float*)p.scales, p.bias, panel, p.out, p.y + row * p.y_stride, p.y_stride);
}

template <class T, int M>
void multiply_nibbles(const QuantizedProduct<T>& p, int64_t panel, int64_t row, int64_t next) {
  constexpr int kLine = kQuad * kLanes;
  const int64_t depth = quads(p.in), stride = depth * kQuad, groups = groups_of(p.in),
                blocks = blocks_of(p.in);
  const uint8_t* w = p.w + panel * panel_bytes(p.in, 4);
  const uint16_t* w_scales = (const uint16_t*)p.scales + panel * blocks * kPanel;
  const auto [x, scales, sums_of_x] = p.x.from(row, p.in);
  Floats sums[M][kColumns];
  clear(sums);
  for (int64_t block = 0; block < blocks; block++, w_scales += kPanel) {
    Ints counted[M][kColumns];
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      MOTET_EACH
      for (int c = 0; c < kColumns; c++) counted[m][c] = all(-8 * sums_of_x[m * blocks + block]);
    }
    const int64_t end = std::min((block + 1) * (kBlock / kQuad), depth);
    for (int64_t k = block * (kBlock / kQuad); k < end; k += 2, w += kColumns * kLine) {
      fetch_ahead<M>(w, row, next);
      Ints lower[kColumns], upper[kColumns];
      MOTET_EACH
      for (int c = 0; c < kColumns; c++) {
        const Ints pair = load(w + c * kLine);
        lower[c] = lower_halves(pair);
        upper[c] = upper_halves(pair);
      }
      MOTET_EACH
      for (int m = 0; m < M; m++) {
        const Ints first = all(four_bytes(x + m * stride + k * kQuad));
        const Ints second = all(four_bytes(x + m * stride + (k + 1) * kQuad));
        MOTET_EACH
        for (int c = 0; c < kColumns; c++)
          counted[m][c] = add_quads(add_quads(counted[m][c], lower[c], first), upper[c], second);
      }
    }
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      const Floats scale = all(scales[m * groups + block / (kGroup / kBlock)]);
      MOTET_EACH
      for (int c = 0; c < kColumns; c++)
        sums[m][c] = fma(to_floats(counted[m][c]), mul(scale, Bf16::read(w_scales + c * kLanes)), sums[m][c]);
    }
  }
  write_rows<T, M>(sums, nullptr, p.bias, panel, p.out, p.y + row * p.y_stride, p.y_stride);
}

template <class T, int M>
void multiply_quantized(const QuantizedProduct<T>& p, int64_t panel, int64_t row, int64_t next) {
  if (p.bits == 8)
    multiply_bytes<T, M>(p, panel, row, next);
  else
    multiply_nibbles<T, M>(p, panel, row, next);
}

// Panels [begin, end), all rows.
template <class T>
void multiply_quantized_panels(const QuantizedProduct<T>& p, int64_t rows, int64_t begin, int64_t end) {
  constexpr int kMost = std::max(kQuantizedRows, kFewQuantizedRows);
  const int64_t size = panel_bytes(p.in, p.bits), group = panels_at_once(size), most = rows_at_once(rows);
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = std::min(first + group, end);
    for (int64_t row = 0; row < rows; row += most)
      for_rows<kMost>(std::min(rows - row, most), [&](auto m) {
        const int64_t next = row == most && last < end ? group * size : 0;
        for (int64_t panel = first; panel < last; panel++) multiply_quantized<T, m>(p, panel, row, next);
      });
  }
}

}  // namespace motet
