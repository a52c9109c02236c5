"""Fixtures of the chaos tests: real processes, and a witness that never stops asking."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from network import Network, Unavailable
from serving import VllmServer, tiny_qwen3
from several import NAMES
from witness import Scene


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with the weights of seed 1."""
    return tiny_qwen3(tmp_path_factory.mktemp("models") / "qwen3-seed1", seed=1)


@pytest.fixture(scope="module")
def scene(request: pytest.FixtureRequest, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One vLLM for all tests of a module, asked by a witness from its start to its end; daemon and trainer started.

    Versions land as the module's ``MODE`` says, and as they do by default without one. When the last test is over,
    every answer that the witness ever got is compared with those of the versions.
    """
    directory = tmp_path_factory.mktemp("scene")
    mode = getattr(request.module, "MODE", "")
    env = {"WEIGHTSYNC_MODE": mode} if mode else {}
    server = VllmServer(qwen3, env=env, log=directory / "vllm.log")
    scene = Scene(directory, server)
    try:
        scene.open()
        yield scene
        scene.judge()
    finally:
        scene.close()
        server.close()


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A host for each stand-in engine and for two trainers, beside the one of the test, which is the daemon's."""
    try:
        network = Network([*NAMES, "trainer", "another"])
    except Unavailable as reason:
        pytest.skip(f"no network namespaces can be made here: {reason}")
    try:
        yield network
    finally:
        network.close()
