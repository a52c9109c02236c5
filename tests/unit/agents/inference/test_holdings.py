"""What a worker's memory holds, as everybody in the worker reads it."""

from weightsync.agents.inference.holdings import Holdings
from weightsync.orchestrator.protocol.messages import EngineStatus
from weightsync.orchestrator.protocol.names import RoundName, Version

OLD, NEW = Version(7, 1), Version(7, 2)


def test_only_whole_committed_memory_that_no_round_stands_in_may_run() -> None:
    holdings = Holdings()
    assert not holdings.may_run
    for status, may_run in [
        (EngineStatus(applied=OLD), True),
        (EngineStatus(applied=OLD, standby=NEW), True),
        (EngineStatus(applied=OLD, held=True), True),
        (EngineStatus(applied=OLD, torn=True), False),
        (EngineStatus(applied=OLD, window=RoundName(1, 1)), False),
        (EngineStatus(standby=NEW), False),
    ]:
        holdings.status = status
        assert holdings.may_run is may_run


def test_each_change_leaves_the_rest_as_it_is() -> None:
    holdings = Holdings()
    holdings.committed(OLD)
    assert holdings.hold(True, "left out") == EngineStatus(applied=OLD, held=True)
    holdings.keep(NEW, (1, 2))
    holdings.tear(True)
    assert holdings.status == EngineStatus(applied=OLD, held=True, torn=True, standby=NEW, standby_digest=(1, 2))
    holdings.keep(None)
    assert holdings.status == EngineStatus(applied=OLD, held=True, torn=True)
    assert holdings.held_because == "left out"
    holdings.committed(NEW, OLD, (3, 4))
    assert holdings.status == EngineStatus(applied=NEW, standby=OLD, standby_digest=(3, 4))
    assert holdings.held_because == ""
