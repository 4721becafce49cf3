"""The checks of the exercises in COURSE.md, one by one: python -m pytest course -k NAME."""

import math

import answers
import pytest
import torch

import deformable_attn
import detr
import reproduce
import ssl_tasks
import train
from deformable_attn.reference import ms_deform_attn_reference
from util.tables import ap_curves, paired_difference


def test_shapes():
    args, _ = train.parse([])
    model = detr.build_detector(**train.detector_config(args, 15)).eval()
    encoder_attention = model.transformer.encoder.layers[0].self_attn
    calls = []

    def record(module, inputs):
        calls.append(inputs)

    encoder_attention.register_forward_pre_hook(record)
    images = torch.zeros(2, 3, 96, 128)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    levels = model.features(images, padding)
    outputs = model.decode(model.encode(levels))
    query, reference, _, spatial_shapes, _ = calls[0]
    locations, _ = encoder_attention.sample(query, reference, spatial_shapes)

    wrong = []
    if len(answers.LEVELS) != len(levels):
        wrong.append("number of LEVELS")
    for i, (answer, level) in enumerate(zip(answers.LEVELS, levels)):
        if not is_shape_of(answer, level.features):
            wrong.append(f"LEVELS[{i}]")
    if not is_shape_of(answers.LOCATIONS, locations):
        wrong.append("LOCATIONS")
    if not is_shape_of(answers.LOGITS, outputs["logits"]):
        wrong.append("LOGITS")
    assert not wrong, "these answers are not correct yet"


def is_shape_of(answer, tensor):
    """Return True if an answer, a tuple or a list or None, is the shape of a tensor."""
    return answer is not None and tuple(answer) == tuple(tensor.shape)


def test_star():
    attention = deformable_attn.MSDeformAttn(hidden_dim=128, n_levels=3, n_heads=8, n_points=4)
    offsets = attention.sampling_offsets.bias.view(8, 3, 4, 2)  # (heads, levels, points, 2)
    assert answers.POINT is not None, "no answer yet"
    assert offsets[2, 0, 2].tolist() == pytest.approx(answers.POINT, abs=1e-4)


def test_share():
    assert answers.MASKED.keys() == {0.25, 0.5, 0.9}
    padding = torch.zeros(1, 128, 128, dtype=torch.bool)
    for ratio, number in answers.MASKED.items():
        task = ssl_tasks.build_task("mim-continuous", dim=8, strides=[32], patch=32, ratio=ratio)
        corruption = task.sample_corruption(padding, seeds=[0])
        assert int(corruption.masked.sum()) == number, f"--ssl_ratio {ratio}"


def test_null():
    experiment = reproduce.find_experiment("scenes")
    results = reproduce.read_results([reproduce.RESULTS / "scenes"], experiment)
    last_ap = {}  # {row: AP in % after the last epoch, for seeds 0, 1 and 2}
    for row in ("detr-after-mim-continuous", "detr-scratch"):
        _, curves = ap_curves([results[row][seed] for seed in (0, 1, 2)])
        last_ap[row] = curves[:, -1]
    expected = paired_difference(last_ap["detr-after-mim-continuous"], last_ap["detr-scratch"])
    low, high = answers.INTERVAL
    assert low is not None and high is not None, "no answer yet"
    assert f"{low:+.1f} to {high:+.1f}" == f"{expected.low:+.1f} to {expected.high:+.1f}"


@pytest.mark.parametrize(
    "focal, expected",
    [(False, [[-0.6652, 0.91], [3.7243, 0.7681]]), (True, [[-2.4742, 0.8267], [4.1312, 0.3919]])],
    ids=["DETR", "Deformable DETR"],
)
def test_matcher(focal, expected):
    """Compare the costs of two queries with two objects, a worked example."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, -1.0, 0.0]])  # (Q, K)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.6, 0.4, 0.2]])
    labels = torch.tensor([1, 0])
    target_boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.5, 0.2, 0.2]])
    criterion = detr.Criterion(focal)
    costs = criterion.matching_costs(
        logits[None, None], boxes[None, None], labels[None], target_boxes[None]
    )
    assert costs.shape == (1, 1, 2, 2)
    torch.testing.assert_close(costs[0, 0], torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "flags, steps, expected",
    [
        ("--lr_schedule linear", [0, 4, 9, 40, 70], [0.1, 0.5, 1, 0.667, 0.333]),
        ("--lr_schedule cosine", [0, 4, 9, 40, 70], [0.1, 0.5, 1, 0.75, 0.25]),
        ("--lr_schedule step --lr_drop 4", [0, 10, 20, 39, 80], [1, 1, 1, 1, 0.01]),
        ("--lr_schedule constant", [0, 10, 20, 39, 80], [1, 1, 1, 1, 1]),
    ],
)
def test_schedule(flags, steps, expected):
    """Compare the learning rate at some of the 100 steps of ten epochs."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    args, _ = train.parse(["--epochs", "10", *flags.split()])
    schedule = train.build_schedule(optimizer, args, steps_per_epoch=10)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [rates[step] for step in steps] == pytest.approx(expected, abs=1e-3)


def test_operator():
    """Sample a map that is a plane: bilinear samples lie in the plane, and outside they are 0."""
    H, W = 8, 6
    y = torch.arange(H) + 0.5
    x = torch.arange(W) + 0.5
    plane = 2 * x + 5 * y[:, None]  # (H, W)
    value = plane.reshape(1, H * W, 1, 1)  # one head, one channel
    points = torch.tensor([[1.2, 3.4], [4.9, 6.1], [-9.0, 3.0]])  # x, y in cells; one outside
    locations = (points / torch.tensor([W, H])).reshape(1, 1, 1, 1, 3, 2)
    weights = torch.tensor([0.2, 0.3, 0.5]).reshape(1, 1, 1, 1, 3)
    expected = 0.2 * (2 * 1.2 + 5 * 3.4) + 0.3 * (2 * 4.9 + 5 * 6.1)
    output = ms_deform_attn_reference(value, [(H, W)], locations, weights)
    assert output.shape == (1, 1, 1)
    assert output.item() == pytest.approx(expected, rel=1e-5)


def test_backward():
    """Compare with autograd: two levels, two heads, some points outside."""
    torch.manual_seed(0)
    shapes = [(4, 3), (2, 5)]
    value = torch.randn(2, 22, 2, 3).double().requires_grad_()
    locations = (torch.rand(2, 4, 2, 2, 3, 2) * 1.4 - 0.2).double().requires_grad_()
    weights = torch.rand(2, 4, 2, 2, 3).double().requires_grad_()
    output = ms_deform_attn_reference(value, shapes, locations, weights)
    grad = torch.randn_like(output)
    expected = torch.autograd.grad(output, (value, locations, weights), grad)
    with torch.no_grad():
        gradients = answers.backward(grad, value, shapes, locations, weights)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_attention():
    """Compare with the weights per head that torch's layer returns."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    torch.nn.init.normal_(layer.in_proj_bias)
    query = torch.randn(32)
    memory = torch.randn(10, 32)
    _, expected = layer(
        query[None, None], memory[None], memory[None], average_attn_weights=False
    )  # (1, heads, 1, S)
    torch.testing.assert_close(answers.attention(layer, query, memory), expected[0, :, 0])


@pytest.mark.parametrize("loss_patches", ["corrupted", "all"])
def test_inverted(loss_patches):
    """Check which patches of a jigsaw count in the loss.

    "corrupted": those that moved, and no others; a patch may be permuted to its own place.
    "all":       all, but never one that the border of the image cuts off.
    """
    padding = torch.zeros(8, 128, 128, dtype=torch.bool)
    padding[:, 80:] = True  # it cuts the third of four rows of patches
    inside = torch.zeros(8, 16, dtype=torch.bool)
    inside[:, :8] = True
    task = ssl_tasks.build_task(
        "jigsaw-continuous", dim=8, strides=[32], patch=32, ratio=1, loss_patches=loss_patches
    )
    corruption = task.sample_corruption(padding, seeds=range(8))
    moved = corruption.permutation != torch.arange(16)
    assert (inside & ~moved).any(), "a patch that stays is needed for this test"
    expected = moved if loss_patches == "corrupted" else inside
    assert torch.equal(task.counted_patches(corruption), expected)


def test_rotation(tmp_path):
    """Half of the patches are turned by 1 to 3 quarters; each number of turns is a class."""
    check_rotation(side=32, columns=4, ratio=0.5, seeds=range(4))
    flags = "--setting pretrain --ssl_task rotation --ssl_on image --limit_train 32 --limit_val 8"
    train.main([*flags.split(), "--epochs", "1", "--out", str(tmp_path / "run")])


def check_rotation(side, columns, ratio, seeds):
    """Check the patches and the classes of the task `rotation`.

    side:    pixels per side of a patch
    columns: patches per side of the image
    """
    B = len(seeds)
    size = side * columns
    task = ssl_tasks.build_task(
        "rotation", dim=8, strides=[side], patch=side, ratio=ratio, on="image"
    )
    padding = torch.zeros(B, size, size, dtype=torch.bool)
    corruption = task.sample_corruption(padding, seeds=seeds)
    counted = task.counted_patches(corruption)  # (B, patches)
    assert counted.sum(1).tolist() == [round(ratio * columns**2)] * B

    images = torch.randn(B, 3, size, size)
    corrupted = task.corrupt_images(images, corruption)
    target = task.target(images, corruption).flatten(1)  # (B, patches)
    class_of = {}  # {quarter turns: class}
    for b, i in counted.nonzero().tolist():
        y = side * (i // columns)
        x = side * (i % columns)
        patch = images[b, :, y : y + side, x : x + side]
        turned_patch = corrupted[b, :, y : y + side, x : x + side]
        matching = [k for k in (1, 2, 3) if torch.equal(patch.rot90(k, (1, 2)), turned_patch)]
        assert len(matching) == 1, "a counted patch is not turned by 1, 2 or 3 quarters"
        turns = matching[0]
        class_of.setdefault(turns, target[b, i].item())
        assert class_of[turns] == target[b, i]
    assert class_of.keys() == {1, 2, 3}, "not all numbers of turns occur"
    assert len(set(class_of.values())) == 3, "two numbers of turns have the same class"
    assert all(0 <= label < task.num_outputs for label in class_of.values())


@pytest.mark.parametrize("name, strides", [("detr", [32]), ("deformable_detr", [8, 16, 32, 64])])
def test_backbone(name, strides):
    """Build both detectors with a CNN of another family."""
    model = detr.build_detector(
        name,
        num_classes=3,
        backbone="mobilenet_v3_large",
        hidden_dim=32,
        nheads=2,
        enc_layers=1,
        dec_layers=1,
        frozen_bn=False,
    ).eval()
    assert model.strides == strides
    levels = model.features(torch.zeros(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    widths = [level.features.shape[-1] for level in levels]
    assert widths == [math.ceil(96 / stride) for stride in strides]
