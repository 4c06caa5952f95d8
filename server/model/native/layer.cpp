// A decoder layer in four calls, between which the adapters add what is theirs:
//
//   attend_in    normed = norm(hidden += delta),  qkv = normed W            + adapters of q, k, v
//   attend       rotate, keep, attended = attention(...), delta = attended W + adapters of o
//   feed_in      normed = norm(hidden += delta),  gate_up = normed W        + adapters of gate and up
//   feed_out     fed = silu(gate) * up,           delta = fed W             + adapters of down
//
// Each is one parallel region. Everything is rounded to bfloat16 where transformers' modules round it.

#include "layer.h"

#include <omp.h>

#include <cmath>
#include <cstring>

#include "attention.h"
#include "linear.h"

namespace motet {
namespace {

struct Share {
  int64_t begin, end;
};

Share my_share(int64_t n) {
  const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num();
  return {n * mine / threads, n * (mine + 1) / threads};
}

inline __m512 rounded(__m512 x) { return widen((__m256i)_mm512_cvtneps_pbh(x)); }

// to = norm(x), n numbers, a multiple of the lanes.
void norm_row(const Bf16* x, const Bf16* weight, float epsilon, Bf16* to, int64_t n) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512 v = load_widened(x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)n + epsilon));
  for (int64_t i = 0; i < n; i += kLanes)
    store_narrowed(to + i, _mm512_mul_ps(load_widened(weight + i), rounded(_mm512_mul_ps(load_widened(x + i), scale))));
}

void add_row(Bf16* x, const Bf16* delta, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_narrowed(x + i, _mm512_add_ps(load_widened(x + i), load_widened(delta + i)));
}

// x cos + (-x2, x1) sin, in place; d / 2 is a multiple of the lanes.
void rotate(Bf16* x, const Bf16* cosine, const Bf16* sine, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const __m512 first = load_widened(x + i), second = load_widened(x + half + i);
    const __m512 a = rounded(_mm512_mul_ps(first, load_widened(cosine + i)));
    const __m512 b = rounded(_mm512_mul_ps(second, load_widened(sine + i)));
    const __m512 c = rounded(_mm512_mul_ps(second, load_widened(cosine + half + i)));
    const __m512 e = rounded(_mm512_mul_ps(first, load_widened(sine + half + i)));
    store_narrowed(x + i, _mm512_sub_ps(a, b));
    store_narrowed(x + half + i, _mm512_add_ps(c, e));
  }
}

void norm_rows(const Step& step, const Bf16* weight, float epsilon, int64_t hidden) {
  const Share rows = my_share(step.tokens);
  for (int64_t row = rows.begin; row < rows.end; row++) {
    Bf16* x = step.hidden + row * hidden;
    if (step.delta) add_row(x, step.delta + row * hidden, hidden);
    norm_row(x, weight, epsilon, step.normed + row * hidden, hidden);
  }
}

void multiply_mine(const Linear& linear, const Bf16* x, Bf16* y, int64_t rows) {
  const Share panels = my_share(num_panels(linear.out));
  multiply_panels({x, linear.in, linear.weight, linear.bias, y, linear.out, linear.in, linear.out}, rows,
                  panels.begin, panels.end);
}

// silu(gate) * up of gate_up [tokens, 2 n]
void feed_rows(const Step& step, int64_t n) {
  const Share mine = my_share(step.tokens * (n / kLanes));
  for (int64_t i = mine.begin; i < mine.end; i++) {
    const int64_t row = i / (n / kLanes), at = i % (n / kLanes) * kLanes;
    const Bf16* gate = step.gate_up + row * 2 * n + at;
    const __m512 x = load_widened(gate);
    const __m512 size = _mm512_abs_ps(x);
    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), size));  // e^-|x|
    const __m512 one = _mm512_set1_ps(1.0f);
    // sigmoid(x) = 1 / (1 + e^-x), written so that e^ is never large
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 over = _mm512_mask_blend_ps(negative, one, e);
    const __m512 silu = _mm512_mul_ps(x, _mm512_div_ps(over, _mm512_add_ps(one, e)));
    store_narrowed(step.fed + row * n + at, _mm512_mul_ps(rounded(silu), load_widened(gate + n)));
  }
}

void rotate_and_keep(const Layer& layer, const Step& step) {
  const int64_t d = layer.head_dim, heads = layer.num_heads + layer.num_kv_heads;
  const int64_t width = (heads + layer.num_kv_heads) * d;
  const Share mine = my_share(step.tokens * heads);
  for (int64_t i = mine.begin; i < mine.end; i++) {
    const int64_t token = i / heads, head = i % heads;
    const bool is_key = head >= layer.num_heads;
    Bf16* x = step.qkv + token * width + head * d;
    const Bf16* norm = is_key ? layer.key_norm : layer.query_norm;
    if (norm) norm_row(x, norm, layer.epsilon, x, d);
    rotate(x, step.cosine + token * d, step.sine + token * d, d);
    if (!is_key) continue;
    const int64_t kv_head = head - layer.num_heads;
    keep(step.attention, layer.keys, layer.values, step.attention.places[token], kv_head, layer.num_kv_heads, x, d,
         x + layer.num_kv_heads * d, d);
  }
}

}  // namespace
}  // namespace motet

extern "C" {

void motet_attend_in(const motet::Layer* layer, const motet::Step* step) {
  using namespace motet;
#pragma omp parallel
  {
    norm_rows(*step, layer->input_norm, layer->epsilon, layer->hidden);
#pragma omp barrier
    multiply_mine(layer->qkv, step->normed, step->qkv, step->tokens);
  }
}

void motet_feed_in(const motet::Layer* layer, const motet::Step* step) {
  using namespace motet;
#pragma omp parallel
  {
    norm_rows(*step, layer->output_norm, layer->epsilon, layer->hidden);
#pragma omp barrier
    multiply_mine(layer->gate_up, step->normed, step->gate_up, step->tokens);
  }
}

void motet_feed_out(const motet::Layer* layer, const motet::Step* step) {
  using namespace motet;
#pragma omp parallel
  {
    feed_rows(*step, layer->down.in);
#pragma omp barrier
    multiply_mine(layer->down, step->fed, step->delta, step->tokens);
  }
}
}
