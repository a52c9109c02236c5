"""How an edge is cut: every byte once, within the limits of a handle, by kind of memory."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsync.agents.transport.nixl import chunks as chunking
from weightsync.orchestrator.protocol.layout import Region


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=400), st.integers(100, 3000))
def test_chunks_cover_every_byte_once_and_keep_their_limits(lengths: list[int], limit: int) -> None:
    size = np.array(lengths)
    ends = np.cumsum(size)
    total = int(ends[-1])
    runs = np.stack([size * 0, size * 0, ends - size, size * 0, total - ends, size], axis=1)
    [lane] = chunking.lanes(runs, [Region(1 << 20, total)], [Region(1 << 30, total, device=3)], chunk_bytes=limit)
    position = 0
    for chunk in lane.chunks:
        assert chunk.first == position
        assert chunk.bytes == lane.local[chunk.first : chunk.last, 1].sum() <= limit
        assert 0 < chunk.last - chunk.first <= chunking.CHUNK_DESCRIPTORS
        position = chunk.last
    assert position == len(lane.local)
    assert lane.local[:, 0].tolist() == (np.cumsum(lane.local[:, 1]) - lane.local[:, 1] + (1 << 20)).tolist()
    assert np.array_equal(lane.local[:, 1], lane.remote[:, 1])
    assert set(lane.remote[:, 2].tolist()) == {3}
    covered = sorted((int(a) - (1 << 30), int(a + n) - (1 << 30)) for a, n, _ in lane.remote.tolist())
    assert covered[0][0] == 0
    assert covered[-1][1] == total
    assert all(left[1] == right[0] for left, right in itertools.pairwise(covered))


def test_each_pair_of_memories_has_its_own_lane_and_limit() -> None:
    size = 3 * chunking.HOST_CHUNK_BYTES
    local = [Region(1 << 40, size), Region(2 << 40, size, "VRAM", 1)]
    remote = [Region(3 << 40, size, "VRAM", 5), Region(4 << 40, size)]
    runs = np.array([[0, a, 0, b, 0, size] for a in (0, 1) for b in (0, 1)])
    lanes = chunking.lanes(runs, local, remote)
    pairs = {(lane.local_memory, lane.remote_memory): len(lane.chunks) for lane in lanes}
    assert pairs == {("DRAM", "VRAM"): 3, ("DRAM", "DRAM"): 3, ("VRAM", "VRAM"): 1, ("VRAM", "DRAM"): 3}
