"""Loaders that do more than copy: each is recorded right or refused by name, judged by the memory of the real load.

An engine that loaded old values is written by the recording of its loader; its memory must then be that of an engine
which loaded the new values. Nothing that the recorder thinks is compared with anything else that it thinks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.interface import KernelLayout, Shadow
from weightsync.agents.recorder.recording import Recording
from weightsync.agents.recorder.rows import build_rows, fill
from weightsync.agents.recorder.trace import RecordError
from weightsync.agents.recorder.traced import trace_loader
from weightsync.orchestrator.protocol.layout import Derived

F32, BF16 = torch.float32, torch.bfloat16
Weights = Mapping[str, torch.Tensor]
Load = Callable[["Planted", Weights], None]


class Planted(nn.Module):
    """Parameters ``w`` [4, 3], ``wide`` [4, 6], ``b`` [4] and ``small`` [4, 3] in bfloat16, and a planted loader."""

    def __init__(self, load: Load) -> None:
        super().__init__()
        for name, shape in {"w": (4, 3), "wide": (4, 6), "b": (4,), "small": (4, 3)}.items():
            values = torch.zeros(shape, dtype=BF16 if name == "small" else F32)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self._load = load

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._load(self, dict(weights))


class Nothing:
    """Nothing is derived."""

    def refreshes(self, shadows: Sequence[Shadow]) -> list[Callable[[], None]]:
        return []

    def appeared(self, accounted: set[int]) -> tuple[list[Derived], list[str]]:
        return [], []

    def refreshed(self) -> set[int]:
        return set()


@dataclass(frozen=True)
class Plain:
    """An engine without secrets, whose loader may leave out what a test does not look at."""

    kernel_layouts: tuple[KernelLayout, ...] = ()

    def as_fed(self, checkpoint: Sequence[Checkpoint], dtypes: Mapping[str, torch.dtype]) -> list[Checkpoint]:
        return list(checkpoint)

    def reason_to_stay(self, parameter: ParameterPlace, whole: bool) -> str:
        return "not looked at" if whole else ""

    def may_exchange_halves(self, parameter: ParameterPlace) -> bool:
        return False

    def may_be_dropped(self, model: nn.Module) -> set[int]:
        return set()

    def derivations(self, model: nn.Module) -> Nothing:
        return Nothing()


CHECKPOINT = [
    Checkpoint("x", (4, 3), F32),
    Checkpoint("y", (4, 3), F32),
    Checkpoint("t", (3, 4), F32),
    Checkpoint("b", (4,), F32),
    Checkpoint("c", (4,), F32),
    Checkpoint("big", (8, 3), F32),
    Checkpoint("low", (4, 3), BF16),
    Checkpoint("one", (1,), F32),
]


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {c.name: torch.randn(c.shape, generator=generator).to(c.dtype) for c in CHECKPOINT}


def loaded(load: Load, weights: Weights) -> Planted:
    model = Planted(load)
    with torch.no_grad():
        model.load_weights((name, tensor.clone()) for name, tensor in weights.items())
    return model


def judge(load: Load) -> Recording:
    """Record ``load``, write new values by the recording, and compare with a model that loaded them.

    Raises:
        RecordError: the loader is refused.
    """
    old, new = values(1), values(2)
    model = Planted(load)
    traced = trace_loader(model, CHECKPOINT, Plain())
    ledger = traced.ledger([entry.name for entry in CHECKPOINT])
    with torch.no_grad():
        model.load_weights((name, tensor.clone()) for name, tensor in ledger.watch(old.items()))
    recording = Recording(traced, ledger)
    with recording.processing:
        pass
    recording.finish()
    assert recording.finished is not None
    fill(build_rows(recording.finished.targets), new.items())
    for refresh in recording.finished.refreshes:
        refresh()
    fresh = loaded(load, new)
    for name, live in model.named_parameters():
        assert torch.equal(live, getattr(fresh, name)), name
    return recording


def plant(*statements: str) -> Load:
    """A loader of these statements over the model ``m`` and the tensors by name."""
    code = compile("\n".join(statements), "planted loader", "exec")

    def load(model: Planted, weights: Weights) -> None:
        exec(code, {"torch": torch, "F": torch.nn.functional, "m": model, "BF16": BF16, "F32": F32, **weights})

    return load


RIGHT = {
    "a rank that blanks its bias": ["b.zero_()", "m.b.data.copy_(b)"],
    "a bias blanked after the copy": ["m.b.data.copy_(b)", "b.zero_()"],
    "a slice filled": ["x[2:] = 0", "m.w.data.copy_(x)"],
    "a slice filled through an older view": ["v = x[1:]", "x[2:] = 7", "m.w.data[1:].copy_(v)", "m.w.data[0] = y[0]"],
    "columns filled": ["x[:, 1] = 1.0", "m.w.data.copy_(x)"],
    "a clone edited": ["c2 = b.clone()", "c2[:2] = 0", "m.b.data.copy_(c2)"],
    "a clone edited, the original used": ["c2 = b.clone()", "c2[:2] = 0", "m.b.data.copy_(b)"],
    "an original edited, the clone used": ["c2 = b.clone()", "b[:2] = 0", "m.b.data.copy_(c2)"],
    "half of another": ["x[:2] = y[:2]", "m.w.data.copy_(x)"],
    "half of another, changed later": ["x[:2] = y[:2]", "y.zero_()", "m.w.data.copy_(x)"],
    "rows exchanged": ["a = x[:2].clone()", "x[:2] = x[2:]", "x[2:] = a", "m.w.data.copy_(x)"],
    "a swap of two": ["a = x.clone()", "x.copy_(y)", "y.copy_(a)", "m.w.data.copy_(x)"],
    "joined, then edited": ["j = torch.cat([x, y], 1)", "j[:, 2:4] = 0", "m.wide.data.copy_(j)"],
    "joined with constants": ["j = torch.cat([x, torch.ones(4, 3)], 1)", "m.wide.data.copy_(j)"],
    "stacked": ["m.w.data.copy_(torch.stack([b, c, b], 1))"],
    "chunks": ["a, e = big.chunk(2)", "a[1] = 5", "m.wide.data[:, 3:] = e", "m.wide.data[:, :3] = a"],
    "a narrow of a narrow": ["m.w.data[:2].copy_(big.narrow(0, 2, 4).narrow(0, 1, 2))", "m.w.data[2:].copy_(y[:2])"],
    "transposed": ["m.w.data.copy_(t.t().contiguous())"],
    "transposed, then edited": ["a = t.t().contiguous()", "a[1] = b[:3]", "m.w.data.copy_(a)"],
    "two into one": ["m.wide.data[:, :3] = x", "m.wide.data[:, 3:] = y"],
    "written twice": ["m.w.data.copy_(x)", "m.w.data.copy_(y)"],
    "a constant over what was loaded": ["m.b.data.copy_(b)", "m.b.data.fill_(2)"],
    "a constant beneath": ["m.wide.data.fill_(1)", "m.wide.data[:, :3] = x", "m.wide.data[:, 3:] = y"],
    "padded": ["m.wide.data.copy_(F.pad(x, (1, 2)))"],
    "padded, then filled": ["a = F.pad(x, (1, 2))", "a[:, :1] = 3", "m.wide.data.copy_(a)"],
    "an empty one that is filled": ["e = torch.empty(4, 6)", "e[:, :3] = x", "e[:, 3:] = y", "m.wide.data.copy_(e)"],
    "zeros that are filled in part": ["e = torch.zeros(4)", "e[1:3] = b[1:3]", "m.b.data.copy_(e)"],
    "cast up": ["m.w.data.copy_(low)"],
    "cast down": ["m.small.data.copy_(x)"],
    "cast to what it is": ["m.w.data.copy_(x.to(F32).float())"],
    "joined into out=": ["e = torch.empty(4, 6)", "torch.cat([x, y], 1, out=e)", "m.wide.data.copy_(e)"],
    "joined into the parameter": ["torch.cat([x, y], 1, out=m.wide.data)"],
    "scaled by a constant": ["m.w.data.copy_(x * 3)"],
    "scaled in place": ["x.mul_(3)", "m.w.data.copy_(x)"],
    "scaled in place after the copy": ["m.w.data.copy_(x)", "m.w.data.mul_(3)"],
    "negated and raised": ["m.b.data.copy_(-torch.exp(b))"],
    "raised in the parameter": ["m.b.data.copy_(b)", "m.b.data.copy_(-torch.exp(m.b.data.float()))"],
    "one added": ["m.b.data.copy_(b + 1)"],
    "computed in part": ["x[2:] *= 2", "m.w.data.copy_(x)"],
    "computed, of two": ["m.wide.data[:, :3] = x * 2", "m.wide.data[:, 3:] = -y"],
    "the value of a scalar": ["m.b.data.fill_(one[0])"],
    "a scalar over a slice": ["b[:2] = one", "m.b.data.copy_(b)"],
    "several copies at once": ["torch._foreach_copy_([m.w.data, m.b.data], [x, b])"],
    "a shape changed in place": ["t.t_()", "m.w.data.copy_(t)"],
    "a bool that is known": ["m.w.data.copy_(x if x.shape[0] == 4 else y)"],
}
REFUSED = {
    "one tensor in two dtypes": ["m.w.data.copy_(x)", "m.small.data.copy_(x)"],
    "masked": ["m.w.data.copy_(x.masked_fill(torch.ones(3, dtype=torch.bool, device=x.device), 0))"],
    "masked in place": ["x.masked_fill_(torch.ones(3, dtype=torch.bool, device=x.device), 0)", "m.w.data.copy_(x)"],
    "assigned by index": ["x[torch.tensor([0, 2])] = 0", "m.w.data.copy_(x)"],
    "chosen by index": ["m.w.data.copy_(x.index_select(0, torch.tensor([3, 2, 1, 0], device=x.device)))"],
    "chosen by where": ["m.w.data.copy_(torch.where(x > 0, x, y))"],
    "gathered": ["m.w.data.copy_(torch.gather(x, 0, torch.zeros(4, 3, dtype=torch.long, device=x.device)))"],
    "turned": ["m.w.data.copy_(x.flip(0))"],
    "two added": ["m.b.data.copy_(b + c)"],
    "two added in place": ["b.add_(c)", "m.b.data.copy_(b)"],
    "two added in the parameter": ["m.b.data.copy_(b)", "m.b.data.add_(c)"],
    "computed into out=": ["torch.mul(b, c, out=m.b.data)"],
    "computed by a list": ["torch._foreach_mul_([b], 2.0)", "m.b.data.copy_(b)"],
    "cast there and back": ["m.w.data.copy_(x.to(BF16))"],
    "cast and computed": ["m.small.data.copy_(-x)"],
    "half written over": ["m.w.data.copy_(x)", "m.w.data[:2] = y[:2]"],
    "a slice filled in the parameter": ["m.w.data.copy_(x)", "m.w.data[:2] = 0"],
    "the memory replaced": ["m.w.data = x"],
    "a value looked at": ["m.w.data.copy_(x if x[0, 0] > 0 else y)"],
    "a column of other bytes": ["x.view(torch.int16)[:, 0] = 0", "m.w.data.copy_(x)"],
    "a part of the parameter read": ["m.w.data.copy_(x)", "m.b.data[:3].copy_(m.w.data[0])", "m.b.data[3] = b[3]"],
}


@pytest.mark.parametrize("name", RIGHT)
def test_loaders_that_are_recorded_right(name: str) -> None:
    judge(plant(*RIGHT[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_loaders_that_are_refused(name: str) -> None:
    with pytest.raises(RecordError, match=r"\b(x|b|w|y)\b"):
        judge(plant(*REFUSED[name]))
