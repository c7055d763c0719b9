"""How an op is computed: aten, cpu, native, triton, experimental; each family registers itself.

``aten`` is what torch ships, ``cpu`` is csrc/cpu, ``native`` is csrc/cuda.
"""
