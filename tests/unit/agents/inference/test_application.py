"""What a server's environment says of its engine."""

from pathlib import Path

import pytest
from weightsync.agents.errors import AgentError
from weightsync.agents.inference.application import applicant
from weightsync.orchestrator.protocol.application import Applicant, Application


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("the-engines-token")
    return {
        "WEIGHTSYNC_HUB_URL": "ws://head:7410/agents",
        "WEIGHTSYNC_TOKEN_FILE": str(tmp_path / "token"),
        "WEIGHTSYNC_RUN_ID": "glm",
        "WEIGHTSYNC_ENGINE": "a0",
        "WEIGHTSYNC_ENGINE_URL": "http://10.1.0.1:8000",
    }


def test_without_a_url_the_configuration_names_it(environ: dict[str, str]) -> None:
    del environ["WEIGHTSYNC_ENGINE_URL"]
    assert applicant("vllm", environ) is None
    assert applicant("vllm", {}) is None


def test_it_says_name_and_url(environ: dict[str, str]) -> None:
    thread = applicant("vllm", environ)
    assert thread is not None
    assert thread._application == Application(
        run_id="glm", engine=Applicant(name="a0", urls=("http://10.1.0.1:8000",), kind="vllm")
    )
    assert (thread._url, thread._token_file) == ("ws://head:7410/engines", Path(environ["WEIGHTSYNC_TOKEN_FILE"]))


def test_it_says_all_there_is_to_say(environ: dict[str, str]) -> None:
    more = {
        "WEIGHTSYNC_ENGINE_URL": "http://n1:8000/, http://n2:8000",
        "WEIGHTSYNC_ENGINE_ROLE": "decode",
        "WEIGHTSYNC_ENGINE_PAIR": "p0",
    }
    thread = applicant("other", environ | more)
    assert thread is not None
    assert thread._application.engine == Applicant(
        name="a0", urls=("http://n1:8000", "http://n2:8000"), kind="other", role="decode", pair="p0"
    )


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("WEIGHTSYNC_RUN_ID", "", "WEIGHTSYNC_RUN_ID not set"),
        ("WEIGHTSYNC_ENGINE", "", "WEIGHTSYNC_ENGINE not set"),
        ("WEIGHTSYNC_TOKEN_FILE", "", "WEIGHTSYNC_TOKEN_FILE not set"),
        ("WEIGHTSYNC_ENGINE", "a/0", r"\$.name.*WEIGHTSYNC_ENGINE"),
        ("WEIGHTSYNC_ENGINE_ROLE", "boss", r"Invalid enum value 'boss'.*WEIGHTSYNC_ENGINE_ROLE"),
        ("WEIGHTSYNC_ENGINE_PAIR", "a b", r"\$.pair.*WEIGHTSYNC_ENGINE_PAIR"),
        ("WEIGHTSYNC_TOKEN_FILE", "/absent", "WEIGHTSYNC_TOKEN_FILE: token file /absent: No such file"),
        ("WEIGHTSYNC_HUB_URL", "http://head:7410", "hub url 'http://head:7410': write ws://host:port/agents"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environ: dict[str, str], variable: str, value: str, words: str) -> None:
    with pytest.raises(AgentError, match=words):
        applicant("vllm", environ | {variable: value})


def test_a_demo_that_makes_itself_a_member_says_everything(environ: dict[str, str]) -> None:
    demo = environ | {"WEIGHTSYNC_LOOPBACK_DEMO": "1", "WEIGHTSYNC_HUB_URL": "ws://127.0.0.1:7410/agents"}
    assert applicant("vllm", demo) is not None
    with pytest.raises(AgentError, match="set WEIGHTSYNC_ENGINE, too"):
        applicant("vllm", demo | {"WEIGHTSYNC_ENGINE": ""})
