"""Drafters: their names, and what they share with their model, on small modules."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.recording import Recording
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.recorder.traced import trace_loader
from weightsync.agents.vllm.recorder import drafts
from weightsync.agents.vllm.recorder.facts import VllmFacts
from weightsync.agents.vllm.recorder.recorded import Recorded, keep, recorded_layout

CONFIG = SimpleNamespace()


class Embedding(nn.Module):
    """Shaped like vLLM's, whose rows tell a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.org_vocab_size = 4
        self.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)


class Model(nn.Module):
    """An embedding, a norm and a buffer; the loader takes what has a parameter's name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Embedding()
        self.norm = nn.LayerNorm(3, bias=False)
        self.norm.register_buffer("table", torch.ones(2), persistent=False)
        with torch.no_grad():
            self.norm.weight.copy_(torch.randn(3))

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name in parameters:
                parameters[name].data.copy_(tensor)


@pytest.fixture(autouse=True)
def _no_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "_drafters", type(drafts._drafters)())
    monkeypatch.setattr(drafts, "_left", type(drafts._left)())
    monkeypatch.delenv(drafts.VARIABLE, raising=False)


def loaded(names: tuple[str, ...], prefix: str | None = None) -> Model:
    """A model that its recorder saw loading tensors of these names."""
    model = Model()
    shapes = {"embed.weight": (4, 3), "norm.weight": (3,), "mtp.norm.weight": (3,), "extra": (3,)}
    entries = [Checkpoint(name, shapes[name], torch.float32) for name in names]
    recording = Recording(trace_loader(model, entries, VllmFacts(torch.float32, drafter=prefix is not None)))
    with recording.processing:
        pass
    recording.finish()
    keep(recording, prefix)
    return model


def names_of(recorded: Recorded) -> list[str]:
    return [tensor.name for tensor in recorded.layout.tensors]


def written(recorded: Recorded) -> dict[str, torch.Tensor]:
    """New values for every tensor, loaded."""
    values = {tensor.name: torch.randn(tensor.shape) for tensor in recorded.layout.tensors}
    recorded.load(values.items())
    return values


WHOLE = ("embed.weight", "norm.weight")


def test_a_checkpoint_of_its_own_is_named_below_draft() -> None:
    model, drafter = loaded((*WHOLE, "extra")), loaded((*WHOLE, "extra"), drafts.PREFIX)
    recorded = recorded_layout(model, CONFIG)
    assert names_of(recorded) == [*WHOLE, "draft.embed.weight", "draft.norm.weight"]
    assert recorded.unused == ("extra", "draft.extra")
    assert [entry.name for entry in recorded.unrecorded] == ["norm.table", "draft.norm.table"]
    values = written(recorded)
    assert torch.equal(drafter.embed.weight, values["draft.embed.weight"])
    assert torch.equal(model.embed.weight, values["embed.weight"])


def test_what_a_drafter_takes_of_the_models_checkpoint_is_needed() -> None:
    model, drafter = loaded((*WHOLE, "extra")), loaded((*WHOLE, "extra"), "")
    recorded = recorded_layout(model, CONFIG)
    assert names_of(recorded) == list(WHOLE)
    assert recorded.unused == ("extra",)
    values = written(recorded)
    assert torch.equal(drafter.norm.weight, values["norm.weight"])
    assert torch.equal(model.norm.weight, values["norm.weight"])


@pytest.mark.parametrize("names", [WHOLE, ("norm.weight",)], ids=["one like it", "none of its own"])
def test_an_embedding_that_is_shared_is_the_models(names: tuple[str, ...]) -> None:
    """vLLM replaces the drafter's after it was loaded; the memory that it had is not kept."""
    model, drafter = loaded(WHOLE), loaded(names, drafts.PREFIX)
    before = drafter.embed.weight.untyped_storage().data_ptr()
    drafter.embed = model.embed
    recorded = recorded_layout(model, CONFIG)
    assert names_of(recorded) == [*WHOLE, "draft.norm.weight"]
    assert recorded.unused == (("draft.embed.weight",) if len(names) == 2 else ())
    assert before not in {tensor.untyped_storage().data_ptr() for tensor in recorded.tensors}
    written(recorded)
    recorded.check()
    assert recorded_layout(model, CONFIG).layout == recorded.layout, "asked again, it is the same"


def test_an_embedding_that_nobody_fills_is_refused_by_name() -> None:
    model = loaded(WHOLE)
    drafter = loaded(("norm.weight",), drafts.PREFIX)
    with pytest.raises(RecordError, match=r"reaches embed\.weight, and the drafter does not share it"):
        recorded_layout(model, CONFIG)
    assert drafter.embed is not model.embed


def test_a_drafters_memory_that_was_replaced_is_seen_by_its_name() -> None:
    model, drafter = loaded(WHOLE), loaded(WHOLE, drafts.PREFIX)
    recorded = recorded_layout(model, CONFIG)
    drafter.norm.weight = nn.Parameter(torch.zeros(3), requires_grad=False)
    for asked in (recorded.check, lambda: recorded.load([])):
        with pytest.raises(RecordError, match=r"1 \(draft\.norm\.weight\).*other memory since it loaded"):
            asked()


def speculating(method: str, draft: Any, target: Any) -> Any:
    return SimpleNamespace(
        model_config=target,
        speculative_config=SimpleNamespace(method=method, draft_model_config=draft, target_model_config=target),
    )


def test_which_model_is_a_drafter() -> None:
    target, draft, mtp = (SimpleNamespace(model=model) for model in ("big", "small", "big"))
    assert drafts.prefix_of(SimpleNamespace(), target) is None
    assert drafts.prefix_of(speculating("eagle", draft, target), target) is None
    assert drafts.prefix_of(speculating("eagle", draft, target), draft) == "draft."
    assert drafts.prefix_of(speculating("mtp", mtp, target), mtp) == ""
    assert drafts.prefix_of(speculating("ngram", target, target), target) is None


@pytest.mark.parametrize(("last", "refused"), [(True, True), (False, False)])
def test_a_drafter_that_was_loaded_unseen_is_refused(
    last: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = pytest.importorskip("vllm.distributed.parallel_state")
    monkeypatch.setattr(parallel, "get_pp_group", lambda: SimpleNamespace(is_last_rank=last))
    model = loaded(WHOLE)
    settings = speculating("eagle", SimpleNamespace(model="small"), SimpleNamespace(model="big"))
    if refused:
        with pytest.raises(RecordError, match=r"speculative_config\.method is 'eagle', and no drafter was loaded"):
            recorded_layout(model, settings)
    else:
        recorded_layout(model, settings)


def test_a_drafter_that_is_left_as_it_started_is_listed_but_for_what_it_shares() -> None:
    model, drafter = loaded(WHOLE), Model()
    drafter.embed = model.embed
    drafts.leave(drafter)
    recorded = recorded_layout(
        model, speculating("eagle", SimpleNamespace(model="small"), SimpleNamespace(model="big"))
    )
    assert names_of(recorded) == list(WHOLE)
    assert [(entry.name, entry.bytes) for entry in recorded.unrecorded] == [
        ("norm.table", 8),
        ("draft.norm.weight", 12),
    ]
    assert "WEIGHTSYNC_DRAFTER=keep" in recorded.unrecorded[-1].reason


def test_what_the_environment_may_say_of_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not drafts.are_left()
    monkeypatch.setenv(drafts.VARIABLE, "keep")
    assert drafts.are_left()
    monkeypatch.setenv(drafts.VARIABLE, "yes")
    with pytest.raises(RecordError, match="WEIGHTSYNC_DRAFTER is 'yes'; unset it, or set it to 'keep'"):
        drafts.are_left()
