"""JSON lines: how fast the core decides in the simulation, what it costs a healthy engine when others are not, and what
a decision costs after a long history.

``python tests/benchmarks/bench_sim.py [SEEDS]``; CPU time of this process, so that neighbours do not count.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence

from bench_history import step_growth
from disturbances import disturb
from test_fleet import FAULTY_SECONDS, world_of
from weightsync.orchestrator.core.records import RoundEnded, decode_record
from world import World


def rounds_of(world: World) -> int:
    """That ended, one way or the other."""
    return sum(isinstance(decode_record(body), RoundEnded) for body in world.disk.bodies)


def say(figure: str, value: float, unit: str, n: int, spread: float, **more: float) -> None:
    line = {"figure": figure, "value": round(value, 4), "unit": unit, "n": n, "spread": round(spread, 4)}
    print(json.dumps(line | more), flush=True)


def main(seeds: int) -> None:
    """Worlds as the tests draw them: a minute of disasters each, and a minute after them."""
    rates, rounds, spent, pauses, patience = [], 0, 0.0, [], 0.0
    for seed in range(seeds):
        world, kinds = world_of(seed)
        disturb(world, kinds, FAULTY_SECONDS)
        began = time.process_time()
        world.run(2 * FAULTY_SECONDS)
        took, ended = time.process_time() - began, rounds_of(world)
        spent, rounds, rates = spent + took, rounds + ended, [*rates, 60.0 * ended / took]
        pauses += world.judge.pauses
        patience = world.policy.patience
    say("sim_rounds_per_minute", 60.0 * rounds / spent, "1/min", seeds, quartiles(rates), rounds=rounds)
    percentile = statistics.quantiles(pauses, n=100)[98]
    longest = max(pauses)
    say(
        "sim_healthy_pause_p99_s",
        percentile,
        "s",
        len(pauses),
        quartiles(pauses),
        patience_s=patience,
        longest_s=longest,
    )
    growth = step_growth()
    say("sim_step_growth_1e5", statistics.median(growth), "ratio", len(growth), max(growth) - min(growth))


def quartiles(values: Sequence[float]) -> float:
    """The distance between them."""
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
