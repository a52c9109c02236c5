"""The run directory: markers, what wakes a rescan, and which file system it lies on."""
