"""The ledger as tables, plots and a page."""
