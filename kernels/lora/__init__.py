"""Linears of one input with low-rank adapters, what fastsample/ops/lora specifies.

Two forms. `shrink_kernel`, then `expand_kernel`: t = x A^T * scale for all linears in one pass over x, then y, whose
accumulator takes the low-rank part where the base product ends. Or `expand_kernel` alone, which sums its own t beside
the base product in the same loop over K: nothing but y is written, and every tile of y repeats t's products.

The kernels are in kernels.py. What they read is laid out by layout.py, without Triton, for those who write it. tiles.py
cuts up a problem and chooses the form, and launch.py launches the kernels on tensors.
"""
