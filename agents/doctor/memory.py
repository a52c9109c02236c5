"""Whether there is room for a version where it is to land: beside what is trained, or beside what is served."""

from collections.abc import Iterator
from typing import Final

from weightsync.agents.environment import limits
from weightsync.agents.environment.variables import Role
from weightsync.agents.inference.landing import LANDING_VARIABLE, MIB, declared_budget
from weightsync.agents.inference.modes import MODE_VARIABLE, Mode, ModeRefused, wanted_mode
from weightsync.orchestrator.protocol.findings import Finding

CHECK: Final = "memory"


def room(role: Role, weights: int, on_gpu: bool) -> Iterator[Finding]:
    """``weights``: bytes of one rank's, which is not there yet; ``on_gpu``: or on the host."""
    where = "on the first GPU" if on_gpu else "on this host"
    free = _free_on_gpu() if on_gpu else limits.free_memory()
    if role == "trainer":
        yield from limits.room(weights, free, where, "a rank's slots, which hold a version beside what is trained,")
        return
    try:
        mode, budget = wanted_mode(), declared_budget()
    except ModeRefused as error:
        yield Finding("error", str(error), f"mend {MODE_VARIABLE} or {LANDING_VARIABLE}", CHECK)
        return
    yield from _of_engine(mode, budget, weights, free, where)


def _of_engine(mode: Mode, budget: int | None, weights: int, free: int, where: str) -> Iterator[Finding]:
    if mode == "live":
        yield Finding("ok", f"{MODE_VARIABLE}=live: versions go straight into the parameters", check=CHECK)
    elif mode == "copy" and budget is not None and budget < weights:
        what = f"{MODE_VARIABLE}=copy takes {-(-weights // MIB)} MiB, and {LANDING_VARIABLE} is {budget // MIB}"
        yield Finding("error", what, f"raise {LANDING_VARIABLE}, or unset it", CHECK)
    elif mode != "auto":
        yield from limits.room(2 * weights, free, where, f"{MODE_VARIABLE}={mode}, the weights twice,")
    elif free < 2 * weights:
        what = f"the weights twice take {2 * weights / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free {where}"
        fix = "more memory, if the engine is to serve while a version comes: without it, it is paused for that"
        yield Finding("note", what, fix, CHECK)
    else:
        yield Finding("ok", f"{free / 1e9:.1f} GB are free {where}, enough for the weights twice", check=CHECK)


def _free_on_gpu() -> int:
    import torch

    return int(torch.cuda.mem_get_info(0)[0])
