"""What each mistake is told: line, key, value and fix."""

from pathlib import Path

import pytest
from settings_files import MINIMAL, Refusal


@pytest.mark.parametrize(
    ("addition", "line", "key", "says"),
    [
        ("rescan_secnds: 1\n", 10, "rescan_secnds", "did you mean rescan_seconds"),
        ("log: {level: loud}\n", 10, "log.level", "'loud'"),
        ("commit: {min_engines: 0}\n", 10, "commit.min_engines", "greater than 0"),
        ("deadlines:\n  probe_seconds: soon\n", 11, "deadlines.probe_seconds", "'soon'"),
        ("deadlines:\n  probe_seconds: .inf\n", 11, "deadlines.probe_seconds", "finite"),
        ("deadlines: {probe_seconds: 1.0e+9}\n", 10, "deadlines.probe_seconds", "86400"),
        ("  - name: a\n    url: http://b:1\n", 7, "engines", "the same name 'a'"),
        ("  - {name: b, url: 'http://127.0.0.1:8000/'}\n", 7, "engines", "the same url"),
        ("  - {name: b, url: 'ftp://b'}\n", 10, "engines[1].url", "^https?"),
        ("  - {name: b, url: 'http://me:pw@b'}\n", 10, "engines[1].url", "^https?"),
        ("  - {name: 'b/../c', url: 'http://b'}\n", 10, "engines[1].name", "pattern"),
        ("  - {name: b}\n", 10, "engines[1].url", "missing"),
        ("  - {name: b, url: 'http://b', role: prefill, pair: p}\n", 7, "engines", "needs an engine of role prefill"),
        ("pause: {cache: forget}\n", 10, "pause.cache", "'recompute'"),
        ("transport: {type: rdma}\n", 10, "transport.type", "one of 'nixl', 'filesystem'"),
        ("rendezvous: {type: tcpstore}\n", 10, "rendezvous.host", "missing"),
        ("run: {id: other, directory: x}\n", 10, "run", "given twice (first at line 1)"),
        ("_env_file: x\n", 10, "_env_file", "unknown key"),
        ("transport:\n\tx: 1\n", 11, "", "no valid YAML"),
        ("log: !!python/object:os.system {}\n", 10, "", "no valid YAML"),
        ("log: {level: !!timestamp x}\n", 10, "", "no valid YAML: no timestamp"),
        ("log: {level: !!bool x}\n", 10, "", "no valid YAML: no bool"),
        ("log: {level: !!int ''}\n", 10, "", "no valid YAML: no int"),
        ("log: {level: !!float '-'}\n", 10, "", "no valid YAML: no float"),
        ("1: x\n", 10, "1", "unknown key"),
    ],
)
def test_mistakes_name_line_key_and_fix(
    config: Path, addition: str, line: int | None, key: str, says: str, refusal: Refusal
) -> None:
    error = refusal(MINIMAL + addition)
    assert [(problem.line, problem.key) for problem in error.problems] == [(line, key)]
    assert says in str(error)
    assert str(config) in str(error)
    assert error.problems[0].fix


@pytest.mark.parametrize(
    ("addition", "key", "says"),
    [
        (
            "transport:\n  type: filesystem\n  in_flight_per_peer: 5\n",
            "transport.in_flight_per_peer",
            "belongs to transport type nixl, and this transport is of type filesystem",
        ),
        ("rendezvous:\n  port: 5\n", "rendezvous.port", "belongs to rendezvous type tcpstore"),
        ("rendezvous:\n  type: hub\n  host: h\n", "rendezvous.host", "set rendezvous.type to tcpstore"),
    ],
)
def test_a_key_of_another_type_says_whose_it_is(addition: str, key: str, says: str, refusal: Refusal) -> None:
    error = refusal(MINIMAL + addition)
    assert [problem.key for problem in error.problems] == [key]
    assert error.problems[0].line in (11, 12)
    assert says in str(error)


def test_a_secret_is_refused_and_not_shown(refusal: Refusal) -> None:
    error = refusal(MINIMAL + "    api_key: hunter2\n")
    assert "hunter2" not in str(error)
    assert "put it into a file and name that in api_key_file" in str(error)


def test_a_number_that_python_does_not_print(refusal: Refusal) -> None:
    error = refusal(MINIMAL + f"trainer: {{world: 0x{'f' * 5000}}}\n")
    assert "found a number of thousands of digits" in str(error)
