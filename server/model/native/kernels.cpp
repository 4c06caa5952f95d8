// What Python calls (server/model/native). Sizes and strides are in numbers, pointers are to adjacent memory
// unless a stride says otherwise, and the caller has checked all of them.

#include <omp.h>

#include "attention.h"
#include "linear.h"

using namespace motet;

extern "C" {

// Numbers that a laid out weight has. `in` is even.
int64_t motet_packed_size(int64_t out, int64_t in) { return num_panels(out) * kPanel * in; }

// w [out, in] -> packed; outputs that are not there are zeros.
void motet_pack(const Bf16* w, int64_t out, int64_t in, Bf16* packed, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < num_panels(out) * kPanel; row++) {
    Bf16* to = packed + row / kPanel * kPanel * in + row % kPanel * 2;
    for (int64_t k = 0; k < in; k += 2, to += 2 * kPanel) {
      if (row < out)
        memcpy(to, w + row * in + k, 2 * sizeof(Bf16));
      else
        memset(to, 0, 2 * sizeof(Bf16));
    }
  }
}

// The way back.
void motet_unpack(const Bf16* packed, int64_t out, int64_t in, Bf16* w, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < out; row++) {
    const Bf16* from = packed + row / kPanel * kPanel * in + row % kPanel * 2;
    for (int64_t k = 0; k < in; k += 2, from += 2 * kPanel) memcpy(w + row * in + k, from, 2 * sizeof(Bf16));
  }
}

// y [rows, out] = x [rows, in] W^T + bias.
void motet_linear(const Bf16* x, int64_t x_stride, const Bf16* packed, const Bf16* bias, Bf16* y, int64_t y_stride,
                  int64_t rows, int64_t in, int64_t out, int num_threads) {
  const Product product{x, x_stride, packed, bias, y, y_stride, in, out};
  const int64_t panels = num_panels(out);
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num();
    multiply_panels(product, rows, panels * mine / threads, panels * (mine + 1) / threads);
  }
}

// The step's keys and values go to their places in the cache, then its queries attend to what is there.
void motet_attend(const Attention* attention, const Heads* k, const Heads* v, const int64_t* places, int64_t tokens,
                  const Sequence* sequences, int64_t count, int num_threads) {
  AttentionPlan plan(*attention, sequences, count, num_threads);
  const Cache& cache = attention->cache;
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * cache.num_kv_heads; i++) {
      const int64_t token = i / cache.num_kv_heads, head = i % cache.num_kv_heads;
      keep(cache, places[token], head, k->at(token, head), v->at(token, head));
    }
    plan.run_mine();
  }
}
}
