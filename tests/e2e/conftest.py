"""Fixtures of the e2e tests: tiny models, and servers that are gone when the test or its module is over."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from serving import Serve, VllmServer, tiny_qwen3

pytest.register_assert_rewrite("watched")


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with the weights of seed 1."""
    return tiny_qwen3(tmp_path_factory.mktemp("models") / "qwen3-seed1", seed=1)


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Starts a ``VllmServer`` without waiting for it; all of a module's are closed after its last test."""
    servers: list[VllmServer] = []

    def start(model: Path, **options: object) -> VllmServer:
        server = VllmServer(model, **options)  # type: ignore[arg-type]
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.close()
