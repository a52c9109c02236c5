"""The adapter that rounds write, as one worker serves it.

Its tensors lie whole in an arena of ours, in the engine's dtype for adapters; writers and digests reach them there, as
they reach parameters. After a write vLLM's own loader makes the served adapter of them: it reads them from files of
peft's form that exist for as long as it reads, so that what is served is what a fresh engine loads.

vLLM may drop an adapter and load it again on use. The hook (``hook``) has it load from the arena then, never from the
files that it started with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from weightsync.agents.memory.arena import ALIGNMENT, arena, region_of
from weightsync.agents.vllm.backend import ADAPTER_VARIABLE, logger
from weightsync.agents.vllm.lora.declared import CONFIG, WEIGHTS, AdapterRefused, Declared
from weightsync.orchestrator.protocol.layout import Layout, LeftOut, Tensor, row
from weightsync.orchestrator.protocol.limits import MAX_LEFT_OUT, MAX_LEFT_OUT_CHARS
from weightsync.orchestrator.protocol.names import SAVED_PREFIX, SCALING, SCALING_DTYPE, SCALING_SHAPE

MEMORY_FILES: Final = Path("/dev/shm")
"""Where the files lie while vLLM reads them, if there is such a place: memory, no disk."""


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """Who was asked to load the adapter, and how: vLLM's ``WorkerLoRAManager`` and ``LoRARequest``."""

    manager: Any
    request: Any


class ServedAdapter:
    """``inference.calls.LiveModel`` of an adapter; one for each worker.

    Args:
        declared: whose files the tensors begin with.
        base: names of the model's parameters, which stay as they are.
        dtype: of the engine's adapters.
        device: of the model.

    Raises:
        AdapterRefused: a tensor that is no matrix of numbers.
    """

    def __init__(self, declared: Declared, base: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
        self.declared = declared
        self.asked: LoadAsked | None = None
        self.layout, places = _laid_out(declared, base, dtype)
        memory = arena(max(end for _, end in places), device)
        self.layout = _in_region(self.layout, memory)
        self.tensors = [memory]
        self._values: dict[str, torch.Tensor] = {}
        for tensor, (begin, end) in zip(self.layout.tensors, places, strict=True):
            self._values[tensor.name] = memory[begin:end].view(getattr(torch, tensor.dtype)).view(tensor.shape)
        first = load_file(declared.directory / WEIGHTS)
        scaling = [float(declared.config["lora_alpha"]), float(bool(declared.config.get("use_rslora")))]
        self._fill({**first, SCALING: torch.tensor(scaling, dtype=torch.float64)})

    def check(self) -> None:
        """See ``LiveModel.check``.

        Raises:
            AdapterRefused: vLLM has not been asked for this adapter since it started, so that nobody could use it.
        """
        self._asked()

    def _asked(self) -> LoadAsked:
        if self.asked is None:
            name = self.declared.name
            raise AdapterRefused(
                f"adapter {name!r} is written by rounds ({ADAPTER_VARIABLE}), and the server does not serve it; start"
                f" it with --enable-lora --lora-modules {name}={self.declared.directory}"
            )
        return self.asked

    def refresh(self) -> None:
        """Have vLLM load what the arena holds, in place of what it has loaded.

        Raises:
            AdapterRefused: see ``check``; or vLLM does not list the adapter after it has loaded it.
        """
        asked = self._asked()
        manager, request = asked.manager, asked.request
        manager.remove_adapter(request.lora_int_id)
        manager.add_adapter(request)
        if request.lora_int_id not in manager.list_adapters():
            raise AdapterRefused(f"adapter {self.declared.name!r}: vLLM does not list it after it has loaded it")

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See ``LiveModel.load``."""
        self._fill(dict(weights))
        self.refresh()

    def rebalanced(self, known: str) -> None:
        """An adapter is whole on every rank, wherever experts are."""

    @contextmanager
    def files(self) -> Iterator[Path]:
        """A directory of peft's form with what the arena holds; it is gone afterwards.

        Raises:
            OSError: there is no room for it.
        """
        place = MEMORY_FILES if MEMORY_FILES.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="weightsync-adapter-", dir=place) as name:
            alpha, rslora = self._values[SCALING].tolist()
            # peft writes integers, where they are; the quotient is the same.
            alpha = int(alpha) if alpha.is_integer() else alpha
            config = {**self.declared.config, "lora_alpha": alpha, "use_rslora": bool(rslora)}
            (Path(name) / CONFIG).write_text(json.dumps(config))
            values = {name: value.cpu() for name, value in self._values.items() if name != SCALING}
            save_file(values, Path(name) / WEIGHTS)
            yield Path(name)

    def require_loaded(self, loaded: Any) -> None:
        """That vLLM's ``LoRAModel`` holds the arena's values, as far as the names are the files'.

        Raises:
            AdapterRefused: a tensor is another one, or nothing was loaded.
        """
        compared = 0
        for module, weights in loaded.loras.items():
            for side in "AB":
                value = self._values.get(f"{SAVED_PREFIX}{module}.lora_{side}.weight")
                found = getattr(weights, f"lora_{side.lower()}", None)
                if value is None or not isinstance(found, torch.Tensor):
                    continue
                compared += 1
                if found.shape != value.shape or not torch.equal(found.cpu(), value.cpu().to(found.dtype)):
                    raise AdapterRefused(
                        f"adapter {self.declared.name!r}: vLLM has loaded another {module}.lora_{side}"
                    )
        if not loaded.loras:
            raise AdapterRefused(f"adapter {self.declared.name!r}: vLLM has loaded no module of it")
        logger.info("weightsync: adapter %s loaded, %d tensors compared", self.declared.name, compared)

    def _fill(self, values: dict[str, torch.Tensor]) -> None:
        for name, place in self._values.items():
            value = values.get(name)
            if value is None or value.shape != place.shape:
                shape = "nothing" if value is None else tuple(value.shape)
                raise AdapterRefused(f"{name!r} of adapter {self.declared.name!r} is {shape}, not {tuple(place.shape)}")
            place.copy_(value)


def _laid_out(declared: Declared, base: Sequence[str], dtype: torch.dtype) -> tuple[Layout, list[tuple[int, int]]]:
    """Rows of one region that is yet to be made, and the bytes of each tensor in it."""
    tensors: list[Tensor] = []
    places: list[tuple[int, int]] = []
    rows: list[list[int]] = []
    end = 0
    for entry in (*declared.tensors, None):
        if entry is None:
            tensor = Tensor(SCALING, SCALING_DTYPE, SCALING_SHAPE)
        elif entry.dtype.is_floating_point and entry.dtype.itemsize > 1 and entry.shape and 0 not in entry.shape:
            tensor = Tensor(entry.name, str(dtype).removeprefix("torch."), entry.shape)
        else:
            raise AdapterRefused(
                f"{entry.name!r} of adapter {declared.name!r} is {entry.dtype} {entry.shape}, no matrix of numbers"
            )
        strides = np.array([*tensor.shape[1:], getattr(torch, tensor.dtype).itemsize])[::-1].cumprod()[::-1]
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + int(strides[0]) * tensor.shape[0]
        rows.append(row(len(tensors), 0, begin, (0,) * len(tensor.shape), tensor.shape, tuple(strides.tolist())))
        tensors.append(tensor)
        places.append((begin, end))
    reason = f"the base model of adapter {declared.name!r}, which rounds leave as the engine loaded it"
    left_out = LeftOut("unwritten", reason[:MAX_LEFT_OUT_CHARS], tuple(base[:MAX_LEFT_OUT]), len(base))
    return Layout(tuple(tensors), (), np.array(rows, dtype="<i8").tobytes(), left_out=(left_out,)), places


def _in_region(layout: Layout, memory: torch.Tensor) -> Layout:
    return Layout(layout.tensors, (region_of(memory),), layout.rows, left_out=layout.left_out)
