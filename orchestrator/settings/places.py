"""Hosts, networks, URLs and paths that can be used at all, told before anybody tries, for settings and for options."""

import ipaddress
import re
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from weightsync.orchestrator.protocol.application import is_host_name
from weightsync.orchestrator.protocol.limits import MAX_PATH_BYTES
from weightsync.orchestrator.protocol.text import clean

URL_PATTERN: Final = r"https?://[^/?#\s@]+(/[^?#\s]*)?"

_HOST_PATTERN: Final = re.compile(r"[A-Za-z0-9._*?-]+")


def usable_host(name: str) -> str:
    """``name``, if it can be asked for.

    Raises:
        ValueError: it cannot, whoever is asked.
    """
    try:
        name.encode("idna")
    except UnicodeError as error:
        raise ValueError(f"{clean(name, 100)!r} is no name of a host: {error}") from error
    return name


def usable_network(text: str) -> str:
    """``text``, if it is an address or a network in CIDR notation.

    Raises:
        ValueError: it is none.
    """
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{clean(text, 100)!r} is no network such as 10.1.0.0/16: {error}") from error
    return text


def usable_host_pattern(text: str) -> str:
    """``text``, if it is a network, or a pattern of names of hosts: ``*`` and ``?`` stand for any characters.

    Raises:
        ValueError: it is neither. Addresses are written as a network, so the end of a name's pattern has a letter.
    """
    end = text.rpartition(".")[2]
    if text == "*" or (_HOST_PATTERN.fullmatch(text) and is_host_name(text) and re.search("[A-Za-z]", end)):
        return text
    try:
        return usable_network(text)
    except ValueError as error:
        raise ValueError(f"{error}; nor is it a name of a host such as *.gpu.example") from error


def is_loopback(host: str) -> bool:
    """Whether nobody on another machine reaches what listens at ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def usable_url(text: str) -> str:
    """``text``, an HTTP URL, if its host and port can be asked for.

    Raises:
        ValueError: they cannot.
    """
    parts = urlsplit(text)
    if re.fullmatch(URL_PATTERN, text) is None or not parts.hostname or parts.port == 0:
        raise ValueError(f"{clean(text, 200)!r} is no URL such as http://host:8000")
    usable_host(parts.hostname)
    return text


def usable_path(path: Path) -> Path:
    """``path``, with the home directory in the place of ``~``, if there can be such a file.

    Raises:
        ValueError: there cannot.
    """
    try:
        whole = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{clean(str(path), 200)} names the home of a user who has none") from error
    text = str(whole)
    if clean(text, MAX_PATH_BYTES) != text or len(text.encode()) >= MAX_PATH_BYTES:
        raise ValueError(f"'{clean(text, 200)}' is longer than a path can be, or has characters that none should have")
    return whole
