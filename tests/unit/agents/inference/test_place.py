"""Whose an engine is: what its environment has to say, and what is wrong with what it says."""

from pathlib import Path

import pytest
from engine_places import place, token_file
from weightsync.agents.inference.place import Place, PlaceError, is_loopback, place_of


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return place(token_file(tmp_path), "ws://head:7410/agents", "glm", "a0")


def test_all_of_it(environ: dict[str, str], tmp_path: Path) -> None:
    assert place_of(environ) == Place(tmp_path / "engine.token", "ws://head:7410/agents", "glm", "a0")


@pytest.mark.parametrize("variable", ["HUB_URL", "TOKEN_FILE", "RUN_ID", "ENGINE"])
@pytest.mark.parametrize("value", [None, "", " "])
def test_what_is_missing_is_named_with_the_fix(environ: dict[str, str], variable: str, value: str | None) -> None:
    name = f"WEIGHTSYNC_{variable}"
    del environ[name]
    with pytest.raises(PlaceError, match=f"{name} not set .* Fix: set WEIGHTSYNC_HUB_URL="):
        place_of(environ | ({} if value is None else {name: value}))


def test_a_demo_needs_nothing_but_a_token(tmp_path: Path) -> None:
    environ = {"WEIGHTSYNC_LOOPBACK_DEMO": "1", "WEIGHTSYNC_TOKEN_FILE": str(token_file(tmp_path))}
    assert place_of(environ) == Place(tmp_path / "engine.token", "", "", "", demo=True)
    with pytest.raises(PlaceError, match="WEIGHTSYNC_TOKEN_FILE not set"):
        place_of({"WEIGHTSYNC_LOOPBACK_DEMO": "1"})


@pytest.mark.parametrize("value", ["0", ""])
def test_the_switch_can_be_off(environ: dict[str, str], value: str) -> None:
    assert not place_of(environ | {"WEIGHTSYNC_LOOPBACK_DEMO": value}).demo


@pytest.mark.parametrize("value", ["yes", "true", "2", "1 "])
def test_the_switch_is_on_or_off(environ: dict[str, str], value: str) -> None:
    with pytest.raises(PlaceError, match=r"WEIGHTSYNC_LOOPBACK_DEMO is .* 0 or 1"):
        place_of(environ | {"WEIGHTSYNC_LOOPBACK_DEMO": value})


def test_no_demo_with_a_daemon_elsewhere(environ: dict[str, str]) -> None:
    with pytest.raises(PlaceError, match="WEIGHTSYNC_HUB_URL is ws://head:7410/agents"):
        place_of(environ | {"WEIGHTSYNC_LOOPBACK_DEMO": "1"})


def test_a_token_that_cannot_serve(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(PlaceError, match="WEIGHTSYNC_TOKEN_FILE: token file /absent: No such file"):
        place_of(environ | {"WEIGHTSYNC_TOKEN_FILE": "/absent"})
    token_file(tmp_path, "short")
    with pytest.raises(PlaceError, match=r"a token of 5 characters, which can be guessed; openssl rand -hex 32"):
        place_of(environ)
    (tmp_path / "engine.token").touch(mode=0o600)
    (tmp_path / "engine.token").write_text("three\nlines\nof it\n")
    with pytest.raises(PlaceError, match="holds 3 lines"):
        place_of(environ)


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("ws://127.0.0.1:1/agents", True),
        ("wss://[::1]:1/agents", True),
        ("ws://localhost/agents", True),
        ("ws://127.9.9.9/agents", True),
        ("ws://localhost.example/agents", False),
        ("ws://127.0.0.1@head/agents", False),
        ("ws://head/127.0.0.1", False),
        ("127.0.0.1", False),
        ("ws://[", False),
        ("", False),
    ],
)
def test_what_is_on_this_machine(url: str, is_here: bool) -> None:
    assert is_loopback(url) is is_here
