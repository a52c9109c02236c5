"""Secrets come from files of one line."""

from pathlib import Path

import pytest
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.secrets import read_secret


def test_secrets(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("abc-123\n")
    assert read_secret(path) == "abc-123"
    for bad in ("", "\n", "two\nlines", "with blank", "ä" * 10, "x" * 5000):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="is no secret: token file"):
            read_secret(path)
    path.chmod(0o604)
    with pytest.raises(ConfigError, match=rf"^{path}: has mode 0604, so others can read it. Fix: chmod 600 {path}$"):
        read_secret(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(tmp_path / "absent")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="secret cannot be read: embedded null byte"):
        read_secret(tmp_path / "a\0b")
