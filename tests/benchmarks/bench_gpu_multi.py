"""Half of a host's GPUs train, the other half serve: wire over NVLink, stall and bytes of pushes into TP engines.

    make gpu-multi                       all cases that this host has the GPUs for
    … bench_gpu_multi.py --cases tp hsdp --gb 16 --pushes 10

Trainer ranks are FSDP2's, or HSDP's with two replicas, one on each training GPU. Engines are an FP8 Qwen3-MoE with
``--gb`` for each serving GPU, random and run eagerly, because compiled MoE engines differ among themselves. After its
pushes every case is judged: a fresh engine loads what the trainer saves, and must answer the same, bit for bit. With
one GPU ranks and engine share it. ``--device cpu`` tries the script itself with a tiny model. JSON lines.

* ``multi_wire_over_peer_copy``: bytes per second that arrive in a serving GPU over those of peer copies into all
  serving GPUs at once, from one training GPU each, in the same process life.
* ``multi_publish_over_longest_part``: all of a publish over the longer of conversion and wire.
* ``multi_sender_spread``, ``multi_receiver_spread``: most less least bytes of an end over the mean, by the plan.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from bench_gpu_stall import EXPERTS, WARM_UP_PUSHES, Streams, p95, pushes
from fleet import Fleet, Trainer, fleet
from serving import VllmServer, answers
from stall_trainer import REPLICAS
from tiny_models import FP8_BLOCKS, qwen3_moe_config, save_model

LAYER_GB: Final = 0.62
COPY_BYTES, COPIES = 1 << 30, 20
REPEATABLE = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0"}


@dataclass(frozen=True, slots=True)
class Case:
    """``tp``: serving GPUs of each engine, 0 for all of them divided by ``engines``."""

    tp: int = 0
    experts: bool = True
    replicas: int = 1
    engines: int = 1
    fan_out: str = "trainer"


CASES: Final = {
    "tp": Case(),
    "tp-without-ep": Case(experts=False),
    "tp2": Case(tp=2),
    "hsdp": Case(replicas=2),
    "two-engines": Case(engines=2, fan_out="peers"),
}


@dataclass(frozen=True, slots=True)
class Host:
    """GPUs by number, for trainer ranks and for engines; on a CPU these are processes."""

    device: str
    training: tuple[int, ...]
    serving: tuple[int, ...]

    @classmethod
    def here(cls, device: str) -> "Host":
        count = torch.cuda.device_count() if device == "cuda" else 4
        if count == 1:
            return cls(device, (0, 0), (0,))
        return cls(device, tuple(range(count // 2)), tuple(range(count // 2, count)))

    def only(self, numbers: Sequence[int]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, sorted(set(numbers))))} if self.device == "cuda" else {}

    def fits(self, case: Case) -> bool:
        tp = case.tp or len(self.serving) // case.engines
        enough = tp >= 1 and tp * case.engines <= len(self.serving)
        return enough and (case.replicas == 1 or len(self.training) >= 2 * case.replicas or self.device == "cpu")


def model_of(host: Host, case: Case, gb: float) -> dict[str, Any]:
    """FP8 on GPUs, of about ``gb`` for each GPU of an engine; tiny and bf16 on a CPU, which has no such kernels."""
    if host.device == "cpu":
        return qwen3_moe_config(max_position_embeddings=2048)
    tp = case.tp or len(host.serving) // case.engines
    layers = max(1, round(gb * tp / LAYER_GB))
    routers = {"modules_to_not_convert": [f"model.layers.{layer}.mlp.gate" for layer in range(layers)]}
    blocks = {"quantization_config": FP8_BLOCKS["quantization_config"] | routers}
    return qwen3_moe_config(**EXPERTS, num_hidden_layers=layers, **blocks)


def peer_copy(host: Host) -> float:
    """GB/s into each serving GPU while all of them receive from a training GPU each; in a process of its own."""
    pairs = list(zip(host.training, host.serving, strict=False))
    script = f"from bench_gpu_multi import copy_rate; print(copy_rate({pairs!r}))"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, timeout=120)
    return float(done.stdout.split()[-1])


def copy_rate(pairs: Sequence[tuple[int, int]]) -> float:
    """Of the slowest pair (from, to) in GB/s, all at once."""
    ends = []
    for source, target in pairs:
        here = torch.ones(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
        there = torch.empty_like(here, device=f"cuda:{target}")
        there.copy_(here)
        ends.append((here, there))
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
    began = time.monotonic()
    for _ in range(COPIES):
        for here, there in ends:
            there.copy_(here, non_blocking=True)
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
    return COPIES * COPY_BYTES / (time.monotonic() - began) / 1e9


def servers(host: Host, case: Case, model: Path, directory: Path, **more: Any) -> dict[str, VllmServer]:
    """The case's engines, or such without us if ``more`` says so."""
    tp = case.tp or len(host.serving) // case.engines
    arguments: tuple[str, ...] = ("--max-model-len", "2048")
    if case.experts and tp > 1 and host.device == "cuda":  # vLLM's MoE kernel for CPUs has no expert parallelism
        arguments += ("--enable-expert-parallel",)
    if host.device == "cuda":
        arguments += ("--kv-cache-memory-bytes", str(2 << 30), "--gpu-memory-utilization", "0.5")
    if more.pop("dummy", False):
        arguments += ("--load-format", "dummy")
    made = {}
    for number in range(more.pop("count", case.engines)):
        environment = REPEATABLE | host.only(host.serving[number * tp : (number + 1) * tp])
        if host.device == "cuda":
            environment |= {"WEIGHTSYNC_MODE": "flip", "WEIGHTSYNC_LANDING_MIB": "1024"}
        log = directory / f"engine-{number}-{len(more)}.log"
        made[f"e{number}"] = VllmServer(
            model, tp=tp, device=host.device, arguments=arguments, env=environment, log=log, **more
        )
    return made


def explained(whole: Fleet) -> dict[str, Any]:
    """The plan in numbers."""
    command = [sys.executable, "-m", "weightsync.orchestrator.cli.main", "plan", "explain", "--json"]
    done = subprocess.run([*command, "--config", str(whole.config)], stdout=subprocess.PIPE, check=True, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(name: str, host: Host, given: argparse.Namespace, directory: Path) -> bool:
    """Reports on one case; whether every engine answers as a fresh one."""
    case = CASES[name]
    config = model_of(host, case, given.gb)
    model = save_model(directory / "model", config, {})
    (model / "model.safetensors").unlink()
    ceiling = peer_copy(host) if host.device == "cuda" else 0.0
    engines = {key: server.start() for key, server in servers(host, case, model, directory, dummy=True).items()}
    facts = {"case": name, "gpus": len(set(host.training + host.serving)), "device": host.device}
    if host.device == "cuda":
        facts["device"] = torch.cuda.get_device_name(0)

    def say(figure: str, values: Sequence[float], unit: str, of: Callable[..., float] = statistics.median) -> None:
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (0.0, 0.0, 0.0)
        line = {"figure": f"multi_{figure}", "value": round(of(values), 4), "unit": unit, "n": len(values)}
        print(json.dumps(line | {"spread": round(high - low, 4)} | facts), flush=True)

    try:
        with fleet(directory / "fleet", engines, settings=_settings(case)) as whole:
            trainer = _trainer(whole, model, host, case)
            trainer.hear(given.patience)
            for server in engines.values():
                server.wait_ready(given.patience)
            if "error" in (told := trainer.publish(1)):
                raise RuntimeError(told["error"])
            with Streams(next(iter(engines.values())), [7, 8, 9]).running() as streams:
                whole.until(lambda: len(streams.chunks) > 20, "streams", given.patience)
                pushes(whole, trainer, streams, 2, WARM_UP_PUSHES)
                rows = pushes(whole, trainer, streams, 100, given.pushes)
            last = 100 + given.pushes - 1
            rounds = whole.ask(f"/rounds?last={given.pushes}")["rounds"]
            plan = explained(whole)
            served = {key: answers(server) for key, server in engines.items()}
            trainer.save(last)
            checkpoint = whole.checkpoints / f"step_{last}"
            for server in engines.values():
                server.close()
            _say_pushes(say, rows, rounds, ceiling, sum(server.tp for server in engines.values()))
            _say_plan(say, plan)
            # One after the other, for they need the room: the trainer's is not given back before its process ends.
            fresh = servers(host, case, checkpoint, directory, count=1, weightsync=False)["e0"]
            try:
                right = answers(fresh.start().wait_ready(given.patience))
            finally:
                fresh.close()
    finally:
        for server in engines.values():
            server.close()
    same = [key for key, said in served.items() if said == right]
    say("same_as_fresh", [len(same)], "engines")
    return len(same) == len(served)


def _settings(case: Case) -> dict[str, Any]:
    return {"fan_out": case.fan_out} if case.fan_out != "trainer" else {}


def _trainer(whole: Fleet, model: Path, host: Host, case: Case) -> Trainer:
    script = str(Path(__file__).resolve().parent / "stall_trainer.py")
    environment = {REPLICAS: str(case.replicas), "NCCL_NVLS_ENABLE": "0"} | host.only(host.training)
    return whole.start_trainer(model, len(host.training), script=script, device=host.device, env=environment)


def _say_pushes(
    say: Callable[..., None], rows: list[dict[str, float]], rounds: list[dict[str, Any]], ceiling: float, ranks: int
) -> None:
    wires = [row["bytes"] / ranks / max(row["times_ms"]["wire"], 1e-3) / 1e6 for row in rounds]
    parts = [max(row["times_ms"]["wire"], row["times_ms"].get("convert", 0.0)) for row in rounds]
    say("stall_p95_ms", [row["stall"] for row in rows], "ms", p95)
    say("stall_p50_ms", [row["stall"] for row in rows], "ms")
    say("push_ms", [row["push"] for row in rows], "ms")
    say("gb_per_serving_gpu", [row["bytes"] / ranks / 1e9 for row in rounds], "GB")
    say("wire_gb_per_s", wires, "GB/s")
    if ceiling:
        say("peer_copy_gb_per_s", [ceiling], "GB/s")
        say("wire_over_peer_copy", [wire / ceiling for wire in wires], "ratio")
    whole = [row["push"] / part for row, part in zip(rows, parts, strict=True)]
    say("publish_over_longest_part", whole, "ratio")
    for part in sorted(rounds[0]["times_ms"]):
        say(f"{part}_ms", [row["times_ms"].get(part, 0.0) for row in rounds], "ms")


def _say_plan(say: Callable[..., None], plan: dict[str, Any]) -> None:
    def moved(end: dict[str, Any]) -> int:
        return int(end["moved"]["direct_bytes"]) + int(end["moved"]["packed_bytes"])

    sent = [moved(end) for end in plan["senders"]]
    received = [moved(end) for end in plan["receivers"]]
    say("sender_spread", [(max(sent) - min(sent)) / statistics.mean(sent)], "ratio")
    say("receiver_spread", [(max(received) - min(received)) / statistics.mean(received)], "ratio")
    say("descriptors", [plan["moved"]["descriptors"]], "count")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    arguments.add_argument("--gb", type=float, default=16.0, help="of weights for each serving GPU")
    arguments.add_argument("--pushes", type=int, default=10)
    arguments.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments.add_argument("--patience", type=float, default=300.0, help="seconds for each start")
    given = arguments.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the processes that this one starts
    host, wrong = Host.here(given.device), []
    for name in given.cases:
        if not host.fits(CASES[name]):
            print(json.dumps({"case": name, "skipped": "not enough GPUs"}), flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="weightsync-bench-") as directory:
            if not measure(name, host, given, Path(directory)):
                wrong.append(name)
    if wrong:
        sys.exit(f"engines of {', '.join(wrong)} do not answer as a fresh one does")


if __name__ == "__main__":
    main()
