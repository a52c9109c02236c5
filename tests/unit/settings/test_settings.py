"""Settings: what loads, and from where."""

from pathlib import Path

import pytest
from settings_files import MINIMAL, Loaded, Refusal
from weightsync.orchestrator.settings.problems import MAX_PROBLEMS
from weightsync.orchestrator.settings.sections import HubSection, NixlSection
from weightsync.orchestrator.settings.settings import load


def test_defaults_and_paths_relative_to_the_file(config: Path, tmp_path: Path) -> None:
    settings = load(config, {})
    assert settings.run.directory == tmp_path / "runs/glm"
    assert settings.credentials == tmp_path / "credentials"
    assert settings.journal_path == tmp_path / "state" / "journal.sqlite"
    assert settings.agents_url == "http://127.0.0.1:7410"
    assert settings.transport == NixlSection(backends=("UCX",), in_flight_per_peer=100, rails=2)
    assert settings.rendezvous == HubSection()
    assert settings.pause.mode == "keep"
    assert settings.pause.cache == "recompute"
    deadlines = settings.deadlines
    assert (deadlines.quiesce_seconds, deadlines.transfer_seconds) == (60, 300)
    assert (deadlines.verify_seconds, deadlines.finish_seconds) == (120, 60)


def test_absolute_paths_stay(loaded: Loaded) -> None:
    assert loaded("", RUN__DIRECTORY="/shared/run").run.directory == Path("/shared/run")


def test_a_wildcard_needs_an_advertised_url(config: Path, refusal: Refusal) -> None:
    wildcard = MINIMAL.replace("{port", "{host: 0.0.0.0, insecure: true, port")
    assert "advertise_url" in str(refusal(wildcard))
    config.write_text(wildcard + "advertise_url: http://head:7410/\n")
    assert load(config, {}).agents_url == "http://head:7410"


def test_settings_cannot_be_changed(config: Path) -> None:
    settings = load(config, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.rescan_seconds = 1
    with pytest.raises(ValueError, match="frozen"):
        settings.run.id = "x"


def test_all_problems_are_told_at_once(refusal: Refusal) -> None:
    error = refusal(MINIMAL + "a: 1\nb: 2\nlog: {format: xml}\n")
    assert {problem.key for problem in error.problems} == {"a", "b", "log.format"}


def test_many_wrong_keys_cost_no_more_than_a_few(refusal: Refusal) -> None:
    """Each costs a search for what was meant."""
    error = refusal(MINIMAL + "".join(f"key_{number}: 1\n" for number in range(4000)))
    assert len(str(error).splitlines()) == MAX_PROBLEMS + 1
    assert len(error.problems) <= 4 * MAX_PROBLEMS


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("transport: {type: filesystem}", "transport.type: filesystem"),
        ("rendezvous: {type: tcpstore, host: head, port: 29501}", "rendezvous.type: tcpstore"),
    ],
)
def test_engines_write_to_each_other_over_nixl_and_the_hub_alone(refusal: Refusal, more: str, key: str) -> None:
    told = str(refusal(f"{MINIMAL}fan_out: auto\n{more}\n"))
    assert f"fan_out is auto, and with {key} engines cannot write to each other" in told
