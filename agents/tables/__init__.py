"""Tables of copies, writes and digests made from a plan's rows."""
