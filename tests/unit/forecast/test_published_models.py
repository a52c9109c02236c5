"""Published sizes, and the tensors that follow from them."""

from math import prod

import pytest
from weightsync.orchestrator.forecast.published_models import (
    GEOMETRIES,
    expert_weights,
    layer_weights,
    other_weights,
    scale_shape,
)


def parameters(geometry):
    layers = range(geometry.layers)
    found = sum(prod(w.shape) for w in other_weights(geometry))
    found += sum(prod(w.shape) for i in layers for w in layer_weights(geometry, i))
    routed = (geometry.layers - geometry.dense_layers) * geometry.experts
    return found + routed * sum(prod(w.shape) for w in expert_weights(geometry))


def test_kimi_has_a_trillion_parameters():
    assert parameters(GEOMETRIES["kimi-k2"]) == pytest.approx(1.03e12, rel=0.005)


def test_scales_have_a_grid_of_their_own():
    assert scale_shape((576, 6144)) == (5, 48)
    assert scale_shape((128, 1)) == (1, 1)


def test_layers_that_predict_further_tokens_count_as_layers():
    assert GEOMETRIES["glm-5"].all_layers == 79
    assert GEOMETRIES["kimi-k2"].all_layers == 61
