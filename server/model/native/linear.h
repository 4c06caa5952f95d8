// y = x W^T + b in bfloat16, over a weight that was laid out once.
//
//   W [out, in]  ->  panels of 32 outputs, each [in / 2][32][2]: a product of one row reads it from first byte
//                    to last, and many rows find a panel in the cache after the first of them.
//
// Every output is one chain of sums over its inputs in their order, whatever the number of rows and of threads:
// the same row gives the same bits alone and in any batch.

#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace motet {

constexpr int kPanel = 2 * kLanes;  // outputs side by side
constexpr int64_t kGroupBytes = 448 << 10;  // of panels that all rows pass before the next: they stay in L2

struct Product {
  const Bf16* x;  // [rows, in]
  int64_t x_stride;
  const Bf16* w;  // panels
  const Bf16* bias;  // [out] or null
  Bf16* y;  // [rows, out]
  int64_t y_stride;
  int64_t in, out;
};

// Rows [row, row + M) of one panel.
template <int M>
void multiply(const Product& p, int64_t panel, int64_t row) {
  const Bf16* w = p.w + panel * p.in * kPanel;
  const Bf16* x = p.x + row * p.x_stride;
  __m512 low[M], high[M];
  for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int64_t k = 0; k < p.in; k += 2, w += 2 * kPanel) {
    _mm_prefetch((const char*)(w + 16 * 2 * kPanel), _MM_HINT_T0);
    _mm_prefetch((const char*)(w + 16 * 2 * kPanel + 32), _MM_HINT_T0);
    const __m512bh w_low = load_pairs(w), w_high = load_pairs(w + 2 * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const __m512bh pair = all_lanes(x + m * p.x_stride + k);
      low[m] = _mm512_dpbf16_ps(low[m], w_low, pair);
      high[m] = _mm512_dpbf16_ps(high[m], w_high, pair);
    }
  }
  const int64_t first = panel * kPanel;
  const __mmask16 in_low = first_lanes(p.out - first), in_high = first_lanes(p.out - first - kLanes);
  __m512 bias_low = _mm512_setzero_ps(), bias_high = bias_low;
  if (p.bias) {
    bias_low = load_widened(p.bias + first, in_low);
    bias_high = load_widened(p.bias + first + kLanes, in_high);
  }
  for (int m = 0; m < M; m++) {
    Bf16* y = p.y + (row + m) * p.y_stride + first;
    store_narrowed(y, _mm512_add_ps(low[m], bias_low), in_low);
    store_narrowed(y + kLanes, _mm512_add_ps(high[m], bias_high), in_high);
  }
}

inline int64_t num_panels(int64_t out) { return (out + kPanel - 1) / kPanel; }

// Panels [begin, end), all rows.
inline void multiply_panels(const Product& p, int64_t rows, int64_t begin, int64_t end) {
  const int64_t group = std::max<int64_t>(1, kGroupBytes / (p.in * kPanel * (int64_t)sizeof(Bf16)));
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = std::min(first + group, end);
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows)
      for (int64_t panel = first; panel < last; panel++) multiply<kRows>(p, panel, row);
    if (row < rows)
      for (int64_t panel = first; panel < last; panel++) MOTET_FOR_ROWS(multiply, rows - row, p, panel, row)
  }
}

}  // namespace motet
