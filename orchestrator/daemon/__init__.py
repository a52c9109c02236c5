"""The daemon: one outside thing per module. Events come in by the inbox, the outbox performs what the core decides."""
