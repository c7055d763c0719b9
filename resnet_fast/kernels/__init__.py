"""Kernels by family: ``aten`` (what torch ships), ``cpu`` (csrc/cpu), ``native`` (csrc/cuda), ``triton``, ``experimental``.

Each module registers its own.
"""
