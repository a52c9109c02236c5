"""Which transport an edge takes: as real UCX tells it, and how its words are read."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from weightsync.agents.transport import ucx
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.agents.transport.ucx import UcxConnections, UcxLane, Way, way
from weightsync.orchestrator.protocol.messages import NixlSettings

PATIENCE = 20.0

ONE, OTHER = "GPU-1", "GPU-2"


@pytest.fixture
def made() -> Iterator[list[NixlEndpoint]]:
    endpoints: list[NixlEndpoint] = []
    yield endpoints
    for endpoint in endpoints:
        endpoint.close()


def opened(made: list[NixlEndpoint], name: str, tls: str | None = None) -> NixlEndpoint:
    made.append(NixlEndpoint(name, NixlSettings(), variables={"UCX_TLS": tls} if tls else {}))
    return made[-1]


async def connected(one: NixlEndpoint, other: NixlEndpoint) -> None:
    one.connect(other.name, other.metadata())
    async with asyncio.timeout(PATIENCE):
        while not one.warm(other.name):
            other.poll()
            await asyncio.sleep(0)


async def test_the_way_to_each_peer_is_what_ucx_says_of_its_connection(made: list[NixlEndpoint]) -> None:
    writer, near, other = (opened(made, name) for name in ("trainer/3", "engine-0/1", "engine-1/0"))
    assert writer.way_to(near.name) == Way(), "not connected"
    for peer in (near, other):
        await connected(writer, peer)
        assert writer.way_to(peer.name) == Way("shm", "cma/memory")
    writer.forget(near.name)
    assert writer.way_to(near.name) == Way()
    assert writer.way_to(other.name) == Way("shm", "cma/memory")


async def test_without_shared_memory_it_is_tcp(made: list[NixlEndpoint]) -> None:
    writer, peer = opened(made, "trainer/0", "tcp"), opened(made, "engine/0", "tcp")
    await connected(writer, peer)
    taken = writer.way_to(peer.name)
    assert taken.link == "tcp"
    assert taken.by.startswith("tcp/")


async def test_a_peer_that_had_connected_to_us_before_is_known_too(made: list[NixlEndpoint]) -> None:
    writer, peer = opened(made, "trainer/0"), opened(made, "engine/0")
    await connected(peer, writer)
    await connected(writer, peer)
    assert writer.way_to(peer.name) == Way("shm", "cma/memory")
    assert peer.way_to(writer.name) == Way("shm", "cma/memory")


COLLECTED = """
import gc, sys, threading, time
from weightsync.agents.transport.nixl.endpoint import NixlEndpoint
from weightsync.orchestrator.protocol.messages import NixlSettings

sys.setswitchinterval(1e-6)
asker, over, asked = NixlEndpoint("trainer/0", NixlSettings()), threading.Event(), 0

def ask():
    global asked
    while not over.is_set():
        asker._ucx.endpoints()
        asked += 1

thread = threading.Thread(target=ask)
thread.start()
for number in range(25):
    peers = [NixlEndpoint(f"engine/{number}-{side}", NixlSettings(), variables={"UCX_TLS": "tcp"}) for side in "ab"]
    peers[0].connect(peers[1].name, peers[1].metadata())
    while not peers[0].warm(peers[1].name):
        peers[1].poll()
    del peers
    gc.collect()
over.set()
thread.join()
print("asked", asked > 100)
"""


def test_connections_are_asked_for_while_a_collection_takes_others_away() -> None:
    """On another thread, which has the interpreter while it waits for UCX."""
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "asked True\n", done.stderr


def test_a_ucx_that_cannot_be_asked_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx, "_libraries", lambda: ())
    silent = UcxConnections("trainer/0", "")
    silent.joined("engine/0", "", ())
    assert silent.endpoints() == frozenset()
    assert silent.way_to("engine/0") == Way()


@pytest.mark.parametrize(
    ("lanes", "gpus", "expected"),
    [
        ("tcp/lo cma/memory", ("", ""), Way("shm", "cma/memory")),
        ("tcp/eth0 tcp/eth1", ("", ""), Way("tcp", "tcp/eth0+tcp/eth1")),
        ("rc_mlx5/mlx5_0:1 tcp/eth0", ("", ""), Way("nic", "rc_mlx5/mlx5_0:1")),
        ("rc_mlx5/mlx5_0:1 cma/memory", ("", ""), Way("shm", "cma/memory")),
        ("posix/memory tcp/eth0", ("", ""), Way("shm", "posix/memory")),
        ("tcp/lo cuda_ipc/cuda cuda_copy/cuda", (ONE, ONE), Way("same_gpu", "cuda_ipc/cuda")),
        ("tcp/lo cuda_ipc/cuda rc_mlx5/mlx5_0:1", (ONE, OTHER), Way("nvlink", "cuda_ipc/cuda")),
        ("rc_mlx5/mlx5_0:1 rc_mlx5/mlx5_1:1 cma/memory", (ONE, OTHER),
         Way("nic", "rc_mlx5/mlx5_0:1+rc_mlx5/mlx5_1:1")),
        ("dc_mlx5/mlx5_0:1", (ONE, OTHER), Way("nic", "dc_mlx5/mlx5_0:1")),
        ("cma/memory tcp/lo cuda_copy/cuda", (ONE, OTHER), Way("shm", "cma/memory")),
        ("tcp/eth0 cuda_copy/cuda", (ONE, OTHER), Way("tcp", "tcp/eth0")),
        ("tcp/lo cuda_ipc/cuda", (ONE, ""), Way("tcp", "tcp/lo")),
        ("new/thing", ("", ""), Way()),
        ("", (ONE, OTHER), Way()),
    ],
)  # fmt: skip
def test_of_the_lanes_that_there_are_ucx_takes_the_fastest(lanes: str, gpus: tuple[str, str], expected: Way) -> None:
    assert way([UcxLane(*lane.split("/")) for lane in lanes.split()], gpus=gpus) == expected


def test_of_many_rails_four_are_named() -> None:
    rails = [UcxLane("rc_mlx5", f"mlx5_{number}:1") for number in range(9)]
    assert way(rails, gpus=("", "")).by.count("+") == 3
