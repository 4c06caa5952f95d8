// What Python calls (adapters/kernels/native/bindings.py), for each kind of numbers. Sizes and strides are in
// numbers, pointers are to adjacent memory unless a stride says otherwise, and the caller has checked all of
// them.

#include <memory>

#include "lora.h"

namespace motet {
namespace {

template <class T>
void add_lora(const LoraStep<T>& step, int64_t target, const LoraProduct<T>& product, int num_threads) {
  const std::unique_ptr<typename T::Number[]> scratch(new typename T::Number[lora_scratch_size(step)]);
  const LoraWork<T> work(step, target, product, scratch.get());
  if (work.is_empty()) return;
#pragma omp parallel num_threads(num_threads)
  {
    work.shrink_mine();
#pragma omp barrier
    work.expand_mine();
  }
}

}  // namespace
}  // namespace motet

extern "C" {

using namespace motet;

#define MOTET_EXPORT(T, name)                                                                        \
  void motet_add_lora_##name(const LoraStep<T>* step, int64_t target, const LoraProduct<T>* product, \
                             int num_threads) {                                                      \
    add_lora(*step, target, *product, num_threads);                                                  \
  }

MOTET_EXPORT(Bf16, bfloat16)
MOTET_EXPORT(F32, float32)
}
