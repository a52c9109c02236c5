"""The agents' control connections."""
