"""The daemon's read-only HTTP routes and what they answer."""
