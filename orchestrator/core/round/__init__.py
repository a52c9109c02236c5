"""One round: its transition table, its phases, what it is told, how it begins and ends."""
