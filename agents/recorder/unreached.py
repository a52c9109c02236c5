"""Bytes of a model that no checkpoint tensor reaches: which are padding or constants, and which are a wrong layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from weightsync.agents.recorder.blueprint import Slot
from weightsync.agents.recorder.settled import Settled, length, missing, runs_of, union
from weightsync.agents.recorder.trace import RecordError

CACHE_SCALES: Final = ("q_scale", "k_scale", "v_scale", "prob_scale")
"""Scales of a quantised KV cache: constants from the engine's start unless the checkpoint brings them."""


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """``bytes`` of a parameter or buffer that stay as they were when the engine started, and why that is right."""

    name: str
    bytes: int
    reason: str


def judge_unreached(slots: Sequence[Slot], settled: Mapping[int, Settled]) -> list[Unrecorded]:
    """What stays as it was, each with the reason.

    Raises:
        RecordError: names every parameter with bytes that a checkpoint ought to fill and does not.
    """
    kept: list[Unrecorded] = []
    faults: list[str] = []
    seen: set[tuple[int, int]] = set()
    for slot in slots:
        if not slot.nbytes or (slot.storage, slot.place.offset) in seen:
            continue
        seen.add((slot.storage, slot.place.offset))
        wanted = union([runs_of(slot.place, slot.dtype.itemsize)])
        state = settled.get(slot.storage)
        left = missing(state.reached, wanted) if state else length(wanted)
        if not left:
            continue
        reason = _reason(slot, whole=left == length(wanted))
        if reason:
            kept.append(Unrecorded(slot.name, left, reason))
        else:
            faults.append(f"{slot.name} ({left} of {length(wanted)} bytes)")
    if faults:
        raise RecordError(f"no tensor of the checkpoint reaches {', '.join(sorted(faults))}")
    return kept


def _reason(slot: Slot, *, whole: bool) -> str:
    if whole and slot.buffer:
        return "a buffer that the model computes itself"
    if whole and slot.attribute in CACHE_SCALES:
        return "a scale of the KV cache"
    if not whole and hasattr(slot.module, "org_vocab_size"):
        return "padding of the vocabulary"
    if not whole and _is_padded_expert_weight(slot):
        return "padding of the experts"
    return ""


def _is_padded_expert_weight(slot: Slot) -> bool:
    config = getattr(slot.module, "moe_config", None)
    if config is None or not slot.attribute.startswith(("w13_", "w2_")):
        return False
    pairs = (
        ("hidden_dim", "hidden_dim_unpadded"),
        ("intermediate_size_per_partition", "intermediate_size_per_partition_unpadded"),
    )
    return any(
        (getattr(config, unpadded, None) or getattr(config, padded)) != getattr(config, padded)
        for padded, unpadded in pairs
    ) or bool(getattr(config, "tp_shard_with_padding", False))


def opaque_names(settled: Iterable[Settled]) -> list[str]:
    """Reasons of all writes whose bytes are not the checkpoint's own, each once, sorted."""
    return sorted({blot.reason for state in settled for blot in state.opaque})
