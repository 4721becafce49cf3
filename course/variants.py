"""The checks that grade submissions: those of test_exercises.py with other numbers and seeds.

course/grade.py runs them. Functions that students write are compared with the originals on random
arguments. $ORIGINALS is the folder of the originals, $VARIANT_SEED the seed.
"""

import importlib.util
import os
import sys
from pathlib import Path

import answers
import pytest
import test_exercises
import torch
from test_exercises import test_null, test_shapes, test_share, test_star  # noqa: F401, they are run

import deformable_attn.reference
import detr
import ssl_tasks
import train

ORIGINALS = Path(os.environ["ORIGINALS"])
SEED = int(os.environ["VARIANT_SEED"])


def original(file):
    """Import a file of the original repository under another name."""
    name = f"original_{Path(file).stem}"
    specification = importlib.util.spec_from_file_location(name, ORIGINALS / file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)


@pytest.mark.parametrize("focal", [False, True])
def test_matcher(focal):
    K = 5
    logits = torch.randn(2, 3, 6, K)  # (N, B, Q, K)
    boxes = torch.rand(2, 3, 6, 4) * 0.4 + 0.1
    labels = torch.randint(0, K - 1, (3, 4))
    target_boxes = torch.rand(3, 4, 4) * 0.4 + 0.1
    arguments = (logits, boxes, labels, target_boxes)
    costs = detr.Criterion(focal).matching_costs(*arguments)
    expected = original("detr.py").Criterion(focal).matching_costs(*arguments)
    torch.testing.assert_close(costs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step --lr_drop 2", "constant"])
def test_schedule(schedule):
    args, _ = train.parse(f"--epochs 7 --lr_schedule {schedule}".split())
    steps = 11 + SEED % 7
    rates = {}
    for module in (train, original("train.py")):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        built = module.build_schedule(optimizer, args, steps_per_epoch=steps)
        rates[module.__name__] = []
        for _ in range(7 * steps):
            rates[module.__name__] += built.get_last_lr()
            optimizer.step()
            built.step()
    assert rates["train"] == pytest.approx(rates["original_train"], abs=1e-9)


def operator_arguments(dtype):
    """Random value, shapes, locations (some outside of the maps) and weights."""
    shapes = [(5, 7), (3, 2), (1, 4)]
    value = torch.randn(2, 45, 3, 4, dtype=dtype)
    locations = torch.rand(2, 6, 3, 3, 2, 2, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(2, 6, 3, 3, 2, dtype=dtype)
    return value, shapes, locations, weights


def test_operator():
    arguments = operator_arguments(torch.float32)
    output = deformable_attn.reference.ms_deform_attn_reference(*arguments)
    expected = original("deformable_attn/reference.py").ms_deform_attn_reference(*arguments)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_backward():
    value, shapes, locations, weights = operator_arguments(torch.float64)
    inputs = [value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()]
    reference = original("deformable_attn/reference.py").ms_deform_attn_reference
    output = reference(value, shapes, locations, weights)
    grad = torch.randn_like(output)
    expected = torch.autograd.grad(output, inputs, grad)
    with torch.no_grad():
        gradients = answers.backward(grad, value, shapes, locations, weights)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_attention():
    layer = torch.nn.MultiheadAttention(48, 6, batch_first=True)
    torch.nn.init.normal_(layer.in_proj_bias)
    query = torch.randn(48)
    memory = torch.randn(13, 48)
    _, expected = layer(query[None, None], memory[None], memory[None], average_attn_weights=False)
    torch.testing.assert_close(answers.attention(layer, query, memory), expected[0, :, 0])


@pytest.mark.parametrize("loss_patches", ["corrupted", "all"])
def test_inverted(loss_patches):
    config = {"dim": 8, "strides": [16], "patch": 16, "ratio": 0.7, "loss_patches": loss_patches}
    padding = torch.zeros(6, 96, 96, dtype=torch.bool)
    padding[:, :, 70:] = True
    counted = {}
    for module in (ssl_tasks, original("ssl_tasks.py")):
        task = module.build_task("jigsaw-continuous", **config)
        corruption = task.sample_corruption(padding, seeds=range(SEED, SEED + 6))
        counted[module.__name__] = task.counted_patches(corruption)
    assert torch.equal(counted["ssl_tasks"], counted["original_ssl_tasks"])


def test_rotation():
    test_exercises.check_rotation(side=16, columns=6, ratio=0.25, seeds=range(SEED, SEED + 5))


@pytest.mark.parametrize("name, strides", [("detr", [32]), ("deformable_detr", [8, 16, 32])])
def test_backbone(name, strides):
    config = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 1, "frozen_bn": False}
    if name == "deformable_detr":
        config["num_feature_levels"] = 3
    model = detr.build_detector(name, num_classes=4, backbone="mobilenet_v3_large", **config)
    assert model.strides == strides
    images = torch.randn(2, 3, 96, 64)
    padding = torch.zeros(2, 96, 64, dtype=torch.bool)
    outputs = model.decode(model.encode(model.features(images, padding)))
    outputs["logits"].square().sum().backward()
    gradients = [parameter.grad for parameter in model.backbone.parameters()]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
