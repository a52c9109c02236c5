"""STABLE: whole or not there, with the version in it, and without what an earlier attempt at the step left."""

from pathlib import Path

from weightsync.agents.trainer.markers import write_stable
from weightsync.orchestrator.protocol.markers import encode_manifest, manifest
from weightsync.orchestrator.protocol.names import Version


def test_stable_names_the_version(tmp_path: Path) -> None:
    path = write_stable(tmp_path, "glm", Version(9, 4))
    assert path == tmp_path / "broadcasts" / "step_4" / "STABLE"
    assert path.read_bytes() == encode_manifest(manifest("glm", Version(9, 4)))
    assert [file.name for file in path.parent.iterdir()] == ["STABLE"], "no temporary file stays"


def test_outputs_of_an_earlier_version_of_the_step_go_first(tmp_path: Path) -> None:
    folder = tmp_path / "broadcasts" / "step_4"
    folder.mkdir(parents=True)
    for kind in ("TRANSFER_READY", "COMMITTED", "FAILED", "part-00000-of-00001.safetensors"):
        (folder / kind).touch()
    write_stable(tmp_path, "glm", Version(10, 4))
    assert {file.name for file in folder.iterdir()} == {"STABLE", "part-00000-of-00001.safetensors"}
