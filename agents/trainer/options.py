"""Where a trainer's daemon and run are: from arguments, else the environment, else one small file.

The file is flat YAML with the same four keys, or the daemon's own configuration, of which ``run.id``, ``run.directory``
and ``credentials`` (for its ``trainer.token``) are read. Relative paths in it are relative to its folder.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from weightsync.agents.errors import AgentError

StrPath = str | os.PathLike[str]

VARIABLES: Final = {
    "hub_url": "WEIGHTSYNC_HUB_URL",
    "token_file": "WEIGHTSYNC_TOKEN_FILE",
    "run_id": "WEIGHTSYNC_RUN_ID",
    "run_dir": "WEIGHTSYNC_RUN_DIR",
}
"""Setting → its environment variable. Inference ranks read the same ones."""

log = logging.getLogger(__name__)

FILE_VARIABLE: Final = "WEIGHTSYNC_CONFIG"
DEFAULT_FILE: Final = "weightsync.yaml"
TRAINER_TOKEN: Final = "trainer.token"
"""In the daemon's directory of credentials."""

PATHS: Final = ("token_file", "run_dir")

MAX_FILE_BYTES: Final = 1024 * 1024
"""The daemon's configuration of a thousand engines has a tenth of it."""


class TrainerSettingsError(AgentError, ValueError):
    """A setting that is missing or cannot be read. The message says where it may be given."""


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """``hub_url``: ``ws://host:port/agents``; ``token_file``: the trainer's token; ``run_dir``: of run ``run_id``."""

    hub_url: str
    token_file: Path
    run_id: str
    run_dir: Path


def trainer_settings(
    hub_url: str | None = None,
    token_file: StrPath | None = None,
    run_id: str | None = None,
    run_dir: StrPath | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> TrainerSettings:
    """All four settings; an argument wins over ``environment`` (None: the process's own), and that over the file.

    The file is the one that WEIGHTSYNC_CONFIG names, else ``weightsync.yaml`` in the working directory if it is there.
    It is read only for what is given nowhere else.

    Raises:
        TrainerSettingsError: something is missing, of a wrong type, or the file cannot be read.
    """
    environment = os.environ if environment is None else environment
    given: dict[str, StrPath] = {name: environment[key] for name, key in VARIABLES.items() if environment.get(key)}
    arguments = {"hub_url": hub_url, "token_file": token_file, "run_id": run_id, "run_dir": run_dir}
    given |= {name: _text(name, value, "argument") for name, value in arguments.items() if value is not None}
    named = environment.get(FILE_VARIABLE, "")
    if given.keys() != VARIABLES.keys():
        file = Path(named or DEFAULT_FILE)
        given = (_from_file(file) if named or file.exists() else {}) | given
    missing = [name for name in VARIABLES if not given.get(name)]
    if missing:
        raise TrainerSettingsError("; ".join(_where(name, named) for name in missing))
    return TrainerSettings(
        str(given["hub_url"]), Path(given["token_file"]), str(given["run_id"]), Path(given["run_dir"])
    )


def _where(name: str, named: str) -> str:
    file = f"{named} (which {FILE_VARIABLE} names)" if named else f"./{DEFAULT_FILE} or the file of {FILE_VARIABLE}"
    return f"no {name}: give the argument {name}=, the variable {VARIABLES[name]}, or the key {name} in {file}"


def _text(name: str, value: object, where: str) -> str:
    # os.fspath would take bytes, too, and a run that is named 7 in YAML is an integer there.
    if name in PATHS and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        wanted = "a path" if name in PATHS else "text"
        raise TrainerSettingsError(f"{name} ({where}) must be {wanted}, got {type(value).__name__} {value!r}")
    return value


def _from_file(file: Path) -> dict[str, StrPath]:
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise TrainerSettingsError(f"{file} has more than {MAX_FILE_BYTES} bytes: name the trainer's small file")
        document = yaml.safe_load(text)
    except OSError as error:
        raise TrainerSettingsError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        # The last three are PyYAML's own, of a scalar that is not what its tag says: ``!!timestamp x``.
        raise TrainerSettingsError(f"{file} is no YAML: {error}") from error
    found = document or {}
    if not isinstance(found, dict):
        raise TrainerSettingsError(f"{file} must hold the keys {', '.join(VARIABLES)}, got {type(found).__name__}")
    if isinstance(found.get("run"), dict):
        found = _from_daemon(found)
    unknown = [str(key) for key in found if key not in VARIABLES]
    if unknown:
        raise TrainerSettingsError(f"{file} has the unknown key {unknown[0]!r}; there are {', '.join(VARIABLES)}")
    texts = {name: _text(name, found[name], str(file)) for name in VARIABLES if found.get(name) is not None}
    return {name: file.parent / value if name in PATHS else value for name, value in texts.items() if value}


def _from_daemon(document: dict[object, object]) -> dict[object, object]:
    """What the daemon's own configuration says of a trainer; where its agents reach it is no part of it."""
    run, credentials = document.get("run"), document.get("credentials")
    run = run if isinstance(run, dict) else {}
    token = f"{credentials}/{TRAINER_TOKEN}" if isinstance(credentials, str) and credentials else None
    return {"run_id": run.get("id"), "run_dir": run.get("directory"), "token_file": token}


def compare_run_dirs(settings: TrainerSettings, theirs: str) -> None:
    """Tell at once that markers will not be seen. The same directory may have two paths on two hosts.

    Raises:
        TrainerSettingsError: the trainer's does not exist.
    """
    ours = settings.run_dir
    if not ours.is_dir():
        raise TrainerSettingsError(f"run_dir {ours} is no directory on this host; the daemon watches {theirs}")
    if os.path.realpath(ours) != os.path.realpath(theirs) and not (os.path.exists(theirs) and ours.samefile(theirs)):
        log.warning("run_dir is %s here, the daemon watches %s: no version begins unless they are one", ours, theirs)
