"""The token file as the hub reads it, and the comparison with what a request carries."""

from pathlib import Path

import pytest
from aiohttp import hdrs
from aiohttp.test_utils import make_mocked_request
from weightsync.orchestrator.daemon.hub.token import bears, read_token
from weightsync.orchestrator.protocol.token import TokenError


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"two words", "without blanks"),
        (b"two\nlines", "without blanks"),
        ("ä".encode(), "printable ASCII"),
        (b"x" * 5000, "longer than 4096 bytes"),
    ],
)
def test_token_files_that_cannot_serve(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenError, match=reason):
        read_token(path)


def test_the_token_is_the_line_without_its_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"  a-secret\r\n")
    assert read_token(path) == "a-secret"


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("Bearer a-secret", True),
        ("Bearer a-secre", False),
        ("Bearer a-secret ", False),
        ("bearer a-secret", False),
        ("Basic a-secret", False),
        ("a-secret", False),
        ("", False),
    ],
)
def test_only_the_bearer_of_the_very_token(header: str, allowed: bool) -> None:
    request = make_mocked_request("GET", "/agents", headers={hdrs.AUTHORIZATION: header})
    assert bears(request, "a-secret") is allowed
