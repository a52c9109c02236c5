"""Who judges the chaos tests: a client that asks an engine for ever, and what each version answers."""

import itertools
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fleet import Fleet
from pointed import Pointed
from ports import HOST
from reference import reference_answers
from serving import DEFAULT_PROMPTS, RequestFailed, VllmServer

PROMPT = DEFAULT_PROMPTS[0]
FLEET_SECONDS = 120.0

Said = tuple[int, float]
"""One greedy token and its log-probability: the work of one forward pass, so it can mix no two moments."""


class Witness:
    """One client that asks again and again, also while there is nobody to answer; it keeps every answer, in order."""

    def __init__(self, server: VllmServer) -> None:
        self.said: list[tuple[float, Said]] = []
        self.answered: list[float] = []
        """When each of them came."""
        self._server = server
        self._stop, self._heard = threading.Event(), threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def next(self, seconds: float = FLEET_SECONDS) -> Said:
        """An answer to a question that is asked from now on."""
        began = time.monotonic()
        with self._heard:
            if not self._heard.wait_for(lambda: self.said and self.said[-1][0] >= began, seconds):
                raise AssertionError(f"nobody has answered for {seconds} s")
            return self.said[-1][1]

    def count(self) -> int:
        return len(self.said)

    def silence(self, since: float) -> float:
        """The longest time without an answer, from the last one before ``since`` until now, in seconds."""
        with self._heard:
            times = [*self.answered, time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times) if after >= since)

    def _run(self) -> None:
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                answer = self._server.complete(PROMPT, 1, timeout=15)
            except (OSError, HTTPException, RequestFailed, KeyError):
                self._stop.wait(0.05)
                continue
            with self._heard:
                self.said.append((asked, (answer.tokens[0], answer.logprobs[0])))
                self.answered.append(time.monotonic())
                self._heard.notify_all()


@dataclass
class Scene(Pointed):
    """A fleet of one engine, one trainer and one witness; versions are counted over all tests of a module."""

    directory: Path
    server: VllmServer
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(Fleet(self.directory / "fleet", {"engine": self.server}, settings=self.settings))
        self.witness = Witness(self.server)

    def open(self) -> None:
        """Start everything and publish the first version."""
        self.witness.start()
        self.server.start()
        self.start_daemon()
        self.start_trainer()
        self.server.wait_ready()
        assert self.witness.count() == 0, "an engine answered before any version was committed"
        self.publish()

    def start_trainer(self, world: int = 1, **options: Any) -> None:
        self.take_trainer(self.server.model_dir, world, **options)

    def close(self) -> None:
        self.witness.stop()
        self.whole.close()

    # --------------------------------------------------------------------------------------------------------- versions
    def end(self, step: int) -> None:
        """The version is committed, the engine serves it, and nobody is left paused."""
        told = self.trainer.hear()
        assert (told["step"], told.get("sequence")) == (step, len(self.committed) + 1), told
        self.committed.append(step)
        self.serves(step)

    def was_committed(self, step: int) -> None:
        """A round says so, and the marker."""
        rounds = self.whole.ask("/rounds")["rounds"]
        assert [row for row in rounds if row["outcome"] == "committed" and row["step"] == step], rounds
        marker = self.whole.directory / "run" / "broadcasts" / f"step_{step}" / "COMMITTED"
        self.whole.until(marker.exists, f"{marker}, which is written beside the round", 10)

    def told_to_stop(self, point: str) -> None:
        """SIGTERM there: the daemon ends when the version is committed and the engine serves it; another one comes."""
        self.signal_daemon_at(point, "SIGTERM")
        step = self.begin()
        self.wait_daemons_end()
        told = self.trainer.hear()
        assert (told["step"], told.get("sequence")) == (step, len(self.committed) + 1), told
        self.committed.append(step)
        assert not self.server.is_paused()
        self.witness.next()
        self.start_daemon()
        self.serves(step)

    def publish(self) -> int:
        step = self.begin()
        self.end(step)
        return step

    def serves(self, step: int) -> None:
        """The daemon and the engine agree that ``step`` is served."""

        def settled() -> bool:
            engine = self.whole.engine("engine")
            version = engine.get("version") or {}
            return engine.get("state") == "serving" and version.get("step") == step and engine["paused"] is False

        self.whole.until(settled, f"the engine to serve step {step}")
        assert not self.server.is_paused()
        self.witness.next()

    # ----------------------------------------------------------------------------------------------------------- judge
    def judge(self) -> None:
        """Every answer is that of a committed version, and they follow each other in the order of the commits."""
        self.witness.stop()
        checkpoints = [self.whole.checkpoints / f"step_{step}" for step in self.committed]
        answers = reference_answers(self.server.model_dir, checkpoints, self.directory)
        known: list[Said] = [(tokens[0], logprobs[0]) for (tokens, logprobs), *_ in answers]
        assert len(set(known)) == len(known), "two versions say the same, so their answers prove nothing"
        order = {said: index for index, said in enumerate(known)}
        heard = [order.get(said) for _, said in self.witness.said]
        foreign = [said for (_, said), index in zip(self.witness.said, heard, strict=True) if index is None]
        assert not foreign, f"{len(foreign)} of {len(heard)} answers belong to no committed version: {foreign[:3]}"
        assert heard == sorted(heard, key=lambda index: index or 0), "an older version was served after a newer one"
        assert set(heard) == set(range(len(known))), f"{HOST} served {sorted(set(map(str, heard)))} of {len(known)}"
