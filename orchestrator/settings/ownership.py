"""What the daemon believes is its own: files and directories that nobody else could have put there, or changed."""

import os
import stat
from pathlib import Path

from weightsync.orchestrator.settings.problems import ConfigError, Problem


def require_ours(path: Path) -> None:
    """Look at ``path`` and at the directory that it is in.

    Raises:
        ConfigError: one of them is a link, belongs to another user than us or root, or can be written by others.
        OSError: there is none.
    """
    for place in (path, path.parent):
        problem = complaint(os.lstat(place) if place is path else os.stat(place), os.geteuid())
        if problem is not None:
            what, fix = problem
            raise ConfigError(place, Problem("", "", what, fix.format(place)))


def complaint(found: os.stat_result, user: int) -> tuple[str, str] | None:
    """What is wrong with a file or directory that ``user`` is to believe, and the fix with a place for its path."""
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link, which whoever made it can turn elsewhere", "put the file itself at {}"
    if found.st_uid not in (user, 0):
        return f"belongs to user {found.st_uid}, not to us (user {user})", f"chown {user} {{}}"
    # Where the sticky bit is set (/tmp), others may add files and not replace ours.
    if mode & 0o022 and not (stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX):
        return f"has mode {mode:04o}, so others can write it", "chmod go-w {}"
    return None
