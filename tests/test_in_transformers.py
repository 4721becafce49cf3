"""use_in_transformers: the operator computes what transformers' own code computes."""

import importlib
import sys
import types
import warnings

import pytest
import torch

import deformable_attn
from deformable_attn import in_transformers

transformers = pytest.importorskip("transformers")
SHAPES = [(6, 8), (3, 4), (2, 2)]


@pytest.fixture(scope="module")
def served():
    """The names of the models that are served; nothing stays replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no model has an unknown form
        names = deformable_attn.use_in_transformers()
    deformable_attn.use_in_transformers(False)
    return names


def modeling(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def make_inputs():
    """value, locations (some outside of the maps) and weights of three levels."""
    torch.manual_seed(0)
    value = torch.randn(2, 64, 4, 8, requires_grad=True)
    locations = torch.rand(2, 5, 4, 3, 3, 2) * 1.2 - 0.1
    weights = torch.rand(2, 5, 4, 3, 3).flatten(3).softmax(-1).view(2, 5, 4, 3, 3)
    return [value, locations.requires_grad_(), weights.detach().requires_grad_()]


def call_form(module, inputs):
    """Compute with each of the forms that a file of transformers has. Returns {form: output}."""
    value, locations, weights = inputs
    outputs = {}
    if hasattr(module, in_transformers.MODULE):
        operator = getattr(module, in_transformers.MODULE)()
        shapes = torch.tensor(SHAPES)
        outputs["module"] = operator(value, shapes, SHAPES, None, locations, weights, 64)
    if hasattr(module, in_transformers.FUNCTION):
        function = getattr(module, in_transformers.FUNCTION)
        outputs["function"] = function(value, SHAPES, locations, weights)
    if hasattr(module, in_transformers.FUNCTION_V2):
        function = getattr(module, in_transformers.FUNCTION_V2)
        equal = (locations.flatten(3, 4), weights.flatten(3))
        outputs["v2"] = function(value, SHAPES, *equal, [3, 3, 3])
        unequal = (equal[0][:, :, :, :6], equal[1][:, :, :, :6])
        outputs["v2, unequal"] = function(value, SHAPES, *unequal, [3, 1, 2])
        outputs["v2, discrete"] = function(value, SHAPES, *equal, [3, 3, 3], "discrete")
    return outputs


def gradients_of(output, inputs):
    return torch.autograd.grad(output.square().sum(), inputs, allow_unused=True)


def test_models_of_this_version_are_served(served):
    assert len(served) >= 12
    assert {"deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "mask2former"} <= set(served)


def test_every_copy_agrees_with_transformers(served):
    """Outputs and gradients of every form in the file of every model; then it is undone."""
    for name in served:
        module = modeling(name)
        inputs = make_inputs()
        before = call_form(module, inputs)
        deformable_attn.use_in_transformers()
        try:
            replaced = call_form(module, inputs)
        finally:
            deformable_attn.use_in_transformers(False)
        assert before.keys() == replaced.keys() and before
        for form, output in replaced.items():
            torch.testing.assert_close(output, before[form], rtol=1e-5, atol=1e-5)
            expected = gradients_of(before[form], inputs)
            for gradient, expected_gradient in zip(gradients_of(output, inputs), expected):
                torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
            used = type(output.grad_fn).__name__ != type(before[form].grad_fn).__name__
            assert used != (form == "v2, discrete"), (name, form)
        after = call_form(module, inputs)
        for form, output in after.items():
            assert torch.equal(output, before[form])
            assert type(output.grad_fn).__name__ == type(before[form].grad_fn).__name__


def test_a_whole_model():
    """A small Deformable DETR with random weights: outputs and gradients, and calls are counted."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
        layer_type="basic",
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        backbone=None,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_feature_levels=4,
    )
    torch.manual_seed(0)
    model = DeformableDetrForObjectDetection(config).eval()
    for name, parameter in model.named_parameters():
        if "sampling_offsets.bias" in name:  # it starts at whole pixels, where gradients jump
            parameter.data += torch.rand_like(parameter)
    images = torch.randn(2, 3, 64, 96)
    computed = {}
    calls = []
    original = deformable_attn.compat.MSDeformAttnFunction.apply

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    for is_replaced in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(in_transformers.MSDeformAttnFunction, "apply", staticmethod(counted))
            if is_replaced:
                deformable_attn.use_in_transformers()
            try:
                output = model(images)
            finally:
                deformable_attn.use_in_transformers(False)
        model.zero_grad()
        (output.logits.square().mean() + output.pred_boxes.square().mean()).backward()
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        computed[is_replaced] = (output.logits, output.pred_boxes, gradients)
    assert len(calls) == 3  # one encoder layer and two decoder layers
    for values, expected in zip(computed[True][:2], computed[False][:2]):
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert computed[True][2].keys() == computed[False][2].keys()
    largest = max(gradient.norm() for gradient in computed[False][2].values())
    for name, gradient in computed[True][2].items():
        expected = computed[False][2][name]  # that of a bias before a normalization is nearly 0
        error = (gradient - expected).norm() / expected.norm().clamp(min=1e-3 * largest)
        assert error < 1e-4, name


def test_an_unknown_form_is_named(monkeypatch):
    module = types.ModuleType("transformers.models.new_detr.modeling_new_detr")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(in_transformers, "_modules_with_deformable_attention", lambda: [module])
    with pytest.warns(UserWarning, match="left as it is: new_detr"):
        assert deformable_attn.use_in_transformers() == []
    deformable_attn.use_in_transformers(False)
