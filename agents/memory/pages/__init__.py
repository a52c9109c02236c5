"""Weights in pages of ours: two sets of physical memory behind one range of addresses, and the change between them.

``driver``: CUDA's virtual memory management. ``ranges``: reserved addresses, chunks mapped to them, the flip. ``pool``:
torch's storages moved there. ``paged``: all of it together, for the memory of one device.
"""
