"""The digest: its definition, additivity over any cut, and every fault that it must catch."""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weightsync.kernels import digest as digest_module
from weightsync.kernels.columns import CODES, ELEMENTS, UNSEEN
from weightsync.kernels.digest import digest, tensor_key
from weightsync.kernels.digest_multipliers import (
    TILE_BYTES,
    TILE_WORDS,
    inner_multipliers,
    outer_keys,
    outer_multipliers,
)
from weightsync.kernels.digest_reference import ReferenceDigest
from weightsync.kernels.dispatch import Beside
from weightsync.kernels.errors import KernelTableError

MASK = (1 << 64) - 1
KEY = tensor_key("model.layers.0.mlp.down_proj.weight")
OTHER = tensor_key("model.layers.0.mlp.up_proj.weight")
KNOWN_KEY = 8183605209020681030
KNOWN_SUMS = (3617562774208320134, 10222050793271602013)

hypothesis_settings = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def row(run: int, src: int, dst: int, *loops: tuple[int, int, int], region: int = 0, key: int = KEY) -> list[int]:
    """One row of a strided table."""
    padded = [*loops, *[(1, 0, 0)] * (3 - len(loops))]
    return [run, region, src, key, dst, *(value for loop in padded for value in loop)]


def table(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


def random_bytes(count: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).to(device)


def add(*sums: tuple[int, int]) -> tuple[int, int]:
    return sum(one[0] for one in sums) & MASK, sum(one[1] for one in sums) & MASK


def by_definition(runs: list[tuple[int, int, bytes]]) -> tuple[int, int]:
    """The digest as docs define it, byte by byte in Python integers; runs are (key, logical offset, bytes)."""
    inner = inner_multipliers()
    total = [0, 0]
    for key, offset, data in runs:
        packed = outer_keys(np.array([key]))
        for index, value in enumerate(data):
            word, place = divmod(offset + index, 4)
            tile, position = divmod(word, TILE_WORDS)
            outer = outer_multipliers(packed, np.array([tile]))[0]
            count = (value + 1) << (8 * place)
            for seed in range(2):
                weight = int(outer[2 * seed]) * int(inner[position, 0]) + int(outer[2 * seed + 1]) * int(
                    inner[position, 1]
                )
                total[seed] += weight * count
    return total[0] & MASK, total[1] & MASK


def reference(regions: list[torch.Tensor], rows: np.ndarray, codes: np.ndarray | None = None) -> ReferenceDigest:
    """The reference over ``regions`` on the CPU, whatever serves the others."""
    return ReferenceDigest(regions, rows, np.full(len(rows), UNSEEN) if codes is None else codes)


def test_the_sums_are_those_of_the_definition(device: torch.device) -> None:
    region = random_bytes(20_000, 1, device)
    rows = table(
        row(7, 3, 2 * TILE_BYTES - 5),
        row(5, 100, 9, (3, 11, 64), (4, 200, 4096)),
        row(1, 19_999, 7 * TILE_BYTES, key=OTHER),
        row(0, 0, 0),
        row(9, 0, 0, (0, 1, 1)),
    )
    host = region.cpu().numpy().tobytes()
    runs = [(KEY, 2 * TILE_BYTES - 5, host[3:10]), (OTHER, 7 * TILE_BYTES, host[19_999:])]
    runs += [(KEY, 9 + 64 * i + 4096 * j, host[100 + 11 * i + 200 * j :][:5]) for i in range(3) for j in range(4)]
    assert digest([region], rows) == by_definition(runs)


def test_known_values() -> None:
    """The digest is part of the protocol: another release must compute the same sums."""
    region = torch.arange(256, dtype=torch.uint8).repeat(100)
    assert tensor_key("lm_head.weight") == KNOWN_KEY
    assert digest([region], table(row(25_600, 0, 0, key=KNOWN_KEY))) == KNOWN_SUMS


def test_zero_bytes_count(device: torch.device) -> None:
    region = torch.zeros(4096, dtype=torch.uint8, device=device)
    assert digest([region], table(row(4096, 0, 0))) != digest([region], table(row(4095, 0, 0)))
    assert digest([region], table(row(4096, 0, 0))) != (0, 0)


def test_no_bytes_are_zero(device: torch.device) -> None:
    assert digest([], np.zeros((0, 14), np.int64)) == (0, 0)
    assert digest([random_bytes(8, 1, device)], table(row(0, 0, 0), row(8, 0, 0, (0, 0, 0)))) == (0, 0)


@hypothesis_settings
@given(
    length=st.integers(1, 3 * TILE_BYTES),
    start=st.integers(0, 2 * TILE_BYTES),
    cuts=st.lists(st.integers(0, 3 * TILE_BYTES), max_size=4),
    pads=st.lists(st.integers(0, 20), min_size=6, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_disjoint_runs_add_up_wherever_they_lie(
    device: torch.device, length: int, start: int, cuts: list[int], pads: list[int], seed: int
) -> None:
    data = random_bytes(length, seed, device)
    whole = digest([data], table(row(length, 0, start)))
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    pieces, rows, offset = [], [], 0
    for index, (begin, end) in enumerate(itertools.pairwise(edges)):
        pad = random_bytes(pads[index], seed + 1, device)
        pieces += [pad, data[begin:end]]
        rows.append(row(end - begin, offset + pads[index], start + begin))
        offset += pads[index] + end - begin
    scattered = torch.cat(pieces)
    assert digest([scattered], table(*rows)) == whole
    assert add(*(digest([scattered], table(one)) for one in rows)) == whole


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"), [(12, 2048, 8), (33, 1536, 3), (64, 24, 4), (7, 20, 5), (1040, 768, 1)]
)
def test_row_and_column_slices_add_up_to_the_whole(device: torch.device, rows: int, columns: int, ranks: int) -> None:
    full = random_bytes(rows * columns, 5, device).view(rows, columns)
    whole = digest([full.reshape(-1)], table(row(rows * columns, 0, 0)))
    width = columns // ranks
    by_columns = [
        digest(
            [full[:, rank * width : (rank + 1) * width].contiguous().view(-1)],
            table(row(width, 0, rank * width, (rows, width, columns))),
        )
        for rank in range(ranks)
    ]
    assert add(*by_columns) == whole
    in_place = table(*(row(width, rank * width, rank * width, (rows, columns, columns)) for rank in range(ranks)))
    assert digest([full.reshape(-1)], in_place) == whole


@hypothesis_settings
@given(data=st.data())
def test_any_table_gives_what_the_reference_gives(device: torch.device, data: st.DataObject) -> None:
    regions = [random_bytes(40_000, 8, device), random_bytes(30_001, 9, device)[1:]]
    loop = st.tuples(st.integers(0, 4), st.integers(0, 900), st.integers(0, 9000))
    one = st.builds(
        lambda run, src, dst, loops, region, key: row(run, src, dst, *loops, region=region, key=key),
        st.one_of(st.integers(0, 300), st.integers(0, 9000), st.sampled_from([16, 256, 512, 8192])),
        st.one_of(st.integers(0, 9000), st.integers(0, 500).map(lambda n: 16 * n)),
        st.one_of(st.integers(0, 10**6), st.integers(0, 5000).map(lambda n: 256 * n)),
        st.lists(loop, max_size=3),
        st.integers(0, 1),
        st.sampled_from([KEY, OTHER]),
    )
    rows = table(*data.draw(st.lists(one, min_size=1, max_size=4)))
    right = reference([region.cpu() for region in regions], rows)()
    assert digest(regions, rows) == right
    assert digest_module.prepare(regions, rows, beside="batches")() == right
    assert digest_module.prepare(regions, rows, beside="wire")() == right


def test_long_runs_of_whole_tiles(device: torch.device) -> None:
    """Through the path without a gather, at every relative alignment of memory and tensor."""
    size = 34 * TILE_BYTES
    data = random_bytes(size, 3)
    whole = reference([data], table(*(row(min(1000, size - at), at, at) for at in range(0, size, 1000))))()
    for shift in (0, 1, 2, 3, 4, 16):
        moved = torch.cat([random_bytes(shift, 4), data]).to(device)
        assert digest([moved], table(row(size, shift, 0))) == whole


@pytest.mark.parametrize("beside", [None, "batches"])
@pytest.mark.parametrize("items", [1, 3, 4096])
def test_parts_add_up_to_the_whole(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, items: int, beside: Beside | None
) -> None:
    rows = table(*(row(5000, 9000 * n, 9000 * n) for n in range(7)))
    region = random_bytes(60_000, 7, device)
    prepared = digest_module.prepare([region], rows, beside=beside)
    module = sys.modules[type(prepared).__module__]
    if module.__name__ == "weightsync.kernels.digest_triton":
        monkeypatch.setattr(module, "PART_ITEMS", items)
        assert (prepared.parts > 1) == (items < 4096)

    def in_parts(of: digest_module.PreparedDigest) -> tuple[int, int]:
        for part in range(of.parts):
            of.launch(part)
            of.wait()
        return of.result()

    right = reference([region.cpu()], rows)()
    assert in_parts(prepared) == in_parts(prepared) == prepared() == right
    region[17] ^= 1
    assert in_parts(prepared) == digest([region], rows) != right
    assert in_parts(digest_module.prepare([region], [])) == (0, 0)


def test_prepared_digests_read_the_bytes_of_now(device: torch.device) -> None:
    region = random_bytes(5000, 6, device)
    prepared = digest_module.prepare([region], table(row(5000, 0, 0)))
    before = prepared()
    assert prepared() == before
    region[4321] ^= 1
    prepared.launch()
    assert prepared.result() == digest([region], table(row(5000, 0, 0))) != before


SIZE = 3 * TILE_BYTES
POSITIONS = st.integers(0, SIZE // 256 - 1)


@hypothesis_settings
@given(byte=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_seen(device: torch.device, byte: int, bit: int) -> None:
    region = random_bytes(SIZE, 2, device)
    before = digest([region], table(row(SIZE, 0, 0)))
    region[byte] ^= 1 << bit
    after = digest([region], table(row(SIZE, 0, 0)))
    assert before[0] != after[0]
    assert before[1] != after[1]


@hypothesis_settings
@given(first=POSITIONS, second=POSITIONS, width=st.sampled_from([1, 2, 4, 64, 256]))
def test_swapped_bytes_words_and_rows_are_seen(device: torch.device, first: int, second: int, width: int) -> None:
    region = random_bytes(SIZE, 2, device)
    one, two = region[256 * first :][:width].clone(), region[256 * second :][:width].clone()
    before = digest([region], table(row(SIZE, 0, 0)))
    region[256 * first :][:width], region[256 * second :][:width] = two, one
    assert (digest([region], table(row(SIZE, 0, 0))) != before) == (not torch.equal(one, two))


def test_swapped_neighbouring_words_are_seen(device: torch.device) -> None:
    region = torch.zeros(4096, dtype=torch.uint8, device=device)
    region[100] = 1
    before = digest([region], table(row(4096, 0, 0)))
    region[100], region[104] = 0, 1
    assert digest([region], table(row(4096, 0, 0))) != before


def test_swapped_regions_and_tensors_are_seen(device: torch.device) -> None:
    regions = [random_bytes(9000, 1, device), random_bytes(9000, 2, device)]
    rows = table(row(9000, 0, 0, region=0), row(9000, 0, 9000, region=1))
    assert digest(regions, rows) != digest(regions[::-1], rows)
    rows = table(row(9000, 0, 0, region=0), row(9000, 0, 0, region=1, key=OTHER))
    assert digest(regions, rows) != digest(regions[::-1], rows)


def test_a_swap_far_apart_is_seen(device: torch.device) -> None:
    regions = [random_bytes(9000, 1, device), random_bytes(9000, 2, device)]
    for distance in (1 << 20, 1 << 29, 1 << 31, 1 << 34, 1 << 40):
        rows = table(row(9000, 0, 0, region=0), row(9000, 0, distance, region=1))
        assert digest(regions, rows) != digest(regions[::-1], rows)


@hypothesis_settings
@given(start=st.integers(0, SIZE - 1), length=st.integers(1, SIZE), seed=st.integers(10, 20))
def test_a_stale_region_is_seen(device: torch.device, start: int, length: int, seed: int) -> None:
    new, old = random_bytes(SIZE, 2, device), random_bytes(SIZE, seed, device)
    mixed = new.clone()
    mixed[start : start + length] = old[start : start + length]
    seen = digest([mixed], table(row(SIZE, 0, 0))) != digest([new], table(row(SIZE, 0, 0)))
    assert seen == (not torch.equal(mixed, new))


@hypothesis_settings
@given(missing=st.integers(1, 400), fill=st.sampled_from([0, 1, 0xA5, 0xFF]))
def test_a_missing_tail_and_a_doubled_region_are_seen(device: torch.device, missing: int, fill: int) -> None:
    region = torch.full((4096,), fill, dtype=torch.uint8, device=device)
    whole = digest([region], table(row(4096, 0, 0)))
    assert digest([region], table(row(4096 - missing, 0, 0))) != whole
    assert digest([region], table(row(4096, 0, 0), row(missing, 0, 0))) != whole
    doubled = table(row(4096 - missing, 0, 0), row(missing, 0, 0))
    assert digest([region], doubled) != whole


def test_rows_outside_are_refused_by_number(device: torch.device) -> None:
    region = random_bytes(100, 1, device)
    for wrong, words in [
        (row(101, 0, 0), "row 1 reaches byte 101 of source region 0, which has 100"),
        (row(10, 0, 0, (2, 95, 0)), "row 1 reaches byte 105"),
        (row(10, 0, 0, region=1), "row 1 names source region 1; there are 1"),
        (row(10, -1, 0), "row 1 of the strided table has a negative"),
        (row(10, 0, 1 << 44), "row 1 reaches past"),
    ]:
        with pytest.raises(KernelTableError, match=words):
            digest([region], table(row(100, 0, 0), wrong))
    with pytest.raises(KernelTableError, match="float64"):
        digest([region], np.zeros((1, 14)))
    with pytest.raises(KernelTableError, match="contiguous uint8"):
        digest([region.view(10, 10)], table(row(10, 0, 0)))


# --------------------------------------------------------------------------------------------------- finite numbers
def patterns(name: str, *, finite: bool) -> torch.Tensor:
    """Bytes of all numbers of a format that are finite, or not; of float32 those with the ends of every exponent."""
    size = ELEMENTS[name].itemsize
    if size < 4:
        bits = torch.arange(1 << 8 * size, dtype=torch.int32)
    else:
        bits = (torch.arange(512)[:, None] << 23 | torch.tensor([0, 1, (1 << 23) - 1])).view(-1).to(torch.int32)
    raw = bits.view(torch.uint8).view(-1, 4)[:, :size].contiguous()
    values = raw.view(-1).view(getattr(torch, name)).double()  # torch's own reading of the format
    return raw[values.isfinite() == finite].view(-1)


@pytest.mark.parametrize("name", list(ELEMENTS))
def test_every_finite_number_passes_and_no_other(device: torch.device, name: str) -> None:
    good, bad, size = patterns(name, finite=True), patterns(name, finite=False), ELEMENTS[name].itemsize
    if size == 1:
        assert bad.numel() == {"float8_e5m2": 8, "float8_e4m3fn": 2, "float8_e8m0fnu": 1}[name]
    length = max(3 * TILE_BYTES, good.numel())
    region = good.repeat(-(-length // good.numel()))[:length].to(device)
    rows = table(row(length, 0, 16))
    seen = digest_module.prepare([region], rows, np.array([CODES[name]]))
    assert seen() == digest([region], rows), "a look changes no digest"
    assert seen.finite()
    others = bad.view(-1, size).to(device)
    # Of all that are not, some of both signs; in every place of a word, in whole tiles and at both ends.
    for at, wrong in enumerate(others[:: max(1, len(others) // 6)]):
        place = (0, TILE_BYTES // 2 + 5, length // 4 - 1)[at % 3] * 4 // size + at % (4 // size)
        before = region.view(-1, size)[place].clone()
        region.view(-1, size)[place] = wrong
        seen()
        assert not seen.finite(), f"{wrong.tolist()} at {place}"
        region.view(-1, size)[place] = before
    seen()
    assert seen.finite(), "the look before is forgotten"


WAYS = {
    "aligned chunks": ((256, 512, 512, 1280), 8),
    "columns": ((256, 256, 0, 512), 1024),
    "pieces": ((300, 304, 6, 608), 30),
    "misaligned": ((5000, 0, 18, 0), 1),
}
"""How runs lie: their bytes, their step in memory, where their tensor's begin, and the step there; how many."""


@pytest.mark.parametrize("way", WAYS)
def test_elements_are_seen_however_they_lie(device: torch.device, way: str) -> None:
    (run, step, logical, logical_step), count = WAYS[way]
    length = step * (count - 1) + run
    region = torch.zeros(length + 2, dtype=torch.uint8, device=device)
    region[-2:] = 0xFF  # is in no run
    seen = digest_module.prepare([region], table(row(run, 0, logical, (count, step, logical_step))), np.array([1]))
    seen()
    assert seen.finite()
    for place in (0, length - 2):
        region[place : place + 2] = torch.tensor([0x80, 0xFF])  # minus infinity
        seen()
        assert not seen.finite(), f"byte {place}"
        region[place : place + 2] = 0


def test_what_has_no_code_is_not_looked_at(device: torch.device) -> None:
    region = torch.full((3000,), 0xFF, dtype=torch.uint8, device=device)
    rows = table(row(2000, 0, 0), row(1000, 2000, 0, key=OTHER))
    plain = digest_module.prepare([region], rows)
    plain()
    assert plain.finite()
    for codes, finite in [([UNSEEN, UNSEEN], True), ([UNSEEN, CODES["bfloat16"]], False), ([CODES["uint8"], 0], False)]:
        seen = digest_module.prepare([region], rows, np.array(codes))
        assert seen() == digest([region], rows)
        assert seen.finite() == finite


@hypothesis_settings
@given(data=st.data())
def test_any_elements_of_any_table_are_judged_as_torch_does(device: torch.device, data: st.DataObject) -> None:
    """Every run's bytes as torch reads them; memory is nearly all finite, so that both answers come."""
    region = (random_bytes(60_000, data.draw(st.integers(0, 99)), "cpu") & 0x3B)[data.draw(st.integers(0, 3)) :]
    for place in data.draw(st.lists(st.integers(0, 14_000), max_size=2)):
        region[4 * place : 4 * place + 4] = 0xFF
    names, rows, finite = [], [], True
    for name in data.draw(st.lists(st.sampled_from([*ELEMENTS, ""]), min_size=1, max_size=4)):
        size = ELEMENTS[name].itemsize if name else 1
        run = size * data.draw(st.one_of(st.integers(1, 80), st.sampled_from([128, 256, 4096])))
        count, step = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 400))
        start, logical = data.draw(st.integers(0, 9000)), size * data.draw(st.integers(0, 5000))
        names.append(CODES[name] if name else UNSEEN)
        rows.append(row(run, start, logical, (count, step, run + size * data.draw(st.integers(0, 9)))))
        for at in range(start, start + count * step, step) if name and step else [start] * bool(name):
            numbers = region[at : at + run].clone().view(getattr(torch, name))
            finite &= bool(numbers.double().isfinite().all())
    here = region.to(device)
    seen = digest_module.prepare([here], table(*rows), np.array(names))
    assert seen() == reference([region], table(*rows))()
    assert seen.finite() == finite


def test_codes_that_do_not_fit_their_rows_are_refused(device: torch.device) -> None:
    region = random_bytes(100, 1, device)
    rows = table(row(8, 0, 0), row(6, 0, 2, (2, 3, 6)))
    two, four = CODES["float16"], CODES["float32"]
    digest_module.prepare([region], rows, np.array([four, two]))
    for codes, words in [
        ([two, four], "row 1 cuts elements of 4 bytes"),
        ([two, len(ELEMENTS) + 1], f"row 1 has elements of code {len(ELEMENTS) + 1}; there are 0 to {len(ELEMENTS)}"),
        ([-1, two], "row 0 has elements of code -1"),
        ([two], r"codes of 2 rows are int64\[2\]: int64\[1\]"),
        ([2.0, 2.0], "float64"),
    ]:
        with pytest.raises(KernelTableError, match=words):
            digest_module.prepare([region], rows, np.array(codes))
