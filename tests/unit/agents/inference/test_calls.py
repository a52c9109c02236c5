"""Bodies of an engine's calls: what is missing, wrong or contradicts the environment is named."""

from typing import Any

import pytest
import torch
from weightsync.agents.inference import calls
from weightsync.orchestrator.protocol.names import RoundName, Version

INIT = {
    "hub_url": "ws://127.0.0.1:9000",
    "token_file": "/run/secrets/token",
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
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in calls.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)


def test_init_info() -> None:
    info = calls.parse_init_info(INIT)
    assert (info.hub_url, info.engine, info.world) == ("ws://127.0.0.1:9000", "engine-0", 2)
    assert info == calls.parse_init_info(dict(INIT))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hub_url": ""}, "hub_url"),
        ({"world": 0}, "world"),
        ({"world": "2"}, "world"),
        ({"deadline_seconds": 30.0}, "deadline_seconds"),
        ({"token": "secret"}, "token"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(calls.InfoError, match=f"init_info: .*{named}"):
        calls.parse_init_info({**INIT, **change})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(calls.InfoError, match="engine"):
        calls.parse_init_info({name: value for name, value in INIT.items() if name != "engine"})


def test_the_environment_fills_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_TOKEN_FILE", "/etc/token")
    body = {name: value for name, value in INIT.items() if name != "token_file"}
    assert calls.parse_init_info(body).token_file == "/etc/token"


def test_nobody_redirects_an_agent_whose_hub_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_HUB_URL", "wss://hub.example")
    with pytest.raises(calls.InfoError, match="hub_url contradicts WEIGHTSYNC_HUB_URL"):
        calls.parse_init_info(INIT)
    assert calls.parse_init_info({**INIT, "hub_url": "wss://hub.example"}).hub_url == "wss://hub.example"


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
