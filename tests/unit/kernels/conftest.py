"""Every kernel test runs through the reference, Triton's interpreter where Triton is, and on a GPU (``-m gpu``)."""

import importlib.util
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

IMPLEMENTATIONS = ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]
# A kernel is compiled or interpreted once and for all when its module is imported: not both in one process.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    IMPLEMENTATIONS.append("interpreter")


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the tensors of a test live; decides which implementation the public functions choose."""
    if request.param == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # The interpreter computes in NumPy, which warns where a GPU does not, and of habits of the interpreter's own.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        if request.param == "interpreter":
            warnings.simplefilter("ignore")
        yield torch.device("cuda" if request.param == "cuda" else "cpu")
