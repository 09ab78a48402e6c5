"""Triton kernels, one file an operator with the basenames of csrc/cpu, for NVIDIA and AMD GPUs.

Nothing here is imported by ``import espkernels``: Triton is optional, and espkernels/gpu.py asks for a kernel when a
tensor on a GPU (or Triton's interpreter) does. Each file holds the kernel and the function that launches it, which has
the operator's own schema. Every map is read by its strides, so contiguous and channels_last run without conversion.
None of these kernels was timed: no GPU was there. Bytes and multiply-adds in the docstrings are counts.
"""
