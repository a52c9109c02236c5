"""What users give an adapter, checked before anything else happens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from weightsync.agents.trainer.adapters.connection import Connection
from weightsync.agents.trainer.errors import UnknownArchitecture

GIVEN: dict[str, Any] = {"hub_url": "ws://h:1/agents", "token_file": "token", "run_id": "r", "run_dir": Path("runs")}


@pytest.mark.parametrize("name", ["hub_url", "token_file", "run_id", "run_dir"])
def test_an_empty_field_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"weightsync: {name} is empty"):
        Connection(**{**GIVEN, name: ""})


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, None), ("bfloat16", torch.bfloat16), ("torch.float16", torch.float16), (torch.float32, torch.float32)],
)
def test_dtypes_are_names_or_torchs_own(given: str | torch.dtype | None, found: torch.dtype | None) -> None:
    assert Connection(**GIVEN, forward_dtype=given).dtype() == found


@pytest.mark.parametrize("given", ["bf16", "int8", torch.int64, "nn", ""])
def test_what_is_no_dtype_of_floating_point_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"forward_dtype .* is no dtype of floating point such as 'bfloat16'"):
        Connection(**GIVEN, forward_dtype=given)  # type: ignore[arg-type]


def test_a_model_configuration_that_has_no_table_is_refused_at_once() -> None:
    with pytest.raises(UnknownArchitecture, match="Unheard"):
        Connection(**GIVEN, model_config={"architectures": ["Unheard"]}).agent()
