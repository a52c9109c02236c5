"""What a vLLM says of itself, as it writes it."""

import pytest
from weightsync.orchestrator.cli.doctor.vllm_server import ServerInfo, server_info


@pytest.mark.parametrize(
    ("body", "info"),
    [
        (
            b'{"vllm_config": {"instance_id": "ab12", "weight_transfer_config": {"backend": "weightsync"}, "x": 1},'
            b' "vllm_env": {"VLLM_PLUGINS": ["weightsync"], "VLLM_PORT": 1}, "system_env": {}}',
            ServerInfo(identity="ab12", backend="weightsync", plugins=("weightsync",)),
        ),
        (
            b'{"vllm_config": {"instance_id": "ab12", "weight_transfer_config": null}, "vllm_env": {}}',
            ServerInfo(identity="ab12", backend=""),
        ),
        (
            b'{"vllm_config": {"instance_id": "ab12", "parallel_config": {"data_parallel_size": 2}}}',
            ServerInfo(identity="", backend=""),
        ),
        (b'{"vllm_config": "VllmConfig(model=...)"}', None),
        (b'{"detail": "Not Found"}', None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
    ],
)
def test_a_servers_word(body: bytes, info: ServerInfo | None) -> None:
    assert server_info(body) == info
