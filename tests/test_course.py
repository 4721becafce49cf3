"""The exercises of the course are red before and green after; here are the solutions."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ANSWERS = """
import torch

LEVELS = [(2, 128, 12, 16), (2, 128, 6, 8), (2, 128, 3, 4)]
LOCATIONS = (2, 252, 8, 3, 4, 2)
LOGITS = (3, 2, 30, 15)
POINT = 0, 3
MASKED = {0.25: 4, 0.5: 8, 0.9: 14}
INTERVAL = -15.4, 3.7


def backward(grad, value, shapes, locations, weights):
    N, S, M, D = value.shape
    grad = grad.unflatten(-1, (M, D))  # (N, Q, M, D)
    to_value, first = torch.zeros_like(value), 0
    to_locations, to_weights = torch.zeros_like(locations), torch.zeros_like(weights)
    image, head = torch.arange(N)[:, None, None, None], torch.arange(M)[:, None]
    for level, (h, w) in enumerate(shapes):
        size = torch.tensor([w, h])
        place = locations[:, :, :, level] * size - 0.5  # (N, Q, M, P, 2) in cells
        weight = weights[:, :, :, level]  # (N, Q, M, P)
        for dx in (0, 1):
            for dy in (0, 1):
                x, y = (place.floor().long() + torch.tensor([dx, dy])).unbind(-1)
                inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
                cell = first + y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
                far = (place - torch.stack([x, y], -1)).abs()
                near = (1 - far) * inside[..., None]  # shares in x and in y
                there = value[image, cell, head]  # (N, Q, M, P, D)
                toward = (there * grad[..., None, :]).sum(-1)
                share = near.prod(-1)
                to_weights[:, :, :, level] += share * toward
                sign = torch.tensor([2 * dx - 1, 2 * dy - 1])
                slope = sign * near.flip(-1) * size  # of the share, by the location
                to_locations[:, :, :, level] += (weight * toward)[..., None] * slope
                update = (share * weight)[..., None] * grad[..., None, :]
                index = image.expand_as(cell), cell, head.expand_as(cell)
                to_value.index_put_(index, update, accumulate=True)
        first += h * w
    return to_value, to_locations, to_weights


def attention(layer, query, memory):
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q = (weights[0] @ query + biases[0]).unflatten(0, (layer.num_heads, -1))
    k = (memory @ weights[1].T + biases[1]).unflatten(1, (layer.num_heads, -1))
    return (torch.einsum("hd,shd->hs", q, k) / q.shape[1] ** 0.5).softmax(1)
"""

ROTATION = """
class Rotation(ClassTask):
    rotates = True

    def __init__(self, **config):
        super().__init__(num_outputs=3, **config)

    def turn(self, rng, patches, grid):
        places = choose(rng, patches, self.ratio)
        return places, rng.integers(1, 4, len(places))

    def target(self, images, corruption):  # of patches that are not turned it does not count
        return (corruption.quarter_turns - 1).clamp(min=0).unflatten(1, corruption.grid)


TASKS["rotation"] = Rotation
"""

MOBILE = """

class MobileNet(nn.Module):
    def __init__(self, name, num_stages, dilation, frozen_bn, weights):
        super().__init__()
        network = torchvision.models.get_model(name, weights=weights).features
        self.channels = [40, 112, 960][-num_stages:]
        self.strides = [8, 16, 32][-num_stages:]
        layers = ["6", "12", "16"][-num_stages:]
        self.body = IntermediateLayerGetter(network, {layer: layer for layer in layers})

    def forward(self, images):
        return list(self.body(images).values())


BACKBONES["mobilenet_v3_large"] = MobileNet
"""


MASK = "return corruption.inside & corruption.changed()"
ALL = "return corruption.inside\n"
TURNS, TARGET = "rng.integers(1, 4, len(places))", "(corruption.quarter_turns - 1).clamp(min=0)"
WRONG = [  # what is not right though it looks so: (exercise, right, wrong)
    ("inverted", MASK, "return corruption.changed()"),
    ("inverted", ALL, "return torch.ones_like(corruption.inside)\n"),
    ("inverted", ALL, "return corruption.inside & corruption.changed()\n"),
    ("rotation", TURNS, "rng.integers(1, 2, len(places))"),
    ("rotation", TARGET, "corruption.quarter_turns.clamp(max=1)"),
]


@pytest.fixture
def course(tmp_path):
    """(a copy of the project, how the checks of its course end: () -> {name: "PASSED" or not})."""
    ignore = shutil.ignore_patterns(".*", "runs", "data", "__pycache__", "docs")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)

    def check(name=""):
        command = [sys.executable, "-m", "pytest", "course", "-q", "-rA", "-p", "no:cacheprovider"]
        command += ["-k", name] * bool(name)
        said = subprocess.run(command, cwd=copy, capture_output=True, text=True).stdout
        ends = re.findall(r"^(\w+) course/test_exercises.py::test_(\w+)", said, re.M)
        return {name: end for end, name in ends}

    return copy, check


REMOVED = {"matcher", "schedule", "operator", "inverted"}


def test_red_before_green_after(course):
    copy, check = course
    ends = check()
    assert {name for name, end in ends.items() if end == "PASSED"} == REMOVED
    text = (copy / "COURSE.md").read_text(encoding="utf-8")
    assert {*re.findall(r"^\*\*`(\w+)`\*\*", text, re.M)} == ends.keys()
    for name in REMOVED:
        subprocess.run([sys.executable, "course/exercise.py", name], cwd=copy, check=True)
    assert {*check().values()} == {"FAILED"}


def test_solutions(course):
    copy, check = course
    (copy / "course/answers.py").write_text(ANSWERS)
    with open(copy / "ssl_tasks.py", "a") as file:
        file.write(ROTATION)
    with open(copy / "detr.py", "a") as file:
        file.write(MOBILE)
    assert {*check().values()} == {"PASSED"}
    code = (copy / "ssl_tasks.py").read_text(encoding="utf-8")
    for name, right, wrong in WRONG:
        assert code.count(right) == 1
        (copy / "ssl_tasks.py").write_text(code.replace(right, wrong), encoding="utf-8")
        assert check(name) == {name: "FAILED"}, wrong
