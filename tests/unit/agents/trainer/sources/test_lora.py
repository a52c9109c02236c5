"""Adapters by the names that trainers give them; what cannot be merged is refused by name."""

import math

import pytest
import torch
from torch import nn
from weightsync.agents.trainer.errors import AdapterError, AmbiguousName
from weightsync.agents.trainer.sources.lora import LoraMerge, declared_merges
from weightsync.agents.trainer.state import TrainerSource

RANK, OUT, IN = 4, 6, 8


def merged(state, name):
    """The weight itself."""
    state.gather()
    return state.local(name)


def tensors(**shapes):
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


class LinearLoRA(nn.Linear):
    """As NeMo Automodel has it: the frozen weight keeps its name, the adapters lie beside it."""

    def __init__(self):
        super().__init__(IN, OUT)
        self.lora_A, self.lora_B = nn.Linear(IN, RANK, bias=False), nn.Linear(RANK, OUT, bias=False)
        self.weight.requires_grad_(False)


class TorchtuneLinear(nn.Module):
    """As torchtune has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN), requires_grad=False)
        self.lora_a, self.lora_b = nn.Linear(IN, RANK, bias=False), nn.Linear(RANK, OUT, bias=False)


NAMES = {
    "peft": ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"),
    "NeMo": ("weight", "lora_A.weight", "lora_B.weight"),
    "torchtune": ("weight", "lora_a.weight", "lora_b.weight"),
    "prime-rl": ("base_layer.weight", "lora_A.0", "lora_B.0"),
    "older prime-rl": ("base_linear.weight", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("trainer", NAMES)
@pytest.mark.parametrize(
    ("rule", "scale"),
    [
        (LoraMerge(scale=0.7), 0.7),
        (LoraMerge(alpha=16), 16 / RANK),
        (LoraMerge(alpha=16, rslora=True), 16 / math.sqrt(RANK)),
    ],
)
def test_every_trainers_names_are_merged(trainer, rule, scale):
    base, a, b = ("layers.0.q." + name for name in NAMES[trainer])
    state = {base: torch.randn(OUT, IN), a: torch.randn(RANK, IN), b: torch.randn(OUT, RANK), "norm": torch.ones(3)}
    state[base.replace("weight", "bias")] = torch.ones(OUT)
    source = TrainerSource(state, lora=(rule,))
    now = source.state()
    assert now.keys() == {"layers.0.q.weight", "layers.0.q.bias", "norm"}
    assert torch.equal(merged(now, "layers.0.q.weight"), state[base] + (state[b] @ state[a]) * scale)
    assert now["norm"] is state["norm"]
    source.account_for(source.state(), ("layers.0.q.weight", "layers.0.q.bias", "norm"))


@pytest.mark.parametrize("kind", [LinearLoRA, TorchtuneLinear])
def test_modules_whose_base_keeps_its_name_are_merged_at_every_publish(kind):
    model = nn.ModuleDict({"q": kind()})
    source = TrainerSource(torch.compile(model, backend="eager"), lora=(LoraMerge(scale=2.0),))
    for _ in range(2):
        a, b = (p for n, p in model["q"].named_parameters() if "lora" in n)
        assert torch.equal(merged(source.state(), "q.weight"), (model["q"].weight + (b @ a) * 2.0).detach())
        with torch.no_grad():
            b += 1


def test_the_first_rule_that_fits_a_module_counts():
    state = {}
    for name in ("attn.q", "attn.k", "mlp.up"):
        state |= {f"{name}.weight": torch.zeros(OUT, IN)}
        state |= {f"{name}.lora_a.weight": torch.ones(RANK, IN), f"{name}.lora_b.weight": torch.ones(OUT, RANK)}
    rules = (LoraMerge(scale=1.0, pattern="*.q"), LoraMerge(scale=10.0, pattern="attn.*"), LoraMerge(scale=100.0))
    now = TrainerSource(state, lora=rules).state()
    assert [merged(now, f"{n}.weight")[0, 0].item() / RANK for n in ("attn.q", "attn.k", "mlp.up")] == [
        1.0,
        10.0,
        100.0,
    ]
    with pytest.raises(AdapterError, match=r"^'mlp\.up': it has adapters, and no LoraMerge\(pattern=…\) fits its name"):
        TrainerSource(state, lora=rules[:2]).state()


def test_an_embeddings_adapter_is_turned():
    state = tensors(embed__base_layer__weight=(20, IN)) | {
        "embed.lora_embedding_A.default": torch.randn(RANK, 20),
        "embed.lora_embedding_B.default": torch.randn(IN, RANK),
    }
    a, b = state["embed.lora_embedding_A.default"], state["embed.lora_embedding_B.default"]
    now = TrainerSource(state, lora=(LoraMerge(scale=0.5),)).state()
    assert torch.equal(merged(now, "embed.weight"), state["embed.base_layer.weight"] + (b @ a).T * 0.5)


A, B = {"q.lora_A.weight": torch.randn(RANK, IN)}, {"q.lora_B.weight": torch.randn(OUT, RANK)}
W = {"q.weight": torch.randn(OUT, IN)}
REFUSED = {
    "no adapter": (W, r"^'lora=': it is given, and no tensor of the state is named like an adapter"),
    "half": (W | A, r"^'q': there is q\.lora_A\.weight and not its other half"),
    "no base": (A | B, r"^'q': its adapters have no base"),
    "two bases": (
        W | A | B | {"q.base_layer.weight": W["q.weight"]},
        r"^'q': its adapters belong to one of \[",
    ),
    "peft's DoRA": (W | A | B | {"q.lora_magnitude_vector.default.weight": torch.ones(OUT)}, "^'q': .* makes it DoRA"),
    "torchtune's DoRA": (W | A | B | {"q.magnitude": torch.ones(OUT)}, r"^'q': q\.magnitude makes it DoRA"),
    "two adapters": (
        W | A | B | {"q.lora_A.two.weight": torch.ones(RANK, IN), "q.lora_B.two.weight": torch.ones(OUT, RANK)},
        "^'q': it has a second adapter \\('two'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(kind):
    state, words = REFUSED[kind]
    with pytest.raises(AdapterError, match=words):
        declared_merges(state, (LoraMerge(scale=1.0),))


def test_a_bias_of_both_places_is_ambiguous():
    state = A | B | {"q.base_layer.weight": W["q.weight"], "q.base_layer.bias": torch.ones(2), "q.bias": torch.ones(2)}
    with pytest.raises(AmbiguousName, match=r"q\.b"):
        TrainerSource(state, lora=(LoraMerge(scale=1.0),)).state()


@pytest.mark.parametrize(
    "given",
    [{}, {"scale": 1.0, "alpha": 2.0}, {"scale": math.nan}, {"alpha": math.inf}, {"scale": 1.0, "rslora": True}],
)
def test_a_rule_needs_one_number(given):
    with pytest.raises(ValueError, match="give a finite scale, or a finite alpha"):
        LoraMerge(**given)
