"""Kernels in C++ for CPUs with AVX-512 or AVX2, and what lets Python call them."""
