"""Live modules run fused, true to every edit: the path rule, the fused step, accelerate, a whole pass kept."""
