"""Finds NIXL under whichever of its three package names is installed.

``nixl`` is the umbrella that picks a CUDA build, ``nixl-cu13`` and ``nixl-cu12`` are the builds; each of them also
works on a machine without CUDA. vLLM environments have any of the three.

UCX reads its configuration from the environment when a backend is created. Another agent in the same process (vLLM's
KV connector has one) must neither see our settings nor hand us its own, so ``environment`` lends them for that moment.
"""

import functools
import importlib
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from types import ModuleType
from typing import Any, Final

from weightsync.agents.transport.nixl.errors import NixlError, NixlMissingError

PACKAGES: Final = ("nixl", "nixl_cu13", "nixl_cu12")

LOG_FILE: Final = "UCX_LOG_FILE"

_RDMA: Final = [f"{kind}{way}" for kind in ("rc", "ud", "dc") for way in ("", "_v", "_x", "_verbs", "_mlx5")]

NETWORKS: Final = frozenset(["tcp", "self", "ib", "cuda_copy", "gdr_copy", *_RDMA])
"""Of UCX_TLS: transports by which no other process's memory is reached but over a network."""


def only_networks(transports: str) -> bool:
    """Whether UCX_TLS=``transports`` keeps UCX from memory that two processes share. Others than NETWORKS may not."""
    return bool(transports) and NETWORKS.issuperset(transports.split(","))


LOST_SYNS: Final = 4
"""Sent again after 1, 2, 4 and 8 s; 16 s later the connection is given up, and another one may be tried."""


def connecting(environ: Mapping[str, str]) -> dict[str, str]:
    """How UCX connects over TCP if it may: by itself it stands in ``connect`` until an address that does not answer has
    let TCP's patience pass, two minutes and more, and so would the thread that heartbeats are answered on."""
    interfaces = [name for _, name in socket.if_nameindex()]
    # UCX warns of what it is told for a transport that it has no use for.
    if not (_allows(environ.get("UCX_TLS"), ["tcp"]) and _allows(environ.get("UCX_NET_DEVICES"), interfaces)):
        return {}
    return {"UCX_TCP_CONN_NB": "y", "UCX_TCP_SYN_CNT": environ.get("UCX_TCP_SYN_CNT", str(LOST_SYNS))}


def _allows(listed: str | None, names: Sequence[str]) -> bool:
    """Whether a list of UCX's has any of ``names``; with ``^`` in front it has all that it does not name."""
    if not listed or listed == "all":
        return True
    patterns = listed.removeprefix("^").split(",")
    named = [any(fnmatch(name, pattern) for pattern in patterns) for name in names]
    return not all(named) if listed.startswith("^") else any(named)


@dataclass(frozen=True, slots=True)
class Bindings:
    """One NIXL build: the package it came from, its Python API and its extension module."""

    package: str
    api: ModuleType
    native: ModuleType

    def agent(self, name: str, *, backends: tuple[str, ...], progress_thread: bool, threads: int) -> Any:
        """A new ``nixl_agent`` without a listening socket (NIXL's would bind every interface).

        Raises:
            NixlError: it or one of its backends cannot be made.
        """
        config = self.api.nixl_agent_config(
            enable_prog_thread=progress_thread,
            enable_listen_thread=False,
            num_threads=threads,
            backends=list(backends),
        )
        failures: tuple[type[Exception], ...] = (*self.errors, RuntimeError)
        try:
            # UCX warns on stdout, in the middle of its host's lines; it reads this once, with its first agent.
            with environment({LOG_FILE: os.environ.get(LOG_FILE, "stderr")}):
                made = self.api.nixl_agent(name, config)
        except failures as error:
            devices = os.environ.get("UCX_NET_DEVICES", "")
            over = f" over UCX_NET_DEVICES={devices}; is there such a network device here?" if devices else ""
            raise NixlError(f"{name}: NIXL cannot start with {', '.join(backends)}{over} ({error})") from error
        if missing := set(backends) - set(made.backends):
            raise NixlError(f"{name}: this NIXL has no backend {', '.join(sorted(missing))}")
        return made

    @property
    def disconnected(self) -> type[Exception]:
        """Raised for a peer whose process or connection is gone."""
        error: type[Exception] = self.native.nixlRemoteDisconnectError
        return error

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Every exception type of the extension module; they share no base of their own."""
        found = (getattr(self.native, name) for name in dir(self.native) if name.endswith("Error"))
        return tuple(error for error in found if isinstance(error, type) and issubclass(error, Exception))


@functools.cache
def load() -> Bindings:
    """The first of PACKAGES that imports.

    Raises:
        NixlMissingError: none does; the message has each package's reason.
    """
    reasons = []
    for package in PACKAGES:
        try:
            api = importlib.import_module(f"{package}._api")
        except ImportError as error:
            reasons.append(f"{package}: {error}")
            continue
        _quiet()  # after the import, by which NIXL configures its logger
        return Bindings(package, api, api.nixlBind)
    raise NixlMissingError(
        "NIXL cannot be imported; install one of nixl, nixl-cu13 or nixl-cu12 (tried: " + "; ".join(reasons) + ")"
    )


def _quiet() -> None:
    """NIXL greets on stdout for each agent and backend, which would mix with its host's output."""
    if "NIXL_LOG_LEVEL" not in os.environ:  # who set it wants to hear
        logging.getLogger("nixl").setLevel(logging.WARNING)


_making = threading.RLock()


@contextmanager
def environment(overrides: Mapping[str, str | None]) -> Iterator[None]:
    """Set (or with None: unset) variables, and put back exactly what was there before.

    One caller at a time: two agents being made at once would read each other's settings.
    """
    with _making:
        before = {name: os.environ.get(name) for name in overrides}
        _apply(overrides)
        try:
            yield
        finally:
            _apply(before)


def environment_of_process() -> dict[str, str]:
    """The variables as they are while nothing is lent."""
    with _making:
        return dict(os.environ)


def _apply(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
