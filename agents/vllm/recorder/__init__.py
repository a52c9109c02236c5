"""The layout of an inference rank, recorded from vLLM's own weight loader."""
