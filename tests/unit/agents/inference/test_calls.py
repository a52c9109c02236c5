"""Bodies of an engine's calls: what is missing, wrong or contradicts the environment is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_places import ALL, place, token_file
from weightsync.agents.inference import calls
from weightsync.orchestrator.protocol.names import RoundName, Version

INIT = {
    "hub_url": "ws://127.0.0.1:9000/agents",
    "run_id": "run",
    "engine": "engine-0",
    "world": 2,
}
UPDATE = {
    "token": "1.7",
    "round_epoch": 1,
    "round_number": 7,
    "generation": 9,
    "step": 100,
    "deadline_seconds": 60.0,
}


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment says the same as INIT."""
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    token = token_file(tmp_path)
    for name, value in place(token, INIT["hub_url"], INIT["run_id"], INIT["engine"]).items():  # type: ignore[arg-type]
        monkeypatch.setenv(name, value)
    return token


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, token: Path) -> None:
    """A demo whose environment says nothing but where the token is."""
    for name in ("WEIGHTSYNC_HUB_URL", "WEIGHTSYNC_RUN_ID", "WEIGHTSYNC_ENGINE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("WEIGHTSYNC_LOOPBACK_DEMO", "1")


def test_init_info(token: Path) -> None:
    info = calls.parse_init_info(INIT)
    assert (info.hub_url, info.engine, info.world) == ("ws://127.0.0.1:9000/agents", "engine-0", 2)
    assert (info.run_id, info.token_file) == ("run", str(token))
    assert info == calls.parse_init_info(dict(INIT))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"world": 0}, "world"),
        ({"world": "2"}, "world"),
        ({"deadline_seconds": 30.0}, "deadline_seconds"),
        ({"token": "secret"}, "token"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(calls.InfoError, match=f"init_info: .*{named}"):
        calls.parse_init_info({**INIT, **change})


def test_only_the_world_has_to_be_said() -> None:
    assert calls.parse_init_info({"world": 2}) == calls.parse_init_info(INIT)
    with pytest.raises(calls.InfoError, match="world"):
        calls.parse_init_info({name: value for name, value in INIT.items() if name != "world"})


@pytest.mark.parametrize("field", ["hub_url", "run_id", "engine"])
@pytest.mark.parametrize("other", ["other", "", None, 7, "x" * 10_000])
def test_nothing_may_be_said_otherwise(field: str, other: object) -> None:
    with pytest.raises(calls.InfoError, match=rf"init_info.{field} contradicts WEIGHTSYNC_.*belongs to '") as refusal:
        calls.parse_init_info({**INIT, field: other})
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("path", ["/etc/shadow", "", None])
@pytest.mark.usefixtures("demo")
def test_nobody_names_a_path_from_outside(path: object) -> None:
    with pytest.raises(calls.InfoError, match=r"init_info\.token_file: WEIGHTSYNC_TOKEN_FILE"):
        calls.parse_init_info({**INIT, "token_file": path})


def test_without_a_place_nobody_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHTSYNC_RUN_ID")
    with pytest.raises(calls.InfoError, match="WEIGHTSYNC_RUN_ID not set"):
        calls.parse_init_info(INIT)


@pytest.mark.usefixtures("demo")
def test_a_demo_takes_the_rest_from_a_daemon_on_its_machine(token: Path) -> None:
    info = calls.parse_init_info(INIT)
    assert (info.hub_url, info.token_file) == (INIT["hub_url"], str(token))
    for url in ("ws://10.0.0.1:7410/agents", "ws://127.0.0.1.evil.example/agents", "ws://[::2]/agents", "ws://[/"):
        with pytest.raises(calls.InfoError, match="is not on this machine"):
            calls.parse_init_info({**INIT, "hub_url": url})
    with pytest.raises(calls.InfoError, match="engine"):
        calls.parse_init_info({name: value for name, value in INIT.items() if name != "engine"})


def test_update_info() -> None:
    info = calls.parse_update_info(UPDATE, calls.UpdateInfo)
    assert (info.token, info.round_number, info.step) == ("1.7", 7, 100)


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"token": None}, {"extra": 1}, *({"deadline_seconds": bad} for bad in (-1.0, 0, float("nan")))],
)
def test_a_wrong_update_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(calls.InfoError, match="update_info"):
        calls.parse_update_info({**UPDATE, **change}, calls.UpdateInfo)


def test_switch_info_as_json_brings_it() -> None:
    order = {"round": [3, 9], "version": [7, 40], "incarnations": {"0": 2**62, "1": 5}, "cache": "drop"}
    info = calls.parse_switch_info({**order, "deadline_seconds": 5.0})
    assert (info.round, info.version, info.cache) == (RoundName(3, 9), Version(7, 40), "drop")
    assert info.incarnations == {0: 2**62, 1: 5}
    with pytest.raises(calls.InfoError, match=r"switch: .*deadline_seconds"):
        calls.parse_switch_info(order)


def test_synchronising_the_cpu_is_harmless() -> None:
    calls.synchronize(torch.device("cpu"))
