"""The dtypes that compiled kernels read and write, and what they call them."""

import torch

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType in csrc/common/step_args.h
