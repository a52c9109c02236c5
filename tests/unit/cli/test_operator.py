"""The operator's commands: each verb of the daemon is one, and takes what the daemon asks for."""

import getpass

import pytest
from command_line import cli
from weightsync.orchestrator.cli import operator
from weightsync.orchestrator.daemon.admin.verbs import VERBS


def test_each_verb_of_the_daemon_is_a_command() -> None:
    assert [verb for verb, _, _ in operator.VERBS] == list(VERBS)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["hold"], "required: ENGINE"),
        (["release"], "required: ENGINE"),
        (["declare-dead"], "required: WRITER"),
        (["maintenance", "maybe"], "invalid choice"),
        (["abort", "e0"], "unrecognized arguments: e0"),
    ],
)
async def test_a_wrong_command_line(arguments: list[str], wrong: str) -> None:
    done = await cli(*arguments)
    assert done.code == 2
    assert wrong in done.err


def test_who_asks_even_where_the_user_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operator.who().startswith(f"{getpass.getuser()}@")

    def nameless() -> str:
        raise KeyError("uid 12345")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert operator.who().startswith("unknown@")
