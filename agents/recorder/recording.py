"""One load of one model: what the loader did, and proof of what post-load processing made of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from weightsync.agents.recorder.blueprint import ParameterPlace
from weightsync.agents.recorder.chains import Chain, described, run
from weightsync.agents.recorder.contents import storage_key
from weightsync.agents.recorder.interface import KernelLayout, Shadow
from weightsync.agents.recorder.ledger import Ledger
from weightsync.agents.recorder.located import LoadedParameter, locate, repeated, with_halves_exchanged
from weightsync.agents.recorder.processing import Processing
from weightsync.agents.recorder.rows import Target
from weightsync.agents.recorder.settled import Unrecorded
from weightsync.agents.recorder.trace import Landing, RecordError
from weightsync.agents.recorder.traced import Traced, landed
from weightsync.orchestrator.protocol.layout import Derived

MAX_FAULTS: Final = 16
"""Parameters that one error names; every layer of a model has the same fault."""


@dataclass(frozen=True, slots=True)
class _Before:
    """A parameter before processing, and a copy of it if it may end in a kernel layout or be dropped."""

    loaded: LoadedParameter
    copy: torch.Tensor | None

    @property
    def parameter(self) -> ParameterPlace:
        return self.loaded.parameter


@dataclass(slots=True)
class Finished:
    """What a recording comes to: targets, and how to bring everything else of the model up to date after a write."""

    targets: list[Target] = field(default_factory=list)
    refreshes: list[Callable[[], None]] = field(default_factory=list)
    derived: list[Derived] = field(default_factory=list)
    shadows: list[str] = field(default_factory=list)
    places: dict[str, Callable[[], bool]] = field(default_factory=dict)
    """By parameter: whether its memory is where it was when this was recorded."""
    contents: dict[str, Callable[[], bool]] = field(default_factory=dict)
    """By parameter that is made of what a round writes: whether it is what would be made now."""

    def replaced(self) -> list[str]:
        """Parameters that the engine has given other memory since, which no write and no refresh reaches."""
        return _failing(self.places)

    def stale(self) -> list[str]:
        """Parameters that are not what is made of what was written, refreshed to no avail."""
        return _failing(self.contents)


class UnprovedPlace(RecordError):
    """A parameter whose place after processing is not proved."""


class Recording:
    """A load, recorded. ``finish`` after post-load processing; ``finished`` then holds the targets."""

    def __init__(self, traced: Traced, ledger: Ledger | None = None) -> None:
        """Record a model that is loaded and not yet processed. Its weights are read, never written.

        Args:
            traced: of the model's loader.
            ledger: of what the model was really loaded from.

        Raises:
            RecordError: the model's memory is not what the trace makes of that.
        """
        self.model = traced.model
        self._engine = traced.engine
        self.finished: Finished | None = None
        if ledger is not None:
            traced.compare(ledger)
        self._sent = ledger.sent if ledger is not None else {}
        self._blueprint = traced.blueprint
        self._settled = traced.settled
        self.unrecorded: list[Unrecorded] = list(traced.unrecorded)
        self.unused: list[str] = traced.unused
        self._before = self._before_processing()
        self._derivations = self._engine.derivations(self.model)
        self.processing = Processing(self._landed())
        """The mode that the engine must process its weights under, before ``finish``."""

    def _landed(self) -> dict[str, torch.Tensor]:
        """Parameters that hold something of the checkpoint, by name."""
        found = {}
        for parameter in self._blueprint.parameters:
            state, tensor = self._settled.get(parameter.storage), parameter.current()
            if state is not None and state.landings and tensor is not None:
                found[parameter.name] = tensor
        return found

    def _before_processing(self) -> list[_Before]:
        dropped = self._engine.may_be_dropped(self.model)
        before = []
        for parameter in self._blueprint.parameters:
            tensor = parameter.current()
            if parameter.storage not in self._settled or tensor is None or not parameter.nbytes:
                continue
            keep = id(parameter.module) in dropped or any(
                layout.may_apply(parameter) for layout in self._engine.kernel_layouts
            )
            copy = tensor.detach().clone() if keep else None
            before.append(_Before(LoadedParameter.of(parameter, tensor), copy))
        return before

    def finish(self) -> None:
        """Prove or map every parameter that the loader filled; the model must be processed now.

        Raises:
            RecordError: names each parameter in a layout that nothing here knows, and each tensor of unknown origin.
        """
        if not self.processing.entered:
            raise RecordError("the weights were processed without being watched; their memory cannot be accounted for")
        done = Finished()
        faults: list[str] = []
        shadows: list[Shadow] = []
        by_storage: dict[int, list[_Before]] = defaultdict(list)
        for before in self._before:
            by_storage[before.parameter.storage].append(before)
        taken: set[tuple[int, int]] = set()
        for storage, group in by_storage.items():
            for first, others in _distinct_places(group):
                landings = _inside(first.parameter, self._settled[storage].landings)
                try:
                    target = self._target(first, landings, done, shadows)
                except UnprovedPlace as error:
                    faults.append(str(error))
                    continue
                moved = [b.parameter.name for b in others if target is not None and not _same_memory(b, target.tensor)]
                if target is None or moved:
                    faults.append(f"{', '.join(moved) or first.parameter.name}: {_state(first.parameter)}")
                    continue
                place = (target.tensor.untyped_storage().data_ptr(), int(target.tensor.storage_offset()))
                if landings and place not in taken:
                    taken.add(place)
                    done.targets += self._with_programs(target, first, done)
        done.refreshes += self._derivations.refreshes(shadows)
        derived, unknown = self._derivations.appeared(self._accounted(done))
        done.derived += derived
        faults += unknown
        faults += self.processing.handed_over
        faults += self.processing.copies(self._reached(done))
        if faults:
            raise RecordError(f"post-load processing leaves layouts that are not known: {_some(sorted(faults))}")
        self._before = []
        self.finished = done

    def _target(
        self,
        before: _Before,
        landings: tuple[Landing, ...],
        done: Finished,
        shadows: list[Shadow],
    ) -> Target | None:
        """The live tensor if it holds what was loaded, else a shadow with its refresh, else None."""
        parameter, live = before.parameter, before.parameter.current()

        def target(tensor: torch.Tensor, where: tuple[Landing, ...]) -> Target:
            return Target(tensor, parameter.place.offset, where, parameter.module, parameter.attribute)

        may_exchange = self._engine.may_exchange_halves(parameter)
        touched = live is None or self.processing.touched(storage_key(live))
        found = None
        if live is not None:
            found = locate(before.loaded, live.detach(), may_exchange_halves=may_exchange, touched=touched)
        if found is not None:
            if not found.untouched:
                _must_tell_places(parameter, found.tensor)
            done.places[parameter.name] = _is_still(parameter, found.tensor)
            where = with_halves_exchanged(landings, before.loaded) if found.halves_exchanged else landings
            return None if where is None else target(found.tensor, where)
        if before.copy is None:
            return None
        if any(landing.program for landing in landings):
            raise UnprovedPlace(f"{parameter.name}: computed while it loads, and laid out anew afterwards")
        for layout in self._engine.kernel_layouts:
            if layout.may_apply(parameter) and live is not None and _gives(layout, parameter, before.copy, live):
                _must_tell_places(parameter, before.copy)
                done.refreshes.append(_refresh(layout, parameter, before.copy, live.detach()))
                done.places[parameter.name] = _is_still(parameter, live.detach())
                done.contents[parameter.name] = _check(layout, parameter, before.copy)
                done.derived.append(Derived(parameter.name, layout.name))
                done.shadows.append(parameter.name)
                return target(before.copy, landings)
        if live is None or not live.numel():
            # The engine has taken the parameter away after deriving something from it; the copy stands in for it.
            shadows.append(Shadow(parameter, before.copy))
            done.shadows.append(parameter.name)
            return target(before.copy, landings)
        return None

    def _with_programs(self, target: Target, before: _Before, done: Finished) -> list[Target]:
        """``target``, and a shadow for those of its landings that the engine makes from what travels."""
        plain = tuple(landing for landing in target.landings if not landing.program)
        made = tuple(landing for landing in target.landings if landing.program)
        if not made:
            return [target]
        parameter, shadow = before.parameter, torch.zeros_like(target.tensor)
        steps: list[tuple[Chain, torch.Tensor, torch.Tensor]] = []
        for landing in made:
            sent = landed(shadow, target.start, replace(landing, program=()))
            if landing in self._sent:
                sent.copy_(self._sent[landing])
            steps.append((landing.program, sent, landed(target.tensor, target.start, landing)))
            done.derived.append(Derived(parameter.name, f"{described(landing.program)} of {landing.source.name}"))
        done.shadows.append(parameter.name)
        done.refreshes.append(_run_again(steps))
        done.contents[parameter.name] = lambda: all(
            same_bits(run(program, sent), live) for program, sent, live in steps
        )
        return [
            *([replace(target, landings=plain)] if plain else []),
            Target(shadow, target.start, made, parameter.module, parameter.attribute),
        ]

    def _reached(self, done: Finished) -> set[int]:
        """Keys of the storages that a round writes or refreshes."""
        reached = {storage_key(target.tensor) for target in done.targets} | self._derivations.refreshed()
        for parameter in self._blueprint.parameters:
            tensor = parameter.current()
            if tensor is not None and parameter.name in done.shadows:
                reached.add(storage_key(tensor))
        return reached

    def _accounted(self, done: Finished) -> set[int]:
        """Data pointers of the storages whose bytes a write reaches, or that are parameters and buffers by name."""
        accounted = {target.tensor.untyped_storage().data_ptr() for target in done.targets}
        for parameter in self._blueprint.parameters:
            tensor = parameter.current()
            if tensor is not None:
                accounted.add(tensor.untyped_storage().data_ptr())
        return accounted


def _failing(checks: Mapping[str, Callable[[], bool]]) -> list[str]:
    # Engines' parameters are of classes of their own, for which torch takes a detour of 1 µs at each use.
    with torch._C.DisableTorchFunctionSubclass():
        return sorted(name for name, check in checks.items() if not check())


def _distinct_places(group: Sequence[_Before]) -> list[tuple[_Before, list[_Before]]]:
    """Parameters of one storage by their place: one to stand for each, and those of the same memory (tied weights)."""
    places: dict[Any, list[_Before]] = defaultdict(list)
    for before in group:
        places[before.parameter.place].append(before)
    return [(parameters[0], parameters[1:]) for parameters in places.values()]


def _inside(parameter: ParameterPlace, landings: Sequence[Landing]) -> tuple[Landing, ...]:
    if not parameter.place.sizes:
        first, last = parameter.place.offset, parameter.place.offset + parameter.dtype.itemsize
    else:
        reach = sum((n - 1) * s for n, s in zip(parameter.place.sizes, parameter.place.strides, strict=True))
        first, last = parameter.place.offset, parameter.place.offset + reach + parameter.dtype.itemsize
    return tuple(landing for landing in landings if first <= landing.place.offset < last)


def _same_memory(before: _Before, target: torch.Tensor) -> bool:
    live = before.parameter.current()
    return live is not None and live.data_ptr() == target.data_ptr() and live.numel() == target.numel()


def _state(parameter: ParameterPlace) -> str:
    live = parameter.current()
    if live is None:
        return "removed"
    return f"{parameter.shape} {parameter.dtype} became {tuple(live.shape)} {live.dtype} strides {tuple(live.stride())}"


def _some(faults: Sequence[str]) -> str:
    more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
    return "; ".join([*faults[:MAX_FAULTS], *more])


def _must_tell_places(parameter: ParameterPlace, values: torch.Tensor) -> None:
    reason = repeated(values)
    if reason:
        raise UnprovedPlace(
            f"{parameter.name}: processing moved it, and its values cannot show where to ({reason}); start the engine "
            "from weights that differ"
        )


def _gives(layout: KernelLayout, parameter: ParameterPlace, loaded: torch.Tensor, live: torch.Tensor) -> bool:
    try:
        result = layout.forward(parameter, loaded)
    except LookupError:
        return False
    return same_bits(result, live)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits in every element, -0 and NaN included."""
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(_bits(left), _bits(right))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _refresh(
    layout: KernelLayout, parameter: ParameterPlace, shadow: torch.Tensor, live: torch.Tensor
) -> Callable[[], None]:
    def refresh() -> None:
        live.copy_(layout.forward(parameter, shadow))

    return refresh


def _check(layout: KernelLayout, parameter: ParameterPlace, shadow: torch.Tensor) -> Callable[[], bool]:
    def is_current() -> bool:
        live = parameter.current()
        return live is not None and same_bits(layout.forward(parameter, shadow), live)

    return is_current


def _is_still(parameter: ParameterPlace, target: torch.Tensor) -> Callable[[], bool]:
    """That ``target`` is memory of the parameter's, asked of each in front of every switch."""
    module, attribute, known = parameter.module, parameter.attribute, parameter.current()
    ahead = known.data_ptr() - target.data_ptr() if known is not None else 0

    def is_there() -> bool:
        # The very tensor with its memory where it was beside the target's is told without the detours of a module.
        table = module._buffers if parameter.buffer else module._parameters
        same = known is not None and table.get(attribute) is known and attribute not in vars(module)
        if same and known is not None and known.data_ptr() - target.data_ptr() == ahead:
            return True
        live = parameter.current()
        return live is not None and live.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()

    return is_there


def _run_again(steps: Sequence[tuple[Chain, torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    def refresh() -> None:
        for program, sent, live in steps:
            live.copy_(run(program, sent))

    return refresh
