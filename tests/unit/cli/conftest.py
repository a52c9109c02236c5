"""A configuration that the commands are given."""

from pathlib import Path

import pytest
from credentials import write_credentials
from ports import free_port


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A good configuration, its credentials, and a port that nobody listens on."""
    write_credentials(tmp_path / "credentials")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{id: glm, directory: run}}\nstate_directory: state\nlisten: {{port: {free_port()}}}\n"
        "credentials: credentials\n"
        "engines:\n  - {name: a, url: 'http://127.0.0.1:8000'}\n"
    )
    return path
