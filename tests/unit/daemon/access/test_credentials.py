"""The credentials that count now: found by token and by key, read again when their files change."""

import asyncio
from pathlib import Path

import pytest
import structlog
from credentials import TOKENS, write_credentials
from weightsync.orchestrator.daemon.access.credentials import Credentials
from weightsync.orchestrator.protocol.proof import key_of
from weightsync.orchestrator.settings.credentials import Credential
from weightsync.orchestrator.settings.problems import ConfigError

SECONDS = 20.0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_credentials(tmp_path / "credentials")


def test_by_token_and_by_key(directory: Path) -> None:
    credentials = Credentials(directory, lambda _: None)
    assert credentials.of_bearer(TOKENS["viewer"]) == Credential("viewer")
    assert credentials.of_bearer("nobody's-0123456789") is None
    assert credentials.of_bearer("no \udca5 text") is None
    assert credentials.of_key(key_of(TOKENS["engine"])) == (TOKENS["engine"], Credential("engine"))
    assert credentials.of_key("") is None
    assert credentials.holds(TOKENS["trainer"])
    assert credentials.of_engine("a0") == (TOKENS["engine"],)


async def test_a_change_of_the_files_is_seen_by_itself_and_what_cannot_serve_changes_nothing(directory: Path) -> None:
    credentials = Credentials(directory, lambda _: None)
    seen: asyncio.Queue[None] = asyncio.Queue()
    credentials.changed = lambda: seen.put_nowait(None)
    watching = asyncio.create_task(credentials.watch(0.01))
    viewer = directory / "viewer.token"
    async with asyncio.timeout(SECONDS):
        with structlog.testing.capture_logs() as logs:
            viewer.write_text("short")
            while not logs:  # noqa: ASYNC110  # the log has no event to wait for
                await asyncio.sleep(0)
            assert "short" not in repr(logs).replace("which can be guessed", "")
            assert "viewer.token: holds a token of 5 characters" in logs[0]["reason"]
        assert credentials.of_bearer(TOKENS["viewer"]) == Credential("viewer")
        assert seen.empty()
        viewer.write_text("next-0123456789abcd\n" + TOKENS["viewer"])
        await seen.get()
        assert credentials.of_bearer("next-0123456789abcd") == Credential("viewer")
        viewer.unlink()
        await seen.get()
        assert credentials.of_bearer("next-0123456789abcd") is None
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


async def test_nothing_changes_without_a_change(directory: Path) -> None:
    credentials = Credentials(directory, lambda _: None)
    credentials.changed = lambda: pytest.fail("nothing has changed")
    await credentials.again()
    (directory / "trainer.token").unlink()
    with pytest.raises(ConfigError, match=r"has no trainer.token"):
        await credentials.again()
    assert credentials.holds(TOKENS["trainer"])


def test_an_engines_own_tokens_come_before_those_of_all(directory: Path) -> None:
    (directory / "engine.a0.token").write_text("a0-0123456789abcdef\na0-9876543210abcdef")
    (directory / "engine.a0.token").chmod(0o600)
    credentials = Credentials(directory, lambda _: None)
    assert credentials.of_engine("a0") == ("a0-0123456789abcdef", "a0-9876543210abcdef", TOKENS["engine"])
    assert credentials.of_engine("a1") == (TOKENS["engine"],)
