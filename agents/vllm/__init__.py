"""The vLLM side: plugin, weight-transfer engine, recorded layouts and the InferenceAgent."""
