"""Trainers that hand over (name, tensor) pairs and no model: slots that a stream fills, and their agent."""
