"""Which routes of a vLLM server are for its clients; before every other one ``guard`` asks for the admin key.

A list of those that are open, so that a route that a new vLLM brings is closed until somebody has looked at it: the
test that walks vLLM's router fails for one that neither list knows.
"""

import os
import re
from typing import Final

from weightsync.agents.errors import AgentError

OPEN_VARIABLE: Final = "WEIGHTSYNC_PUBLIC_ROUTES"
"""Further paths, separated by commas, that the operator of the server opens to its clients."""

PUBLIC: Final = frozenset(
    {
        "/classify",
        "/cohere/v2/chat",
        "/detokenize",
        "/docs",
        "/docs/oauth2-redirect",
        "/generative_scoring",
        "/health",
        "/inference/v1/abort_requests",
        "/inference/v1/generate",
        "/invocations",
        "/load",
        "/metrics",
        "/metrics/",
        "/openapi.json",
        "/ping",
        "/pooling",
        "/redoc",
        "/rerank",
        "/score",
        "/static/{file}",
        "/tokenize",
        "/tokenizer_info",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/derender",
        "/v1/chat/completions/render",
        "/v1/completions",
        "/v1/completions/derender",
        "/v1/completions/render",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/messages/render",
        "/v1/models",
        "/v1/realtime",
        "/v1/rerank",
        "/v1/responses",
        "/v1/responses/render",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/score",
        "/v1/systemone",
        "/v2/embed",
        "/v2/rerank",
        "/version",
        "/weightsync/ready",
    }
)
"""Of vLLM 0.24 to 0.33, and our own. Those below /v1, /v2, /inference and /cohere ask for vLLM's ``--api-key`` if it
has one."""

ADMIN: Final = frozenset(
    {
        "/adapters",
        "/adapters/{adapter_name}",
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/finish_weight_update",
        "/init_weight_transfer_engine",
        "/pause",
        "/release_kv_cache_memory",
        "/resume",
        "/scale_elastic_ep",
        "/shutdown_weight_transfer_engine",
        "/sleep",
        "/start_draft_weight_update",
        "/start_weight_update",
        "/update_weight_version",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/wake_up",
        "/weight_checker",
    }
)
"""Known ones that change weights or adapters, or stop the engine: nobody opens these."""

INSPECTING: Final = frozenset(
    {
        "/abort_requests",
        "/fault_tolerance/status",
        "/get_world_size",
        "/is_paused",
        "/is_scaling_elastic_ep",
        "/is_sleeping",
        "/kv_event_sources",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/server_info",
        "/start_profile",
        "/stop_profile",
        "/weight_info",
    }
)
"""Known ones that ask for the key unless the operator opens them."""


class RoutesError(AgentError):
    """OPEN_VARIABLE cannot be followed. The operator's fault; the message names the path."""


def open_routes(text: str | None = None) -> "re.Pattern[str]":
    """What a path has to match in full to need no key.

    Args:
        text: of OPEN_VARIABLE; None: the environment's.

    Raises:
        RoutesError: it names no path, or one that is never open.
    """
    text = os.environ.get(OPEN_VARIABLE, "") if text is None else text
    more = frozenset(path for part in text.split(",") if (path := part.strip()))
    for path in sorted(more):
        if re.fullmatch(r"(/[A-Za-z0-9._~-]+)+/?", path) is None:
            raise RoutesError(f"{OPEN_VARIABLE}: {path[:100]!r} is no path; write whole ones, as /my/route,/other")
        if _matching(ADMIN).fullmatch(path.rstrip("/")):
            raise RoutesError(f"{OPEN_VARIABLE}: {path} changes weights or stops the engine, so it is never open")
    return _matching(PUBLIC | more)


def _matching(paths: frozenset[str]) -> "re.Pattern[str]":
    return re.compile("|".join(map(_pattern, sorted(paths))))


def _pattern(path: str) -> str:
    return "".join("[^/]+" if part.startswith("{") else re.escape(part) for part in re.split(r"(\{\w+\})", path))
