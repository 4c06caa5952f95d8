// y = x W^T + b, over a weight that was laid out once.
//
//   W [out, in]  ->  panels of some outputs, each [in / tuple][outputs][tuple]: a product of one row reads it
//   from first byte
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

constexpr int kPanel = kColumns * kLanes;  // outputs side by side

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

// Where M rows of inputs begin, a stride apart, as one pointer for four rows: a CPU has too few registers for
// one each, and compilers make one each unless they cannot see how those that there are hang together.
template <class Number, int M>
class RowStarts {
 public:
  RowStarts(const Number* first, int64_t stride) : stride_(stride) {
    MOTET_EACH
    for (int m = 0; m < M; m += 4) fours_[m / 4] = first + m * stride;
  }

  // In the loop that reads them, before they are read.
  void hide() {
    MOTET_EACH
    for (auto& four : fours_) asm("" : "+r"(four));
  }

  const Number* operator[](int m) const { return fours_[m / 4] + m % 4 * stride_; }

 private:
  const Number* fours_[(M + 3) / 4];
  int64_t stride_;
};

template <int M>
void clear(Floats (&sums)[M][kColumns]) {
  MOTET_EACH
  for (int m = 0; m < M; m++) {
    MOTET_EACH
    for (int c = 0; c < kColumns; c++) sums[m][c] = zeros();
  }
}

// M rows of a panel's sums into y [M, out]: times the scales of their outputs, if there are such, and the
// bias.
template <class T, int M>
void write_rows(const Floats (&sums)[M][kColumns], const float* scales, const typename T::Number* bias,
                int64_t panel, int64_t out, typename T::Number* y, int64_t y_stride) {
  MOTET_EACH
  for (int c = 0; c < kColumns; c++) {
    const int64_t at = panel * kPanel + c * kLanes;
    const Lanes lanes = first_lanes(out - at);
    const Floats more = bias ? T::read(bias + at, lanes) : zeros();
    const Floats scale = scales ? load(scales + at, lanes) : all(1.0f);
    MOTET_EACH
    for (int m = 0; m < M; m++) T::write(y + m * y_stride + at, fma(sums[m][c], scale, more), lanes);
  }
}

// Rows [row, row + M) of one panel.
template <class T, int M>
void multiply(const Product<T>& p, int64_t panel, int64_t row) {
  constexpr int kLine = T::kTuple * kLanes, kWidth = kColumns * kLine;  // of a tuple of each output
  const auto* w = p.w + panel * p.in * kPanel;
  RowStarts<typename T::Number, M> x(p.x + row * p.x_stride, p.x_stride);
  Floats sums[M][kColumns];
  clear(sums);
#pragma GCC unroll 4
  for (int64_t k = 0; k < p.in; k += T::kTuple, w += kWidth) {
    typename T::Tuples weights[kColumns];
    MOTET_EACH
    for (int c = 0; c < kColumns; c++) {
      if constexpr (M > kFewRows) fetch_weights(w + kAhead * kWidth + c * kLine);
      weights[c] = T::load(w + c * kLine);
    }
    x.hide();
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      const typename T::Tuples input = T::in_all_lanes(x[m] + k);
      MOTET_EACH
      for (int c = 0; c < kColumns; c++) sums[m][c] = T::add_products(sums[m][c], weights[c], input);
    }
  }
  write_rows<T, M>(sums, nullptr, p.bias, panel, p.out, p.y + row * p.y_stride, p.y_stride);
}

inline int64_t num_panels(int64_t out) { return (out + kPanel - 1) / kPanel; }

template <class T>
int64_t panel_bytes(int64_t in) {
  return in * kPanel * (int64_t)sizeof(typename T::Number);
}

// So many stay in L2 while all rows pass them.
inline int64_t panels_at_once(int64_t panel_bytes) { return std::max<int64_t>(1, kGroupBytes / panel_bytes); }

// Panels [begin, end), all rows.
template <class T>
void multiply_panels(const Product<T>& p, int64_t rows, int64_t begin, int64_t end) {
  const int64_t group = panels_at_once(panel_bytes<T>(p.in));
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = std::min(first + group, end);
    for (int64_t row = 0; row < rows; row += kRows)
      for_rows<kRows>(rows - row, [&](auto m) {
        for (int64_t panel = first; panel < last; panel++) multiply<T, m>(p, panel, row);
      });
  }
}

}  // namespace motet
