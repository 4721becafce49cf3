"""The backbones of the experiment `leaks` hide what they should hide."""

import pytest
import torch

import detr
from results.leaks import backbones, train


@torch.no_grad()
@pytest.mark.parametrize("name, moves", [("resnet18-circular", True), ("resnet18", False)])
def test_circular_maps_move_with_the_image(name, moves):
    """Nothing marks a border: a shift of the image by whole cells shifts the maps, no more."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    moved_images = images.roll((32, 64), (2, 3))
    cnn = detr.build_backbone(name, 3, False, False, None).eval()
    for x, moved, stride in zip(cnn(images), cnn(moved_images), cnn.strides):
        expected = x.roll((32 // stride, 64 // stride), (2, 3))
        assert torch.allclose(moved, expected, atol=1e-5) == moves


@torch.no_grad()
def test_patches_are_seen_one_by_one():
    torch.manual_seed(0)
    cnn = backbones.PatchesBackbone("resnet18-patches", 3, False, False, None).eval()
    images = torch.randn(2, 3, 64, 96)
    changed = torch.cat([images[..., :32], torch.randn(2, 3, 64, 64)], 3)  # but for one column
    one_patch = images[..., 32:64, :32]
    for x, y, alone, stride in zip(cnn(images), cnn(changed), cnn(one_patch), cnn.strides):
        n = 32 // stride  # cells per side of a patch
        assert x.shape == (2, alone.shape[1], 64 // stride, 96 // stride)
        assert torch.allclose(x[..., :n], y[..., :n], atol=1e-5)
        assert torch.allclose(x[..., n:, :n], alone, atol=1e-5)
        assert not torch.allclose(x[..., n:], y[..., n:], atol=1e-2)
    odd = cnn(images[..., :50, :70])
    assert [x.shape[2:] for x in odd] == [(7, 9), (4, 5), (2, 3)]


def test_trains_detr_and_refuses_deformable_detr(tmp_path):
    flags = "--backbone resnet18-patches --hidden_dim 32 --nheads 4 --enc_layers 1 --dec_layers 1 "
    flags += "--image_size 64 --limit_train 4 --limit_val 2 --batch_size 2 --epochs 1 "
    flags += f"--workers 0 --out {tmp_path}/run"
    with pytest.raises(SystemExit, match="'resnet18-patches' is only meaningful with DETR"):
        train.main(flags.split())
    assert not (tmp_path / "run").exists()
    train.main([*flags.split(), "--model", "detr"])
    assert (tmp_path / "run" / "best.pt").exists()
