// What Python calls (server/model/native/bindings.py), for each kind of numbers. Sizes and strides are in
// numbers, pointers are to adjacent memory unless a stride says otherwise, and the caller has checked all of
// them.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "attention.h"
#include "decoder.h"
#include "linear.h"
#include "quantized.h"

namespace motet {
namespace {

using Tuple = uint32_t;  // what lies together of an output: as many inputs as fill four bytes

template <class T>
constexpr int64_t tuples_of(int64_t in) {
  static_assert(T::kTuple * sizeof(typename T::Number) == sizeof(Tuple));
  return in / T::kTuple;
}

// w [out, in] -> packed; outputs that are not there are zeros. A cache line of four outputs at a time.
template <class T>
void pack(const typename T::Number* w, int64_t out, int64_t in, typename T::Number* packed, int num_threads) {
  constexpr int64_t kLine = 16;
  const int64_t tuples = tuples_of<T>(in);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t panel = 0; panel < num_panels(out); panel++) {
    const auto* from = reinterpret_cast<const Tuple*>(w) + panel * kPanel * tuples;
    auto* to = reinterpret_cast<Tuple*>(packed) + panel * kPanel * tuples;
    const int64_t outputs = std::min<int64_t>(kPanel, out - panel * kPanel);
    const int64_t whole = outputs == kPanel ? tuples / kLine * kLine : 0;
    for (int64_t line = 0; line < whole; line += kLine) {
      for (int64_t output = 0; output < kPanel; output += 4) {
        for (int64_t k = line; k < line + kLine; k += 4) {
          transpose(from + output * tuples + k, tuples, to + k * kPanel + output, kPanel);
        }
      }
    }
    for (int64_t k = whole; k < tuples; k++) {
      for (int64_t output = 0; output < kPanel; output++) {
        to[k * kPanel + output] = output < outputs ? from[output * tuples + k] : 0;
      }
    }
  }
}

// Rows of w, out of packed: [n, in].
template <class T>
void read_rows(const typename T::Number* packed, int64_t in, const int64_t* rows, int64_t n,
               typename T::Number* found, int num_threads) {
  const int64_t tuples = tuples_of<T>(in);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (n >= kPanel)
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = rows[i];
    const auto* from = reinterpret_cast<const Tuple*>(packed) + row / kPanel * kPanel * tuples + row % kPanel;
    auto* to = reinterpret_cast<Tuple*>(found) + i * tuples;
    for (int64_t k = 0; k < tuples; k++) to[k] = from[k * kPanel];
  }
}

template <class T>
void multiply_all(const Product<T>& product, int64_t rows, int num_threads) {
  const int64_t panels = num_panels(product.out);
#pragma omp parallel num_threads(num_threads)
  {
    const Share mine = Share::of(panels);
    multiply_panels(product, rows, mine.begin, mine.end);
  }
}

// w [out, in] -> packed and scales, both filled up to whole panels, with 8 or 4 bits a weight.
template <class T>
void quantize(const typename T::Number* w, int64_t out, int64_t in, int64_t bits, uint8_t* packed,
              void* scales, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t output = 0; output < out; output++) {
    if (bits == 8)
      quantize_to_bytes<T>(w + output * in, in, output, packed, (float*)scales);
    else
      quantize_to_nibbles<T>(w + output * in, in, output, packed, (uint16_t*)scales);
  }
}

template <class T>
void dequantize(const uint8_t* packed, const void* scales, int64_t out, int64_t in, int64_t bits,
                typename T::Number* w, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t output = 0; output < out; output++)
    dequantize_output<T>(packed, scales, bits, in, output, w + output * in);
}

// The product's rows x [rows, in] are quantised on the way.
template <class T>
void multiply_all_quantized(QuantizedProduct<T> product, const typename T::Number* x, int64_t x_stride,
                            int64_t rows, int num_threads) {
  const int64_t in = product.in;
  const std::unique_ptr<int8_t[]> numbers(new int8_t[rows * quads(in) * kQuad]);
  const std::unique_ptr<float[]> scales(new float[rows * groups_of(in)]);
  const std::unique_ptr<int32_t[]> sums(new int32_t[rows * blocks_of(in)]);
  product.x = {numbers.get(), scales.get(), sums.get()};
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) quantize_row<T>(x + row * x_stride, in, row, product.x);
    const Share mine = Share::of(num_panels(product.out));
    multiply_quantized_panels(product, rows, mine.begin, mine.end);
  }
}

// The step's keys and values go to their places in the cache, then its queries attend to what is there.
template <class T>
void attend(const Attention<T>& attention, const Heads<T>& k, const Heads<T>& v, const int64_t* places,
            int64_t tokens, const Sequence* sequences, int64_t count, int num_threads) {
  AttentionPlan<T> plan(attention, sequences, count, num_threads);
  const Cache<T>& cache = attention.cache;
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * cache.num_kv_heads; i++) {
      const int64_t token = i / cache.num_kv_heads, head = i % cache.num_kv_heads;
      keep(cache, places[token], head, k.at(token, head), v.at(token, head));
    }
    plan.run_mine(attention);
  }
}

// The first place of the largest of some numbers, where one that is not a number is larger than all.
template <class T>
int64_t place_of_largest(const typename T::Number* x, int64_t n) {
  float peak = -INFINITY;
  int64_t place = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, n - i);
    if (count == kLanes && !not_at_most(T::read(x + i), all(peak))) continue;
    for (int64_t k = i; k < i + count; k++) {
      const float number = T::widen(x[k]);
      if (number <= peak) continue;
      peak = number, place = k;
      if (std::isnan(number)) return place;
    }
  }
  return place;
}

template <class T>
void find_largest(const typename T::Number* x, int64_t rows, int64_t n, typename T::Number* peaks,
                  int64_t* places, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows > 1)
  for (int64_t row = 0; row < rows; row++) {
    places[row] = place_of_largest<T>(x + row * n, n);
    peaks[row] = x[row * n + places[row]];
  }
}

}  // namespace
}  // namespace motet

using namespace motet;

extern "C" {

// Numbers that a laid out weight has. `in` is a multiple of the tuple.
int64_t motet_packed_size(int64_t out, int64_t in) { return num_panels(out) * kPanel * in; }

// The same for weights of few bits: their bytes, and those of their scales.
int64_t motet_quantized_size(int64_t out, int64_t in, int64_t bits) {
  return num_panels(out) * panel_bytes(in, bits);
}
int64_t motet_scales_size(int64_t out, int64_t in, int64_t bits) {
  return num_panels(out) * kPanel * (bits == 8 ? 4 : 2 * blocks_of(in));
}

#define MOTET_EXPORT(T, name)                                                                               \
  void motet_pack_##name(const T::Number* w, int64_t out, int64_t in, T::Number* packed, int num_threads) { \
    pack<T>(w, out, in, packed, num_threads);                                                               \
  }                                                                                                         \
  void motet_rows_##name(const T::Number* packed, int64_t in, const int64_t* rows, int64_t n,               \
                         T::Number* found, int num_threads) {                                               \
    read_rows<T>(packed, in, rows, n, found, num_threads);                                                  \
  }                                                                                                         \
  void motet_linear_##name(const Product<T>* product, int64_t rows, int num_threads) {                      \
    multiply_all(*product, rows, num_threads);                                                              \
  }                                                                                                         \
  void motet_attend_##name(const Attention<T>* attention, const Heads<T>* k, const Heads<T>* v,             \
                           const int64_t* places, int64_t tokens, const Sequence* sequences, int64_t count, \
                           int num_threads) {                                                               \
    attend(*attention, *k, *v, places, tokens, sequences, count, num_threads);                              \
  }                                                                                                         \
  void motet_quantize_##name(const T::Number* w, int64_t out, int64_t in, int64_t bits, uint8_t* packed,    \
                             void* scales, int num_threads) {                                               \
    quantize<T>(w, out, in, bits, packed, scales, num_threads);                                             \
  }                                                                                                         \
  void motet_dequantize_##name(const uint8_t* packed, const void* scales, int64_t out, int64_t in,          \
                               int64_t bits, T::Number* w, int num_threads) {                               \
    dequantize<T>(packed, scales, out, in, bits, w, num_threads);                                           \
  }                                                                                                         \
  void motet_linear_quantized_##name(const QuantizedProduct<T>* product, const T::Number* x,                \
                                     int64_t x_stride, int64_t rows, int num_threads) {                     \
    multiply_all_quantized(*product, x, x_stride, rows, num_threads);                                       \
  }                                                                                                         \
  void motet_largest_##name(const T::Number* x, int64_t rows, int64_t n, T::Number* peaks, int64_t* places, \
                            int num_threads) {                                                              \
    find_largest<T>(x, rows, n, peaks, places, num_threads);                                                \
  }                                                                                                         \
  void motet_decode_##name(const Layer<T>* layers, int64_t count, const Step<T>* step, int num_threads) {   \
    Decoder<T>(layers, count, *step, num_threads).run(num_threads);                                         \
  }

MOTET_EXPORT(Bf16, bfloat16)
MOTET_EXPORT(F32, float32)
}
