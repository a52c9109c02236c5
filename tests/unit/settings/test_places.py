"""What can be asked for is taken as it is; what cannot is refused in words, before anybody tries."""

import os
import re
from pathlib import Path

import pytest
from weightsync.orchestrator.settings.places import (
    usable_host,
    usable_host_pattern,
    usable_network,
    usable_path,
    usable_url,
)


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


@pytest.mark.parametrize("text", ["10.1.0.0/16", "10.1.0.7", "2001:db8::/64", "::1"])
def test_networks(text: str) -> None:
    assert usable_network(text) == usable_host_pattern(text) == text


@pytest.mark.parametrize("text", ["node*", "*.gpu.example", "node-??", "*", "a.b.c", "gpu_1", "fade"])
def test_patterns_of_hosts(text: str) -> None:
    assert usable_host_pattern(text) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.1.0.0/33", "'10.1.0.0/33' is no network such as 10.1.0.0/16"),
        ("10.1.0.1/16", "has host bits set"),
        ("10.1.*", "nor is it a name of a host"),
        ("gpu.*", "nor is it a name of a host"),
        ("*.1", "nor is it a name of a host"),
        ("http://h", "nor is it a name of a host"),
        ("a b", "nor is it a name of a host"),
        ("h:8000", "nor is it a name of a host"),
        ("größe*", "nor is it a name of a host"),
    ],
)
def test_no_patterns_of_hosts(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        usable_host_pattern(text)
