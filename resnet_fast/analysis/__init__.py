"""What a network or kernel costs and what limits it: whole-network floors, machine code, likely causes, explain."""
