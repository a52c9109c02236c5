"""Adapter to vLLM whose worker owns the update and lends a loader (constructor ``config, parallel_config, model``)."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Never

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from weightsync.agents.inference import calls
from weightsync.agents.vllm.adapter import common as engine
from weightsync.agents.vllm.recorder.load_hook import config_of


class CallbackUpdateInfo(calls.UpdateInfo, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """This vLLM's worker reads ``update_kind`` of every update."""

    update_kind: Literal["dense"] = "dense"


class CallbackEngine(WeightTransferEngine):  # type: ignore[misc]
    """Start and finish never reach this class; with ``is_checkpoint_format=false`` they leave the parameters alone."""

    init_info_cls = calls.InitInfo
    update_info_cls = CallbackUpdateInfo

    def __init__(self, config: Any, parallel_config: Any, model: torch.nn.Module) -> None:
        super().__init__(config, parallel_config, model)
        self.device = next(model.parameters()).device
        # Its expert layers have not been run by themselves on a GPU yet, and one that fails there ends the worker.
        self.ranks, self.agent = engine.equip(model, self.device, parallel_config, config_of(model), lone_experts=False)

    def parse_init_info(self, init_dict: dict[str, Any]) -> calls.InitInfo:
        return calls.parse_init_info(init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> CallbackUpdateInfo:
        return calls.parse_update_info(update_dict, CallbackUpdateInfo)

    def init_transfer_engine(self, init_info: calls.InitInfo) -> None:
        self.agent.begin(init_info)

    def receive_weights(self, update_info: CallbackUpdateInfo, load_weights: Callable[..., Any]) -> None:
        """Blocks until the round has ended here; raises unless its version is committed.

        ``load_weights`` is the model's own when the update was started in checkpoint format. Its parameters are then
        without memory, so that there is nothing to write to; ``hold`` refuses such a start before it does that.
        """
        if getattr(load_weights, "__self__", None) is self.model:
            raise calls.InfoError("the update was not started with is_checkpoint_format=false")
        calls.synchronize(self.device)
        self.agent.update(update_info)

    def shutdown(self) -> None:
        self.agent.close()

    @staticmethod
    def trainer_send_weights(iterator: Iterator[tuple[str, torch.Tensor]], trainer_args: Any) -> Never:
        """Trainers use ``weightsync.agents.trainer``, whose writes the daemon grants."""
        raise NotImplementedError("use weightsync.agents.trainer.TrainerAgent in the trainer")
