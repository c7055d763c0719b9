"""Networks and kernels beside every alternative, judged first, timed together, written into the ledger."""
