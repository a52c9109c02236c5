"""What a version costs end to end on one GPU: trainer and vLLM beside each other, FP8 blocks over NIXL (cuda_ipc).

    make bench-gpu

Prints one JSON object a line. ``gpu_push_wire_gb_per_s`` is bytes over the time from the first post to the last DONE;
``gpu_push_stall_ms`` is how long the engine answered nobody; ``gpu_push_convert_ms``, ``…_slot_digest_ms`` and
``…_live_digest_ms`` are casting and quantising all weights, and digesting them at both ends. The spread is the distance
between the quartiles. The weights are the same in every round; no part of a round looks at their values.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from fleet import fleet
from serving import VllmServer
from tiny_models import FP8_BLOCKS, qwen3_config, save_model

SIZES: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 8, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768,
}  # fmt: skip
"""The layers of Qwen3-8B, eight of them: 2.1 GB, of which 1.5 GB are FP8."""
FIGURES = {
    "gpu_push_pause_ms": "pausing",
    "gpu_push_stall_ms": "stall",
    "gpu_push_wire_ms": "wire",
    "gpu_push_convert_ms": "convert",
    "gpu_push_slot_digest_ms": "slot_digest",
    "gpu_push_live_digest_ms": "digest",
    "gpu_push_apply_ms": "apply",
    "gpu_push_total_ms": "total",
}
WARM_UP_ROUNDS = 2


def report(figure: str, values: list[float], unit: str) -> None:
    low, middle, high = statistics.quantiles(values, n=4)
    line = {"figure": figure, "value": round(middle, 4), "unit": unit, "n": len(values), "spread": round(high - low, 4)}
    print(json.dumps(line | {"device": torch.cuda.get_device_name(0)}), flush=True)


def rounds_of(directory: Path, rounds: int) -> list[dict[str, Any]]:
    """The rows of ``rounds`` committed rounds, after those that pay for wiring."""
    model = save_model(directory / "model", qwen3_config(**SIZES, **FP8_BLOCKS), {})
    (model / "model.safetensors").unlink()
    dummy = ("--load-format", "dummy")
    server = VllmServer(
        model, device="cuda", arguments=dummy, env={"WEIGHTSYNC_MODE": "live"}, log=directory / "engine.log"
    ).start()
    try:
        with fleet(directory / "fleet", {"engine": server}) as whole:
            trainer = whole.start_trainer(model, device="cuda")
            trainer.hear()
            server.wait_ready()
            for step in range(1, rounds + WARM_UP_ROUNDS + 1):
                told = trainer.publish(step, again=True)
                if "error" in told:
                    raise RuntimeError(f"step {step} was not committed: {told['error']}")
            return list(whole.ask(f"/rounds?last={rounds}")["rounds"])
    finally:
        server.close()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=20)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightsync-bench-") as directory:
        rows = rounds_of(Path(directory), given.rounds)
    report("gpu_push_bytes", [row["bytes"] for row in rows], "bytes")
    report("gpu_push_descriptors", [row["descriptors"] for row in rows], "count")
    report("gpu_push_wire_gb_per_s", [row["bytes"] / row["times_ms"]["wire"] / 1e6 for row in rows], "GB/s")
    for figure, name in FIGURES.items():
        report(figure, [row["times_ms"][name] for row in rows], "ms")


if __name__ == "__main__":
    main()
