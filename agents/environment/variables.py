"""Environment variables by which PyTorch and UCX do other than what transfers need."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Final, Literal

from weightsync.agents.environment.links import Interface
from weightsync.orchestrator.protocol.findings import Finding

Role = Literal["trainer", "engine"]

ALLOCATOR: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name since torch 2.9, and the one before."""

UCX_TLS: Final = "UCX_TLS"
NET_DEVICES: Final = "UCX_NET_DEVICES"
RAILS: Final = ("UCX_MAX_RMA_RAILS", "UCX_MAX_RNDV_RAILS")

CUDA_ALL: Final = "cuda"
"""UCX's own word for all of its CUDA transports (``tl_aliases`` in ucp/core/ucp_context.c)."""

_TRUE: Final = ("true", "1", "yes")


def allocator(environ: Mapping[str, str], role: Role) -> Iterator[Finding]:
    """Expandable segments: memory that neither another process nor a NIC can map.

    An engine's live weights may lie there. A trainer's do as well, but what is written from are its slots, and for
    these memory is taken beside it (``agents/memory/arena.py``).
    """
    for name in ALLOCATOR:
        options = dict(part.strip().partition(":")[::2] for part in environ.get(name, "").split(","))
        if options.get("expandable_segments", "").strip().lower() in _TRUE:
            what = f"{name}={environ[name]}: neither another process nor a NIC can map such memory"
            if role == "engine":
                yield Finding("warning", what, f"take expandable_segments out of {name}", name)
            else:
                yield Finding("note", f"{what}; slots are taken beside it", "nothing, unless engines have it", name)


def transports(environ: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    """``UCX_TLS``: what it leaves out. ``gpus``: how many this process sees."""
    text = environ.get(UCX_TLS)
    if text is None:
        return
    refused = text.startswith("^")
    named = {part.strip() for part in text.removeprefix("^").split(",") if part.strip()}
    if not refused and "all" in named:
        return

    def has(*names: str) -> bool:
        given = bool(named & set(names))
        return not given if refused else given

    if gpus and not has("cuda_copy", CUDA_ALL):
        what = f"{UCX_TLS}={text} leaves UCX without CUDA: device memory cannot be sent at all"
        yield Finding("error", what, f"unset {UCX_TLS}, or add cuda to it", UCX_TLS)
    elif gpus and not has("cuda_ipc", CUDA_ALL):
        what = f"{UCX_TLS}={text} leaves cuda_ipc out: GPUs of this host reach each other through host memory only"
        yield Finding("warning", what, f"unset {UCX_TLS}, or add cuda to it", UCX_TLS)
    else:
        yield Finding("note", f"{UCX_TLS}={text}: only these transports are used", f"unset {UCX_TLS}", UCX_TLS)


def net_devices(environ: Mapping[str, str], links: Sequence[Interface], instead: str = "") -> Iterator[Finding]:
    """``UCX_NET_DEVICES``: what it names, and whether agents use it.

    ``links``: this host's ports and interfaces; ``instead``: what agents go by in its place; empty: by it.
    """
    text = environ.get(NET_DEVICES)
    if text is None or text == "all":
        return
    if instead:
        what = f"{NET_DEVICES}={text} is preset, and agents go by {instead}"
        yield Finding("note", what, f"unset {NET_DEVICES}, unless something else here needs it", NET_DEVICES)
        return
    known = {link.name: link for link in links}
    refused = text.startswith("^")
    patterns = [part.strip() for part in text.removeprefix("^").split(",") if part.strip()]
    for pattern in () if refused else patterns:
        named = [link for name, link in known.items() if fnmatch(name, pattern)]
        if not named:
            what = f"{NET_DEVICES} names {pattern}, and this host has {', '.join(sorted(known)) or 'none'}"
            yield Finding("error", what, f"unset {NET_DEVICES}, or name one of them", NET_DEVICES)
        elif not any(link.up for link in named):
            what = f"{NET_DEVICES} names {pattern}, which is {named[0].state}"
            yield Finding("error", what, f"unset {NET_DEVICES}, name another one, or mend the link", NET_DEVICES)
    taken = [link for link in links if any(fnmatch(link.name, pattern) for pattern in patterns) != refused]
    if taken and all(link.loopback for link in taken):
        what = f"{NET_DEVICES}={text}: no other host can be reached"
        yield Finding("warning", what, f"unset {NET_DEVICES}", NET_DEVICES, several_hosts=True)


def rails(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Presets that the daemon's ``transport.rails`` takes the place of."""
    for name in RAILS:
        if name in environ:
            what = f"{name}={environ[name]} is preset; agents go by the daemon's transport.rails"
            yield Finding("note", what, f"set transport.rails, and unset {name}", name)
