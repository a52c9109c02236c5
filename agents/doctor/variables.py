"""Environment variables by which PyTorch, UCX and vLLM do other than what transfers need."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from weightsync.agents.doctor.links import Interface
from weightsync.agents.inference.place import LOOPBACK_VARIABLE, VARIABLES, Place, is_loopback
from weightsync.agents.vllm.routes import OPEN_VARIABLE
from weightsync.agents.vllm.worker_calls import ALLOW_VARIABLE
from weightsync.orchestrator.protocol.findings import Finding

ALLOCATOR: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name since torch 2.9, and the one before."""

UCX_TLS: Final = "UCX_TLS"
NET_DEVICES: Final = "UCX_NET_DEVICES"
RAILS: Final = ("UCX_MAX_RMA_RAILS", "UCX_MAX_RNDV_RAILS")

CUDA_ALL: Final = "cuda"
"""UCX's own word for all of its CUDA transports (``tl_aliases`` in ucp/core/ucp_context.c)."""

_TRUE: Final = ("true", "1", "yes")


def allocator(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Expandable segments: memory that neither another process nor a NIC can map."""
    for name in ALLOCATOR:
        options = dict(part.strip().partition(":")[::2] for part in environ.get(name, "").split(","))
        if options.get("expandable_segments", "").strip().lower() in _TRUE:
            what = f"{name}={environ[name]}: neither another process nor a NIC can map such memory"
            fix = "take expandable_segments out of it, at least for engines (a trainer's slots are taken beside it)"
            yield Finding("warning", what, fix, name)


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


def net_devices(environ: Mapping[str, str], links: Sequence[Interface], pinned: bool) -> Iterator[Finding]:
    """``UCX_NET_DEVICES``: what it names, and whether agents use it.

    ``links``: this host's ports and interfaces; ``pinned``: agents choose their GPU's nearest ports themselves.
    """
    text = environ.get(NET_DEVICES)
    if text is None or text == "all":
        return
    names = [part.strip() for part in text.split(",") if part.strip()]
    known = {link.name: link for link in links}
    for name in names:
        link = known.get(name)
        if link is None:
            what = f"{NET_DEVICES} names {name}, and this host has {', '.join(sorted(known)) or 'none'}"
            yield Finding("error", what, f"unset {NET_DEVICES}, or name one of them", NET_DEVICES)
        elif not link.up:
            what = f"{NET_DEVICES} names {name}, which is {link.state}"
            yield Finding("error", what, f"unset {NET_DEVICES}, name another one, or mend the link", NET_DEVICES)
    if pinned:
        what = f"{NET_DEVICES}={text} is preset, and agents go by their GPU's nearest ports instead"
        yield Finding("note", what, f"unset {NET_DEVICES}, unless something else here needs it", NET_DEVICES)
    elif names == ["lo"]:
        what = f"{NET_DEVICES}=lo: no other host can be reached"
        yield Finding("warning", what, f"unset {NET_DEVICES}", NET_DEVICES)


def rails(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Presets that the daemon's ``transport.rails`` takes the place of."""
    for name in RAILS:
        if name in environ:
            what = f"{name}={environ[name]} is preset; agents go by the daemon's transport.rails"
            yield Finding("note", what, f"set transport.rails, and unset {name}", name)


def guard(environ: Mapping[str, str], place: Place) -> Iterator[Finding]:
    """What stands before an engine's admin routes, and what the operator has opened."""
    if place.demo:
        what = f"{LOOPBACK_VARIABLE}=1: whoever is on this machine may call the server's admin routes"
        yield Finding("warning", what, f"unset {LOOPBACK_VARIABLE} where it is no demo", LOOPBACK_VARIABLE)
    if urlsplit(place.hub_url).scheme == "ws" and not is_loopback(place.hub_url):
        what = f"{VARIABLES['hub_url']} is {place.hub_url}: without TLS, whoever is between can alter what is said"
        fix = "listen.tls of the daemon, and wss:// here; or see that nobody else reaches that network"
        yield Finding("note", what, fix, VARIABLES["hub_url"])
    for name, who in ((OPEN_VARIABLE, "clients may ask for"), (ALLOW_VARIABLE, "holders of the admin key may call")):
        if environ.get(name, "").strip():
            yield Finding("note", f"{name}: {who} {environ[name]}", f"unset {name} where nobody needs it", name)


def engine(environ: Mapping[str, str], plugin: str) -> Iterator[Finding]:
    """What a vLLM server needs in its environment. ``plugin``: its name."""
    if not environ.get("VLLM_SERVER_DEV_MODE", "").strip().strip("0"):  # vLLM reads a number
        what = "VLLM_SERVER_DEV_MODE is not 1: the server will not have the admin routes"
        yield Finding(
            "error", what, "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment", "VLLM_SERVER_DEV_MODE"
        )
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None and plugin not in allowed.split(","):  # as vLLM reads it: a blank is part of a name
        what = f"VLLM_PLUGINS={allowed} keeps the plugin {plugin} from being loaded"
        yield Finding("error", what, f"unset VLLM_PLUGINS, or add {plugin} to it", "VLLM_PLUGINS")
