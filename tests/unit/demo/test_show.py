"""What is printed can be read."""

import io
import math

from weightsync.orchestrator.daemon.admin.views import RoundRow
from weightsync.orchestrator.demo.client import Answer
from weightsync.orchestrator.demo.show import WIDTH, Screen, compared, summary

ROW = RoundRow(
    round="1.1", step=6, generation=1, attempt=1, outcome="committed", engines=("engine-0", "engine-1"),
    bytes=38_812_160, wire_gb_per_s=1.234,
    pause_ms=3.21, stall_ms=123.4, verify_ms=45.6, total_ms=150.0, unix_time=1.0,
    modes={"engine-0": "copy", "engine-1": "live"}, stalls_ms={"engine-0": 2.4, "engine-1": 99.6},
)  # fmt: skip


def test_the_table_fits_a_hundred_columns_and_says_why_an_attempt_failed() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.header()
    screen.row(ROW, "3.45", "whole, and verified.")
    screen.row(ROW.__class__(**{**ROW.fields(), "outcome": "failed", "reason": "a\x1b[2Jb"}), "-", "")
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].strip().startswith("ms of an engine: how long it took no step")
    assert lines[2].split() == [
        "6",
        "3.45",
        "38.8",
        "MB",
        "1.23",
        "2",
        "100",
        "150",
        "whole,",
        "and",
        "verified.",
    ]
    assert lines[4] == "    failed, attempt 1: a [2Jb"
    assert "\x1b" not in out.getvalue()


def test_the_last_bit_of_a_log_probability_counts() -> None:
    out = io.StringIO()
    pushed = Answer((104, 105), (-0.25, -0.5), ((("token_id:104", -0.25),), (("token_id:105", -0.5),)))
    assert compared(Screen(out), ("ab:", "hi"), pushed, pushed)
    assert out.getvalue().split() == ["ab:hi", "2", "tokens,", "2", "×", "5", "log-probabilities", "the", "same"]
    loaded = Answer(pushed.tokens, (-0.25, math.nextafter(-0.5, 0)), pushed.top)
    assert not compared(Screen(out), ("ab:", "hi"), pushed, loaded)
    assert "different\n    pushed: (104, 105) (-0.25, -0.5)\n    loaded: " in out.getvalue()


def test_an_engine_that_was_in_no_round_has_no_figure_and_its_version_counts_once() -> None:
    out = io.StringIO()
    alone = RoundRow(
        **{name: getattr(ROW, name) for name in ROW.__struct_fields__}
        | {"engines": ("engine-0",), "stalls_ms": {"engine-0": 2.4}}
    )
    Screen(out).row(alone, "3.45", "")
    assert out.getvalue().split() == ["6", "3.45", "38.8", "MB", "1.23", "2", "-", "150"]
    told = dict(summary([alone, alone]))
    assert told["versions"].startswith("1 pushed, each at the first attempt, in 2 rounds: an engine that came late")
    assert told["engine-1"] == "took part in no round"


def test_the_summary_counts_what_failed() -> None:
    failed = RoundRow(round="1.2", step=12, generation=1, attempt=1, outcome="failed")
    told = dict(summary([ROW, failed]))
    assert told["versions"] == "1 pushed, 1 attempts failed"
    assert told["weights"].startswith("38.8 MB over NIXL at 1.23 GB/s")
    assert told["engine-0"].startswith("copy: stood still for 2 ms (median), to switch")
    assert told["engine-1"].startswith("live: stood still for 100 ms (median), while bytes arrived")
    assert max(len(f"  {name:<9} {text}") for name, text in told.items()) <= WIDTH
