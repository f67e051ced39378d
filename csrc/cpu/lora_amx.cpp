#define FASTSAMPLE_ISA amx
#ifndef FASTSAMPLE_LANES
#define FASTSAMPLE_LANES 16
#define FASTSAMPLE_BF16
#endif
#define FASTSAMPLE_AMX
#include "lora.inl"
