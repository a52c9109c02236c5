"""One rank of an engine that judges families: started as ``judge.py RANK WORLD PORT DIRECTORY NAME…``.

For each family: an engine loads the OLD checkpoint; the trainer's slots are filled from the Hugging Face module that
holds the NEW weights; the planner's tables say which of their bytes go where, and those are copied; then a fresh engine
loads NEW from what ``save_pretrained`` wrote, and memory and answers must equal its, bit for bit. Nothing is shared
between what is judged and the judge but the module itself.

Each rank appends to ``DIRECTORY/rank_<RANK>.jsonl`` one line when a stage begins, ``{"family", "stage"}``, one if it
fails there, ``{"family", "failed"}``, and one with the outcome, ``{"family", "outcome", "reason"}``. All ranks agree on
how a stage ended before the next one begins; a rank that fails while another waits for it within vLLM leaves that line.
"""

import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "e2e"), str(TESTS / "e2e" / "cpu_plugin")]

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from architecture_ranks import Place, answers, collect, different, join, model_of, prepare  # noqa: E402
from families.configs import FAMILIES, Family  # noqa: E402
from families.trainer import STAGING_BYTES, hugging_face, save, trainer_side  # noqa: E402
from plan_executor import Memory, scatter, send  # noqa: E402
from weightsync.agents.memory.arena import arena, region_of  # noqa: E402
from weightsync.agents.vllm.recorder.recorded import Recorded, RecordError, recorded_layout  # noqa: E402
from weightsync.orchestrator.planner import Party, Plan, make_plan  # noqa: E402
from weightsync.orchestrator.protocol.landing import arena_bytes  # noqa: E402
from weightsync.orchestrator.protocol.layout import Lands, Layout  # noqa: E402
from weightsync.orchestrator.protocol.names import Member  # noqa: E402

Result = TypeVar("Result")
TRAINER = Member("trainer", "", 0)
KV_CACHE_BYTES = 32 * 1024 * 1024
LONGEST_REASON = 300
OLD, NEW = 1, 2


class Stopped(Exception):
    """A stage ended with an error on some rank; the outcome is that of all ranks."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


class Different(Exception):
    """The written engine is not the fresh one, or nothing can be said about that."""


class Ranks:
    """All ranks of the engine, as seen from this one."""

    def __init__(self, place: Place, out: TextIO) -> None:
        self.place, self._out, self.family = place, out, ""

    def say(self, **fields: Any) -> None:
        self._out.write(json.dumps({"family": self.family} | fields) + "\n")

    def gather(self, value: Result) -> list[Result]:
        """``value`` of every rank, on all of them."""
        if self.place.world == 1:
            return [value]
        values: list[Any] = [None] * self.place.world
        dist.all_gather_object(values, value)
        return values

    def stage(self, name: str, outcome: str, do: Callable[[], Result]) -> Result:
        """``do()``, if it succeeds on all ranks.

        Raises:
            Stopped: it did not on some rank; ``outcome`` is what becomes of the family then.
        """
        self.say(stage=name)
        error, result = "", None
        try:
            result = do()
        except (Exception, SystemExit) as problem:
            traceback.print_exc()
            error = _reason(name, problem)
            self.say(failed=error)
        errors = dict.fromkeys(entry for entry in self.gather(error) if entry)
        if errors:
            raise Stopped(outcome, "; ".join(errors))
        return result  # type: ignore[return-value]


def _reason(stage: str, problem: BaseException) -> str:
    """Who says no, and the words: the recorder within an engine's start is not the engine."""
    said = " ".join(str(problem).split())
    if isinstance(problem, Different):
        return said
    kind = type(problem).__name__
    return f"{'recorder' if isinstance(problem, RecordError) else stage}: {kind}: {said}"[:LONGEST_REASON]


# ----------------------------------------------------------------------------------------------------------- one family
def judge(ranks: Ranks, family: Family) -> None:
    """Everything that is done with one family.

    Raises:
        Stopped: with the outcome, unless it is "same".
    """
    place = ranks.place
    old, new = (place.directory / family.name / age for age in ("old", "new"))
    trainer = ranks.stage("transformers", "refused", lambda: _checkpoints(place, family, old, new))
    engine, recorded, before = ranks.stage("engine", "refused", lambda: _running(place, old))
    lands: Lands = "copy" if place.world > 1 else "live"  # by turns: neither depends on what a family is
    size = arena_bytes(recorded.layout) if lands == "copy" else STAGING_BYTES
    staging = arena(size, device=torch.device("cpu"))
    parties = _parties(ranks, _with_staging(recorded.layout, staging, lands))
    slots = ranks.stage("trainer", "refused", lambda: trainer_side(trainer, parties))
    source = Party(TRAINER, 0, slots.layout)
    plan = ranks.stage("planner", "refused", lambda: make_plan([source], parties))
    # From here on bytes have moved: whatever goes wrong now would have been served.
    live = [*recorded.tensors, staging]
    ranks.stage("write", "wrong", lambda: _write(plan, source, parties, slots.arenas, live, place))
    after = ranks.stage("refresh", "wrong", lambda: _after(engine, recorded))
    fresh, _, expected = ranks.stage("fresh engine", "wrong", lambda: _running(place, new))
    memory = different(model_of(engine), model_of(fresh))
    ranks.stage("compare", "wrong", lambda: _compare(memory, before, after, expected))


def _checkpoints(place: Place, family: Family, old: Path, new: Path) -> torch.nn.Module:
    """The trainer's module, the same on every rank; rank 0 has written the checkpoints."""
    trainer = hugging_face(family, NEW)
    if place.rank == 0:
        save(hugging_face(family, OLD), old)
        save(trainer, new)
    return trainer


def _running(place: Place, model: Path) -> tuple[Any, Recorded, list[Any]]:
    """An engine that serves ``model``, its recorded layout, and its answers."""
    from vllm import LLM

    backend = "external_launcher" if place.world > 1 else "uni"
    options = place.options({}, model) | {"kv_cache_memory_bytes": KV_CACHE_BYTES}
    engine = LLM(**options, distributed_executor_backend=backend, disable_log_stats=True)
    recorded = recorded_layout(model_of(engine), engine.llm_engine.vllm_config)
    return engine, recorded, answers(engine)


def _with_staging(layout: Layout, staging: torch.Tensor, lands: Lands) -> Layout:
    regions = (*layout.regions, region_of(staging))
    return msgspec.structs.replace(layout, regions=regions, staging=len(regions) - 1, lands=lands)


def _parties(ranks: Ranks, layout: Layout) -> list[Party]:
    layouts = ranks.gather(layout)
    return [Party(Member("inference", "engine", rank), rank + 1, layout) for rank, layout in enumerate(layouts)]


def _write(
    plan: Plan,
    source: Party,
    targets: Sequence[Party],
    slots: Sequence[torch.Tensor],
    live: Sequence[torch.Tensor],
    place: Place,
) -> None:
    """Do all copies of the trainer's table; those to this rank end in its engine's memory, the others nowhere."""
    regions = {party.member: [np.zeros(r.length, np.uint8) for r in party.layout.regions] for party in targets}
    me = targets[place.rank]
    regions[me.member] = [tensor.numpy() for tensor in live]
    regions[source.member] = [tensor.numpy() for tensor in slots]
    written = {m: [np.zeros(len(region), np.int64) for region in held] for m, held in regions.items()}
    memory = Memory(regions, written)
    send(plan, source, {party.member: party for party in (source, *targets)}, memory)
    scatter(plan, me, memory)


def _after(engine: Any, recorded: Recorded) -> list[Any]:
    recorded.refresh()
    engine.reset_prefix_cache()
    return answers(engine)


def _compare(different: Sequence[str], before: list[Any], after: list[Any], expected: list[Any]) -> None:
    """Raises Different unless memory and answers are the fresh engine's, and such that this says something."""
    if not all(math.isfinite(value) for _, steps in expected for step in steps for _, value in step):
        raise Different("undecided: the fresh engine's log-probabilities are not finite")
    if before == expected:
        raise Different("undecided: the fresh engine answers like the one with the old weights")
    if different:
        raise Different(f"memory differs from the fresh engine's: {', '.join(different)}"[:LONGEST_REASON])
    if after != expected:
        raise Different("the fresh engine answers otherwise")


# -------------------------------------------------------------------------------------------------------------- process
def main() -> None:
    rank, world, port, directory, *names = sys.argv[1:]
    place = Place(int(rank), int(world), int(port), Path(directory))
    prepare(place, stock="")
    join(place, [{"model": "qwen3_moe"}])
    with (place.directory / f"rank_{rank}.jsonl").open("a", buffering=1) as out:
        ranks = Ranks(place, out)
        for name in names:
            ranks.family = name
            outcome, reason = "same", ""
            try:
                judge(ranks, FAMILIES[name])
            except Stopped as stopped:
                outcome, reason = stopped.outcome, stopped.reason
            ranks.say(outcome=outcome, reason=reason)
            collect()  # engines hold themselves in circles


if __name__ == "__main__":
    main()
