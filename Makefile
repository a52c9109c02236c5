# Everything runs in .venv, which `make setup` builds from the project's own files. `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Tests at a time; most of their time is the start of a vLLM, which keeps one core busy.
WORKERS ?= 2
SOURCES := $(shell find orchestrator agents kernels \( -name '*.py' -o -path '*/static/*' \) -not -path '*/__pycache__/*' 2>/dev/null)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
BENCH := PYTHONPATH=tests:tests/e2e $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z0-9-]+):.*/\1/p' $(MAKEFILE_LIST))

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.linked ## make .venv: a CPU build of vLLM, NIXL, the tools, and this project (about 3 GB)

$(VENV)/.installed: tests/requirements-cpu.txt tests/requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-cpu.txt -r tests/requirements-dev.txt
	@touch $@

programs: ## what tests run of others, from Debian where it is not here: Chromium for the page, promtool for the alerts
	@command -v chromium >/dev/null && command -v promtool >/dev/null || { $(SUDO) apt-get update -qq && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium prometheus; }

# Changes when a module comes or goes, not when one is edited.
$(VENV)/.sources: $(VENV)/.installed FORCE
	@echo '$(sort $(SOURCES))' | cmp -s - $@ || echo '$(sort $(SOURCES))' > $@

FORCE:

# Linked file by file, so that type checkers see the mapped packages; a new file asks for a new link.
$(VENV)/.linked: $(VENV)/.installed pyproject.toml $(VENV)/.sources
	@rm -rf build
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--config-settings editable_mode=strict -e .
	@touch $@

$(VENV)/.docs: tests/requirements-docs.txt $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r tests/requirements-docs.txt
	@touch $@

# Apart from everything else, so that vLLM's CPU build does not find it.
$(VENV)/.kernels: tests/requirements-kernels.txt $(VENV)/.installed
	@rm -rf $(VENV)/kernels
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/kernels -r tests/requirements-kernels.txt
	@touch $@

docs: setup $(VENV)/.docs ## build the documentation site into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

demo: setup ## daemon, two trainer ranks, two real vLLMs; five versions pushed while they answer
	@$(BIN)/weightsync-orchestrator demo

test: test-unit test-kernels test-e2e ## all tests that need no GPU

test-unit: setup ## the quick ones, with the seeded simulation
	$(PYTEST) -n $(WORKERS)

test-kernels: setup $(VENV)/.kernels ## the Triton kernels, by Triton's interpreter and its compiler
	PYTHONPATH=$(VENV)/kernels $(PYTEST) -n $(WORKERS) tests/unit/kernels -k "interpreter or compiled"

test-e2e: setup ## real vLLM engines, real trainer ranks, the real daemon
	$(PYTEST) -n $(WORKERS) --dist loadfile -m 'e2e and not long'

test-long: setup ## neighbours of those, and many faults one after the other
	$(PYTEST) -n $(WORKERS) --dist loadfile -m long

test-slurm: setup ## the job script on a slurmctld and slurmds of this machine, as root (Debian: slurmctld slurmd slurm-client munge)
	WEIGHTSYNC_SLURM=1 $(PYTEST) -m e2e tests/e2e/test_slurm.py

chaos: setup ## processes killed, stopped and cut off, disks full and slow, in every phase
	$(PYTEST) -m e2e tests/chaos

test-gpu: ## what needs an NVIDIA GPU; uses the python3 of the GPU machine, with torch, triton and nixl in it
	PYTHONPATH=$$(tests/gpu/link.sh) python3 -m pytest tests/gpu tests/unit/kernels -m gpu

sim: setup ## the simulation with many seeds: make sim SEEDS=2000
	WEIGHTSYNC_SIM_SEEDS=$(or $(SEEDS),1000) $(PYTEST) tests/sim

soak: setup ## JSON lines: 2,000 rounds of stand-in engines and 50 of a real vLLM with restarts; fails if anything grows
	PYTHONPATH=tests:tests/e2e:tests/soak $(BIN)/python tests/soak/soak.py

fuzz: setup ## a minute of mutated bytes for each parser that strangers, peers or files reach (FUZZ_SECONDS=600 for more)
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) $(PYTEST) tests/fuzz

flood: setup ## JSON lines: what thousands of strangers cost a running fleet; fails if it is more than their bound
	PYTHONPATH=tests:tests/e2e:tests/soak $(BIN)/python tests/soak/flood.py

mutants: setup ## plant bugs, one at a time; each must be caught by the tests (MUTANTS="taint" for some of them)
	$(BIN)/python tests/mutants/plant.py $(MUTANTS)

lint: setup ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup ## mypy --strict
	$(BIN)/mypy

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pictures: setup programs ## take the pictures of docs/page.md anew
	PYTHONPATH=tests:tests/e2e:tests/soak $(BIN)/python tests/page/pictures.py docs/pictures

bench-e2e: setup ## JSON lines: pause, stall, wire over memcpy and over bare NIXL, the daemon's own share
	$(BENCH) tests/benchmarks/bench_e2e.py

bench-stall: setup ## JSON lines: how long a stream stands still during a push, in copy, flip and live, beside its ordinary gaps
	$(BENCH) tests/benchmarks/bench_stall.py

bench-plan: setup ## JSON lines: planning for a trillion parameters
	$(BENCH) tests/benchmarks/bench_plan.py

bench-hub: setup ## JSON lines: rendezvous and barrier of 16 to 4096 agents, beside vLLM's StatelessProcessGroup
	$(BENCH) tests/benchmarks/bench_hub.py

bench-observe: setup ## JSON lines: what metrics and 50 open pages cost of rounds of 128 agents
	$(BENCH) tests/benchmarks/bench_observe.py

bench-restart: setup ## JSON lines: how long engines stand still when the daemon is killed in a round and started again
	$(BENCH) tests/benchmarks/bench_restart.py

bench-history: setup ## JSON lines: a step of the core and a start after a long history, scans of 100,000 steps
	$(BENCH) tests/benchmarks/bench_history.py

bench-scan: setup ## JSON lines: the scans alone
	$(BENCH) tests/benchmarks/bench_history.py scan

bench-sim: setup ## JSON lines: simulated rounds a minute, and how long healthy engines stand still beside bad ones
	PYTHONPATH=tests:tests/sim $(BIN)/python tests/benchmarks/bench_sim.py $(SEEDS)

bench-nixl: setup ## JSON lines: our write path over bare NIXL
	$(BENCH) tests/benchmarks/bench_nixl.py

bench-convert: setup ## JSON lines: Python of a publish, FSDP ranks over one, a writer beside Python
	$(BENCH) tests/benchmarks/bench_convert.py

bench-gpu: ## JSON lines: kernels, NIXL and whole pushes on a GPU; uses the python3 of the GPU machine
	PYTHONPATH=$$(tests/gpu/link.sh) python3 tests/benchmarks/bench_gpu_kernels.py
	PYTHONPATH=$$(tests/gpu/link.sh) python3 tests/benchmarks/bench_gpu_nixl.py
	PYTHONPATH=$$(tests/gpu/link.sh):tests:tests/e2e python3 tests/benchmarks/bench_gpu_push.py

bench-gpu-flip: ## JSON lines: what exchanging two sets of pages costs by itself, on a GPU
	PYTHONPATH=$$(tests/gpu/link.sh) python3 tests/benchmarks/bench_gpu_flip.py

bench-gpu-stall: ## JSON lines: how long streaming clients wait because of a push, on one GPU or two; with vLLM
	PYTHONPATH=$$(tests/gpu/link.sh):tests:tests/e2e python3 tests/benchmarks/bench_gpu_stall.py $(ARGUMENTS)

gpu-multi: ## JSON lines: half of a host's GPUs train, the other half serve a model over several of them
	PYTHONPATH=$$(tests/gpu/link.sh):tests:tests/e2e python3 tests/benchmarks/bench_gpu_multi.py

families: setup ## JSON lines: stock configurations of transformers, each judged by a fresh engine at TP 1 and TP 2
	$(BENCH) tests/benchmarks/bench_families.py

changelog: setup ## print the next section of CHANGELOG.md; with VERSION=1.2.3 write it and remove its fragments
	$(BIN)/towncrier build $(if $(VERSION),--yes --version $(VERSION),--draft --version next)
	$(if $(VERSION),$(BIN)/weightsync-orchestrator config schema > tests/unit/settings/released_schema.json)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build *.egg-info
