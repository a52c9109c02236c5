"""The packages of this environment, and of others."""

import ctypes.util
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from weightsync.agents.environment import packages
from weightsync.agents.transport.nixl.errors import NixlMissingError
from weightsync.agents.transport.nixl.loader import load


def test_releases_of_this_environment() -> None:
    assert packages.release_of("torch") is not None
    assert packages.release_of("vllm") is not None  # under the name of its CPU build
    assert packages.release_of("no-such-package") is None


@pytest.mark.parametrize(
    ("package", "release", "level"),
    [
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.6.0", "ok"),
        ("torch", "2.5.1", "error"),
        ("torch", None, "error"),
        ("vllm", "0.32.0", "ok"),
        ("vllm", "0.9.2", "error"),
        ("vllm", "dev", "ok"),
    ],
)
def test_required(package: str, release: str | None, level: str) -> None:
    assert [finding.level for finding in packages.required(package, release)] == [level]


def test_the_plugin_is_offered_here_and_may_be_missing_elsewhere() -> None:
    assert [f.level for f in packages.plugin()] == ["ok"]
    other = EntryPoint("lora", "lora:register", packages.PLUGIN_GROUP)
    assert [f.level for f in packages.plugin([other])] == ["error"]


def test_nixl_is_here_and_may_be_missing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    [found] = packages.nixl(gpus=0)
    assert (found.level, found.what.partition(" ")[0]) == ("ok", load().package)
    assert len(list(packages.nixl(gpus=8))) == 2

    def missing() -> None:
        raise NixlMissingError("NIXL cannot be imported")

    monkeypatch.setattr(packages, "load", missing)
    assert [f.level for f in packages.nixl(gpus=0)] == ["error"]


def test_ucx_with_and_without_cuda(tmp_path: Path) -> None:
    [unknown] = packages.ucx_with_cuda(tmp_path / "none.libs")
    assert unknown.level == "note"
    (tmp_path / "ucx").mkdir()
    [without] = packages.ucx_with_cuda(tmp_path)
    assert (without.level, "has no CUDA transports" in without.what) == ("error", True)
    library = tmp_path / "ucx/libuct_cuda.so.0"
    library.write_bytes(b"no library")
    [broken] = packages.ucx_with_cuda(tmp_path)
    assert (broken.level, "do not load" in broken.what) == ("error", True)
    library.unlink()
    real = Path("/proc/self/maps").read_text()
    libc = next(line.split()[-1] for line in real.splitlines() if "libc.so" in line)
    shutil.copy(libc, library)
    assert ctypes.util.find_library("c") is not None
    assert [f.level for f in packages.ucx_with_cuda(tmp_path)] == ["ok"]


def test_the_wheel_of_this_environment_brings_ucxs_cuda_transports() -> None:
    libraries = packages.libraries_of(load())
    assert list(libraries.glob(packages.UCX_CUDA)) != []


def test_a_cpu_build_on_a_host_with_gpus() -> None:
    assert [f.level for f in packages.torch_with_cuda("2.13.0+cpu", 8)] == ["error"]
    assert list(packages.torch_with_cuda("2.13.0+cpu", 0)) == []
    assert list(packages.torch_with_cuda("2.13.0+cu130", 8)) == []
    assert list(packages.torch_with_cuda(None, 8)) == []
