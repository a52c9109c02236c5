"""``doctor`` of the daemon's host: each known trap, with evidence and fix."""
