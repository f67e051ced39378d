#define FASTSAMPLE_ISA avx512
#define FASTSAMPLE_LANES 16
#include "lora.inl"
