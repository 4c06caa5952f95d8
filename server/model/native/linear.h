// y = x W^T + b, over a weight that was laid out once.
//
//   W [out, in]  ->  panels of 32 outputs, each [in / tuple][32][tuple]: a product of one row reads it from
//   first byte
//                    to last, and many rows find a panel in the cache after the first of them.
//
// Every output is one chain of sums over its inputs in their order, whatever the number of rows and of
// threads: the same row gives the same bits alone and in any batch.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "adapters/kernels/native/simd.h"

namespace motet {

constexpr int kPanel = 2 * kLanes;  // outputs side by side
constexpr int kAhead = 16;          // tuples of each output that are fetched while others are multiplied
constexpr int64_t kGroupBytes = 448 << 10;  // of panels that all rows pass before the next: they stay in L2

// What [0, n) is this thread's.
struct Share {
  int64_t begin, end;

  static Share of(int64_t n) {
    const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num();
    return {n * mine / threads, n * (mine + 1) / threads};
  }
};

template <class T>
struct Product {
  using Number = typename T::Number;
  const Number* x;  // [rows, in]
  int64_t x_stride;
  const Number* w;     // panels
  const Number* bias;  // [out] or null
  Number* y;           // [rows, out]
  int64_t y_stride;
  int64_t in, out;
};

// M rows of a panel's sums into y [M, out]: times the scales of their outputs, if there are such, and the
// bias.
template <class T, int M>
void write_rows(const __m512* low, const __m512* high, const float* scales, const typename T::Number* bias,
                int64_t panel, int64_t out, typename T::Number* y, int64_t y_stride) {
  const int64_t first = panel * kPanel;
  const __mmask16 in_low = first_lanes(out - first), in_high = first_lanes(out - first - kLanes);
  __m512 bias_low = _mm512_setzero_ps(), bias_high = bias_low;
  if (bias) {
    bias_low = T::read(bias + first, in_low);
    bias_high = T::read(bias + first + kLanes, in_high);
  }
  __m512 scale_low = _mm512_set1_ps(1.0f), scale_high = scale_low;
  if (scales) {
    scale_low = _mm512_maskz_loadu_ps(in_low, scales + first);
    scale_high = _mm512_maskz_loadu_ps(in_high, scales + first + kLanes);
  }
  for (int m = 0; m < M; m++) {
    T::write(y + m * y_stride + first, _mm512_fmadd_ps(low[m], scale_low, bias_low), in_low);
    T::write(y + m * y_stride + first + kLanes, _mm512_fmadd_ps(high[m], scale_high, bias_high), in_high);
  }
}

// Rows [row, row + M) of one panel.
template <class T, int M>
void multiply(const Product<T>& p, int64_t panel, int64_t row) {
  constexpr int kTuple = T::kTuple;
  const auto* w = p.w + panel * p.in * kPanel;
  const auto* x = p.x + row * p.x_stride;
  __m512 low[M], high[M];
  for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int64_t k = 0; k < p.in; k += kTuple, w += kTuple * kPanel) {
    _mm_prefetch((const char*)(w + kAhead * kTuple * kPanel), _MM_HINT_T0);
    _mm_prefetch((const char*)(w + kAhead * kTuple * kPanel + kTuple * kLanes), _MM_HINT_T0);
    const typename T::Tuples w_low = T::load(w), w_high = T::load(w + kTuple * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename T::Tuples input = T::in_all_lanes(x + m * p.x_stride + k);
      low[m] = T::add_products(low[m], w_low, input);
      high[m] = T::add_products(high[m], w_high, input);
    }
  }
  write_rows<T, M>(low, high, nullptr, p.bias, panel, p.out, p.y + row * p.y_stride, p.y_stride);
}

inline int64_t num_panels(int64_t out) { return (out + kPanel - 1) / kPanel; }

// Panels [begin, end), all rows.
template <class T>
void multiply_panels(const Product<T>& p, int64_t rows, int64_t begin, int64_t end) {
  const int64_t group =
      std::max<int64_t>(1, kGroupBytes / (p.in * kPanel * (int64_t)sizeof(typename T::Number)));
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = std::min(first + group, end);
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows)
      for (int64_t panel = first; panel < last; panel++) multiply<T, kRows>(p, panel, row);
    if (row < rows)
      for (int64_t panel = first; panel < last; panel++) MOTET_FOR_ROWS(multiply, rows - row, p, panel, row)
  }
}

}  // namespace motet
