"""One rank of an engine for ``test_architectures``: loads models, writes new weights by their layout, compares.

Started by the test as ``architecture_ranks.py RANK WORLD PORT DIRECTORY``; reads cases from ``DIRECTORY/cases.json``
and writes one JSON line per case to ``DIRECTORY/rank_<RANK>.jsonl``. vLLM is imported and started here only, with its
engine core in this process, so that the models' memory can be looked at.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "e2e" / "cpu_plugin")]

import models  # noqa: E402
import weightsync_cpu_test_plugin  # noqa: E402
from weightsync.agents.recorder.blueprint import Blueprint  # noqa: E402
from weightsync.agents.recorder.contents import Checkpoint  # noqa: E402
from weightsync.agents.recorder.rows import Target, build_rows  # noqa: E402
from weightsync.agents.recorder.settled import settle  # noqa: E402
from weightsync.agents.recorder.trace import RecordError  # noqa: E402
from weightsync.agents.vllm.recorder import load_hook  # noqa: E402
from weightsync.agents.vllm.recorder.derived import held_tensors  # noqa: E402
from weightsync.agents.vllm.recorder.kernel_layouts import as_fed  # noqa: E402
from weightsync.agents.vllm.recorder.recorded import Recorded, recorded_layout  # noqa: E402
from weightsync.orchestrator.protocol import layout as protocol  # noqa: E402

SCRATCH = ("topk_indices_buffer", "kv_cache")
"""Attributes that hold no weights: leftovers of the allocator and of requests."""
PROMPTS = ([5, 6, 7, 8], [101, 17, 300, 42, 9, 250], list(range(30, 70)))
collect = gc.collect
"""Once per case: vLLM, which collects a dozen times per engine, spends two fifths of these processes' time on it."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """This process's place in the engine, and what all engines of the process have in common."""

    rank: int
    world: int
    port: int
    directory: Path

    def options(self, case: Mapping[str, Any], model: Path) -> dict[str, Any]:
        from vllm.config import WeightTransferConfig

        parallel = {"pipeline_parallel_size" if case.get("pipeline") else "tensor_parallel_size": self.world}
        return parallel | {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "bfloat16",
            "max_model_len": 256,
            "max_num_seqs": 8,
            "seed": 0,
            "kv_cache_memory_bytes": 64 * 1024 * 1024,
            "weight_transfer_config": WeightTransferConfig(backend="weightsync"),
            "load_format": "dummy" if case.get("dummy") else "auto",
            "enable_expert_parallel": bool(case.get("experts")),
        }


# ----------------------------------------------------------------------------------------------------------- writing
def write_by_rows(layout: protocol.Layout, regions: Iterable[torch.Tensor], weights: Weights) -> None:
    """What a transport does, once more, in NumPy: bytes of boxes to their places, by the announced rows only."""
    memory = [region.numpy() for region in regions]
    for row in layout.matrix().tolist():
        tensor = layout.tensors[row[protocol.ROW_TENSOR]]
        size, rank = protocol.ITEMSIZE[tensor.dtype], len(tensor.shape)
        full = weights[tensor.name].to(getattr(torch, tensor.dtype)).contiguous()
        source = full.reshape(-1).view(torch.uint8).numpy().reshape(*tensor.shape, size)
        box = np.array(row[protocol.ROW_BOX :]).reshape(-1, 3)[-rank:] if rank else np.empty((0, 3), dtype=np.int64)
        part = source[tuple(slice(int(o), int(o + n)) for o, n, _ in box)]
        start = memory[row[protocol.ROW_REGION]][row[protocol.ROW_OFFSET] :]
        strides = (*(int(s) for _, _, s in box), 1)
        np.lib.stride_tricks.as_strided(start, shape=part.shape, strides=strides)[...] = part


def different(left: torch.nn.Module, right: torch.nn.Module) -> list[str]:
    """Names of tensors of two models that differ in any byte, or that only one has."""
    mine, theirs = ({held.name: held.tensor for held in held_tensors(model)} for model in (left, right))
    bits: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.detach().contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    return sorted(
        name
        for name in mine.keys() | theirs.keys()
        if not name.endswith(SCRATCH)
        and not (
            name in mine
            and name in theirs
            and mine[name].shape == theirs[name].shape
            and torch.equal(bits(mine[name]), bits(theirs[name]))
        )
    )


def summary(recorded: Recorded) -> dict[str, Any]:
    return {
        "tensors": [tensor.name for tensor in recorded.layout.tensors],
        "rows": len(recorded.layout.matrix()),
        "unrecorded": {entry.name: entry.reason for entry in recorded.unrecorded},
        "unused": list(recorded.unused),
        "derived": sorted({entry.refresh for entry in recorded.layout.derived}),
        "expert_map": recorded.layout.expert_map,
    }


# ------------------------------------------------------------------------------------------------------------- cases
def serve(place: Place, case: Mapping[str, Any]) -> dict[str, Any]:
    """Engines that generate: answers before and after the write, and those of a fresh engine with the new weights."""
    from vllm import LLM

    files, new = checkpoints(place, case)
    backend = "external_launcher" if place.world > 1 else "uni"
    start: Callable[[Path], LLM] = lambda which: LLM(  # noqa: E731
        **place.options(case, which),
        distributed_executor_backend=backend,
        disable_log_stats=True,
    )
    engine = start(files.old)
    recorded = recorded_layout(model_of(engine), engine.llm_engine.vllm_config)
    before = answers(engine)
    write_by_rows(recorded.layout, recorded.tensors, new)
    recorded.refresh()
    engine.reset_prefix_cache()
    after = answers(engine)
    fresh = start(files.new)
    return summary(recorded) | {
        "different": different(model_of(engine), model_of(fresh)),
        "changed": before != after,
        "same_answers": after == answers(fresh),
    }


def model_of(engine: Any) -> torch.nn.Module:
    model: torch.nn.Module = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    return model


def answers(engine: Any) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=3, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    return [
        (
            list(output.outputs[0].token_ids),
            [sorted((token, entry.logprob) for token, entry in step.items()) for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def lay_out(place: Place, case: Mapping[str, Any]) -> dict[str, Any]:
    """Models that the CPU build cannot run (or need not): loaded, written, and compared with a fresh load."""
    files, new = checkpoints(place, case)
    model, config = load(place, case, files.old)
    recorded = recorded_layout(model, config)
    write_by_rows(recorded.layout, recorded.tensors, new)
    recorded.refresh()
    fresh, _ = load(place, case | {"dummy": False}, files.new)
    return summary(recorded) | {"different": different(model, fresh)}


def refused(place: Place, case: Mapping[str, Any]) -> dict[str, Any]:
    """Engines that must not start: why they do not, empty if they do."""
    files, _ = checkpoints(place, case)
    try:
        load(place, case, files.old)
    except RecordError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def lay_out_unprocessed(place: Place, case: Mapping[str, Any]) -> dict[str, Any]:
    """Quantised models, whose processing the CPU build does in its own way: compared as the loader leaves them."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    files, new = checkpoints(place, case)
    config = engine_config(place, case, files.old)
    made = []
    for _ in range(2):
        fresh_config = engine_config(place, case, files.old)
        with set_current_vllm_config(fresh_config), set_default_torch_dtype(config.model_config.dtype):
            made.append(initialize_model(fresh_config))
    written, loaded = made
    for model in made:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data.zero_()
    blueprint = Blueprint(written)
    fed = [Checkpoint(name, tuple(tensor.shape), tensor.dtype) for name, tensor in new.items()]
    fed = as_fed(fed, {parameter.name: parameter.dtype for parameter in blueprint.parameters})
    with set_current_vllm_config(config):
        states = settle(blueprint.trace(fed, written.load_weights))
        loaded.load_weights(iter(new.items()))
    targets = []
    for parameter in blueprint.parameters:
        tensor, state = parameter.current(), states.get(parameter.storage)
        if state is not None and tensor is not None:
            targets.append(Target(tensor.detach(), parameter.place.offset, state.landings))
    rows = build_rows(targets)
    layout = protocol.Layout(rows.tensors, rows.regions, rows.matrix().tobytes())
    write_by_rows(layout, rows.memory, new)
    return {
        "tensors": [tensor.name for tensor in layout.tensors],
        "dtypes": {tensor.name: tensor.dtype for tensor in layout.tensors},
        "opaque": [opaque.reason for state in states.values() for opaque in state.opaque],
        "different": different(written, loaded),
    }


@dataclass(frozen=True)
class Files:
    """Model directories with the first weights (none for a dummy engine) and with those that are written."""

    old: Path
    new: Path


def checkpoints(place: Place, case: Mapping[str, Any]) -> tuple[Files, Weights]:
    """Model directories of this rank's own, and the weights that are written."""
    build = models.ALL[case["model"]]
    tiny = models.in_fp8_blocks(build, **case["overrides"]) if case.get("fp8") else build()
    old, new = models.random_weights(tiny.shapes, 1), models.random_weights(tiny.shapes, 2)
    parent = place.directory / f"rank_{place.rank}"
    first = f"{tiny.name}_dummy" if case.get("dummy") else f"{tiny.name}_old"
    files = Files(parent / first, parent / f"{tiny.name}_new")
    models.save(files.old, tiny, {} if case.get("dummy") else old)
    models.save(files.new, tiny, new)
    return files, new


def engine_config(place: Place, case: Mapping[str, Any], directory: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**place.options(case, directory)).create_engine_config()


def load(place: Place, case: Mapping[str, Any], directory: Path) -> tuple[torch.nn.Module, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = engine_config(place, case, directory)
    with set_current_vllm_config(config):
        return get_model(vllm_config=config), config


# ------------------------------------------------------------------------------------------------------------ process
def prepare(place: Place, stock: str) -> None:
    """The environment and the patches of a CPU worker that are not the product's.

    ``stock``: "all" leaves vLLM's packing of weights as it is, "head" that of the output head only.
    """
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        RANK=str(place.rank),
        LOCAL_RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(place.port),
        VLLM_DIST_IDENT=f"architectures-{place.port}",
    )
    if stock:
        os.environ["VLLM_PLUGINS"] = "weightsync"  # else vLLM finds the test plugin by itself
    if stock != "all":
        _keep_weights_live(but_the_head=stock == "head")
    load_hook.install()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.engine import core
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    gc.collect = lambda generation=2: 0
    _set_torch_accelerator_to_noop()
    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None  # one set of groups for all engines
    WeightTransferEngineFactory._registry["weightsync"] = lambda: _NoTransfer
    original = CpuPlatform.get_attn_backend_cls.__func__

    def dense_attention(cls: Any, backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
        # The CPU build has no sparse attention; the layout of its weights does not depend on the backend.
        return original(cls, backend, attn_selector_config._replace(use_sparse=False), *args, **kwargs)

    CpuPlatform.get_attn_backend_cls = classmethod(dense_attention)
    _quantised_layers_without_kernels()


def _keep_weights_live(*, but_the_head: bool) -> None:
    from vllm.model_executor.layers import utils

    packing = utils.dispatch_cpu_unquantized_gemm
    weightsync_cpu_test_plugin.register()
    live = utils.dispatch_cpu_unquantized_gemm
    if but_the_head:
        # vLLM keeps the weight beside its packed copy for embeddings only, and computes with the copy.
        utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: (live if remove_weight else packing)(
            layer, remove_weight
        )


def _quantised_layers_without_kernels() -> None:
    """Let FP8 layers be made on CPUs that have no kernel for them: they are loaded here and never run."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization import fp8

    fp8.init_fp8_linear_kernel = lambda **kwargs: None
    fp8.select_fp8_moe_backend = lambda **kwargs: (Fp8MoeBackend.TRITON, None)


class _NoTransfer:
    """Stands where vLLM makes the transfer engine; these tests take the layout themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def shutdown(self) -> None: ...


def join(place: Place, cases: list[dict[str, Any]]) -> None:
    """Join the engine's process groups, laid out as the first case wants them (a model with experts, so all exist)."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment

    files, _ = checkpoints(place, cases[0])
    with set_current_vllm_config(engine_config(place, cases[0], files.old)):
        init_distributed_environment(place.world, place.rank, "env://", place.rank, "gloo")
        sizes = (1, place.world) if cases[0].get("pipeline") else (place.world, 1)
        ensure_model_parallel_initialized(*sizes)


def main() -> None:
    rank, world, port, directory = sys.argv[1:]
    place = Place(int(rank), int(world), int(port), Path(directory))
    cases: list[dict[str, Any]] = json.loads((place.directory / "cases.json").read_text())
    prepare(place, cases[0].get("stock", ""))
    join(place, cases)
    kinds = {"serve": serve, "lay_out": lay_out, "lay_out_unprocessed": lay_out_unprocessed, "refused": refused}
    with (place.directory / f"rank_{rank}.jsonl").open("w", buffering=1) as out:
        for case in cases:
            out.write(json.dumps({"case": case, "rank": place.rank} | kinds[case["kind"]](place, case)) + "\n")
            collect()


if __name__ == "__main__":
    main()
