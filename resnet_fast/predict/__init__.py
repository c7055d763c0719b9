"""``python -m resnet_fast predict``: class predictions or features of image files and folders; resumable, sharded.

The pipeline: files (what to read) → loader, decode (worker processes) → network (the device) → journal (append-only
record) → output (tables). ``run`` is the loop through it, ``job`` one rank's work, ``command`` the options.
"""
