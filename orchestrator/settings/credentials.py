"""Who may do what: a directory of token files, each named after the role that its holders have.

``trainer.token`` and ``engine.token`` admit agents, ``viewer.token`` shows, ``operator.token`` may ask for verbs, too.
``engine.NAME.token`` admits the agents of that engine only, ``trainer.RANK.token`` that rank; of a viewer or an
operator the name says who it is. A file holds one token, or two while the first takes the place of the second.
"""

import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from weightsync.orchestrator.protocol.names import IDENTIFIER, Member
from weightsync.orchestrator.protocol.text import clean
from weightsync.orchestrator.protocol.token import MIN_TOKEN_CHARS
from weightsync.orchestrator.settings.problems import ConfigError, Problem
from weightsync.orchestrator.settings.secrets import read_tokens

Role = Literal["trainer", "engine", "viewer", "operator"]

ROLES: Final[tuple[Role, ...]] = get_args(Role)
AGENTS: Final[frozenset[Role]] = frozenset({"trainer", "engine"})

SUFFIX: Final = ".token"

MAX_CREDENTIALS: Final = 16_384
"""Files of one directory: one for each engine of the largest fleet, four times over."""

_NAME: Final = re.compile(rf"({'|'.join(ROLES)})(?:\.({IDENTIFIER}))?")

_ROLE_OF: Final[dict[str, Role]] = {"trainer": "trainer", "inference": "engine"}


@dataclass(frozen=True, slots=True)
class Credential:
    """A role, and the name that it is bound to (empty: to none)."""

    role: Role
    name: str = ""

    def __str__(self) -> str:
        return f"{self.role} {self.name}".rstrip()

    def agrees(self, other: "Credential") -> bool:
        """Whether both may be of one holder: the same role, and no two names."""
        return self.role == other.role and (self.name == other.name or "" in (self.name, other.name))

    def refuses(self, member: Member) -> str:
        """Why this credential does not admit ``member``; empty where it does."""
        if self.role != _ROLE_OF[member.role]:
            role = _ROLE_OF[member.role]
            fix = f"give it the token in {role}{SUFFIX}"
            return f"{member} is a member of role {role} and came with the credential of role {self.role}; {fix}"
        bound = str(member.rank) if self.role == "trainer" else member.engine
        return "" if self.name in ("", bound) else f"{member} came with the credential of {self}, which is bound to it"

    def refuses_engine(self, name: str) -> str:
        """Why this credential does not make the engine ``name`` a member; empty where it does."""
        if self.role != "engine":
            return f"engine {name!r} came with the credential of role {self.role}; give it the token in engine{SUFFIX}"
        fix = f"give it the token in engine.{name}{SUFFIX}, or set its name"
        bound = f"engine {name!r} came with the credential of {self}, which is bound to it; {fix}"
        return "" if self.name in ("", name) else bound


def read_credentials(directory: Path) -> dict[str, Credential]:
    """Token → credential, of all token files in ``directory``; what else is there is left alone.

    Raises:
        ConfigError: names the file that cannot be used: no role's name, unsafe, too short, a token of another file; or
            the directory, where no trainer's or no engine's agent could come in.
    """
    found: dict[str, Credential] = {}
    for path in _files(directory):
        credential = _named(path)
        for token in read_tokens(path):
            if len(token) < MIN_TOKEN_CHARS:
                problem = f"holds a token of {len(token)} characters, which can be guessed"
                raise ConfigError(path, Problem("", "", problem, f"openssl rand -hex 32 > {path}"))
            if token in found:
                problem = f"holds the token of another file, that of {found[token]}"
                raise ConfigError(path, Problem("", "", problem, "give each credential a token of its own"))
            found[token] = credential
    roles = Counter(credential.role for credential in found.values())
    missing = [role for role in ROLES if role in AGENTS and not roles[role]]
    if missing:
        problem = f"has no {' and no '.join(role + SUFFIX for role in missing)}, so no agent could come in"
        raise ConfigError(directory, Problem("", "", problem, f"weightsync-orchestrator tokens {directory}"))
    return found


def tokens_of_engines(known: Mapping[str, Credential]) -> dict[str, tuple[str, ...]]:
    """By name of an engine the tokens that are bound to it; by the empty name those that any engine may hold."""
    found: dict[str, tuple[str, ...]] = {}
    for token, credential in known.items():
        if credential.role == "engine":
            found[credential.name] = (*found.get(credential.name, ()), token)
    return found


def role_file(directory: Path, role: Role) -> Path:
    """Where the token of ``role`` is that is bound to no name."""
    return directory / f"{role}{SUFFIX}"


def make_tokens(directory: Path, roles: tuple[str, ...] = ROLES) -> list[Path]:
    """Write a file with a new token for each of ``roles`` (``engine``, ``engine.NAME``) that has none yet; those made.

    Raises:
        ConfigError: no role's name.
        OSError: the directory cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = []
    for role in roles:
        path = directory / f"{role}{SUFFIX}"
        _named(path)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        with open(file, "w") as stream:
            stream.write(secrets.token_hex(32) + "\n")
        made.append(path)
    return made


def _files(directory: Path) -> list[Path]:
    try:
        paths = sorted(path for path in directory.iterdir() if path.name.endswith(SUFFIX))
    except OSError as error:
        problem = f"cannot be read as a directory of token files: {error.strerror}"
        raise ConfigError(directory, Problem("", "", problem, f"weightsync-orchestrator tokens {directory}")) from error
    if len(paths) > MAX_CREDENTIALS:
        problem = f"holds {len(paths)} token files, more than {MAX_CREDENTIALS}"
        raise ConfigError(directory, Problem("", "", problem, "keep those that this run needs"))
    return paths


def credential_named(text: str) -> Credential | None:
    """The credential that ``ROLE`` or ``ROLE.NAME`` names."""
    matched = _NAME.fullmatch(text)
    role = next((role for role in ROLES if matched is not None and role == matched[1]), None)
    return None if matched is None or role is None else Credential(role, matched[2] or "")


def _named(path: Path) -> Credential:
    credential = credential_named(path.name.removesuffix(SUFFIX))
    if credential is None:
        names = ", ".join(f"{role}{SUFFIX}" for role in ROLES)
        problem, fix = f"{clean(path.name, 100)!r} is no role's name", f"name it one of {names}, or ROLE.NAME{SUFFIX}"
        raise ConfigError(path, Problem("", "", problem, fix))
    return credential
