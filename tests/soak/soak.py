"""Many rounds with restarts at random: nothing may grow. JSON lines ``{"figure", "value", "unit", "n", "spread"}``.

    python tests/soak/soak.py [--rounds 2000] [--vllm-rounds 50] [--seed 1]

Ends with 1 and says what grew, if anything did by more than ``BOUNDS``. ``soak_rounds`` counts the versions that were
committed; the other figures are the worst of all processes that lived long enough: ``n`` lives, ``spread`` from the
best to the worst. The stand-in engines compare every byte with its version before they serve it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from counts import VARIABLE
from engine_places import place
from fleet import Fleet, Process, Timeout, Trainer
from measure import Growth, Measured, megabytes_in
from ports import HOST, free_port
from serving import VllmServer, tiny_qwen3

HERE = Path(__file__).resolve().parent
COUNT_SECONDS = 20.0
SERVE_SECONDS = 120.0
KEPT_STEPS = 50
"""Step directories that the run keeps, as trainers remove the oldest of theirs."""

SETTINGS: Final = {
    "deadlines": {"probe_interval_seconds": 0.5, "heartbeat_seconds": 1},
    "commit": {"patience_seconds": 2},
    "retry": {"backoff_seconds": 0.2},
    "rescan_seconds": 1,
    "log": {"format": "json"},
}

BOUNDS: Final = {
    "rss_mb": 4.0, "objects": 1000.0, "fds": 4.0, "threads": 1.0, "tasks": 4.0, "endpoints": 0.0, "registrations": 0.0,
    "peers": 0.0, "edges": 0.0,
}  # fmt: skip
"""The most that a process may grow; ``rss_mb`` and ``objects`` by 1,000 rounds, the others in all."""
PER_1000: Final = ("rss_mb", "objects")
JOURNAL_MB: Final = 16.0


@dataclass
class StandIn:
    """One stand-in engine and its process."""

    name: str
    directory: Path
    environment: Mapping[str, str]
    port: int = field(default_factory=free_port)
    process: Process | None = None
    script: Path = HERE / "standin_engine.py"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def belong_to(self, fleet: Fleet) -> None:
        """Before its start: its environment says whose it is."""
        where = place(fleet.credentials / "engine.token", fleet.hub_url, fleet.run_id, self.name)
        self.environment = {**self.environment, **fleet.environment, **where}

    def start(self) -> None:
        command = [sys.executable, str(self.script), self.name, str(self.port)]
        environment = counting(self.environment, self.directory, self.name)
        self.process = Process(command, self.directory / f"{self.name}.log", environment).start()


def counting(environment: Mapping[str, str], directory: Path, name: str) -> dict[str, str]:
    """The environment of a process that is about to start; it writes its first counts when it can be asked for more."""
    file = directory / f"{name}.counts"
    file.unlink(missing_ok=True)
    return {**environment, VARIABLE: str(file)}


class Soak:
    """A fleet of stand-in engines, the daemon and a trainer of one rank, restarted as a seed says.

    Args:
        environment: what all of them find in theirs, beside this process's own.
        with_tls: between the daemon and all others.
    """

    def __init__(
        self,
        directory: Path,
        rounds: int,
        restarts: int,
        seed: int,
        environment: Mapping[str, str] | None = None,
        with_tls: bool = False,
    ) -> None:
        self.directory, self.rounds = directory, rounds
        self._look_every, self._count_every = max(1, rounds // 200), max(5, rounds // 60)
        self.measured, self.committed, self.journal_mb = Measured(directory / "samples.jsonl"), 0, 0.0
        self._random = random.Random(seed)
        paths = [str(HERE), str(HERE.parent), str(HERE.parent / "e2e"), os.environ.get("PYTHONPATH", "")]
        self._environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "UCX_TLS": "tcp,self,sm",
            "OMP_NUM_THREADS": "1", "WEIGHTSYNC_MODE": "live", "WEIGHTSYNC_LANDING_MIB": "1",
            **(environment or {}),
        }  # fmt: skip
        self.engines = {name: StandIn(name, directory, self._environment) for name in ("e0", "e1")}
        self.fleet = Fleet(directory, self.engines, dict(SETTINGS), "soak", with_tls=with_tls)  # type: ignore[arg-type]
        for engine in self.engines.values():
            engine.belong_to(self.fleet)
        self.trainer: Trainer | None = None
        self._plan = self._planned(restarts)

    def _planned(self, restarts: int) -> dict[int, str]:
        """Round → who is restarted in it. Each kind of process lives through a third of the run, while others go."""
        thirds = (("daemon", "e1"), ("trainer", "e1"), ("daemon", "trainer", "e0", "e1"))
        plan = {}
        for number in range(restarts):
            of = thirds[number * 3 // restarts]
            at = (number * 2 + 1) * self.rounds // (2 * restarts)
            plan[at] = of[number % len(of)]
        return plan

    # ------------------------------------------------------------------------------------------------------ processes
    def start(self) -> None:
        for engine in self.engines.values():
            engine.start()
        self._start_daemon()
        self._start_trainer()

    def _start_daemon(self) -> None:
        self.fleet.start_daemon(HERE / "counted_daemon.py", counting(self._environment, self.directory, "daemon"))

    def _start_trainer(self) -> None:
        environment = counting(self._environment, self.directory, "trainer")
        self.trainer = self.fleet.start_trainer(self.directory, 1, str(HERE / "soak_trainer.py"), env=environment)
        assert self.trainer.hear() == {"ready": True}

    def close(self) -> None:
        self.fleet.close()
        for engine in self.engines.values():
            if engine.process is not None:
                engine.process.stop()

    def processes(self) -> dict[str, Process]:
        assert self.fleet.daemon is not None
        assert self.trainer is not None
        engines = {name: engine.process for name, engine in self.engines.items() if engine.process is not None}
        return {"daemon": self.fleet.daemon, "trainer": self.trainer.ranks[0], **engines}

    # --------------------------------------------------------------------------------------------------------- rounds
    def run(self) -> None:
        """All rounds; ends when all engines serve the last version.

        Raises:
            AssertionError: a version was not committed, or an engine does not come back.
        """
        self.start()
        for number in range(1, self.rounds + 1):
            self._round(number)
            if number % self._count_every == 0:
                self._count(number)
            elif number % self._look_every == 0:
                self._look(number)
            if number % KEPT_STEPS == 0:
                self._prune(number - KEPT_STEPS)
        self._all_serve()

    def _round(self, number: int) -> None:
        assert self.trainer is not None
        whom = self._plan.get(number)
        if whom is not None:
            self._all_serve()
        self.trainer.tell(step=number)
        if whom is not None:
            time.sleep(self._random.uniform(0.0, 0.1))  # anywhere in the round; the seed says where
            self._restart(whom)
        if whom != "trainer":
            answer = self.trainer.hear(SERVE_SECONDS)
            assert "error" not in answer, f"{answer}\n{self.fleet.status()}\n{self.fleet.daemon.tail(30)}"
            self.committed += 1

    def _restart(self, whom: str) -> None:
        process = self.processes()[whom]
        number = self._random.choice((signal.SIGKILL, signal.SIGTERM)) if whom != "trainer" else signal.SIGKILL
        process.kill(number)
        assert process.child is not None
        process.child.wait(SERVE_SECONDS)
        match whom:
            case "daemon":
                self._start_daemon()
            case "trainer":
                self._start_trainer()
            case engine:
                self.engines[engine].start()

    def _all_serve(self) -> None:
        def serve() -> bool:
            self._none_has_ended()
            status = self.fleet.status()
            if status is None or not status["committed"]:
                return self.committed == 0
            step = status["committed"]["step"]
            return all(
                e["state"] == "serving" and e["version"] and e["version"]["step"] == step for e in status["engines"]
            )

        self.fleet.until(serve, "all engines to serve the last version", SERVE_SECONDS)

    def _none_has_ended(self) -> None:
        for name, process in self.processes().items():
            assert process.child is not None
            assert process.child.poll() is None, f"{name} ended with {process.child.returncode}\n{process.tail()}"

    # ------------------------------------------------------------------------------------------------------- measures
    def _look(self, number: int) -> None:
        """What the system knows, of processes that are ready."""
        self._none_has_ended()
        for name, process in self.processes().items():
            if (self.directory / f"{name}.counts").exists():
                assert process.child is not None
                self.measured.take(name, process.child.pid, number, {})
        self.journal_mb = max(self.journal_mb, megabytes_in(self.directory / "state"))

    def _count(self, number: int) -> None:
        """The same with what they count themselves, which takes most of a second."""
        self._none_has_ended()
        files = {name: self.directory / f"{name}.counts" for name in self.processes()}
        ready = {name: p for name, p in self.processes().items() if files[name].exists()}  # others are still starting
        for name, process in ready.items():
            files[name].unlink()
            assert process.child is not None
            os.kill(process.child.pid, signal.SIGUSR1)
        for name, process in ready.items():
            assert process.child is not None
            try:
                self.fleet.until(files[name].exists, f"{name} to count", COUNT_SECONDS)
            except Timeout as error:
                os.kill(process.child.pid, signal.SIGUSR2)
                time.sleep(1)
                raise Timeout(f"{error}\n{name}: {process.tail(200)}") from error
            self.measured.take(name, process.child.pid, number, json.loads(files[name].read_text()))
        self.journal_mb = max(self.journal_mb, megabytes_in(self.directory / "state"))

    def _prune(self, last: int) -> None:
        for number in range(last - KEPT_STEPS + 1, last + 1):
            shutil.rmtree(self.fleet.directory / "run" / "broadcasts" / f"step_{number}", ignore_errors=True)


class VllmSoak:
    """The same with one real vLLM on the CPU, of which only what the system knows is measured."""

    def __init__(self, directory: Path, rounds: int, seed: int) -> None:
        self.directory, self.rounds = directory, rounds
        self.measured, self.committed, self.journal_mb = Measured(directory / "samples.jsonl"), 0, 0.0
        self._random = random.Random(seed)
        model = tiny_qwen3(directory / "qwen3", seed=1)
        self.server = VllmServer(model, log=directory / "vllm.log", run_id="soak")
        self.fleet = Fleet(directory, {"engine": self.server}, settings=dict(SETTINGS), run_id="soak")
        self._model = model

    def run(self) -> None:
        """All rounds, a restart of the daemon in the first half and of the trainer in the second."""
        self.server.start().wait_ready()
        self.fleet.start_daemon()
        trainer = self._trainer()
        for number in range(1, self.rounds + 1):
            trainer.tell(do="publish", step=number, save=False)
            if number == self.rounds // 4:
                time.sleep(self._random.uniform(0.0, 0.1))
                assert self.fleet.daemon is not None
                self.fleet.daemon.kill()
                self.fleet.start_daemon()
            answer = trainer.hear()
            assert "error" not in answer, answer
            self.committed += 1
            if number == self.rounds * 3 // 4:
                trainer.stop()
                trainer = self._trainer()
            for index, pid in enumerate(self.server.processes()):
                self.measured.take(f"vllm-{index}", pid, number, {})
            self.journal_mb = max(self.journal_mb, megabytes_in(self.directory / "state"))

    def close(self) -> None:
        self.fleet.close()
        self.server.close()

    def _trainer(self) -> Trainer:
        trainer = self.fleet.start_trainer(self._model)
        assert trainer.hear()["ready"]
        return trainer


# ------------------------------------------------------------------------------------------------------------ the judge
def judged(growth: Growth) -> float:
    """In the unit of BOUNDS. A life of a few rounds is judged as one of 1,000, for some noise is there in any."""
    return growth.by * 1000 / max(growth.rounds, 1000) if growth.what in PER_1000 else growth.by


def excesses(growths: list[Growth], journal_mb: float) -> list[str]:
    """What grew by more than its bound, a sentence each."""
    said = [
        f"{g.what} of {g.process} (pid {g.pid}) grew by {g.by:.4g} in {g.rounds:.0f} rounds,"
        f" more than {BOUNDS[g.what]:g}"
        for g in growths
        if judged(g) > BOUNDS[g.what]
    ]
    if journal_mb > JOURNAL_MB:
        said.append(f"the journal has {journal_mb:.1f} MB, more than {JOURNAL_MB:g}")
    return said


def report(figure: str, unit: str, values: list[float]) -> None:
    """Print the largest, and how far it is from the smallest."""
    line = {"figure": figure, "value": round(max(values), 4), "unit": unit, "n": len(values)}
    print(json.dumps({**line, "spread": round(max(values) - min(values), 4)}), flush=True)


FIGURES: Final = {
    "rss_mb": ("rss_growth_mb_per_1000", "MB"),
    "fds": ("fds_growth", "count"),
    "threads": ("threads_growth", "count"),
    "registrations": ("registrations_growth", "count"),
    "objects": ("objects_growth_per_1000", "count"),
}


def soaked(prefix: str, soak: Soak | VllmSoak) -> list[str]:
    """Run it and print its figures; what exceeds its bound."""
    began = time.monotonic()
    try:
        soak.run()
    finally:
        soak.close()
    seconds = time.monotonic() - began
    growths = soak.measured.growths()
    report(f"{prefix}_rounds", "count", [soak.committed])
    report(f"{prefix}_rounds_per_second", "1/s", [soak.committed / seconds])
    for what, (figure, unit) in FIGURES.items():
        if values := [judged(growth) for growth in growths if growth.what == what]:
            report(f"{prefix}_{figure}", unit, values)
    report(f"{prefix}_journal_mb", "MB", [soak.journal_mb])
    return excesses(growths, soak.journal_mb)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=2000)
    arguments.add_argument("--vllm-rounds", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--keep", type=Path, help="a new directory for logs, samples and the run; default: removed")
    given = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # its children have sessions of their own
    with tempfile.TemporaryDirectory() as scratch:
        directory = given.keep or Path(scratch)
        wrong = []
        if given.rounds:
            restarts = max(4, given.rounds // 50)
            soak = Soak(directory / "stand-in", given.rounds, restarts, given.seed)
            wrong += soaked("soak", soak)
        if given.vllm_rounds:
            vllm = VllmSoak(directory / "vllm", given.vllm_rounds, given.seed)
            wrong += soaked("soak_vllm", vllm)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
