"""A source for every tensor that engines need, without a table: by transformers' mapping, by its own name, or tied."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.tables.box import with_entry
from weightsync.agents.trainer.errors import UnroutableTensors
from weightsync.agents.trainer.routes.mapping import Origin, Saved, saved_as, skeleton_of
from weightsync.agents.trainer.routes.treatments import SHOWN, Needed, treatments
from weightsync.agents.trainer.slots.conversion import EXPERT, ConversionSpec, Source
from weightsync.orchestrator.protocol.messages import Needs

State = Mapping[str, torch.Tensor]

HEAD: Final = "lm_head.weight"
EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Ends of the names that input embeddings have."""
HELP: Final = "a table tells it (docs/adding-a-model.md: register_table)"

_last_number: Final = re.compile(r"\.\d+\.(?!.*\.\d+\.)")
_layer: Final = re.compile(r"\.(\d{1,6})\.").search


class NeededTable:
    """The routes as the table that slots are made from (``slots.conversion.ConversionTable``)."""

    def __init__(self, specs: Sequence[ConversionSpec]) -> None:
        self._by_layer: dict[int | None, list[ConversionSpec]] = defaultdict(list)
        for spec in specs:
            self._by_layer[spec.layer].append(spec)

    @property
    def layers(self) -> int:
        """One more than the highest number of a layer."""
        return max((layer for layer in self._by_layer if layer is not None), default=-1) + 1

    def for_keys(self, keys: Collection[str], /) -> "NeededTable":
        """Itself: it was made for these keys."""
        return self

    def conversion_specs(self, layer_idx: int, /) -> Iterable[ConversionSpec]:
        """Those of one layer, by name."""
        return tuple(self._by_layer.get(layer_idx, ()))

    def non_layer_specs(self) -> Iterable[ConversionSpec]:
        """Those outside the layers, by name."""
        return tuple(self._by_layer.get(None, ()))


@dataclass(frozen=True, slots=True)
class TrainerModel:
    """What is known of the trainer's model beside its tensors.

    ``module``: the model itself, wrapped or not, or one without memory that has its class and configuration; None where
    neither is known. ``partial``: a rank may lack tensors that others have (pipeline or expert parallelism); the plan
    then proves that somebody has each.
    """

    module: nn.Module | None = None
    partial: bool = False

    @staticmethod
    def of(source: object, config: object | None, *, partial: bool) -> "TrainerModel":
        """From the trainer's ``source`` and, for one that is no module, its transformers configuration."""
        if isinstance(source, nn.Module):
            return TrainerModel(source, partial)
        return TrainerModel(skeleton_of(config) if config is not None else None, partial)

    @property
    def ties_head(self) -> bool:
        """Whether its configuration says that the head is the input embeddings."""
        inside: object = self.module
        while inside is not None and not hasattr(inside, "config"):
            inside = getattr(inside, "module", None) or getattr(inside, "_orig_mod", None)
        config: Any = getattr(inside, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return text is not None and bool(getattr(text, "tie_word_embeddings", False))


def route_needs(
    needs: Needs, state: State, model: TrainerModel, *, forward_dtype: torch.dtype | None = None
) -> NeededTable:
    """The table of everything in ``needs``.

    Args:
        needs: of the engines.
        state: the trainer's tensors now; only names, global shapes and dtypes are read.
        model: what else is known of the trainer's model.
        forward_dtype: what masters are rounded to first; see ``treatments``.

    Raises:
        UnsupportedFormat: engines need what no values can be made into.
        UnroutableTensors: tensors without a source, or whose source has another shape; by name, with both.
    """
    needed = treatments(needs, forward_dtype)
    saved = saved_as(model.module, state)
    origins: dict[str, Origin] = {}
    for name in needed:
        origin = _origin(name, state, saved, model)
        if origin is not None:
            origins[name] = origin
    if not model.partial:
        _complain_of_missing([name for name in needed if name not in origins], state, saved)
    specs = list(_specs(needed, origins, state))
    _complain_of_shapes(specs, needed, state)
    return NeededTable(sorted(specs, key=lambda spec: spec.dst))


def _origin(name: str, state: State, saved: Saved, model: TrainerModel) -> Origin | None:
    # The mapping before the name itself: a checkpoint may have the name of another tensor of the model.
    if name in saved.origins:
        return saved.origins[name]
    if name in state and name not in saved.too_much:
        return Origin((Source(name),))
    if name.endswith(HEAD) and model.ties_head:
        tied = [key for key in state if key.endswith(EMBEDDINGS)]
        if len(tied) == 1:
            return Origin((Source(tied[0]),))
    return None


# --------------------------------------------------------------------------------------------------- specifications
def _specs(needed: Mapping[str, Needed], origins: Mapping[str, Origin], state: State) -> Iterator[ConversionSpec]:
    stacks: dict[Source, dict[str, int]] = defaultdict(dict)
    for name, origin in origins.items():
        if origin.expert is None:
            layer = _layer_of(name)
            yield ConversionSpec(name, origin.sources, origin.cat_dim, needed[name].treatment, layer=layer)
            continue
        stacks[origin.sources[0]][name] = origin.expert
    for source, members in stacks.items():
        yield _stack(_template(members), source, members, needed, int(state[source.key].shape[0]))


def _template(members: Mapping[str, int]) -> str:
    """The one name with a place for the expert's number from which the names of all ``members`` come."""
    common: set[str] | None = None
    for name, expert in members.items():
        parts = name.split(".")
        places = [place for place, part in enumerate(parts) if part == str(expert)]
        possible = {".".join((*parts[:place], EXPERT, *parts[place + 1 :])) for place in places}
        common = possible if common is None else common & possible
    if not common:
        raise UnroutableTensors(
            f"the names of stacked experts differ in more than a number: {list(members)[:3]}; {HELP}"
        )
    # A single expert may have its number in several places; the last one is the expert's (layers come before).
    return max(common, key=lambda template: template.index(EXPERT))


def _stack(
    template: str, source: Source, members: Mapping[str, int], needed: Mapping[str, Needed], held: int
) -> ConversionSpec:
    kinds = {needed[name].treatment for name in members}
    if len(kinds) > 1:
        raise UnroutableTensors(
            f"engines need the experts of {source.key!r} in {len(kinds)} ways, {', '.join(sorted(members)[:2])} among"
            " them; experts that are stacked together are treated alike"
        )
    # With expert parallelism the tensor may stack this rank's experts only; the engines know how many there are.
    pattern = re.compile(re.escape(template).replace(re.escape(EXPERT), r"(\d{1,7})")).fullmatch
    numbers = [int(found[1]) for name in needed if (found := pattern(name))]
    experts = max(held, max(numbers) + 1)
    return ConversionSpec(template, (source,), quantization=kinds.pop(), experts=experts, layer=_layer_of(template))


def _layer_of(name: str) -> int | None:
    found = _layer(name)
    return int(found[1]) if found else None


# ------------------------------------------------------------------------------------------------------------ errors
def _complain_of_missing(missing: Sequence[str], state: State, saved: Saved) -> None:
    if not missing:
        return
    shown = "; ".join(f"{name!r} ({_nearest(name, state, saved)})" for name in missing[:SHOWN])
    more = f"; and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    raise UnroutableTensors(
        f"{len(missing)} tensors that the engines need have no source in the trainer's state: {shown}{more}. If they"
        f" are there by another name, {HELP}"
    )


def _nearest(name: str, state: State, saved: Saved) -> str:
    """What the state has in its place, as far as names tell."""
    if name in saved.too_much:
        return f"transformers makes it in a way that has no route here: {saved.too_much[name]}"
    if name.endswith(HEAD):
        heads = [key for key in state if key.endswith(EMBEDDINGS)]
        if heads:
            return f"if the head is tied to {heads[0]!r}, give the model itself, or config= with tie_word_embeddings"
    numbered = _last_number.sub(".#.", name)
    alike = (o for n, o in saved.origins.items() if o.expert is not None and _last_number.sub(".#.", n) == numbered)
    stacked = next(alike, None)
    if stacked is not None:
        key = stacked.sources[0].key
        return f"{key!r} stacks {len(state[key])} experts; SlotOptions.expert_parallel declares ranks that have others"
    longer = next((key for key in state if key.endswith("." + name)), None)
    if longer is not None:
        return f"there is {longer!r}: take the prefix {longer.removesuffix(name)!r} out of the names"
    shorter = next((key for key in state if name.endswith("." + key)), None)
    if shorter is not None:
        return f"there is {shorter!r}: the names lack the prefix {name.removesuffix(shorter)!r}"
    parts = name.split(".")
    for start in range(1, len(parts) - 1):
        tail = "." + ".".join(parts[start:])
        nearest = next((key for key in state if key.endswith(tail)), None)
        if nearest is not None:
            return f"the nearest is {nearest!r}"
    return "nothing has a name like it"


def _complain_of_shapes(specs: Sequence[ConversionSpec], needed: Mapping[str, Needed], state: State) -> None:
    wrong: list[str] = []
    for spec in specs:
        shape = _shape(spec, state)
        names = (spec.logical(expert)[0] for expert in range(max(spec.experts, 1)))
        name = next(name for name in names if name in needed)
        wanted = needed[name].tensor.shape
        if shape != wanted:
            hint = _hint(shape, wanted)
            wrong.append(f"{spec.sources[0].key!r} is {shape} here, engines need {name!r} {wanted}{hint}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UnroutableTensors(f"{len(wrong)} tensors have other shapes: {'; '.join(wrong[:SHOWN])}{more}")


def _shape(spec: ConversionSpec, state: State) -> tuple[int, ...]:
    """Of the tensor (of one expert, if stacked) that the sources' whole tensors make."""
    stacked = int(spec.experts > 0)
    parts: list[tuple[int, ...]] = []
    for source in spec.sources:
        shape = tuple(state[source.key].shape)[stacked:]
        parts.append(shape if source.length is None else with_entry(shape, source.dim, source.length))
    if len(parts) == 1:
        return parts[0]
    return with_entry(parts[0], spec.cat_dim, sum(part[spec.cat_dim] for part in parts))


def _hint(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if shape == (0,):
        return " (a placeholder of DeepSpeed ZeRO-3? give a callable that gathers the parameters)"
    if len(shape) == 1 and len(wanted) > 1:
        return " (a flat shard of FSDP1 or ZeRO? give a callable that returns whole tensors or DTensors)"
    if len(shape) == len(wanted) and shape[1:] == wanted[1:] and shape[0] > wanted[0]:
        return " (a padded vocabulary? give a callable that cuts the padding off)"
    if shape == wanted[::-1]:
        return " (transposed? give a callable that returns it transposed)"
    return ""
