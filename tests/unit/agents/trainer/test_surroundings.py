"""What a trainer rank looks at, and the first one besides."""

from pathlib import Path

import torch
from weightsync.agents.trainer.surroundings import trainer_look
from weightsync.agents.transport.interface import SourceMemory
from weightsync.orchestrator.protocol.edges import FilesystemSettings
from weightsync.orchestrator.protocol.layout import Layout
from weightsync.orchestrator.protocol.names import Member

FILES = FilesystemSettings("/run")
MEMORY = SourceMemory(Member("trainer", "", 0), 1, Layout((), (), b""), [torch.empty(8, dtype=torch.uint8)], ())


def test_the_first_rank_tries_its_run_directory(tmp_path: Path) -> None:
    assert [finding.level for finding in trainer_look(MEMORY, tmp_path)(FILES)] == ["ok"]
    [found] = trainer_look(None, Path("/proc/sys"))(FILES)  # as root, too
    assert (found.level, found.check) == ("error", "run directory")
    assert list(trainer_look(MEMORY, None)(FILES)) == []
