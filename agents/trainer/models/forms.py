"""How a trainer's own names and stacking differ from the checkpoint's. The tables are the same for all forms."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class TrainerForm:
    """Names of a trainer's tensors, below their layer.

    ``renames``: checkpoint name to trainer key. ``stacks``: projection (``gate_proj``, ``up_proj``, ``down_proj``) to
    the key of the tensor ``[experts, …]`` that holds it; two projections with one key lie behind each other along the
    rows. ``fused``: checkpoint name to the key of a tensor that holds it and others behind each other along the rows.
    """

    name: str
    renames: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)


CHECKPOINT: Final = TrainerForm("checkpoint")
"""Names and shapes as in the Hugging Face checkpoint, one tensor per expert."""

TRANSFORMERS: Final = TrainerForm(
    "transformers",
    stacks={
        "gate_proj": "mlp.experts.gate_up_proj",
        "up_proj": "mlp.experts.gate_up_proj",
        "down_proj": "mlp.experts.down_proj",
    },
)
"""transformers from version 5: experts stacked, gate and up in one tensor."""

STACKED: Final = TrainerForm(
    "stacked",
    renames={
        "mlp.gate.weight": "mlp.router.gate.weight",
        "mlp.gate.e_score_correction_bias": "mlp.expert_bias",
        "mlp.shared_experts.gate_proj.weight": "mlp.shared_expert.w1.weight",
        "mlp.shared_experts.down_proj.weight": "mlp.shared_expert.w2.weight",
        "mlp.shared_experts.up_proj.weight": "mlp.shared_expert.w3.weight",
    },
    stacks={"gate_proj": "mlp.experts.w1", "down_proj": "mlp.experts.w2", "up_proj": "mlp.experts.w3"},
    fused={
        "self_attn.q_a_proj.weight": "self_attn.fused_qkv_a_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "self_attn.fused_qkv_a_proj.weight",
    },
)
"""Grouped-GEMM trainers: experts w1, w2, w3 ``[experts, …]``, own router and bias names, one MLA down-projection."""

FORMS: Final = (CHECKPOINT, TRANSFORMERS, STACKED)
"""What is recognised by itself."""

_IN_LAYER: Final = re.compile(r"\blayers\.\d+\.(.+)")


def recognised(keys: Iterable[str]) -> TrainerForm:
    """The form of a trainer with these names: of the known ones, what occurs, tensor by tensor.

    A trainer may thus stack its experts as one form does and name its router as another.
    """
    present = {found[1] for key in keys if (found := _IN_LAYER.search(key))}

    def occurring(mappings: Iterable[Mapping[str, str]]) -> dict[str, str]:
        # Reversed, so that of two forms that rename one tensor the earlier in FORMS is written last and wins.
        pairs = [pair for mapping in mappings for pair in mapping.items()]
        return {ours: theirs for ours, theirs in reversed(pairs) if theirs in present and ours not in present}

    return TrainerForm(
        "recognised",
        occurring(form.renames for form in FORMS),
        occurring(form.stacks for form in FORMS),
        occurring(form.fused for form in FORMS),
    )
