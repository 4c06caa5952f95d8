// Compiled for AVX2: pyproject.toml says how.

#include "kernels.h"
