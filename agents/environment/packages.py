"""Is what an agent needs installed here, and fit for this machine?"""

import ctypes
import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from weightsync.agents.transport.nixl.errors import NixlMissingError
from weightsync.agents.transport.nixl.loader import Bindings, load
from weightsync.orchestrator.protocol.findings import Finding

PLUGIN: Final = "weightsync"
PLUGIN_GROUP: Final = "vllm.general_plugins"

OLDEST: Final = {"torch": (2, 6), "vllm": (0, 24)}
"""As pyproject.toml asks for them; an environment that was put together without pip may have others."""

UCX_CUDA: Final = "ucx/libuct_cuda.so*"
"""Beside the libraries that a NIXL wheel brings: UCX's CUDA transports."""


def release_of(package: str) -> str | None:
    """The installed release; None: it is not installed. vLLM's CPU build has a name of its own."""
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def required(package: str, release: str | None) -> Iterator[Finding]:
    """Whether there is the package, and no older one than we know."""
    oldest = OLDEST[package]
    wanted = ".".join(map(str, oldest))
    if release is None:
        yield Finding("error", f"{package} is not installed here", f"pip install '{package}>={wanted}'", package)
        return
    parts = [part for part in release.split(".")[:2] if part.isdecimal()]
    if len(parts) == 2 and (int(parts[0]), int(parts[1])) < oldest:
        what = f"{package} {release} is older than {wanted}"
        yield Finding("error", what, f"pip install '{package}>={wanted}'", package)
    else:
        yield Finding("ok", release, check=package)


def plugin(entries: Iterable[importlib.metadata.EntryPoint] | None = None) -> Iterator[Finding]:
    """Whether vLLM, in this environment, finds our plugin. ``entries``: of its group; None: those installed."""
    found = importlib.metadata.entry_points(group=PLUGIN_GROUP) if entries is None else entries
    if PLUGIN not in {entry.name for entry in found}:
        what = f"no package of this environment offers vLLM the plugin {PLUGIN}"
        fix = "pip install 'weightsync-orchestrator[vllm]' into the environment of vLLM itself"
        yield Finding("error", what, fix, "plugin")
    else:
        yield Finding("ok", f"{PLUGIN} is offered to vLLM", check="plugin")


def nixl(gpus: int) -> Iterator[Finding]:
    """Whether NIXL can be imported, and whether its UCX has CUDA where there are ``gpus``."""
    try:
        bindings = load()
    except NixlMissingError as error:
        yield Finding("error", str(error), "pip install nixl", "nixl")
        return
    yield Finding("ok", f"{bindings.package} {release_of(bindings.package) or ''}".strip(), check="nixl")
    if gpus:
        yield from ucx_with_cuda(libraries_of(bindings))


def libraries_of(bindings: Bindings) -> Path:
    """Where the wheel of that build keeps the libraries that it brings."""
    package = Path(str(bindings.native.__file__)).parent
    return package.with_name(f"{package.name}.libs")


def ucx_with_cuda(libraries: Path) -> Iterator[Finding]:
    """Whether UCX's CUDA transports are there and load. ``libraries``: of NIXL's wheel."""
    found = sorted(libraries.glob(UCX_CUDA))
    if not libraries.is_dir():
        what = f"{libraries} is not there, so NIXL uses a UCX of the system: whether that has CUDA is not known"
        yield Finding("note", what, "ucx_info -d | grep cuda", "ucx")
    elif not found:
        what = f"the UCX in {libraries} has no CUDA transports: device memory cannot be sent"
        yield Finding("error", what, "pip install nixl-cu12 or nixl-cu13, as torch's CUDA", "ucx")
    else:
        try:
            ctypes.CDLL(str(found[0]))
        except OSError as error:
            what = f"UCX's CUDA transports do not load: {error}"
            yield Finding("error", what, "install the driver's libraries, and the NIXL build of torch's CUDA", "ucx")
        else:
            yield Finding("ok", "UCX has CUDA transports", check="ucx")


def torch_with_cuda(release: str | None, gpus: int) -> Iterator[Finding]:
    """``release``: torch's; a CPU build says so itself."""
    if gpus and release is not None and release.endswith("+cpu"):
        what = f"torch {release} is a CPU build, and this host has {gpus} GPUs"
        yield Finding("error", what, "install torch's CUDA build", "torch")
