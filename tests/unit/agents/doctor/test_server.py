"""Environments of vLLM servers, with and without each trap."""

from pathlib import Path

import pytest
from engine_places import place, token_file
from weightsync.agents.doctor import server
from weightsync.agents.inference.place import place_of


@pytest.mark.parametrize(
    ("environ", "checks"),
    [
        ({"VLLM_SERVER_DEV_MODE": "1"}, []),
        ({"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "lora,weightsync"}, []),
        ({}, ["VLLM_SERVER_DEV_MODE"]),
        ({"VLLM_SERVER_DEV_MODE": "0"}, ["VLLM_SERVER_DEV_MODE"]),
        ({"VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_RUST_FRONTEND": "1"}, ["VLLM_USE_RUST_FRONTEND"]),
        ({"VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_RUST_FRONTEND": "false"}, []),
        ({"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": ""}, ["VLLM_PLUGINS"]),
        ({"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "lora, weightsync"}, ["VLLM_PLUGINS"]),
    ],
)
def test_an_engines_environment(environ: dict[str, str], checks: list[str]) -> None:
    found = list(server.engine(environ, "weightsync"))
    assert [finding.check for finding in found] == checks
    assert {finding.level for finding in found} <= {"error"}


def test_what_stands_before_the_admin_routes(tmp_path: Path) -> None:
    good = place(token_file(tmp_path), "wss://head:7410/agents", "glm", "a0")

    def told(**more: str) -> list[tuple[str, str]]:
        environ = good | more
        return [(each.level, each.check) for each in server.guard(environ, place_of(environ))]

    assert told() == []
    here = {"WEIGHTSYNC_HUB_URL": "ws://127.0.0.1:7410/agents"}
    assert told(**here) == []
    assert told(**here, WEIGHTSYNC_LOOPBACK_DEMO="1") == [("warning", "WEIGHTSYNC_LOOPBACK_DEMO")]
    opened = told(WEIGHTSYNC_PUBLIC_ROUTES="/mine", WEIGHTSYNC_ALLOW_CALLS="mine")
    assert opened == [("note", "WEIGHTSYNC_PUBLIC_ROUTES"), ("note", "WEIGHTSYNC_ALLOW_CALLS")]
