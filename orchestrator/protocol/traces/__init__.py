"""One trace of each version, from its publish to each engine's switch: contexts that travel, and spans that do not."""
