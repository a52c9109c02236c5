"""Inference engines' servers: the seam, the kinds that there are, and the calls that the core wants made."""
