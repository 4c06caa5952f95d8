// The decoder layers of a step, all in one parallel region.
//
//   normed  = norm(hidden += delta)         delta: what the half layer before has yet to add
//   qkv     = normed W   + adapters
//   rotate queries and keys, keep keys and values, attend
//   delta   = attended W + adapters
//   normed  = norm(hidden += delta)
//   gate up = normed W   + adapters
//   fed     = silu(gate) * up
//   delta   = fed W      + adapters
//
// Everything is rounded where the modules of transformers round it, so that only the order of sums differs.
// Each line is split over the threads, which wait for each other between lines.
//
// Nobody reads the last hidden state of most tokens of a prompt: their keys and values are all that is left
// of them. So in the last layer, once these are kept, only the wanted tokens go on, and only they are
// normalised after it.

#pragma once

#include <omp.h>

#include <cmath>
#include <map>
#include <memory>
#include <optional>

#include "adapters/kernels/native/lora.h"
#include "attention.h"
#include "linear.h"
#include "quantized.h"

namespace motet {

template <class T>
struct Linear {
  const void* weight;              // panels
  const void* scales;              // of weights of few bits
  const typename T::Number* bias;  // [out] or null
  int64_t in, out;
  int64_t bits;    // of the weights; 0: they are numbers
  int64_t target;  // its number among those that adapters may change
};

template <class T>
struct Layer {
  using Number = typename T::Number;

  Linear<T> q, k, v, o, gate, up, down;
  const Number* input_norm;  // [hidden]
  const Number* inner_norm;  // [hidden], before gate and up
  const Number* query_norm;  // [head_dim] or null
  const Number* key_norm;    // [head_dim] or null
  Number* keys;              // the cache
  Number* values;
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t window;  // 0: none
  float epsilon, scale;
};

template <class T>
struct Step {
  using Number = typename T::Number;

  Number* hidden;  // [tokens, hidden_size], in place
  int64_t tokens, hidden_size;
  const Number* cosine;      // [positions, head_dim]
  const Number* sine;        // [positions, head_dim]
  const int64_t* positions;  // [tokens] of their rows
  const int64_t* places;     // [tokens] in the cache
  const Sequence* sequences;
  int64_t num_sequences;
  const int64_t* blocks;
  int64_t block_size;
  int64_t cache_bits;                  // of keys and values; 0: they are numbers
  const LoraStep<T>* adapters;         // or null
  const int64_t* wanted;               // tokens whose hidden states are read, ascending
  int64_t num_wanted;                  // as many as there are tokens: all, `wanted` may be null
  const LoraStep<T>* wanted_adapters;  // of the wanted tokens, numbered 0, 1, ...; or null
  const Number* last_norm;             // [hidden_size], after the last layer; or null
  double last_epsilon;
  double* seconds;  // by Part; what each took is added
};

enum Part { kLinear, kAdapters, kAttention, kRest };

// Of the first thread, which waits at each barrier for the others.
class Laps {
 public:
  explicit Laps(double* seconds) : seconds_(omp_get_thread_num() ? nullptr : seconds), at_(omp_get_wtime()) {}

  void lap(Part part) {
    if (!seconds_) return;
    const double now = omp_get_wtime();
    seconds_[part] += now - at_;
    at_ = now;
  }

 private:
  double* seconds_;
  double at_;
};

// to = norm(x), may be x itself.
template <class T>
void norm_row(const typename T::Number* x, const typename T::Number* weight, float epsilon,
              typename T::Number* to, int64_t n) {
  Floats squares = zeros();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats v = T::read(x + i, first_lanes(n - i));
    squares = fma(v, v, squares);
  }
  const Floats scale = all(1.0f / std::sqrt(sum_of(squares) / (float)n + epsilon));
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes lanes = first_lanes(n - i);
    const Floats v = T::rounded(mul(T::read(x + i, lanes), scale));
    T::write(to + i, mul(T::read(weight + i, lanes), v), lanes);
  }
}

template <class T>
void add_row(typename T::Number* x, const typename T::Number* delta, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes lanes = first_lanes(n - i);
    T::write(x + i, add(T::read(x + i, lanes), T::read(delta + i, lanes)), lanes);
  }
}

// x cos + (-second half, first half) sin, in place.
template <class T>
void rotate(typename T::Number* x, const typename T::Number* cosine, const typename T::Number* sine,
            int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const Lanes lanes = first_lanes(half - i);
    const Floats first = T::read(x + i, lanes), second = T::read(x + half + i, lanes);
    const Floats a = T::rounded(mul(first, T::read(cosine + i, lanes)));
    const Floats b = T::rounded(mul(second, T::read(sine + i, lanes)));
    const Floats c = T::rounded(mul(second, T::read(cosine + half + i, lanes)));
    const Floats d = T::rounded(mul(first, T::read(sine + half + i, lanes)));
    T::write(x + i, sub(a, b), lanes);
    T::write(x + half + i, add(c, d), lanes);
  }
}

// x / (1 + e^-x), written so that no power is large.
inline Floats silu(Floats x) {
  const Floats power = exponential(sub(zeros(), abs(x)));
  const Floats over = select(less(x, zeros()), power, all(1.0f));
  return mul(x, div(over, add(all(1.0f), power)));
}

// The wanted tokens of a step, as the last layer sees them: numbered anew, each a query of its own.
template <class T>
struct Wanted {
  const int64_t* tokens;
  int64_t count;
  std::vector<Sequence> sequences;  // by the step's own numbers

  explicit Wanted(const Step<T>& step) : tokens(step.wanted), count(step.num_wanted) {
    const Sequence* sequence = step.sequences;
    for (int64_t i = 0; i < count; i++) {
      while (tokens[i] >= sequence->token + sequence->num_queries) sequence++;
      const int64_t later = sequence->token + sequence->num_queries - 1 - tokens[i];
      sequences.push_back({tokens[i], 1, sequence->num_keys - later, sequence->table});
    }
  }
};

template <class T>
class Decoder {
 public:
  using Number = typename T::Number;

  // At least one layer and one token; all layers have the same sizes.
  Decoder(const Layer<T>* layers, int64_t count, const Step<T>& step, int num_threads)
      : layers_(layers), count_(count), step_(step) {
    const Layer<T>& first = layers[0];
    width_ = first.q.out + first.k.out + first.v.out;
    inner_ = first.gate.out;
    const int64_t scratch = step.adapters ? lora_scratch_size(*step.adapters) : 0;
    const int64_t sizes[] = {step.tokens * step.hidden_size,
                             step.tokens * width_,
                             step.tokens * first.o.in,
                             step.tokens * step.hidden_size,
                             step.tokens * inner_ * 2,
                             step.tokens * inner_,
                             scratch,
                             scratch,
                             scratch};
    Number** const places[] = {&normed_, &qkv_,        &attended_,   &delta_,     &gate_up_,
                               &fed_,    &scratch_[0], &scratch_[1], &scratch_[2]};
    int64_t total = 0;
    for (int64_t size : sizes) total += aligned(size);
    memory_.reset(new Number[total + kLine]);
    const auto address = (uintptr_t)memory_.get();
    Number* next = memory_.get() + (kLine - address / sizeof(Number) % kLine) % kLine;
    for (int i = 0; i < 9; i++) {
      *places[i] = next;
      next += aligned(sizes[i]);
    }
    if (first.q.bits) {
      const int64_t in = std::max({step.hidden_size, first.o.in, inner_});
      bytes_.reset(new int8_t[step.tokens * quads(in) * kQuad]);
      scales_.reset(new float[step.tokens * groups_of(in)]);
      sums_.reset(new int32_t[step.tokens * blocks_of(in)]);
      quantized_ = {bytes_.get(), scales_.get(), sums_.get()};
    }
    for (int64_t i = 0; i < count; i++)
      plans_.try_emplace(layers[i].window, attention_of(layers[i]), step.sequences, step.num_sequences,
                         num_threads);
    if (step.num_wanted == step.tokens) return;
    wanted_ = std::make_unique<Wanted<T>>(step);
    last_plan_.emplace(attention_of(layers[count - 1]), wanted_->sequences.data(), step.num_wanted,
                       num_threads);
  }

  void run(int num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
      Laps laps(step_.seconds);
      for (int64_t i = 0; i < count_; i++) {
        const Layer<T>& layer = layers_[i];
        const bool is_narrow = wanted_ && i + 1 == count_;
        norm(layer.input_norm, layer.epsilon, i > 0);
        laps.lap(kRest);
        project({&layer.q, &layer.k, &layer.v}, normed_, qkv_, width_, laps);
        rotate_and_keep(layer);
        (is_narrow ? *last_plan_ : plans_.at(layer.window)).run_mine(attention_of(layer));
        if (is_narrow) leave_others(layer.o.in);
        laps.lap(kAttention);
        quantize(attended_, layer.o.in);
        project({&layer.o}, attended_, delta_, step_.hidden_size, laps);
        norm(layer.inner_norm, layer.epsilon, true);
        laps.lap(kRest);
        project({&layer.gate, &layer.up}, normed_, gate_up_, 2 * inner_, laps);
        feed();
        laps.lap(kRest);
        quantize(fed_, inner_);
        project({&layer.down}, fed_, delta_, step_.hidden_size, laps);
      }
      const Share mine = Share::of(step_.tokens);
      for (int64_t t = mine.begin; t < mine.end; t++) {
        add_row<T>(hidden(t), delta_ + t * step_.hidden_size, step_.hidden_size);
        if (step_.last_norm)
          norm_row<T>(hidden(t), step_.last_norm, (float)step_.last_epsilon, hidden(t), step_.hidden_size);
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(Number);
  static constexpr int64_t kOutputBytes = kGroupBytes / 2;  // that stay in L2 beside what passes it

  static int64_t aligned(int64_t size) { return (size + kLine - 1) / kLine * kLine; }

  Attention<T> attention_of(const Layer<T>& layer) const {
    const Heads<T> queries{qkv_, width_, layer.head_dim};
    const Cache<T> cache{layer.keys,     layer.values,   step_.block_size, layer.num_kv_heads,
                         layer.head_dim, layer.head_dim, step_.cache_bits};
    return {queries, attended_, cache, step_.blocks, layer.num_heads, layer.window, layer.scale};
  }

  Number* hidden(int64_t token) const {
    return step_.hidden + (is_narrow_ ? wanted_->tokens[token] : token) * step_.hidden_size;
  }

  // From here on the step is that of the wanted tokens.
  void leave_others(int64_t attended_size) {
#pragma omp single
    {
      for (int64_t i = 0; i < wanted_->count; i++)  // ascending: none is written over before it is read
        memmove(attended_ + i * attended_size, attended_ + wanted_->tokens[i] * attended_size,
                attended_size * sizeof(Number));
      step_.tokens = wanted_->count;
      step_.adapters = step_.wanted_adapters;
      is_narrow_ = true;
    }
  }

  void norm(const Number* weight, float epsilon, bool is_delta_due) {
    const int64_t size = step_.hidden_size;
    const Share mine = Share::of(step_.tokens);
    for (int64_t t = mine.begin; t < mine.end; t++) {
      if (is_delta_due) add_row<T>(hidden(t), delta_ + t * size, size);
      norm_row<T>(hidden(t), weight, epsilon, normed_ + t * size, size);
      if (bytes_) quantize_row<T>(normed_ + t * size, size, t, quantized_);
    }
#pragma omp barrier
  }

  // What goes into a projection, where its weights have few bits.
  void quantize(const Number* x, int64_t in) {
    if (!bytes_) return;
    const Share mine = Share::of(step_.tokens);
    for (int64_t t = mine.begin; t < mine.end; t++) quantize_row<T>(x + t * in, in, t, quantized_);
#pragma omp barrier
  }

  // y = x W + adapters, outputs of the linear layers side by side. Adapters come as soon as so many outputs
  // are there as the cache holds: of a prompt they would else be read from far away, and written there again.
  template <int N>
  void project(const Linear<T>* const (&linears)[N], const Number* x, Number* y, int64_t y_stride,
               Laps& laps) {
    if (step_.adapters) {
      for (int i = 0, from = 0; i < N; from += linears[i++]->out)
        lora(*linears[i], x, y + from, y_stride, scratch_[i]).shrink_mine();
#pragma omp barrier
      laps.lap(kAdapters);
    }
    int64_t total = 0;
    for (const Linear<T>* linear : linears) total += num_panels(linear->out);
    const Share mine = Share::of(total);
    int64_t before = 0, from = 0;
    for (int i = 0; i < N; from += linears[i++]->out) {
      const Linear<T>& linear = *linears[i];
      const int64_t panels = num_panels(linear.out), end = std::min(mine.end - before, panels);
      const int64_t at_once = step_.adapters ? panels_with_adapters(linear) : panels;
      for (int64_t begin = std::max<int64_t>(mine.begin - before, 0); begin < end; begin += at_once) {
        const int64_t until = std::min(begin + at_once, end);
        multiply(linear, x, y + from, y_stride, begin, until);
        laps.lap(kLinear);
        if (!step_.adapters) continue;
        lora(linear, x, y + from, y_stride, scratch_[i])
            .expand(begin * kPanel, std::min(until * kPanel, linear.out));
        laps.lap(kAdapters);
      }
      before += panels;
    }
#pragma omp barrier
    laps.lap(kLinear);
  }

  // After so many the adapters have their turn.
  int64_t panels_with_adapters(const Linear<T>& linear) const {
    const int64_t size = linear.bits ? panel_bytes(linear.in, linear.bits) : panel_bytes<T>(linear.in);
    const int64_t group = panels_at_once(size);
    const int64_t outputs = step_.tokens * kPanel * (int64_t)sizeof(Number);
    return std::max<int64_t>(1, kOutputBytes / (outputs * group)) * group;
  }

  void multiply(const Linear<T>& linear, const Number* x, Number* y, int64_t y_stride, int64_t begin,
                int64_t end) const {
    const int64_t in = linear.in, out = linear.out;
    if (linear.bits)
      multiply_quantized_panels<T>({quantized_, (const uint8_t*)linear.weight, linear.scales, linear.bias, y,
                                    y_stride, in, out, linear.bits},
                                   step_.tokens, begin, end);
    else
      multiply_panels<T>({x, in, (const Number*)linear.weight, linear.bias, y, y_stride, in, out},
                         step_.tokens, begin, end);
  }

  LoraWork<T> lora(const Linear<T>& linear, const Number* x, Number* y, int64_t y_stride,
                   Number* scratch) const {
    return {*step_.adapters, linear.target, {x, linear.in, y, y_stride, linear.in, linear.out}, scratch};
  }

  void rotate_and_keep(const Layer<T>& layer) {
    const int64_t dim = layer.head_dim, heads = layer.num_heads + layer.num_kv_heads;
    const Cache<T> cache = attention_of(layer).cache;
    const Share mine = Share::of(step_.tokens * heads);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const int64_t token = i / heads, head = i % heads;
      const bool is_key = head >= layer.num_heads;
      Number* x = qkv_ + token * width_ + head * dim;
      if (const Number* weight = is_key ? layer.key_norm : layer.query_norm)
        norm_row<T>(x, weight, layer.epsilon, x, dim);
      const int64_t angles = step_.positions[token] * dim;
      rotate<T>(x, step_.cosine + angles, step_.sine + angles, dim);
      if (is_key) keep(cache, step_.places[token], head - layer.num_heads, x, x + layer.num_kv_heads * dim);
    }
#pragma omp barrier
  }

  void feed() {
    const int64_t blocks = (inner_ + kLanes - 1) / kLanes;
    const Share mine = Share::of(step_.tokens * blocks);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const int64_t token = i / blocks, at = i % blocks * kLanes;
      const Lanes lanes = first_lanes(inner_ - at);
      const Number* gate = gate_up_ + token * 2 * inner_ + at;
      const Floats x = T::rounded(silu(T::read(gate, lanes)));
      T::write(fed_ + token * inner_ + at, mul(x, T::read(gate + inner_, lanes)), lanes);
    }
#pragma omp barrier
  }

  const Layer<T>* layers_;
  int64_t count_;
  Step<T> step_;
  int64_t width_, inner_;
  std::unique_ptr<Number[]> memory_;
  Number *normed_, *qkv_, *attended_, *delta_, *gate_up_, *fed_;
  Number* scratch_[3];
  QuantizedRows quantized_{};  // what the next projection reads, if its weights have few bits
  std::unique_ptr<int8_t[]> bytes_;
  std::unique_ptr<float[]> scales_;
  std::unique_ptr<int32_t[]> sums_;
  std::map<int64_t, AttentionPlan<T>> plans_;  // by window
  std::unique_ptr<Wanted<T>> wanted_;          // null: all
  std::optional<AttentionPlan<T>> last_plan_;  // of the last layer, if only some are wanted
  bool is_narrow_ = false;                     // whether the others have been left
};

}  // namespace motet
