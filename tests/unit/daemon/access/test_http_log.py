"""What stands in for the logger of aiohttp's server; that the server uses it is in ``test_door.py``."""

import structlog
from aiohttp.http_exceptions import BadStatusLine
from weightsync.orchestrator.daemon.access.http_log import MAX_SHOWN, HttpLog
from weightsync.orchestrator.daemon.access.refusals import LOUD, Refusals


def test_no_http_is_a_refusal_without_a_traceback() -> None:
    log = HttpLog(Refusals())
    with structlog.testing.capture_logs() as logs:
        for _ in range(1000):
            log.exception("Error handling request from %s", "1.2.3.4", exc_info=BadStatusLine("\x1b[2J" + "x" * 9000))
    assert len(logs) == LOUD
    assert logs[0]["event"] == "request turned away: no HTTP"
    assert logs[0]["reason"].startswith("BadStatusLine: ")
    assert len(logs[0]["reason"]) <= MAX_SHOWN
    assert "\x1b" not in logs[0]["reason"]
    assert "exc_info" not in logs[0]


def test_a_peer_that_leaves_is_no_error_of_ours() -> None:
    with structlog.testing.capture_logs() as logs:
        HttpLog(Refusals()).exception("Error handling request", exc_info=ConnectionResetError("Connection lost"))
    assert logs == [{"event": "a peer left before its answer", "reason": "Connection lost", "log_level": "warning"}]


def test_a_request_that_breaks_shows_where_and_is_bounded_too() -> None:
    log, error = HttpLog(Refusals()), RuntimeError("of ours")
    with structlog.testing.capture_logs() as logs:
        for _ in range(1000):
            log.exception("Unhandled exception", exc_info=error)
        log.debug("of no interest")
    assert len(logs) == LOUD
    assert (logs[0]["event"], logs[0]["reason"], logs[0]["exc_info"]) == (
        "a request broke",
        "Unhandled exception",
        error,
    )
