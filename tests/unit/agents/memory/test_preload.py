"""The real CUDA runtime must be the one that ``dlsym`` finds, also when a stub is loaded globally later."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from weightsync.agents.memory import preload

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles two tiny libraries")

PROBE = """
import ctypes
{first}
ctypes.CDLL({stub!r}, mode=ctypes.RTLD_GLOBAL)
print(ctypes.CDLL(None).cudaRuntimeGetVersion())
"""


def library(path: Path, answer: int) -> Path:
    """A shared library whose cudaRuntimeGetVersion returns ``answer``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"int cudaRuntimeGetVersion(void) {{ return {answer}; }}"
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source.encode(), check=True)
    return path


def answer(first: str, stub: Path, *search: Path) -> int:
    """Who answers in a fresh process that runs ``first`` and then loads the stub globally."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search))}
    environment.pop("CUDA_HOME", None)
    code = PROBE.format(first=first, stub=str(stub))
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout)


@needs_compiler
def test_the_stub_wins_without_the_preload_and_loses_with_it(tmp_path: Path) -> None:
    library(tmp_path / "site/nvidia/cu99/lib/libcudart.so.99", 99)
    stub = library(tmp_path / "stub/libtile_stub.so", 1)
    assert answer("", stub, tmp_path / "site") == 1
    assert answer("import weightsync.agents", stub, tmp_path / "site") == 99


@needs_compiler
def test_the_major_of_the_installed_torch_is_preferred(tmp_path: Path) -> None:
    library(tmp_path / "site/nvidia/cu98/lib/libcudart.so.98", 98)
    library(tmp_path / "site/nvidia/cu99/lib/libcudart.so.99", 99)
    version = tmp_path / "site/torch/version.py"
    version.parent.mkdir()
    version.write_text("__version__ = '9.9+cu981'\ncuda: str | None = '98.1'\n")
    stub = library(tmp_path / "stub/libtile_stub.so", 1)
    assert answer("import weightsync.agents", stub, tmp_path / "site") == 98


@needs_compiler
def test_a_library_that_is_loaded_already_is_made_global(tmp_path: Path) -> None:
    other = library(tmp_path / "elsewhere/libcudart.so.97", 97)
    library(tmp_path / "site/nvidia/cu99/lib/libcudart.so.99", 99)
    stub = library(tmp_path / "stub/libtile_stub.so", 1)
    first = f"ctypes.CDLL({str(other)!r}); import weightsync.agents"
    assert answer(first, stub, tmp_path / "site") == 97


def test_absence_is_tolerated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(preload, "_MAPS", tmp_path / "none")
    monkeypatch.setattr(preload, "_SONAMES", ("libcudart.so.no-such-thing",))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert preload.cudart() is None


def test_a_broken_file_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "nvidia/cu13/lib/libcudart.so.13"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(preload, "_MAPS", tmp_path / "none")
    monkeypatch.setattr(preload, "_SONAMES", ())
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert preload.cudart() is None
