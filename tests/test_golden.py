"""Outputs, matches, losses, gradients and detections against what the official code computes."""
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import detr

SHARED = Path(__file__).resolve().parents[2] / "shared"
NAMES = ["detr_r50", "detr_r50_dc5", "deformable_detr_r50", "deformable_detr_r50_single_scale",
         "deformable_detr_r50_single_scale_dc5", "deformable_detr_r50_refine", "deformable_detr_r50_two_stage"]

pytestmark = pytest.mark.skipif(not (SHARED / "data/golden").is_dir(), reason="the golden files are not on this machine")


@pytest.fixture(scope="module")
def tools():
    spec = importlib.util.spec_from_file_location("golden", SHARED / "tools/golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=NAMES)
def case(request, tools):
    """(golden values, model with their weights, its outputs, targets)."""
    golden = tools.load(SHARED / f"data/golden/{request.param}.npz")
    config = golden["config"]
    name = {"detr": "detr", "deformable": "deformable_detr"}[config.pop("model")]
    model = detr.build_detector(name, **config).eval()
    state = {name: torch.zeros(shape) for name, shape in golden["state"].items()}
    tools.fill(state)
    model.load_state_dict(state, strict=True)
    images, padding = tools.images()
    return golden, model, model(images, padding), tools.targets(config["num_classes"])


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_outputs(case):
    golden, _, outputs, _ = case
    close(outputs["logits"][-1], golden["pred_logits"])
    close(outputs["boxes"][-1], golden["pred_boxes"])
    close(outputs["logits"][:-1], golden["aux_logits"])
    close(outputs["boxes"][:-1], golden["aux_boxes"])
    assert ("enc_logits" in golden) == ("proposal_logits" in outputs)
    if "enc_logits" in golden:
        close(outputs["proposal_logits"], golden["enc_logits"])
        close(outputs["proposal_boxes"], golden["enc_boxes"])


def test_matches(case):
    golden, model, outputs, targets = case
    labels, boxes = (pad_sequence([t[k] for t in targets], batch_first=True) for k in ("labels", "boxes"))
    layer, image, query, target = detr.match(outputs["logits"], outputs["boxes"], labels, boxes,
                                             [len(t["labels"]) for t in targets], model.focal)
    for i in range(len(targets)):
        mine = (layer == len(outputs["logits"]) - 1) & (image == i)
        assert query[mine].tolist() == golden[f"match_src_{i}"].tolist()
        assert target[mine].tolist() == golden[f"match_tgt_{i}"].tolist()


def test_losses_and_gradients(case):
    golden, model, outputs, targets = case
    losses = detr.detection_losses(outputs, targets, model.focal)
    compared = 0
    for name, values in losses.items():
        if name.endswith("_enc"):
            names = [name]
        else:  # the official code counts auxiliary layers from 0 and leaves the last one without a number
            names = [f"{name}_{i}" for i in range(len(values) - 1)] + [name]
        for official, value in zip(names, values):
            assert value.item() == pytest.approx(golden["losses"][official], rel=1e-4)
            compared += 1
    assert compared == sum(name.startswith("loss_") for name in golden["losses"])
    total = detr.total_loss(losses, detr.loss_weights(model.focal))
    assert total.item() == pytest.approx(golden["total"].item(), rel=1e-4)

    model.zero_grad()
    total.backward(retain_graph=True)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == golden["grad_norms"].keys()
    largest = max(golden["grad_norms"].values())
    for name, norm in golden["grad_norms"].items():
        if norm > 1e-6 * largest:
            assert norms[name] == pytest.approx(norm, rel=1e-3), name


def test_detections(case, tools):
    golden, model, outputs, _ = case
    found = detr.detections(outputs, tools.ORIGINAL_SIZES, model.focal)
    for i, detection in enumerate(found):
        assert detection["labels"].tolist() == golden["post_labels"][i].tolist()
        torch.testing.assert_close(detection["scores"], golden["post_scores"][i], rtol=1e-4, atol=0)
        difference = (detection["boxes"] - golden["post_boxes"][i]).norm(dim=1)  # of whole boxes: a corner may be at 0
        assert (difference <= 1e-4 * golden["post_boxes"][i].norm(dim=1)).all()
