"""``make gpu``: check every kernel on this machine's GPU, then measure it, in one unattended run."""
