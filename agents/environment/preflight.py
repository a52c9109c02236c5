"""What an agent looks at when it has been taken in, and ``doctor``, too: each known trap around a process."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from weightsync.agents.environment import limits, network, packages, variables
from weightsync.agents.environment.links import Interface, links
from weightsync.agents.environment.variables import Role
from weightsync.agents.memory.cuda import driver
from weightsync.agents.memory.nic import Gpu, all_gpus, visible_gpus
from weightsync.agents.memory.reach import why_not_by_nic
from weightsync.agents.transport.nixl.loader import environment_of_process, load
from weightsync.orchestrator.protocol.findings import Finding, examined
from weightsync.orchestrator.protocol.messages import NixlSettings, TransportSettings

Check = tuple[str, Callable[[], Iterable[Finding]]]
"""What is looked at, and the look."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Of one process that takes part in transfers.

    ``gpus``: those that it sees, in the order of their CUDA indices; ``own``: the one whose memory is sent or received,
    None: each of them. ``links``: this host's ports and interfaces.
    """

    role: Role
    environ: Mapping[str, str]
    gpus: Sequence[Gpu]
    links: Sequence[Interface]
    own: int | None = None

    def used(self, settings: NixlSettings) -> Sequence[str] | None:
        """Names of the ports that this process uses; None: of any of them."""
        near: Sequence[str] = ()
        if self.own is not None and self.own < len(self.gpus):
            near = network.nearest(self.gpus[self.own], self.links)
        return near or settings.net_devices or None

    @property
    def rdma(self) -> bool:
        """Whether a port is ACTIVE."""
        return any(link.rdma and link.up for link in self.links)


def preflight(role: Role, device: int | None, transport: TransportSettings) -> list[Finding]:
    """All findings of this process, in some ten milliseconds; whatever breaks is a finding itself.

    Args:
        device: CUDA's index of the device whose memory is sent or received; None: it is host memory.
    """
    if not isinstance(transport, NixlSettings):
        return []  # by way of a file system nothing of this matters

    def look() -> Iterator[Finding]:
        environ = environment_of_process()
        gpus = visible_gpus(all_gpus(), environ.get("CUDA_VISIBLE_DEVICES")) if device is not None else []
        around = Surroundings(role, environ, gpus, links(), device)
        for check, each in checks(around, transport):
            yield from examined(check, each)
        if device is not None:
            yield from examined("ucx", lambda: packages.ucx_with_cuda(packages.libraries_of(load())))

    return examined("environment", look)


def checks(around: Surroundings, settings: NixlSettings) -> Iterator[Check]:
    """Those that need nothing but this host. ``settings``: the daemon's, as far as they are known."""
    environ, gpus, everywhere, rdma = around.environ, around.gpus, around.links, around.rdma
    instead = "the daemon's transport.net_devices" if settings.net_devices else ""
    if gpus and rdma and not settings.net_devices:
        instead = "their GPU's nearest ports instead"
    chosen = bool(settings.net_devices) or variables.NET_DEVICES in environ
    yield "allocator", lambda: variables.allocator(environ, around.role)
    seen = max(len(gpus), int(around.own is not None))  # nobody may say which GPUs there are
    yield variables.UCX_TLS, lambda: variables.transports(environ, seen)
    yield variables.NET_DEVICES, lambda: variables.net_devices(environ, everywhere, instead)
    yield "rails", lambda: variables.rails(environ)
    yield "memlock", lambda: limits.locked_memory(rdma)
    yield "shared memory", limits.shared_memory
    yield "cma", limits.neighbours
    yield "open files", limits.open_files
    yield network.CHECK, lambda: network.ports(everywhere, around.used(settings))
    yield network.CHECK, lambda: network.by_tcp(everywhere, chosen)
    yield network.CHECK, lambda: network.one_network_twice(everywhere)
    yield network.CHECK, lambda: network.distances(gpus, everywhere, settings.rails, own=around.own)
    if rdma:
        for number in range(len(gpus)) if around.own is None else (around.own,):
            yield f"GPU {number}", functools.partial(_gpu_direct, number)


def _gpu_direct(number: int) -> Iterator[Finding]:
    library = driver()
    if library is not None:
        library.cuInit(0)  # in an agent torch has done so; without it the driver answers nothing
    reason = why_not_by_nic(number)
    if reason is not None:
        what, _, fix = reason.partition(": ")
        yield Finding("warning", what, fix, f"GPU {number}")
