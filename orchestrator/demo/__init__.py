"""``weightsync-orchestrator demo``: a whole fleet on one machine."""
