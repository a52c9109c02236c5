"""The trainer's tensors by their own names, wherever they come from."""

import torch
from weightsync.agents.trainer.state import current_state


class Tied(torch.nn.Module):
    """Two names for one parameter, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(3, 2)
        self.head = torch.nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))


def test_a_module_gives_parameters_and_buffers_tied_ones_twice() -> None:
    module = Tied()
    state = current_state(module)
    assert state.keys() == {"embed.weight", "head.weight", "scale"}
    assert state["embed.weight"] is state["head.weight"] is module.embed.weight


def test_wrappers_leave_no_trace_in_the_names() -> None:
    tensor = torch.zeros(1)
    wrapped = {"_orig_mod.layers.0._checkpoint_wrapped_module.mlp._fsdp_wrapped_module.up.weight": tensor}
    assert current_state(wrapped) == {"layers.0.mlp.up.weight": tensor}


def test_a_callable_is_asked_each_time() -> None:
    state = {"a": torch.zeros(1)}
    assert current_state(lambda: state).keys() == {"a"}
    state["b"] = torch.zeros(1)
    assert current_state(lambda: state).keys() == {"a", "b"}
