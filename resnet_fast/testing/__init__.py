"""How a kernel is judged: error rule, oracle, inputs, grids, diagnosis."""
