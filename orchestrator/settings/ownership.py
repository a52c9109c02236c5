"""What the daemon believes is its own: files and directories that nobody else could have put there, or changed."""

import os
import stat
from pathlib import Path
from typing import Final

from weightsync.orchestrator.protocol.token import is_exposed
from weightsync.orchestrator.settings.problems import ConfigError, Problem

MAX_LINKS: Final = 8
"""On the way to one file; a mounted secret of Kubernetes has two."""


def require_ours(path: Path) -> None:
    """Look at ``path`` and at the directory that it is in.

    Raises:
        ConfigError: one of them is a link, belongs to another user than us or root, or can be written by others.
        OSError: there is none.
    """
    _require(path, os.lstat(path))
    _require(path.parent, os.stat(path.parent))


def followed(path: Path) -> Path:
    """The file that ``path`` is, or leads to by links that only we or root could have made: secrets that Kubernetes
    mounts are links into a directory that it exchanges as a whole.

    Each place on the way is looked at as in ``require_ours``: the directories, the links, the file itself.

    Raises:
        ConfigError: one of them cannot be believed, or there are more than MAX_LINKS.
        OSError: there is none.
    """
    _require(path.parent, os.stat(path.parent))
    here, ahead, links = Path(os.path.realpath(path.parent)), [path.name], 0
    while ahead:
        place = here / ahead.pop(0)
        found = os.lstat(place)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > MAX_LINKS:
                raise ConfigError(path, Problem("", "", f"leads through more than {MAX_LINKS} links", "name the file"))
            _require(place, found, link=True)
            target = Path(os.readlink(place))
            here, ahead = (Path("/") if target.is_absolute() else here), [*_parts(target), *ahead]
        else:
            _require(place, found)
            here = Path(os.path.realpath(place)) if ahead else place
    return here


def _parts(target: Path) -> list[str]:
    return [part for part in target.parts if part != "/"]


def others_read(found: os.stat_result) -> bool:
    """Whether others than we and root may read it."""
    return is_exposed(found.st_mode, found.st_uid, found.st_gid, {os.getegid(), *os.getgroups()})


def _require(place: Path, found: os.stat_result, link: bool = False) -> None:
    problem = complaint(found, os.geteuid(), link)
    if problem is not None:
        what, fix = problem
        raise ConfigError(place, Problem("", "", what, fix.format(place)))


def complaint(found: os.stat_result, user: int, link: bool = False) -> tuple[str, str] | None:
    """What is wrong with a file or directory that ``user`` is to believe, and the fix with a place for its path.

    ``link``: a link is believed, too, if whoever made it is.
    """
    mode, is_link = stat.S_IMODE(found.st_mode), stat.S_ISLNK(found.st_mode)
    if is_link and not link:
        return "is a symbolic link, which whoever made it can turn elsewhere", "put the file itself at {}"
    if found.st_uid not in (user, 0):
        return f"belongs to user {found.st_uid}, not to us (user {user})", f"chown {user} {{}}"
    # Where the sticky bit is set (/tmp), others may add files and not replace ours. A link's own mode says nothing.
    if mode & 0o022 and not is_link and not (stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX):
        return f"has mode {mode:04o}, so others can write it", "chmod go-w {}"
    return None
