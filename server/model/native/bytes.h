// Numbers as bytes: whole numbers of -127..127, and one scale for all that belong together.

#pragma once

#include <cfloat>
#include <cmath>

#include "adapters/kernels/native/simd.h"

namespace motet {

// Of their absolute values; NaN where one of them is not finite.
template <class T>
float largest_magnitude(const typename T::Number* x, int64_t n) {
  Floats most = zeros();
  Lanes odd = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats magnitude = abs(T::read(x + i, first_lanes(n - i)));
    odd |= not_at_most(magnitude, all(FLT_MAX));
    most = max(most, magnitude);
  }
  return odd ? NAN : largest_of(most);
}

// To whole numbers at a scale of largest / 127; to zeros where `largest` is not a number.
class Rounding {
 public:
  explicit Rounding(float largest)
      : per_unit_(all(largest > 0 ? 127.0f / largest : 0.0f)), is_number_(!std::isnan(largest)) {}

  Ints operator()(Floats x) const { return is_number_ ? to_ints(mul(x, per_unit_)) : all(0); }

 private:
  Floats per_unit_;
  bool is_number_;
};

// Returns the scale. What is not finite makes it NaN.
template <class T>
float to_bytes(const typename T::Number* x, int64_t n, int8_t* bytes) {
  const float largest = largest_magnitude<T>(x, n);
  const Rounding rounded(largest);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes lanes = first_lanes(n - i);
    store_bytes(bytes + i, rounded(T::read(x + i, lanes)), lanes);
  }
  return largest / 127.0f;
}

}  // namespace motet
