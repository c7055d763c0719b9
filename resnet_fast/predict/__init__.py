"""Photographs in, classes or features out: resumable, sharded.

The pipeline: data.files (what to read) → data.loader, data.decode (worker processes) → network (the device) → journal
(append-only record) → output (tables). ``run`` is the loop through it, ``job`` one rank's work.
"""
