"""Training by its real command lines: what a run writes, computes and prints; its processes."""

import ast
import functools
import graphlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
import torchvision
from test_checkpoint import ROOT, TINY, Command, log_of, same_run

import detr
import isaid
import train
from eval import METRICS
from util import checkpoint, cli, distributed, plots, synthetic
from util.cli import cli_main
from util.weights import PARTS, part_of

MULTITASK = "--setting multitask --ssl_weight 3".split()


def prepared(flags):
    """Return (run, its flags, its images, its first batch) before the first step."""
    args, _ = train.parse(TINY + ["--out", "none", "--amp", "no"] + flags)
    train_set, _ = isaid.load_train_and_val(args)
    run = train.build_run(args, train_set)
    train.set_train_mode(run.model, args)
    if args.amp == "fp16":  # the backward pass of convolutions is very slow on CPUs
        run.model.backbone.requires_grad_(False)
    batch = next(iter(isaid.epoch_loader(train_set, args, 1)))
    return run, args, train_set, batch


def built(flags):
    """Return the run that these flags build, before its first step."""
    run, _, _, _ = prepared(flags)
    return run


def record_calls(monkeypatch, methods):
    """Watch methods, given as (object or None, name); return {name: its calls}."""
    calls = {}
    for owner, name in methods:
        if owner is None:
            calls[name] = []
            continue
        spy = Mock(wraps=getattr(owner, name))
        monkeypatch.setattr(owner, name, spy)
        calls[name] = spy.call_args_list
    return calls


def gradients(run):
    """Return {name: gradient or None} of the model and the task."""
    parameters = list(run.model.named_parameters())
    if run.task:
        parameters += run.task.named_parameters()
    return {name: parameter.grad for name, parameter in parameters}


class StepReached(Exception):
    """The loop is about to clip its gradients."""


def gradients_of_a_step(run, args, batches):
    """Return what the loop hands to the optimizer in its first step, with these batches."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StepReached):
        patch.setattr(isaid, "epoch_loader", lambda *_: batches)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", Mock(side_effect=StepReached))
        train.train(run, None, None, args)
    return gradients(run)


# ---------------------------------------------------------------- a run
class TwinRuns(NamedTuple):
    """Two runs with the same seed."""

    out: Path  # of the run with two loader processes
    printed: str  # by that run
    twin_out: Path  # of the run without loader processes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The folder of a small dataset."""
    folder = tmp_path_factory.mktemp("dataset") / "data"
    isaid.write_scenes(folder, {"train": 8, "val": 3}, 64, seed=0)
    return folder


@pytest.fixture(scope="module")
def twin_runs(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("runs")
    flags = TINY + ["--data", dataset]
    flags += "--epochs 2 --dropout 0.1 --augment aerial --ssl_weight 3".split()
    commands = {}
    for workers in ("2", "0"):
        run_flags = ["--workers", workers, "--out", folder / workers]
        commands[workers] = Command(folder, "train.py", flags + run_flags)
    commands["0"].end()
    printed, _ = commands["2"].end()
    return TwinRuns(folder / "2", printed, folder / "0")


@pytest.fixture(scope="module")
def run(twin_runs):
    """The folder of a run."""
    return twin_runs.out


def test_loader_processes_change_nothing(twin_runs):
    same_run(twin_runs.out, twin_runs.twin_out)


def test_files_of_a_run(run):
    files = "best.pt config.json curves.png detections.png last.pt log.jsonl"
    assert sorted(path.name for path in run.iterdir()) == files.split()
    config = json.loads((run / "config.json").read_bytes())
    assert config["args"]["hidden_dim"] == 32
    assert config["versions"]["torch"] == torch.__version__

    last = torch.load(run / "last.pt")
    best = torch.load(run / "best.pt")
    _, best_epoch = max((line["ap"], line["epoch"]) for line in log_of(run))
    assert best["epoch"] == best_epoch
    assert [category["name"] for category in best["categories"]] == list(synthetic.CLASSES)
    assert last["schedule"]["last_epoch"] == 4  # it advanced with every step
    assert "optimizer" in last
    assert best.keys() < last.keys() - {"optimizer"}


def test_log_of_a_run(run):
    log = log_of(run)
    assert [line["epoch"] for line in log] == [1, 2]
    terms = {"train_loss_ce", "train_loss_bbox", "train_loss_giou"}
    times = {"seconds", "data_wait", "images_per_second", "eval_seconds"}
    others = {"train_loss", "val_loss", "epoch", "collapsed"}
    assert log[0].keys() == terms | times | others | set(METRICS)
    for line in log:
        assert sum(line[name] for name in terms) == pytest.approx(line["train_loss"])
        assert 0 <= line["data_wait"] <= 1
        assert 0 <= line["ap"] <= 1


def test_a_run_prints_its_configuration(twin_runs):
    config = json.loads((twin_runs.out / "config.json").read_bytes())
    assert f"on {config['versions']['device']}\n" in twin_runs.printed
    texts = [
        r"run +\S+/2, seed 0, revision \w+",
        r"model +.*, resnet18, 11\.2 M trainable parameters",
        r"ignored +--ssl_weight\n",
        r"attention +(cpu|torch): \S+",
        r"train .*: 8 images",
        "4 images per step, 2 steps per epoch, 2 epochs: 16 images in total",
        r"epoch   1/2  loss \d+",
    ]
    for number, name in enumerate(synthetic.CLASSES, 1):
        texts.append(f"[ ,]{number} {name} ")
    for text in texts:
        assert re.search(text, twin_runs.printed), text


LEARNING = [
    "--model detr",
    "--num_feature_levels 1",
    "--two_stage",
    "--no-with_box_refine",
    "--lr_drop 6",
    "--setting multitask --ssl_task mim-discrete --vocab_size 4",
]


@pytest.mark.parametrize("flags", LEARNING)
def test_the_loss_falls(flags, tmp_path, monkeypatch):
    """It falls with every step on the same four scenes, by more than a seventh in twelve."""
    monkeypatch.setattr(checkpoint, "save", Mock())  # for time
    monkeypatch.setattr(plots, "draw_curves", Mock())
    flags += " --limit_train 4 --epochs 12 --eval_every 12 --augment none --clip_max_norm 9"
    flags += f" --lr 2e-3 --lr_backbone 2e-3 --out {tmp_path}/run"
    train.main(TINY + flags.split())
    log = log_of(tmp_path / "run")
    losses = [line["train_loss"] for line in log]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] * 6 / 7
    assert [line["epoch"] for line in log if "ap" in line] == [12]


def test_overfitting_four_scenes(tmp_path):
    """The smoke test of the README, with a model that learns them faster."""
    flags = "--overfit 4 --epochs 2 --image_size 64 --hidden_dim 256 --enc_layers 1 --dec_layers 2"
    flags += f" --num_queries 10 --clip_max_norm 9 --lr 1e-3 --lr_backbone 1e-3 --out {tmp_path}/a"
    train.main(flags.split())
    assert log_of(tmp_path / "a")[-1]["ap"] > 0.9


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, kind in (("", "detect"), ("--setting pretrain", "pretrain-mim-continuous")):
        for number in (1, 2, 3):
            args, _ = train.parse(flags.split())
            run_folder = checkpoint.make_run_folder(args)
            assert run_folder == f"runs/deformable_detr-{kind}-{number}"

    names = iter(["runs/deformable_detr-detect-3", "runs/deformable_detr-detect-4"])
    monkeypatch.setattr(checkpoint, "next_run_folder", lambda _: Path(next(names)))
    args, _ = train.parse([])  # another process has made number 3 just now
    assert checkpoint.make_run_folder(args) == "runs/deformable_detr-detect-4"


def parameter_shapes(model):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name, lr", [("detr", 1e-4), ("deformable_detr", 2e-4)])
def test_recipes_have_the_official_models_and_rates(name, lr):
    args, unused = train.parse([f"@{ROOT}/recipes/{name}.txt"])
    official = detr.build_detector(name, num_classes=15)
    model = detr.build_detector(**train.detector_config(args, 15))
    assert parameter_shapes(model) == parameter_shapes(official)
    assert not unused
    assert args.backbone_weights == "imagenet"
    assert args.frozen_bn
    assert args.epochs == 50
    assert args.lr_schedule == "step"
    assert args.lr_drop == 40
    assert args.weight_decay == 1e-4
    assert args.clip_max_norm == 0.1

    rates = {}
    for group in train.build_optimizer(model, None, args).param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in rates, name
        elif re.search(r"backbone\.0|reference_points|sampling_offsets", name):
            assert rates[id(parameter)] == pytest.approx(lr / 10), name
        else:
            assert rates[id(parameter)] == pytest.approx(lr), name


# ---------------------------------------------------------------- initial weights
def test_imagenet_weights(tmp_path, monkeypatch):
    """Torchvision's file is cached or downloaded; offline one line says what to do."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=URLError("offline")))
    flags = ["--backbone_weights", "imagenet"]
    file = f"{tmp_path}/checkpoints/resnet18-f37072fd.pth"
    message = r"error: https://download.pytorch.org/models/resnet18-f37072fd.pth: download failed "
    with pytest.raises(
        SystemExit, match=rf"^{message}\(.*offline.*\); .* this file yourself as {file}$"
    ):
        train.main(TINY + flags)
    Path(file).write_text("<html>Please sign in")
    with pytest.raises(SystemExit, match=f"^error: {file}: is a web page, .*; delete this file to"):
        train.main(TINY + flags)

    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), file)
    for flag, is_trained in (("--frozen_bn", False), ("--no-frozen_bn", True)):
        body = built(flags + [flag]).model.backbone[0].body
        assert torch.equal(body.layer3[1].conv2.weight, resnet.layer3[1].conv2.weight)
        assert body.conv1.weight.requires_grad == is_trained


def test_init_of_a_run_with_other_classes(run, monkeypatch):
    """All parts are loaded, or those that are named; class heads are dropped and listed."""
    thing = {"id": 16, "name": "thing"}
    monkeypatch.setattr(synthetic, "CATEGORIES", synthetic.CATEGORIES + [thing])
    before = torch.load(run / "best.pt")["model"]
    heads = "class_embed.0.weight, class_embed.0.bias, class_embed.1.weight, class_embed.1.bias"
    all_but_heads = f"; re-initialized (missing, or different number of classes): {heads}"
    for parts, flags, note in (
        (PARTS, [], all_but_heads),
        (["encoder"], ["--init_parts", "encoder"], ""),
    ):
        new_run = built(["--init", str(run)] + flags)
        assert new_run.notes["init"] == f"{' and '.join(parts)} from {run}{note}"
        for name, x in new_run.model.state_dict().items():
            if "class_embed" not in name and x.dim() > 1:  # norms start at the same values anyway
                assert torch.equal(x, before[name]) == (part_of(name) in parts), name
    assert new_run.metadata["categories"][15:] == [thing]


def test_init_from_two_sources(run, tmp_path):
    """Each part comes from the last --init that contains it, as the first line says."""
    state = torch.load(run / "best.pt")
    first = state["model"]
    second = {name: torch.full_like(x, 7) for name, x in first.items()}
    other = tmp_path / "other.pt"
    torch.save({**state, "model": second}, other)
    flags = f"--init {run} --init_parts backbone encoder --init {other} --init_parts encoder"
    new_run = built(flags.split())
    assert new_run.notes["init"] == f"backbone from {run}; encoder from {other}"
    for name, x in new_run.model.state_dict().items():
        part = part_of(name)
        if x.dim() > 1:  # the decoder is of neither
            assert torch.equal(x, first[name]) == (part == "backbone"), name
            assert torch.equal(x, second[name]) == (part == "encoder"), name
        elif part == "backbone":
            assert torch.equal(x, first[name]), name
        elif part == "encoder":
            assert torch.equal(x, second[name]), name


def test_init_parts_must_follow_their_init(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse(["--init_parts", "encoder", "--init", str(run)])
    assert "--init_parts must follow the --init" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train.parse(f"--init {run} --init_parts encoder --init_parts backbone".split())
    assert f"--init_parts given twice for {run}; list all" in capsys.readouterr().err


def test_init_from_a_checkpoint_that_does_not_fit(run, tmp_path):
    state = torch.load(run / "best.pt")
    backbone = {name: x for name, x in state["model"].items() if part_of(name) == "backbone"}
    path = tmp_path / "backbone.pt"
    torch.save({**state, "model": backbone}, path)
    for flags, message in (
        (f"--model detr --init {run}", "is a deformable_detr checkpoint; detr can load only"),
        (f"--init {path} --init_parts decoder", "no weights for decoder; the checkpoint contains"),
    ):
        with pytest.raises(ValueError, match=message):
            built(flags.split())


def test_frozen_parts_do_not_change(run, tmp_path):
    """Not by a bit, batch statistics included; the optimizer holds only the other parameters."""
    flags = f"--init {run} --freeze backbone encoder --epochs 1 --out {tmp_path}/run"
    train.main(TINY + MULTITASK + flags.split())
    before = torch.load(run / "best.pt")
    after = torch.load(tmp_path / "run/last.pt")
    changed_parts = set()
    for name, x in before["model"].items():
        if not torch.equal(x, after["model"][name]):
            changed_parts.add(part_of(name))
    assert changed_parts == {"decoder"}

    model = detr.build_detector(**after["detector"])
    parts = [part_of(name) for name, _ in model.named_parameters()]
    num_optimized = sum(len(group["params"]) for group in after["optimizer"]["param_groups"])
    assert num_optimized == parts.count("decoder") + len(after["task_state"])


# ---------------------------------------------------------------- flags and mistakes
OVERRIDES = """
@{root}/recipes/detr.txt --model deformable_detr |
@{root}/recipes/deformable_detr.txt --lr_linear_proj_mult 2 --two_stage --model detr | \
num_feature_levels with_box_refine lr_linear_proj_mult two_stage
@{root}/recipes/detr.txt --lr_schedule cosine |
@{root}/recipes/detr.txt --lr_drop 7 |
--lr_drop 7 --lr_schedule linear | lr_drop
--model detr --two_stage --attn torch --ssl_patch 8 --ssl_on image | \
two_stage attn_backend ssl_patch ssl_on
--setting pretrain --ssl_ratio 0.3 --num_queries 9 --ssl_task reconstruct | ssl_ratio num_queries
--setting pretrain --two_stage --ssl_weight 2 --dec_layers 4 | two_stage dec_layers ssl_weight
--setting multitask --ssl_loss_patches all --ssl_weight 2 --vocab_size 9 | vocab_size
--ssl_task mim-discrete --vocab_size 9 --tokenizer_weights x --setting multitask | vocab_size
--overfit 4 --limit_val 3 --augment none | augment limit_val
--init x --init_parts backbone --lr_backbone 1 --freeze backbone | lr_backbone
--init x --backbone_weights imagenet --model detr | backbone_weights
--init x --init_parts backbone --backbone_weights imagenet --model detr | backbone_weights
"""


@pytest.mark.parametrize("line", OVERRIDES.strip().splitlines())
def test_the_last_flag_counts_and_flags_without_effect_are_listed(line):
    flags, expected_unused = line.format(root=ROOT).split("|")
    args, unused = train.parse(flags.split())
    assert set(unused) == set(expected_unused.split())
    name, value = flags.split()[-2:]
    assert str(getattr(args, name.removeprefix("--"))) in (value, f"['{value}']")


OLD_SPELLINGS = {
    "--lr_drop linear": ("lr_schedule", "linear"),
    "--lr_drop cycle": ("lr_schedule", "cosine"),
    "--lr_drop 0": ("lr_schedule", "constant"),
    "--lr_drop 6": ("lr_schedule", "step"),
    "--accumulate 2": ("grad_accum_steps", 2),
    "--attn torch": ("attn_backend", "torch"),
    "--vocabulary 9": ("vocab_size", 9),
    "--ssl_loss_on all": ("ssl_loss_patches", "all"),
}


@pytest.mark.parametrize("flags", OLD_SPELLINGS)
def test_flags_of_published_commands_are_accepted(flags):
    args, _ = train.parse(flags.split())
    name, value = OLD_SPELLINGS[flags]
    assert getattr(args, name) == value
    if flags == "--lr_drop 6":
        assert args.lr_drop == 6
    else:
        assert args.lr_drop == 40


MISTAKES = """
--data nowhere | nowhere: folder not found
--out {file}/run | --out {file}/run
--batch_size 0 | --batch_size: expected a whole number of at least 1, got '0'
--lr_drop 1.5 | --lr_drop: expected a whole number of at least 1, got '1.5'
--limit_train 3 --grad_accum_steps 2 | 3 training images are fewer than one optimizer step needs
--model yolo | --model: invalid choice: 'yolo'
--hidden_dim 100 | hidden_dim (100) must be divisible by nheads
--two_stage --no-with_box_refine | two_stage requires with_box_refine
--frozen_bn --init {run} --init_parts encoder | --frozen_bn would freeze randomly initialized
--device cuda:99 | --device: device 'cuda:99' is not available
--seed -1 | --seed: expected a whole number of at least 0, got '-1'
--seed 99999999999 | --seed: expected a whole number of at least 0 and at most 4294967296, got
--lr nan | --lr: expected a number greater than 0, got 'nan'
--lr fast | --lr: expected a number greater than 0, got 'fast'
--dropout 1.5 | --dropout: expected a number of at least 0 and at most 1, got '1.5'
--image_size 32 | --image_size must be at least 64
--init {folder} | {folder}: no best.pt or last.pt found
--init {file} | {file}: not a weights-only checkpoint
--init {run} --model detr | best.pt: is a deformable_detr checkpoint
--resume | --resume requires --out
@missing.txt | missing.txt
--freeze encoder --init {run} --init_parts backbone | --freeze encoder would freeze randomly
--freeze backbone encoder decoder | --freeze leaves no trainable parameters
--setting pretrain --freeze backbone encoder | --freeze leaves no trainable parameters
--setting pretrain --ssl_patch 24 | 24
--setting pretrain --ssl_patch 64 | only 0 patches of 64 pixels
"""


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_mistakes_get_one_line(line, dataset, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("text")
    flags, message = line.format(folder=dataset, run=run, file=file).split(" | ")
    words = flags.split()
    if "@" not in flags:
        words = TINY + words
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    text = stop.value.code
    if not isinstance(text, str):
        text = capsys.readouterr().err.removesuffix("\n")
    assert text.startswith("error: ")
    assert message in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == [file]  # the error came before a run folder was made


CULPRITS = [  # and the precision
    ("the gradient", "no"),
    ("boxes", "no"),
    ("loss_ce and the gradient", "no"),
    ("boxes", "fp16"),
    ("loss_ce", "fp16"),
]


@pytest.mark.parametrize("culprit, amp", CULPRITS)
def test_nan_stops_before_the_step_with_one_line(culprit, amp, monkeypatch):
    run, args, _, batch = prepared(["--amp", amp])
    if culprit == "the gradient":
        run.model.query_embed.weight.register_hook(lambda gradient: gradient * math.nan)
    elif culprit == "boxes":
        run.model.bbox_embed[1].register_forward_hook(lambda _, x, out: out * math.nan)
    else:
        monkeypatch.setattr(detr, "sigmoid_focal_loss", lambda x, *_: x * math.nan)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    monkeypatch.setattr(isaid, "epoch_loader", lambda *_: [batch])
    images = ", ".join(target["file_name"] for target in batch[2])
    message = f"{culprit} became NaN or Inf on images {images}; training ended before the optimizer"
    with pytest.raises(SystemExit, match=f"^error: {message} step. Restart with a lower --lr$"):
        cli_main(lambda _: train.train(run, None, None, args))()
    for parameter, value in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_all_images_of_a_step_are_named_if_its_gradient_is_nan(monkeypatch):
    run, args, data, _ = prepared(["--grad_accum_steps", "2"])
    batches = list(isaid.epoch_loader(data, args, 1))
    monkeypatch.setattr(isaid, "epoch_loader", lambda *_: batches)
    run.model.query_embed.weight.register_hook(lambda gradient: gradient * math.nan)
    targets = batches[0][2] + batches[1][2]
    images = ", ".join(target["file_name"] for target in targets)
    with pytest.raises(FloatingPointError, match=f"the gradient .* on images {images};"):
        train.train(run, None, None, args)


# ---------------------------------------------------------------- the machine
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_is_too_old(device, monkeypatch, capsys):
    """It is tried with a kernel; a copy to it would work."""
    error = RuntimeError("CUDA error: no kernel image is available for execution on the device\nAs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (6, 0))
    monkeypatch.setattr(torch, "ones", Mock(side_effect=error))
    with pytest.raises(SystemExit):
        train.main(["--device", device])
    message = "this GPU cannot run torch's kernels (compute capability 6.0); choose another or"
    assert capsys.readouterr().err.startswith(f"error: argument --device: {message} --device cpu")


LAUNCHES = [  # environment variables, the device, the error
    ({"WORLD_SIZE": ""}, "cpu", "WORLD_SIZE: expected a whole number, got ''; .* torchrun"),
    ({"WORLD_SIZE": "two"}, "cuda:1", "WORLD_SIZE: expected a whole number, got 'two';"),
    ({"WORLD_SIZE": "2"}, "cpu", "cannot join the others .*RANK.* torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "one"}, "cpu", "cannot join the others .*'one'.* torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "cpu", "cannot join the others .*MASTER_ADDR.* torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "cuda", "LOCAL_RANK: expected .* got ''; .* torchrun"),
]


@pytest.mark.parametrize("variables, device, message", LAUNCHES)
def test_an_incomplete_launch(variables, device, message, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as stop:
        train.main(TINY + ["--device", device])
    text = stop.value.code
    if not isinstance(text, str):
        text = capsys.readouterr().err.removesuffix("\n")
    assert re.fullmatch(f"error: .*{message}.*", text)


def test_the_gpu_of_a_process(monkeypatch):
    """That of its number on the machine; the first where there is only one of them."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.local_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_rank() == 1
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.local_rank() == 0


def test_loader_processes_follow_the_usable_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for cores, workers in (({3}, 1), (set(range(20)), 8)):
        monkeypatch.setattr(os, "sched_getaffinity", Mock(return_value=cores), raising=False)
        assert train.default_workers("cuda:0") == workers
        assert train.default_workers("cpu") == 0
        flags = isaid.build_parser().parse_args(["prepare", "raw", "out"])
        assert flags.workers == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cli.usable_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cli.usable_cores() == 1


# ---------------------------------------------------------------- the code as a whole
LAYERS = [  # each module imports only from its own line and those above
    ["deformable_attn", "util"],
    ["ssl_tasks", "detr"],
    ["isaid"],
    ["eval"],
    ["train"],
    ["reproduce"],
    ["tools"],
]


def source_files():
    """Return the Python files of the program."""
    files = []
    for folder in (".", "deformable_attn", "util", "tools"):
        files += ROOT.joinpath(folder).glob("*.py")
    return files


def package_of(file):
    """Return the module or package that a file belongs to, as the layers name it."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


def test_imports_follow_the_layers():
    """Imports stand at the top of files, point to the same layer or to one above, in no circle."""
    layer_of = {}
    for number, names in enumerate(LAYERS):
        for name in names:
            layer_of[name] = number
    graph = {name: set() for name in layer_of}
    for file in source_files():
        package = package_of(file)
        code = file.read_text(encoding="utf-8")
        for indent, imported in re.findall(r"^( *)(?:import|from) (\w+)", code, re.M):
            if imported not in layer_of:
                continue
            assert not indent, (file, imported)
            assert layer_of[imported] <= layer_of[package], (file, imported)
            if imported != package:
                graph[package].add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_functions_fit_on_a_screen():
    for file in source_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in ("train", "build_parser"):
                num_lines = node.end_lineno - node.body[0].lineno + 1
                assert num_lines <= 60, (file, node.name)


@pytest.mark.parametrize("arguments", ["check", "format --check"])
def test_ruff_has_no_complaints(arguments):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff"] + arguments.split() + ["."]
    subprocess.run(command, cwd=ROOT, check=True)


def test_every_flag_is_used_somewhere():
    text = ""
    for pattern in ("README.md", "docs/*.md", "recipes/*.txt", "results/*/*.py", "tests/*.py"):
        for path in ROOT.glob(pattern):
            text += path.read_text(encoding="utf-8")
    flags = re.findall(r"\[--(\w+)", train.build_parser().format_usage())
    assert 40 < len(flags) <= 55
    unused = [flag for flag in flags if not re.search(rf"--(no-)?{flag}\b", text)]
    assert not unused


def test_idle_threads_sleep_unless_told_otherwise():
    """OpenMP reads the variable when torch is loaded, so its value at that moment counts."""
    name = "GOMP_SPINCOUNT"
    policy = "OMP_WAIT_POLICY"
    plain = {key: value for key, value in os.environ.items() if key not in (name, policy)}
    code = "import os, sys; sys.modules['torch'] = None\ntry: import train\n"
    code += f"except ImportError: print(os.environ.get('{name}'))"
    for variables, expected in (({}, 2000), ({name: "7"}, 7), ({policy: "passive"}, None)):
        environment = {**plain, **variables}
        command = [sys.executable, "-c", code]
        printed = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
        assert printed == f"{expected}\n", variables


# ---------------------------------------------------------------- losses, schedules, precision
# flags, calls of the CNN, batch sizes of the encoder's calls, calls of the decoder
MEMORIES = [
    ("--setting detect", 1, [4], 1),
    ("--setting pretrain --ssl_on features", 1, [4], 0),
    ("--setting pretrain --ssl_on image", 1, [4], 0),
    ("--setting multitask --ssl_on features", 1, [4, 4], 1),  # clean, then corrupted
    ("--setting multitask --ssl_on image", 2, [4, 4], 1),
    ("--setting multitask --ssl_task reconstruct", 1, [4], 1),
]


@pytest.mark.parametrize("model", detr.DETECTORS)
@pytest.mark.parametrize("flags, backbone, encoder, decoder", MEMORIES)
def test_the_memories_of_decoder_and_task(model, flags, backbone, encoder, decoder, monkeypatch):
    """The decoder reads the memory of the clean images, the task that of the corrupted ones."""
    run, args, _, batch = prepared(["--model", model] + flags.split())
    model = run.model
    task = run.task
    images, padding, targets = batch
    levels = model.features(images, padding)
    clean_memory = model.encode(levels)
    task_memory = clean_memory
    if task and task.corrupts:
        seeds = [target["seed"] for target in targets]
        corruption = task.sample_corruption(padding, seeds)
        if args.ssl_on == "features":
            corrupted_levels = task.corrupt_levels(levels, corruption)
        else:
            corrupted_images = task.corrupt_images(images, corruption)
            corrupted_levels = model.features(corrupted_images, padding)
        task_memory = model.encode(corrupted_levels)
        assert not torch.allclose(clean_memory[0].features, task_memory[0].features, atol=0.01)

    methods = [(model.backbone, "forward"), (model, "encode"), (model, "decode"), (task, "loss")]
    calls = record_calls(monkeypatch, methods)
    losses = train.compute_losses(model, task, images, padding, targets, args)
    assert len(calls["forward"]) == backbone
    assert [len(call.args[0][0].features) for call in calls["encode"]] == encoder
    assert len(calls["decode"]) == decoder
    assert bool(calls["loss"]) == bool(task)
    for name, expected_memory in (("decode", clean_memory), ("loss", task_memory)):
        if calls[name]:
            memory = calls[name][0].args[0]
            for level, expected in zip(memory, expected_memory, strict=True):
                torch.testing.assert_close(level.features, expected.features, rtol=1e-3, atol=1e-4)
    assert ("loss_ssl" in losses) == bool(task)
    assert ("loss_giou" in losses) == bool(decoder)


@pytest.mark.parametrize("epochs, steps", [(1, 1), (1, 10), (5, 2), (11, 10)])
def test_schedules(epochs, steps):
    """Linear: up, then down along a line. Cosine: down along half a cosine. Step: tenths."""
    total = epochs * steps
    factors = {}
    for name in ("linear", "cosine", "step", "constant"):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        flags = ["--lr_drop", "4", "--lr_schedule", name, "--epochs", str(epochs)]
        args, _ = train.parse(flags)
        (factor,) = train.build_schedule(optimizer, args, steps).lr_lambdas
        factors[name] = [factor(step) for step in range(total)]
    assert factors["constant"] == [1] * total
    tenths = [0.1 ** (i // steps // 4) for i in range(total)]
    assert factors["step"] == pytest.approx(tenths)
    warmup = max(1, total // 10)
    up = [(i + 1) / warmup for i in range(warmup)]
    rest = total - warmup
    cosine = [math.cos(math.pi / 2 * i / rest) ** 2 for i in range(1, rest)]
    assert factors["cosine"] == pytest.approx((up + [1] + cosine)[:total])
    line = [1 - i / rest for i in range(1, rest)]
    assert factors["linear"] == pytest.approx((up + [1] + line)[:total])


@pytest.mark.parametrize("model", detr.DETECTORS)
@pytest.mark.parametrize("half", train.AMP_DTYPES)
def test_half_precision(model, half, monkeypatch):
    """Losses are near those of fp32; matching, losses and weights stay in fp32."""
    losses = {}
    layer_dtypes = []
    for amp in ("no", half):
        run, args, _, batch = prepared(MULTITASK + ["--model", model, "--amp", amp])
        criterion = run.model.criterion
        methods = [
            (criterion, "layer_losses"),
            (criterion, "matching_costs"),
            (run.task, "patch_losses"),
        ]
        calls_of = record_calls(monkeypatch, methods)
        linear = run.model.transformer.encoder.layers[0].linear1
        linear.register_forward_hook(lambda layer, x, out: layer_dtypes.append(out.dtype))
        losses[amp] = train.compute_losses(run.model, run.task, *batch, args)
        for calls in calls_of.values():
            assert calls
            for call in calls:
                assert [x.dtype for x in call.args[:2]] == [torch.float32] * 2
    # the encoder runs twice: on the clean images, then on the corrupted ones
    assert layer_dtypes == [torch.float32] * 2 + [train.AMP_DTYPES[half]] * 2

    sum(loss.sum() for loss in losses[half].values()).backward()
    for parameter in list(run.model.parameters()) + list(run.task.parameters()):
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.isfinite().all()
    are_equal = []
    for name, expected in losses["no"].items():
        loss = losses[half][name]
        torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.05)
        are_equal.append(torch.equal(loss, expected))
    assert not all(are_equal)


def test_fp16_steps_that_overflow_are_skipped_and_counted(
    run, tmp_path, capsys, monkeypatch, recwarn
):
    """From too large a factor of the loss the scaler halves it until none does; resumed runs too.

    The CNN is frozen, because the backward pass of convolutions in fp16 is very slow on CPUs.
    """
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**22)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(train, "evaluate", Mock(return_value=({"score": 0}, None)))  # for time
    monkeypatch.setattr(plots, "draw_curves", Mock())
    flags = f"--amp fp16 --init {run} --init_parts backbone --freeze backbone --limit_train 24"
    flags += f" --epochs 2 --eval_every 2 --out {tmp_path}"
    train.main(TINY + f"{flags}/once".split())
    printed = capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "write_log", Mock(side_effect=KeyboardInterrupt))
        train.main(TINY + f"{flags}/resumed".split())
    train.main(TINY + f"{flags}/resumed --resume".split())
    same_run(tmp_path / "once", tmp_path / "resumed")

    first, second = log_of(tmp_path / "once")
    skipped = first["skipped_steps"]
    assert 1 <= skipped < 6  # of 12 steps in all
    assert "skipped_steps" not in second
    assert printed.count(f"({skipped} steps skipped: gradient too large for fp16)") == 1
    assert "precision   fp16 in the CNN and encoder" in printed
    state = torch.load(tmp_path / "once" / "last.pt")
    assert state["scaler"]["scale"] == 2.0 ** (22 - skipped)
    assert state["schedule"]["last_epoch"] == 12
    for parameter_state in state["optimizer"]["state"].values():
        assert parameter_state["step"] == 12 - skipped
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_gradients_of_fp16_are_clipped_without_the_factor():
    """Apart from rounding they are those of fp32, also of several batches per step."""
    vectors = {}
    for amp in ("no", "fp16"):
        run, args, batches = some_batches(f"--grad_accum_steps 2 --amp {amp}", 2)
        run.model.backbone.requires_grad_(False)
        computed = gradients_of_a_step(run, args, batches).values()
        vectors[amp] = torch.cat([g.flatten() for g in computed if g is not None])
    error = (vectors["fp16"] - vectors["no"]).norm() / vectors["no"].norm()
    assert 0 < error < 0.05


def test_endless_overflow_of_fp16_ends_with_one_line(monkeypatch):
    run, args, _, batch = prepared(["--amp", "fp16"])
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    run.model.query_embed.weight.register_hook(lambda gradient: gradient * math.inf)
    monkeypatch.setattr(isaid, "epoch_loader", lambda *_: [batch] * 9)
    with pytest.raises(SystemExit, match="^error: the gradient .* of fp16. Restart with --amp no"):
        cli_main(lambda _: train.train(run, None, None, args))()
    assert run.skipped_steps == 2


def test_the_task_s_loss_of_every_batch_must_be_finite(monkeypatch):
    """A step of fp16 that overflows is skipped, but not one whose loss is NaN already."""
    flags = "--setting pretrain --ssl_patch 16 --amp fp16 --grad_accum_steps 2"
    run, args, data, _ = prepared(flags.split())
    batches = list(isaid.epoch_loader(data, args, 1))
    losses = [torch.tensor(math.nan), torch.tensor(1.0, requires_grad=True)]
    monkeypatch.setattr(run.task, "loss", Mock(side_effect=losses))
    monkeypatch.setattr(isaid, "epoch_loader", lambda *_: batches)
    images = ", ".join(target["file_name"] for target in batches[0][2])
    with pytest.raises(FloatingPointError, match=f"^loss_ssl became NaN or Inf on images {images}"):
        train.train(run, None, None, args)


CAPABILITIES = [((6, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]


@pytest.mark.parametrize("capability, amp", CAPABILITIES)
def test_the_precision_of_a_gpu(capability, amp, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capability)
    assert cli.default_amp("cuda:0") == amp
    assert cli.default_amp("mps") == "no"


@pytest.mark.parametrize("model", detr.DETECTORS)
def test_a_compiled_model_has_the_same_gradients(model, monkeypatch):
    """It is compiled here by the compiler's front half; the back half takes minutes."""
    front = Mock(side_effect=functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", front)
    flags = MULTITASK + ["--model", model]
    run, args, _, batch = prepared(flags)
    compiled_run, compiled_args, _, compiled_batch = prepared(flags + ["--compile"])
    compiled_names = [call.args[0].__name__ for call in front.call_args_list]
    assert compiled_names == ["features", "encode", "decode"]
    expected = gradients_of_a_step(run, args, [batch])
    computed = gradients_of_a_step(compiled_run, compiled_args, [compiled_batch])
    assert_close_gradients(computed, expected)


# ---------------------------------------------------------------- several batches and processes
def assert_close_gradients(computed, expected, kind=""):
    """Gradients {name: tensor or None} are the same up to rounding."""
    assert computed.keys() == expected.keys(), kind
    for name, expected_gradient in expected.items():
        gradient = computed[name]
        assert (gradient is None) == (expected_gradient is None), (kind, name)
        if gradient is not None:  # batch norm of a few cells makes rounding large
            error = (gradient - expected_gradient).norm()
            assert error <= 1e-2 * expected_gradient.norm() + 1e-6, (kind, name)


def gradients_by_hand(run, args, batches, together):
    """Return the gradients of the mean loss of some batches, as the official code defines them.

    Box losses and focal loss are divided by the mean number of objects per batch, the task's loss
    by that of patches, if the batches are computed `together`; else each by its own number. The
    class loss of DETR is divided by its own weights.
    """
    model = run.model
    task = run.task
    detects = args.setting != "pretrain"
    run.optimizer.zero_grad()
    corruptions = []
    num_objects = []  # per batch
    num_patches = []
    for _, padding, targets in batches:
        num_objects.append(sum(len(target["labels"]) for target in targets))
        if task:
            seeds = [target["seed"] for target in targets]
            corruption = task.sample_corruption(padding, seeds)
            corruptions.append(corruption)
            num_patches.append(int(task.counted_patches(corruption).sum()))
    if detects:
        assert len(set(num_objects)) > 1
    else:
        assert len(set(num_patches)) > 1
    if together:
        num_objects = [sum(num_objects) / len(batches)] * len(batches)
        num_patches = [sum(num_patches) / len(batches)] * len(batches)

    class_weight = 1 if args.model == "detr" else 2
    weights = {"ce": class_weight, "bbox": 5, "giou": 2}
    task_weight = args.ssl_weight if args.setting == "multitask" else 1
    for i, (images, padding, targets) in enumerate(batches):
        loss = 0
        levels = model.features(images, padding)
        if detects:
            outputs = model.decode(model.encode(levels))
            for name, values in model.criterion(outputs, targets, num_objects[i]).items():
                loss = loss + weights[name.split("_")[1]] * values.sum()
        if task:
            if task.on == "features":
                levels = task.corrupt_levels(levels, corruptions[i])
            else:
                levels = model.features(task.corrupt_images(images, corruptions[i]), padding)
            memory = model.encode(levels)
            loss = loss + task_weight * task.loss(memory, images, corruptions[i], num_patches[i])
        (loss / len(batches)).backward()
    return gradients(run)


def some_batches(flags, count):
    """Return (run, its flags, `count` batches of images with objects, but the last without)."""
    run, args, data, _ = prepared(["--limit_train", "60"] + flags.split())
    with_objects = []
    without_objects = []
    for i, labels in enumerate(data.labels):
        if len(labels) > 0:
            with_objects.append(i)
        else:
            without_objects.append(i)
    batches = []
    for k in range(count - 1):
        batches.append([data[i] for i in with_objects[3 * k : 3 * k + 3]])
    batches.append([data[i] for i in without_objects[:3]])
    return run, args, [isaid.collate(batch) for batch in batches]


JIGSAW = "--ssl_task jigsaw-continuous --ssl_patch 16"
KINDS = {
    "detr": "--model detr",
    "deformable": "",
    "two-stage": "--two_stage",
    "no encoder": "--enc_layers 0",
    "no encoder, pretrain": f"--enc_layers 0 --setting pretrain {JIGSAW}",
    "pretrain": f"--setting pretrain {JIGSAW}",
    "multitask": "--setting multitask --ssl_task jigsaw-discrete --ssl_patch 16 "
    "--ssl_on image --ssl_weight 3",
}
ALL_KINDS = """
import sys, torch, test_train
from util import distributed
distributed.init("cpu")
rank = distributed.rank()
for kind, flags in test_train.KINDS.items():
    run, args, batches = test_train.some_batches(flags, distributed.world_size())
    gradients = test_train.gradients_of_a_step(run, args, [batches[rank]])
    torch.save(gradients, f"{sys.argv[1]}/{kind} {rank}.pt")
"""
TWO_BATCHES_PER_STEP = """
import sys, torch, test_train
from util import distributed
distributed.init("cpu")
rank = distributed.rank()
run, args, batches = test_train.some_batches("--grad_accum_steps 2", 4)
gradients = test_train.gradients_of_a_step(run, args, [batches[rank], batches[rank + 2]])
torch.save(gradients, f"{sys.argv[1]}/{rank}.pt")
"""


def run_script(folder, code, processes):
    """Run a script in several processes, with the folder as its only argument."""
    script = folder / "script.py"
    script.write_text(code)
    Command(folder, script, [folder], processes).end()


@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_of_several_processes(processes, tmp_path):
    """Each process has the gradients of all batches; one has images without objects only."""
    run_script(tmp_path, ALL_KINDS, processes)
    for kind, flags in KINDS.items():
        run, args, batches = some_batches(flags, processes)
        expected = gradients_by_hand(run, args, batches, together=True)
        for rank in range(processes):
            computed = torch.load(tmp_path / f"{kind} {rank}.pt")
            assert_close_gradients(computed, expected, kind)


def test_gradients_of_two_batches_per_step():
    run, args, batches = some_batches("--grad_accum_steps 2 --setting multitask", 2)
    computed = gradients_of_a_step(run, args, batches)
    expected = gradients_by_hand(run, args, batches, together=False)
    assert_close_gradients(computed, expected)


def test_accumulation_in_two_processes(tmp_path):
    """Gradients are averaged over processes once per step, over all of its batches."""
    run_script(tmp_path, TWO_BATCHES_PER_STEP, 2)
    run, args, batches = some_batches("--grad_accum_steps 2", 4)
    first = gradients_by_hand(run, args, batches[:2], together=True)
    first = {name: g.clone() for name, g in first.items() if g is not None}
    second = gradients_by_hand(run, args, batches[2:], together=True)
    expected = {name: (g + second[name]) / 2 for name, g in first.items()}
    for rank in (0, 1):
        computed = torch.load(tmp_path / f"{rank}.pt")
        computed = {name: computed[name] for name in expected}
        assert_close_gradients(computed, expected)


# ---------------------------------------------------------------- commands in several processes
def test_every_image_counts_once(tmp_path):
    """Seven images have the metrics of the log, in one, two and three processes."""
    out = tmp_path / "run"
    flags = TINY + MULTITASK + "--limit_train 16 --limit_val 7 --epochs 2".split()
    printed, _ = Command(tmp_path, "train.py", flags + ["--out", out], processes=2).end()
    assert printed.count("epoch   1/2") == 1
    assert "8 images per step, 2 steps per epoch" in printed
    assert list(tmp_path.glob("run*")) == [out]
    log = log_of(out)
    assert len(log) == 2
    best = max(log, key=lambda line: (line["ap"], line["epoch"]))
    tables = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        Command(tmp_path, "eval.py", [out, "--out", folder], processes).end()
        metrics = json.loads((folder / "metrics.json").read_bytes())
        assert metrics["images"] == 7
        tables.append(metrics["per_class"])
        for name in METRICS + ("ssl_loss",):  # None without ground truth
            assert metrics[name] == pytest.approx(best[name]), name
    assert tables[1] == tables[0]
    assert tables[2] == tables[0]


def test_an_error_in_one_process_ends_all(dataset, tmp_path):
    """An error of all processes is printed once, and so is one of the second process alone."""
    flags = TINY + ["--data", "nowhere"]
    _, errors = Command(tmp_path, "train.py", flags, processes=2).end(1)
    assert errors.count("error: ") == 1
    assert errors.count("\n") == 1
    assert "nowhere: folder not found" in errors

    script = tmp_path / "elsewhere.py"
    script.write_text(f"""
import os, sys, train
if os.environ["RANK"] == "1":
    os.chdir("/")
else:
    os.chdir({str(dataset.parent)!r})
train.main(sys.argv[1:])
""")
    flags = TINY + ["--data", "data", "--out", tmp_path / "run"]
    _, errors = Command(tmp_path, script, flags, processes=2).end(1)
    assert errors.startswith("error: /data: folder not found")
    assert errors.count("\n") == 1


def test_a_bad_image_is_named(dataset, tmp_path):
    """In one line, also by a loader process; an error in one of two processes ends both."""
    shutil.copytree(dataset, tmp_path / "data")
    image = tmp_path / "data/train/images/scene_000003.png"
    image.write_bytes(b"nonsense")
    message = f"error: {image}: not a readable image, or corrupted ("
    flags = TINY + ["--data", str(tmp_path / "data")]
    for workers in ("0", "1"):
        run_flags = ["--out", tmp_path / workers, "--workers", workers]
        _, errors = Command(tmp_path, "train.py", flags + run_flags).end(1)
        assert errors.startswith(message)
        assert errors.count("\n") == 1
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 train.py".split()
    command = [sys.executable] + launch + flags + ["--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.count(message) == 1


def test_a_slow_start_is_announced(tmp_path, capsys):
    """DETR from random weights on more than the smallest scenes needs many epochs."""
    cases = [
        ("--model detr", False),
        ("--model detr --image_size 96", True),
        ("--image_size 96", False),
        ("--model detr --image_size 96 --setting pretrain", False),
    ]
    for number, (flags, is_slow) in enumerate(cases):
        flags += f" --epochs 1 --out {tmp_path}/{number}"
        train.main(TINY + flags.split())
        assert ("\nexpect " in capsys.readouterr().out) == is_slow, flags
