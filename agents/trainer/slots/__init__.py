"""Registered trainer memory that holds converted weights ready to send."""
