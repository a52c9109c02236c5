"""Settings by which old weights would outlive a round, on vLLM's own configuration where it can be made."""

from types import SimpleNamespace
from typing import Any

import pytest
from weightsync.agents.vllm.holders import balancer, settings


def config(**sections: Any) -> Any:
    return SimpleNamespace(**sections)


REFUSED = [
    (config(model_config=SimpleNamespace(enable_sleep_mode=True)), "model_config.enable_sleep_mode is True"),
    (
        config(offload_config=SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=2.5))),
        r"offload_config\.uva\.cpu_offload_gb is 2\.5",
    ),
    (
        config(offload_config=SimpleNamespace(prefetch=SimpleNamespace(offload_group_size=8))),
        r"offload_config\.prefetch\.offload_group_size is 8",
    ),
    (config(cache_config=SimpleNamespace(cpu_offload_gb=1)), r"cache_config\.cpu_offload_gb is 1"),
    (config(parallel_config=SimpleNamespace(enable_elastic_ep=True)), "enable_elastic_ep is True"),
    (config(engram_config=SimpleNamespace(dp_shared_memory=True)), "dp_shared_memory is True"),
    (
        config(compilation_config=SimpleNamespace(inductor_compile_config={"freezing": True})),
        r"inductor_compile_config\.freezing is True",
    ),
]


@pytest.mark.parametrize(("vllm_config", "reason"), REFUSED)
def test_a_holder_of_copies_is_refused_by_name(vllm_config: Any, reason: str) -> None:
    with pytest.raises(settings.HoldsWeights, match=reason):
        settings.require(vllm_config)


@pytest.mark.parametrize("method", ["medusa", "mlp_speculator", "dflash", "dspark", "custom_class", "of the future"])
def test_drafters_that_nobody_records_are_refused(method: str) -> None:
    with pytest.raises(settings.HoldsWeights, match=rf"speculative_config\.method is '{method}'"):
        settings.require(config(speculative_config=SimpleNamespace(method=method)))


def drafting(method: str, model_type: str = "llama", *, parallel: bool = False) -> Any:
    own = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
    return config(speculative_config=SimpleNamespace(method=method, draft_model_config=own, parallel_drafting=parallel))


def test_drafters_that_keep_copies_are_refused() -> None:
    with pytest.raises(settings.HoldsWeights, match="model_type is 'gemma4_mtp'"):
        settings.require(drafting("mtp", "gemma4_mtp"))
    with pytest.raises(settings.HoldsWeights, match="parallel_drafting is True"):
        settings.require(drafting("eagle3", parallel=True))


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix", "mtp", "eagle", "eagle3", "draft_model"])
def test_drafts_without_weights_and_those_that_are_recorded_pass(method: str) -> None:
    settings.require(drafting(method))


def test_an_engine_without_any_of_them_passes() -> None:
    settings.require(config())
    settings.require(
        config(
            model_config=SimpleNamespace(enable_sleep_mode=False),
            offload_config=SimpleNamespace(
                uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
            ),
            compilation_config=SimpleNamespace(mode=3, inductor_compile_config={}),
            engram_config=None,
        )
    )


def test_weights_frozen_into_compiled_code_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    tuned = SimpleNamespace(mode=3, inductor_compile_config={"max_autotune": True})
    settings.require(config(compilation_config=tuned, device_config=SimpleNamespace(device_type="cuda")))
    with pytest.raises(settings.HoldsWeights, match="max_autotune is True"):
        settings.require(config(compilation_config=tuned, device_config=SimpleNamespace(device_type="cpu")))
    monkeypatch.setattr(inductor, "freezing", True)
    with pytest.raises(settings.HoldsWeights, match="TORCHINDUCTOR_FREEZING"):
        settings.require(config(compilation_config=SimpleNamespace(mode=3, inductor_compile_config={})))
    settings.require(config(compilation_config=SimpleNamespace(mode=0, inductor_compile_config={})))


def test_the_load_balancer_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(balancer, "require", asked.append)
    settings.require(config(parallel_config="parallel"))
    assert asked == ["parallel"]


IN_THIS_VLLM = [holder for holder in settings.HOLDERS if not holder.setting.startswith("cache_config.")]
"""Without the places that older versions have."""


@pytest.mark.parametrize("holder", IN_THIS_VLLM, ids=lambda holder: str(holder.setting))
def test_the_named_fields_exist_in_this_vllm(holder: settings.Holder) -> None:
    """A field that vLLM has renamed would be looked for in vain, in silence."""
    vllm_config = pytest.importorskip("vllm.config")
    sections = {
        "model_config": vllm_config.ModelConfig,
        "offload_config": vllm_config.OffloadConfig,
        "parallel_config": vllm_config.ParallelConfig,
        "compilation_config": vllm_config.CompilationConfig,
        "engram_config": pytest.importorskip("vllm.config.engram").EngramConfig,
    }
    assert {"method", "parallel_drafting", "draft_model_config"} <= set(
        vllm_config.SpeculativeConfig.__dataclass_fields__
    )
    section, field, *below = holder.setting.split(".")
    assert section in vllm_config.VllmConfig.__dataclass_fields__
    assert field in sections[section].__dataclass_fields__
    if section == "offload_config":
        assert (
            below[0]
            in {"uva": vllm_config.UVAOffloadConfig, "prefetch": vllm_config.PrefetchOffloadConfig}[
                field
            ].__dataclass_fields__
        )
