"""Which file system a path is on."""

from pathlib import Path

import pytest
from weightsync.orchestrator.daemon.run_directory.mounts import file_system_of, forgets, is_network

MOUNTS = """\
sysfs /sys sysfs rw 0 0
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
scratch /home/scratch lustre rw 0 0
/dev/sdb1 /mnt/my\\040disk xfs rw 0 0
over /home/scratch tmpfs rw 0 0
sshfs /mnt/far fuse.sshfs rw 0 0
odd
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/var/lib/x", "ext4", False),
        ("/home/me", "nfs4", True),
        ("/homeless", "ext4", False),
        ("/home/scratch/run", "tmpfs", False),
        ("/mnt/my disk/run", "xfs", False),
        ("/mnt/far/run", "fuse.sshfs", True),
    ],
)
def test_file_systems(path: str, kind: str, network: bool) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind
    assert is_network(kind) is network
    assert forgets(kind) is (kind == "tmpfs")
    assert file_system_of(Path(path), "") == "unknown"


def test_this_machine_has_a_table(tmp_path: Path) -> None:
    assert file_system_of(tmp_path / "does" / "not" / "exist") == file_system_of(tmp_path) != "unknown"


@pytest.mark.parametrize("kind", ["nfs", "lustre", "ceph", "beegfs", "gpfs", "wekafs", "fuse.s3fs", "fuse.gcsfuse"])
def test_a_network_file_system_promises_no_fsync(kind: str) -> None:
    assert is_network(kind)
    assert not forgets(kind)


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs", "overlay"])
def test_what_ends_with_the_machine_or_the_container(kind: str) -> None:
    assert forgets(kind)
    assert not is_network(kind)
