"""What is read of a secret's file, and that it is the file that was looked at."""

import os
from pathlib import Path

import pytest
from weightsync.orchestrator.files import secret as secrets
from weightsync.orchestrator.files.ownership import NotOurs
from weightsync.orchestrator.files.secret import read_secret_bytes
from weightsync.orchestrator.protocol.token import MAX_TOKEN_BYTES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "token"
    made.touch(mode=0o600)
    return made


def test_no_more_is_read_than_shows_that_it_is_too_long(file: Path) -> None:
    file.write_bytes(b"0123456789abcdef\n")
    assert read_secret_bytes(file) == b"0123456789abcdef\n"
    file.write_bytes(b"x" * 1_000_000)
    assert read_secret_bytes(file) == b"x" * (MAX_TOKEN_BYTES + 1)


def test_what_cannot_be_read(file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_secret_bytes(file.parent / "absent")
    with pytest.raises(ValueError, match="null byte"):
        read_secret_bytes(file.parent / "a\0b")
    file.chmod(0o604)
    with pytest.raises(NotOurs, match="has mode 0604, so others can read it"):
        read_secret_bytes(file)


def test_another_file_that_came_to_its_place_is_looked_at_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = secrets.secret

    def exchanged(path: Path) -> Path:
        found = looked(path)
        other = path.parent / "other"
        other.write_text("fedcba9876543210")
        other.chmod(0o644)
        os.replace(other, path)
        return found

    monkeypatch.setattr(secrets, "secret", exchanged)
    with pytest.raises(NotOurs, match="has mode 0644, so others can read it"):
        read_secret_bytes(file)
