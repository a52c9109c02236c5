"""The token file as an agent reads it; what its bytes may be is the protocol's."""

import os
from pathlib import Path

import pytest
from weightsync.agents.link.token import read_token
from weightsync.orchestrator.protocol.token import TokenError


def test_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("a-secret\n")
    assert read_token(path) == "a-secret"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), (b"", "is empty"), (b"x" * 10_000_000, "longer than 4096 bytes")],
)
def test_a_file_that_cannot_serve_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.touch(mode=0o600)
        path.write_bytes(content)
    with pytest.raises(TokenError, match=f"token file {path}.*{reason}"):
        read_token(path)


@pytest.mark.parametrize(
    ("mode", "says", "fix"),
    [
        (0o644, "has mode 0644, so others can read it", "chmod 600"),
        (0o604, "has mode 0604, so others can read it", "chmod 600"),
        (0o620, "has mode 0620, so others can write it", "chmod go-w"),
    ],
)
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int, says: str, fix: str) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef")
    path.chmod(mode)
    with pytest.raises(TokenError, match=rf"^token file {path}: {says}. Fix: {fix} {path}$"):
        read_token(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_or_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    path, link = tmp_path / "token", tmp_path / "link"
    path.touch(mode=0o600)
    path.write_text("0123456789abcdef")
    link.symlink_to(path)
    assert read_token(link) == "0123456789abcdef"
    os.chown(link, 4711, 4711, follow_symlinks=False)
    with pytest.raises(TokenError, match=rf"^token file {link}: belongs to user 4711, not to us \(user 0\)"):
        read_token(link)
    os.chown(path, 4711, 4711)
    with pytest.raises(TokenError, match=rf"^token file {path}: belongs to user 4711, not to us \(user 0\)"):
        read_token(path)
