"""Which adapters belong to which weight: told by a peft model itself, or declared once for names of other trainers."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, cast

import torch
from torch import nn
from weightsync.agents.trainer.errors import AdapterError
from weightsync.agents.trainer.slots.merged import Adapter, Merge

FACTOR: Final = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AaBb])(\.(?P<adapter>(?!weight$|bias$)[^.]+))?(\.weight)?"
)
"""``q.lora_A.default.weight`` and ``embed.lora_embedding_A.default`` (peft), ``q.lora_A.weight`` (NeMo),
``q.lora_a.weight`` (torchtune), ``q.lora_A.0`` and ``q.lora_A`` (prime-rl)."""

MAGNITUDE: Final = ("lora_magnitude_vector", "lora_magnitude", "magnitude")
"""What DoRA adds to a module: the merged weight is normalised by column, which no sum of matrices expresses."""

BASES: Final = ("base_layer", "base_linear")
"""Where the frozen weight lies beside its adapters, if not under its own name."""

HELD: Final = ("base_layer.", "original_module.")
"""One of them is in the names of whatever a module of peft holds back."""


@dataclass(frozen=True, slots=True)
class LoraMerge:
    """Adapters of the modules that ``pattern`` (``fnmatch``) names are merged: ``W = base + scale · B · A``.

    Args:
        scale: the factor itself, or
        alpha: from which it follows: alpha / rank, or with ``rslora`` alpha / √rank (https://arxiv.org/abs/2312.03732).
        pattern: of the modules' names, such as ``"*.self_attn.*"``; the first rule that fits counts.

    Raises:
        ValueError: neither or both of scale and alpha, or numbers that are not finite.
    """

    scale: float | None = None
    alpha: float | None = None
    rslora: bool = False
    pattern: str = "*"

    def __post_init__(self) -> None:
        given = [value for value in (self.scale, self.alpha) if value is not None]
        if len(given) != 1 or not math.isfinite(given[0]) or (self.rslora and self.alpha is None):
            raise ValueError(
                f"LoraMerge(scale={self.scale}, alpha={self.alpha}, rslora={self.rslora}): give a finite scale, or a"
                " finite alpha (with rslora=True where the rank's square root divides it)"
            )

    def factor(self, rank: int) -> float:
        """The scale of an adapter of this rank."""
        if self.scale is not None:
            return self.scale
        return cast(float, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True, slots=True)
class Merges:
    """What a state is made of: ``merges`` by the weight's name, ``renamed`` from the state's names to the model's, and
    ``consumed``, names that are no tensors of the model: factors, and what adapters have put out of use."""

    merges: Mapping[str, Merge]
    renamed: Mapping[str, str]
    consumed: frozenset[str]


def declared_merges(state: Mapping[str, torch.Tensor], rules: Sequence[LoraMerge]) -> Merges:
    """The adapters of a state by their names.

    Raises:
        AdapterError: an adapter without its other half, its base or a rule; DoRA; rules and no adapter.
    """
    factors: dict[tuple[str, str, bool], dict[str, str]] = {}
    for name in state:
        found = FACTOR.fullmatch(name)
        if found is not None:
            place = (found["module"], found["adapter"] or "", bool(found["embedding"]))
            factors.setdefault(place, {})[found["side"].lower()] = name
    if rules and not factors:
        raise AdapterError("lora=", "it is given, and no tensor of the state is named like an adapter (lora_A, lora_b)")
    places = {place for name in state for place in (name + ".", *_places(name))}
    merges: dict[str, Merge] = {}
    for (module, adapter, embedding), sides in sorted(factors.items()):
        if sides.keys() != {"a", "b"}:
            raise AdapterError(module, f"there is {', '.join(sides.values())} and not its other half")
        base = _base_of(module, state, places)
        rule = next((rule for rule in rules if fnmatchcase(module, rule.pattern)), None)
        if rule is None:
            raise AdapterError(module, "it has adapters, and no LoraMerge(pattern=…) fits its name")
        scale = rule.factor(state[sides["a"]].shape[0])
        added = Adapter(sides["a"], sides["b"], scale, transposed=embedding)
        if f"{module}.weight" in merges:
            raise AdapterError(module, f"it has a second adapter ({adapter!r}); which one is used, names do not say")
        merges[f"{module}.weight"] = Merge(base, (added,))
    modules = {module for module, _, _ in factors}
    renamed = {name: short for name in state for short in [_without_base(name, modules)] if short != name}
    consumed = frozenset(name for sides in factors.values() for name in sides.values())
    return Merges(merges, renamed, consumed)


def peft_merges(module: nn.Module, plain: Callable[[str], str], names: Collection[str]) -> Merges:
    """The adapters of a peft model, from its own layers: active ones are merged, with the scale that each layer has.

    Args:
        module: with its wrappers.
        plain: makes the model's own names of names in ``module``.
        names: of the state, as ``plain`` gives them.

    Raises:
        AdapterError: what is no sum of matrices (DoRA and other tuners), or is switched off.
    """
    # By names first: asking each of tens of thousands of modules would take longer than all the rest of a publish.
    together = "\n".join(names)
    if not any(mark in together for mark in HELD):
        return Merges({}, {}, frozenset())
    wrapped = [(path, part) for path, part in module.named_modules() if _is_peft(part)]
    # The names of tensors are what plain() reads; the module's own place is all but the last part of one.
    at = {plain(f"{path}.weight" if path else "weight").removesuffix("weight"): part for path, part in wrapped}
    below: dict[str, list[str]] = {place: [] for place in at}
    for name in names:
        for place in _places(name):
            if place in below:
                below[place].append(name)
    merges: dict[str, Merge] = {}
    renamed: dict[str, str] = {}
    consumed: set[str] = set()
    for place, part in at.items():
        if any(outer in at and outer != place for outer in _places(place[:-1])):
            raise AdapterError(place.rstrip("."), "an adapter within another one; give a callable of merged weights")
        if _saves(part):
            copies = _active(part, place)  # none where the active adapter has no copy of this module
            used = place + (f"modules_to_save.{copies[0]}." if copies else "original_module.")
        else:
            used = place + "base_layer."
            adapters = tuple(_peft_adapters(part, place, [n for n in below[place] if not n.startswith(used)]))
            if adapters:
                merges[place + "weight"] = Merge(used + "weight", adapters)
        renamed |= {name: place + name.removeprefix(used) for name in below[place] if name.startswith(used)}
        consumed |= {name for name in below[place] if not name.startswith(used)}
    return Merges(merges, renamed, frozenset(consumed))


def _is_peft(part: nn.Module) -> bool:
    """Whether a module is of peft's BaseTunerLayer; by what it has, as peft is not imported."""
    return hasattr(part, "adapter_layer_names") or _saves(part)


def _saves(part: nn.Module) -> bool:
    """Whether a module is peft's ModulesToSaveWrapper, with a trained copy beside the original."""
    return hasattr(part, "modules_to_save") and hasattr(part, "original_module")


def _places(name: str) -> Iterator[str]:
    """Prefixes of ``name`` that are modules, each with its dot, and the empty one."""
    yield ""
    position = name.find(".")
    while position >= 0:
        yield name[: position + 1]
        position = name.find(".", position + 1)


def _peft_adapters(part: nn.Module, at: str, names: Sequence[str]) -> Iterator[Adapter]:
    """What a module of peft adds to its weight; ``names`` are all of its tensors but the base's."""
    merged = set(getattr(part, "merged_adapters", ()))
    for name in _active(part, at):
        if name in merged:
            continue  # the base holds it
        factors = next((f for f in ("lora_A", "lora_embedding_A") if name in getattr(part, f, ())), None)
        weight = ".weight" if factors == "lora_A" else ""
        a, b = (f"{at}{(factors or 'lora_A').removesuffix('A')}{side}.{name}{weight}" for side in "AB")
        # Whatever it holds beside its two factors (a magnitude, a bias, singular values) is part of what it adds.
        own = {n for n in names if name in n.removeprefix(at).split(".")}
        unmerged = name in getattr(part, "lora_variant", ()) or hasattr(part, "parameter_name")
        if unmerged or (own != {a, b} if factors is not None else not hasattr(part, "lora_A")):
            raise AdapterError(
                at.rstrip("."),
                f"its adapter {name!r} ({type(part).__name__}) is no plain LoRA (DoRA, a bias, another kind of"
                " tuner); give a callable that returns merged weights",
            )
        if factors is None:
            continue  # this adapter does not reach this layer
        transposed = factors == "lora_embedding_A" or bool(getattr(part, "fan_in_fan_out", False))
        yield Adapter(a, b, float(cast(Mapping[str, float], part.scaling)[name]), transposed)


def _active(part: nn.Module, at: str) -> list[str]:
    """Names of the adapters that the module's forward uses."""
    if getattr(part, "disable_adapters", False):
        raise AdapterError(at.rstrip("."), "its adapters are switched off (disable_adapter); publish outside of that")
    return list(cast(Sequence[str], part.active_adapters))


def _base_of(module: str, names: Collection[str], places: Collection[str]) -> str:
    """Name of the frozen weight of a module that has adapters; ``places`` are all prefixes of names, with their dot."""
    dora = next((f"{module}.{part}" for part in MAGNITUDE if f"{module}.{part}." in places), None)
    if dora is not None:
        raise AdapterError(
            module, f"{dora} makes it DoRA, no sum of matrices; give a callable that returns merged weights"
        )
    bases = [name for name in (f"{module}.weight", *(f"{module}.{b}.weight" for b in BASES)) if name in names]
    if len(bases) != 1:
        raise AdapterError(module, f"its adapters belong to one of {bases}" if bases else "its adapters have no base")
    return bases[0]


def _without_base(name: str, modules: Collection[str]) -> str:
    head, _, tail = name.rpartition(".")
    outer, _, last = head.rpartition(".")
    return f"{outer}.{tail}" if last in BASES and outer in modules else name
