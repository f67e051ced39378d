#define FASTSAMPLE_ISA scalar
#define FASTSAMPLE_LANES 1
#include "lora.inl"
