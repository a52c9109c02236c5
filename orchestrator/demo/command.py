"""Train a tiny model on two ranks and push versions into two real vLLM servers that answer requests meanwhile.

One takes versions as it does by default, beside what it serves; the other is told to stand still for them. At the end
the answers of both are compared with those of another one that loads the checkpoint. Everything heavy
is a child process. However the demo ends (done, failed, Ctrl-C, SIGTERM, a closed terminal), none of them is left.
"""

import argparse
import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from weightsync.orchestrator.cli.common import Exit
from weightsync.orchestrator.demo.children import Children, Survivors, become_reaper
from weightsync.orchestrator.demo.setup import RANKS, DemoRun, MissingRequirement, Vllm, find_vllm
from weightsync.orchestrator.demo.show import Screen
from weightsync.orchestrator.demo.story import Demo, DemoFailed

MAX_VERSIONS: Final = 1000
"""Two seconds each; beyond that it is no demonstration but a soak test."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PICTURE: Final = """\
  trainer rank 0 ──┐   weights, NIXL writes   ┌─▶ vLLM engine-0  (as by default) ◀═══▶ client
  trainer rank 1 ──┴──────────────────────────┴─▶ vLLM engine-1  (live)          ◀═══▶ client
         ▲                                                  ▲
         └── plan, grants ──  daemon  ── verify, switch ────┘\
"""


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit code is 0 if the pushed engine answered as the fresh one, bit for bit."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        vllm = find_vllm()
    except MissingRequirement as error:
        print(error, file=sys.stderr)
        return Exit.UNAVAILABLE
    directory: Path | None = options.directory
    if directory is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        print(f"--directory: {directory} exists and is not an empty directory. Fix: name a new one", file=sys.stderr)
        return Exit.USAGE
    return asyncio.run(_demonstrate(options, vllm))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weightsync-orchestrator demo", description=__doc__)
    add = parser.add_argument
    add("--versions", type=_count, default=5, metavar="N", help="how many versions to push (default 5)")
    add("--directory", type=Path, metavar="DIR", help="make the run here, and keep it (default: a temporary one)")
    add("--keep", action="store_true", help="keep the temporary directory: logs, journal, checkpoint")
    return parser


def _count(text: str) -> int:
    if text.isdigit() and 1 <= int(text) <= MAX_VERSIONS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is no number from 1 to {MAX_VERSIONS}")


async def _demonstrate(options: argparse.Namespace, vllm: Vllm) -> int:
    """Runs the demo in a task of its own: a signal cancels that task and never the cleaning up after it."""
    become_reaper()
    screen, children, signals = Screen(sys.stdout), Children(), list[int]()
    directory = Path(tempfile.mkdtemp(prefix="weightsync-demo-")) if options.directory is None else options.directory
    keep = options.keep or options.directory is not None
    story = asyncio.create_task(_story(screen, children, DemoRun(directory.resolve(), vllm, options.versions)))

    def interrupt(number: int) -> None:
        signals.append(number)
        story.cancel()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, interrupt, number)
    code: int = Exit.FAILURE
    try:
        with contextlib.suppress(asyncio.CancelledError):
            code = Exit.OK if await story else Exit.FAILURE
        if signals:
            code = 128 + signals[0]
            screen.line(f"  interrupted by {signal.Signals(signals[0]).name}; everything is being stopped …")
    except DemoFailed as failure:
        keep = True
        _explain(screen, failure)
    finally:
        screen.awaiting(None)
        try:
            await children.close()
        except Survivors as error:
            code, keep = Exit.FAILURE, True
            screen.line(screen.bad(str(error)))
        else:
            screen.line(screen.dim("every process that was started has ended"))
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    if keep:
        _farewell(screen, directory.resolve())
    return code


async def _story(screen: Screen, children: Children, run: DemoRun) -> bool:
    screen.line(screen.style("weightsync-orchestrator demo", "1"))
    screen.line(
        f"{run.versions} versions of a small Qwen3, trained by {RANKS} ranks, into two vLLMs that answer meanwhile"
    )
    screen.line()
    screen.line(screen.dim(_PICTURE))
    run.write()
    demo = Demo(run, screen, children)
    animation = asyncio.create_task(screen.animate())
    telling = asyncio.create_task(demo.run())
    try:
        # Only one of them ends by itself; the animation does when nobody reads any more.
        done, _ = await asyncio.wait({animation, telling}, return_when=asyncio.FIRST_COMPLETED)
        await done.pop()
        return await telling
    finally:
        for task in (animation, telling):
            task.cancel()
        await asyncio.gather(animation, telling, return_exceptions=True)
        await demo.close()
        run.release()


def _explain(screen: Screen, failure: DemoFailed) -> None:
    screen.awaiting(None)
    screen.line()
    screen.line(f"{screen.bad('the demo failed')}: {failure}")
    if failure.path is not None:
        screen.line(screen.dim(f"the end of {failure.path}:"))
        for line in failure.log:
            screen.line(f"  {line}")
    if failure.remedy:
        screen.line(f"what to do: {failure.remedy}")


def _farewell(screen: Screen, kept: Path) -> None:
    config = kept / "config.yaml"
    screen.line()
    screen.line(f"kept in {kept}: *.log, state/ (the journal), run/ (the markers), checkpoints/")
    screen.line(f"  weightsync-orchestrator status --config {config}")
    screen.line(f"  weightsync-orchestrator rounds --config {config}")
