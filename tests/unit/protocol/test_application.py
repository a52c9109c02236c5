"""What an engine may say of itself, and which hosts are names."""

import msgspec
import pytest
from weightsync.orchestrator.protocol.application import Admitted, Applicant, Application, is_host_name
from weightsync.orchestrator.protocol.limits import MAX_SERVERS


def test_it_says_no_more_than_it_must() -> None:
    body = b'{"run_id": "glm", "engine": {"name": "a0", "urls": ["http://h:1"]}}'
    engine = Applicant(name="a0", urls=("http://h:1",), kind="vllm", role="both", pair="")
    assert msgspec.json.decode(body, type=Application) == Application(run_id="glm", engine=engine)


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "a/0"},
        {"name": ""},
        {"name": "a\n"},
        {"name": "x" * 129},
        {"urls": []},
        {"urls": ["http://h"] * (MAX_SERVERS + 1)},
        {"urls": ["http://" + "h" * 2048]},
        {"role": "boss"},
        {"pair": "a b"},
        {"kind": "../x"},
        {"api_key_file": "/etc/shadow"},
    ],
)
def test_nothing_that_no_engine_is_comes_in(engine: dict[str, object]) -> None:
    said = {"run_id": "glm", "engine": {"name": "a0", "urls": ["http://h:1"], **engine}}
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(said), type=Application)


@pytest.mark.parametrize("seconds", ["-1", "1e10", "NaN", '"soon"'])
def test_the_next_time_is_a_time(seconds: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(f'{{"again_seconds": {seconds}}}', type=Admitted)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("node1", True), ("a.example", True), ("a.example.", True), ("4090box", True), ("x.0xyz", True),
        ("10.0.0.1", False), ("10.0.0.1.", False), ("127.1", False), ("2130706433", False), ("0x7f000001", False),
        ("0x7f.0.0.0x1", False), ("0x", False), ("::1", False), ("fe80::a", False),
    ],
)  # fmt: skip
def test_what_ends_in_a_number_is_no_name(host: str, name: bool) -> None:
    assert is_host_name(host) is name
