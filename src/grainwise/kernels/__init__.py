"""The hot loops that systems of other rooms call: for the CPU in Numba or in LLVM IR compiled at first use,
for the GPU in Triton.

Every kernel has a reference in plain torch that its tests compare it with.
"""
