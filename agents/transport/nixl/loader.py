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
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from weightsync.agents.transport.nixl.errors import NixlMissingError

PACKAGES: Final = ("nixl", "nixl_cu13", "nixl_cu12")


@dataclass(frozen=True, slots=True)
class Bindings:
    """One NIXL build: the package it came from, its Python API and its extension module."""

    package: str
    api: ModuleType
    native: ModuleType

    def agent(self, name: str, *, backends: tuple[str, ...], progress_thread: bool, threads: int) -> Any:
        """A new ``nixl_agent`` without a listening socket (NIXL's would bind every interface)."""
        config = self.api.nixl_agent_config(
            enable_prog_thread=progress_thread,
            enable_listen_thread=False,
            num_threads=threads,
            backends=list(backends),
        )
        return self.api.nixl_agent(name, config)

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


def _apply(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
