"""Calls to workers: allowed by a list, refused by name."""

import ast
import importlib.util
from pathlib import Path

import pytest
from weightsync.agents.vllm import worker_calls


def a_function_of_somebody(worker: object) -> None: ...


@pytest.mark.parametrize("name", ["update_weights", "add_lora", "check_health", "update_max_model_len"])
def test_known_calls_that_leave_weights_alone_pass(name: str) -> None:
    assert worker_calls.refusal(name) == ""


@pytest.mark.parametrize("name", sorted(worker_calls.REFUSED))
def test_known_calls_that_do_not_are_refused_whatever_the_operator_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(worker_calls.ALLOW_VARIABLE, name)
    assert worker_calls.refusal(name).startswith(f"{name} is refused: ")


def test_unknown_calls_need_the_operators_word(monkeypatch: pytest.MonkeyPatch) -> None:
    function = f"{__name__}.a_function_of_somebody"
    for method, name in (("memory_of_my_extension", "memory_of_my_extension"), (a_function_of_somebody, function)):
        monkeypatch.delenv(worker_calls.ALLOW_VARIABLE, raising=False)
        reason = worker_calls.refusal(method)
        assert reason.startswith(f"{name} is refused: nobody knows")
        assert reason.endswith(f"start the server with WEIGHTSYNC_ALLOW_CALLS={name}")
        monkeypatch.setenv(worker_calls.ALLOW_VARIABLE, f"other, {name}")
        assert worker_calls.refusal(method) == ""


def test_after_which_calls_the_weights_are_looked_at() -> None:
    for name in (*worker_calls.ADAPTERS, "memory_of_my_extension"):
        assert worker_calls.is_vouched_for(name)
    for name in worker_calls.OF_A_ROUND | worker_calls.READING:
        assert not worker_calls.is_vouched_for(name)
    assert worker_calls.is_vouched_for(a_function_of_somebody)
    assert not worker_calls.is_vouched_for(type("Function", (), {"__module__": "vllm.distributed.x"}))
    assert worker_calls.is_vouched_for(type("Function", (), {"__module__": "vllmx"}))


def test_functions_of_vllm_itself_pass() -> None:
    a_function = type("Function", (), {"__module__": "vllm.distributed.x", "__qualname__": "measure"})
    assert worker_calls.refusal(a_function) == ""


def test_every_method_of_this_vllms_workers_has_been_judged() -> None:
    """A vLLM with another public method in its workers fails here, until someone has read what the method does."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("vLLM is not installed")
    root = Path(spec.submodule_search_locations[0]) / "v1" / "worker"
    public = set()
    for file, owner in (("gpu_worker.py", "Worker"), ("worker_base.py", "WorkerBase"), ("cpu_worker.py", "CPUWorker")):
        classes = [node for node in ast.parse((root / file).read_text()).body if isinstance(node, ast.ClassDef)]
        body = next(node for node in classes if node.name == owner).body
        public |= {node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    # Parts of vLLM's start and of its batches: nobody calls them from outside, so as unknown ones they are refused.
    internal = {
        "annotate_profile", "compile_or_warm_up_model", "determine_available_memory", "execute_model",
        "get_draft_model", "get_model", "handle_ft_command", "init_device", "randomize_dummy_inputs",
        "sample_tokens", "sleep_mode_backend", "take_draft_token_ids", "vocab_size",
    }  # fmt: skip
    assert public - worker_calls.ALLOWED - set(worker_calls.REFUSED) - internal == set()
