"""What every model table has: typed access to the configuration, and helpers that name tensors and their treatment."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

import torch
from weightsync.agents.trainer.errors import ConversionTableError
from weightsync.agents.trainer.models.forms import CHECKPOINT, TrainerForm, recognised
from weightsync.agents.trainer.slots.conversion import EXPERT, ConversionSpec, Source
from weightsync.agents.trainer.slots.quantization import BLOCK, FP8_SUFFIX, QuantizationSpec

Rows = tuple[int, int]
"""(start, length) of a tensor's rows within a fused trainer tensor."""


@runtime_checkable
class HasValues(Protocol):
    """A configuration object, as transformers' PretrainedConfig."""

    def to_dict(self) -> dict[str, object]:
        """All values, as ``config.json`` has them."""
        ...


ConfigSource = str | os.PathLike[str] | Mapping[str, object] | HasValues


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Hugging Face ``config.json``, read by type."""

    values: Mapping[str, object]

    @staticmethod
    def of(source: "ConfigSource") -> "ModelConfig":
        """From its values, an object that has them (transformers' PretrainedConfig), its file or its model directory.

        Raises:
            ConversionTableError: it is none of these, or the file holds no configuration.
            OSError: the file cannot be read.
        """
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            file = path / "config.json" if path.is_dir() else path
            try:
                values = json.loads(file.read_text())
            except ValueError as error:
                raise ConversionTableError(f"{file} is no JSON: {error}") from error
            where = str(file)
        else:
            values = source.to_dict() if isinstance(source, HasValues) else source
            where = type(source).__name__
        if not isinstance(values, Mapping):
            raise ConversionTableError(
                f"{where} is no model configuration: give a config.json, its values or an object"
            )
        return ModelConfig(values)

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer; ``default`` where it is absent or null.

        Raises:
            ConversionTableError: absent without a default, or no integer.
        """
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, int):
            raise ConversionTableError(f"the model configuration has no integer {name!r}: {value!r}")
        return value

    def first_integer(self, *names: str) -> int:
        """The first of ``names`` that is present (the same quantity has several names over versions)."""
        present = next((name for name in names if self.values.get(name) is not None), names[0])
        return self.integer(present)

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean; ``default`` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else bool(value)

    def text(self, name: str, default: str = "") -> str:
        """A string; ``default`` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else str(value)

    def sequence(self, name: str) -> tuple[object, ...]:
        """A list (or string, as its characters); empty where it is absent or null."""
        value = self.values.get(name)
        return tuple(value) if isinstance(value, list | tuple | str) else ()

    def part(self, name: str) -> "ModelConfig":
        """A nested configuration; empty where it is absent or null."""
        value = self.values.get(name)
        return ModelConfig(value if isinstance(value, Mapping) else {})


class ModelTable:
    """Base of all tables: ``conversion_specs(layer_idx)`` and ``non_layer_specs()`` over one configuration.

    Args:
        config: the Hugging Face configuration.
        forward_dtype: what the trainer's forward pass uses; masters are rounded to it before anything else.
        fp8: whether engines serve 128 × 128 FP8 blocks; None: what the configuration's ``quantization_config`` says.
        form: the trainer's names; None: recognised from its keys (``for_keys``).

    Raises:
        ConversionTableError: a quantisation that no block of FP8 expresses.
    """

    architectures: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: ModelConfig,
        *,
        forward_dtype: torch.dtype = torch.bfloat16,
        fp8: bool | None = None,
        form: TrainerForm | None = None,
    ) -> None:
        self.config = config
        self.forward_dtype = forward_dtype
        quantization = config.part("quantization_config")
        method = quantization.text("quant_method")
        self.fp8 = fp8 if fp8 is not None else bool(method)
        if self.fp8 and method not in ("", "fp8"):
            raise ConversionTableError(
                f"quantisation method {method!r} has no conversion here; fp8 in blocks of 128 × 128 has"
            )
        block = quantization.sequence("weight_block_size")
        if self.fp8 and method and block != BLOCK:
            raise ConversionTableError(f"fp8 weight_block_size {block} is not 128 × 128")
        self._unquantized = {str(name) for name in quantization.sequence("modules_to_not_convert")}
        self._form_is_given = form is not None
        self.form = form or CHECKPOINT

    @property
    def layers(self) -> int:
        """Decoder layers, without those of multi-token prediction."""
        return self.config.integer("num_hidden_layers")

    def conversion_specs(self, layer_idx: int) -> Iterator[ConversionSpec]:
        """All logical tensors of one layer, in an order that is the same on every rank."""
        raise NotImplementedError

    def non_layer_specs(self) -> Iterator[ConversionSpec]:
        """Embeddings, final norm and, unless tied, the head."""
        yield self._spec("model.embed_tokens.weight", self._cast())
        yield self._spec("model.norm.weight", self._cast())
        if not self.config.flag("tie_word_embeddings"):
            yield self._spec("lm_head.weight", self._cast())

    def for_keys(self, keys: Collection[str]) -> Self:
        """This table in the form that ``keys`` show; unchanged where a form was given explicitly."""
        if self._form_is_given:
            return self
        return type(self)(self.config, forward_dtype=self.forward_dtype, fp8=self.fp8, form=recognised(keys))

    # ---------------------------------------------------------------- for tables: one line per logical tensor
    def linear(self, layer: int, name: str, rows: Rows | None = None) -> ConversionSpec:
        """A matrix that is quantised where the model is. ``rows``: its place, should the trainer fuse it."""
        return self._layer_spec(layer, name, self._blocks(f"model.layers.{layer}.{name}"), rows)

    def plain(self, layer: int, name: str, rows: Rows | None = None) -> ConversionSpec:
        """A tensor that is only cast to the forward dtype."""
        return self._layer_spec(layer, name, self._cast(), rows)

    def widened(self, layer: int, name: str) -> ConversionSpec:
        """A tensor that checkpoints store in the forward dtype and engines keep in float32."""
        return self._layer_spec(layer, name, QuantizationSpec(torch.float32, forward_dtype=self.forward_dtype))

    def float32(self, layer: int, name: str) -> ConversionSpec:
        """A tensor that the model declares float32: never rounded."""
        treatment = QuantizationSpec(torch.float32, forward_dtype=self.forward_dtype, keeps_master=True)
        return self._layer_spec(layer, name, treatment)

    def experts(self, layer: int, count: int, intermediate: int) -> Iterator[ConversionSpec]:
        """gate, up and down projections of ``count`` routed experts, stacked or one by one as the form has them."""
        for order, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
            stack = self.form.stacks.get(projection)
            treatment = self._blocks(f"model.layers.{layer}.mlp.experts.0.{projection}.weight")
            if stack is None:
                for expert in range(count):
                    name = f"mlp.experts.{expert}.{projection}.weight"
                    yield self._layer_spec(layer, name, treatment, expert=expert)
                continue
            # Two projections in one stack lie behind each other along the rows, gate before up.
            shared = list(self.form.stacks.values()).count(stack) > 1
            part = (0, order * intermediate, intermediate) if shared else (0, 0, None)
            yield ConversionSpec(
                f"model.layers.{layer}.mlp.experts.{EXPERT}.{projection}.weight",
                (Source(f"model.layers.{layer}.{stack}", *part),),
                quantization=treatment,
                experts=count,
                layer=layer,
            )

    def _cast(self) -> QuantizationSpec:
        return QuantizationSpec(forward_dtype=self.forward_dtype)

    def _blocks(self, name: str) -> QuantizationSpec:
        module = name.removesuffix(".weight")
        # An entry of the list is a whole name, a module above it, or the last parts of a name.
        kept = any(module == m or module.startswith(m + ".") or module.endswith("." + m) for m in self._unquantized)
        if not self.fp8 or kept:
            return self._cast()
        return QuantizationSpec(torch.float8_e4m3fn, FP8_SUFFIX, forward_dtype=self.forward_dtype)

    def _spec(self, name: str, treatment: QuantizationSpec) -> ConversionSpec:
        return ConversionSpec(name, (Source(self.form.renames.get(name, name)),), quantization=treatment)

    def _layer_spec(
        self,
        layer: int,
        name: str,
        treatment: QuantizationSpec,
        rows: Rows | None = None,
        expert: int | None = None,
    ) -> ConversionSpec:
        prefix = f"model.layers.{layer}."
        fused = self.form.fused.get(name)
        if fused is not None and rows is not None:
            source = Source(prefix + fused, 0, *rows)
        else:
            source = Source(prefix + self.form.renames.get(name, name))
        return ConversionSpec(prefix + name, (source,), quantization=treatment, layer=layer, expert_id=expert)
