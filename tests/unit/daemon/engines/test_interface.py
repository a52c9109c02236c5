"""The seam itself: what it shows, what it hides, and that every client that there is has all of it."""

import inspect

import pytest
from weightsync.orchestrator.daemon.engines.interface import EngineClient, EngineFacts, EngineSetup
from weightsync.orchestrator.daemon.engines.kinds import CLIENTS

METHODS = ("probe", "attach", "pause", "update", "switch", "landing", "finish", "resume", "is_paused", "close")


def test_the_life_of_a_client_is_these_methods() -> None:
    assert {name for name in vars(EngineClient) if not name.startswith("_")} == {"name", *METHODS}
    assert EngineClient.__module__ == "weightsync.orchestrator.daemon.engines.interface"


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_client_takes_what_the_seam_gives(kind: str, method: str) -> None:
    theirs, ours = getattr(CLIENTS[kind], method), getattr(EngineClient, method)
    assert inspect.iscoroutinefunction(theirs)
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)


def test_no_deadline_has_a_default() -> None:
    for method in METHODS:
        for name, parameter in inspect.signature(getattr(EngineClient, method)).parameters.items():
            assert parameter.default is inspect.Parameter.empty, f"{method}({name})"


def test_a_key_is_not_shown() -> None:
    assert "k3y" not in repr(EngineSetup("a", "http://h", "k3y", "keep", "recompute"))


def test_notes_are_optional() -> None:
    assert EngineFacts("odd 1", 2).notes == ()
