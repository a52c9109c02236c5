"""The daemon: a pure core that decides, a protocol that agents share, a shell that performs."""
