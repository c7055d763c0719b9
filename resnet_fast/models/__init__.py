"""The family: rows of data, residual blocks, torchvision's names; checkpoints; each model's problems."""
