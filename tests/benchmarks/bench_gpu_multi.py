"""GPUs of one host train, others serve a model over several of them: wire over NVLink, stall and bytes of pushes.

    make gpu-multi                       all cases that this host has the GPUs for
    … bench_gpu_multi.py --cases tp hsdp --gb 16 --pushes 10 --at-once 2

Half of the GPUs train unless a case says otherwise. Trainer ranks are FSDP2's, or HSDP's with two replicas, one on each
training GPU. Engines are an FP8 Qwen3-MoE with ``--gb`` for each serving GPU, random, with CUDA graphs of what an eager
engine runs, because compiled engines differ among themselves. Requests go on with their KV. After its pushes every
case is judged: a fresh engine loads what the trainer saves, and must answer the same, bit for bit. With one GPU ranks
and engine share it. ``--device cpu`` tries the script itself with a tiny model. JSON lines.

Each name ends with that of its case.

* ``multi_wire_over_peer_copy``: bytes per second that arrive in a serving GPU while it is written to, over those of
  peer copies into half of the GPUs at once, from one of the other half each, in the same process life. Engines that
  take a version from each other are written to one after the other (``multi_hops``), for equal times.
* ``multi_wire_over_floor``: what copies of the plan's bytes would take until the last GPU has its own, at the rates of
  peer copies and of copies within a GPU, over what the wire took.
* ``multi_publish_over_longest_part``: all of a publish over the longer of conversion and wire.
* ``multi_sender_spread``, ``multi_receiver_spread``: most less least bytes of an end over the mean, by the plan.
* ``multi_sent_over_engine``: bytes that left trainer ranks over those that one engine needs.

Cases ``--at-once`` live side by side, for most of the time is vLLM's start; while one is measured the others rest.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from bench_gpu_stall import EXPERTS, WARM_UP_PUSHES, Streams, gpu, over_longest_part, p95, pushes
from fleet import Fleet, Trainer, fleet
from gpu_copies import measured
from serving import GRAPHS, Answer, VllmServer, answers, several
from stall_trainer import APART, REPLICAS, RING
from tiny_models import FP8_BLOCKS, qwen3_moe_config, save_model
from weightsync.orchestrator.protocol.landing import longest_ring

LAYER_GB: Final = 0.62
REPEATABLE = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0"}


@dataclass(frozen=True, slots=True)
class Case:
    """``tp``: serving GPUs of each engine, 0 for all of them divided by ``engines``. ``part`` of the ``--gb``.
    ``apart``: the trainer has tensors for each expert.

    ``trains`` and ``serves``: on which GPUs, the ``first`` or the ``last`` half, or ``all``; some then do both.
    """

    tp: int = 0
    experts: bool = True
    replicas: int = 1
    engines: int = 1
    fan_out: str = "trainer"
    part: float = 1.0
    apart: bool = False
    trains: str = "first"
    serves: str = "last"


CASES: Final = {
    "tp": Case(),
    "two-engines": Case(engines=2, fan_out="peers", part=0.5),
    "tp-quarter": Case(part=0.25),
    "tp-quarter-without-ep": Case(part=0.25, experts=False),
    "tp-quarter-apart": Case(part=0.25, apart=True),
    "tp2": Case(tp=2),
    "tp-all-gpus": Case(part=0.25, serves="all"),
    "all-on-all": Case(part=0.25, trains="all", serves="all"),
    "fsdp-all-gpus": Case(part=0.25, trains="all"),
    "hsdp-all-gpus": Case(part=0.25, trains="all", replicas=2),
}


@dataclass(frozen=True, slots=True)
class Host:
    """Its GPUs; on a CPU these are processes."""

    device: str
    count: int

    @classmethod
    def here(cls, device: str) -> "Host":
        return cls(device, torch.cuda.device_count() if device == "cuda" else 4)

    def gpus(self, which: str) -> tuple[int, ...]:
        """By number; ``which``: the ``first`` half, the ``last``, or ``all``."""
        if self.count == 1:
            return (0,)
        return tuple(range(self.count))[{"first": slice(self.count // 2), "last": slice(self.count // 2, None)}.get(
            which, slice(None)
        )]  # fmt: skip

    def ranks(self, case: Case) -> tuple[int, ...]:
        """The GPU of each trainer rank."""
        return (0, 0) if self.count == 1 else self.gpus(case.trains)

    def tp(self, case: Case) -> int:
        return case.tp or len(self.gpus(case.serves)) // case.engines

    def only(self, numbers: Sequence[int]) -> dict[str, str]:
        if self.device != "cuda":
            return {}
        key = "CUDA_VISIBLE_DEVICES"
        return {key: ",".join(gpu(number)[key] for number in sorted(set(numbers)))}

    def fits(self, case: Case) -> bool:
        enough = 1 <= self.tp(case) * case.engines <= len(self.gpus(case.serves))
        return enough and (case.replicas == 1 or len(self.ranks(case)) >= 2 * case.replicas)


def model_of(host: Host, case: Case, gb: float) -> dict[str, Any]:
    """FP8 on GPUs, of about ``gb`` for each GPU of an engine; tiny and bf16 on a CPU, which has no such kernels."""
    if host.device == "cpu":
        return qwen3_moe_config(max_position_embeddings=2048)
    layers = max(1, round(gb * case.part * host.tp(case) / LAYER_GB))
    routers = {"modules_to_not_convert": [f"model.layers.{layer}.mlp.gate" for layer in range(layers)]}
    blocks = {"quantization_config": FP8_BLOCKS["quantization_config"] | routers}
    return qwen3_moe_config(**EXPERTS, num_hidden_layers=layers, **blocks)


def copy_rates(host: Host) -> tuple[float, float]:
    """GB/s into each GPU of the last half while all receive from one of the first each, and within one GPU; 0 where
    there is none."""
    if host.device != "cuda":
        return 0.0, 0.0
    pairs = list(zip(host.gpus("first"), host.gpus("last"), strict=False))
    return (measured(pairs) if host.count > 1 else 0.0), measured([(0, 0)])


def servers(
    host: Host, case: Case, model: Path, directory: Path, names: Sequence[str], ring: int = 0
) -> dict[str, VllmServer]:
    """Engines of the case; one called ``fresh`` is without us and loads what the model's directory holds."""
    tp, gpus = host.tp(case), host.gpus(case.serves)
    arguments: tuple[str, ...] = ("--max-model-len", "2048")
    if case.experts and tp > 1 and host.device == "cuda":  # vLLM's MoE kernel for CPUs has no expert parallelism
        arguments += ("--enable-expert-parallel",)
    made = several(names, model, tp=tp, device=host.device, weightsync=names != ["fresh"])
    for number, (name, server) in enumerate(made.items()):
        environment = REPEATABLE | host.only(gpus[number * tp : (number + 1) * tp])
        if host.device == "cuda":
            environment |= {"WEIGHTSYNC_MODE": "flip", "WEIGHTSYNC_LANDING_MIB": str(ring)}
            server.eager = False
            share = ("--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.1")
            server.arguments = (*arguments, *share, "--compilation-config", GRAPHS)
        else:
            server.arguments = arguments
        if name != "fresh":
            server.arguments = (*server.arguments, "--load-format", "dummy")
        server.env, server.log = environment, directory / f"{name}.log"
    return made


def explained(whole: Fleet) -> dict[str, Any]:
    """The plan in numbers."""
    command = [sys.executable, "-m", "weightsync.orchestrator.cli.main", "plan", "explain", "--json"]
    done = subprocess.run([*command, "--config", str(whole.config)], stdout=subprocess.PIPE, check=True, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass
class Running:
    """A case from its start to its verdict; the three methods are called in this order, then ``close``."""

    name: str
    host: Host
    given: argparse.Namespace
    directory: Path
    engines: dict[str, VllmServer] = field(default_factory=dict)
    served: dict[str, tuple[Answer, ...]] = field(default_factory=dict)
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def case(self) -> Case:
        return CASES[self.name]

    def start(self) -> None:
        """Engines and ranks, to the first version that is served."""
        config = model_of(self.host, self.case, self.given.gb)
        model = save_model(self.directory / "model", config, {})
        (model / "model.safetensors").unlink()
        names = [f"e{number}" for number in range(self.case.engines)]
        self.engines = servers(self.host, self.case, model, self.directory, names, self.given.ring)
        for server in self.engines.values():
            self.ends.callback(server.close)
            server.start()
        settings: dict[str, Any] = {"pause": {"cache": "keep"}}
        if self.case.fan_out != "trainer":
            settings["fan_out"] = self.case.fan_out
        self.whole = self.ends.enter_context(fleet(self.directory / "fleet", self.engines, settings=settings))
        script = str(Path(__file__).resolve().parent / "stall_trainer.py")
        ranks = self.host.ranks(self.case)
        environment = {REPLICAS: str(self.case.replicas), "NCCL_NVLS_ENABLE": "0"} | self.host.only(ranks)
        if self.case.apart:
            environment[APART] = "1"
        if self.host.device == "cuda":
            environment[RING] = str(self.given.ring)
        self.trainer: Trainer = self.whole.start_trainer(
            model, len(ranks), script=script, device=self.host.device, env=environment
        )
        self.trainer.hear(self.given.patience)
        for server in self.engines.values():
            server.wait_ready(self.given.patience)
        if "error" in (told := self.trainer.publish(1)):
            raise RuntimeError(f"{told['error']}\n{self.whole.daemon_log()[-6000:]}")

    def measure(self) -> None:
        """Pushes while clients stream, and says their figures."""
        between, within = copy_rates(self.host)
        with Streams(next(iter(self.engines.values())), [7, 8, 9]).running() as streams:
            self.whole.until(lambda: len(streams.chunks) > 20, "streams", self.given.patience)
            pushes(self.whole, self.trainer, streams, 2, WARM_UP_PUSHES)
            rows = pushes(self.whole, self.trainer, streams, 100, self.given.pushes)
        rounds = self.whole.ask(f"/rounds?last={self.given.pushes}")["rounds"]
        plan = explained(self.whole)
        self.served = {key: answers(server) for key, server in self.engines.items()}
        ranks = sum(server.tp for server in self.engines.values())
        hops = 2 if self.case.engines > 1 and self.case.fan_out == "peers" else 1
        self.say("hops", [hops], "count")
        _say_pushes(self.say, rows, rounds, between, ranks, hops)
        _say_plan(self.say, plan)
        if within and self.case.fan_out == "trainer":
            floor = self._floor_seconds(plan, between or within, within)
            self.say("wire_over_floor", [1e3 * floor / row["times_ms"]["wire"] for row in rounds], "ratio")
        own = [row["trainer_bytes"] / row["bytes"] * self.case.engines for row in rounds]
        self.say("sent_over_engine", own, "ratio")

    def _floor_seconds(self, plan: dict[str, Any], between: float, within: float) -> float:
        """What copies of these rates (GB/s) would take until the last GPU has its bytes, one after the other."""
        senders, receivers = self.host.ranks(self.case), self.host.gpus(self.case.serves)
        tp = self.host.tp(self.case)
        seconds = dict.fromkeys(receivers, 0.0)
        for edge in plan["edges"]:
            engine, _, rank = edge["target"].rpartition("/")
            there = receivers[int(engine.removeprefix("e")) * tp + int(rank)]
            rate = within if senders[int(edge["source"].rpartition("/")[2])] == there else between
            seconds[there] += moved(edge) / rate / 1e9
        return max(seconds.values())

    def judge(self) -> bool:
        """Whether every engine answered as a fresh one, which takes their place: it needs the room."""
        last = 100 + self.given.pushes - 1
        self.trainer.tell(do="save", step=last)
        for server in self.engines.values():
            server.close()
        assert self.trainer.hear(self.given.patience) == {"saved": last}
        checkpoint = self.whole.checkpoints / f"step_{last}"
        self.trainer.stop()
        fresh = servers(self.host, self.case, checkpoint, self.directory, ["fresh"])["fresh"]
        with fresh:
            right = answers(fresh)
        same = [key for key, said in self.served.items() if said == right]
        self.say("same_as_fresh", [len(same)], "engines")
        return len(same) == len(self.served)

    def say(
        self, figure: str, values: Sequence[float], unit: str, of: Callable[..., float] = statistics.median
    ) -> None:
        """One line."""
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (0.0, 0.0, 0.0)
        named = f"multi_{figure}_{self.name}".replace("-", "_")
        line = {"figure": named, "value": round(of(values), 4), "unit": unit, "n": len(values)}
        device = torch.cuda.get_device_name(0) if self.host.device == "cuda" else "cpu"
        facts = {"case": self.name, "gpus": self.host.count, "device": device, "ring_mib": self.given.ring}
        print(json.dumps(line | {"spread": round(high - low, 4)} | facts), flush=True)


def _say_pushes(
    say: Callable[..., None],
    rows: list[dict[str, float]],
    rounds: list[dict[str, Any]],
    ceiling: float,
    ranks: int,
    hops: int,
) -> None:
    wires = [hops * row["bytes"] / ranks / max(row["times_ms"]["wire"], 1e-3) / 1e6 for row in rounds]
    say("stall_p95_ms", [row["stall"] for row in rows], "ms", p95)
    say("stall_p50_ms", [row["stall"] for row in rows], "ms")
    say("answers_begun_during_pushes", [sum(row["begun"] for row in rows)], "count")
    say("push_ms", [row["push"] for row in rows], "ms")
    say("gb_per_serving_gpu", [row["bytes"] / ranks / 1e9 for row in rounds], "GB")
    say("wire_gb_per_s", wires, "GB/s")
    if ceiling:
        say("peer_copy_gb_per_s", [ceiling], "GB/s")
        say("wire_over_peer_copy", [wire / ceiling for wire in wires], "ratio")
    say("publish_over_longest_part", over_longest_part(rows, rounds), "ratio")
    for part in sorted(rounds[0]["times_ms"]):
        say(f"{part}_ms", [row["times_ms"].get(part, 0.0) for row in rounds], "ms")


def moved(part: dict[str, Any]) -> int:
    """Bytes of an end or an edge of the plan."""
    return int(part["moved"]["direct_bytes"]) + int(part["moved"]["packed_bytes"])


def _say_plan(say: Callable[..., None], plan: dict[str, Any]) -> None:
    sent = [moved(end) for end in plan["senders"]]
    received = [moved(end) for end in plan["receivers"]]
    say("sender_spread", [(max(sent) - min(sent)) / statistics.mean(sent)], "ratio")
    say("receiver_spread", [(max(received) - min(received)) / statistics.mean(received)], "ratio")
    say("descriptors", [plan["moved"]["descriptors"]], "count")


def at_once(names: Sequence[str], host: Host, given: argparse.Namespace) -> list[str]:
    """These cases side by side; those of them whose engines do not answer as a fresh one, or that failed."""
    wrong: list[str] = []

    def each(running: list[Running], step: Callable[[Running], object], threads: int) -> list[Running]:
        """Those that went on."""
        with ThreadPoolExecutor(threads) as pool:
            futures = [(one, pool.submit(step, one)) for one in running]
        for one, future in futures:
            if (error := future.exception()) is not None or future.result() is False:
                print(f"{one.name}: {error or 'other answers than a fresh engine'}", file=sys.stderr, flush=True)
                wrong.append(one.name)
        return [one for one in running if one.name not in wrong]

    with contextlib.ExitStack() as ends:
        running = []
        for name in names:
            directory = ends.enter_context(tempfile.TemporaryDirectory(prefix="weightsync-bench-"))
            running.append(Running(name, host, given, Path(directory)))
            ends.push(running[-1].ends)
        running = each(running, Running.start, len(names))
        running = each(running, Running.measure, 1)
        each(running, Running.judge, len(names))
    return wrong


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    arguments.add_argument("--gb", type=float, default=16.0, help="of weights for each serving GPU")
    arguments.add_argument("--pushes", type=int, default=10)
    ring = longest_ring(on_device=True) >> 20
    arguments.add_argument("--ring", type=int, default=ring, help="MiB of each GPU of either side for chunks")
    arguments.add_argument("--at-once", type=int, default=1, help="how many cases the memory has room for")
    arguments.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments.add_argument("--patience", type=float, default=300.0, help="seconds for each start")
    given = arguments.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the processes that this one starts
    host, wrong = Host.here(given.device), []
    cases = [name for name in given.cases if host.fits(CASES[name])]
    for name in sorted(set(given.cases) - set(cases)):
        print(json.dumps({"case": name, "skipped": "not enough GPUs"}), flush=True)
    for first in range(0, len(cases), given.at_once):
        wrong += at_once(cases[first : first + given.at_once], host, given)
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
