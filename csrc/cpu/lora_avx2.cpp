#define FASTSAMPLE_ISA avx2
#define FASTSAMPLE_LANES 8
#include "lora.inl"
