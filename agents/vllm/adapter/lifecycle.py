"""Adapter to vLLM whose engine class owns the whole update (constructor ``config, vllm_config, device, model``)."""

from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from weightsync.agents.inference import calls
from weightsync.agents.vllm.adapter import common as engine


class LifecycleEngine(WeightTransferEngine):  # type: ignore[misc]
    """Start and finish do nothing here: the round is inside ``update_weights``, and parameters stay as they are."""

    init_info_cls = calls.InitInfo
    update_info_cls = calls.UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.ranks, self.agent = engine.equip(model, device, vllm_config.parallel_config, vllm_config)

    def parse_init_info(self, init_dict: dict[str, Any]) -> calls.InitInfo:
        return calls.parse_init_info(init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> calls.UpdateInfo:
        return calls.parse_update_info(update_dict, calls.UpdateInfo)

    def init_transfer_engine(self, init_info: calls.InitInfo) -> None:
        self.agent.begin(init_info)

    def start_weight_update(self) -> None:
        """Nothing: no parameter is taken away or laid out anew."""

    def finish_weight_update(self) -> None:
        """Nothing: the update has left the parameters as they are served."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Blocks until the round has ended here; raises unless its version is committed."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: calls.UpdateInfo) -> None:
        calls.synchronize(self.device)
        self.agent.update(update_info)

    def shutdown(self) -> None:
        self.agent.close()
