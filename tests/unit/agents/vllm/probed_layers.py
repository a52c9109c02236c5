"""Layers of vLLM's CPU build, probed; started by ``test_probe`` because vLLM's parallel state is the process's.

Prints one JSON object per case: {case: {"read": …, "unread": …, "unknown": …, "restored": …}}.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from weightsync.agents.recorder.rows import Target
from weightsync.agents.vllm import probe

VOCABULARY, WIDTH = 96, 64


def layers(tied: bool) -> nn.Module:
    """An embedding, a norm, a linear layer with a bias of zeros, and a head; processed as vLLM does after loading."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    model = nn.Module()
    model.embed_tokens = VocabParallelEmbedding(VOCABULARY, WIDTH)
    model.norm = RMSNorm(WIDTH)
    model.proj = ReplicatedLinear(WIDTH, 32, bias=True)
    model.lm_head = ParallelLMHead(VOCABULARY, WIDTH)
    if tied:
        model.lm_head = model.lm_head.tie_weights(model.embed_tokens)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    model.proj.bias.data.zero_()
    return model


def process(model: nn.Module, *names: str) -> None:
    for name in names:
        layer = getattr(model, name)
        layer.quant_method.process_weights_after_loading(layer)


def in_place(model: nn.Module) -> None:
    for layer in (model.embed_tokens, model.proj, model.lm_head):
        layer.cpu_linear = nn.functional.linear


def targets(model: nn.Module) -> list[Target]:
    """Every parameter once, by the first module that has it."""
    found: dict[int, Target] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                found.setdefault(parameter.data_ptr(), Target(parameter.detach(), 0, (), module, name))
    return list(found.values())


def case(tied: bool, prepare: Callable[[nn.Module], None], repack: bool = False) -> dict[str, Any]:
    model = layers(tied)
    prepare(model)
    memory = targets(model)
    before = [target.tensor.clone() for target in memory]

    def refresh() -> None:
        if repack:
            process(model, "lm_head")

    found = probe.probe(model, memory, refresh)
    return {
        "read": found.read,
        "unread": found.unread,
        "unknown": found.unknown,
        "restored": all(torch.equal(target.tensor, bits) for target, bits in zip(memory, before, strict=True)),
    }


def packed_head(model: nn.Module) -> None:
    """vLLM's own processing of a head on the CPU: the weight stays, and the product reads a packed copy."""
    in_place(model)
    process(model, "lm_head")


def unrunnable(model: nn.Module) -> None:
    in_place(model)
    model.proj.cpu_linear = lambda *_: 1 / 0
    model.odd = nn.Bilinear(2, 2, 2)


def restless(model: nn.Module) -> None:
    in_place(model)
    model.proj.cpu_linear = lambda x, weight, bias: torch.rand(3)


def main() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment

    store = Path(sys.argv[1]) / "store"
    os.environ.update(VLLM_HOST_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        results = {
            "in place": case(False, in_place),
            "packed head": case(False, packed_head),
            "packed tied head": case(True, packed_head),
            "packed head, refreshed": case(False, packed_head, repack=True),
            "unrunnable": case(False, unrunnable),
            "restless": case(False, restless),
        }
    print("RESULTS", json.dumps(results))


if __name__ == "__main__":
    main()
