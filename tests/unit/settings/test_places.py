"""What can be asked for is taken as it is; what cannot is refused in words, before anybody tries."""

import os
from pathlib import Path

import pytest
from weightsync.orchestrator.settings.places import usable_host, usable_path, usable_url


@pytest.mark.parametrize("name", ["localhost", "10.0.0.1", "::1", "0.0.0.0", "*", "größe.example", "a-b_c.d"])
def test_hosts(name: str) -> None:
    assert usable_host(name) == name


@pytest.mark.parametrize("name", ["a..b", "x" * 64 + ".example", "\ud800"])
def test_no_hosts(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a host"):
        usable_host(name)


@pytest.mark.parametrize("text", ["http://h", "https://h:1/x/", "http://[::1]:8000", "http://größe.example"])
def test_urls(text: str) -> None:
    assert usable_url(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "h:1", "ht!tp", "ftp://h", "http://", "http:///x", "http://h:0", "http://h:65536", "http://h:x", "http://[::1",
     "http://a..b", "http://a b", "http://u:p@h", "http://h?x", "http://h/#x", "http://h\n", "http://\ud800"],
)  # fmt: skip
def test_no_urls(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        usable_url(text)
    assert str(caught.value).encode()


def test_paths() -> None:
    assert usable_path(Path("a/größe")) == Path("a/größe")
    assert usable_path(Path("~/x")) == Path.home() / "x"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a\0b", r"'a\\x00b' is longer than a path can be, or has characters"),
        ("a\nb", "characters that none should have"),
        (os.fsdecode(b"\xff"), r"'\\xff'"),
        ("\ud800", r"'\\ud800'"),
        ("ä" * 2048, "longer than a path can be"),
        ("~nobody-of-that-name/x", "names the home of a user who has none"),
    ],
)
def test_no_paths(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        usable_path(Path(text))
