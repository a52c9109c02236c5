"""How long clients wait because of a push, by the size of the model and the way that versions land, on one GPU or two.

    make bench-gpu-stall                                   2 GB and 15 GB of dense FP8, flip
    … bench_gpu_stall.py --models dense-2 dense-15 moe-15 --modes flip copy live --cache keep recompute

Clients stream all the time. The stall of a push is the longest time between two chunks of one answer that any client
saw during it, less the longest in as long a time right before. An engine that begins an answer leaves the others
waiting for as long as its prefill takes, eagerly (``beginning_gap_ms``), push or not: pushes begin where no answer is
about to begin or to end, and ``answers_begun_during_pushes`` counts those that did. The trainer has the second GPU
where there is one; else its own kernels slow the engine's down. Prints one JSON object a line; the weights change their
signs with every push.
``nvlink_wire_over_copy`` is the rate of the wire over that of copies from one GPU to the other in the same run,
``publish_over_longest_part`` all of a publish over the longer of conversion and wire.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from fleet import Fleet, Trainer, fleet
from gpu_copies import measured
from serving import GRAPHS, RequestFailed, VllmServer
from stall_trainer import RING
from tiny_models import FP8_BLOCKS, qwen3_config, qwen3_moe_config, save_model
from weightsync.agents.turns import no_collection
from weightsync.orchestrator.protocol.landing import longest_ring

SIZES: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 32768, "max_position_embeddings": 8192,
}  # fmt: skip
"""The layers of Qwen3-8B; 0.19 GB each in FP8."""
EXPERTS: dict[str, Any] = SIZES | {
    "hidden_size": 2048, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}  # fmt: skip
"""The layers of Qwen3-30B-A3B; 0.61 GB each in FP8."""
SMALL, LARGE = "dense-2", "dense-15"
"""Whose stalls are compared."""
CLIENTS, TOKENS = 4, 1500
PROMPTS = {"short": 8, "long": 4000}
"""Tokens of the context that a client begins with."""
REST_SECONDS = {"keep": 0.6, "drop": 0.6, "recompute": 3.0}
"""Between two pushes; contexts that are computed anew keep their clients waiting long after one."""
LEFT_SECONDS = {"keep": 0.05, "drop": 0.05, "recompute": 1.5}
"""After a push, for what is on its way to clients or computed anew."""
WARM_UP_PUSHES = 3
BEGUN_SECONDS, TOKENS_LEFT = 0.3, 120
"""Since the last answer began, and of each answer, when a push begins."""
BEGINNING_SECONDS = 0.1
"""Around an answer's first token, in which the others get theirs late."""
ANSWERS_SECONDS = 60.0
"""That a push waits for this at most; all answers last as long, and clients begin theirs at different times."""


def gpu(number: int) -> dict[str, str]:
    """The environment of a process that has one GPU of those that this one sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": seen[number] if len(seen) > number and seen[number] else str(number)}


def model_of(name: str) -> dict[str, Any]:
    """``dense-2``, ``dense-15`` or ``moe-15``: the kind and about how many GB."""
    kind, size = name.split("-")
    if kind == "dense":
        return qwen3_config(**SIZES, num_hidden_layers=max(1, round((int(size) - 0.5) / 0.193)), **FP8_BLOCKS)
    layers = max(1, round((int(size) - 0.2) / 0.62))
    routers = {"modules_to_not_convert": [f"model.layers.{layer}.mlp.gate" for layer in range(layers)]}
    blocks = {"quantization_config": FP8_BLOCKS["quantization_config"] | routers}
    return qwen3_moe_config(**EXPERTS, num_hidden_layers=layers, **blocks)


def cache_bytes(config: dict[str, Any]) -> int:
    """KV of all clients' longest contexts in bf16: who waits for a place in the cache does not wait for a push."""
    token = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return int(1.2 * CLIENTS * (max(PROMPTS.values()) + TOKENS) * token)


@dataclass
class Streams:
    """Clients that stream answers one after another. ``chunks``: (arrival, gap before it), ``begun``: when answers had
    their first one, in seconds. ``left``: tokens that each client's answer goes on for, 0 where it has not begun."""

    server: VllmServer
    prompt: Sequence[int]
    chunks: list[tuple[float, float]] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)
    left: list[int] = field(default_factory=lambda: [0] * CLIENTS)
    stopped: threading.Event = field(default_factory=threading.Event)
    failures: int = 0

    @contextlib.contextmanager
    def running(self) -> Iterator["Streams"]:
        threads = [threading.Thread(target=self._run, args=(index,), daemon=True) for index in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            with no_collection():  # in which no thread of this process would see a token come
                yield self
        finally:
            self.stopped.set()
            for thread in threads:
                thread.join(timeout=60)

    def _run(self, index: int) -> None:
        while not self.stopped.is_set():
            last, self.left[index] = 0.0, 0
            try:
                for came, _ in enumerate(self.server.stream([index + 5, *self.prompt], TOKENS), 1):
                    now = time.monotonic()
                    if last:
                        self.chunks.append((now, now - last))
                    else:
                        self.begun.append(now)
                    last, self.left[index] = now, TOKENS - came
                    if self.stopped.is_set():
                        return
            except (OSError, HTTPException, RequestFailed, KeyError):
                self.failures += 1
                self.stopped.wait(0.05)

    def under_way(self) -> bool:
        """Whether every client is in the middle of an answer, and has been for a while."""
        return min(self.left) > TOKENS_LEFT and time.monotonic() - max(self.begun) > BEGUN_SECONDS

    def beginnings(self, begin: float, end: float) -> list[float]:
        """When answers began in a span of time."""
        return [at for at in list(self.begun) if begin <= at <= end]

    def longest(self, begin: float, end: float) -> tuple[float, int, float]:
        """The longest gap that ended in a span of time, in seconds, how many chunks came in it, and when it ended."""
        gaps = [(gap, at) for at, gap in list(self.chunks) if begin <= at <= end]
        longest, over = max(gaps, default=(0.0, begin))
        return longest, len(gaps), over


def pushes(
    whole: Fleet, trainer: Trainer, streams: Streams, first: int, count: int, cache: str = "keep"
) -> list[dict[str, float]]:
    """Of each push: its stall, the ordinary gap, the time of all of it and when in it the stall was over, in ms, tokens
    that did not come, answers that began meanwhile, and the longest gap of answers that began since the push before."""
    found, rest, since = [], REST_SECONDS[cache], time.monotonic()
    for step in range(first, first + count):
        time.sleep(rest)
        whole.until(streams.under_way, "answers in the middle", ANSWERS_SECONDS)
        begin = time.monotonic()
        told = trainer.publish(step)
        end = time.monotonic() + LEFT_SECONDS[cache]
        if "error" in told:
            raise RuntimeError(f"step {step} was not committed: {told['error']}")
        time.sleep(max(0.0, end - time.monotonic()))
        span = min(end - begin, rest)
        longest, came, over = streams.longest(begin, end)
        ordinary, usual, _ = streams.longest(begin - span, begin)
        lost = usual * (end - begin) / span - came
        beginnings = streams.beginnings(since, begin - BEGUN_SECONDS)
        gaps = [streams.longest(at - BEGINNING_SECONDS, at + BEGINNING_SECONDS)[0] for at in beginnings]
        found.append(
            {"stall": 1e3 * (longest - ordinary), "gap": 1e3 * ordinary, "push": 1e3 * told["seconds"], "lost": lost}
            | {"over": 1e3 * (over - begin), "begun": len(streams.beginnings(begin - span, end))}
            | {"beginning": 1e3 * max(gaps, default=0.0)}
        )
        since = end
    return found


def over_longest_part(rows: Sequence[dict[str, float]], rounds: Sequence[dict[str, Any]]) -> list[float]:
    """All of each push over the longer of its conversion and its wire."""
    parts = [max(row["times_ms"]["wire"], row["times_ms"].get("convert", 0.0)) for row in rounds]
    return [row["push"] / part for row, part in zip(rows, parts, strict=True)]


def p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def measure(name: str, mode: str, given: argparse.Namespace, directory: Path) -> float:
    """Reports on one engine; the 95th percentile of its stalls with the first cache policy and a short context."""
    config = model_of(name)
    model = save_model(directory / "model", config, {})
    (model / "model.safetensors").unlink()
    several = torch.cuda.device_count() > 1
    arguments = ("--load-format", "dummy", "--max-model-len", "8192", "--gpu-memory-utilization", str(given.share))
    arguments += ("--kv-cache-memory-bytes", str(cache_bytes(config)))
    environment = {"WEIGHTSYNC_MODE": mode} | (gpu(0) if several else {})
    if mode != "copy":
        environment["WEIGHTSYNC_LANDING_MIB"] = str(given.ring)
    arguments += ("--compilation-config", GRAPHS)
    server = VllmServer(
        model, device="cuda", eager=False, arguments=arguments, env=environment, log=directory / "engine.log"
    ).start()
    facts = {
        "model": name,
        "mode": mode,
        "cache": "",
        "context": "",
        "gpus": torch.cuda.device_count(),
        "device": torch.cuda.get_device_name(0),
    }
    first = 0.0

    def say(
        figure: str, values: Sequence[float], unit: str = "ms", of: Callable[..., float] = statistics.median
    ) -> None:
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (0.0, 0.0, 0.0)
        given_as = [facts[key] for key in ("cache", "context") if facts[key] not in ("keep", "short")]
        given_as += [mode] if mode != "flip" and mode not in figure.split("_")[:2] else []
        line = {
            "figure": "_".join([figure, name, *given_as]).replace("-", "_"),
            "value": round(of(values), 4),
            "unit": unit,
            "n": len(values),
        }
        print(json.dumps(line | {"spread": round(high - low, 4)} | facts), flush=True)

    try:
        for cache in given.cache:
            with fleet(directory / f"fleet-{cache}", {"engine": server}, settings={"pause": {"cache": cache}}) as whole:
                script = str(Path(__file__).resolve().parent / "stall_trainer.py")
                only = (gpu(1) if several else {}) | {RING: str(given.ring)}
                trainer = whole.start_trainer(model, script=script, device="cuda", env=only)
                trainer.hear(given.patience)
                server.wait_ready(given.patience)
                for context in given.contexts:
                    step = 1 + 1000 * given.contexts.index(context)
                    told = trainer.publish(step)  # the engine is held until a version is committed
                    if "error" in told:
                        raise RuntimeError(told["error"])
                    prompt = [7 + number % 1000 for number in range(PROMPTS[context])]
                    with Streams(server, prompt).running() as streams:
                        whole.until(lambda: len(streams.chunks) > 100, "streams", given.patience)
                        pushes(whole, trainer, streams, step + 1, WARM_UP_PUSHES)
                        rows = pushes(whole, trainer, streams, step + 100, given.pushes, cache)
                        failures = streams.failures
                    facts |= {"cache": cache, "context": context}
                    stalls = [row["stall"] for row in rows]
                    first = first or p95(stalls)
                    say(f"stall_{mode}_p50_ms", stalls)
                    say(f"stall_{mode}_p95_ms", stalls, of=p95)
                    say(f"stall_{mode}_max_ms", stalls, of=max)
                    say("stall_over_at_ms", [row["over"] for row in rows])
                    say("ordinary_gap_ms", [row["gap"] for row in rows])
                    say("push_ms", [row["push"] for row in rows])
                    say("tokens_lost_per_push", [row["lost"] for row in rows], "tokens", statistics.mean)
                    say("beginning_gap_ms", [row["beginning"] for row in rows if row["beginning"]] or [0.0])
                    say("answers_begun_during_pushes", [sum(row["begun"] for row in rows)], "count")
                    say("failed_requests", [failures], "count")
                    rounds = whole.ask(f"/rounds?last={given.pushes}")["rounds"]
                    say("gb", [row["bytes"] / 1e9 for row in rounds], "GB")
                    say("descriptors", [row["descriptors"] for row in rounds], "count")
                    say("publish_over_longest_part", over_longest_part(rows, rounds), "ratio")
                    if several:
                        copied = 1e6 * measured([(1, 0)])  # bytes per millisecond
                        wires = [row["bytes"] / row["times_ms"]["wire"] / copied for row in rounds]
                        say("nvlink_wire_over_copy", wires, "ratio")
                    for part in sorted(rounds[0]["times_ms"]):
                        say(f"{mode}_{part}_ms", [row["times_ms"].get(part, 0.0) for row in rounds])
                    free, total = torch.cuda.mem_get_info(0)
                    say("gpu_used_mib", [(total - free) / (1 << 20)], "MiB")
    finally:
        server.close()
    return first


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", default=[SMALL, LARGE])
    arguments.add_argument("--modes", nargs="+", default=["flip"])
    arguments.add_argument("--cache", nargs="+", default=["keep"])
    arguments.add_argument("--contexts", nargs="+", default=["short"], choices=list(PROMPTS))
    arguments.add_argument("--pushes", type=int, default=30)
    ring = longest_ring(on_device=True) >> 20
    arguments.add_argument("--ring", type=int, default=ring, help="MiB of either side for chunks, of flip and live")
    arguments.add_argument("--share", type=float, default=0.3, help="of the GPU's memory that must be free at start")
    arguments.add_argument("--patience", type=float, default=240.0, help="seconds for each start")
    given = arguments.parse_args()
    for mode in given.modes:
        stalls = {}
        for name in given.models:
            with tempfile.TemporaryDirectory(prefix="weightsync-bench-") as directory:
                stalls[name] = measure(name, mode, given, Path(directory))
        if stalls.get(SMALL, 0.0) > 0 and LARGE in stalls:
            growth = {"figure": f"stall_{mode}_growth_8x", "value": round(stalls[LARGE] / stalls[SMALL], 3)}
            print(json.dumps(growth | {"unit": "ratio", "n": given.pushes, "spread": 0}), flush=True)


if __name__ == "__main__":
    main()
