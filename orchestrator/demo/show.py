"""What the demo prints: lines that stay and, on a terminal, one live line below them that says what it waits for."""

import asyncio
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final, TextIO

from weightsync.orchestrator.daemon.admin.views import RoundRow
from weightsync.orchestrator.demo.client import TOP_LOGPROBS, Answer
from weightsync.orchestrator.demo.setup import ENGINES, ROW_BYTES

WIDTH: Final = 100
REDRAW_SECONDS: Final = 0.1
PLAIN_SECONDS: Final = 15.0
"""Between two signs of life where there is no terminal."""

_SPINNER: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_BOLD, _DIM, _GREEN, _RED, _CYAN = "1", "2", "32", "31", "36"
_COLUMNS: Final = (
    ("version", 7), ("loss", 5), ("bytes", 7), ("wire GB/s", 9), *((f"{name} ms", 11) for name in ENGINES),
    ("total ms", 8),
)  # fmt: skip
"""Of each engine: how long it took no step."""


class Screen:
    """Prints to one stream. Colours and the live line only where ``out`` is a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._colours = self._terminal and "NO_COLOR" not in os.environ
        self._lost = False
        self._live: Callable[[], str] | None = None
        self._drawn = False
        self._since = self._said = time.monotonic()

    # ----------------------------------------------------------------------------------------------------- lines
    def line(self, text: str = "") -> None:
        """One line that stays.

        Raises:
            BrokenPipeError: the first time that nobody reads any more; later lines are dropped.
        """
        self._write(("\r\x1b[K" if self._drawn else "") + text + "\n")
        self._drawn = False
        self._said = time.monotonic()

    def title(self, text: str) -> None:
        """A heading."""
        self.line()
        self.line(self.style(text, _BOLD))

    def ready(self, what: str, text: str, seconds: float) -> None:
        """Something has been started and works."""
        self._mark("✓", _GREEN, what, text, f"{seconds:.1f} s")

    def begins(self, what: str, text: str) -> None:
        """Something is being started."""
        self._mark("·", _DIM, what, text, "")

    def _mark(self, sign: str, code: str, what: str, text: str, right: str) -> None:
        body = f"{what:<9} {text}"
        self.line(f"  {self.style(sign, code)} {body:<{WIDTH - 13}} {self.style(f'{right:>8}', _DIM)}".rstrip())

    def style(self, text: str, code: str) -> str:
        """``text`` in an SGR style, where there are colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours and text.strip() else text

    def good(self, text: str) -> str:
        """``text`` as good news."""
        return self.style(text, f"{_BOLD};{_GREEN}")

    def bad(self, text: str) -> str:
        """``text`` as bad news."""
        return self.style(text, f"{_BOLD};{_RED}")

    def dim(self, text: str) -> str:
        """``text`` of less weight."""
        return self.style(text, _DIM)

    # ----------------------------------------------------------------------------------------------------- live line
    def awaiting(self, live: Callable[[], str] | None) -> None:
        """From now on the live line shows what ``live`` returns; None: no live line."""
        self._live, self._since = live, time.monotonic()
        self._said = self._since
        if live is None and self._drawn:
            self._write("\r\x1b[K")
            self._drawn = False

    async def animate(self) -> None:
        """Keeps the live line alive until it is cancelled."""
        frame = 0
        while True:
            await asyncio.sleep(REDRAW_SECONDS)
            if self._live is None:
                continue
            now = time.monotonic()
            columns = min(WIDTH, shutil.get_terminal_size().columns if self._terminal else WIDTH)
            text = f"{now - self._since:.0f} s  {_printable(self._live())}"[: columns - 5]
            if self._terminal:
                frame += 1
                spinner = self.style(_SPINNER[frame % len(_SPINNER)], _CYAN)
                self._write(f"\r\x1b[K  {spinner} {self.dim(text)}")
                self._drawn = True
            elif now - self._said >= PLAIN_SECONDS:
                self.line(f"    {text}")

    def _write(self, text: str) -> None:
        if self._lost:
            return
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            self._lost = True
            raise

    # ----------------------------------------------------------------------------------------------------- the table
    def header(self) -> None:
        """What the table's columns are."""
        self.line(
            self.dim("  ms of an engine: how long it took no step; total: from the first pause to the last resume")
        )
        names = "  ".join(name.rjust(width) for name, width in _COLUMNS)
        self.line(self.dim(f"  {names}  the engine says"))

    def row(self, row: RoundRow, loss: str, said: str) -> None:
        """One round; a failed one with its reason."""
        stalls = (f"{row.stalls_ms[name]:.0f}" if name in row.stalls_ms else "-" for name in ENGINES)
        cells = (str(row.step), loss, size(row.bytes), f"{row.wire_gb_per_s:.2f}", *stalls, f"{row.total_ms:.0f}")
        text = "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
        self.line(f"  {text}  {self.style(said, _CYAN)}".rstrip())
        if row.outcome != "committed":
            self.line(f"    {self.bad(row.outcome)}, attempt {row.attempt}: {_printable(row.reason)}")


def compared(screen: Screen, text: tuple[str, str], pushed: Answer, loaded: Answer) -> bool:
    """Prints whether two engines answered the prompt alike, bit for bit, and how they did not; returns it.

    Args:
        text: the prompt, and the answer that the trainer taught.
        pushed, loaded: of the engine that was pushed to, and of the one that loaded the checkpoint.
    """
    prompt, taught = text
    said = screen.style(pushed.text[: len(taught)].ljust(ROW_BYTES - len(prompt)), _CYAN)
    same = pushed == loaded
    verdict = screen.style("the same", _GREEN) if same else screen.bad("different")
    counts = f"{len(pushed.tokens)} tokens, {len(pushed.tokens)} × {TOP_LOGPROBS} log-probabilities"
    screen.line(f"  {prompt}{said}  {counts}  {verdict}")
    for name, answer in () if same else (("pushed", pushed), ("loaded", loaded)):
        screen.line(f"    {name}: {answer.tokens} {answer.logprobs}")
    return same


def size(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count} B"


def summary(rows: Sequence[RoundRow]) -> list[tuple[str, str]]:
    """What all rounds together say, as (name, text)."""
    done = [row for row in rows if row.outcome == "committed"]
    others, versions = len(rows) - len(done), {row.step for row in done}
    moved = sum(row.bytes for row in done)
    wire = [row.wire_gb_per_s for row in done if row.wire_gb_per_s]
    rate = f" at {statistics.median(wire):.2f} GB/s" if wire else ""
    attempts = f", {others} attempts failed" if others else ", each at the first attempt"
    if len(done) > len(versions):
        attempts += f", in {len(done)} rounds: an engine that came late caught up by itself"
    return [
        ("versions", f"{len(versions)} pushed{attempts}"),
        ("weights", f"{size(moved)} over NIXL{rate}, each byte verified in the engines' memory"),
        *((name, _stood_still(done, name)) for name in ENGINES),
    ]


def _stood_still(done: Sequence[RoundRow], engine: str) -> str:
    """In the rounds but its first, before which it was held."""
    took_part = [row for row in done if engine in row.stalls_ms]
    rows = took_part[1:] or took_part
    if not rows:
        return "took part in no round"
    mode = rows[-1].modes.get(engine, "live")
    took = f"{statistics.median(row.stalls_ms[engine] for row in rows):.0f} ms (median)"
    if mode == "live":
        return f"live: stood still for {took}, while bytes arrived"
    return f"{mode}: stood still for {took}, to switch; it served while bytes arrived"


def _printable(text: str) -> str:
    """Without control characters: it comes from other processes' logs, and a terminal obeys escapes."""
    return "".join(character if character.isprintable() else " " for character in text)
