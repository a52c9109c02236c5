"""vLLM's weight-transfer engine class, one thin adapter per shape of its interface."""
