"""Steps bound to kernels for one input shape, and run: in pieces, with groups, as a CUDA graph."""
