"""How versions land in an engine, as whoever starts it wants it: memory is allocated before any daemon speaks."""

import os
from typing import Final, Literal, get_args

from weightsync.agents.errors import AgentError

MODE_VARIABLE: Final = "WEIGHTSYNC_MODE"

Mode = Literal["auto", "flip", "copy", "live"]
"""``flip``: into standby pages, which then take the place of the live ones; ``copy``: into an arena, from which a
kernel spreads them; ``live``: into the parameters of a paused engine; ``auto``: the first of these that fits."""

DEFAULT_MODE: Final[Mode] = "auto"


class ModeRefused(AgentError):
    """The mode that an engine was started with is none, or cannot be had here. The configuration's fault."""


def wanted_mode() -> Mode:
    """What the environment says.

    Raises:
        ModeRefused: it names no mode.
    """
    value = os.environ.get(MODE_VARIABLE) or DEFAULT_MODE
    for mode in get_args(Mode):
        if value == mode:
            return mode  # type: ignore[no-any-return]
    raise ModeRefused(f"{MODE_VARIABLE} is {value!r}; it may be one of {', '.join(get_args(Mode))}")
