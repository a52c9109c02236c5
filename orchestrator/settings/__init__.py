"""The daemon's configuration: read, checked, explained."""
