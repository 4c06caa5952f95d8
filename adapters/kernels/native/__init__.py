"""The sums in C++ for CPUs with AVX-512, and what lets Python call them."""
