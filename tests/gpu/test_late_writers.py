"""A writer that was stopped with an open grant and wakes up when other versions were committed: nothing that is served
changes, bit for bit. Real NIXL between processes that share one GPU, and the engine's real ways of landing.

Without a GPU all of it is in host memory.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import row_parallel
import torch
from weightsync.agents.inference.weights import LiveWeights, landing_arenas
from weightsync.agents.memory import quarantine
from weightsync.agents.memory.arena import arena, region_of
from weightsync.agents.memory.pages.paged import into_pages
from weightsync.kernels.warm import warm_up
from weightsync.orchestrator.protocol.landing import arena_bytes
from weightsync.orchestrator.protocol.layout import Lands, Layout
from weightsync.orchestrator.protocol.messages import NixlSettings
from weightsync.orchestrator.protocol.names import Member, RoundName, Version

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.timeout(300)
HERE = Path(__file__).parent
PATIENCE = 60.0
LATE_SECONDS = 5.0
"""Of a write that will be stopped: it gives up soon after it has woken up."""
RING_BYTES = 2048
"""Of a landing that cargo passes (``flip``)."""
ENGINE, TRAINER = Member("inference", "a", 0), Member("trainer", "", 0)
POSTS = 8
"""Of the late writer's dozens: the one around which it stops."""


class Writer:
    """``late_writer.py``. ``log``: what it says on its standard error; ``told``: what it was told last."""

    def __init__(self, log: Path) -> None:
        self.log, self.told = log, "nothing"
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "late_writer.py"), str(DEVICE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        facts = json.loads(self._line())
        self.layout = msgspec.msgpack.decode(bytes.fromhex(facts["layout"]), type=Layout)
        self.name, self.card = facts["name"], bytes.fromhex(facts["card"])

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.report()
        return line

    def tell(self, *words: object) -> "asyncio.Future[str]":
        """Its answer, in a while."""
        assert self.process.stdin is not None
        self.told = " ".join(map(str, words))[:100]
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return asyncio.ensure_future(asyncio.to_thread(self._line))

    @property
    def state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    @property
    def stopped(self) -> bool:
        return self.state == "T"

    def report(self) -> str:
        """What became of it; it is ended, so that nobody waits for its answer any more."""
        state = self.state
        self.process.send_signal(signal.SIGUSR1)
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        self.process.kill()
        ended, said = self.process.wait(), self.log.read_text()[-4000:]
        return f"writer {self.process.pid}, told {self.told!r}: state {state}, ended with {ended}, says:\n{said}"

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@dataclass
class Model:
    """One rank's weights, and with two sets of pages what a flip brings to live."""

    layout: Layout
    tensors: Sequence[torch.Tensor]
    standby_tensors: Sequence[torch.Tensor] = ()
    pages: Any = None
    no_flip: str = ""

    def check(self) -> None: ...

    def refresh(self) -> None: ...

    def load(self, weights: Any) -> None: ...

    def rebalanced(self, known: str) -> None: ...

    def flip(self) -> None:
        if self.pages is not None:
            self.pages.flip()
            return
        [live], [standby] = self.tensors, self.standby_tensors  # of host memory there are no pages
        before = live.clone()
        live.copy_(standby)
        standby.copy_(before)

    def settle(self) -> None:
        if self.pages is not None:
            self.pages.settle()


def model(lands: Lands) -> Model:
    rank = row_parallel.target(0, 1, RING_BYTES, lands)
    live = torch.zeros_like(rank.memory[0]) if lands == "flip" and DEVICE.type == "cuda" else rank.memory[0]
    pages = into_pages([live]) if lands == "flip" and DEVICE.type == "cuda" else None
    layout = msgspec.structs.replace(rank.layout, regions=(region_of(live),), staging=-1)
    standby = pages.standby_of([live]) if pages is not None else [torch.zeros_like(live)]
    return Model(layout, [live], standby if lands == "flip" else (), pages)


class Engine:
    """What an engine's worker does in a round, without the daemon."""

    def __init__(self, lands: Lands, writers: Sequence[Writer] = ()) -> None:
        self.writers = writers
        warm_up(DEVICE)  # a compiler would take some of the time that a writer has
        self.model = model(lands)
        size = arena_bytes(self.model.layout) if lands == "copy" else RING_BYTES
        self.weights = LiveWeights(self.model, DEVICE, landing_arenas(size, DEVICE), lands)
        self.weights.open(ENGINE, NixlSettings())
        self.round = 0

    async def until(self, answer: Awaitable[str]) -> str:
        """The transport makes progress meanwhile."""
        done = asyncio.ensure_future(answer)
        await self.until_true(done.done)
        return done.result().strip()

    async def until_true(self, reached: Callable[[], bool]) -> None:
        ends = time.monotonic() + PATIENCE
        while not reached():
            self.poll()
            await asyncio.sleep(0.001)
            assert time.monotonic() < ends, "\n".join([self.report(), *(writer.report() for writer in self.writers)])

    def report(self) -> str:
        """How far what lands here has come."""
        arrivals = self.weights.receivers.current._arrivals  # type: ignore[attr-defined]
        lines = [f"engine: round {arrivals._round}, {len(arrivals._waiting)} wait, {len(arrivals._copying)} copied"]
        lines += [
            f"{name}: of {edge.berth.chunks} chunks {len(edge.landed)} landed, {len(edge.scattered)} were scattered"
            for name, edge in arrivals._edges.items()
        ]
        return "; ".join(lines)

    def poll(self) -> None:
        for receiver in self.weights.receivers:
            receiver.poll()

    async def meets(self, writer: Writer) -> None:
        """The plan between the two, and its edges."""
        name, card = self.weights.receivers.current.announcement()
        reached = {TRAINER: (writer.layout, writer.name, writer.card), ENGINE: (self.weights.layout, name, card)}
        told = row_parallel.connects(reached)
        assert await self.weights.connect(told[ENGINE]) == {}
        assert await self.until(writer.tell("connect", row_parallel.encode(told[TRAINER]).hex())) == "done"

    async def begins(self, writer: Writer, seed: int, seconds: float = PATIENCE) -> "asyncio.Future[str]":
        """A version of ``seed`` is on its way."""
        self.round += 1
        self.weights.receivers.current.begin(RoundName(1, self.round))
        assert await self.until(writer.tell("fill", seed)) == "done"
        return writer.tell("write", 1, self.round, seconds)

    async def lands(self, writer: Writer, seed: int) -> None:
        """The version has landed, and was verified."""
        assert await self.until(await self.begins(writer, seed)) == "done"
        self.weights.receivers.current.end(RoundName(1, self.round))
        self.found = self.weights.landed(Version(1, seed))

    def switches(self, seed: int) -> None:
        self.weights.take(Version(1, seed))
        self.serves(seed)
        self.weights.settle()
        assert not self.weights.swaps or self.weights.shown()
        assert self.weights.audit() == self.found

    def serves(self, seed: int) -> None:
        [live] = self.model.tensors
        assert torch.equal(live.cpu(), row_parallel.expected(0, 1, row_parallel.masters(seed)))


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory on the device; what other tests have quarantined is not counted."""
    monkeypatch.setattr(row_parallel, "host_arena", partial(arena, device=DEVICE))
    monkeypatch.setattr(quarantine, "_kept", [*quarantine._kept])


@pytest.fixture
def writers() -> Iterator[list[Writer]]:
    made: list[Writer] = []
    yield made
    for writer in made:
        writer.end()


@pytest.mark.gpu if DEVICE.type == "cuda" else pytest.mark.e2e
@pytest.mark.parametrize("transports", ["all", "tcp,self,sm,cuda_copy", "tcp,self,cuda_copy"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("lands", ["copy", "flip"])
async def test_a_writer_that_wakes_up_after_others_were_committed_changes_nothing(
    lands: Lands,
    when: str,
    transports: str,
    writers: list[Writer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    writers += [Writer(tmp_path / "late.log"), Writer(tmp_path / "other.log")]
    late, other = writers
    engine = Engine(lands, writers)
    await engine.meets(late)
    await engine.lands(late, 1)
    engine.switches(1)

    assert await engine.until(late.tell("stop", when, POSTS if lands == "flip" else 1)) == "done"
    answer = await engine.begins(late, 2, LATE_SECONDS)
    await engine.until_true(lambda: late.stopped or answer.done())
    assert late.stopped, f"it ended before it was stopped: {answer.result()}"
    engine.weights.receivers.current.end(RoundName(1, engine.round))
    engine.serves(1)

    spares = engine.weights.spares
    engine.weights.replace_landing()
    assert engine.weights.spares == spares - 1
    await engine.meets(other)
    await engine.lands(other, 3)
    engine.switches(3)
    await engine.lands(other, 4)
    landing, standby = engine.weights.tensors[-1].clone(), [tensor.clone() for tensor in engine.model.standby_tensors]
    late.process.send_signal(signal.SIGCONT)
    said = await engine.until(answer)
    assert said, "it has given up, or ended what it had begun"
    engine.serves(3)
    assert torch.equal(engine.weights.tensors[-1], landing)
    assert all(map(torch.equal, engine.model.standby_tensors, standby))
    engine.switches(4)
    await engine.lands(other, 5)
    engine.switches(5)


@pytest.mark.gpu
def test_a_spare_is_taken_only_of_what_the_engine_leaves_free() -> None:
    engine = Engine("flip")
    old = engine.weights.tensors[-1]
    engine.weights.replace_landing()
    assert old.data_ptr() != engine.weights.tensors[-1].data_ptr()
    free = torch.cuda.mem_get_info(DEVICE)[0]
    assert quarantine.spare(free // 4, DEVICE).numel() == free // 4
    with pytest.raises(quarantine.MemoryPlacementError, match="more than half of the"):
        quarantine.spare(free, DEVICE)
