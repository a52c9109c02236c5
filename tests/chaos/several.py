"""Several engines, of which some are done harm: stand-ins with real agents over real NIXL, and how they are judged."""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from engine_places import place
from fleet import HERE, Fleet, Process
from pointed import Pointed
from ports import HOST, free_port
from safetensors.torch import load_file
from tiny_models import qwen3_config

NAMES = ("e0", "e1", "e2")
PATIENCE = 2.0
ORDINARY = 2.0
"""What a round without a fault, with the look of a heartbeat at who is gone, may cost here on a busy machine."""
BOUND = PATIENCE + ORDINARY
"""In seconds: the longest that an engine may stand still because of another one."""
SETTINGS: dict[str, Any] = {
    "commit": {"patience_seconds": PATIENCE, "min_engines": 2},
    "deadlines": {
        "heartbeat_seconds": 0.5, "lost_after_heartbeats": 3, "probe_interval_seconds": 0.5, "probe_seconds": 1,
        "pause_seconds": 10, "quiesce_seconds": 10, "transfer_seconds": 10, "verify_seconds": 10, "finish_seconds": 5,
        "attach_seconds": 10,
    },
    "retry": {"backoff_seconds": 0.2},
}  # fmt: skip
"""Deadlines of a phase are well above BOUND: that an engine keeps within it is patience, not a deadline."""


@dataclass
class StandIn:
    """``standin_server.py`` in a session of its own. ``url``: where the daemon calls it; a proxy may stand there."""

    name: str
    directory: Path
    port: int = field(default_factory=free_port)
    url: str = ""
    before: Sequence[str] = ()
    """Words before the command, such as ``ip netns exec``."""
    host: str = HOST
    mode: str = "live"
    env: Mapping[str, str] = field(default_factory=dict)
    process: Process | None = None

    def __post_init__(self) -> None:
        self.url = self.url or f"http://{self.host}:{self.port}"
        self.config = self.directory / "config.json"
        self.said = self.directory / f"{self.name}.said"

    def start(self) -> Self:
        if not self.config.exists():
            self.config.write_text(json.dumps(small_config()))
        arguments = (self.host, str(self.port), str(self.config), str(self.said))
        command = [*self.before, sys.executable, str(Path(__file__).with_name("standin_server.py")), *arguments]
        environment = {
            **os.environ, "UCX_TLS": "tcp,self,sm", "OMP_NUM_THREADS": "1",
            "WEIGHTSYNC_MODE": self.mode, "WEIGHTSYNC_LANDING_MIB": "1" if self.mode == "live" else "",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            **self.env,
        }  # fmt: skip
        image = "" if self.before else "torch"
        self.process = Process(command, self.directory / f"{self.name}.log", environment, image=image).start()
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.kill(number)

    def kill(self) -> None:
        """``kill -9``."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        assert self.process.child is not None
        self.process.child.wait(10)

    def close(self) -> None:
        if self.process is not None:
            self.kill()

    def steps(self) -> list[tuple[float, str]]:
        """All steps that it has ever taken: when, and the digest of the memory that it read."""
        lines = self.said.read_text().splitlines() if self.said.exists() else []
        return [(float(when), digest) for when, digest in (line.split() for line in lines if line.count(" ") == 1)]

    def still(self, since: float) -> float:
        """The longest time without a step, from the last step before ``since`` until now."""
        times = [when for when, _ in self.steps()]
        near = [when for when in times if when < since][-1:] + [when for when in times if when >= since]
        return max(after - before for before, after in zip(near, [*near[1:], time.monotonic()], strict=True))


def small_config() -> dict[str, Any]:
    """A Qwen3 of 0.3 MB."""
    return qwen3_config(hidden_size=64, intermediate_size=128, num_hidden_layers=1, head_dim=16, vocab_size=128)


def content(checkpoint: Path) -> str:
    """What an engine says that holds exactly this checkpoint."""
    tensors = load_file(checkpoint / "model.safetensors")
    read = [tensors[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(tensors)]
    return hashlib.sha256(b"".join(read)).hexdigest()


PHASES = {
    "PAUSING": "after RoundBegan",
    "QUIESCING": "hearing Quiesced",
    "MARKING": "after LiveDirty",
    "EXPOSING": "hearing Exposed",
    "WRITING": "hearing Closed",
    "VERIFYING": "hearing Verified",
    "DECIDING": "after Decided",
    "SWITCHING": "hearing Left",
    "RECORDING": "after Committed",
}
"""The point of the daemon at which each phase is harmed; see ``pointed_daemon``."""


def cases(of: Iterable[str], short: Collection[str]) -> list[Any]:
    """Parameters of an e2e test: those of ``short`` run in every ``make test``, the others are long."""
    return [pytest.param(case, marks=() if case in short else pytest.mark.long) for case in of]


class Several(Pointed):
    """A fleet of stand-ins, which are their own witnesses; versions are counted over all tests of a module."""

    def __init__(
        self, directory: Path, engines: Iterable[StandIn], settings: Mapping[str, Any] = SETTINGS, host: str = HOST
    ) -> None:
        self.directory = directory
        self.engines = {engine.name: engine for engine in engines}
        whole = Fleet(directory / "fleet", self.engines, settings=dict(settings), host=host)  # type: ignore[arg-type]
        for engine in self.engines.values():
            url, token = f"ws://{host}:{whole.port}/agents", whole.credentials / "engine.token"
            engine.env = {**place(token, url, whole.run_id, engine.name), **engine.env}
        super().__init__(whole)

    def open(self, world: int = 1, **options: Any) -> Self:
        """Start everything and publish the first version."""
        for engine in self.engines.values():
            engine.start()
        self.start_daemon()
        self.start_trainer(world, **options)
        self.publish()
        return self

    def start_trainer(self, world: int = 1, **options: Any) -> None:
        self.take_trainer(self.directory, world, **options)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        for process in [rank for trainer in self.whole.trainers for rank in trainer.ranks]:
            process.kill(signal.SIGCONT)
        self.whole.close()

    def publish(self) -> int:
        step = self.begin()
        self.ended(step)
        self.everywhere()
        return step

    def ended(self, step: int) -> None:
        """The trainer was told that the version is committed."""
        told = self.trainer.hear()
        assert (told["step"], told.get("sequence")) == (step, len(self.committed) + 1), told
        self.committed.append(step)

    def daemon_killed_at(self, point: str, names: Iterable[str], bound: float = BOUND) -> None:
        """``kill -9`` of the daemon at ``point`` of the next version's round: the next one brings it to all, and these
        have not stood still."""
        began = time.monotonic()
        self.signal_daemon_at(point, "SIGKILL")
        step = self.begin()
        self.wait_daemons_death()
        self.start_daemon()
        self.ended(step)
        self.everywhere()
        self.keep_going(names, began, bound)

    def keep_going(self, names: Iterable[str], since: float, bound: float = BOUND) -> None:
        """None of these has stood still for longer than ``bound`` seconds since then."""
        still = {name: self.engines[name].still(since) for name in names}
        assert max(still.values()) < bound, still

    def everywhere(self) -> None:
        """The last committed version is served by all."""
        self.serve(self.engines)

    def others_serve(self, harmed: str) -> None:
        self.serve(name for name in self.engines if name != harmed)

    def serve(self, names: Iterable[str]) -> None:
        """The last committed version is served by these, says the daemon, and says their memory."""
        step = self.committed[-1]
        wanted = content(self.whole.checkpoints / f"step_{step}")

        def serves(name: str) -> bool:
            view = self.whole.engine(name)
            known = view.get("state") == "serving" and view["paused"] is False and view["version"]["step"] == step
            return known and [digest for _, digest in self.engines[name].steps()[-1:]] == [wanted]

        for name in names:
            self.whole.until(lambda name=name: serves(name), f"{name} to serve step {step}", 60)

    def judge(self) -> None:
        """Every step of every engine read a whole committed version, and never an older one after a newer one."""
        order = {content(self.whole.checkpoints / f"step_{step}"): step for step in self.committed}
        assert len(order) == len(self.committed)
        for name, engine in self.engines.items():
            heard = [order.get(digest) for _, digest in engine.steps()]
            assert None not in heard, f"{name} has served what no committed version is: {heard}"
            places = [self.committed.index(step) for step in heard if step is not None]
            assert places, f"{name} has served nothing"
            assert places == sorted(places), f"{name} has served an older version after a newer one"
