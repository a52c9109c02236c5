"""The limit of descriptors: raised, and held against the fleet."""

import resource
from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.access import descriptors
from weightsync.orchestrator.daemon.access.descriptors import RESERVE, limit, needed, raise_limit, reachable, too_few
from weightsync.orchestrator.settings.settings import Settings, load


def test_the_soft_limit_becomes_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert limit() == min(soft, 512)
        assert raise_limit() == reachable() == limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_limit_is_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = resource.RLIM_INFINITY
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: (endless, endless))
    assert (limit(), reachable()) == (1 << 20, 1 << 20)
    assert raise_limit() == 1 << 20, "and there is nothing to raise"


def settings(tmp_path: Path, rest: str, **engines: list[str]) -> Settings:
    config = tmp_path / "config.yaml"
    listed = [f"{{name: {name}, url: {urls[0]}, more_urls: {urls[1:]}}}" for name, urls in engines.items()]
    places = f"run: {{id: glm, directory: {tmp_path}}}\nstate_directory: {tmp_path}\ncredentials: {tmp_path}\n"
    config.write_text(f"{places}engines: [{', '.join(listed)}]\n{rest}")
    return load(config, {})


def test_the_fleet_is_held_against_it(tmp_path: Path) -> None:
    listed = settings(tmp_path, "trainer: {world: 16}", a=["http://a:1"], b=["http://b:1", "http://b:2"])
    assert needed(listed.engines, 16) == RESERVE + 16 + 9
    assert too_few(RESERVE + 25, listed) is None
    said = str(too_few(RESERVE + 24, listed))
    assert said == (
        f"this process may open {RESERVE + 24} files, and 2 engines and 16 trainer ranks need {RESERVE + 25} at the"
        " least. Fix: LimitNOFILE=65536 in the systemd unit, or ulimit -Hn"
    )
    assert "some trainer ranks" in str(too_few(10, settings(tmp_path, "", a=["http://a:1"])))


def test_so_are_engines_that_may_come_by_themselves(tmp_path: Path) -> None:
    admitting = settings(tmp_path, "engines_admit: {names: ['*'], hosts: ['*.x'], at_most: 4000}", a=["http://a:1"])
    assert too_few(RESERVE + 3 + 12_000, admitting) is None
    said = str(too_few(RESERVE + 3 + 11_999, admitting))
    assert "1 engines (and 4000 that engines_admit.at_most lets come) and some trainer ranks need 12131" in said
