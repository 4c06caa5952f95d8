"""Kernels in C++ for CPUs with AVX-512 and bfloat16, and what lets Python call them."""
