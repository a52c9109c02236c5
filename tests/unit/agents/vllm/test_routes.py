"""Which routes are for clients: every route of the vLLM that is installed is known, by its own router."""

import argparse
import re
from collections.abc import Iterator
from typing import Any

import pytest
from weightsync.agents.vllm import routes
from weightsync.orchestrator.daemon.engines.vllm import OPTIONAL, REQUIRED


def everything(app: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all routes of ``app``, mounted ones included."""
    for route in app.routes:
        path = prefix + route.path
        if getattr(route, "routes", None) and not hasattr(route, "endpoint"):
            yield from everything(route, path)
        yield path


@pytest.fixture(scope="module")
def app() -> Any:
    """vLLM's application with all that it can have, built by vLLM itself."""
    found = pytest.importorskip("vllm.entrypoints.launchers.app")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            patch.setenv(name, "1")
        parser = make_arg_parser(FlexibleArgumentParser())
        args: argparse.Namespace = parser.parse_args(["--enable-tokenizer-info-endpoint"])
        tasks = ("generate", "render", "transcription", "realtime", "embed", "classify", "score", "token_embed")
        yield found.build_app(args, tasks, None)


def test_each_route_of_the_installed_vllm_is_known(app: Any) -> None:
    known = routes.PUBLIC | routes.ADMIN | routes.INSPECTING
    found = set(everything(app))
    assert len(found) > 50
    unknown = {path for path in found if path not in known}
    assert unknown == set(), "look at what they do, and put each into one of the lists of agents/vllm/routes.py"


def test_only_what_is_public_is_open(app: Any) -> None:
    opened = routes.open_routes("")
    closed = {path for path in everything(app) if not opened.fullmatch(path.replace("{response_id}", "r1"))}
    assert closed <= routes.ADMIN | routes.INSPECTING
    assert closed >= (set(REQUIRED) | set(OPTIONAL)) - {"/version"}
    assert closed >= {"/sleep", "/wake_up", "/server_info", "/resume", "/v1/load_lora_adapter", "/scale_elastic_ep"}


def test_the_lists_have_nothing_in_common() -> None:
    assert not routes.PUBLIC & (routes.ADMIN | routes.INSPECTING)
    assert not routes.ADMIN & routes.INSPECTING


@pytest.mark.parametrize(
    "path",
    [
        "/pause",
        "/unheard/of",
        "/health/",
        "/health/../pause",
        "//health",
        "/v1/models/../../pause",
        "/v1/responses/a/b",
        "/v1/responses/",
        "/HEALTH",
        "/health\n",
        "",
    ],
)
def test_everything_else_is_closed(path: str) -> None:
    assert routes.open_routes("").fullmatch(path) is None


def test_the_operator_opens_a_route() -> None:
    opened = routes.open_routes(" /kv_event_sources, /my.app/v2 ,")
    for path in ("/kv_event_sources", "/my.app/v2", "/health"):
        assert opened.fullmatch(path)
    assert opened.fullmatch("/myXapp/v2") is None


@pytest.mark.parametrize("path", sorted(routes.ADMIN))
def test_nobody_opens_what_changes_weights(path: str) -> None:
    path = path.replace("{adapter_name}", "mine")
    for text in (path, f"/x,{path}", path + "/"):
        with pytest.raises(routes.RoutesError, match=f"{re.escape(path)}/? changes weights"):
            routes.open_routes(text)


@pytest.mark.parametrize("text", ["pause", "/a b", "/a/{x}", "/a?b", ".*", "/", "/a//b"])
def test_a_path_is_a_path(text: str) -> None:
    with pytest.raises(routes.RoutesError, match=r"WEIGHTSYNC_PUBLIC_ROUTES: .* is no path"):
        routes.open_routes(text)


def test_the_environment_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(routes.OPEN_VARIABLE, "/mine")
    assert routes.open_routes().fullmatch("/mine")
