"""Effects: one outside thing per module. The runner performs what the core decides."""
