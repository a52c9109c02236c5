"""Each weak setting of an agent's environment that docs/security.md warns of, told by the command in a process."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest
from engine_places import place, token_file
from weightsync.orchestrator.cli.certs import make_certificates
from weightsync.orchestrator.protocol.findings import Findings

FAR: Final = "ws://192.0.2.7:7410/agents"


@contextlib.contextmanager
def nobody() -> Iterator[int]:
    """A port of this machine at which nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


def good(directory: Path, port: int) -> dict[str, str]:
    """An environment in which nothing is wrong but that no daemon answers."""
    make_certificates(directory / "tls", ["127.0.0.1"], ("engine",), 2)
    token = token_file(directory)
    run_directory = directory / "run"
    run_directory.mkdir(mode=0o700)
    return place(token, f"wss://127.0.0.1:{port}/agents", "glm", "a0") | {
        "VLLM_SERVER_DEV_MODE": "1",
        "WEIGHTSYNC_RUN_DIR": str(run_directory),
        "WEIGHTSYNC_CA_FILE": str(directory / "tls" / "ca.pem"),
        "WEIGHTSYNC_CERTIFICATE_FILE": str(directory / "tls" / "engine.pem"),
        "WEIGHTSYNC_KEY_FILE": str(directory / "tls" / "engine.key"),
    }


TLS: Final = ("WEIGHTSYNC_CA_FILE", "WEIGHTSYNC_CERTIFICATE_FILE", "WEIGHTSYNC_KEY_FILE")
PLAIN: Final = dict.fromkeys(TLS, "") | {"WEIGHTSYNC_HUB_URL": FAR}
DEMO: Final = dict.fromkeys(TLS, "") | {
    "WEIGHTSYNC_LOOPBACK_DEMO": "1", "WEIGHTSYNC_HUB_URL": "ws://127.0.0.1:9/agents",
}  # fmt: skip


def _short(directory: Path) -> None:
    (directory / "engine.token").write_text("hunter2\n")


def _mode(name: str, mode: int) -> Callable[[Path], None]:
    return lambda directory: (directory / name).chmod(mode)


def _nothing(_: Path) -> None:
    pass


WEAK: Final[dict[str, tuple[str, Callable[[Path], None], dict[str, str], str, str, str, str]]] = {
    "an engine without TLS": (
        "engine", _nothing, PLAIN, "warning", "WEIGHTSYNC_HUB_URL", f"{FAR} is not TLS", "wss:// here",
    ),
    "a trainer without TLS": (
        "trainer", _nothing, PLAIN, "warning", "WEIGHTSYNC_HUB_URL", f"{FAR} is not TLS", "wss:// here",
    ),
    "a demo": (
        "engine", _nothing, DEMO, "warning", "WEIGHTSYNC_LOOPBACK_DEMO", "WEIGHTSYNC_LOOPBACK_DEMO=1: whoever is on",
        "unset WEIGHTSYNC_LOOPBACK_DEMO",
    ),
    "routes that were opened": (
        "engine", _nothing, {"WEIGHTSYNC_PUBLIC_ROUTES": "/mine"}, "note", "WEIGHTSYNC_PUBLIC_ROUTES", "/mine", "unset",
    ),
    "calls that were allowed": (
        "engine", _nothing, {"WEIGHTSYNC_ALLOW_CALLS": "mine"}, "note", "WEIGHTSYNC_ALLOW_CALLS", "mine", "unset",
    ),
    "a server that nothing can guard": (
        "engine", _nothing, {"VLLM_USE_RUST_FRONTEND": "1"}, "error", "VLLM_USE_RUST_FRONTEND",
        "VLLM_USE_RUST_FRONTEND=1: nothing would stand", "unset VLLM_USE_RUST_FRONTEND",
    ),
    "an engine's token that others read": (
        "engine", _mode("engine.token", 0o644), {}, "error", "settings", "has mode 0644, so others can read it",
        "chmod 600",
    ),
    "a trainer's": (
        "trainer", _mode("engine.token", 0o644), {}, "error", "token", "has mode 0644, so others can read it",
        "chmod 600",
    ),
    "an engine's token that can be guessed": (
        "engine", _short, {}, "error", "settings", "a token of 7 characters, which can be guessed", "",
    ),
    "a trainer's that can be": (
        "trainer", _short, {}, "error", "token", "a token of 7 characters, which can be guessed", "credentials",
    ),
    "an authority that others write": (
        "engine", _mode("tls/ca.pem", 0o666), {}, "error", "TLS", "ca.pem: has mode 0666", "",
    ),
    "a key that others read": (
        "trainer", _mode("tls/engine.key", 0o644), {}, "error", "TLS", "engine.key: has mode 0644", "",
    ),
}  # fmt: skip
"""Role, how it is made weak, by which variables; then level, check, and words of evidence and fix."""


def told(role: str, environ: dict[str, str]) -> list[tuple[str, str, str, str]]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WEIGHTSYNC", "UCX", "VLLM"))}
    given = clean | {name: value for name, value in environ.items() if value}
    command = [sys.executable, "-m", "weightsync.agents", "doctor", role, "--json", "--timeout", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=given)
    assert done.stdout, done.stderr
    found = msgspec.json.decode(done.stdout, type=Findings).findings
    return [(each.level, each.check, each.what, each.fix) for each in found]


@pytest.mark.parametrize("what", WEAK)
def test_each_is_told_with_its_field_its_value_and_the_fix(what: str, tmp_path: Path) -> None:
    role, spoil, change, level, check, words, fix = WEAK[what]
    with nobody() as port:
        environ = good(tmp_path, port) | change
        spoil(tmp_path)
        found = [each for each in told(role, environ) if each[:2] == (level, check)]
    assert any(words in each[2] and fix in each[3] for each in found), found


@pytest.mark.parametrize("role", ["engine", "trainer"])
def test_a_good_environment_is_told_none_of_them(role: str, tmp_path: Path) -> None:
    with nobody() as port:
        found = told(role, good(tmp_path, port))
    for _, _, _, level, check, words, _ in WEAK.values():
        assert not [each for each in found if each[:2] == (level, check) and words in each[2]]
    assert [check for level, check, what, _ in found if level == "error"] == ["daemon"], found
