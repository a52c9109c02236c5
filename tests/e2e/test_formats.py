"""FP8 with a scale for each row, served on a CPU: the trainer has no table, and engines say what they need.

The judge is a fresh engine that loaded what the reference quantised.
"""

from pathlib import Path

import pytest
from fleet import fleet
from serving import VllmServer, answers
from tiny_models import FP8_ROWS, checkpoint_state, model_shapes, qwen3_config, random_state, save_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("tp", "world"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.long)])
def test_answers_equal_those_of_a_checkpoint_in_that_format(tp: int, world: int, tmp_path: Path) -> None:
    config = qwen3_config(**FP8_ROWS)
    state = random_state(model_shapes(config), seed=100)
    model = save_model(tmp_path / "model", config, checkpoint_state(config, state))
    server = VllmServer(model, tp=tp, log=tmp_path / "vllm.log").start()
    try:
        with fleet(tmp_path / "fleet", {"engine": server}) as whole:
            trainer = whole.start_trainer(model, world)
            server.wait_ready()
            assert trainer.hear()["ready"]
            served = []
            for step in (1, 2):
                assert trainer.publish(step).get("sequence") == step
                served.append(answers(server))
    finally:
        server.close()
    assert served[0] != served[1]
    with VllmServer(whole.checkpoints / "step_2", tp=tp, weightsync=False) as fresh:
        assert answers(fresh) == served[1]
