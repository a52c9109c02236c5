"""The token file as an agent reads it; what its bytes may be is the protocol's."""

from pathlib import Path

import pytest
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.protocol.token import TokenError


def test_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("a-secret\n")
    assert read_token(path) == "a-secret"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"", "is empty"), (b"x" * 10_000_000, "longer than 4096 bytes")],
)
def test_a_file_that_cannot_serve_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenError, match=f"token file {path}.*{reason}"):
        read_token(path)
