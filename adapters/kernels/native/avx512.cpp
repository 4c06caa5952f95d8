// Compiled for AVX-512: pyproject.toml says how.

#include "kernels.h"
