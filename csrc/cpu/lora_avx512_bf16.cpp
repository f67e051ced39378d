#define FASTSAMPLE_ISA avx512_bf16
#define FASTSAMPLE_LANES 16
#define FASTSAMPLE_BF16
#include "lora.inl"
