"""Memory that other machines may write into: pinned host arenas and plain device arenas, and the proof of it."""
