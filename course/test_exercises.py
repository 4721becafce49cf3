"""Checks of the exercises in COURSE.md: red before, green after. One by one: -k NAME."""

import answers
import pytest
import torch

import deformable_attn
import detr
import reproduce
import ssl_tasks
import train
from deformable_attn.reference import ms_deform_attn_reference


def demonstration():
    args, _ = train.parse([])
    return detr.build_detector(**train.detector_config(args, 15)).eval()


def test_shapes():
    model, seen = demonstration(), {}
    module = model.transformer.encoder.layers[0].self_attn
    sample = module.sample
    module.sample = lambda *inputs: seen.setdefault("sampled", sample(*inputs))
    images, padding = torch.zeros(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    levels = model.features(images, padding)
    outputs = model.decode(model.encode(levels))
    shapes = {"LEVELS": [level.features.shape for level in levels],
              "LOCATIONS": seen["sampled"][0].shape, "LOGITS": outputs["logits"].shape}  # fmt: skip
    wrong = [name for name, right in shapes.items() if not same(getattr(answers, name), right)]
    assert not wrong  # the names of answers that are not right yet


def same(answer, right):
    """Whether an answer, of tuples or lists, is right."""
    if isinstance(answer, (list, tuple)):
        return len(answer) == len(right) and all(map(same, answer, right))
    return answer == right


def test_star():
    bias = deformable_attn.MSDeformAttn(128, 3, 8, 4).sampling_offsets.bias.view(8, 3, 4, 2)
    assert answers.POINT, "no answer yet"
    assert bias[2, 0, 2].tolist() == pytest.approx(answers.POINT, abs=1e-4)


def test_share():
    assert answers.MASKED.keys() == {0.25, 0.5, 0.9}
    for ratio, number in answers.MASKED.items():
        task = ssl_tasks.build_task("mim-continuous", dim=8, strides=[32], patch=32, ratio=ratio)
        corruption = task.sample_corruption(torch.zeros(1, 128, 128, dtype=torch.bool), [0])
        assert int(corruption.masked.sum()) == number


def test_null():
    experiment = reproduce.find_experiment("scenes")
    results = reproduce.read_results([reproduce.RESULTS / "scenes"], experiment)
    last_ap = {}  # of each row, AP in % after the last epoch, for seeds 0, 1 and 2
    for row in ("detr-after-mim-continuous", "detr-scratch"):
        _, curves = reproduce.ap_curves([results[row][seed] for seed in (0, 1, 2)])
        last_ap[row] = curves[:, -1]
    expected = reproduce.paired_difference(
        last_ap["detr-after-mim-continuous"], last_ap["detr-scratch"]
    )
    low, high = answers.INTERVAL
    assert low is not None and high is not None, "no answer yet"
    assert f"{low:+.1f} to {high:+.1f}" == f"{expected.low:+.1f} to {expected.high:+.1f}"


def test_matcher():
    """A worked example: the costs of two queries with two objects, as both detectors have them."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, -1.0, 0.0]])[None, None]  # (1, 1, 2, 3)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.6, 0.4, 0.2]])
    objects = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.5, 0.2, 0.2]])
    labels = torch.tensor([[1, 0]])
    for focal, expected in ((False, SOFTMAX), (True, FOCAL)):
        criterion = detr.Criterion(focal)
        costs = criterion.matching_costs(logits, boxes[None, None], labels, objects[None])
        torch.testing.assert_close(costs[0, 0], torch.tensor(expected), rtol=1e-3, atol=1e-3)


SOFTMAX = [[-0.6652, 0.91], [3.7243, 0.7681]]
FOCAL = [[-2.4742, 0.8267], [4.1312, 0.3919]]


def test_schedule():
    """Up to the full rate in a tenth of the steps, down to nearly nothing; or drops by ten."""
    cycles = {"linear": [0.1, 0.5, 1.0, 0.667, 0.333], "cycle": [0.1, 0.5, 1.0, 0.75, 0.25]}
    for drop, expected in {**cycles, 4: [1, 1, 1, 1, 0.01]}.items():
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        args, _ = train.parse(["--epochs", "10", "--lr_drop", str(drop)])
        schedule, rates = train.build_schedule(optimizer, args, 10), []
        for _ in range(100):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        at = [rates[step] for step in (0, 4, 9, 40, 70)]
        if drop == 4:
            at = [rates[step] for step in (0, 10, 20, 39, 80)]
        assert at == pytest.approx(expected, abs=1e-3), drop


def test_operator():
    """A map that is a plane, sampled bilinearly, gives the plane at the points; zeros outside."""
    y, x = torch.meshgrid(torch.arange(8.0) + 0.5, torch.arange(6.0) + 0.5, indexing="ij")
    value = (2 * x + 5 * y).reshape(1, 48, 1, 1)  # one head, one channel, one level of 8 x 6
    points = torch.tensor([[1.2, 3.4], [4.9, 6.1], [-9.0, 3.0]])  # x, y in cells
    locations = (points / torch.tensor([6.0, 8.0])).reshape(1, 1, 1, 1, 3, 2)
    weights = torch.tensor([0.2, 0.3, 0.5]).reshape(1, 1, 1, 1, 3)
    expected = 0.2 * (2.4 + 17) + 0.3 * (9.8 + 30.5)
    found = ms_deform_attn_reference(value, [(8, 6)], locations, weights)
    assert found.shape == (1, 1, 1) and found.item() == pytest.approx(expected, rel=1e-5)


def test_backward():
    """The gradients that autograd finds, in two levels with two heads, some points outside."""
    torch.manual_seed(0)
    shapes = [(4, 3), (2, 5)]
    inputs = (torch.randn(2, 22, 2, 3), torch.rand(2, 4, 2, 2, 3, 2) * 1.4 - 0.2,
              torch.rand(2, 4, 2, 2, 3))  # fmt: skip
    value, locations, weights = (x.double().requires_grad_() for x in inputs)
    output = ms_deform_attn_reference(value, shapes, locations, weights)
    grad = torch.randn_like(output)
    expected = torch.autograd.grad(output, (value, locations, weights), grad)
    with torch.no_grad():
        found = answers.backward(grad, value, shapes, locations, weights)
    for mine, right in zip(found, expected):
        torch.testing.assert_close(mine, right)


def test_attention():
    """The weights that torch's layer returns, each head's."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    torch.nn.init.normal_(layer.in_proj_bias)
    query, memory = torch.randn(32), torch.randn(10, 32)
    how = {"average_attn_weights": False}
    expected = layer(query[None, None], memory[None], memory[None], **how)[1][0, :, 0]
    torch.testing.assert_close(answers.attention(layer, query, memory), expected)


def test_inverted():
    """Only what moved counts, and all of it; a patch permuted to its own place did not move.
    With loss_patches="all" every patch counts, but never one cut off by the image's border."""
    padding = torch.zeros(8, 128, 128, dtype=torch.bool)
    padding[:, 80:] = True
    whole = (torch.arange(16) < 8).expand(8, -1)
    for loss_patches in ("corrupted", "all"):
        how = {"ratio": 1, "loss_patches": loss_patches}
        task = ssl_tasks.build_task("jigsaw-continuous", dim=8, strides=[32], patch=32, **how)
        corruption = task.sample_corruption(padding, range(8))
        moved = corruption.permutation != torch.arange(16)
        assert 0 < (~moved & whole).sum()
        right = moved if loss_patches == "corrupted" else whole
        assert torch.equal(task.counted_patches(corruption), right), loss_patches


def test_rotation(tmp_path):
    """Your task: a share of the patches turned by one to three quarters, which is asked."""
    task = ssl_tasks.build_task("rotation", dim=8, strides=[32], patch=32, on="image")
    corruption = task.sample_corruption(torch.zeros(4, 128, 128, dtype=torch.bool), range(4))
    counted = task.counted_patches(corruption)
    assert counted.sum(1).tolist() == [8, 8, 8, 8]
    images = torch.randn(4, 3, 128, 128)
    corrupted, target = task.corrupt_images(images, corruption), task.target(images, corruption)
    label_of = {}  # of each number of turns
    for b, i in counted.nonzero().tolist():
        y, x = (32 * n for n in divmod(i, 4))
        patch = images[b, :, y : y + 32, x : x + 32]
        turned = corrupted[b, :, y : y + 32, x : x + 32]
        turns = [k for k in (1, 2, 3) if torch.equal(patch.rot90(k, (1, 2)), turned)]
        label = target[b].flatten()[i].item()
        assert turns and label_of.setdefault(turns[0], label) == label
    assert len({*label_of.values()}) == len(label_of) == 3  # all turns occur, each has its answer
    assert {*label_of.values()} <= {*range(task.num_outputs)}
    train.main(f"--setting pretrain --ssl_task rotation --ssl_on image --limit_train 32 --epochs 1 "
               f"--limit_val 8 --out {tmp_path}/run".split())  # fmt: skip


def test_backbone():
    """A CNN of another kind: both detectors take it, with three strides."""
    small = dict(hidden_dim=32, nheads=2, enc_layers=1, dec_layers=1, frozen_bn=False)
    for name, strides in (("detr", [32]), ("deformable_detr", [8, 16, 32, 64])):
        model = detr.build_detector(name, 3, backbone="mobilenet_v3_large", **small).eval()
        assert model.strides == strides
        levels = model.features(torch.zeros(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
        assert [level.features.shape[-1] for level in levels] == [-(-96 // s) for s in strides]
