"""The least time physics allows for one problem on one chip: chips, bytes and FLOPs, floors, occupancy."""
