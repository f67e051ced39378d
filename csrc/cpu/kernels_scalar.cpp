#define FASTSAMPLE_ISA scalar
#include "kernels.inl"
