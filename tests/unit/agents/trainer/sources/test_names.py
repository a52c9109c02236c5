"""Wrappers' names go, the model's stay, and no two tensors ever become one."""

import pytest
import torch
from weightsync.agents.trainer.errors import AmbiguousName
from weightsync.agents.trainer.sources.names import plain_names, plain_state

WRAPPED = {
    "model.embed.weight": "model.embed.weight",
    "module.model.embed.weight": "model.embed.weight",
    "_orig_mod.model.embed.weight": "model.embed.weight",
    "_orig_mod.module.model.embed.weight": "model.embed.weight",
    "module._orig_mod.model.embed.weight": "model.embed.weight",
    "module.module.model.embed.weight": "model.embed.weight",
    "model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.q.weight": "model.layers.0.q.weight",
    "model.layers.0._orig_mod._checkpoint_wrapped_module.q.weight": "model.layers.0.q.weight",
    "base_model.model.model.layers.0.q.base_layer.weight": "model.layers.0.q.base_layer.weight",
    "module.base_model.model.model.norm.weight": "model.norm.weight",
    "pretrained_model.base_model.model.model.norm.weight": "model.norm.weight",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_names_of_wrappers_are_taken_out(name):
    assert plain_state({name: torch.ones(1)}).keys() == {WRAPPED[name]}


def test_a_word_within_a_model_is_the_models():
    names = ["module.x", "model.module.x", "not_orig_mod.x", "my_orig_mod.y", "model.base_model.model.z"]
    plain = plain_names(names)
    assert [plain(name) for name in names] == names, "not all of the state is below module."


def test_the_model_of_a_value_head_or_of_a_prompt_is_found_beside_it():
    state = plain_state({"pretrained_model.lm_head.weight": torch.ones(1), "v_head.summary.weight": torch.ones(2)})
    assert state.keys() == {"lm_head.weight", "v_head.summary.weight"}
    prompt = {n: torch.ones(1) for n in ("base_model.model.x", "base_model.lm_head.weight", "prompt_encoder.default.e")}
    assert plain_state(prompt).keys() == {"model.x", "lm_head.weight", "prompt_encoder.default.e"}
    other = {"pretrained_model.lm_head.weight": torch.ones(1), "critic.weight": torch.ones(2)}
    assert plain_state(other).keys() == other.keys(), "what critic is nobody knows"


def test_two_tensors_never_become_one():
    one, other = torch.ones(1), torch.zeros(1)
    with pytest.raises(
        AmbiguousName, match=r"^'a\._orig_mod\.w' and 'a\.w' are different tensors, and both are 'a\.w'"
    ):
        plain_state({"a._orig_mod.w": one, "a.w": other})
    assert plain_state({"a._orig_mod.w": one, "a.w": one}) == {"a.w": one}, "one tensor under two names is one"
