"""Loads the CUDA runtime globally before any library can put a stub of it first in the process.

Some packages carry a stub of libcudart whose symbols win ``dlsym``'s search when it is loaded globally first; UCX then
calls the stub, which aborts the process. Whatever is global first wins, so the real one has to be. A machine without
CUDA has none, and needs none. Only the standard library is used here: this runs before anything else of the agents.
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_NAME = re.compile(r"libcudart\.so\.(\d+)")
_MAPS: Final = Path("/proc/self/maps")
_SONAMES: Final = ("libcudart.so.13", "libcudart.so.12")
"""What the dynamic linker is asked for last: the majors that torch and NIXL are built for."""


def cudart() -> str | None:
    """Load libcudart with RTLD_GLOBAL. The path or name that was loaded; None if there is none that loads.

    In this order: the one already in the process; the wheel folders on ``sys.path`` (the major that torch was built
    for, then the newest); a CUDA toolkit (CUDA_HOME); the dynamic linker's own search.
    """
    for candidate in _candidates():
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return candidate
    return None


def _candidates() -> Iterator[str]:
    yield from _loaded()
    paths = [Path(entry) for entry in sys.path if entry]
    wanted = _torch_major(paths)
    found = [lib for path in paths for lib in path.glob("nvidia/*/lib/libcudart.so.*")]
    if home := os.environ.get("CUDA_HOME"):
        found += Path(home).glob("lib64/libcudart.so.*")
    yield from (str(lib) for lib in sorted(found, key=lambda lib: _rank(lib, wanted)))
    yield from _SONAMES


def _rank(library: Path, wanted: int | None) -> tuple[bool, int, int]:
    match = _NAME.match(library.name)
    major = int(match.group(1)) if match else 0
    return (major != wanted, -major, len(library.name))


def _loaded() -> list[str]:
    """Paths of a libcudart that the process has mapped already."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "libcudart.so" in line)
    return list(dict.fromkeys(path for path in paths if _NAME.match(Path(path).name)))


def _torch_major(paths: Iterable[Path]) -> int | None:
    """CUDA major that the installed torch was built for, read from its version file: importing torch would be too
    early here."""
    for path in paths:
        try:
            text = (path / "torch" / "version.py").read_text()
        except OSError:
            continue
        match = re.search(r"^cuda\b[^=\n]*=\s*'(\d+)\.", text, re.MULTILINE)
        return int(match.group(1)) if match else None
    return None
