"""Pack, scatter and apply: every byte of the table arrives, and no other byte changes."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weightsync.kernels import copy as copy_module
from weightsync.kernels.copy import strided_copy
from weightsync.kernels.dispatch import Beside
from weightsync.kernels.errors import KernelTableError

hypothesis_settings = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
POISON = 0xEE
BESIDE: tuple[Beside, ...] = ("batches", "wire")


def row(run: int, src: int, dst: int, *loops: tuple[int, int, int], regions: tuple[int, int] = (0, 0)) -> list[int]:
    """One row of a strided table."""
    padded = [*loops, *[(1, 0, 0)] * (3 - len(loops))]
    return [run, regions[0], src, regions[1], dst, *(value for loop in padded for value in loop)]


def random_bytes(count: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).to(device)


def poisoned(count: int, device: torch.device) -> torch.Tensor:
    return torch.full((count,), POISON, dtype=torch.uint8, device=device)


def by_definition(sources: list[torch.Tensor], destinations: list[torch.Tensor], table: np.ndarray) -> list[bytes]:
    """The bytes of the destinations after copying run by run."""
    host = [bytearray(region.cpu().numpy().tobytes()) for region in destinations]
    data = [region.cpu().numpy().tobytes() for region in sources]
    for run, sr, so, dr, do, c0, s0, d0, c1, s1, d1, c2, s2, d2 in table.tolist():
        for i in range(c0):
            for j in range(c1):
                for k in range(c2):
                    src, dst = so + i * s0 + j * s1 + k * s2, do + i * d0 + j * d1 + k * d2
                    host[dr][dst : dst + run] = data[sr][src : src + run]
    return [bytes(one) for one in host]


def check(sources: list[torch.Tensor], destinations: list[torch.Tensor], rows: list[list[int]]) -> None:
    table = np.array(rows, np.int64)
    expected = by_definition(sources, destinations, table)
    persistent = {beside: [one.clone() for one in destinations] for beside in BESIDE}
    strided_copy(sources, destinations, table)
    assert [one.cpu().numpy().tobytes() for one in destinations] == expected
    for beside, others in persistent.items():
        copy_module.prepare(sources, others, table, beside=beside)()
        assert [one.cpu().numpy().tobytes() for one in others] == expected, beside


@pytest.mark.parametrize("shift", [0, 1, 4, 16])
def test_long_runs_at_any_alignment(device: torch.device, shift: int) -> None:
    source = random_bytes(300_000, 1, device)
    check([source], [poisoned(300_100, device)], [row(299_000, shift, 3 * shift)])
    check([source], [poisoned(300_100, device)], [row(299_000, 5, 5 + shift)])


@pytest.mark.parametrize("run", [1, 3, 8, 12, 16, 48, 250, 256, 1000, 4096])
def test_pack_and_scatter_of_column_slices(device: torch.device, run: int) -> None:
    full = random_bytes(40 * 3 * run, 2, device)
    packed = poisoned(40 * run + 64, device)
    check([full], [packed], [row(run, run, 16, (40, 3 * run, run))])
    check([packed], [poisoned(len(full), device)], [row(run, 16, 2 * run, (40, run, 3 * run))])


def test_many_ranges_of_all_sizes_between_several_regions(device: torch.device) -> None:
    sources = [random_bytes(200_000, 3, device), random_bytes(50_001, 4, device)[1:]]
    destinations = [poisoned(150_000, device), poisoned(400_000, device)]
    rows, used = [], [0, 0]
    sizes = [1, 2, 4, 7, 16, 100, 256, 1024, 4096, 40_000]
    for index in range(120):
        size, pair = sizes[index % len(sizes)], (index % 2, index // 2 % 2)
        if used[pair[1]] + size > len(destinations[pair[1]]):
            continue
        rows.append(row(size, 37 * index, used[pair[1]], regions=pair))
        used[pair[1]] += size + index % 5
    check(sources, destinations, rows)


@hypothesis_settings
@given(data=st.data())
def test_any_box_copy(device: torch.device, data: st.DataObject) -> None:
    """A box of a four-dimensional tensor into a box of another: three loops around a run, all alignments."""
    extent = [data.draw(st.integers(1, high)) for high in (3, 4, 5, 40)]
    shapes, corners = [], []
    for _ in range(2):
        before = [data.draw(st.integers(0, 3)) for _ in extent]
        after = [data.draw(st.integers(0, 3)) for _ in extent]
        corners.append(before)
        shapes.append([b + e + a for b, e, a in zip(before, extent, after, strict=True)])
    strides = [[int(np.prod(shape[dim + 1 :])) for dim in range(4)] for shape in shapes]
    offsets = [sum(c * s for c, s in zip(*pair, strict=True)) for pair in zip(corners, strides, strict=True)]
    loops = [(extent[dim], strides[0][dim], strides[1][dim]) for dim in range(3)]
    source = random_bytes(int(np.prod(shapes[0])), 7, device)
    target = poisoned(int(np.prod(shapes[1])), device)
    check([source], [target], [row(extent[3], offsets[0], offsets[1], *loops)])
    moved = source.view(shapes[0])[tuple(slice(c, c + e) for c, e in zip(corners[0], extent, strict=True))]
    there = target.view(shapes[1])[tuple(slice(c, c + e) for c, e in zip(corners[1], extent, strict=True))]
    assert torch.equal(moved, there)


def test_a_prepared_copy_moves_the_bytes_of_now(device: torch.device) -> None:
    source, target = random_bytes(70_000, 1, device), poisoned(70_000, device)
    prepared = copy_module.prepare([source], [target], np.array([row(70_000, 0, 0)], np.int64))
    prepared()
    source[:] = random_bytes(70_000, 2, device)
    prepared()
    assert torch.equal(source, target)


def test_an_empty_table_copies_nothing(device: torch.device) -> None:
    target = poisoned(10, device)
    strided_copy([], [target], np.zeros((0, 14), np.int64))
    strided_copy([random_bytes(10, 1, device)], [target], np.array([row(0, 0, 0), row(4, 0, 0, (0, 0, 0))], np.int64))
    assert bool((target == POISON).all())


def test_rows_outside_are_refused_before_anything_is_written(device: torch.device) -> None:
    source, target = random_bytes(100, 1, device), poisoned(50, device)
    with pytest.raises(KernelTableError, match="row 1 reaches byte 51 of destination region 0, which has 50"):
        strided_copy([source], [target], np.array([row(10, 0, 0), row(11, 0, 40)], np.int64))
    with pytest.raises(KernelTableError, match="row 0 reaches byte 101 of source region 0"):
        strided_copy([source], [target], np.array([row(10, 91, 0)], np.int64))
    assert bool((target == POISON).all())


def test_regions_may_begin_inside_an_allocation() -> None:
    """Aligned arenas are narrowed tensors: their own byte 0 is not their storage's."""
    memory = torch.arange(200_000, dtype=torch.int64).to(torch.uint8)
    source, destination = memory[100:80_100], torch.zeros(90_000, dtype=torch.uint8)[64:]
    strided_copy([source], [destination], [[70_000, 0, 7, 0, 11, 1, 0, 0, 1, 0, 0, 1, 0, 0]])
    assert torch.equal(destination[11:70_011], source[7:70_007])
    assert not destination[:11].any()


@pytest.mark.parametrize("shift", [0, 16, 4096, 100_000 - 100_000 % 16])
def test_one_table_copies_to_places_further_on(device: torch.device, shift: int) -> None:
    """Blocks, stretches and pieces of every width: long runs, and short ones at 16, 4 and 1 bytes."""
    source = random_bytes(200_000, 7, device)
    rows = [row(70_000, 0, 16), row(48, 80_000, 70_032, (5, 64, 48)), row(12, 90_000, 70_500, (7, 20, 12)),
            row(3, 95_001, 70_700, (9, 5, 3))]  # fmt: skip
    plain, moved = poisoned(170_800, device), poisoned(170_800, device)
    prepared = copy_module.prepare([source], [plain], np.array(rows, np.int64))
    prepared()
    shifted = copy_module.prepare([source], [moved], np.array(rows, np.int64))
    shifted(shift)
    assert torch.equal(moved[shift:], plain[: len(plain) - shift])
    assert (moved[:shift] == POISON).all()


@pytest.mark.parametrize("shift", [8, -16, 48])
def test_a_shift_out_of_the_region_or_off_its_grid_is_refused(device: torch.device, shift: int) -> None:
    source, target = random_bytes(100, 8, device), poisoned(140, device)
    prepared = copy_module.prepare([source], [target], np.array([row(100, 0, 8)], np.int64))
    with pytest.raises(KernelTableError, match=f"a shift of {shift} bytes is no multiple of 16 up to 32"):
        prepared(shift)
    prepared(32)
    assert torch.equal(target[40:], source)
    nothing = copy_module.prepare([source], [target], np.zeros((0, 14), np.int64))
    nothing(1 << 20)
