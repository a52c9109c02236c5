"""Adapter-only rounds: a LoRA adapter is what is written, and the base model stays as the engine loaded it."""
