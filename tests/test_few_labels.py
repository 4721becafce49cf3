"""The measurements of encoders in results/few_labels."""

import json
from unittest.mock import Mock

import pytest
import torch

import train
from results.few_labels import why
from util import plots

TINY = "--model detr --dilation --image_size 64 --limit_train 8 --limit_val 6 --batch_size 4"
TINY += " --hidden_dim 16 --nheads 2 --enc_layers 1 --dec_layers 1 --dim_feedforward 16"
TINY += " --num_queries 4 --epochs 1 --amp no"


def test_spread():
    """It is 0 if the cells of an image are equal, and 1 if the images have equal means."""
    generator = torch.Generator().manual_seed(0)
    per_image = torch.randn(30, 1, 8, generator=generator, dtype=torch.double)
    per_cell = torch.randn(30, 16, 8, generator=generator, dtype=torch.double)
    per_cell = per_cell - per_cell.mean(1, keepdim=True)
    assert why.spread_within_images(per_image.expand(-1, 16, -1)) == pytest.approx(0, abs=1e-9)
    assert why.spread_within_images(per_cell) == pytest.approx(1)
    per_image = per_image / per_image.std((0, 1), correction=0)
    per_cell = per_cell / per_cell.std((0, 1), correction=0)
    # 4 parts of the variance are within the images, 1 is between them
    assert why.spread_within_images(per_image + 2 * per_cell) == pytest.approx((4 / 5) ** 0.5)


def test_effective_rank():
    """Equal variances in k directions have rank k, also after a rotation and a shift."""
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double))
    corners = torch.cat([torch.eye(6), -torch.eye(6)]).double()  # (12, 6)
    for k in (1, 2, 5):
        directions = corners.clone()
        directions[:, k:] = 0
        memory = (directions @ basis + 3).reshape(3, 4, 6)
        assert why.effective_rank(memory) == pytest.approx(k)


def test_cka():
    """By its definition from the two Gram matrices; 1 for a rotated, scaled and shifted memory."""
    x = torch.randn(5, 4, 6, dtype=torch.double)
    y = torch.randn(5, 4, 3, dtype=torch.double) + x[..., :3]
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double))
    assert why.linear_cka(x, 2 * x @ rotation + 1) == pytest.approx(1)
    center = torch.eye(20, dtype=torch.double) - 1 / 20
    gram_x = center @ x.reshape(20, 6) @ x.reshape(20, 6).T @ center
    gram_y = center @ y.reshape(20, 3) @ y.reshape(20, 3).T @ center
    expected = (gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())
    assert why.linear_cka(x, y) == pytest.approx(expected.item())
    assert 0 < why.linear_cka(x, y) < 1


def test_a_seed_is_measured_and_drawn(tmp_path, capsys, monkeypatch):
    runs = tmp_path / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw_curves", Mock())  # for time
        train.main(f"{TINY} --seed 3 --out {runs}/detr-long-1000-3".split())
        for task in why.TASKS:
            flags = f"{TINY} --setting pretrain --ssl_on image --ssl_task {task} --vocab_size 4"
            train.main(f"{flags} --seed 3 --out {runs}/detr-pretrain-{task}-3".split())
    capsys.readouterr()
    why.main(f"--seeds 3 --runs {runs} --out {tmp_path}/why".split())
    printed = capsys.readouterr().out
    encoders = json.loads((tmp_path / "why/3.json").read_text())["encoders"]
    assert list(encoders) == why.ENCODERS
    assert encoders["trained"]["cka"] == pytest.approx(1)
    for name, measured in encoders.items():
        assert 0 < measured["spread"] <= 1
        assert 1 <= measured["rank"] <= 16
        assert f"{name:20}" in printed
    assert len(encoders["random"]["similarities"]) == 16  # 4 x 4 cells
    for task in why.TASKS:
        assert (tmp_path / f"why/{task}.png").stat().st_size > 1000
    # the initial weights are those that the run began with: a run without a step keeps them
    trained = why.load_run(runs / "detr-long-1000-3", "cpu")
    first = why.initial_model(trained).state_dict()
    again = why.initial_model(trained).state_dict()
    name = "transformer.encoder.layers.0.linear1.weight"
    assert torch.equal(first[name], again[name])
    change = (trained.model.state_dict()[name] - first[name]).abs().max()
    assert 0 < change < 0.02  # a few steps of at most the learning rate each
    with pytest.raises(SystemExit, match="no measurements found"):
        why.main(["--out", str(tmp_path / "empty")])
