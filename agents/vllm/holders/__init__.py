"""Whoever else in a vLLM worker holds a copy of weights across a round: drained before it, or refused at start."""
