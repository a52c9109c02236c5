"""The steps of the demo: start a fleet, push versions while clients stream, compare with an engine loaded from disk."""

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from weightsync.orchestrator.daemon.admin.views import RoundRow
from weightsync.orchestrator.demo.children import HOST, Child, Children
from weightsync.orchestrator.demo.client import (
    CHECKED_TOKENS,
    Answer,
    DaemonApi,
    EngineApi,
    RequestFailed,
    Traffic,
)
from weightsync.orchestrator.demo.setup import ENGINES, RANKS, TEXT, DemoRun, daemon_environment
from weightsync.orchestrator.demo.show import Screen, compared, size, summary
from weightsync.orchestrator.settings.credentials import role_file
from weightsync.orchestrator.settings.secrets import read_tokens

DAEMON_SECONDS: Final = 60.0
TRAINER_SECONDS: Final = 300.0
ENGINE_SECONDS: Final = 600.0
"""A vLLM on two idle cores is ready in 20 s; on busy ones it takes minutes."""

VERSION_SECONDS: Final = 300.0
"""For one version: the training steps, every attempt of its round, and the backoffs between them."""

LOOK_SECONDS: Final = 0.25
TAIL_LINES: Final = 15
COMPARED_SECONDS: Final = 300.0
"""For an answer that is compared: how long it takes says nothing."""

T = TypeVar("T")

_LOSS = re.compile(r"^step (\d+) loss (\S+)$", re.MULTILINE)
_REFUSED = re.compile(r"^step (\d+) was not published: (.*)$", re.MULTILINE)

_STAGES: Final = (
    ("", "its API server imports vLLM"),
    ("non-default args", "its engine core imports vLLM"),
    ("Initializing a V1 LLM engine", "its worker imports vLLM"),
    ("Starting to load model", "its worker makes the model"),
    ("init engine (", "its API server opens the port"),
)
"""What stands in the log of a vLLM that has come so far, and what it does then."""

_REMEDIES: Final = (
    ("address already in use", "another process took the port in between; run the demo again"),
    ("no space left", "free some disk space, or give --directory on a larger disk"),
    ("free memory on device", "free some GPU memory; the demo's engine asks for a fifth of it"),
    ("out of memory", "free some memory; the demo needs about 4 GB"),
)


class DemoFailed(Exception):
    """The demo cannot go on. ``log``: the end of the log that tells why; ``remedy``: what to do."""

    def __init__(self, text: str, child: Child | None = None, remedy: str = "") -> None:
        super().__init__(text)
        self.log = [] if child is None else child.tail(TAIL_LINES)
        self.path = None if child is None else child.log
        known = (fix for sign, fix in _REMEDIES if any(sign in line.lower() for line in self.log))
        self.remedy = next(known, remedy)


class Demo:
    """One demonstration. ``run`` returns whether everything was as promised."""

    def __init__(self, run: DemoRun, screen: Screen, children: Children) -> None:
        self._run, self._screen, self._children = run, screen, children
        self._engines = {
            name: EngineApi(f"http://{HOST}:{port.number}", run.admin_key(name)) for name, port in run.engines.items()
        }
        self._fresh = EngineApi(f"http://{HOST}:{run.fresh.number}")
        self._traffic = {name: Traffic(engine) for name, engine in self._engines.items()}
        self._servers: dict[str, Child] = {}
        self._daemon = DaemonApi(run.hub_url, read_tokens(role_file(run.credentials, "viewer"))[0])
        self._trainer_log = ""

    async def run(self) -> bool:
        """Everything from the start of the fleet to the comparison.

        Raises:
            DemoFailed: something did not start, ended, or took too long.
        """
        self._children_start()
        await self._ready()
        streaming = [asyncio.create_task(traffic.run(1)) for traffic in self._traffic.values()]
        try:
            rows = await self._push()
            for traffic in self._traffic.values():
                traffic.stop()
            self._screen.awaiting(lambda: "the clients' last requests end")
            await asyncio.gather(*streaming)  # each answer has a deadline
        finally:
            for task in streaming:
                task.cancel()
            await asyncio.gather(*streaming, return_exceptions=True)
        kept = self._promises(rows)
        return await self._compare() and kept

    async def close(self) -> None:
        """Close the connections to the engines."""
        for engine in (*self._engines.values(), self._fresh):
            await engine.close()

    # --------------------------------------------------------------------------------------------------------- start
    def _children_start(self) -> None:
        run, start = self._run, self._children.start
        self._screen.title(f"Starting a fleet in {run.directory}")
        self._hub = start("daemon", run.daemon_command(), daemon_environment(), run.log("daemon"))
        self._trainers = [
            start(f"trainer-{rank}", run.trainer_command(), run.trainer_environment(rank), run.log(f"trainer-{rank}"))
            for rank in range(RANKS)
        ]
        for name, port in run.engines.items():
            command = run.engine_command(run.model, port, ours=True)
            self._servers[name] = start(name, command, run.engine_environment(name), run.log(name))
        where = "on the CPU" if run.vllm.cpu_plugin is not None else "on the GPU"
        self._screen.begins("daemon", f"weightsync-orchestrator run --config {run.config.name}")
        self._screen.begins("trainer", f"{RANKS} ranks, FSDP2 over gloo, float32 masters of a 4 M parameter Qwen3")
        for name, mode in ENGINES.items():
            how = f"told to land versions {mode}" if mode else "lands versions as it does by default"
            self._screen.begins(name, f"vLLM {run.vllm.release} {where}, with random weights; {how}")

    async def _ready(self) -> None:
        began = time.monotonic()
        await self._until(self._daemon.status, lambda: "the daemon to answer", DAEMON_SECONDS, self._hub)
        self._screen.ready("daemon", f"serves its page at {self._run.hub_url}", time.monotonic() - began)
        token = role_file(self._run.credentials, "viewer").relative_to(self._run.directory)
        self._screen.line(f"    {'':<9} sign in with the text of {token}")
        await self._until(
            self._trainers_connected,
            lambda: f"{RANKS} trainer ranks, which import torch and transformers and make the model",
            TRAINER_SECONDS,
            self._trainers[0],
        )
        text = f"{RANKS} ranks have announced what they hold"
        self._screen.ready("trainer", text, time.monotonic() - began)
        held = "listens, and is held: it answers nobody before it has a verified version"
        for name, engine in self._engines.items():
            server = self._servers[name]
            await self._until(engine.healthy, partial(starting, server), ENGINE_SECONDS, server)
            self._screen.ready(name, held if await _held(engine) else "listens", time.monotonic() - began)

    async def _trainers_connected(self) -> bool:
        status = await self._daemon.status()
        return status is not None and len(status.trainers) == RANKS

    async def _until(
        self, holds: Callable[[], Awaitable[T]], what: Callable[[], str], seconds: float, child: Child
    ) -> T:
        """What ``holds`` returns once that is true; ``what`` says meanwhile what is waited for.

        Raises:
            DemoFailed: a child has ended, or ``seconds`` are over; with the log of the one to blame.
        """
        self._screen.awaiting(lambda: f"waits for {what()}")
        deadline = time.monotonic() + seconds
        while not (result := await holds()):
            self._no_child_ended()
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"waited {seconds:.0f} s in vain for {what()}", child, "is the machine busy? Run it again when idle"
                )
            await asyncio.sleep(LOOK_SECONDS)
        self._screen.awaiting(None)
        return result

    def _no_child_ended(self) -> None:
        ended = self._children.ended()
        if ended is not None:
            raise DemoFailed(f"{ended.name} ended with exit code {ended.code}", ended, "its log tells why")

    # ---------------------------------------------------------------------------------------------------------- push
    async def _push(self) -> list[RoundRow]:
        steps = self._run.steps
        self._screen.title(f"Pushing {len(steps)} versions while a client of each engine streams completions from it")
        self._screen.header()
        shown: list[RoundRow] = []
        self._screen.awaiting(self._push_progress)
        progressed = time.monotonic()
        while not any(row.step == steps[-1] and row.outcome == "committed" for row in shown):
            self._no_child_ended()
            self._trainer_log = self._trainers[0].log.read_text(errors="replace")
            for row in (await self._daemon.rounds() or ())[len(shown) :]:
                progressed = time.monotonic()
                shown.append(row)
                await self._show(row)
            refused = {int(step): reason for step, reason in _REFUSED.findall(self._trainer_log)}
            if steps[-1] in refused:
                raise DemoFailed(f"version {steps[-1]} failed: {refused[steps[-1]]}", self._hub, "the log tells why")
            if time.monotonic() - progressed > VERSION_SECONDS:
                status = await self._daemon.status()
                state = "it does not answer" if status is None else status.state
                raise DemoFailed(f"no round ended for {VERSION_SECONDS:.0f} s. The daemon: {state}", self._hub)
            await asyncio.sleep(LOOK_SECONDS)
        self._screen.awaiting(None)
        return shown

    async def _show(self, row: RoundRow) -> None:
        said = ""
        first = next(iter(self._engines))
        if row.outcome == "committed" and first in row.engines:
            prompt, expected = TEXT[0]
            with contextlib.suppress(RequestFailed):
                answer = await self._engines[first].complete(prompt, len(expected))
                said = answer.text.strip() or "(spaces)"
        losses = dict(_LOSS.findall(self._trainer_log))
        loss = losses.get(str(row.step))
        self._screen.row(row, f"{float(loss):.2f}" if loss else "-", said)
        for step in self._run.steps:
            if step < row.step:  # only the last version's checkpoint is compared
                shutil.rmtree(self._run.checkpoint(step), ignore_errors=True)

    def _push_progress(self) -> str:
        told = _LOSS.findall(self._trainer_log)
        step, loss = told[-1] if told else ("0", "-")
        traffic = self._traffic.values()
        done = f"{sum(t.requests for t in traffic)} requests answered, {sum(t.tokens for t in traffic)} tokens streamed"
        return f"training step {step} of {self._run.steps[-1]}, loss {loss} · {done}"

    # ------------------------------------------------------------------------------------------------------- judging
    def _promises(self, rows: Sequence[RoundRow]) -> bool:
        """Prints what happened meanwhile; whether every promise was kept."""
        screen, traffic, first = self._screen, self._traffic.values(), rows[0]
        screen.title("Meanwhile")
        for name, text in summary(rows):
            screen.line(f"  {name:<9} {text}")
        failures = [failure for each in traffic for failure in each.failures]
        told = (
            f"{sum(each.requests for each in traffic)} streamed requests, {sum(each.tokens for each in traffic)} tokens"
        )
        bad = screen.bad(f"{len(failures)} failures") if failures else screen.good("0 failures")
        unfinished = sum(each.unfinished for each in traffic)
        cut = f", {unfinished} cut off at the end" if unfinished else ""
        screen.line(f"  {'clients':<9} {told}, {bad}{cut}")
        waits = ", ".join(f"of {name} {each.gap * 1e3:.0f} ms" for name, each in self._traffic.items())
        screen.line(f"  {'':<9} longest wait for a token: {waits}")
        for failure in failures[:3]:
            screen.line(f"  {'':<9} {screen.bad(failure)}")
        # An engine is held until the first round has decided, so no token can be older than that round.
        begun = [each.first_token_at for each in traffic if each.first_token_at]
        early = bool(begun) and min(begun) < first.unix_time - first.total_ms / 1e3
        if early:
            screen.line(f"  {screen.bad('BROKEN')}    a token came before the first version was pushed")
        elif begun:
            waited = min(each.first_token_at - each.asked_at for each in traffic if each.first_token_at)
            promise = screen.good("no engine ever answered with unverified weights")
            screen.line(f"  {'promise':<9} {promise}:")
            screen.line(f"  {'':<9} requests sent while they were held waited {waited:.1f} s for version {first.step}")
        return not early and not failures

    async def _compare(self) -> bool:
        run, screen = self._run, self._screen
        last = run.steps[-1]
        screen.title(f"Comparing with a fresh vLLM that loads the trainer's checkpoint of version {last} from disk")
        pushed = {name: await self._answers(engine, self._servers[name]) for name, engine in self._engines.items()}
        began = time.monotonic()
        screen.awaiting(lambda: "the pushed fleet stops")
        await self._children.stop(self._children.all)
        checkpoint = run.checkpoint(last)
        command = run.engine_command(checkpoint, run.fresh, ours=False)
        fresh = self._children.start("fresh-engine", command, run.engine_environment(), run.log("fresh-engine"))
        await self._until(self._fresh.healthy, partial(starting, fresh), ENGINE_SECONDS, fresh)
        weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        screen.ready("fresh", f"an ordinary vLLM with {size(weights)} from disk", time.monotonic() - began)
        loaded = await self._answers(self._fresh, fresh)
        same = []
        for name, told in pushed.items():
            screen.line(f"  {name}")
            same += [compared(screen, *three) for three in zip(TEXT, told, loaded, strict=True)]
        screen.line()
        what = f"tokens and log-probabilities of {len(TEXT)} prompts to each engine, bit for bit"
        verdict = screen.good("identical") if all(same) else screen.bad("DIFFERENT")
        screen.line(f"{verdict}: {what}")
        return all(same)

    @staticmethod
    async def _answers(engine: EngineApi, server: Child) -> list[Answer]:
        """One after the other, so that batches have the same shape in all engines.

        Raises:
            DemoFailed: it does not answer.
        """
        try:
            return [await engine.complete(prompt, CHECKED_TOKENS, COMPARED_SECONDS) for prompt, _ in TEXT]
        except RequestFailed as error:
            raise DemoFailed(f"{server.name} does not answer: {error}", server) from error


async def _held(engine: EngineApi) -> bool:
    try:
        return await engine.paused()
    except RequestFailed:
        return False


def starting(server: Child) -> str:
    """How far a vLLM has come that does not listen yet, by its log."""
    log = server.log.read_text(errors="replace")
    number = max(number for number, (sign, _) in enumerate(_STAGES) if sign in log)
    return f"{server.name}: step {number + 1} of {len(_STAGES)}, {_STAGES[number][1]}"
