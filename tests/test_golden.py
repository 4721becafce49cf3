"""Outputs, matches, losses, gradients and detections against what the official code computes."""

from pathlib import Path

import pytest
import torch
from golden import fill

import detr

FILES = sorted(Path(__file__).with_name("golden").glob("*.npz"))


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request):
    """(golden values, model with their weights, its outputs, targets)."""
    golden = fill.load(request.param)
    config = golden["config"]
    name = {"detr": "detr", "deformable": "deformable_detr"}[config.pop("model")]
    model = detr.build_detector(name, **config).eval()
    state = {name: torch.zeros(shape) for name, shape in golden["state"].items()}
    fill.fill(state)
    model.load_state_dict(state, strict=True)
    return golden, model, model(*fill.images()), fill.targets(config["num_classes"])


def test_there_are_seven():
    assert len(FILES) == 7


def test_outputs(case):
    golden, _, outputs, _ = case
    expected = {}
    for name in ("logits", "boxes"):
        expected[name] = torch.cat([golden[f"aux_{name}"], golden[f"pred_{name}"][None]])
        if f"enc_{name}" in golden:
            expected[f"proposal_{name}"] = golden[f"enc_{name}"]
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)


def test_matches(case):
    golden, model, outputs, targets = case
    counts = [len(target["labels"]) for target in targets]
    arguments = outputs["logits"], outputs["boxes"], *detr.pad_targets(targets, "cpu"), counts
    layer, image, query, target = model.criterion.match(*arguments)
    for i in range(len(targets)):
        mine = (layer == len(outputs["logits"]) - 1) & (image == i)
        assert query[mine].tolist() == golden[f"match_src_{i}"].tolist()
        assert target[mine].tolist() == golden[f"match_tgt_{i}"].tolist()


def test_losses_and_gradients(case):
    golden, model, outputs, targets = case
    losses, found = model.criterion(outputs, targets), {}
    for name, values in losses.items():  # officially the last layer has no number
        names = [f"{name}_{i}" for i in range(len(values) - 1)] + [name]
        found.update(zip(names, values.tolist()))
    wanted = {name: x for name, x in golden["losses"].items() if name.startswith("loss_")}
    assert found == pytest.approx(wanted, rel=1e-4)
    total = sum(model.criterion.weights[name] * loss.sum() for name, loss in losses.items())
    assert total.item() == pytest.approx(golden["total"].item(), rel=1e-4)
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == golden["grad_norms"].keys()
    floor = 1e-6 * max(golden["grad_norms"].values())  # below it there is only rounding
    wanted = {name: norm for name, norm in golden["grad_norms"].items() if norm > floor}
    rel = 2e-3 if getattr(model, "two_stage", False) else 1e-3  # sensitive to rounding
    assert {name: grads[name].norm().item() for name in wanted} == pytest.approx(wanted, rel=rel)


def test_detections(case):
    golden, model, outputs, _ = case
    for i, found in enumerate(model.postprocess(outputs, fill.ORIGINAL_SIZES)):
        assert found["labels"].tolist() == golden["post_labels"][i].tolist()
        torch.testing.assert_close(found["scores"], golden["post_scores"][i], rtol=1e-4, atol=0)
        right = golden["post_boxes"][i]
        assert ((found["boxes"] - right).norm(dim=1) <= 1e-4 * right.norm(dim=1)).all()
    few = model.postprocess(outputs, fill.ORIGINAL_SIZES, top=3)
    assert {len(x["boxes"]) for x in few} == {3 if model.focal else outputs["boxes"].shape[2]}
