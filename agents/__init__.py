"""The light agents inside trainer ranks and vLLM workers."""

from weightsync.agents.memory import preload

preload.cudart()  # before any other import of the agents can bring a stub of the CUDA runtime in
