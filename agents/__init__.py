"""The light agents inside trainer ranks and vLLM workers."""
