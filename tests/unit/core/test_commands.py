"""Commands are values: equal when they say the same, and never changed."""

import pytest
from fleets import trainer
from weightsync.orchestrator.core import commands
from weightsync.orchestrator.core.commands import Command, LookForStable, SendPlan
from weightsync.orchestrator.protocol.messages import Connect

KINDS = [kind for kind in vars(commands).values() if isinstance(kind, type) and issubclass(kind, Command)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cause_is_named_where_it_is_given(kind: type[Command]) -> None:
    """It is the turn's to fill in, so that no call site can name another event."""
    assert "cause" not in kind.__match_args__


def test_they_are_frozen_values() -> None:
    connect = Connect(fingerprint="edges", root="root", peers=(), copies=b"", expected_bytes=0)
    assert SendPlan(trainer(), connect) == SendPlan(trainer(), connect)
    with pytest.raises(AttributeError):
        LookForStable(0.1, 5).after_seconds = 0.2  # type: ignore[misc]
