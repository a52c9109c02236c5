"""Every error of the daemon that decides something is in the tree, and the tree in the docstring."""

import inspect
from typing import get_args

import pytest
from weightsync.orchestrator.core import errors
from weightsync.orchestrator.core.errors import NO_TROUBLE, PeerMisbehaved, Trouble, WeightsyncError
from weightsync.orchestrator.daemon.engines.errors import (
    EngineError,
    EngineMisconfigured,
    EngineRefused,
    EngineUnreachable,
)
from weightsync.orchestrator.daemon.group.child import TcpStoreError
from weightsync.orchestrator.daemon.journal import JournalError, JournalLost
from weightsync.orchestrator.planner.errors import PlanError, ProofFailed
from weightsync.orchestrator.protocol.messages import Fault
from weightsync.orchestrator.protocol.names import Member

TREE = [
    errors.InvariantViolation, errors.ImpossibleTransition, errors.JournalUnreadable, errors.RecordUnwritable,
    JournalError, JournalLost, PlanError, ProofFailed, TcpStoreError, EngineError, EngineUnreachable,
    EngineMisconfigured,
]  # fmt: skip


@pytest.mark.parametrize("kind", TREE)
def test_each_says_whose_fault_it_is(kind: type[WeightsyncError]) -> None:
    assert issubclass(kind, WeightsyncError)
    assert kind.fault in get_args(Fault)
    assert kind.fault
    line = next(line for line in str(inspect.getdoc(errors)).splitlines() if kind.__name__ in line)
    assert kind.fault in line


@pytest.mark.parametrize(("status", "retry"), [(503, True), (429, True), (404, False), (401, False)])
def test_whether_a_refused_call_is_worth_a_second(status: int, retry: bool) -> None:
    assert EngineRefused("e0", "POST /pause", status, "").retry is retry


def test_a_peer_that_misbehaves_is_named_with_its_connection() -> None:
    error = PeerMisbehaved(Member("trainer", "", 3), 7, "says CLOSED without a grant")
    assert str(error) == "trainer/3: says CLOSED without a grant"
    assert (error.member, error.connection, error.reason) == (
        Member("trainer", "", 3), 7, "says CLOSED without a grant",
    )  # fmt: skip


def test_a_round_that_goes_well_has_no_trouble() -> None:
    assert Trouble("") == NO_TROUBLE
    assert Trouble("the wire broke", "network").retry, "most troubles pass"
