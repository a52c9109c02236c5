"""Recorded layouts on the real vLLM: new weights written by them equal a fresh load, bit for bit, and so do answers.

One set of processes per way of sharding goes through all models (an engine is up in two seconds, a process in ten);
each test then looks at its own model's result. Models that the CPU build cannot run are compared by their memory only.
"""

import json
import re
import sys
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import preloaded
import pytest
from ports import free_port
from serving import environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

RANKS = Path(__file__).with_name("architecture_ranks.py")
PROCESS_SECONDS = 420.0
"""All models of one way of sharding: 30 s on two idle cores, ten times that on busy ones."""

COMPUTED = (
    "*.rotary_emb.cos_sin_cache",
    "*.indexer_rope_emb.cos_sin_cache",
    "*._k_scale",
    "*._v_scale",
    "*._q_scale",
    "*._prob_scale",
    "*._expert_map",
    "*.expert_global_to_physical",
    "*.expert_physical_to_global",
    "*.expert_local_to_global",
)
PADDED = ("model.embed_tokens.weight", "model.embedding.weight", "backbone.embeddings.weight", "lm_head.weight")

SERVED = [name for name, build in models.ALL.items() if build().generates]
WITH_EXPERTS = [name for name, build in models.ALL.items() if ".experts.0." in " ".join(build().shapes)]
DERIVABLE = [name for name, build in models.ALL.items() if build().derivable]
FP8 = {
    "qwen3_moe": {"head_dim": 128},
    "glm4_moe": {"head_dim": 128},
    "deepseek_v3": {"q_lora_rank": 128},
    "glm_moe_dsa": {"q_lora_rank": 128},
}
"""Models with a block-quantised case, and what puts their sizes on the grid of 128."""
Case = dict[str, Any]
Results = dict[str, list[dict[str, Any]]]


class Sharding(NamedTuple):
    name: str
    world: int
    cases: list[Case]


def key(case: Mapping[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)


def served(name: str) -> Case:
    return {"kind": "serve", "model": name}


def laid_out(name: str, **how: Any) -> Case:
    return {"kind": "lay_out", "model": name} | how


def quantised(name: str) -> Case:
    return {"kind": "lay_out_unprocessed", "model": name, "fp8": True, "overrides": FP8[name]}


def all_cases() -> list[Case]:
    """A model with experts first: the process groups of the first engine serve all."""
    serve = sorted((served(name) for name in SERVED), key=lambda case: case["model"] not in WITH_EXPERTS)
    rest = [laid_out(name) for name in models.ALL if name not in SERVED]
    dummy = [laid_out(name, dummy=True) for name in DERIVABLE]
    return serve + rest + dummy + [quantised(name) for name in FP8]


SHARDINGS = {
    "tp1": Sharding("tp1", 1, all_cases()),
    "tp2": Sharding("tp2", 2, [*all_cases(), *(laid_out(name, experts=True) for name in WITH_EXPERTS)]),
    "stock": Sharding("stock", 1, [{"kind": "refused", "model": "qwen3", "stock": "all"}]),
    "head": Sharding("head", 1, [{"kind": "refused", "model": "qwen3", "stock": "head"}]),
    "pp2": Sharding("pp2", 2, [laid_out(name, pipeline=True) for name in ("qwen3_moe", "llama", "glm_moe_dsa")]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """What every rank found, by sharding and case; each sharding runs once, when a test first asks for it."""

    class Lazily(dict[str, Results]):
        def __missing__(self, name: str) -> Results:
            self[name] = {}  # a sharding whose processes fail fails its other tests at once, and does not run again
            self[name] = run(SHARDINGS[name], tmp_path_factory.mktemp(name))
            return self[name]

    return Lazily()


def run(sharding: Sharding, directory: Path) -> Results:
    (directory / "cases.json").write_text(json.dumps(sharding.cases))
    port = str(free_port())
    logs = [(directory / f"rank_{rank}.log").open("w") for rank in range(sharding.world)]
    # In this process's environment nothing may be left over from a launcher of its own.
    settings = {k: v for k, v in environment(directory).items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ranks = [
        preloaded.start(
            "vllm",
            [sys.executable, str(RANKS), str(rank), str(sharding.world), port, str(directory)],
            settings,
            log.fileno(),
            log.fileno(),
        )
        for rank, log in enumerate(logs)
    ]
    ends = time.monotonic() + PROCESS_SECONDS
    try:
        codes = [process.wait(max(0.0, ends - time.monotonic())) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    for rank, code in enumerate(codes):
        text = (directory / f"rank_{rank}.log").read_text()
        assert code == 0, f"rank {rank} ended with {code}:\n{text[-6000:]}"
    found: Results = {}
    for rank in range(sharding.world):
        for line in (directory / f"rank_{rank}.jsonl").read_text().splitlines():
            result = json.loads(line)
            found.setdefault(key(result["case"]), []).append(result)
    return found


def check_layout(result: Mapping[str, Any], tiny: models.TinyModel, *, all_tensors: bool) -> None:
    """Bytes equal a fresh load; every tensor of the checkpoint is used or named; every unreached byte is named."""
    assert result["different"] == []
    wanted = {name for name in tiny.shapes if not name.startswith(tiny.unused or "\0")}
    if all_tensors:
        left = {name for name in wanted if name.endswith(tiny.first_rank_only)} if result["rank"] else set()
        assert set(result["tensors"]) == wanted - left
        assert all(name.startswith(tiny.unused or "\0") for name in set(result["unused"]) - left)
        assert left <= set(result["unused"])
    else:
        assert set(result["tensors"]) < wanted
        assert set(result["unused"]) | set(result["tensors"]) == set(tiny.shapes)
    for name, reason in result["unrecorded"].items():
        if name in PADDED:
            assert reason == "padding of the vocabulary"
        elif name.endswith("w2_bias"):
            assert (result["rank"] > 0, reason) == (True, "a constant that the loader writes")
        else:
            assert any(fnmatch(name, pattern) for pattern in COMPUTED), name


@pytest.mark.parametrize("sharding", ["tp1", "tp2"])
@pytest.mark.parametrize("name", SERVED)
def test_written_weights_answer_like_a_fresh_engine(results: dict[str, Results], sharding: str, name: str) -> None:
    ranks = results[sharding][key(served(name))]
    assert len(ranks) == SHARDINGS[sharding].world
    for result in ranks:
        check_layout(result, models.ALL[name](), all_tensors=True)
        assert result["changed"]
        assert result["same_answers"]


@pytest.mark.parametrize("sharding", ["tp1", "tp2"])
@pytest.mark.parametrize("name", [name for name in models.ALL if name not in SERVED])
def test_written_weights_equal_a_fresh_load(results: dict[str, Results], sharding: str, name: str) -> None:
    for result in results[sharding][key(laid_out(name))]:
        check_layout(result, models.ALL[name](), all_tensors=True)


@pytest.mark.parametrize("sharding", ["tp1", "tp2"])
@pytest.mark.parametrize("name", DERIVABLE)
def test_dummy_weights_have_the_same_layout(results: dict[str, Results], sharding: str, name: str) -> None:
    for result in results[sharding][key(laid_out(name, dummy=True))]:
        tiny = models.ALL[name]()
        expected = {tensor for tensor in tiny.shapes if not tensor.startswith(tiny.unused or "\0")}
        assert set(result["tensors"]) == expected
        assert not [entry for entry in result["different"] if not any(fnmatch(entry, p) for p in (*COMPUTED, *PADDED))]


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_expert_parallel_ranks_take_their_own_experts(results: dict[str, Results], name: str) -> None:
    first, second = results["tp2"][key(laid_out(name, experts=True))]
    for result in (first, second):
        check_layout(result, models.ALL[name](), all_tensors=False)
    assert first["expert_map"] != second["expert_map"]
    own = [{t for t in result["tensors"] if ".experts." in t} for result in (first, second)]
    assert own[0]
    assert not own[0] & own[1]
    assert own[0] | own[1] == {
        t for t in models.ALL[name]().shapes if ".experts." in t and not t.startswith(models.ALL[name]().unused or "\0")
    }


@pytest.mark.parametrize("case", SHARDINGS["pp2"].cases, ids=lambda case: str(case["model"]))
def test_pipeline_stages_take_their_own_layers(results: dict[str, Results], case: Case) -> None:
    first, second = results["pp2"][key(case)]
    tiny = models.ALL[case["model"]]()
    for result in (first, second):
        check_layout(result, tiny, all_tensors=False)
    layers = [{t for t in result["tensors"] if t.startswith("model.layers.")} for result in (first, second)]
    assert not layers[0] & layers[1]
    needed = {t for t in tiny.shapes if not t.startswith(tiny.unused or "\0")}
    assert set(first["tensors"]) | set(second["tensors"]) == needed


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("stock", r"mlp\.down_proj\.weight: .* became \(0,\)"),
        # By what, is the CPU's choice: the latter with AMX.
        ("head", r"lm_head\.weight(: a result of| went into) _C\.(create_onednn_mm_handler|convert_weight_packed)"),
    ],
)
def test_weights_that_the_cpu_build_packs_are_refused_by_name(
    results: dict[str, Results], which: str, reason: str
) -> None:
    (result,) = results[which][key(SHARDINGS[which].cases[0])]
    assert re.search(reason, result["refused"])


@pytest.mark.parametrize("sharding", ["tp1", "tp2"])
@pytest.mark.parametrize("name", list(FP8))
def test_block_quantised_weights_and_scales_land_where_the_loader_puts_them(
    results: dict[str, Results], sharding: str, name: str
) -> None:
    for result in results[sharding][key(quantised(name))]:
        assert result["opaque"] == []
        indexer_keys = [entry for entry in result["different"] if entry.endswith("indexer.wk_weights_proj.weight")]
        # vLLM dequantises this projection while loading; on the wire it is bfloat16, so its bytes are the trainer's.
        assert bool(indexer_keys) is (name == "glm_moe_dsa")
        assert [entry for entry in result["different"] if entry not in indexer_keys] == []
        scales = [tensor for tensor, dtype in result["dtypes"].items() if tensor.endswith("_scale_inv")]
        assert scales
        assert {result["dtypes"][scale.removesuffix("_scale_inv")] for scale in scales} == {"float8_e4m3fn"}
        assert {result["dtypes"][scale] for scale in scales} == {"float32"}
