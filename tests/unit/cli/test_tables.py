"""The tables at a glance."""

from weightsync.orchestrator.cli.tables import rounds_text, status_text
from weightsync.orchestrator.daemon.admin.views import (
    EngineView,
    LeftOutView,
    ProgressView,
    RoundRow,
    StatusView,
    TrainerView,
    VersionView,
)

NOW = 100_000.0


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
            round=ProgressView(round="2.7", version=version, phase="writing", attempt=2, elapsed_seconds=0.4),
            rounds=(RoundRow(round="2.6", step=39, generation=255, attempt=1, outcome="failed", engines=("d",),
                             left_out=("d",), reason="no CLOSED from trainer/1 within 300 s", bytes=1_500_000_000,
                             wire_gb_per_s=41.234, pause_ms=30.4, stall_ms=210.6, verify_ms=25, total_ms=221,
                             unix_time=NOW - 30),),
            problems=("broadcasts/step_007: wrongly named, ignored",),
            unneeded=tuple(f"head.{number}" for number in range(9)),
        ),
        NOW,
    )  # fmt: skip
    assert (
        text
        == """\
run glm   daemon epoch 2, up 2.0 h   journal cdcdcdcd
step 40 is served; waits for the next version
committed: step 40 (generation ff), commit 3, 2 min ago, digest abababababababab
round 2.7: step 40, attempt 2, writing for 0.4 s

ENGINE     ROLE     STATE        VERSION  RANKS  PAUSED  URL       LAST ERROR
prefill-0  prefill  serving      step 40  8/8    no      http://a
d          decode   held (TORN)  -        0/?    ?       http://b  bad [31m news

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

ROUND  STEP  TRY  OUTCOME  ENGINES   BYTES  WIRE GB/S  PAUSE MS  STALL MS  VERIFY MS  TOTAL MS   AGO
  2.6    39    1  failed   d        1.5 GB      41.23        30       211         25       221  30 s
    no CLOSED from trainer/1 within 300 s
    left out: d

9 tensors of the trainer that no engine needs: head.0, head.1, head.2, head.3, head.4, head.5, head.6, head.7, …

1 tensors of d stay as its start left them (a buffer):  cache
2000 tensors of d are written, and whether they are read is not known (no way): a, b, …

problems:
  broadcasts/step_007: wrongly named, ignored"""
    )


def test_no_rounds_yet() -> None:
    assert rounds_text((), NOW) == "no round has ended yet"


def test_whose_fault_is_a_column_where_somebody_is_at_fault() -> None:
    row = RoundRow(round="2.6", step=39, generation=255, attempt=1, outcome="failed", fault="network", reason="reset")
    header, line, why = rounds_text((row,), NOW).splitlines()
    assert header.split()[:5] == ["ROUND", "STEP", "TRY", "OUTCOME", "FAULT"]
    assert line.split()[:5] == ["2.6", "39", "1", "failed", "network"]
    assert why == "    reset"
    engine = EngineView(name="a", url="http://a", role="both", state="unreachable", error="gone", fault="network")
    text = status_text(StatusView(run="glm", state="", engines=(engine,)), NOW)
    assert text.splitlines()[-1].split()[-2:] == ["network", "gone"]
