#define FASTSAMPLE_ISA avx2
#include "kernels.inl"
