"""Explanations and simulations as text."""

from collections.abc import Iterable, Sequence
from typing import Final

from weightsync.orchestrator.forecast.explain import EndReport, Explanation, Moved
from weightsync.orchestrator.forecast.simulate import Simulation

UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")


def explanation_text(found: Explanation, top: int) -> str:
    """At most ``top`` rows per table."""
    moved = found.moved
    names = list(found.seconds)
    lines = [
        f"plan {found.root}: {found.sources} sources, {found.targets} targets, {len(found.edges)} edges,"
        f" {size(moved.bytes)} in {moved.descriptors} descriptors"
        f" ({size(moved.packed_bytes)} of it packed: {moved.packed_pieces} of {moved.pieces} pieces)",
        "",
        *table(
            ("LINK", "GB/S", "SECONDS", "BOTTLENECK"),
            [(n, f"{found.gb_per_s[n]:.1f}", f"{found.seconds[n]:.3f}", found.bottleneck[n]) for n in names],
        ),
    ]
    landings = [(e.engine, e.mode, str(e.ranks), size(e.bytes), e.because or "-") for e in found.landings[:top]]
    lines += ["", f"engines ({len(landings)} of {len(found.landings)})"]
    lines += table(("ENGINE", "LANDS", "RANKS", "LANDING", "WHY"), landings)
    if found.unneeded:
        lines += ["", f"held but not needed by any engine: {', '.join(shorten(found.unneeded, top))}"]
    tensors = [
        (t.name, str(t.tensors), t.dtype, "x".join(map(str, t.shape)) or "scalar", *_moved(t.moved), str(t.sources),
         str(t.targets), t.slot or "-", t.reason or "-", t.how)
        for t in found.tensors[:top]
    ]  # fmt: skip
    head = ("TENSOR", "COUNT", "DTYPE", "SHAPE", "BYTES", "DESCR", "FROM", "TO", "SLOT", "WHY", "HOW")
    lines += ["", *_titled("tensors", len(found.tensors), top), *table(head, tensors)]
    edges = [
        (e.source, e.target, *_moved(e.moved), size(e.moved.packed_bytes), str(e.chunks), str(e.straight),
         *(f"{e.seconds[n]:.4f}" for n in names), e.landing or "-")
        for e in found.edges[:top]
    ]  # fmt: skip
    edge_head = (
        "SOURCE",
        "TARGET",
        "BYTES",
        "DESCR",
        "PACKED",
        "CHUNKS",
        "STRAIGHT",
        *(f"{n} S" for n in names),
        "LANDS",
    )
    lines += ["", *_titled("edges", len(found.edges), top), *table(edge_head, edges)]
    for title, ends in (("senders", found.senders), ("receivers", found.receivers)):
        lines += ["", *_titled(title, len(ends), top), *_ends(ends[:top], names)]
    return "\n".join(lines)


def simulation_text(found: Simulation) -> str:
    """The whole prediction."""
    fleet = found.fleet
    lines = [
        f"{found.sources} trainer and {found.targets} engine GPUs{', the same ones' if fleet.colocated else ''},"
        f" {fleet.gpus_per_node} GPUs and {fleet.nics_per_node}"
        f" NICs of {fleet.nic_gbps:g} Gb/s per node, {fleet.efficiency:.0%} of line rate",
        f"{size(found.bytes)} in {found.descriptors} descriptors, {size(found.wire_bytes)} of it between nodes",
        "",
        f"transfer between {found.best_seconds:.3f} s (ends always busy) and {found.worst_seconds:.3f} s"
        f" ({found.groups} groups in lockstep)",
        f"bottleneck: {found.bottleneck}",
        "",
        *table(
            ("LIMIT", "SECONDS", "WHERE", "BYTES", "PEERS"),
            [(x.what, f"{x.seconds:.3f}", x.where, size(x.bytes), str(x.peers)) for x in found.limits],
        ),
    ]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Left-aligned columns, as wide as their widest entry."""
    cells = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def shorten(names: Sequence[str], top: int) -> list[str]:
    """The first ``top``, and how many more there are."""
    return list(names[:top]) + ([f"and {len(names) - top} more"] if len(names) > top else [])


def _titled(what: str, count: int, top: int) -> list[str]:
    return [f"{what} ({min(count, top)} of {count}, largest first)"]


def _moved(moved: Moved) -> tuple[str, str]:
    return size(moved.bytes), str(moved.descriptors)


def _ends(ends: Sequence[EndReport], names: Sequence[str]) -> list[str]:
    rows = [(e.member, str(e.peers), *_moved(e.moved), *(f"{e.seconds[n]:.3f}" for n in names)) for e in ends]
    return table(("MEMBER", "PEERS", "BYTES", "DESCR", *(f"{n} S" for n in names)), rows)
