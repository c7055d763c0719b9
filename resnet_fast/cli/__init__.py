"""One file for each command: its options, its words; what it does is done elsewhere."""
