"""The exercises of the course are red before and green after; the solutions are here."""

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
POINT = (0, 3)
MASKED = {0.25: 4, 0.5: 8, 0.9: 14}
INTERVAL = (-15.4, 3.7)


def attention(layer, query, memory):
    query_weight, key_weight, _ = layer.in_proj_weight.chunk(3)
    query_bias, key_bias, _ = layer.in_proj_bias.chunk(3)
    q = (query_weight @ query + query_bias).unflatten(0, (layer.num_heads, -1))  # (M, D)
    k = (memory @ key_weight.T + key_bias).unflatten(1, (layer.num_heads, -1))  # (S, M, D)
    scores = torch.einsum("md,smd->ms", q, k) / q.shape[1] ** 0.5
    return scores.softmax(1)


def backward(grad, value, shapes, locations, weights):
    B, S, M, D = value.shape
    grad = grad.unflatten(-1, (M, 1, D))  # (B, Q, M, 1, D), the same for all points
    grad_value = torch.zeros_like(value)
    grad_locations = torch.zeros_like(locations)
    grad_weights = torch.zeros_like(weights)
    image = torch.arange(B)[:, None, None, None]
    head = torch.arange(M)[:, None]
    start = 0  # of the level in `value`
    for level, (H, W) in enumerate(shapes):
        size = torch.tensor([W, H])
        point = locations[:, :, :, level] * size - 0.5  # (B, Q, M, P, 2), 0 is a cell's center
        weight = weights[:, :, :, level]  # (B, Q, M, P)
        for corner in ([0, 0], [0, 1], [1, 0], [1, 1]):  # x, y
            cell = point.floor().long() + torch.tensor(corner)
            x, y = cell.unbind(-1)  # (B, Q, M, P)
            inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
            index = start + y.clamp(0, H - 1) * W + x.clamp(0, W - 1)
            corner_value = value[image, index, head]  # (B, Q, M, P, D)
            # bilinear interpolation: (1 - |distance in x|) * (1 - |distance in y|)
            closeness = (1 - (point - cell).abs()) * inside[..., None]  # (B, Q, M, P, 2)
            fraction = closeness.prod(-1)
            grad_fraction = weight * (corner_value * grad).sum(-1)

            grad_weights[:, :, :, level] += fraction * (corner_value * grad).sum(-1)
            # the fraction rises toward the corner, in x as fast as it is close in y
            slope = (2 * torch.tensor(corner) - 1) * closeness.flip(-1) * size
            grad_locations[:, :, :, level] += grad_fraction[..., None] * slope
            indices = (image.expand_as(index), index, head.expand_as(index))
            update = (fraction * weight)[..., None] * grad
            grad_value.index_put_(indices, update, accumulate=True)
        start += H * W
    return grad_value, grad_locations, grad_weights
"""

ROTATION = """

class Rotation(ClassTask):
    rotates = True

    def __init__(self, **config):
        super().__init__(num_outputs=3, **config)

    def turn(self, rng, patches, grid):
        places = choose_patches(rng, patches, self.ratio)
        return places, rng.integers(1, 4, len(places))

    def target(self, images, corruption):  # patches that are not turned do not count
        return (corruption.quarter_turns - 1).clamp(min=0).unflatten(1, corruption.grid)


TASKS["rotation"] = Rotation
"""

MOBILENET = """

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

COUNTED_ALL = "return corruption.inside\n"
TURNS = "rng.integers(1, 4, len(places))"
ROTATION_TARGET = "(corruption.quarter_turns - 1).clamp(min=0)"

# (exercise, correct code, code that is wrong but looks right)
WRONG_SOLUTIONS = [
    ("inverted", COUNTED_ALL, "return corruption.changed()\n"),
    ("inverted", COUNTED_ALL, "return torch.ones_like(corruption.inside)\n"),
    ("inverted", COUNTED_ALL, "return corruption.inside & corruption.changed()\n"),
    ("rotation", TURNS, "rng.integers(1, 2, len(places))"),
    ("rotation", ROTATION_TARGET, "corruption.quarter_turns.clamp(max=1)"),
]

# exercises whose checks pass until course/exercise.py has prepared them
PREPARED = {"matcher", "schedule", "operator", "inverted"}


@pytest.fixture
def project(tmp_path):
    """A copy of the project, without its git history."""
    ignore = shutil.ignore_patterns(".*", "runs", "data", "__pycache__", "docs")
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)


def check(project, exercise=""):
    """Run the checks of the exercises, or of one: {exercise: True if all its checks passed}."""
    command = [sys.executable, "-m", "pytest", "course", "-q", "-rA", "-p", "no:cacheprovider"]
    if exercise:
        command += ["-k", exercise]
    output = subprocess.run(command, cwd=project, capture_output=True, text=True).stdout
    passed = {}
    for result, name in re.findall(r"^(\w+) course/test_exercises.py::test_(\w+)", output, re.M):
        passed[name] = passed.get(name, True) and result == "PASSED"
    return passed


def prepare(project, exercise):
    command = [sys.executable, "course/exercise.py", exercise]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_exercises_are_red_before(project):
    passed = check(project)
    text = (project / "COURSE.md").read_text(encoding="utf-8")
    assert passed.keys() == set(re.findall(r"^\*\*`(\w+)`\*\*", text, re.M))
    assert {name for name in passed if passed[name]} == PREPARED
    for exercise in PREPARED:
        assert prepare(project, exercise).returncode == 0
    assert not any(check(project).values())


def test_solutions_are_green(project):
    (project / "course/answers.py").write_text(ANSWERS, encoding="utf-8")
    for file, solution in (("ssl_tasks.py", ROTATION), ("detr.py", MOBILENET)):
        code = (project / file).read_text(encoding="utf-8")
        (project / file).write_text(code + solution, encoding="utf-8")
    assert all(check(project).values())

    code = (project / "ssl_tasks.py").read_text(encoding="utf-8")
    for exercise, correct, wrong in WRONG_SOLUTIONS:
        assert code.count(correct) == 1
        (project / "ssl_tasks.py").write_text(code.replace(correct, wrong), encoding="utf-8")
        assert check(project, exercise) == {exercise: False}, wrong


def test_an_exercise_cannot_be_prepared(project):
    assert prepare(project, "matchmaker").stderr == (
        "error: unknown exercise 'matchmaker'; choose from matcher, schedule, operator, inverted\n"
    )
    prepare(project, "matcher")
    again = prepare(project, "matcher")
    assert again.returncode == 1
    assert "detr.py does not contain the code" in again.stderr


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_uncommitted_changes_are_kept(project):
    for command in (["init"], ["add", "."]):
        subprocess.run(["git", *command], cwd=project, capture_output=True, check=True)
    (project / "detr.py").write_text("# mine\n", encoding="utf-8")
    process = prepare(project, "matcher")
    assert process.returncode == 1
    assert "detr.py has uncommitted changes" in process.stderr
    assert (project / "detr.py").read_text(encoding="utf-8") == "# mine\n"
