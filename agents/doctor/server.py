"""What a vLLM server needs in its environment, and what stands before its admin routes."""

from collections.abc import Iterator, Mapping

from weightsync.agents.inference.place import LOOPBACK_VARIABLE, Place
from weightsync.agents.vllm.guard import RUST_VARIABLE, has_rust_frontend
from weightsync.agents.vllm.routes import OPEN_VARIABLE
from weightsync.agents.vllm.worker_calls import ALLOW_VARIABLE
from weightsync.orchestrator.protocol.findings import Finding


def guard(environ: Mapping[str, str], place: Place) -> Iterator[Finding]:
    """What stands before an engine's admin routes, and what the operator has opened."""
    if place.demo:
        what = f"{LOOPBACK_VARIABLE}=1: whoever is on this machine may call the server's admin routes"
        yield Finding("warning", what, f"unset {LOOPBACK_VARIABLE} where it is no demo", LOOPBACK_VARIABLE)
    for name, who in ((OPEN_VARIABLE, "clients may ask for"), (ALLOW_VARIABLE, "holders of the admin key may call")):
        if environ.get(name, "").strip():
            yield Finding("note", f"{name}: {who} {environ[name]}", f"unset {name} where nobody needs it", name)


def engine(environ: Mapping[str, str], plugin: str) -> Iterator[Finding]:
    """What a vLLM server needs in its environment. ``plugin``: its name."""
    if not environ.get("VLLM_SERVER_DEV_MODE", "").strip().strip("0"):  # vLLM reads a number
        what = "VLLM_SERVER_DEV_MODE is not 1: the server will not have the admin routes"
        yield Finding(
            "error", what, "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment", "VLLM_SERVER_DEV_MODE"
        )
    if has_rust_frontend(environ):
        what = f"{RUST_VARIABLE}={environ[RUST_VARIABLE]}: nothing would stand before the server's admin routes"
        yield Finding("error", what, f"unset {RUST_VARIABLE}: the server does not start with it", RUST_VARIABLE)
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None and plugin not in allowed.split(","):  # as vLLM reads it: a blank is part of a name
        what = f"VLLM_PLUGINS={allowed} keeps the plugin {plugin} from being loaded"
        yield Finding("error", what, f"unset VLLM_PLUGINS, or add {plugin} to it", "VLLM_PLUGINS")
