"""What is left with a model of its recording."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from weightsync.agents.recorder.boxes import StridedView
from weightsync.agents.recorder.contents import Checkpoint
from weightsync.agents.recorder.recording import Finished
from weightsync.agents.recorder.rows import Target
from weightsync.agents.recorder.trace import Landing, RecordError
from weightsync.agents.vllm.recorder.kept import Kept, kept_of


def test_a_model_without_a_recording_is_refused_with_its_load_format() -> None:
    settings = SimpleNamespace(load_config=SimpleNamespace(load_format="tensorizer"))
    with pytest.raises(RecordError, match=r"Linear was loaded without the recorder: .*'tensorizer'"):
        kept_of(nn.Linear(1, 1), settings)


def test_names_on_the_wire() -> None:
    source = Checkpoint("fc.weight", (2,), torch.float32)
    landing = Landing(0, source, (0,), StridedView((2,), (4,), 0), torch.float32)
    target = Target(torch.zeros(2), 0, (landing,))
    kept = Kept(nn.Linear(1, 1), Finished(), [], ())
    assert kept.named([target]) == [target]
    kept.prefix = "draft."
    (named,) = kept.named([target])
    assert [each.source.name for each in named.landings] == ["draft.fc.weight"]
    assert named.tensor is target.tensor
