"""The report: one file, of a real journal, that asks for nothing outside of itself."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import cli
from weightsync.orchestrator.cli.report import MAX_ROWS, page, summed
from weightsync.orchestrator.core.records import RoundEnded, encode_record
from weightsync.orchestrator.daemon.admin.views import RoundRow, RoundsView
from weightsync.orchestrator.daemon.journal import Journal
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.settings.settings import load


def row(number: int, outcome: str = "committed", **fields: object) -> RoundRow:
    given: dict[str, object] = {
        "stall_ms": 10.0 * number, "bytes": 10**9, "wire_gb_per_s": 5.0, "unix_time": 1e9,
        "times_ms": {"pausing": 5.0, "writing": 200.0, "total": 300.0},
    } | fields  # fmt: skip
    return RoundRow(round=f"1.{number}", step=number, generation=7, attempt=1, outcome=outcome, **given)  # type: ignore[arg-type]


class Page(HTMLParser):
    """Tags that open and close, rows of the table, what is fetched, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows, self.text, self.fetched = 0, "", list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "action", "onload")]
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_of_good_and_bad_rounds() -> None:
    bad = row(3, "failed", reason="<script>alert(1)</script>", fault="engine", left_out=tuple("abcdefghij"))
    read = Page(page(RoundsView(run="glm", rounds=(row(1), row(2), bad)), 1e9))
    assert (read.open, read.fetched, read.rows) == ([], [], 4)
    assert "3 rounds, 2 committed; stall of those: median 15 ms, 95 % within 20 ms; 2.0 GB moved" in read.text
    assert "1 not committed by fault of the engine" in read.text
    assert "engine: <script>alert(1)</script>; left out: a, b, c, d, e, f, g, h and 2 more" in read.text
    assert "2001-09-09 01:46:40" in read.text


def test_an_empty_and_a_long_history() -> None:
    assert "No round has ended yet" in Page(page(RoundsView(run="glm", rounds=()), 1e9)).text
    long = Page(page(RoundsView(run="glm", rounds=tuple(row(n) for n in range(10_000))), 1e9))
    assert long.rows == MAX_ROWS + 1
    assert "9500 older rounds are in the charts only" in long.text
    assert len(page(RoundsView(run="glm", rounds=tuple(row(n) for n in range(10_000))), 1e9)) < 2_000_000


@pytest.fixture
def with_journal(config: Path) -> Path:
    """A configuration whose journal has two rounds."""
    settings = load(config, {})
    settings.state_directory.mkdir()
    with Journal.open(settings.journal_path) as journal:
        for number in (1, 2):
            record = RoundEnded(
                round=RoundName(1, number), version=Version(7, number), attempt=1, engines=("a",), left_out=(),
                outcome="committed", reason="", bytes=10**9, descriptors=3, times={"stall": 0.2, "writing": 0.1},
            )  # fmt: skip
            journal.append([(RoundEnded.__name__, encode_record(record))])
    return config


async def test_of_a_journal_whose_daemon_is_down(with_journal: Path) -> None:
    out = with_journal.parent / "rounds.html"
    done = await cli("report", "--config", with_journal, "--out", out, "--timeout", "5")
    assert done.code == 0, done.err
    assert done.out == f"2 rounds: {out}\n"
    assert "cannot be reached" in done.err
    assert Page(out.read_text()).rows == 3


async def test_as_json_it_is_printed_and_no_file_is_written(
    with_journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_journal.parent)
    done = await cli("report", "--json", "--config", with_journal, "--timeout", "5")
    assert (done.code, list(with_journal.parent.glob("*.html"))) == (0, [])
    told = json.loads(done.out)
    assert (told["run"], told["source"], told["committed"], told["bytes"], told["faults"]) == (
        "glm", "journal", 2, 2 * 10**9, {},
    )  # fmt: skip
    assert (told["stall_median_ms"], told["stall_95_percent_ms"]) == (200.0, 200.0)
    assert [each["round"] for each in told["rounds"]] == ["1.1", "1.2"]
    both = await cli("report", "--json", "--out", "x.html", "--config", with_journal)
    assert both.code == 2
    assert "not allowed with argument" in both.err


def test_engines_that_serve_on_stand_still_to_switch() -> None:
    """Their rounds have no pause, and 0 ms would not be true."""
    sums = summed(
        RoundsView(run="glm", rounds=(row(1, stall_ms=0.0, switch_ms=3.0), row(2, stall_ms=90.0, switch_ms=3.0))), 1e9
    )
    assert (sums.stall_median_ms, sums.stall_95_percent_ms) == (46.5, 90.0)


def test_sums_of_no_committed_round() -> None:
    sums = summed(RoundsView(run="glm", rounds=(row(1, "failed"), row(2, "failed", fault="engine"))), 1e9)
    assert (sums.committed, sums.stall_median_ms, sums.bytes) == (0, None, 0)
    assert sums.faults == {"unknown": 1, "engine": 1}


async def test_a_file_that_cannot_be_written_is_74(with_journal: Path) -> None:
    done = await cli("report", "--config", with_journal, "--out", "/proc/sys/x.html", "--timeout", "5")
    assert (done.code, done.err.splitlines()[-1].partition(":")[0]) == (74, "/proc/sys/x.html cannot be written")


async def test_neither_daemon_nor_journal_is_75(config: Path) -> None:
    out = config.parent / "rounds.html"
    done = await cli("report", "--config", config, "--out", out, "--timeout", "5")
    assert (done.code, out.exists()) == (75, False)
