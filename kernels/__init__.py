"""Triton kernels. A module holds an op's kernels and the function that launches them; LoRA's are a package.

What can be launched ends in `_kernel`, all else under @triton.jit is inlined into those. They share `arithmetic`, the
division of work into `blocks` (element-wise) or `chunks` (reductions), a table's `row` and its `coefficients`.
`variants` has the specialisations that are checked without a GPU.
"""
