"""The agent's own thread and its control channel to the daemon."""
