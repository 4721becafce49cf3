"""Whole command lines on a GPU give what they give on the CPU, to rounding."""

import json
from unittest.mock import Mock

import PIL.Image
import pytest
import torch
from test_checkpoint import TINY, log_of

import train
from eval import main as eval_main
from tools import attention, predict

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
RUNS = (
    "--model deformable_detr",
    "--model detr --dilation",
    "--model deformable_detr --two_stage --accumulate 2",
    "--model deformable_detr --setting multitask --ssl_task jigsaw-discrete --ssl_patch 16",
    "--model detr --dilation --setting multitask --ssl_task mim-discrete --ssl_on image",
    "--model detr --dilation --setting pretrain --ssl_task mim-continuous --ssl_patch 16",
)


def trained(out, flags, device):
    """The log of a short run."""
    train.main([*TINY, "--amp", "no", *flags.split(), "--device", device, "--out", str(out)])
    return log_of(out)


@pytest.mark.parametrize("flags", RUNS)
def test_a_run_is_the_same_on_the_gpu(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    logs = (trained(tmp_path / device, f"{flags} --epochs 2", device) for device in ("cuda", "cpu"))
    ours, theirs = ([line["train_loss"] for line in log] for log in logs)
    assert ours == pytest.approx(theirs, rel=0.02)
    assert (tmp_path / "cuda" / "curves.png").stat().st_size > 0


@pytest.mark.parametrize("flags", RUNS[:2])
def test_a_run_goes_on_and_is_evaluated(tmp_path, flags, monkeypatch):
    run, flags, found = tmp_path / "run", f"{flags} --epochs 2 --amp bf16", []
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit):  # after the first epoch
        trained(run, flags, "cuda")
    monkeypatch.undo()
    whole = trained(run, f"{flags} --resume", "cuda")
    assert len(whole) == 2
    assert all(0 < line["train_loss"] < 100 for line in whole)
    for device in ("cuda", "cpu"):
        eval_main([str(run), "--device", device])
        found.append(json.loads((run / "metrics.json").read_text(encoding="utf-8")))
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], rel=0.01)
    scene = tmp_path / "scene.png"
    PIL.Image.effect_noise((100, 80), 60).save(scene)
    predict.main([str(run), str(scene), "--device", "cuda"])
    assert (run / "predictions" / "predictions.json").exists()
    attention.main([str(run), "--device", "cuda"])
    assert list(run.glob("attention*.png"))
