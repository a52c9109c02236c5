"""Who is let in, to which route, and what a stranger may cost."""
