"""Hosts on one machine: network namespaces behind one switch, whose links are cut one way or both, and slowed.

A cut is silent, as a switch that forgets a port: the sender's kernel sends to an address that nobody has, and no end
learns of it. Needs root, ``ip`` of iproute2, and for a slow link the kernel's token bucket filter.
"""

import contextlib
import ctypes
import os
import random
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

HERE = "here"
"""The host of the test itself: its thread, and what that starts, are in it until the network is closed. The machine's
own namespace gets no device, because NIXL in other processes would take it for a way, and lose it again."""
CLONE_NEWNET = 0x40000000
"""Of Linux's <sched.h>."""
TOOLS_SECONDS = 10.0
NOWHERE = "02:57:53:00:00:ff"
"""A link address that no host has."""


class Unavailable(Exception):
    """Namespaces cannot be made here; the message says why."""


@dataclass(frozen=True)
class Host:
    """One end of a link. ``device`` is its end of it, ``port`` the switch's."""

    name: str
    namespace: str
    device: str
    port: str
    address: str
    link: str

    @property
    def inside(self) -> list[str]:
        """The words before a command that runs there."""
        return ["ip", "netns", "exec", self.namespace]

    @property
    def environment(self) -> dict[str, str]:
        """So that NIXL's bytes take the link, and not shared memory, which namespaces of one machine have too."""
        return {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": self.device}


class Network:
    """``hosts`` by name, HERE among them. Addresses are of 198.18.0.0/15, which is for tests of networks (RFC 2544).

    Raises:
        Unavailable: no rights, no tools, or no such devices in the kernel.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._mark = f"ws{os.getpid()}"
        self._switch = f"{self._mark}-switch"
        subnet = f"198.{random.choice((18, 19))}.{random.randrange(256)}"
        self.hosts = {
            name: Host(
                name, f"{self._mark}-{name}", "link0", f"port{number}", f"{subnet}.{number}",
                f"02:57:53:00:00:{number:02x}",
            )
            for number, name in enumerate([HERE, *names], start=1)
        }  # fmt: skip
        self._before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._make()
            here = os.open(f"/run/netns/{self.hosts[HERE].namespace}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _enter(here)
            finally:
                os.close(here)
        except BaseException:
            self.close()
            raise

    def cut(self, sender: str, receiver: str) -> None:
        """Nothing that ``sender`` sends arrives at ``receiver`` any more."""
        self._route(self.hosts[sender], self.hosts[receiver], NOWHERE)

    def cut_off(self, name: str, *, mute: bool = True, deaf: bool = True) -> None:
        """Nobody hears ``name`` any more (``mute``), and it hears nobody (``deaf``)."""
        for other in self.hosts:
            if other != name and mute:
                self.cut(name, other)
            if other != name and deaf:
                self.cut(other, name)

    def slow(self, name: str, kilobits: int) -> None:
        """All that ``name`` sends and is sent passes at that many kilobits a second.

        Raises:
            Unavailable: no ``tc``, or a kernel without the filter.
        """
        host = self.hosts[name]
        for namespace, device in ((host.namespace, host.device), (self._switch, host.port)):
            shape = ["root", "tbf", "rate", f"{kilobits}kbit", "burst", "10kb", "latency", "400ms"]
            _tool("tc", *_in(namespace), "qdisc", "replace", "dev", device, *shape)

    def mend(self) -> None:
        """No link is cut or slow any more."""
        for sender in self.hosts.values():
            for receiver in self.hosts.values():
                if sender is not receiver:
                    self._route(sender, receiver, receiver.link)
            for namespace, device in ((sender.namespace, sender.device), (self._switch, sender.port)):
                with contextlib.suppress(Unavailable):  # it had none
                    _tool("tc", *_in(namespace), "qdisc", "del", "dev", device, "root")

    def close(self) -> None:
        """A namespace that goes takes its devices along, and their other ends."""
        _enter(self._before)
        os.close(self._before)
        for namespace in [self._switch, *(host.namespace for host in self.hosts.values())]:
            with contextlib.suppress(Unavailable):  # it was not made
                _tool("ip", "netns", "del", namespace)

    def _make(self) -> None:
        _tool("ip", "netns", "add", self._switch)
        _tool("ip", *_in(self._switch), "link", "add", "switch", "up", "type", "bridge")
        for host in self.hosts.values():
            inside = _in(host.namespace)
            _tool("ip", "netns", "add", host.namespace)
            _tool("ip", *inside, "link", "set", "lo", "up")
            peer = ["type", "veth", "peer", "name", host.port, "netns", self._switch]
            _tool("ip", *inside, "link", "add", host.device, "address", host.link, *peer)
            _tool("ip", *_in(self._switch), "link", "set", host.port, "master", "switch", "up")
            _tool("ip", *inside, "address", "add", f"{host.address}/24", "dev", host.device)
            _tool("ip", *inside, "link", "set", host.device, "up")
            _tool(*host.inside, "true")  # it mounts /sys anew, for which there may be no rights
        self.mend()

    def _route(self, sender: Host, receiver: Host, link: str) -> None:
        words = ["neighbour", "replace", receiver.address, "lladdr", link, "dev", sender.device, "nud", "permanent"]
        _tool("ip", *_in(sender.namespace), *words)


def _enter(namespace: int) -> None:
    """Move the calling thread into the network namespace of that open file; what it starts from then on follows.

    Raises:
        Unavailable: no rights.
    """
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        raise Unavailable(f"setns: {os.strerror(ctypes.get_errno())}")


def _in(namespace: str) -> list[str]:
    return ["-n", namespace]


def _tool(name: str, *arguments: str) -> None:
    path = shutil.which(name)
    if path is None:
        raise Unavailable(f"no {name} (iproute2) here")
    done = subprocess.run([path, *arguments], capture_output=True, check=False, timeout=TOOLS_SECONDS, text=True)
    if done.returncode != 0:
        raise Unavailable(f"{name} {' '.join(arguments)}: {done.stderr.strip()}")
