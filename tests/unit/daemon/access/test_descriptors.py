"""The limit of descriptors: raised, and held against the fleet."""

import resource

import pytest
from weightsync.orchestrator.daemon.access import descriptors
from weightsync.orchestrator.daemon.access.descriptors import RESERVE, limit, needed, raise_limit, reachable, too_few
from weightsync.orchestrator.settings.sections import EngineSection

ENGINES = (
    EngineSection(name="a", url="http://a:1"),
    EngineSection(name="b", url="http://b:1", more_urls=("http://b:2",)),
)


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


def test_the_fleet_is_held_against_it() -> None:
    assert needed(ENGINES, 16) == RESERVE + 16 + 9
    assert too_few(RESERVE + 25, ENGINES, 16) is None
    said = str(too_few(RESERVE + 24, ENGINES, 16))
    assert said == (
        f"this process may open {RESERVE + 24} files, and 2 engines and 16 trainer ranks need {RESERVE + 25} at the"
        " least. Fix: LimitNOFILE=65536 in the systemd unit, or ulimit -Hn"
    )
    assert "some trainer ranks" in str(too_few(10, ENGINES, None))
