"""A daemon killed in a round and started again at once: how long engines stand still. JSON lines, one per figure.

    python tests/benchmarks/bench_restart.py [--repeats 3]

Three stand-in engines with real agents, real NIXL and real HTTP (``tests/chaos/standin_server.py``) take a step every
10 ms; the daemon gets SIGKILL in each phase in which engines stand still, and the next one is started as soon as it is
dead.

* ``restart_pause_seconds``: the longest time that any engine took no step, with the start of the process in it.
* ``restart_absence_seconds``: from the death of the one daemon until the next one listens: its imports, its
  configuration, its journal.
* ``restart_recovery_seconds``: the pause less the absence: agents come back, and the round is decided or begun anew.

``value`` is the largest of all, ``n`` the restarts, ``spread`` the distance to the smallest.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chaos"))

from several import NAMES, PHASES, Several, StandIn

IN_PHASES = [phase for phase in PHASES if phase not in ("PAUSING", "RECORDING")]
"""In the first engines are not paused yet, in the last they serve already."""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    pauses, absences = [], []
    with tempfile.TemporaryDirectory() as scratch:
        several = Several(Path(scratch), [StandIn(name, Path(scratch)) for name in NAMES])
        try:
            several.open()
            for phase in given.repeats * IN_PHASES:
                restart = several.restart_daemon_at(PHASES[phase], (signal.SIGKILL,))
                several.ended(restart.step)
                several.everywhere()
                pauses.append(max(engine.still(restart.began) for engine in several.engines.values()))
                absences.append(restart.absence)
            several.judge()
        finally:
            several.close()
    recoveries = [pause - absence for pause, absence in zip(pauses, absences, strict=True)]
    for name, values in (("pause", pauses), ("absence", absences), ("recovery", recoveries)):
        spread = round(max(values) - min(values), 3)
        line = {"figure": f"restart_{name}_seconds", "value": round(max(values), 3), "unit": "s", "n": len(values)}
        print(json.dumps({**line, "spread": spread}), flush=True)


if __name__ == "__main__":
    main()
