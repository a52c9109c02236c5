"""JSON lines: how fast the core decides in the simulation, what it costs a healthy engine when others are not, and what
a decision costs after a long history.

``python tests/benchmarks/bench_sim.py [SEEDS]``; CPU time of this process, so that neighbours do not count.
"""

import json
import statistics
import sys
import time

from bench_history import step_growth
from disturbances import disturb
from test_fleet import FAULTY_SECONDS, world_of
from weightsync.orchestrator.core.records import RoundEnded, decode_record
from world import World


def rounds_of(world: World) -> int:
    """That ended, one way or the other."""
    return sum(isinstance(decode_record(body), RoundEnded) for body in world.disk.bodies)


def say(metric: str, value: float, unit: str, **more: float) -> None:
    print(json.dumps({"metric": metric, "value": round(value, 4), "unit": unit, **more}), flush=True)


def main(seeds: int) -> None:
    """Worlds as the tests draw them: a minute of disasters each, and a minute after them."""
    rounds, spent, pauses, patience = 0, 0.0, [], 0.0
    for seed in range(seeds):
        world, kinds = world_of(seed)
        disturb(world, kinds, FAULTY_SECONDS)
        began = time.process_time()
        world.run(2 * FAULTY_SECONDS)
        spent += time.process_time() - began
        rounds += rounds_of(world)
        pauses += world.judge.pauses
        patience = world.policy.patience
    say("sim_rounds_per_minute", 60.0 * rounds / spent, "rounds per CPU minute", rounds=rounds, seeds=seeds)
    percentile = statistics.quantiles(pauses, n=100)[98]
    say("sim_healthy_pause_p99_s", percentile, "s", patience_s=patience, pauses=len(pauses), longest_s=max(pauses))
    say("sim_step_growth_1e5", statistics.median(step_growth()), "ratio")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
