"""The name of our backend, whether the user of a vLLM chose it, and where its log lines go. Imports nothing."""

import logging
import os
from typing import Any, Final

logger = logging.getLogger("vllm.weightsync")
"""Below vLLM's own logger, so that our lines appear in the server's log with its level and format."""

BACKEND: Final = "weightsync"
"""The name that users choose by ``--weight-transfer-config``."""

ADAPTER_VARIABLE: Final = "WEIGHTSYNC_ADAPTER"
"""``NAME=DIRECTORY`` of a LoRA adapter that rounds write in place of the model (``lora.declared``)."""


def writes_adapter() -> bool:
    """Whether this server's rounds write an adapter."""
    return bool(os.environ.get(ADAPTER_VARIABLE))


def chosen(vllm_config: Any) -> bool:
    """Whether the user of this ``VllmConfig`` chose our backend."""
    transfer = getattr(vllm_config, "weight_transfer_config", None)
    return getattr(transfer, "backend", None) == BACKEND
