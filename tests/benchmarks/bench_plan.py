"""The planner at full size: JSON lines ``{"figure", "value", "unit", "n", "spread"}``; ``make bench-plan``.

Each figure comes from a process of its own with one thread, which decodes the layouts from msgpack (as they arrive)
and then plans: from decoded layouts to all tables, proved and fingerprinted. ``_seconds`` are seconds of one core,
which it takes where a core is free, because the planner waits for nothing; ``_wall_seconds`` hold what other processes
took, too. Peak memory is that of the whole process, layouts included. Layouts are decoded anew for every run, so that
nothing is known from the run before.
"""

import argparse
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import qwen3_layouts
from weightsync.orchestrator.forecast.explain import explain
from weightsync.orchestrator.planner import make_plan
from weightsync.orchestrator.protocol.layout import Lands

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

CASES = {
    # Whole experts. The 12 of an expert-parallel rank do not divide by 8, so that its FSDP ranks gather them in turn.
    "kimi_k2_256x128": ("kimi-k2", (32, 8, 1, "experts"), (4, 32), None),
    # Two replicas that may both send.
    "kimi_k2_256x128_hsdp": ("kimi-k2", (32, 4, 2, "experts"), (4, 32), None),
    # The hardest: FSDP splits the rows of experts, and every engine rank gets each expert in 4 pieces from 4 ranks.
    "kimi_k2_256x128_rows": ("kimi-k2", (64, 4, 1, "rows"), (4, 32), None),
    "kimi_k2_eighth_of_layers": ("kimi-k2", (64, 4, 1, "rows"), (4, 32), 8),
    "kimi_k2_eighth_of_ranks": ("kimi-k2", (8, 4, 1, "rows"), (1, 16), None),
    "glm5_64x32": ("glm-5", (8, 8, 1, "experts"), (2, 16), None),
}


def build(case: str, directory: Path) -> None:
    """Write the layouts of a case."""
    from weightsync.orchestrator.cli.plan import write_layouts
    from weightsync.orchestrator.forecast.published_models import GEOMETRIES
    from weightsync.orchestrator.forecast.synthetic_fleets import (
        EngineFleet,
        TrainerFleet,
        engine_parties,
        trainer_parties,
    )

    model, (expert_parallel, fsdp, replicas, shards), engines, layers = CASES[case]
    trainer = TrainerFleet(expert_parallel, fsdp, replicas, "rows" if shards == "rows" else "experts")
    write_layouts(trainer_parties(GEOMETRIES[model], trainer, layers), directory)
    write_layouts(engine_parties(GEOMETRIES[model], EngineFleet(*engines), layers), directory)


def measure(directory: Path) -> dict[str, float]:
    """One plan of the layouts in ``directory``, in this process."""
    from weightsync.orchestrator.cli.plan import read_layouts

    parties = read_layouts(directory)
    sources = [p for p in parties if p.member.role == "trainer"]
    targets = [p for p in parties if p.member.role != "trainer"]
    gc.collect()
    began, used = time.perf_counter(), time.process_time()
    plan = make_plan(sources, targets)
    wall, seconds = time.perf_counter() - began, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    joiner = targets[-1].member.engine
    before = make_plan(sources, [t for t in targets if t.member.engine != joiner]) if len(plan.engines) > 1 else None
    used = time.process_time()
    if before is not None:
        make_plan(sources, targets, previous=before)
    return {
        "seconds": seconds,
        "wall_seconds": wall,
        "rss_gb": peak,
        "join_seconds": time.process_time() - used,
        "writes": sum(len(engine.source) for engine in plan.engines),
        "descriptors": max(sends.descriptors for sends in plan.sends.values()),
        "terabytes": plan.bytes / 1e12,
    }


def run(case: str, directory: Path, times: int) -> Iterator[dict[str, float]]:
    """Measure a case in fresh processes."""
    environment = {**os.environ, **ONE_THREAD}
    for _ in range(times):
        command = [sys.executable, __file__, "--measure", str(directory)]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600).stdout
        found: dict[str, float] = json.loads(output)
        yield found


def report(figure: str, values: list[float], unit: str) -> float:
    """Print a figure: the median, and how far the runs are apart."""
    value = statistics.median(values)
    line = {"figure": figure, "value": round(value, 4), "unit": unit, "n": len(values)}
    print(json.dumps({**line, "spread": round(max(values) - min(values), 4)}), flush=True)
    return value


def descriptors(lands: Lands, room: int) -> int:
    """Of the edge with most, of two FSDP ranks that send a Qwen3 to two tensor-parallel ranks; ``room``: of the rings
    and the landings."""
    sources, targets = qwen3_layouts.trainer(36, 2, room), qwen3_layouts.engine(36, 2, room, lands)
    return max(edge.moved.descriptors for edge in explain(make_plan(sources, targets)).edges)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5, help="runs of each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--build", nargs=2)
    options = parser.parse_args()
    if options.measure:
        found = measure(options.measure)
        print(json.dumps(found))
        return
    if options.build:
        build(options.build[0], Path(options.build[1]))
        return
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as top:
        for case in options.cases:
            directory = Path(top) / case
            subprocess.run([sys.executable, __file__, "--build", case, str(directory)], check=True, timeout=600)
            runs = list(run(case, directory, options.times))
            medians[case] = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            report(f"plan_{case}_seconds", [r["seconds"] for r in runs], "s")
            report(f"plan_{case}_wall_seconds", [r["wall_seconds"] for r in runs], "s")
            report(f"plan_{case}_rss_gb", [r["rss_gb"] for r in runs], "GB")
            report(f"plan_{case}_join_seconds", [r["join_seconds"] for r in runs], "s")
            report(f"plan_{case}_writes", [r["writes"] for r in runs], "writes")
    report_all(medians)
    for lands, room in (("live", 64 << 20), ("live", 1 << 30), ("flip", 1 << 30), ("copy", 1 << 30)):
        figure = f"plan_qwen3_fsdp2_tp2_{lands}_{room >> 20}_mib_descriptors_per_edge"
        report(figure, [descriptors(lands, room)], "descriptors")


def report_all(medians: dict[str, dict[str, float]]) -> None:
    """The figures that compare cases, as far as those were run."""
    most = [found["descriptors"] for case, found in medians.items() if "256x128" in case]
    if most:
        report("plan_kimi_k2_descriptors_per_sender_max", [max(most)], "descriptors")
    full, *parts = [medians.get(f"kimi_k2_{name}") for name in ("256x128_rows", "eighth_of_layers", "eighth_of_ranks")]
    exponents = [
        math.log(full["seconds"] / part["seconds"]) / math.log(full["writes"] / part["writes"])
        for part in parts
        if part and full
    ]
    if exponents:
        report("plan_growth_exponent", [max(exponents)], "")


if __name__ == "__main__":
    main()
