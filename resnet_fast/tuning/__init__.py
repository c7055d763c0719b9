"""Measured choice: which kernel for a problem, which groups for a network; written into the table."""
