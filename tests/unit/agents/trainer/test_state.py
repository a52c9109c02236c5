"""What a training script has at hand, as tensors by the model's names; nothing that is trained goes unread."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.trainer.errors import UnreadTensors
from weightsync.agents.trainer.state import TrainerSource, current_state


class Tied(nn.Module):
    """Two names for one parameter, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
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


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("model", "source is a str; give the model, a mapping"),
        (lambda: None, "source returned a NoneType; give the model, a mapping"),
        (lambda: [("a", torch.zeros(1))], "source returned a list; "),
        (Tied, "source returned the module Tied; give it itself"),
        ({1: torch.zeros(1)}, "source has the name 1, which is a int; "),
    ],
)
def test_what_is_no_state_is_told_apart(source: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"^{words}"):
        current_state(source)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


def test_a_model_a_mapping_and_a_callable_give_the_same_tensors() -> None:
    network = model()
    expected = dict(network.named_parameters())
    for source in (network, network.state_dict(keep_vars=True), lambda: network.state_dict(keep_vars=True)):
        state = current_state(source)
        assert state.keys() == expected.keys()
        assert all(state[name] is expected[name] for name in expected)
    compiled = current_state(nn.DataParallel(torch.compile(network, backend="eager")))
    assert all(compiled[name] is expected[name] for name in expected)


def test_what_nobody_reads_is_listed_once_and_again_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    network = model()
    network.register_buffer("count", torch.ones(1))
    source = TrainerSource(network, ignore=("1.*",))
    read = ("0.weight", "0.bias")
    with caplog.at_level(logging.INFO, "weightsync.agents.trainer.state"):
        source.account_for(source.state(), read)
        source.account_for(source.state(), read)
        assert caplog.messages == ["1 tensors of the trainer are read by nobody: count"]
        network.register_buffer("more", torch.ones(1))
        source.account_for(source.state(), read)
        assert caplog.messages[1:] == ["2 tensors of the trainer are read by nobody: count, more"]


def test_a_tensor_that_begins_to_be_trained_is_found_at_the_next_publish() -> None:
    network = model()
    network[1].requires_grad_(False)
    source = TrainerSource(network)
    read = ("0.weight", "0.bias")
    source.account_for(source.state(), read)
    network[1].requires_grad_(True)
    with pytest.raises(UnreadTensors, match=r"1\.bias, 1\.weight"):
        source.account_for(source.state(), read)
