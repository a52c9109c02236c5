"""The agent inside an inference engine's worker, whichever engine that is."""
