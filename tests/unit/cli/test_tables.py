"""The tables at a glance."""

import msgspec
from weightsync.orchestrator.cli.tables import BAR, WIDTH, check_line, round_text, rounds_text, status_text
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    FindingView,
    LeftOutView,
    LinkView,
    ProblemView,
    ProgressView,
    RoundRow,
    SlowEdgeView,
    StatusView,
    TrainerView,
    VersionView,
    WaitingView,
)

NOW = 100_000.0


def test_why_engines_land_as_they_do_is_said_once_for_all_that_are_alike() -> None:
    names = [("a", "copy", "room"), ("b", "live", "no room"), ("c", "copy", "room"), ("d", "", "")]
    engines = tuple(
        EngineView(name=name, url="", role="both", state="serving", mode=mode, mode_because=because)
        for name, mode, because in names
    )
    text = status_text(StatusView(run="r", state="s", epoch=1, journal_id="j", engines=engines), NOW)
    assert "\n\na, c land by copy: room\nb lands by live: no room" in text


def test_what_is_worth_knowing_around_agents_is_a_line_and_what_is_wrong_a_problem() -> None:
    said = {"check": "UCX_TLS", "fix": "unset UCX_TLS", "members": ("trainer/0", "e0/0"), "count": 12}
    note = FindingView(level="note", what="UCX_TLS=tcp", **said)  # type: ignore[arg-type]
    warning = FindingView(level="warning", what="stands among the problems", **said)  # type: ignore[arg-type]
    text = status_text(StatusView(run="r", state="s", epoch=1, journal_id="j", findings=(warning, note)), NOW)
    assert text.endswith("\n\nnote of trainer/0, e0/0 and 10 more: UCX_TLS: UCX_TLS=tcp. Fix: unset UCX_TLS")
    assert "stands among" not in text


def test_the_status_table_at_a_glance() -> None:
    version = VersionView(step=40, generation=255, sequence=3, digest="ab" * 16, unix_time=NOW - 90)
    text = status_text(
        StatusView(
            run="glm", state="step 40 is served; waits for the next version", epoch=2, journal_id="cd" * 16,
            started=NOW - 7200, committed=version,
            engines=(
                EngineView(name="prefill-0", url="http://a", role="prefill", state="serving", version=version,
                           ranks_connected=8, ranks_expected=8, paused=False),
                EngineView(name="d", url="http://b", role="decode", state="held", torn=True, error="bad\x1b[31m news",
                           left_out=(
                               LeftOutView(kind="unwritten", reason="a buffer", names=("\x1bcache",), count=1),
                               LeftOutView(kind="unprobed", reason="no way", names=("a", "b"), count=2000),
                           )),
            ),
            trainers=tuple(TrainerView(rank=r, host="n", pid=1, state="ready", staged=version) for r in range(10)),
            round=ProgressView(round="2.7", version=version, phase="writing", attempt=2, elapsed_seconds=0.4,
                               phase_seconds=0.3, waits_for="trainer/1"),
            rounds=(RoundRow(round="2.6", step=39, generation=255, attempt=1, outcome="failed", engines=("d",),
                             left_out=("d",), reason="no CLOSED from trainer/1 within 300 s", bytes=1_500_000_000,
                             wire_gb_per_s=41.234, pause_ms=30.4, stall_ms=210.6, verify_ms=25, total_ms=221,
                             unix_time=NOW - 30),),
            problems=(
                ProblemView(severity="critical", what="d: torn by step 39", fix="publish", about=("d",), count=1,
                            since=NOW - 30),
                ProblemView(severity="degraded", what="broadcasts/step_007: wrongly named, ignored"),
            ),
            waiting=(WaitingView(version=VersionView(step=41, generation=255), waits_for="the plan", since=NOW - 12),),
            unneeded=tuple(f"head.{number}" for number in range(9)),
        ),
        NOW,
    )  # fmt: skip
    assert (
        text
        == """\
run glm, daemon epoch 2, up 2.0 h, journal cdcdcdcd
CRITICAL: d: torn by step 39 [30 s]
    Fix: publish
DEGRADED: broadcasts/step_007: wrongly named, ignored
step 40 is served; waits for the next version
committed: step 40 (generation 255), commit 3, 2 min ago, digest abababababababab
round 2.7: step 40, attempt 2, for 0.4 s; writing for 0.3 s, waits for trainer/1
publish of step 41: waits 12 s for the plan

ENGINE     ROLE     STATE        VERSION  RANKS  PAUSED
prefill-0  prefill  serving      step 40  8/8    no
d          decode   held (TORN)  -        0/?    ?

TRAINER    STATE  STAGED   PROCESS
trainer/0  ready  step 40  n:1
trainer/1  ready  step 40  n:1
trainer/2  ready  step 40  n:1
trainer/3  ready  step 40  n:1
trainer/4  ready  step 40  n:1
trainer/5  ready  step 40  n:1
trainer/6  ready  step 40  n:1
trainer/7  ready  step 40  n:1
… and 2 more

ROUND  STEP  TRY  OUTCOME  ENGINES   BYTES   GB/S  PAUSE  STALL  VERIFY  TOTAL   AGO
  2.6    39    1  failed   d        1.5 GB  41.23     30    211      25    221  30 s
    no CLOSED from trainer/1 within 300 s
    left out: d

9 tensors of the trainer that no engine needs: head.0, head.1, head.2, head.3, head.4, head.5,
    head.6, head.7, …

1 tensors of d stay as its start left them (a buffer):  cache
2000 tensors of d are written, and whether they are read is not known (no way): a, b, …"""
    )


def test_no_rounds_yet() -> None:
    assert rounds_text((), NOW) == "no round has ended yet"


def test_a_table_of_rounds_that_is_too_wide_has_less_and_cuts_nothing_off() -> None:
    row = RoundRow(
        round="1.1", step=4, generation=1, attempt=1, outcome="committed", engines=("engine-0", "engine-1"),
        bytes=15_700_000, wire_gb_per_s=0.06, pause_ms=93, stall_ms=727, switch_ms=3.2, verify_ms=34, total_ms=728,
        unix_time=NOW - 90,
    )  # fmt: skip
    assert rounds_text((row,), NOW).splitlines() == [
        "ROUND  STEP  TRY  OUTCOME    ENGINES    BYTES  GB/S  PAUSE  STALL  SWITCH  VERIFY  TOTAL    AGO",
        "  1.1     4    1  committed        2  15.7 MB  0.06     93    727     3.2      34    728  2 min",
    ]
    lent = msgspec.structs.replace(row, round="117.204", step=1_000_000, kind="catch-up", lenders={"b": "engine-12"})
    header, cells = rounds_text((lent,), NOW).splitlines()
    assert header.split() == [
        "ROUND", "KIND", "STEP", "OUTCOME", "ENGINES", "BYTES", "GB/S", "STALL", "SWITCH", "TOTAL", "AGO"
    ]  # fmt: skip
    assert cells.endswith("    728  2 min")


def test_whose_fault_it_is_stands_before_the_reason() -> None:
    row = RoundRow(round="2.6", step=39, generation=255, attempt=1, outcome="failed", fault="network", reason="reset")
    assert rounds_text((row,), NOW).splitlines()[-1] == "    network: reset"
    engine = EngineView(name="a", url="http://a", role="both", state="unreachable", error="gone", fault="network")
    text = status_text(StatusView(run="glm", state="", engines=(engine,)), NOW)
    assert text.splitlines()[-1].split()[-1] == "network"


def test_no_line_is_longer_than_a_terminal_and_none_obeys_escapes() -> None:
    """Names of 128 characters, reasons of thousands, the largest numbers."""
    name, reason = "e" * 128, "\x1b[31mwhy " * 500
    version = VersionView(step=2**53, generation=2**53, sequence=2**53, digest="ab" * 32, unix_time=1.0)
    left_out = LeftOutView(kind="unneeded", reason=reason, names=("n" * 300,) * 20, count=20)
    engine = EngineView(
        name=name, url="http://" + "u" * 2000, role="decode", state="unreachable", version=version, torn=True,
        ranks_connected=65536, ranks_expected=65536, error=reason, fault="network", since=1.0, left_out=(left_out,),
    )  # fmt: skip
    row = RoundRow(
        round=f"{2**53}.{2**53}", step=2**53, generation=1, attempt=10**6, outcome="committed", engines=(name,) * 3,
        left_out=(name,) * 9, bytes=2**53, wire_gb_per_s=99999.99, pause_ms=1e9, stall_ms=1e9, verify_ms=1e9,
        total_ms=1e9, reason=reason, fault="network", unix_time=1.0, lenders={name: name}, kind="catch-up",
    )  # fmt: skip
    status = StatusView(
        run="r" * 128, state=reason, epoch=2**53, journal_id="j" * 32, source="journal", started=1.0,
        committed=version, engines=(engine,) * 3, rounds=(row,) * 3, unneeded=("t" * 300,) * 20,
        trainers=(TrainerView(rank=65535, host="h" * 255, pid=2**22, state="staged", staged=version, since=1),) * 9,
        problems=(ProblemView(severity="critical", what=f"{name}: {reason}", fix=reason, since=1.0),) * 3,
        waiting=(WaitingView(version=version, waits_for=reason, since=1.0),),
    )  # fmt: skip
    for text in (status_text(status, NOW), rounds_text(status.rounds, NOW)):
        assert max(map(len, text.splitlines())) <= WIDTH
        assert "\x1b" not in text
    assert "\n" not in check_line(status)


def test_one_line_for_a_monitor() -> None:
    version = VersionView(step=40, generation=255)
    engines = tuple(EngineView(name=n, url="", role="both", state=s) for n, s in (("a", "serving"), ("b", "updating")))
    good = StatusView(run="glm", state="", committed=version, engines=engines)
    assert check_line(good) == "ok: step 40 is committed, 2 of 2 engines serve"
    problems = tuple(ProblemView(severity="degraded", what=what) for what in ("a: slow", "b: late"))
    assert check_line(StatusView(run="glm", state="", problems=problems)) == "degraded: a: slow (and 1 more)"


def test_one_round_is_a_waterfall_that_fits() -> None:
    row = RoundRow(
        round="2.9", step=40, generation=7, attempt=1, outcome="failed",
        engines=tuple(f"engine-{n}" for n in range(60)),
        times_ms={"pausing": 30.0, "writing": 60.0, "verifying": 10.0, "total": 100.0, "wire": 55.5},
        reason="the wire broke", fault="network",
    )  # fmt: skip
    lines = round_text(row, NOW).splitlines()
    assert max(map(len, lines)) <= WIDTH
    bars = {line.split()[0]: line[27:] for line in lines if "█" in line}
    assert list(bars) == ["pausing", "writing", "verifying"]
    assert [(bar.count(" "), bar.count("█")) for bar in bars.values()] == [
        (0, BAR * 3 // 10), (BAR * 3 // 10, BAR * 6 // 10), (BAR * 9 // 10, BAR // 10),
    ]  # fmt: skip
    assert any("network: the wire broke" in line for line in lines)
    assert any("total 100.0 ms, wire 55.5 ms" in line for line in lines)


def test_one_round_says_by_which_links_it_went_and_which_edges_were_slow() -> None:
    slow = SlowEdgeView(edge="trainer/3 → engine-0/1", by="rc_mlx5/mlx5_3:1", gb_per_s=1.2, link_gb_per_s=44.3)
    row = RoundRow(
        round="2.9", step=40, generation=7, attempt=1, outcome="committed",
        links=(
            LinkView(link="nic", edges=64, bytes=82_500_000_000, gb_per_s=44.25, ways=("dc_mlx5", "rc_mlx5"),
                     slow=(slow,), slow_edges=1),
            LinkView(link="unknown", edges=1, bytes=10, gb_per_s=0.0),
        ),
    )  # fmt: skip
    lines = round_text(row, NOW).splitlines()
    assert [line.split() for line in lines[4:7]] == [
        ["LINK", "BY", "EDGES", "BYTES", "GB/S", "SLOW"],
        ["nic", "dc_mlx5,rc_mlx5", "64", "82.5", "GB", "44.25", "1"],
        ["unknown", "-", "1", "10", "B", "-", "-"],
    ]
    assert lines[7] == "    slow: trainer/3 → engine-0/1 1.20 GB/s of 44.30 (rc_mlx5/mlx5_3:1)"


def test_a_round_says_which_engines_lent_what_they_serve() -> None:
    row = RoundRow(
        round="2.9", step=40, generation=7, attempt=1, outcome="committed", kind="catch-up", lenders={"c": "a"}
    )
    assert rounds_text((row,), NOW).splitlines()[-1].split()[:5] == ["2.9", "from", "a", "40", "1"]
    assert any("from a" in line for line in round_text(row, NOW).splitlines())
