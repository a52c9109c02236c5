"""What a trainer holds: its tensors read as its own `state_dict` gives them, adapters merged, nothing forgotten."""
