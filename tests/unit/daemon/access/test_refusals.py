"""A flood of refusals is a few lines."""

import structlog
from weightsync.orchestrator.daemon.access.refusals import LOUD, LOUD_OF_AGENTS, WINDOW_SECONDS, Refusals


def test_the_first_of_each_kind_are_said_and_the_others_counted() -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    with structlog.testing.capture_logs() as logs:
        for number in range(1000):
            refusals.say("wrong token", remote=str(number))
            refusals.say("too many")
        assert [line.get("remote") for line in logs if line["event"] == "wrong token"] == ["0", "1", "2"]
        assert len(logs) == 2 * LOUD
        now = WINDOW_SECONDS
        refusals.sweep()
        refusals.sweep()
        more = [(line["event"], line["refusals"], line["more"]) for line in logs[2 * LOUD :]]
        assert more == [("further refusals", kind, 1000 - LOUD) for kind in ("wrong token", "too many")]
        refusals.say("wrong token", remote="again")
    assert logs[-1]["remote"] == "again"
    assert refusals.counts == {"wrong token": 1001, "too many": 1000}


def test_the_audit_log_gets_two_lines_of_each_kind_and_minute() -> None:
    now, told = 0.0, []
    refusals = Refusals(lambda: now)
    refusals.audited = lambda kind, fields: told.append((kind, dict(fields)))
    with structlog.testing.capture_logs():
        for number in range(1000):
            refusals.say("wrong token", remote=str(number))
        refusals.say("too many", remote="one")
        now = WINDOW_SECONDS
        refusals.sweep()
        refusals.sweep()
    first = [("wrong token", {"remote": "0"}), ("too many", {"remote": "one"})]
    assert told == [*first, ("wrong token", {"further ones": 999})]


def test_a_single_refusal_is_not_counted_twice() -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    with structlog.testing.capture_logs() as logs:
        refusals.say("wrong token")
        now = 10 * WINDOW_SECONDS
        refusals.sweep()
    assert len(logs) == 1


def test_agents_have_more_lines_of_their_own() -> None:
    refusals = Refusals()
    with structlog.testing.capture_logs() as logs:
        for number in range(2 * LOUD_OF_AGENTS):
            refusals.say("agent lost", LOUD_OF_AGENTS, agent=str(number))
            refusals.say("request turned away")
    assert [line["event"] for line in logs].count("agent lost") == LOUD_OF_AGENTS
    assert [line["event"] for line in logs].count("request turned away") == LOUD
