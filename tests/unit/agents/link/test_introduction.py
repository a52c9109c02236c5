"""What an agent says first."""

import os
import socket
from pathlib import Path

from weightsync.agents.link.introduction import Identity, boot, hello
from weightsync.agents.link.obedience import Obedience
from weightsync.orchestrator.protocol.limits import MAX_NAME_CHARS
from weightsync.orchestrator.protocol.messages import EngineStatus, TrainerStatus
from weightsync.orchestrator.protocol.names import Member
from weightsync.orchestrator.release import release

RANK = Identity("run", Member("inference", "e0", 1), 2)


def test_it_names_the_process_its_place_and_what_binds_it() -> None:
    said = hello(RANK, Obedience(77, epoch=3, journal_id="j", life="l"), EngineStatus(held=True))
    assert (said.member, said.world, said.incarnation, said.generation) == (RANK.member, 2, 77, 0)
    assert (said.epoch_seen, said.journal_id, said.life_seen) == (3, "j", "l")
    assert (said.host, said.boot, said.pid) == (socket.gethostname(), boot(), os.getpid())
    assert said.release == release()
    assert (said.engine, said.trainer) == (EngineStatus(held=True), None)
    trainer = hello(Identity("run", Member("trainer", "", 0), 1, 9), Obedience(1), TrainerStatus(restaged=2))
    assert (trainer.engine, trainer.trainer, trainer.generation) == (None, TrainerStatus(restaged=2), 9)


def test_the_boot_is_the_hosts_and_bounded(tmp_path: Path) -> None:
    assert len(boot()) == len("c2d9ad0c-5a4b-4d3f-8c35-0f3b8c1e2a11"), "a UUID of this host's kernel"
    assert boot() == boot()
    assert boot(tmp_path / "none") == ""
    odd = tmp_path / "odd"
    odd.write_bytes(b"\xff\xfe")
    assert boot(odd) == ""
    odd.write_text("x" * 5000)
    assert boot(odd) == "x" * MAX_NAME_CHARS
