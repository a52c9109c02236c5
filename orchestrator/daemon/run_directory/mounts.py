"""Which file system a path is on, from the kernel's mount table."""

import re
from pathlib import Path
from typing import Final

_NETWORK: Final = frozenset({
    "nfs", "nfs4", "lustre", "ceph", "glusterfs", "cifs", "smb3", "smbfs", "beegfs", "gpfs", "afs", "9p", "wekafs",
    "pvfs2", "orangefs", "ocfs2", "gfs2", "daos", "virtiofs", "fuse", "vboxsf",
})  # fmt: skip
_FORGETFUL: Final = frozenset({"tmpfs", "ramfs", "overlay"})
_OCTAL = re.compile(r"\\([0-7]{3})")


def file_system_of(path: Path, table: str | None = None) -> str:
    """Type of the file system that holds ``path`` or, where it does not exist, its nearest existing parent.

    ``table`` is the text of /proc/mounts; empty where there is none, and then the answer is "unknown".
    """
    if table is None:
        try:
            table = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            table = ""
    target = path.resolve()
    kind, depth = "unknown", -1
    for line in table.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[1]))
        # A later mount covers an earlier one at the same place.
        if target.is_relative_to(mount) and len(mount.parts) >= depth:
            kind, depth = fields[2], len(mount.parts)
    return kind


def is_network(kind: str) -> bool:
    """Whether an fsync on that type of file system may promise more than it keeps."""
    return kind in _NETWORK or kind.startswith("fuse.")


def forgets(kind: str) -> bool:
    """Whether that type of file system ends with the machine or the container."""
    return kind in _FORGETFUL
