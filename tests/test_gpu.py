"""Whole commands on a GPU give the same results as on the CPU, to rounding."""

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
    "--model deformable_detr --two_stage --grad_accum_steps 2",
    "--model deformable_detr --setting multitask --ssl_task jigsaw-discrete --ssl_patch 16",
    "--model detr --dilation --setting multitask --ssl_task mim-discrete --ssl_on image",
    "--model detr --dilation --setting pretrain --ssl_task mim-continuous --ssl_patch 16",
)


def train_run(out, flags, device):
    """Train briefly and return the lines of the log."""
    train.main([*TINY, "--amp", "no", *flags.split(), "--device", device, "--out", str(out)])
    return log_of(out)


@pytest.mark.parametrize("flags", RUNS)
def test_a_run_is_the_same_on_the_gpu(tmp_path, flags, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    gpu_log = train_run(tmp_path / "cuda", f"{flags} --epochs 2", "cuda")
    cpu_log = train_run(tmp_path / "cpu", f"{flags} --epochs 2", "cpu")
    gpu_losses = [line["train_loss"] for line in gpu_log]
    cpu_losses = [line["train_loss"] for line in cpu_log]
    assert gpu_losses == pytest.approx(cpu_losses, rel=0.02)
    assert (tmp_path / "cuda" / "curves.png").stat().st_size > 0


@pytest.mark.parametrize("flags", RUNS)
def test_fp16_is_near_fp32(tmp_path, flags):
    """After the steps that are skipped until the scaler has found a factor for the loss."""
    flags += " --limit_train 100 --epochs 3"
    log = train_run(tmp_path / "fp32", flags, "cuda")
    half_log = train_run(tmp_path / "fp16", f"{flags} --amp fp16", "cuda")
    assert half_log[0].get("skipped_steps", 0) < 12
    assert "skipped_steps" not in half_log[-1]
    assert half_log[-1]["train_loss"] < half_log[0]["train_loss"]
    assert half_log[-1]["train_loss"] == pytest.approx(log[-1]["train_loss"], rel=0.1)


@pytest.mark.parametrize("amp", train.AMP_DTYPES)
@pytest.mark.parametrize("flags", RUNS[:2])
def test_a_run_is_resumed_and_evaluated(tmp_path, flags, amp, monkeypatch):
    run = tmp_path / "run"
    flags = f"{flags} --epochs 2 --amp {amp}"
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit):  # after the first epoch
        train_run(run, flags, "cuda")
    monkeypatch.undo()
    log = train_run(run, f"{flags} --resume", "cuda")
    assert len(log) == 2
    for line in log:
        assert 0 < line["train_loss"] < 100
    val_losses = []
    for device in ("cuda", "cpu"):
        eval_main([str(run), "--device", device])
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        val_losses.append(metrics["val_loss"])
    assert val_losses[0] == pytest.approx(val_losses[1], rel=0.01)
    scene = tmp_path / "scene.png"
    PIL.Image.effect_noise((100, 80), 60).save(scene)
    predict.main([str(run), str(scene), "--device", "cuda"])
    assert (run / "predictions" / "predictions.json").exists()
    attention.main([str(run), "--device", "cuda"])
    assert list(run.glob("attention*.png"))
