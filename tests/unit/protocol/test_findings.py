"""Findings: one line, a table that fits, an exit code."""

from collections.abc import Iterator

import msgspec
import pytest
from weightsync.orchestrator.protocol.codec import ProtocolError, decode_from_agent, encode
from weightsync.orchestrator.protocol.findings import (
    WIDTH,
    Finding,
    Findings,
    Level,
    examined,
    exit_code,
    findings_text,
    in_short,
)
from weightsync.orchestrator.protocol.limits import MAX_FINDINGS
from weightsync.orchestrator.protocol.messages import Examined

FOUND = (
    Finding("ok", "is fine", check="a"),
    Finding("error", "is on nfs4 " + "and the path is long " * 12, "put it elsewhere " * 10, "state_directory"),
    Finding("warning", "line\nbreak and \x1b[31m", check="a key whose name has more characters than there is room"),
)


def test_one_line_has_check_evidence_and_fix() -> None:
    assert Finding("error", "is wrong", "mend it", "key").text == "key: is wrong. Fix: mend it"
    assert Finding("note", "so it is").text == "so it is"


def test_the_table_has_the_worst_first_and_fits() -> None:
    lines = findings_text(FOUND).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line.split()[0] for line in lines if line.startswith(("error", "warning", "ok"))] == [
        "error", "warning", "ok",
    ]  # fmt: skip
    assert sum("→ put it elsewhere" in line for line in lines) == 1
    assert "\\x1b[31m" in findings_text(FOUND)
    assert "\x1b" not in findings_text(FOUND)
    assert lines[-1] == "1 error, 1 warning, 1 ok"
    assert findings_text([]).splitlines()[-1] == "0 ok"


@pytest.mark.parametrize(
    ("levels", "code"),
    [((), 0), (("ok", "note"), 0), (("ok", "warning"), 1), (("warning", "error", "ok"), 2)],
)
def test_the_exit_code_is_that_of_the_worst(levels: tuple[Level, ...], code: int) -> None:
    assert exit_code([Finding(level, "x") for level in levels]) == code


def test_what_an_agent_says_is_bounded_whatever_was_found() -> None:
    ports = [Finding("note", "x" * 5000, "y" * 5000, "z" * 5000) for _ in range(40)]
    said = in_short([Finding("ok", "fine"), *ports, Finding("error", "first")])
    assert len(said) == MAX_FINDINGS
    assert said[0] == Finding("error", "first")
    assert said[-1] == Finding("note", "18 more findings", "python -m weightsync.agents doctor")
    frame = encode(Examined(findings=said))
    assert decode_from_agent(frame) == Examined(findings=said)
    assert in_short([Finding("ok", "fine")]) == ()


def test_of_what_a_peer_says_no_more_is_kept_whatever_it_sends() -> None:
    long = {"level": "note", "what": "x" * 4000, "fix": "y" * 4000, "check": "z" * 4000}
    told = msgspec.msgpack.encode({"type": "Examined", "findings": [{"level": "ok", "what": "fine"}] + [long] * 23})
    heard = decode_from_agent(told)
    assert isinstance(heard, Examined)
    [same] = set(heard.findings)
    assert (len(same.what), len(same.fix), len(same.check)) == (600, 300, 100)
    for wrong in ([long] * (MAX_FINDINGS + 1), [long | {"level": "fatal"}], [long | {"what": "x" * 4001}]):
        with pytest.raises(ProtocolError):
            decode_from_agent(msgspec.msgpack.encode({"type": "Examined", "findings": wrong}))


def test_what_a_peer_says_is_cleaned() -> None:
    raw = msgspec.msgpack.encode({"type": "Examined", "findings": [{"level": "note", "what": "a\nb\x1b[31m"}]})
    assert decode_from_agent(raw) == Examined(findings=(Finding("note", "a b\\x1b[31m"),))


def test_a_check_that_breaks_is_a_finding_beside_what_it_had_found() -> None:
    def look() -> Iterator[Finding]:
        yield Finding("ok", "first", check="disk")
        raise OSError(5, "Input/output error")

    first, second = examined("disk", look)
    assert first == Finding("ok", "first", check="disk")
    assert second.level == "warning"
    assert second.what == "could not be looked at: OSError: [Errno 5] Input/output error"


def test_it_travels_as_json() -> None:
    told = Findings(place="host", findings=FOUND)
    assert msgspec.json.decode(msgspec.json.encode(told), type=Findings) == told
