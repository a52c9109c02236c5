"""The adapter's scaling is a tensor that may travel."""

from weightsync.orchestrator.protocol.adapter import SAVED_PREFIX, SCALING, SCALING_DTYPE, SCALING_SHAPE
from weightsync.orchestrator.protocol.layout import ITEMSIZE


def test_the_scaling_is_two_float64() -> None:
    assert ITEMSIZE[SCALING_DTYPE] == 8
    assert SCALING_SHAPE == (2,)
    assert not SCALING.startswith(SAVED_PREFIX), "no name of peft's can be taken for it"
