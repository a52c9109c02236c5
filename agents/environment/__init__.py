"""What this process has around it, and what that does to transfers: limits, variables, ports, packages."""
