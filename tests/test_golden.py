"""Outputs, matches, losses, gradients and detections against those of the official code."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from golden import fill

import detr

FILES = sorted(Path(__file__).with_name("golden").glob("*.npz"))
NAMES = {"detr": "detr", "deformable": "deformable_detr"}  # in the files -> in build_detector


class Case(NamedTuple):
    golden: dict  # the official values
    model: detr.Detector  # with the same weights
    outputs: dict  # of the model
    targets: list


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request):
    golden = fill.load(request.param)
    config = golden["config"]
    model = detr.build_detector(NAMES[config.pop("model")], **config).eval()
    state = {name: torch.zeros(shape) for name, shape in golden["state"].items()}
    fill.fill(state)
    model.load_state_dict(state, strict=True)
    images, padding = fill.images()
    return Case(golden, model, model(images, padding), fill.targets(config["num_classes"]))


def test_there_are_seven():
    assert len(FILES) == 7


def test_outputs(case):
    expected = {}
    for name in ("logits", "boxes"):
        last = case.golden[f"pred_{name}"]
        expected[name] = torch.cat([case.golden[f"aux_{name}"], last[None]])
    for name in ("logits", "boxes"):
        if f"enc_{name}" in case.golden:
            expected[f"proposal_{name}"] = case.golden[f"enc_{name}"]
    torch.testing.assert_close(case.outputs, expected, rtol=1e-4, atol=1e-4)


def test_matches(case):
    counts = [len(target["labels"]) for target in case.targets]
    labels, boxes = detr.pad_targets(case.targets, "cpu")
    layer, image, query, obj = case.model.criterion.match(
        case.outputs["logits"], case.outputs["boxes"], labels, boxes, counts
    )
    last_layer = layer == len(case.outputs["logits"]) - 1
    for i in range(len(case.targets)):
        pairs = last_layer & (image == i)
        assert query[pairs].tolist() == case.golden[f"match_src_{i}"].tolist()
        assert obj[pairs].tolist() == case.golden[f"match_tgt_{i}"].tolist()


def official_names(losses):
    """Return {official name: value}: layers are numbered, but the last one has no number."""
    named = {}
    for name, values in losses.items():
        *others, last = values.tolist()
        for i, value in enumerate(others):
            named[f"{name}_{i}"] = value
        named[name] = last
    return named


def test_losses_and_gradients(case):
    criterion = case.model.criterion
    losses = criterion(case.outputs, case.targets)
    expected_losses = {}
    for name, value in case.golden["losses"].items():
        if name.startswith("loss_"):
            expected_losses[name] = value
    assert official_names(losses) == pytest.approx(expected_losses, rel=1e-4)
    total = sum(criterion.weights[name] * loss.sum() for name, loss in losses.items())
    assert total.item() == pytest.approx(case.golden["total"].item(), rel=1e-4)

    total.backward()
    norms = {}
    for name, parameter in case.model.named_parameters():
        if parameter.grad is not None:
            norms[name] = parameter.grad.norm().item()
    expected_norms = case.golden["grad_norms"]
    assert norms.keys() == expected_norms.keys()
    floor = 1e-6 * max(expected_norms.values())  # norms below it are rounding errors
    tolerance = 1e-3
    if getattr(case.model, "two_stage", False):  # sensitive to rounding
        tolerance = 2e-3
    for name, expected in expected_norms.items():
        if expected > floor:
            assert norms[name] == pytest.approx(expected, rel=tolerance), name


def test_detections(case):
    detections = case.model.postprocess(case.outputs, fill.ORIGINAL_SIZES)
    for i, detection in enumerate(detections):
        assert detection["labels"].tolist() == case.golden["post_labels"][i].tolist()
        expected_scores = case.golden["post_scores"][i]
        torch.testing.assert_close(detection["scores"], expected_scores, rtol=1e-4, atol=0)
        expected_boxes = case.golden["post_boxes"][i]
        errors = (detection["boxes"] - expected_boxes).norm(dim=1)
        assert (errors <= 1e-4 * expected_boxes.norm(dim=1)).all()


def test_max_dets(case):
    """It limits sigmoid scores; with a softmax every query is one detection."""
    expected = case.outputs["boxes"].shape[2]
    if case.model.focal:
        expected = 3
    for detection in case.model.postprocess(case.outputs, fill.ORIGINAL_SIZES, max_dets=3):
        assert len(detection["boxes"]) == expected
