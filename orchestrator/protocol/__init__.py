"""What the daemon and the agents say to each other, and nothing else. The only package that both import."""
