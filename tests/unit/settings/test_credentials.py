"""The directory of token files: what it may hold, and what is said of what it may not."""

import os
from pathlib import Path

import pytest
from credentials import TOKENS, write_credentials
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.settings.credentials import (
    ROLES,
    Credential,
    make_tokens,
    read_credentials,
    role_file,
    tokens_of_engines,
)
from weightsync.orchestrator.settings.problems import ConfigError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_credentials(tmp_path / "credentials")


def test_made_tokens_are_read_back_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "credentials"
    assert make_tokens(directory) == [role_file(directory, role) for role in ROLES]
    first = read_credentials(directory)
    assert sorted(map(str, first.values())) == ["engine", "operator", "trainer", "viewer"]
    assert all(len(token) == 64 for token in first)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in directory.iterdir())
    assert make_tokens(directory, ("engine", "engine.engine-0.1")) == [directory / "engine.engine-0.1.token"]
    second = read_credentials(directory)
    assert first.items() < second.items()
    assert Credential("engine", "engine-0.1") in second.values()
    with pytest.raises(ConfigError, match=r"'admin.token' is no role's name"):
        make_tokens(directory, ("admin",))


def test_what_is_no_token_file_is_left_alone(directory: Path) -> None:
    (directory / "ca.pem").write_text("a certificate")
    assert len(read_credentials(directory)) == 4


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("admin.token", "admin-0123456789", "'admin.token' is no role's name. Fix: name it one of trainer.token"),
        ("engine.a b.token", "admin-0123456789", "is no role's name"),
        ("enginea.token", "admin-0123456789", "is no role's name"),
        ("viewer.token", "short", "holds a token of 5 characters, which can be guessed"),
        ("viewer.token", "", "is empty"),
        ("viewer.token", "a-0123456789abcdef\nb-0123456789abcdef\nc-0123456789abcdef", "holds 3 lines"),
        ("viewer.ann.token", TOKENS["operator"], "holds the token of another file, that of operator"),
    ],
)
def test_a_file_that_cannot_serve_is_named(directory: Path, name: str, text: str, says: str) -> None:
    (directory / name).touch(mode=0o600)
    (directory / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        read_credentials(directory)
    assert says in str(error.value)
    assert str(directory / name) in str(error.value)
    assert not text or text not in str(error.value)


def test_a_file_that_others_could_have_made_is_refused(directory: Path, tmp_path: Path) -> None:
    viewer = directory / "viewer.token"
    viewer.chmod(0o660)
    with pytest.raises(ConfigError, match=r"viewer.token: has mode 0660, so others can write it. Fix: chmod go-w"):
        read_credentials(directory)
    viewer.unlink()
    (tmp_path / "elsewhere").touch(mode=0o600)
    (tmp_path / "elsewhere").write_text("elsewhere-0123456789")
    viewer.symlink_to(tmp_path / "elsewhere")
    assert read_credentials(directory)["elsewhere-0123456789"] == Credential("viewer")
    (tmp_path / "elsewhere").chmod(0o666)
    with pytest.raises(ConfigError, match=r"elsewhere: has mode 0666"):
        read_credentials(directory)
    (tmp_path / "elsewhere").chmod(0o604)
    with pytest.raises(ConfigError, match=r"elsewhere: has mode 0604, so others can read it. Fix: chmod 600"):
        read_credentials(directory)
    viewer.unlink()
    os.mkfifo(viewer, 0o600)
    with pytest.raises(ConfigError, match="is no plain file"):
        read_credentials(directory)
    viewer.unlink()
    directory.chmod(0o777)
    with pytest.raises(ConfigError, match=r"credentials: has mode 0777"):
        read_credentials(directory)


def test_a_directory_by_which_no_agent_could_come_in(directory: Path, tmp_path: Path) -> None:
    (directory / "engine.token").unlink()
    with pytest.raises(ConfigError, match=r"has no engine.token, so no agent could come in. Fix: "):
        read_credentials(directory)
    make_tokens(directory, ("engine.a",))
    assert Credential("engine", "a") in read_credentials(directory).values()
    with pytest.raises(ConfigError, match="cannot be read as a directory of token files: No such file"):
        read_credentials(tmp_path / "absent")


@pytest.mark.parametrize(
    ("credential", "member", "admits"),
    [
        (Credential("trainer"), Member("trainer", "", 7), True),
        (Credential("trainer", "7"), Member("trainer", "", 7), True),
        (Credential("trainer", "8"), Member("trainer", "", 7), False),
        (Credential("engine"), Member("inference", "a", 1), True),
        (Credential("engine", "a"), Member("inference", "a", 1), True),
        (Credential("engine", "b"), Member("inference", "a", 1), False),
        (Credential("trainer"), Member("inference", "a", 1), False),
        (Credential("engine"), Member("trainer", "", 1), False),
        (Credential("operator"), Member("trainer", "", 1), False),
        (Credential("viewer"), Member("inference", "a", 1), False),
    ],
)
def test_whom_a_credential_admits(credential: Credential, member: Member, admits: bool) -> None:
    assert (credential.refuses(member) == "") is admits


@pytest.mark.parametrize(
    ("credential", "refusal"),
    [
        (Credential("engine"), ""),
        (Credential("engine", "a"), ""),
        (Credential("engine", "b"), "engine 'a' came with the credential of engine b, which is bound to it; give it"),
        (
            Credential("trainer"),
            "engine 'a' came with the credential of role trainer; give it the token in engine.token",
        ),
        (Credential("operator", "a"), "engine 'a' came with the credential of role operator; give it"),
    ],
)
def test_which_engines_a_credential_makes_members(credential: Credential, refusal: str) -> None:
    found = credential.refuses_engine("a")
    assert (found.startswith(refusal), bool(found)) == (True, bool(refusal)), found


def test_a_mounted_secret_that_is_exchanged(tmp_path: Path) -> None:
    """As Kubernetes does it: a new directory, then ``..data`` is turned to it in one step."""
    mount = tmp_path / "mounted"
    mount.mkdir()
    for version, token in (("..1", "first-0123456789"), ("..2", "second-0123456789")):
        (mount / version).mkdir()
        for role in ("trainer", "engine"):
            (mount / version / f"{role}.token").write_text(f"{role}-{token}\n")
            (mount / version / f"{role}.token").chmod(0o440)
        (mount / "..data_tmp").symlink_to(version)
        (mount / "..data_tmp").rename(mount / "..data")
        for role in ("trainer", "engine"):
            if not (mount / f"{role}.token").is_symlink():
                (mount / f"{role}.token").symlink_to(f"..data/{role}.token")
        mount.chmod(0o3777)
        assert set(read_credentials(mount)) == {f"trainer-{token}", f"engine-{token}"}


def test_tokens_that_an_engine_may_hold(directory: Path) -> None:
    (directory / "engine.a0.token").touch(mode=0o600)
    (directory / "engine.a0.token").write_text("of-a0-0123456789\nof-a0-9876543210\n")
    (directory / "trainer.7.token").touch(mode=0o600)
    (directory / "trainer.7.token").write_text("trainer-7-0123456789")
    known = tokens_of_engines(read_credentials(directory))
    assert known["a0"] == ("of-a0-0123456789", "of-a0-9876543210")
    assert set(known) == {"", "a0"}
