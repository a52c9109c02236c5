"""What a plan does and what it would take on hardware that one does not have. Decides nothing."""
