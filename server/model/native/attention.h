// Attention of a step's tokens over a paged cache.
//
//   keys    block: [kv head][dim / tuple][block size][tuple]     scores of sixteen keys are one register
//   values  block: [kv head][block size / tuple][dim][tuple]     and so are sixteen dimensions of an output
//
// In eight bits the order is the same, and behind the bytes of a kv head are the scales of its keys, [block
// size] float32: one for all dimensions of a token. They are widened a chunk at a time to what is multiplied;
// the scales of keys go to the scores and those of values to the weights.
//
// Rows are (token, head): all heads that share a kv head, for consecutive tokens, some at a time. They pass
// the keys in chunks (scores, softmax with a running maximum, sum of values) within segments; a chunk stays
// in the cache while a few tiles of rows pass it, each as many as registers hold. Where there are few rows,
// segments are tasks of their own and are merged at the end. Both begin at fixed positions of the sequence,
// so a token's output has the same bits whatever else the step computes, and however a prompt was cut.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "bytes.h"

namespace motet {

constexpr int kChunk = 256;     // keys whose scores are in memory at once
constexpr int kSegment = 1024;  // keys of one task
constexpr int kMaxDim = 256;    // of keys and values
constexpr int kTaskRows = 4 * kRows;
constexpr float kLowest = -3e38f;  // of a row that has seen no key: finite, so that differences are numbers

struct Sequence {
  int64_t token;        // its first in the step
  int64_t num_queries;  // the last ones of its keys
  int64_t num_keys;
  int64_t table;  // where its blocks begin in `blocks`
};

// In a block of eight bits: those of a head, and a scale for each of its tokens.
struct ScaledBytes {
  int8_t* bytes;
  float* scales;

  // From a token on, before each of which so many bytes lie.
  ScaledBytes from(int64_t token, int64_t size) const { return {bytes + token * size, scales + token}; }
};

template <class T>
struct Cache {
  using Number = typename T::Number;

  Number* keys;
  Number* values;
  int64_t block_size, num_kv_heads, key_dim, value_dim;
  int64_t bits;  // 8, or 0: they are numbers

  Number* keys_of(int64_t block, int64_t head) const {
    return keys + (block * num_kv_heads + head) * key_dim * block_size;
  }
  Number* values_of(int64_t block, int64_t head) const {
    return values + (block * num_kv_heads + head) * value_dim * block_size;
  }

  ScaledBytes key_bytes_of(int64_t block, int64_t head) const { return bytes_of(keys, key_dim, block, head); }
  ScaledBytes value_bytes_of(int64_t block, int64_t head) const {
    return bytes_of(values, value_dim, block, head);
  }

 private:
  ScaledBytes bytes_of(Number* cache, int64_t dim, int64_t block, int64_t head) const {
    constexpr int64_t kScale = sizeof(float);
    int8_t* bytes = (int8_t*)cache + (block * num_kv_heads + head) * (dim + kScale) * block_size;
    return {bytes, (float*)(bytes + dim * block_size)};
  }
};

// What the cache has of one sequence and one kv head.
template <class T>
struct HeadCache {
  Cache<T> cache;
  const int64_t* blocks;
  int64_t head;

  const typename T::Number* keys(int64_t key) const {
    return cache.keys_of(block_of(key), head) + key % cache.block_size * T::kTuple;
  }
  const typename T::Number* values(int64_t key) const {
    return cache.values_of(block_of(key), head) + key % cache.block_size * cache.value_dim;
  }
  ScaledBytes key_bytes(int64_t key) const {
    return cache.key_bytes_of(block_of(key), head).from(key % cache.block_size, T::kTuple);
  }
  ScaledBytes value_bytes(int64_t key) const {
    return cache.value_bytes_of(block_of(key), head).from(key % cache.block_size, cache.value_dim);
  }

 private:
  int64_t block_of(int64_t key) const { return blocks[key / cache.block_size]; }
};

// A tensor [tokens, heads, dim] in whatever order; dim is adjacent.
template <class T>
struct Heads {
  const typename T::Number* data;
  int64_t token_stride, head_stride;

  const typename T::Number* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

template <class T>
struct Attention {
  Heads<T> q;
  typename T::Number* out;  // [tokens, heads, value_dim]
  Cache<T> cache;
  const int64_t* blocks;
  int64_t num_heads;
  int64_t window;  // a query at p sees keys after p - window; 0: all
  float scale;

  int64_t heads_per_kv() const { return num_heads / cache.num_kv_heads; }
};

// Rows [row, row + count) of a sequence's (tokens x heads_per_kv), one kv head, some segments of its keys. At
// most kTaskRows.
struct Task {
  const Sequence* sequence;
  int64_t kv_head, row;
  int count;
  int64_t first_segment, last_segment;  // both inclusive
  float* partial;  // where the state of each row goes; null: all segments are here, the rows are finished
};

// What a row knows after some keys: sum of e^(score - highest) value, and of e^(score - highest).
struct State {
  float* sums;  // [value_dim]
  float highest, total;
};

// A chunk of keys and values that were bytes, and their scales.
template <class T>
struct alignas(64) Widened {
  typename T::Number keys[kChunk * kMaxDim];
  typename T::Number values[kChunk * kMaxDim];
  float key_scales[kChunk];
  float value_scales[kChunk];
};

template <class T>
struct Scratch {
  alignas(64) typename T::Number q[kTaskRows * kMaxDim];
  alignas(64) float scores[kRows * kChunk];  // of a tile
  alignas(64) typename T::Number weights[kRows * kChunk];
  alignas(64) float sums[kTaskRows * kMaxDim];
  alignas(64) float folded[kTaskRows * kMaxDim];
  std::unique_ptr<Widened<T>> widened;                // where the cache has eight bits
  State now[kTaskRows], before[kTaskRows];            // of this segment, of those before it
  int64_t first_key[kTaskRows], last_key[kTaskRows];  // what each row sees, both inclusive
};

inline void forget(State& state, int64_t dim) {
  state.highest = kLowest;
  state.total = 0;
  memset(state.sums, 0, dim * sizeof(float));
}

// What a row knows after `later` keys too.
inline void fold(State& state, const State& later, int64_t dim) {
  if (later.total == 0) return;
  if (state.total == 0) {
    memcpy(state.sums, later.sums, dim * sizeof(float));
    state.highest = later.highest;
    state.total = later.total;
    return;
  }
  const float highest = std::max(state.highest, later.highest);
  const float mine = exponential(state.highest - highest), theirs = exponential(later.highest - highest);
  for (int64_t d = 0; d < dim; d += kLanes)
    store(state.sums + d, fma(load(later.sums + d), all(theirs), mul(load(state.sums + d), all(mine))));
  state.total = state.total * mine + later.total * theirs;
  state.highest = highest;
}

// Sixteen tuples of bytes as numbers.
template <class T>
void widen_tuples(const int8_t* from, typename T::Number* to) {
  Floats numbers[T::kTuple];
  for (int i = 0; i < T::kTuple; i++) numbers[i] = to_floats(load_bytes(from + i * kLanes));
  T::write_exact(to, numbers);
}

// A chunk of bytes as numbers, in one block.
template <class T>
HeadCache<T> widen(const HeadCache<T>& from, Widened<T>& to, int64_t begin, int64_t count) {
  static constexpr int64_t kOnlyBlock = 0;
  const Cache<T>& cache = from.cache;
  for (int64_t key = 0; key < count; key += kLanes) {
    const int64_t next = key + kLanes < count ? key + kLanes : key;  // fetched meanwhile
    const ScaledBytes keys = from.key_bytes(begin + key), next_keys = from.key_bytes(begin + next);
    store(to.key_scales + key, load(keys.scales));
    for (int64_t d = 0; d < cache.key_dim; d += T::kTuple) {
      fetch(next_keys.bytes + d * cache.block_size);
      widen_tuples<T>(keys.bytes + d * cache.block_size, to.keys + d * kChunk + key * T::kTuple);
    }
    const ScaledBytes values = from.value_bytes(begin + key), next_values = from.value_bytes(begin + next);
    store(to.value_scales + key, load(values.scales));
    for (int64_t i = 0; i < kLanes * cache.value_dim; i += kLanes * T::kTuple) {
      fetch(next_values.bytes + i);
      widen_tuples<T>(values.bytes + i, to.values + key * cache.value_dim + i);
    }
  }
  return {{to.keys, to.values, kChunk, 1, cache.key_dim, cache.value_dim, 0}, &kOnlyBlock, 0};
}

// scores[m][key] of M rows from `row` on for `count` keys from `begin` on, and for what fills up the last
// register.
template <class T, int M>
void score(const HeadCache<T>& past, Scratch<T>& s, int row, int64_t begin, int64_t count) {
  const Cache<T>& cache = past.cache;
  for (int64_t key = begin; key < begin + count; key += kLanes) {
    const auto* k = past.keys(key);
    // The next keys and these keys' values are fetched meanwhile: they lie anywhere in memory.
    const auto* next_k = past.keys(key + kLanes < begin + count ? key + kLanes : key);
    const auto* v = past.values(key);
    Floats sum[M];
    MOTET_EACH
    for (int m = 0; m < M; m++) sum[m] = zeros();
    for (int64_t d = 0; d < cache.key_dim; d += T::kTuple, k += T::kTuple * cache.block_size) {
      fetch(next_k + d * cache.block_size);
      fetch(v + d * kLanes);
      const typename T::Tuples tuples = T::load(k);
      MOTET_EACH
      for (int m = 0; m < M; m++)
        sum[m] = T::add_products(sum[m], tuples, T::in_all_lanes(s.q + (row + m) * cache.key_dim + d));
    }
    MOTET_EACH
    for (int m = 0; m < M; m++) store(s.scores + m * kChunk + (key - begin), sum[m]);
  }
}

// scores -> weights of a tile of rows, with what that does to the sums so far.
template <class T>
void weigh(const Attention<T>& a, Scratch<T>& s, int row, int rows, int64_t begin, int64_t count) {
  const Widened<T>* widened = s.widened.get();
  for (int m = 0; m < rows; m++) {
    float* scores = s.scores + m * kChunk;
    auto* weights = s.weights + m * kChunk;
    const Ints low = all((int)std::max<int64_t>(s.first_key[row + m] - begin, 0));
    const Ints high = all((int)std::min<int64_t>(s.last_key[row + m] - begin, count - 1));
    Floats most = all(kLowest);
    for (int64_t k = 0; k < count; k += kLanes) {
      const Ints at = add(lane_numbers(), all((int)k));
      const Lanes seen = at_most(low, at) & at_most(at, high);
      const Floats scale = widened ? mul(load(widened->key_scales + k), all(a.scale)) : all(a.scale);
      const Floats kept = select(seen, mul(load(scores + k), scale), all(kLowest));
      store(scores + k, kept);
      most = max(most, kept);
    }
    State& now = s.now[row + m];
    const float highest = std::max(now.highest, largest_of(most));
    Floats total = zeros();
    for (int64_t k = 0; k < count; k += kLanes) {
      const Floats x = load(scores + k);
      const Lanes seen = not_at_most(x, all(kLowest));  // NaN is seen
      const Floats weight = select(seen, exponential(sub(x, all(highest))), zeros());
      total = add(total, weight);
      T::write(weights + k,
               widened ? select(seen, mul(weight, load(widened->value_scales + k)), zeros()) : weight);
    }
    const float kept = now.highest == kLowest ? 0.0f : exponential(now.highest - highest);
    now.total = now.total * kept + sum_of(total);
    now.highest = highest;
    for (int64_t d = 0; d < a.cache.value_dim; d += kLanes)
      store(now.sums + d, mul(load(now.sums + d), all(kept)));
  }
}

// sums[m] += weights[m] V of `count` keys, sixteen dimensions of M rows from `row` on at a time. Beyond the
// last key may lie anything, also what is not a number: the rest of a tuple is masked, tuples after it are
// left out.
template <class T, int M>
void sum_values(const HeadCache<T>& past, Scratch<T>& s, int row, int64_t begin, int64_t count) {
  const Cache<T>& cache = past.cache;
  for (int64_t d = 0; d < cache.value_dim; d += kLanes) {
    Floats sum[M];
    MOTET_EACH
    for (int m = 0; m < M; m++) sum[m] = load(s.sums + (row + m) * kMaxDim + d);
    for (int64_t at = 0; at < count; at += kLanes) {
      const int64_t stop = std::min(at + kLanes, count);
      const auto* v = past.values(begin + at) + d * T::kTuple;
      for (int64_t k = at; k < stop; k += T::kTuple, v += T::kTuple * cache.value_dim) {
        typename T::Tuples tuples = T::load(v);
        if (k + 1 == stop) tuples = T::firsts(tuples);
        MOTET_EACH
        for (int m = 0; m < M; m++)
          sum[m] = T::add_products(sum[m], tuples, T::in_all_lanes(s.weights + m * kChunk + k));
      }
    }
    MOTET_EACH
    for (int m = 0; m < M; m++) store(s.sums + (row + m) * kMaxDim + d, sum[m]);
  }
}

template <class T>
void finish(const Attention<T>& a, const Task& task, int m, const State& state) {
  const int64_t row = task.row + m, heads = a.heads_per_kv();
  const int64_t token = task.sequence->token + row / heads, head = task.kv_head * heads + row % heads;
  auto* out = a.out + (token * a.num_heads + head) * a.cache.value_dim;
  for (int64_t d = 0; d < a.cache.value_dim; d += kLanes)
    T::write(out + d, mul(load(state.sums + d), all(1.0f / state.total)));
}

template <class T>
void begin_rows(const Attention<T>& a, const Task& task, Scratch<T>& s) {
  const Sequence& sequence = *task.sequence;
  const int64_t heads = a.heads_per_kv(), before = sequence.num_keys - sequence.num_queries;
  for (int m = 0; m < task.count; m++) {
    const int64_t row = task.row + m, token = row / heads, head = task.kv_head * heads + row % heads;
    memcpy(s.q + m * a.cache.key_dim, a.q.at(sequence.token + token, head),
           a.cache.key_dim * sizeof(typename T::Number));
    s.last_key[m] = before + token;
    s.first_key[m] = a.window ? std::max<int64_t>(0, s.last_key[m] - a.window + 1) : 0;
    s.now[m].sums = s.sums + m * kMaxDim;
    s.before[m].sums = s.folded + m * kMaxDim;
    forget(s.before[m], a.cache.value_dim);
  }
}

// Segments and chunks that no row sees are left out: they would change nothing.
template <class T>
void run(const Attention<T>& a, const Task& task, Scratch<T>& s) {
  begin_rows(a, task, s);
  const HeadCache<T> past{a.cache, a.blocks + task.sequence->table, task.kv_head};
  const int64_t end_of_rows = s.last_key[task.count - 1] + 1;
  for (int64_t segment = task.first_segment; segment <= task.last_segment; segment++) {
    for (int m = 0; m < task.count; m++) forget(s.now[m], a.cache.value_dim);
    const int64_t end = std::min((segment + 1) * kSegment, end_of_rows);
    for (int64_t begin = segment * kSegment; begin < end; begin += kChunk) {
      if (begin + kChunk <= s.first_key[0]) continue;
      const int64_t count = std::min<int64_t>(kChunk, end - begin);
      const HeadCache<T> numbers = s.widened ? widen(past, *s.widened, begin, count) : past;
      const int64_t first = s.widened ? 0 : begin;
      for (int row = 0; row < task.count; row += kRows)
        for_rows<kRows>(task.count - row, [&](auto m) {
          score<T, m>(numbers, s, row, first, count);
          weigh(a, s, row, m, begin, count);
          sum_values<T, m>(numbers, s, row, first, count);
        });
    }
    for (int m = 0; m < task.count; m++) fold(s.before[m], s.now[m], a.cache.value_dim);
  }
  for (int m = 0; m < task.count; m++) {
    if (!task.partial) {
      finish(a, task, m, s.before[m]);
      continue;
    }
    float* partial = task.partial + m * (a.cache.value_dim + 2);
    memcpy(partial, s.before[m].sums, a.cache.value_dim * sizeof(float));
    partial[a.cache.value_dim] = s.before[m].highest;
    partial[a.cache.value_dim + 1] = s.before[m].total;
  }
}

// The rows of tasks that have a segment each, one after the other in their order.
template <class T>
void merge(const Attention<T>& a, const Task* tasks, int64_t count) {
  alignas(64) float sums[kMaxDim];
  for (int m = 0; m < tasks[0].count; m++) {
    State state{sums, kLowest, 0};
    for (int64_t i = 0; i < count; i++) {
      float* partial = tasks[i].partial + m * (a.cache.value_dim + 2);
      fold(state, State{partial, partial[a.cache.value_dim], partial[a.cache.value_dim + 1]},
           a.cache.value_dim);
    }
    finish(a, tasks[0], m, state);
  }
}

// What is to be done in a layer, and in all that are like it, cut for some threads. A prompt's tasks hold all
// their segments: there are many of them. A step that decodes long contexts has few rows, so each of their
// segments is a task.
template <class T>
class AttentionPlan {
 public:
  AttentionPlan(const Attention<T>& like, const Sequence* sequences, int64_t count, int num_threads) {
    for (const int rows : {kTaskRows, kRows}) {
      cut(like, sequences, count, rows, false);
      if ((int64_t)tasks_.size() >= kManyTasks * num_threads) return;
      tasks_.clear();
    }
    cut(like, sequences, count, kRows, true);
  }

  // By all threads of a parallel region.
  void run_mine(const Attention<T>& attention) const {
    Scratch<T> scratch;
    if (attention.cache.bits) scratch.widened.reset(new Widened<T>);
    const int64_t num_tasks = (int64_t)tasks_.size(), num_merges = (int64_t)merges_.size();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_tasks; i++) run(attention, tasks_[i], scratch);
    if (num_merges == 0) return;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_merges; i++) merge(attention, &tasks_[merges_[i].first], merges_[i].count);
  }

 private:
  static constexpr int64_t kManyTasks = 8;  // for each thread: then nobody waits long for the last one

  struct Merge {
    int64_t first, count;  // tasks
  };

  void cut(const Attention<T>& a, const Sequence* sequences, int64_t count, int most_rows, bool is_split) {
    const int64_t heads = a.heads_per_kv();
    for (int64_t i = 0; i < count; i++) {
      const Sequence& sequence = sequences[i];
      const int64_t num_rows = sequence.num_queries * heads,
                    before = sequence.num_keys - sequence.num_queries;
      for (int64_t row = 0; row < num_rows; row += most_rows) {
        const int rows = (int)std::min<int64_t>(most_rows, num_rows - row);
        const int64_t oldest = before + row / heads, newest = before + (row + rows - 1) / heads;
        const int64_t first = a.window ? std::max<int64_t>(0, oldest - a.window + 1) / kSegment : 0;
        add(a, sequence, row, rows, first, newest / kSegment, is_split);
      }
    }
    float* next = (partials_.resize(num_partials_), partials_.data());
    for (const Merge& merge : merges_)
      for (int64_t i = 0; i < merge.count; i++, next += kRows * (a.cache.value_dim + 2))
        tasks_[merge.first + i].partial = next;
  }

  void add(const Attention<T>& a, const Sequence& sequence, int64_t row, int rows, int64_t first,
           int64_t last, bool is_split) {
    for (int64_t head = 0; head < a.cache.num_kv_heads; head++) {
      if (!is_split || first == last) {
        tasks_.push_back({&sequence, head, row, rows, first, last, nullptr});
        continue;
      }
      merges_.push_back({(int64_t)tasks_.size(), last - first + 1});
      num_partials_ += (last - first + 1) * kRows * (a.cache.value_dim + 2);
      for (int64_t at = first; at <= last; at++)
        tasks_.push_back({&sequence, head, row, rows, at, at, nullptr});
    }
  }

  std::vector<Task> tasks_;
  std::vector<Merge> merges_;
  std::vector<float> partials_;
  int64_t num_partials_ = 0;
};

// A token's key and value among those of its block.
template <int kTuple, class Element>
void place_key(const Element* key, int64_t dim, int64_t block_size, int64_t at, Element* block) {
  for (int64_t d = 0; d < dim; d += kTuple)
    memcpy(block + d * block_size + at * kTuple, key + d, kTuple * sizeof *key);
}
template <int kTuple, class Element>
void place_value(const Element* value, int64_t dim, int64_t at, Element* block) {
  Element* to = block + at / kTuple * kTuple * dim + at % kTuple;
  for (int64_t d = 0; d < dim; d++) to[kTuple * d] = value[d];
}

// A token's key and value of one head to its place in the cache (block * block size + offset).
template <class T>
void keep(const Cache<T>& cache, int64_t place, int64_t head, const typename T::Number* key,
          const typename T::Number* value) {
  const int64_t block = place / cache.block_size, at = place % cache.block_size;
  if (!cache.bits) {
    place_key<T::kTuple>(key, cache.key_dim, cache.block_size, at, cache.keys_of(block, head));
    place_value<T::kTuple>(value, cache.value_dim, at, cache.values_of(block, head));
    return;
  }
  int8_t bytes[kMaxDim];
  const auto [keys, key_scales] = cache.key_bytes_of(block, head);
  key_scales[at] = to_bytes<T>(key, cache.key_dim, bytes);
  place_key<T::kTuple>(bytes, cache.key_dim, cache.block_size, at, keys);
  const auto [values, value_scales] = cache.value_bytes_of(block, head);
  value_scales[at] = to_bytes<T>(value, cache.value_dim, bytes);
  place_value<T::kTuple>(bytes, cache.value_dim, at, values);
}

}  // namespace motet
