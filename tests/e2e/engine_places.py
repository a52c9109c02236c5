"""Environments of engines' servers, as an operator sets them."""

import os
from pathlib import Path

from weightsync.agents.inference.place import LOOPBACK_VARIABLE, TOKEN_VARIABLE, VARIABLES

TOKEN = "engine-0123456789"
ALL = (TOKEN_VARIABLE, LOOPBACK_VARIABLE, *VARIABLES.values())


def token_file(directory: Path, token: str = TOKEN) -> Path:
    """A file with an engine's token."""
    path = directory / "engine.token"
    path.touch(mode=0o600)
    path.write_text(token + "\n")
    return path


def place(token: Path, hub_url: str, run_id: str, engine: str) -> dict[str, str]:
    """All that says whose an engine is."""
    given = {"hub_url": hub_url, "run_id": run_id, "engine": engine}
    return {TOKEN_VARIABLE: str(token), **{VARIABLES[field]: value for field, value in given.items()}}


def without() -> dict[str, str]:
    """This process's environment without any of it."""
    return {name: value for name, value in os.environ.items() if name not in ALL}
