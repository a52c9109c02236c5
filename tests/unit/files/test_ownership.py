"""What may be believed to be ours: by owner, mode and kind."""

import os
import stat
from pathlib import Path

import pytest
from weightsync.orchestrator.files.ownership import (
    MAX_LINKS,
    NotOurs,
    complaint,
    followed,
    is_exposed,
    require_ours,
    secret,
)


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
    with pytest.raises(NotOurs, match=rf"{file}: has mode 0666, so others can write it. Fix: chmod go-w {file}"):
        require_ours(file)
    file.chmod(0o600)
    file.parent.chmod(0o770)
    with pytest.raises(NotOurs, match=rf"{file.parent}: has mode 0770"):
        require_ours(file)
    file.parent.chmod(0o700)
    (file.parent / "link").symlink_to(file)
    with pytest.raises(NotOurs, match="link: is a symbolic link"):
        require_ours(file.parent / "link")
    with pytest.raises(FileNotFoundError):
        require_ours(tmp_path / "absent")


def mounted(parent: Path, token: str = "0123456789abcdef") -> Path:
    """A directory as Kubernetes mounts a secret: links to a directory that is exchanged as a whole."""
    mount = parent / "credentials"
    data = mount / "..2026_11_26_17_00_00.1"
    data.mkdir(parents=True)
    file = data / "engine.token"
    file.write_text(token)
    file.chmod(0o440)
    (mount / "..data").symlink_to(data.name)
    (mount / "engine.token").symlink_to(Path("..data", "engine.token"))
    mount.chmod(0o3777)
    return mount


def test_a_mounted_secret_is_followed(tmp_path: Path) -> None:
    mount = mounted(tmp_path)
    assert followed(mount / "engine.token") == mount / "..2026_11_26_17_00_00.1" / "engine.token"
    plain = tmp_path / "plain"
    plain.touch(mode=0o600)
    assert followed(plain) == plain
    assert followed(mount / ".." / "plain") == plain
    far = tmp_path / "far"
    far.symlink_to(mount / "engine.token")
    assert followed(far).name == "engine.token"


def test_every_place_on_the_way_is_looked_at(tmp_path: Path) -> None:
    mount = mounted(tmp_path)
    data = mount / "..2026_11_26_17_00_00.1"
    for place, mode, good in ((data, 0o777, 0o755), (data / "engine.token", 0o460, 0o440), (mount, 0o777, 0o755)):
        place.chmod(mode)
        with pytest.raises(NotOurs, match=rf"{place}: has mode {mode:04o}, so others can write it"):
            followed(mount / "engine.token")
        place.chmod(good)
    assert followed(mount / "engine.token")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("whose", ["engine.token", "..data", "..2026_11_26_17_00_00.1", "..data/engine.token"])
def test_nothing_of_another_user_is_on_the_way(tmp_path: Path, whose: str) -> None:
    mount = mounted(tmp_path)
    os.chown(mount / whose, 4711, 4711, follow_symlinks=False)
    with pytest.raises(NotOurs, match="belongs to user 4711, not to us"):
        followed(mount / "engine.token")


def test_links_without_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(NotOurs, match=f"more than {MAX_LINKS} links"):
        followed(tmp_path / "a")
    (tmp_path / "c").symlink_to("nothing")
    with pytest.raises(FileNotFoundError):
        followed(tmp_path / "c")
    (tmp_path / "file").touch()
    (tmp_path / "d").symlink_to("file/x")
    with pytest.raises(NotADirectoryError):
        followed(tmp_path / "d")


def test_a_link_is_judged_by_who_made_it() -> None:
    link = stat.S_IFLNK | 0o777
    assert complaint(found(link, 500), 500, link=True) is None
    assert complaint(found(link, 0), 500, link=True) is None
    complained = complaint(found(link, 501), 500, link=True)
    assert complained is not None
    assert complained[0] == "belongs to user 501, not to us (user 500)"


@pytest.mark.parametrize(
    ("mode", "owner", "group", "exposed"),
    [
        (0o100600, 500, 500, False),
        (0o100400, 0, 0, False),
        (0o100440, 0, 500, False),  # as a mounted secret is
        (0o100640, 0, 500, False),
        (0o100440, 0, 0, False),  # root's group: systemd's credentials, whose ACL shows as these bits
        (0o100460, 0, 0, True),
        (0o100440, 0, 501, True),  # of a group that is not ours, so it is somebody else's
        (0o100440, 500, 500, True),
        (0o100460, 0, 500, True),
        (0o100444, 0, 500, True),
        (0o100604, 500, 500, True),
    ],
)
def test_who_else_may_read_it(mode: int, owner: int, group: int, exposed: bool) -> None:
    assert is_exposed(mode, owner, group, {500, 27}) is exposed


def test_a_secret_that_others_can_read(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    assert secret(file) == file
    file.chmod(0o604)
    with pytest.raises(NotOurs, match=rf"^{file}: has mode 0604, so others can read it. Fix: chmod 600 {file}$"):
        secret(file)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(NotOurs, match=rf"^{file}: has mode 0604"):
        secret(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_mounted_secret_that_all_can_read_is_told_by_whom_it_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet's file is root's, whoever reads it, and the kubelet's mode is 0644 where nobody has set another."""
    file = mounted(tmp_path) / "..data" / "engine.token"
    file.chmod(0o644)
    monkeypatch.setattr(os, "geteuid", lambda: 7411)
    with pytest.raises(NotOurs, match=r"has mode 0644, so others can read it. Fix: .*defaultMode: 0440, and fsGroup"):
        secret(tmp_path / "credentials" / "engine.token")
    file.chmod(0o440)
    assert secret(tmp_path / "credentials" / "engine.token").read_text() == "0123456789abcdef"


def test_what_is_no_plain_file_is_no_secret(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", mode=0o600)
    with pytest.raises(NotOurs, match="is no plain file"):
        secret(tmp_path / "pipe")
    (tmp_path / "directory").mkdir(mode=0o700)
    with pytest.raises(NotOurs, match="is no plain file"):
        secret(tmp_path / "directory")
