"""What may be believed to be ours: by owner, mode and kind."""

import os
import stat
from pathlib import Path

import pytest
from weightsync.orchestrator.settings.ownership import complaint, require_ours
from weightsync.orchestrator.settings.problems import ConfigError


def found(mode: int, owner: int) -> os.stat_result:
    return os.stat_result((mode, 1, 1, 1, owner, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "owner", "says"),
    [
        (stat.S_IFREG | 0o600, 500, None),
        (stat.S_IFREG | 0o640, 0, None),
        (stat.S_IFREG | 0o600, 501, "belongs to user 501, not to us (user 500)"),
        (stat.S_IFREG | 0o620, 500, "has mode 0620, so others can write it"),
        (stat.S_IFREG | 0o602, 0, "has mode 0602, so others can write it"),
        (stat.S_IFREG | 0o1602, 0, "has mode 1602, so others can write it"),
        (stat.S_IFDIR | 0o755, 0, None),
        (stat.S_IFDIR | 0o1777, 0, None),
        (stat.S_IFDIR | 0o777, 0, "has mode 0777, so others can write it"),
        (stat.S_IFLNK | 0o777, 500, "is a symbolic link, which whoever made it can turn elsewhere"),
    ],
)
def test_whose_it_is(mode: int, owner: int, says: str | None) -> None:
    complained = complaint(found(mode, owner), 500)
    assert (complained[0] if complained else None) == says


def test_the_file_and_its_directory_are_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "d" / "file"
    file.parent.mkdir(mode=0o700)
    file.touch(mode=0o600)
    require_ours(file)
    file.chmod(0o666)
    with pytest.raises(ConfigError, match=rf"{file}: has mode 0666, so others can write it. Fix: chmod go-w {file}"):
        require_ours(file)
    file.chmod(0o600)
    file.parent.chmod(0o770)
    with pytest.raises(ConfigError, match=rf"{file.parent}: has mode 0770"):
        require_ours(file)
    file.parent.chmod(0o700)
    (file.parent / "link").symlink_to(file)
    with pytest.raises(ConfigError, match="link: is a symbolic link"):
        require_ours(file.parent / "link")
    with pytest.raises(FileNotFoundError):
        require_ours(tmp_path / "absent")
