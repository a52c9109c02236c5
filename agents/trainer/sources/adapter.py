"""One adapter of a peft model as what is published, in place of the model: its factors as peft saves them."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import nn
from weightsync.agents.trainer.errors import AdapterError, UnreadTensors
from weightsync.agents.trainer.sources.lora import FACTOR
from weightsync.agents.trainer.sources.modules import module_tensors
from weightsync.agents.trainer.sources.names import plain_names
from weightsync.orchestrator.protocol.names import SAVED_PREFIX, SCALING

CARRIED: Final = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_alpha", "use_rslora",
    "lora_dropout", "bias", "fan_in_fan_out", "init_lora_weights", "eva_config", "loftq_config", "corda_config",
    "lora_ga_config", "velora_config", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
})  # fmt: skip
"""Settings of peft's LoraConfig that are in what engines are told, or change nothing of what an adapter computes."""

BASE_KEPT: Final = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""``init_lora_weights`` with which an adapter begins without changing the base, which engines keep."""


class AdapterSource:
    """The factors of the adapter ``adapter`` of a peft model, read anew at each publish; as ``state.TrainerSource``.

    Args:
        source: the peft model, wrapped or not.
        adapter: its name in ``peft_config``.
        ignore: patterns (``fnmatch``) of names that no engine is to get although they are trained.

    Raises:
        AdapterError: it is no peft model, has no such adapter, or one that is no plain LoRA.
    """

    def __init__(self, source: object, adapter: str, *, ignore: Sequence[str] = ()) -> None:
        if not isinstance(source, nn.Module):
            raise AdapterError(adapter, f"adapter= is for a peft model, and the source is a {type(source).__name__}")
        self._source, self._adapter, self._ignore = source, adapter, tuple(ignore)
        self._scaling()

    def state(self) -> dict[str, torch.Tensor]:
        """The factors by the names in ``adapter_model.safetensors``, and the scaling. Nothing is copied.

        Raises:
            AdapterError: the adapter has no factors, or its settings have changed to what cannot be published.
            UnfitTensor: see ``module_tensors``.
        """
        factors, _ = self._read()
        device = next(iter(factors.values())).device
        return {**factors, SCALING: torch.tensor(self._scaling(), dtype=torch.float64, device=device)}

    values = state

    def account_for(self, state: Mapping[str, torch.Tensor], read: Collection[str]) -> None:
        """That everything that is trained is read.

        Raises:
            UnreadTensors: a trained tensor is no factor of this adapter, or the engines need no such factor.
        """
        _, others = self._read()
        trained = [name for name, tensor in others.items() if tensor.requires_grad]
        unread = [*sorted(state.keys() - set(read)), *trained]
        left = [name for name in unread if not any(fnmatchcase(name, pattern) for pattern in self._ignore)]
        if left:
            raise UnreadTensors(left)

    def _read(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The adapter's factors by their saved names, and everything else by its plain name."""
        given = module_tensors(self._source)
        plain = plain_names(given)
        factors: dict[str, torch.Tensor] = {}
        others: dict[str, torch.Tensor] = {}
        for name, tensor in given.items():
            found = FACTOR.fullmatch(plain(name))
            if found is None or found["adapter"] != self._adapter:
                others[plain(name)] = tensor
                continue
            side = found["side"].upper()
            kind = f"lora_embedding_{side}" if found["embedding"] else f"lora_{side}.weight"
            factors[f"{SAVED_PREFIX}{found['module']}.{kind}"] = tensor
        if not factors:
            raise AdapterError(self._adapter, "the model has no factors (lora_A, lora_B) of it")
        return factors, others

    def _scaling(self) -> list[float]:
        """``lora_alpha`` and ``use_rslora``."""
        configs: Mapping[str, Any] | None = next(
            (found for part in self._source.modules() if (found := getattr(part, "peft_config", None))), None
        )
        if configs is None:
            raise AdapterError(self._adapter, f"{type(self._source).__name__} is no peft model (it has no peft_config)")
        if self._adapter not in configs:
            raise AdapterError(self._adapter, f"the model has no such adapter, only {', '.join(configs)}")
        config = configs[self._adapter]
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise AdapterError(self._adapter, f"peft_type is {kind}; only LORA can be published alone")
        for setting, value in vars(config).items():
            if value and setting not in CARRIED and not setting.startswith("_"):
                raise AdapterError(
                    self._adapter, f"{setting} is {value!r}: an adapter alone does not carry it; publish merged weights"
                )
        begin = getattr(config, "init_lora_weights", True)
        if (begin.lower() if isinstance(begin, str) else begin) not in BASE_KEPT:
            raise AdapterError(
                self._adapter, f"init_lora_weights is {begin!r}, which may change the base; publish merged weights"
            )
        return [float(config.lora_alpha), float(config.use_rslora)]
