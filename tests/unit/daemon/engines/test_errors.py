"""What an engine's error says: whose fault it is, whether to try again, whether the request may have arrived."""

import pytest
from weightsync.orchestrator.daemon.engines.errors import (
    EngineError,
    EngineMisconfigured,
    EngineNotServable,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
    UnknownEngineKind,
)


@pytest.mark.parametrize(
    ("error", "fault", "retry", "sent"),
    [
        (EngineError("a", "GET /x", "odd"), "engine", True, True),
        (EngineUnreachable("a", "GET /x", "nobody there", sent=False), "network", True, False),
        (EngineUnreachable("a", "GET /x", "it broke"), "network", True, True),
        (EngineTimeout("a", "GET /x", 2.0), "engine", True, True),
        (EngineRefused("a", "GET /x", 500, ""), "engine", True, True),
        (EngineRefused("a", "GET /x", 429, ""), "engine", True, True),
        (EngineRefused("a", "GET /x", 404, ""), "engine", False, True),
        (EngineNotServable("a", "POST /resume", 500, "torn"), "engine", False, True),
        (EngineMisconfigured("a", "probe", "no route", "set it"), "config", False, True),
    ],
)
def test_whose_fault_and_what_now(error: EngineError, fault: str, retry: bool, sent: bool) -> None:
    assert (error.fault, error.retry, error.sent) == (fault, retry, sent)


def test_messages_name_the_engine_the_call_and_the_fix() -> None:
    assert str(EngineTimeout("a", "GET /x", 0.5)) == "engine a: GET /x: no whole answer within 0.5 s"
    assert str(EngineRefused("a", "GET /x", 503, "")) == "engine a: GET /x: answered 503"
    assert str(EngineRefused("a", "GET /x", 503, "busy")) == "engine a: GET /x: answered 503: busy"
    assert str(EngineMisconfigured("a", "probe", "no /x", "set it")) == "engine a: probe: no /x. Fix: set it"


def test_an_unknown_kind_is_the_configurations_fault() -> None:
    assert UnknownEngineKind("a", "k", ["vllm"]).fault == "config"
