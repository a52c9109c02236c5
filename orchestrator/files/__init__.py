"""Files that secrets are in, as daemon and agents read them: what nobody else could have put there, or can read."""
