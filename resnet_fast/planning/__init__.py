"""A network as a snapshot to deploy: made, run, saved, compared, tuned."""
