"""Image files to batches of pixels: walk, decode, load; sample photographs. Knows no network."""
