"""What a vLLM server says of itself in ``/server_info``, which it has with VLLM_SERVER_DEV_MODE=1.

``instance_id`` of its configuration is drawn at each start (``vllm.config.VllmConfig``): it tells whether two URLs are
one server, and whether one URL is several. With data parallelism vLLM starts several API servers, each with its own.
"""

from typing import Final

import msgspec

INFO: Final = "/server_info?config_format=json"

BACKEND: Final = "weightsync"

PLUGINS: Final = "VLLM_PLUGINS"


class _Transfer(msgspec.Struct):
    backend: str = ""


class _Parallel(msgspec.Struct, frozen=True):
    data_parallel_size: int = 1


class _Config(msgspec.Struct):
    instance_id: str = ""
    parallel_config: _Parallel = _Parallel()
    weight_transfer_config: _Transfer | None = None


class _ServerInfo(msgspec.Struct):
    vllm_config: _Config
    vllm_env: dict[str, object] = {}


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """``identity``: of one start of a server, empty where it has none; ``backend``: of its weight transfer, empty where
    none is configured; ``plugins``: those that it may load, None: all."""

    identity: str
    backend: str
    plugins: tuple[str, ...] | None = None


def server_info(data: bytes) -> ServerInfo | None:
    """The body of an answer; None where it is of another form."""
    try:
        found = msgspec.json.decode(data, type=_ServerInfo)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    config, plugins = found.vllm_config, found.vllm_env.get(PLUGINS)
    named = tuple(str(name) for name in plugins) if isinstance(plugins, list | tuple) else None
    transfer = config.weight_transfer_config
    identity = config.instance_id if config.parallel_config.data_parallel_size == 1 else ""
    return ServerInfo(identity=identity, backend=transfer.backend if transfer else "", plugins=named)
