"""``python -m weightsync.agents doctor``: known traps of the environment that a trainer rank or an engine runs in."""
