"""The layout of an inference rank, recorded by tracing its weight loader; nothing here knows which engine it is."""
