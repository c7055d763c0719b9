"""``python -m resnet_fast predict``: class predictions or features for files and folders of photographs.

files (what to read) → loader, decode (worker processes) → network (device) → journal (append-only, resumable) → output
(tables); run is the loop through them, job what one rank does, command the options.
"""
