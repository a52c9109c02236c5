"""The orchestrator: a pure core that decides, a protocol that agents share, a daemon that performs."""
