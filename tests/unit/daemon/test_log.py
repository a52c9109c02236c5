"""The log: its two forms, the round's line, and what it must not show."""

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
from weightsync.orchestrator.core.commands import Say
from weightsync.orchestrator.daemon import log
from weightsync.orchestrator.daemon.admin.views import RoundRow
from weightsync.orchestrator.protocol.names import RoundName, Version
from weightsync.orchestrator.settings.sections import LogSection

SECRET = "s3cret-0f-the-fleet"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_change_of_the_run_directory_is_no_line() -> None:
    file = io.StringIO()
    log.configure(LogSection(), file)
    logging.getLogger("watchfiles.main").info("3 changes detected")
    logging.getLogger("watchfiles.main").warning("no inotify left")
    assert [line["event"] for line in lines(file)] == ["no inotify left"]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_secrets", set())
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_where_nobody_watches_console_where_somebody_does() -> None:
    file, terminal = io.StringIO(), Terminal()
    log.configure(LogSection(), file)
    structlog.get_logger().info("hello", engine="a")
    log.configure(LogSection(), terminal)
    structlog.get_logger().info("hello", engine="a")
    (line,) = lines(file)
    assert (line["event"], line["engine"], line["level"]) == ("hello", "a", "info")
    assert str(line["timestamp"]).endswith("Z")
    assert "hello" in terminal.getvalue()
    with pytest.raises(ValueError, match=r"Expecting|Extra"):
        lines(terminal)


def test_the_form_can_be_forced() -> None:
    terminal = Terminal()
    log.configure(LogSection(format="json"), terminal)
    structlog.get_logger().info("hello")
    assert lines(terminal)[0]["event"] == "hello"


def test_levels_and_the_libraries_own_logs() -> None:
    stream = io.StringIO()
    log.configure(LogSection(level="warning"), stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("aiohttp").info("quiet")
    logging.getLogger("aiohttp").warning("lib says %d", 5)
    assert [(line["event"], line["level"]) for line in lines(stream)] == [("lib says 5", "warning")]


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_secret_is_shown(form: str) -> None:
    stream = io.StringIO()
    log.configure(LogSection.model_validate({"format": form}), stream)
    log.withhold(SECRET)
    logger = structlog.get_logger()
    logger.info("got " + SECRET, token="abcdef", engine={"api_key": "abcdef", "urls": [SECRET]}, text=f"x{SECRET}x")
    logger.info("header", value="Authorization: Bearer abcdef")
    logger.info("objects", error=ValueError(SECRET), authorization=1)
    logging.getLogger("lib").warning("lib %s", SECRET)
    hidden = "abcdef" + SECRET
    try:
        raise ValueError(SECRET)
    except ValueError:
        logger.exception("failed")
    shown = stream.getvalue()
    assert hidden
    assert SECRET not in shown
    assert "abcdef" not in shown
    assert "ValueError" in shown
    assert shown.count(log.WITHHELD) >= 9


def test_token_file_is_no_secret_and_short_words_are_not_searched_for() -> None:
    stream = io.StringIO()
    log.configure(LogSection(format="json"), stream)
    log.withhold("a")
    structlog.get_logger().info("a path", token_file="/etc/token")
    (line,) = lines(stream)
    assert (line["event"], line["token_file"]) == ("a path", "/etc/token")


def test_one_line_per_round() -> None:
    stream = io.StringIO()
    log.configure(LogSection(format="json"), stream)
    row = RoundRow(
        round="3.7", step=12, generation=5, attempt=1, outcome="committed", engines=("a", "b"), bytes=2_000_000_000,
        wire_gb_per_s=10.0, pause_ms=33.1, stall_ms=250.0, verify_ms=40.0, total_ms=260.0,
    )  # fmt: skip
    log.round_line(row)
    log.round_line(RoundRow(round="3.8", step=13, generation=5, attempt=3, outcome="failed", reason="digest differs"))
    first, second = lines(stream)
    assert first["event"] == "round committed"
    assert first["level"] == "info"
    assert first["version"] == str(Version(5, 12))
    assert (first["round"], first["step"], first["engines"], first["stall_ms"]) == ("3.7", 12, ["a", "b"], 250.0)
    assert "reason" not in first
    assert (second["event"], second["level"], second["reason"]) == ("round failed", "warning", "digest differs")


def test_no_event_fills_the_disk_and_the_others_are_said_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_LINES", 3)
    now, stream = 0.0, io.StringIO()
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now))
    log.configure(LogSection(), stream)
    for number in range(10):
        structlog.get_logger("weightsync.orchestrator.daemon.x").warning("marker not believed", problem=str(number))
        logging.getLogger("a.library").warning("line %d", number)
    structlog.get_logger().info("state")
    assert [line["event"] for line in lines(stream)] == [
        *["marker not believed", "line 0", "marker not believed", "line 1", "marker not believed", "line 2"], "state",
    ]  # fmt: skip
    now = log.WINDOW_SECONDS
    structlog.get_logger().warning("marker not believed", problem="again")
    counted = [(line["event"], line.get("lines"), line.get("more")) for line in lines(stream)[7:]]
    assert counted == [
        ("further lines", "marker not believed", 7), ("further lines", "a.library", 7),
        ("marker not believed", None, None),
    ]  # fmt: skip


def test_configuring_twice_prints_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    log.configure(LogSection(), first)
    log.configure(LogSection(), second)
    structlog.get_logger().info("hello")
    assert first.getvalue() == ""
    assert len(lines(second)) == 1


def test_each_line_is_of_a_run_and_a_sentence_of_the_core_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_run", "")
    stream, terminal = io.StringIO(), Terminal()
    log.configure(LogSection(), stream)
    log.about("glm")
    log.say(Say("warning", "e0 is left out", "engine left out", "e0", Version(5, 12), RoundName(3, 7), cause=41))
    log.say(Say("info", "all is well"))
    logging.getLogger("aiohttp.access").warning("a library speaks")
    first, second, third = lines(stream)
    del first["timestamp"]
    assert first == {
        "event": "engine left out", "message": "e0 is left out", "engine": "e0", "version": str(Version(5, 12)),
        "round": "3.7", "cause": 41, "level": "warning", "run": "glm",
    }  # fmt: skip
    assert (second["event"], second["run"], "engine" in second) == ("note", "glm", False)
    assert (third["run"], third["logger"]) == ("glm", "aiohttp.access")
    log.configure(LogSection(), terminal)
    log.say(Say("info", "e0 is a member", "engine joins", "e0"))
    assert "e0 is a member" in terminal.getvalue()
    assert "glm" not in terminal.getvalue(), "on a terminal there is one run"


def test_under_systemd_each_line_has_its_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "journal").open("w") as stream:
        about = os.fstat(stream.fileno())
        assert not log.in_journal(stream, {})
        assert not log.in_journal(stream, {"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino + 1}"})
        assert not log.in_journal(io.StringIO(), {"JOURNAL_STREAM": "1:1"})
        monkeypatch.setenv("JOURNAL_STREAM", f"{about.st_dev}:{about.st_ino}")
        monkeypatch.setattr(log.in_journal, "__defaults__", (os.environ,))
        log.configure(LogSection(format="console", level="debug"), stream)
        logger = structlog.get_logger()
        for say in (logger.debug, logger.info, logger.warning, logger.error, logger.critical):
            say("hello")
        try:
            raise ValueError("a bug")
        except ValueError:
            logger.exception("broke")
    said = (tmp_path / "journal").read_text().splitlines()
    assert [line[:3] for line in said[:5]] == ["<7>", "<6>", "<4>", "<3>", "<2>"]
    assert len(said) > 6
    assert {line[:3] for line in said[5:]} == {"<3>"}, "each line of a traceback, too"
