"""What records and versions look like to whoever asks."""

import msgspec
from weightsync.orchestrator.core.records import RoundEnded
from weightsync.orchestrator.daemon.admin.views import RoundRow, StatusView, VersionView, round_row, version_view
from weightsync.orchestrator.protocol.names import RoundName, Version


def test_a_row_of_a_record() -> None:
    record = RoundEnded(
        round=RoundName(2, 9), version=Version(7, 40), attempt=2, engines=("a", "b"), left_out=("b",),
        outcome="committed", reason="", bytes=3_000_000_000, descriptors=12,
        times={"pausing": 0.0331, "wire": 0.25, "verifying": 0.05, "stall": 0.4, "total": 0.5},
    )  # fmt: skip
    row = round_row(record, 5.0)
    assert (row.round, row.step, row.generation, row.left_out) == ("2.9", 40, 7, ("b",))
    assert (row.wire_gb_per_s, row.pause_ms, row.verify_ms, row.stall_ms, row.total_ms) == (12, 33.1, 50, 400, 500)
    assert round_row(msgspec.structs.replace(record, times={}, bytes=0), 5.0).wire_gb_per_s == 0


def test_the_fields_of_a_row_for_a_log_line() -> None:
    row = RoundRow(round="2.9", step=40, generation=7, attempt=1, outcome="committed", times_ms={"x": 1.0}, unix_time=5)
    assert row.fields()["step"] == 40
    assert not {"times_ms", "unix_time"} & row.fields().keys()


def test_a_version() -> None:
    assert version_view(None) is None
    assert version_view(Version(7, 40)) == VersionView(step=40, generation=7)
    assert version_view(Version(7, 40), 3, 5.0) == VersionView(step=40, generation=7, sequence=3, unix_time=5.0)


def test_a_reader_of_another_release_is_not_disturbed() -> None:
    """Fields that it does not know are ignored, those that are not there have defaults."""
    told = {"run": "glm", "state": "all is well", "of the future": [1, 2]}
    view = msgspec.json.decode(msgspec.json.encode(told), type=StatusView)
    assert (view.run, view.source, view.engines, view.committed) == ("glm", "daemon", (), None)


def test_why_a_round_failed_and_why_one_went_on_without_engines() -> None:
    def row(outcome: str, reason: str, *left_out: str, fault: str = "") -> RoundRow:
        return RoundRow(
            round="1.1", step=1, generation=7, attempt=1, outcome=outcome, reason=reason, fault=fault, left_out=left_out
        )

    assert row("committed", "").why == ()
    assert row("committed", "b: it broke", "b").why == ("left out: b: it broke",)
    assert row("failed", "no CLOSED", "b", fault="trainer").why == ("trainer: no CLOSED", "left out: b")
    assert row("committed", "", *"abcdefghij").why == ("left out: a, b, c, d, e, f, g, h and 2 more",)


def test_how_long_engines_stood_still() -> None:
    row = RoundRow(round="1.1", step=1, generation=7, attempt=1, outcome="committed", stall_ms=0.0, switch_ms=3.0)
    assert row.stood_ms == 3.0
