// What adapters add to a linear layer's answers, in a step whose tokens belong to many of them.
//
//   y[t] += scale * (gain * y[t] + bias + (x[t] A^T) B)        A [rank, in], B [rank, out]
//
// An adapter is read where it lies, once for all tokens of its that are computed together: A row by row, each
// a product with x; B in strips of 32 outputs, whose rows are woven into tuples on the way. So any rank does,
// and nothing is ever copied. Each number is one chain of sums in a fixed order: a token's answer has the
// same bits in any company and on any number of threads.

#pragma once

#include <omp.h>

#include <algorithm>

#include "simd.h"

namespace motet {

constexpr int64_t kStrip = 2 * kLanes;  // outputs side by side: a row of B fills a cache line in bfloat16
constexpr int kTokens = kLoraTokens;    // of a group that read A and B together
constexpr int64_t kCachedBytes =
    16 << 10;  // of B that all tokens of a group pass before the next: it stays in L1
constexpr int64_t kRanks = kLoraTokens;  // rows of A that a token meets at once

// What an adapter has for a linear layer; `a` is null where it has nothing.
template <class T>
struct LoraTerms {
  const typename T::Number* a;     // [rank, in]
  const typename T::Number* b;     // [rank, out]
  const typename T::Number* gain;  // [out] or null
  const typename T::Number* bias;  // [out] or null
  int64_t rank;
};

// All tokens of a step that use one adapter at one scale.
template <class T>
struct LoraGroup {
  const LoraTerms<T>* terms;  // of each linear layer
  int64_t num_terms;
  int64_t first, count;  // its tokens, among those of all groups
  float scale;
};

template <class T>
struct LoraStep {
  const LoraGroup<T>* groups;
  int64_t num_groups;
  const int64_t* tokens;  // of the first group, of the second, ...
};

// One linear layer of a step.
template <class T>
struct LoraProduct {
  using Number = typename T::Number;
  const Number* x;  // [tokens, in]
  int64_t x_stride;
  Number* y;  // [tokens, out]
  int64_t y_stride;
  int64_t in, out;
};

// Numbers that x A^T of all groups takes, whatever the layer.
template <class T>
int64_t lora_scratch_size(const LoraStep<T>& step) {
  int64_t rank = 0, count = 0;
  for (int64_t g = 0; g < step.num_groups; g++) {
    const LoraGroup<T>& group = step.groups[g];
    count += group.count;
    for (int64_t i = 0; i < group.num_terms; i++)
      if (group.terms[i].a) rank = std::max(rank, group.terms[i].rank);
  }
  return count * ((rank + T::kTuple - 1) / T::kTuple * T::kTuple);
}

// h[m][r] = x[m] . a[r] of M tokens and R rows of A.
template <class T, int M, int R>
void shrink(const typename T::Number* const* x, const typename T::Number* a, int64_t in,
            typename T::Number* const* h) {
  constexpr int64_t kStep = kLanes * T::kTuple;
  Floats sum[M][R];
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) sum[m][r] = zeros();
  int64_t k = 0;
  for (; k + kStep <= in; k += kStep) {
    typename T::Tuples row[R];
    MOTET_EACH
    for (int r = 0; r < R; r++) row[r] = T::load(a + r * in + k);
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      const typename T::Tuples input = T::load(x[m] + k);
      MOTET_EACH
      for (int r = 0; r < R; r++) sum[m][r] = T::add_products(sum[m][r], input, row[r]);
    }
  }
  if (k < in)
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++)
        sum[m][r] = T::add_products(sum[m][r], T::load(x[m] + k, in - k), T::load(a + r * in + k, in - k));
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) h[m][r] = T::narrow(sum_of(sum[m][r]));
}

template <class T, int M>
void shrink(const typename T::Number* const* x, const typename T::Number* a, int64_t in, int64_t count,
            typename T::Number* const* h) {
  if (count == kRanks) return shrink<T, M, kRanks>(x, a, in, h);
  for (int64_t r = 0; r < count; r++) {
    typename T::Number* mine[M];
    for (int m = 0; m < M; m++) mine[m] = h[m] + r;
    shrink<T, M, 1>(x, a + r * in, in, mine);
  }
}

// y[m] of M tokens for `count` outputs from `begin` on, in W strips, all of them whole or a single one.
template <class T, int M, int W, bool kIsWhole>
void expand(const LoraTerms<T>& terms, float scale, const typename T::Number* const* h, int64_t out,
            int64_t begin, int64_t count, typename T::Number* const* y) {
  Floats sum[M][W][2];
  for (int m = 0; m < M; m++)
    for (int w = 0; w < W; w++) sum[m][w][0] = sum[m][w][1] = zeros();
  const auto* b = terms.b + begin;
  for (int64_t r = 0; r < terms.rank; r += T::kTuple, b += T::kTuple * out) {
    const bool is_last = r + T::kTuple > terms.rank;
    typename T::Woven woven[W];
    for (int w = 0; w < W; w++)
      woven[w] = T::weave(b + w * kStrip, is_last ? 0 : out, kIsWhole ? kStrip : count);
    MOTET_EACH
    for (int m = 0; m < M; m++) {
      const typename T::Tuples mine = T::in_all_lanes(h[m] + r);
      MOTET_EACH
      for (int w = 0; w < W; w++) {
        sum[m][w][0] = T::add_products(sum[m][w][0], woven[w].first, mine);
        sum[m][w][1] = T::add_products(sum[m][w][1], woven[w].second, mine);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int w = 0; w < W; w++) {
      Floats halves[2];
      T::unravel(sum[m][w][0], sum[m][w][1], halves);
      for (int half = 0; half < 2; half++) {
        const int64_t at = w * kStrip + half * kLanes;
        const Lanes lanes = kIsWhole ? first_lanes(kLanes) : first_lanes(count - at);
        const Floats old = T::read(y[m] + begin + at, lanes);
        Floats added = halves[half];
        if (terms.gain) added = fma(T::read(terms.gain + begin + at, lanes), old, added);
        if (terms.bias) added = add(T::read(terms.bias + begin + at, lanes), added);
        T::write(y[m] + begin + at, fma(all(scale), added, old), lanes);
      }
    }
}

template <class T, int M>
void expand_outputs(const LoraTerms<T>& terms, float scale, const typename T::Number* const* h, int64_t out,
                    int64_t begin, int64_t end, typename T::Number* const* y) {
  constexpr int kWide = M == 1 ? kLoraStrips : kLoraStrips / 2;  // a few neighbouring cache lines of each row
  int64_t at = begin;
  for (; at + kWide * kStrip <= end; at += kWide * kStrip)
    expand<T, M, kWide, true>(terms, scale, h, out, at, kWide * kStrip, y);
  for (; at + kStrip <= end; at += kStrip) expand<T, M, 1, true>(terms, scale, h, out, at, kStrip, y);
  if (at < end) expand<T, M, 1, false>(terms, scale, h, out, at, end - at, y);
}

// The threads of a parallel region do this together; afterwards each has to wait for the others.
template <class T>
class LoraWork {
 public:
  using Number = typename T::Number;

  // `scratch`: one for each layer that is computed at the same time.
  LoraWork(const LoraStep<T>& step, int64_t target, const LoraProduct<T>& product, Number* scratch)
      : step_(step), target_(target), product_(product), scratch_(scratch) {
    for_groups(
        [&](const LoraGroup<T>&, const LoraTerms<T>& terms) { stride_ = std::max(stride_, terms.rank); });
    stride_ = (stride_ + T::kTuple - 1) / T::kTuple * T::kTuple;
  }

  bool is_empty() const { return !stride_; }

  void shrink_mine() const {
    int64_t total = 0;
    for_groups([&](const LoraGroup<T>& group, const LoraTerms<T>& terms) {
      total += blocks_of(group.count, kTokens) * blocks_of(terms.rank, kRanks);
    });
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    int64_t at = 0;
    for_groups([&](const LoraGroup<T>& group, const LoraTerms<T>& terms) {
      for (int64_t rank = 0; rank < terms.rank; rank += kRanks)
        for (int64_t first = 0; first < group.count; first += kTokens, at++)
          if (begin <= at && at < end) shrink_block(group, terms, first, rank);
    });
  }

  // No two threads have the same outputs, so a token's adapters come in their order.
  void expand_mine() const {
    const int64_t strips = blocks_of(product_.out, kStrip);
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    expand(strips * thread / threads * kStrip,
           std::min(strips * (thread + 1) / threads * kStrip, product_.out));
  }

  // Outputs [begin, end) of all tokens.
  void expand(int64_t begin, int64_t end) const {
    if (begin >= end) return;
    for_groups([&](const LoraGroup<T>& group, const LoraTerms<T>& terms) {
      const int64_t columns = kCachedBytes / (terms.rank * (int64_t)sizeof(Number)) / (4 * kStrip);
      const int64_t step = group.count > kTokens ? std::max<int64_t>(1, columns) * 4 * kStrip : end - begin;
      for (int64_t at = begin; at < end; at += step)
        for (int64_t first = 0; first < group.count; first += kTokens)
          expand_block(group, terms, first, at, std::min(at + step, end));
    });
  }

 private:
  Number* row(int64_t token) const { return scratch_ + token * stride_; }

  static int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

  template <class F>
  void for_groups(F&& act) const {
    for (int64_t g = 0; g < step_.num_groups; g++) {
      const LoraGroup<T>& group = step_.groups[g];
      if (target_ < group.num_terms && group.terms[target_].a) act(group, group.terms[target_]);
    }
  }

  void shrink_block(const LoraGroup<T>& group, const LoraTerms<T>& terms, int64_t first, int64_t rank) const {
    const Number* x[kTokens];
    Number* h[kTokens];
    const int count = (int)std::min<int64_t>(kTokens, group.count - first);
    const int64_t ranks = std::min(kRanks, terms.rank - rank);
    for (int m = 0; m < count; m++) {
      x[m] = product_.x + step_.tokens[group.first + first + m] * product_.x_stride;
      h[m] = row(group.first + first + m) + rank;
      if (rank + ranks == terms.rank && terms.rank % T::kTuple) h[m][ranks] = Number{};
    }
    const Number* a = terms.a + rank * product_.in;
    for_rows<kTokens>(count, [&](auto m) { shrink<T, m>(x, a, product_.in, ranks, h); });
  }

  void expand_block(const LoraGroup<T>& group, const LoraTerms<T>& terms, int64_t first, int64_t begin,
                    int64_t end) const {
    const Number* h[kTokens];
    Number* y[kTokens];
    const int count = (int)std::min<int64_t>(kTokens, group.count - first);
    for (int m = 0; m < count; m++) {
      h[m] = row(group.first + first + m);
      y[m] = product_.y + step_.tokens[group.first + first + m] * product_.y_stride;
    }
    for_rows<kTokens>(
        count, [&](auto m) { expand_outputs<T, m>(terms, group.scale, h, product_.out, begin, end, y); });
  }

  LoraStep<T> step_;
  int64_t target_;
  LoraProduct<T> product_;
  Number* scratch_;  // x A^T, rounded: a row for each token of each group
  int64_t stride_ = 0;
};

}  // namespace motet
