"""What may be believed to be ours: files and directories that nobody else could have put there, or changed."""

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Final

MAX_LINKS: Final = 8
"""On the way to one file; a mounted secret of Kubernetes has two."""


class NotOurs(Exception):
    """A file or directory cannot be believed, or be secret. The operator's fault; the message has the fix.

    Attributes:
        place: the file, link or directory that is meant, which may lie on the way to the one that was asked for.
    """

    def __init__(self, place: Path, what: str, fix: str) -> None:
        self.place, self.what, self.fix = place, what, fix
        super().__init__(f"{place}: {what}. Fix: {fix}")


def require_ours(path: Path) -> None:
    """Look at ``path`` and at the directory that it is in.

    Raises:
        NotOurs: one of them is a link, belongs to another user than us or root, or can be written by others.
        OSError: there is none.
    """
    _require(path, os.lstat(path))
    _require(path.parent, os.stat(path.parent))


def followed(path: Path) -> Path:
    """The file that ``path`` is, or leads to by links that only we or root could have made: secrets that Kubernetes
    mounts are links into a directory that it exchanges as a whole.

    Each place on the way is looked at as in ``require_ours``: the directories, the links, the file itself.

    Raises:
        NotOurs: one of them cannot be believed, or there are more than MAX_LINKS.
        OSError: there is none.
        ValueError: a name that no file can have.
    """
    _require(path.parent, os.stat(path.parent))
    here, ahead, links = Path(os.path.realpath(path.parent)), [path.name], 0
    while ahead:
        place = here / ahead.pop(0)
        found = os.lstat(place)
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > MAX_LINKS:
                raise NotOurs(path, f"leads through more than {MAX_LINKS} links", "name the file")
            _require(place, found, link=True)
            target = Path(os.readlink(place))
            here, ahead = (Path("/") if target.is_absolute() else here), [*_parts(target), *ahead]
        else:
            _require(place, found)
            here = Path(os.path.realpath(place)) if ahead else place
    return here


def secret(path: Path) -> Path:
    """The file that ``path`` is or leads to (see ``followed``), which nobody but we and root can read.

    Raises:
        NotOurs: also where others can read it.
        OSError, ValueError: as ``followed``.
    """
    file = followed(path)
    require_secret(file, os.lstat(file))
    return file


def require_secret(file: Path, found: os.stat_result) -> None:
    """``found``: what ``file`` is.

    Raises:
        NotOurs: others can write it or read it, or it is no plain file.
    """
    _require(file, found)
    if not stat.S_ISREG(found.st_mode):
        raise NotOurs(file, "is no plain file", "write the secret into one of mode 0600")
    groups = {os.getegid(), *os.getgroups()}
    if is_exposed(found.st_mode, found.st_uid, found.st_gid, groups):
        fix = f"chmod 600 {file}"
        if found.st_uid != os.geteuid():
            group = f"chmod 440 {file}, and chgrp to a group of ours"
            fix = f"{group} (where Kubernetes mounts it: defaultMode: 0440, and fsGroup)"
        raise NotOurs(file, f"has mode {stat.S_IMODE(found.st_mode):04o}, so others can read it", fix)


def is_exposed(mode: int, owner: int, group: int, our_groups: Collection[int]) -> bool:
    """Whether others than we and root may read a file of this mode, user and group.

    One of root's may be read by one of our groups, as mounted secrets of Kubernetes are (``fsGroup``), and by root's:
    systemd's credentials are root's with mode 0440, of which the group's bits stand for an ACL that names our user.
    """
    by_group = mode & 0o070 and not (mode & 0o070 == 0o040 and owner == 0 and group in {0, *our_groups})
    return bool(mode & 0o007 or by_group)


def _parts(target: Path) -> list[str]:
    return [part for part in target.parts if part != "/"]


def _require(place: Path, found: os.stat_result, link: bool = False) -> None:
    problem = complaint(found, os.geteuid(), link)
    if problem is not None:
        what, fix = problem
        raise NotOurs(place, what, fix.format(place))


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
