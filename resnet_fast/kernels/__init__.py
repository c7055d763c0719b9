"""Kernels by family: ``aten`` (what torch ships), ``native`` (csrc), ``triton``, ``experimental``. Each module registers its own."""
