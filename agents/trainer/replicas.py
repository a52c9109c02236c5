"""How the ranks of a trainer agree: over the store of their process group, and never in a collective.

A rank that waits in a collective for one that will not come (it failed, or was interrupted) cannot be told. One that
looks at the store can: whoever leaves a section early says so there, and all others leave within a second.
"""

import json
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Literal

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from weightsync.agents.trainer.errors import ReplicaFailed

log = logging.getLogger(__name__)

ALONE: Final = "alone"
"""In the place of a group: one rank that has an agent by itself, whatever job it is a part of."""

Group = dist.ProcessGroup | Literal["alone"] | None
"""Ranks that are a trainer together; None: all of the default group, or this process without torch.distributed."""

TEXT_CHARS: Final = 2000
"""Of one rank's reason; longer ones are cut. They end in one line of a log."""

FIRST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.0005, 0.05
"""Between two looks at the store while another rank is awaited: ever longer, since most come at once …"""

LATER: Final = 1.25
"""… by this factor, so that nobody waits longer than a quarter too long. Two would make that as long again."""

READ_SECONDS: Final = 2.0
"""That a rank which closes gives the others to read its last word."""


class TrainerRanks:
    """This rank among those of ``group`` (None: the default group; alone without torch.distributed, and with ALONE).

    Made on all ranks of the group, as often and in the same order.

    Attributes:
        rank, world: this rank within the group, and the group's size.

    Raises:
        ValueError: this rank is no member of the group.
    """

    def __init__(self, group: Group = None) -> None:
        alone = isinstance(group, str) or not (dist.is_available() and dist.is_initialized())
        members = None if isinstance(group, str) else group
        self.rank = 0 if alone else dist.get_rank(members)
        self.world = 1 if alone else dist.get_world_size(members)
        if self.rank < 0:
            raise ValueError(
                f"process_group: rank {dist.get_rank()} is no member; make the agent on the group's ranks only"
            )
        self._section, self._phase = -1, 0
        self._mine: list[tuple[int, str]] = []
        """Keys that this rank has set, by section; deleted when every rank is past them."""
        self._unread = ""
        """Counts the ranks that have read this one's last verdict; empty where it gave none."""
        self._store: c10d.Store | None = None
        if self.world > 1:
            name = (members or c10d._get_default_group()).group_name
            store = c10d.PrefixStore(f"weightsync/{name}", c10d._get_default_store())
            # All ranks make them alike, so that how many this rank has made names each.
            self._store = c10d.PrefixStore(str(store.add(f"made/{self.rank}", 1)), store)
            # Also when the process ends without ``close``: nobody is to wait for it.
            self._goodbye = weakref.finalize(self, _say_goodbye, self._store, self.rank, "its process or agent ended")

    @contextmanager
    def section(self) -> Iterator[None]:
        """What all ranks do together. A rank that leaves it by an error or an interrupt says so to the others.

        Raises:
            ReplicaFailed: another rank left; raised by ``agree`` and ``look``.
        """
        self._section += 1
        self._phase = 0
        try:
            yield
        except ReplicaFailed as error:
            self._leave(error.rank, error.reason)  # news to the others if it was found out by a deadline here
            raise
        except BaseException as error:
            self._leave(self.rank, f"{type(error).__name__}: {error}")
            raise

    def agree(
        self, value: str = "", *, seconds: float, then: Callable[[tuple[str, ...]], None] | None = None
    ) -> tuple[str, ...]:
        """Wait until all ranks are here; every rank's ``value``, cut to TEXT_CHARS, by rank.

        Args:
            value: what this rank has to say.
            seconds: total deadline.
            then: the first rank does this with all values when all are here; the others wait for it.

        Raises:
            ReplicaFailed: a rank has left the section, or has not come in time.
        """
        self._phase += 1
        if self._store is None:
            if then is not None:
                then((value,))
            return (value,)
        name = f"{self._section}/{self._phase}"
        keys = [f"{name}/{rank}" for rank in range(self.world)]
        self._set(keys[self.rank], value[:TEXT_CHARS])
        if self.rank == 0:
            self._await(keys, seconds)
            values = [text.decode() for text in self._store.multi_get(keys)]
            if then is not None:
                then(tuple(values))
            distinct = list(dict.fromkeys(values))
            self._set(f"{name}/verdict", json.dumps([distinct, [distinct.index(text) for text in values]]))
            self._unread = f"{name}/read"
            self._mine.append((self._section, self._unread))
        else:
            self._await([f"{name}/verdict"], seconds)
            distinct, which = json.loads(self._store.get(f"{name}/verdict"))
            values = [distinct[index] for index in which]
            self._store.add(f"{name}/read", 1)
        self._forget_earlier()
        return tuple(values)

    def share(self, data: bytes, root: int, *, seconds: float) -> bytes:
        """What rank ``root`` gives, on every rank; what the others give does not matter.

        Raises:
            ReplicaFailed: a rank has left the section, or ``root`` has not come in time.
        """
        if self._store is None:
            return data
        self._phase += 1
        key = f"{self._section}/{self._phase}/{root}"
        if self.rank == root:
            self._set(key, data)
            return data
        self._await([key], seconds)
        return bytes(self._store.get(key))

    def look(self) -> None:
        """For whoever waits for something else within a section.

        Raises:
            ReplicaFailed: a rank has left the section, or closed.
        """
        if self._store is None:
            return
        try:
            for key in (f"{self._section}/left", "closed"):
                if self._store.check([key]):
                    rank, reason = json.loads(self._store.get(key))
                    raise ReplicaFailed(rank, reason)
        except RuntimeError as error:
            raise self._unreachable(error) from error

    def close(self) -> None:
        """Nobody is to wait for this rank any more."""
        if self._store is None or not self._goodbye.alive:
            return
        ends = time.monotonic() + READ_SECONDS
        with suppress(RuntimeError):  # rank 0's process may keep the store: the others read its last word first
            while self._unread and self._store.add(self._unread, 0) < self.world - 1 and time.monotonic() < ends:
                time.sleep(LONGEST_LOOK_SECONDS)
        self._goodbye.detach()
        _say_goodbye(self._store, self.rank, "its agent was closed")

    # ------------------------------------------------------------------------------------------------------- the store
    def _await(self, keys: list[str], seconds: float) -> None:
        assert self._store is not None
        ends, pause = time.monotonic() + seconds, FIRST_LOOK_SECONDS
        while True:
            try:
                if self._store.check(keys):
                    return  # before ``look``: a rank that said its part may have gone on, and closed
                try:
                    self.look()
                except ReplicaFailed:
                    if self._store.check(keys):
                        return  # it did so between the two
                    raise
                if time.monotonic() >= ends:
                    late = [key.rpartition("/")[2] for key in keys if not self._store.check([key])]
                    late = ["0" if name == "verdict" else name for name in late]
                    raise ReplicaFailed(int(late[0]), f"not come within {seconds:g} s: rank {', '.join(late[:8])}")
            except RuntimeError as error:
                raise self._unreachable(error) from error
            time.sleep(pause)
            pause = min(LATER * pause, LONGEST_LOOK_SECONDS)

    def _set(self, key: str, value: str | bytes) -> None:
        assert self._store is not None
        try:
            self._store.set(key, value)  # type: ignore[arg-type]  # bytes serve as well
        except RuntimeError as error:
            raise self._unreachable(error) from error
        self._mine.append((self._section, key))

    def _leave(self, rank: int, reason: str) -> None:
        if self._store is None:
            return
        key, text = f"{self._section}/left", json.dumps([rank, reason[:TEXT_CHARS]])
        with suppress(RuntimeError):  # the store is gone, and with it whoever would read this
            if self._store.compare_set(key, "", text) == text.encode():
                self._mine.append((self._section, key))

    def _forget_earlier(self) -> None:
        """An agreement of this section was reached: no rank will read a key of an earlier one."""
        assert self._store is not None
        earlier = [key for section, key in self._mine if section < self._section]
        self._mine = [each for each in self._mine if each[0] >= self._section]
        with suppress(RuntimeError):  # a store that cannot delete keeps them, which harms nobody
            for key in earlier:
                self._store.delete_key(key)

    def _unreachable(self, error: RuntimeError) -> ReplicaFailed:
        return ReplicaFailed(0, f"the store of the process group, which rank 0 or the launcher keeps, failed: {error}")


def _say_goodbye(store: c10d.Store, rank: int, reason: str) -> None:
    with suppress(RuntimeError):
        store.compare_set("closed", "", json.dumps([rank, reason]))
