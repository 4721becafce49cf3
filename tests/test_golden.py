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


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_there_are_seven():
    assert len(FILES) == 7


def test_outputs(case):
    golden, _, outputs, _ = case
    for ours, theirs in (("logits", "logits"), ("boxes", "boxes")):
        close(outputs[ours][-1], golden[f"pred_{theirs}"])
        close(outputs[ours][:-1], golden[f"aux_{theirs}"])
        assert (f"enc_{theirs}" in golden) == (f"proposal_{ours}" in outputs)
        if f"enc_{theirs}" in golden:
            close(outputs[f"proposal_{ours}"], golden[f"enc_{theirs}"])


def test_matches(case):
    golden, model, outputs, targets = case
    padded = detr.pad_targets(targets, "cpu")
    counts = [len(target["labels"]) for target in targets]
    match = model.criterion.match(outputs["logits"], outputs["boxes"], *padded, counts)
    layer, image, query, target = match
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
    assert found == pytest.approx(
        {k: v for k, v in golden["losses"].items() if k in found}, rel=1e-4
    )
    assert found.keys() == {name for name in golden["losses"] if name.startswith("loss_")}
    total = sum(model.criterion.weights[name] * loss.sum() for name, loss in losses.items())
    assert total.item() == pytest.approx(golden["total"].item(), rel=1e-4)
    model.zero_grad()
    total.backward(retain_graph=True)
    norms = {
        name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None
    }
    assert norms.keys() == golden["grad_norms"].keys()
    largest = max(golden["grad_norms"].values())
    for name, norm in golden["grad_norms"].items():
        if norm > 1e-6 * largest:
            assert norms[name] == pytest.approx(norm, rel=1e-3), name


def test_detections(case):
    golden, model, outputs, _ = case
    for i, found in enumerate(model.postprocess(outputs, fill.ORIGINAL_SIZES)):
        assert found["labels"].tolist() == golden["post_labels"][i].tolist()
        torch.testing.assert_close(found["scores"], golden["post_scores"][i], rtol=1e-4, atol=0)
        right = golden["post_boxes"][i]
        assert ((found["boxes"] - right).norm(dim=1) <= 1e-4 * right.norm(dim=1)).all()
