"""Which keys may change while the daemon runs. Reading them again on SIGHUP is in test_runner, with a real daemon."""

from pathlib import Path
from typing import Any

import pytest
from weightsync.orchestrator.daemon import reload
from weightsync.orchestrator.daemon.engines.calls import Engines
from weightsync.orchestrator.daemon.inbox import Inbox
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import Settings, load


async def nothing_new() -> None:
    """The credentials are what they were."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text(f"""
run: {{id: glm, directory: {tmp_path / "run"}}}
state_directory: {tmp_path / "state"}
credentials: {tmp_path / "credentials"}
engines: [{{name: e0, url: "http://127.0.0.1:1"}}]
""")
    return load(file, {})


@pytest.mark.parametrize(
    ("key", "may"),
    [
        ("commit.min_engines", True),
        ("deadlines.stop_seconds", True),
        ("log.level", True),
        ("pause.mode", True),
        ("retry.backoff_seconds", True),
        ("trainer.world", True),
        ("engines[3].api_key_file", True),
        ("engines[0].url", True),
        ("engines", True),
        ("engines_from", False),
        ("deadlines.heartbeat_seconds", False),
        ("deadlines.lost_after_heartbeats", False),
        ("run.id", False),
        ("listen.port", False),
        ("transport", False),
        ("state_directory", False),
        ("rescan_seconds", False),
    ],
)
def test_what_may_change(key: str, may: bool) -> None:
    assert reload.may_change(key) is may


def test_differences_are_named_by_key(settings: Settings) -> None:
    assert list(reload.differences(settings, settings)) == []
    engine = settings.engines[0].model_copy(update={"url": "http://127.0.0.1:2"})
    run = settings.run.model_copy(update={"id": "other"})
    new = settings.model_copy(update={"run": run, "engines": (engine,)})
    assert list(reload.differences(settings, new)) == [
        ("run.id", "glm", "other"),
        ("engines[0].url", "http://127.0.0.1:1", "http://127.0.0.1:2"),
    ]
    more = settings.model_copy(update={"engines": (engine, engine)})
    assert list(reload.differences(settings, more)) == [("engines", "1 entries", "2 entries")]


async def test_a_key_file_that_cannot_be_read_leaves_all_as_it_was(settings: Settings, tmp_path: Path) -> None:
    events: list[Any] = []
    inbox = Inbox(events.extend)
    engines = Engines(settings, inbox)
    before = dict(engines.clients)
    engine = settings.engines[0].model_copy(update={"api_key_file": tmp_path / "absent"})
    again = reload.Reload(
        settings, lambda: settings.model_copy(update={"engines": (engine,)}), inbox, engines, nothing_new
    )
    with pytest.raises(Exception, match="absent"):
        await again.again()
    assert again.settings is settings
    assert engines.clients == before
    await engines.close()


async def test_a_fleet_for_which_there_are_too_few_descriptors_is_not_taken(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "limit", lambda: 131)
    inbox = Inbox(lambda _: None)
    engines = Engines(settings, inbox)
    more = settings.model_copy(update={"engines": (*settings.engines, settings.engines[0])})
    again = reload.Reload(settings, lambda: more, inbox, engines, nothing_new)
    with pytest.raises(ConfigError, match="may open 131 files, and 2 engines and some trainer ranks need 134"):
        await again.again()
    assert again.settings is settings
    await engines.close()


async def test_a_daemon_without_a_file_says_so(settings: Settings) -> None:
    inbox = Inbox(lambda _: None)
    engines = Engines(settings, inbox)
    with pytest.raises(ValueError, match="without a file"):
        await reload.Reload(settings, None, inbox, engines, nothing_new).again()
    await engines.close()
