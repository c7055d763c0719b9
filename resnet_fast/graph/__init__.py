"""A forward as data: traced, fused, lowered to a snapshot, grouped across convolutions."""
