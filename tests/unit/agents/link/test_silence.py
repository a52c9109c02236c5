"""How long a daemon was not heard, on a clock that the test turns."""

import pytest
from weightsync.agents.link.silence import STEP_SECONDS, Silence


def test_silence_is_counted_from_the_last_byte_and_only_while_this_process_runs() -> None:
    now = 100.0
    silence = Silence(lambda: now)
    for _ in range(8):
        now += 0.25
        silence.look(0.0)
    assert silence.seconds == 2.0
    now += 3600.0  # stopped, or suspended: whatever was said meanwhile waits to be read
    silence.look(0.0)
    assert silence.seconds == 2.0 + STEP_SECONDS
    silence.look(now)
    assert silence.seconds == 0.0
    now += 0.5
    silence.look(now - 0.5)  # the same byte
    assert silence.seconds == pytest.approx(0.5)
    silence.look(0.0)  # the connection is lost
    assert silence.seconds == pytest.approx(0.5)
