#define FASTSAMPLE_ISA avx512
#include "kernels.inl"
