"""Which of UCX's transports the connection to a peer has, as UCX itself says.

NIXL neither tells nor hands UCX's endpoints out. UCX lists them in a file system of its own (``ucs/vfs``), by their
addresses, with which its public ``ucp_ep_query`` names the transports of each. Nothing here changes anything; where
this UCX has no such functions, nothing is known.
"""

import ctypes
import functools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightsync.orchestrator.protocol.edges import LinkKind

MAX_LANES: Final = 64
"""Of one connection; UCX has at most 16."""

SHOWN_LANES: Final = 4
"""Rails that are named of one connection."""

_TRANSPORTS: Final = 1 << 3
"""UCP_EP_ATTR_FIELD_TRANSPORTS of ucp.h."""

_ADDRESS: Final = re.compile("0x([0-9a-f]+?)(?=0x|$)")
"""Of an endpoint, by which UCX names it. An ``x`` is in no number, so it tells where the next begins."""

_RDMA: Final = ("rc", "dc", "ud", "srd", "gga")
_COPIES: Final = ("xpmem", "cma", "knem", "self")
_BUFFERS: Final = ("posix", "sysv")


@dataclass(frozen=True, slots=True)
class UcxLane:
    """A transport of a connection and the device that it uses, as UCX names them: ``rc_mlx5`` on ``mlx5_0:1``."""

    transport: str
    device: str

    def __str__(self) -> str:
        return f"{self.transport}/{self.device}"


@dataclass(frozen=True, slots=True)
class Way:
    """How bytes reach a peer: the kind of link, and the lanes that carry them, for people."""

    link: LinkKind = "unknown"
    by: str = ""


def way(lanes: Sequence[UcxLane], *, gpus: tuple[str, str]) -> Way:
    """What a write goes by, of what the connection has. ``gpus``: of both ends, empty for host memory.

    UCX takes the fastest lane that reaches both memories: from GPU to GPU CUDA's IPC before a NIC, in host memory a
    copy by the kernel before a NIC. Memory that CUDA cannot share goes another way although there is the lane; that
    shows in the rate.
    """
    here, there = gpus
    between: LinkKind = "same_gpu" if here == there else "nvlink"
    by_gpu: list[tuple[LinkKind, tuple[str, ...]]] = [(between, ("cuda_ipc",)), ("nic", _RDMA)]
    by_host: list[tuple[LinkKind, tuple[str, ...]]] = [("shm", _COPIES), ("nic", _RDMA)]
    order = by_gpu if here and there else by_host
    for link, names in [*order, ("shm", (*_COPIES, *_BUFFERS)), ("tcp", ("tcp",))]:
        taken = [lane for lane in lanes if lane.transport.partition("_")[0] in names or lane.transport in names]
        if taken:
            return Way(link, "+".join(str(lane) for lane in dict.fromkeys(taken[:SHOWN_LANES])))
    return Way()


class _Entry(ctypes.Structure):
    """ucp_transport_entry_t."""

    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _Attributes(ctypes.Structure):
    """ucp_ep_attr_t up to the transports; the two addresses before them are each a sockaddr_storage."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("addresses", ctypes.c_byte * 256),
        ("entries", ctypes.POINTER(_Entry)),
        ("count", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


class UcxConnections:
    """The connections of one NIXL agent. To be asked on the thread that makes the agent's calls: no connection may come
    or go meanwhile.

    Args:
        agent_name: NIXL's, after which UCX's context and worker are named.
        gpu: unique name of the GPU whose memory is read and written; empty for host memory.
    """

    def __init__(self, agent_name: str, gpu: str) -> None:
        self._path = ("ucp", "context", *agent_name.split("/"), "worker", *f"{agent_name}:0".split("/"), "ep")
        self._libraries = _libraries()
        self._gpu = gpu
        self._gpus: dict[str, str] = {}
        self._of: dict[str, frozenset[int]] = {"": self.endpoints()}
        """UCX's endpoints that came with each peer; those to itself under the empty name."""
        self._ways: dict[str, Way] = {}

    def endpoints(self) -> frozenset[int]:
        """Addresses of all of UCX's that there are now."""
        return frozenset(address for address, _ in self._found())

    def joined(self, peer: str, gpu: str, before: Collection[int]) -> None:
        """``peer``, whose memory is of ``gpu``, has been connected; ``before``: the endpoints that there were."""
        self._gpus[peer], self._of[peer] = gpu, self.endpoints() - set(before)

    def left(self, peer: str) -> None:
        """It is connected no more."""
        for book in (self._gpus, self._of, self._ways):
            book.pop(peer, None)

    def way_to(self, peer: str) -> Way:
        """What writes to a peer that has taken the first word go by."""
        if peer in self._gpus and peer not in self._ways:
            # One that had connected to us before is used as it is: it came with nobody's name.
            chosen = self._of[peer] or self.endpoints() - frozenset().union(*self._of.values())
            self._ways[peer] = way(self._lanes(chosen), gpus=(self._gpu, self._gpus[peer]))
        return self._ways.get(peer, Way())

    def _lanes(self, chosen: Collection[int]) -> tuple[UcxLane, ...]:
        """Those of the ``chosen`` endpoints, if there still are any and all have the same; else empty."""
        alike = {_query(ucp, address) for address, ucp in self._found() if address in chosen}
        return alike.pop() if len(alike) == 1 else ()

    def _found(self) -> Iterator[tuple[int, ctypes.CDLL]]:
        for ucs, ucp in self._libraries:
            names = ""
            for depth in range(len(self._path) + 1):  # UCX fills a directory when the one above is listed
                names = _listed(ucs, "/" + "/".join(self._path[:depth]))
            for address in _ADDRESS.findall(names):
                yield int(address, 16), ucp


@functools.cache
def _libraries() -> tuple[tuple[ctypes.CDLL, ctypes.CDLL], ...]:
    """libucs and libucp of each UCX in this process that can be asked; NIXL's wheels bring one of their own."""
    paths = {Path(line.split(maxsplit=5)[-1].strip()) for line in _maps() if "/libuc" in line}
    found = []
    for ucs in sorted(path for path in paths if path.name.startswith("libucs.") or path.name.startswith("libucs-")):
        for ucp in sorted(
            path for path in paths if path.parent == ucs.parent and path.name[:7] in ("libucp.", "libucp-")
        ):
            try:
                pair = ctypes.CDLL(str(ucs)), ctypes.CDLL(str(ucp))
                _declare(*pair)
                _libc()
            except (OSError, AttributeError):  # replaced on disk since, or too old
                continue
            found.append(pair)
    return tuple(found)


def _maps() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []


def _declare(ucs: ctypes.CDLL, ucp: ctypes.CDLL) -> None:
    ucs.ucs_vfs_path_list_dir.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
    ucs.ucs_vfs_path_list_dir.restype = ctypes.c_byte
    ucp.ucp_ep_query.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Attributes))
    ucp.ucp_ep_query.restype = ctypes.c_byte


def _listed(ucs: ctypes.CDLL, path: str) -> str:
    """The names in a directory, one directly behind the other.

    UCX tells each to a function that it calls with a spin lock in its hands, for which whoever makes or destroys an
    endpoint waits, also with the interpreter in theirs, as the collection of a NIXL agent does. So that function must
    never wait for the interpreter: it is C's ``fputs``.
    """
    libc = _libc()
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
    if not stream:
        return ""
    ucs.ucs_vfs_path_list_dir(path.encode(), ctypes.cast(libc.fputs, ctypes.c_void_p), stream)
    libc.fclose(stream)
    try:
        return ctypes.string_at(text, size.value).decode(errors="replace")
    finally:
        libc.free(text)


@functools.cache
def _libc() -> ctypes.CDLL:
    """With what collects text, of POSIX.

    Raises:
        AttributeError: this system's has no such functions.
    """
    libc = ctypes.CDLL(None)
    libc.open_memstream.restype = ctypes.c_void_p
    for name in ("fclose", "free"):
        getattr(libc, name).argtypes = (ctypes.c_void_p,)
    assert libc.fputs
    return libc


def _query(ucp: ctypes.CDLL, address: int) -> tuple[UcxLane, ...]:
    entries = (_Entry * MAX_LANES)()
    asked = _Attributes(field_mask=_TRANSPORTS, count=MAX_LANES, entry_size=ctypes.sizeof(_Entry))
    asked.entries = entries
    if ucp.ucp_ep_query(address, ctypes.byref(asked)) != 0:
        return ()
    said = entries[: min(asked.count, MAX_LANES)]
    return tuple(UcxLane(_text(entry.transport), _text(entry.device)) for entry in said)


def _text(said: bytes | None) -> str:
    return (said or b"").decode(errors="replace")
