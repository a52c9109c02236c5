"""A vLLM inside one process, for what needs no server: ``python offline.py MODEL [OTHER]`` prints answers as JSON.

With OTHER, the checkpoint of that directory is loaded into the live parameters of MODEL and the same prompts are asked
again: the plainest form of an update, by vLLM's own loader.
"""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from serving import DEFAULT_PROMPTS, KV_CACHE_BYTES


def main() -> None:
    from vllm import LLM

    model, *others = map(Path, sys.argv[1:])
    llm = LLM(
        str(model),
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    found = [_ask(llm)]
    for other in others:
        weights = load_file(other / "model.safetensors")
        llm.apply_model(lambda served, weights=weights: served.load_weights(iter(weights.items())) and None)
        found.append(_ask(llm))
    print(json.dumps(found))


def _ask(llm: Any) -> list[Any]:
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=0, detokenize=False)
    answers = []
    for prompt in DEFAULT_PROMPTS:
        output = llm.generate(TokensPrompt(prompt_token_ids=list(prompt)), sampling, use_tqdm=False)[0].outputs[0]
        chosen = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        answers.append([list(output.token_ids), chosen])
    return answers


if __name__ == "__main__":
    main()
