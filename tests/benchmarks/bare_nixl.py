"""The ceilings beside our rounds: bare NIXL and memcpy of the same bytes, in the same pieces, between two processes.

Bare means: one handle over the plan's descriptors, posted and polled in a tight loop; no deadline, no window, no loop.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any, Self

import numpy as np
from weightsync.agents.tables.cargo import plain_runs
from weightsync.agents.tables.runs import RUN_LENGTH, copied_bytes, runs
from weightsync.agents.transport.nixl.loader import load
from weightsync.orchestrator.planner import Party, make_plan
from weightsync.orchestrator.protocol.layout import COPY_COLUMNS, Layout, Matrix, as_matrix
from weightsync.orchestrator.protocol.names import Member

TRANSPORTS = "tcp,self,sm"
"""As in the processes of the fleet."""


def planned_runs(layouts: dict[str, Any]) -> tuple[Matrix, list[int], list[int]]:
    """The writes of the one trainer rank, and the lengths of the regions on both sides, from ``/plan/layouts``."""
    import msgspec

    parties = []
    for one in layouts["parties"]:
        layout = msgspec.convert({**one["layout"], "rows": base64.b64decode(one["layout"]["rows"])}, Layout)
        parties.append(Party(msgspec.convert(one["member"], Member), one["incarnation"], layout))
    sources = [party for party in parties if party.member.role == "trainer"]
    targets = [party for party in parties if party.member.role == "inference"]
    part = make_plan(sources, targets).part(sources[0].member)
    copies, layout, [berth] = as_matrix(part.copies, COPY_COLUMNS), sources[0].layout, part.berths
    table = plain_runs(runs(copies, layout), berth)
    packed = copied_bytes(copies, layout) - int(table[:, RUN_LENGTH].sum())
    if packed:  # as one write, which is what a ring of that length would make of it
        assert berth is not None
        gathered = [0, layout.staging, 0, berth.region, berth.offset, packed]
        table = np.concatenate([table, np.array([gathered], np.int64)])
    return table, [r.length for r in sources[0].layout.regions], [r.length for r in targets[0].layout.regions]


def _memory(lengths: list[int]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    return [np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8) for n, size in enumerate(lengths)]


def _agent(name: str, memory: list[np.ndarray[Any, np.dtype[np.uint8]]]) -> Any:
    agent = load().agent(name, backends=("UCX",), progress_thread=False, threads=0)
    table = np.array([(m.ctypes.data, m.nbytes, 0) for m in memory], dtype=np.uint64)
    agent.register_memory(table, "DRAM")
    return agent


def target(lengths: list[int]) -> None:
    """The other process: registers, says where, and polls until its standard input closes."""
    import select

    memory = _memory(lengths)
    agent = _agent("bare-target", memory)
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    print(json.dumps([metadata, [int(m.ctypes.data) for m in memory]]), flush=True)
    while not select.select([sys.stdin], [], [], 0.0005)[0]:
        agent.get_new_notifs()


class BareWriter:
    """One process pair with one prepared handle over everything that a round of the fleet writes."""

    def __init__(self, layouts: dict[str, Any]) -> None:
        table, here, there = planned_runs(layouts)
        os.environ["UCX_TLS"] = TRANSPORTS
        self._memory = _memory(here)
        self._bytes = int(table[:, 5].sum())
        command = [sys.executable, __file__, json.dumps(there)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._child.stdout is not None
        metadata, bases = json.loads(self._child.stdout.readline())
        self._agent = agent = _agent("bare-writer", self._memory)
        peer = agent.add_remote_agent(base64.b64decode(metadata))
        peer = peer.decode() if isinstance(peer, bytes) else peer
        mine = np.array([m.ctypes.data for m in self._memory], dtype=np.uint64)
        local = _descriptors(mine[table[:, 1]], table[:, 2], table[:, 5])
        remote = _descriptors(np.array(bases, dtype=np.uint64)[table[:, 3]], table[:, 4], table[:, 5])
        indices = np.arange(len(table), dtype=np.int32)
        self._handle = agent.make_prepped_xfer(
            "WRITE", agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, "DRAM"), indices,
            agent.prep_xfer_dlist(peer, remote, "DRAM"), indices,
        )  # fmt: skip
        self._copy = np.empty(self._bytes, dtype=np.uint8)

    def write(self) -> float:
        """Seconds of one bare write of everything."""
        began = time.perf_counter()
        state = self._agent.transfer(self._handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(self._handle)
        if state != "DONE":
            raise RuntimeError(f"bare NIXL ended with {state}")
        return time.perf_counter() - began

    def memcpy(self) -> float:
        """Seconds of one copy of as many bytes within this process."""
        source = max(self._memory, key=len)[: self._bytes]
        began = time.perf_counter()
        self._copy[: len(source)] = source
        return (time.perf_counter() - began) * self._bytes / len(source)

    def close(self) -> None:
        self._handle.release()
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _descriptors(base: Any, offset: Any, length: Any) -> Any:
    zero = np.zeros(len(length), dtype=np.uint64)
    return np.stack([base + offset.astype(np.uint64), length.astype(np.uint64), zero], axis=1)


if __name__ == "__main__":
    target(json.loads(sys.argv[1]))
