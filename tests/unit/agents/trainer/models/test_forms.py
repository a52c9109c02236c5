"""Which form a trainer's names show."""

from weightsync.agents.trainer.models.forms import CHECKPOINT, FORMS, STACKED, TRANSFORMERS, recognised

LAYER = "model.layers.3."


def test_checkpoint_names_need_no_form():
    form = recognised([LAYER + "mlp.experts.0.gate_proj.weight", LAYER + "mlp.gate.weight", "model.norm.weight"])
    assert (form.renames, form.stacks, form.fused) == ({}, {}, {})


def test_each_form_is_recognised_by_its_own_names():
    for form in (TRANSFORMERS, STACKED):
        theirs = [*form.renames.values(), *form.stacks.values(), *form.fused.values()]
        found = recognised(LAYER + name for name in theirs)
        assert (found.renames, found.stacks, found.fused) == (form.renames, form.stacks, form.fused)
    assert FORMS[0] is CHECKPOINT


def test_a_tensor_under_its_checkpoint_name_is_not_renamed():
    keys = [LAYER + "mlp.gate.weight", LAYER + "mlp.router.gate.weight"]
    assert "mlp.gate.weight" not in recognised(keys).renames


def test_wrappers_before_the_layers_do_not_matter():
    found = recognised(["_orig_mod.module.model.layers.0.mlp.experts.w1"])
    assert found.stacks == {"gate_proj": "mlp.experts.w1"}
