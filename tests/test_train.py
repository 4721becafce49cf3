"""Training by its real command lines: what a run leaves, computes and says; its processes."""

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
from util import checkpoint, plots, synthetic
from util.cli import cli_main
from util.weights import PARTS, part_of

TASK = "--setting multitask --ssl_weight 3".split()


def prepared(*flags):
    """Return (run, its flags, its images, its first batch) before the first step."""
    args, _ = train.parse([*TINY, "--out", "none", "--amp", "no", *flags])
    train_set, _ = isaid.load_train_and_val(args)
    run = train.build_run(args, train_set)
    train.set_train_mode(run.model, args)
    batch = next(iter(isaid.epoch_loader(train_set, args, 1)))
    return run, args, train_set, batch


def built(*flags):
    """Return the run that these flags build, before its first step."""
    run, _, _, _ = prepared(*flags)
    return run


def spied(patch, *methods):
    """Watch methods, given as (object or None, name): {name: its calls}."""
    calls = {}
    for owner, name in methods:
        patch.setattr(owner or Mock(), name, spy := Mock(wraps=getattr(owner, name, None)))
        calls[name] = spy.call_args_list
    return calls


def gradients(run):
    modules = [module for module in (run.model, run.task) if module]
    return {name: p.grad for module in modules for name, p in module.named_parameters()}


def gradients_of_a_step(run, args, batches):
    """What the loop hands to the optimizer in its first step, with these batches."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(isaid, "epoch_loader", lambda *_: batches)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: next(iter(())))
        train.train(run, None, None, args)
    return gradients(run)


# ---------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("dataset") / "data"
    isaid.write_scenes(out, {"train": 8, "val": 3}, 64, seed=0)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder):
    """A run on a dataset on disk, what it printed, and one of the same seed without loaders."""
    here = tmp_path_factory.mktemp("runs")
    flags = ["train.py", *TINY, "--data", folder]
    flags += "--epochs 2 --dropout 0.1 --augment aerial --ssl_weight 3".split()
    one, other = (Command(here, *flags, "--workers", n, "--out", here / n) for n in ("2", "0"))
    other.end()
    return here / "2", one.end()[0], here / "0"


def test_what_a_run_leaves(run):
    out, printed, other = run
    same_run(out, other)
    files = "best.pt config.json curves.png detections.png last.pt log.jsonl"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    log = log_of(out)
    assert [line["epoch"] for line in log] == [1, 2]
    losses = {f"train_{x}" for x in ("loss", "loss_ce", "loss_bbox", "loss_giou")}
    times = {"seconds", "data_wait", "images_per_second", "eval_seconds"}
    assert log[0].keys() == losses | times | {*METRICS, "val_loss", "epoch", "collapsed"}
    terms = (sum(line[name] for name in losses - {"train_loss"}) for line in log)
    assert [*terms] == pytest.approx([line["train_loss"] for line in log])
    assert all(0 <= line["data_wait"] <= 1 and 0 <= line["ap"] <= 1 for line in log)
    config = json.loads((out / "config.json").read_bytes())
    assert config["args"]["hidden_dim"] == 32 and config["versions"]["torch"] == torch.__version__
    assert f"on {config['versions']['device']}\n" in printed
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
        assert re.search(text, printed), text
    last, best = (torch.load(out / f"{x}.pt") for x in ("last", "best"))
    assert best["epoch"] == max((line["ap"], line["epoch"]) for line in log)[1]
    assert [c["name"] for c in best["categories"]] == list(synthetic.CLASSES)
    assert last["schedule"]["last_epoch"] == 4  # it went on with every step
    assert "optimizer" in last and best.keys() < last.keys() - {"optimizer"}


@pytest.mark.parametrize("flags", [
    "--model detr", "--num_feature_levels 1", "--two_stage", "--no-with_box_refine", "--lr_drop 6",
    "--setting multitask --ssl_task mim-discrete --vocab_size 4"])  # fmt: skip
def test_it_learns(flags, tmp_path, monkeypatch):
    """The loss falls with every step on the same four scenes, by more than a seventh in twelve."""
    for module, name in ((checkpoint, "save"), (plots, "draw_curves")):
        monkeypatch.setattr(module, name, lambda *_: None)  # for time
    flags += " --limit_train 4 --epochs 12 --eval_every 12 --augment none --clip_max_norm 9"
    flags += f" --lr 2e-3 --lr_backbone 2e-3 --out {tmp_path}/run"
    train.main([*TINY, *flags.split()])
    log = log_of(tmp_path / "run")
    losses = [line["train_loss"] for line in log]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] * 6 / 7
    assert [line["epoch"] for line in log if "ap" in line] == [12]


def test_overfitting_four_scenes(tmp_path):
    """The smoke test of the README, with a model that is done sooner."""
    flags = "--overfit 4 --epochs 2 --image_size 64 --hidden_dim 256 --enc_layers 1 --dec_layers 2"
    flags += f" --num_queries 10 --clip_max_norm 9 --lr 1e-3 --lr_backbone 1e-3 --out {tmp_path}/a"
    train.main(flags.split())
    assert log_of(tmp_path / "a")[-1]["ap"] > 0.9


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, kind in ("", "detect"), ("--setting pretrain", "pretrain-mim-continuous"):
        folders = [checkpoint.make_run_folder(train.parse(flags.split())[0]) for _ in range(3)]
        assert folders == [f"runs/deformable_detr-{kind}-{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("name, lr", [("detr", 1e-4), ("deformable_detr", 2e-4)])
def test_recipes_are_the_official_models_and_rates(name, lr):
    args, unused = train.parse([f"@{ROOT}/recipes/{name}.txt"])
    official = detr.build_detector(name, num_classes=15)
    model = detr.build_detector(**train.detector_config(args, 15))
    shapes = [{k: x.shape for k, x in m.named_parameters()} for m in (official, model)]
    assert shapes[0] == shapes[1] and not unused
    assert args.backbone_weights == "imagenet" and args.frozen_bn and args.epochs == 50
    assert args.lr_schedule == "step" and args.lr_drop == 40
    assert args.weight_decay == 1e-4 and args.clip_max_norm == 0.1
    groups = train.build_optimizer(model, None, args).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        tenth = "backbone.0" in name or re.search("reference_points|sampling_offsets", name)
        expected = pytest.approx(lr / 10 if tenth else lr) if parameter.requires_grad else None
        assert rates.get(id(parameter)) == expected, name


def test_imagenet_weights(tmp_path, monkeypatch):
    """Torchvision's file from its cache, else downloaded; offline one line says what to do."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=URLError("offline")))
    flags = [*TINY, "--backbone_weights", "imagenet"]
    message = r"error: failed to download ImageNet weights for resnet18 \(.*offline.*\); place "
    with pytest.raises(SystemExit, match=f"^{message}the file in {tmp_path}/checkpoints$"):
        train.main(flags)
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "checkpoints/resnet18-f37072fd.pth")
    for frozen in ("", "no-"):
        body = built(*flags, f"--{frozen}frozen_bn").model.backbone[0].body
        assert torch.equal(body.layer3[1].conv2.weight, resnet.layer3[1].conv2.weight)
        assert body.conv1.weight.requires_grad == bool(frozen)


def test_init_of_a_run_with_other_classes(run, monkeypatch):
    """Class heads are dropped and named, all else is taken, or the parts that are named."""
    more = [*synthetic.CATEGORIES, {"id": 16, "name": "thing"}]
    monkeypatch.setattr(synthetic, "CATEGORIES", more)
    before = torch.load(run[0] / "best.pt")["model"]
    for parts, others in ((PARTS, []), (["encoder"], ["--init_parts", "encoder"])):
        made = built("--init", str(run[0]), *others)
        heads = ", ".join(f"class_embed.{i}.{x}" for i in (0, 1) for x in ("weight", "bias"))
        note = f"{' and '.join(parts)} from {run[0]}"
        if not others:
            note += f"; re-initialized (missing, or different number of classes): {heads}"
        assert made.notes["init"] == note
        for name, x in made.model.state_dict().items():
            if "class_embed" not in name and x.dim() > 1:  # norms start at the same values anyway
                assert torch.equal(x, before[name]) == (part_of(name) in parts), name
    assert made.metadata["categories"][15:] == [{"id": 16, "name": "thing"}]


def test_init_from_two_sources(run, tmp_path, capsys):
    """Each part comes from the last --init that holds it, as the first line says."""
    first = torch.load(run[0] / "best.pt")
    second = {**first, "model": {k: torch.full_like(x, 7) for k, x in first["model"].items()}}
    torch.save(second, other := tmp_path / "other.pt")
    flags = f"--init {run[0]} --init_parts backbone encoder --init {other} --init_parts encoder"
    made = built(*flags.split())
    assert made.notes["init"] == f"backbone from {run[0]}; encoder from {other}"
    start = {"backbone": first["model"], "encoder": second["model"]}
    for name, x in made.model.state_dict().items():
        part = part_of(name)
        if x.dim() > 1:  # of the decoder neither
            sources = [torch.equal(x, source["model"][name]) for source in (first, second)]
            assert sources == [part == "backbone", part == "encoder"], name
        if part in start:
            assert torch.equal(x, start[part][name]), name
    with pytest.raises(SystemExit, match="2"):
        train.parse(["--init_parts", "encoder", "--init", str(other)])
    assert "--init_parts must follow the --init" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train.parse(f"--init {other} --init_parts encoder --init_parts backbone".split())
    assert f"--init_parts given twice for {other}; list all" in capsys.readouterr().err
    for flags, message in (
        ("--model detr --init RUN", "is a deformable_detr checkpoint; detr can load only"),
        ("--init LESS --init_parts decoder", "no weights for decoder; the checkpoint contains"),
    ):
        less = {k: x for k, x in first["model"].items() if part_of(k) == "backbone"}
        torch.save({**first, "model": less}, tmp_path / "less.pt")
        flags = flags.replace("RUN", str(run[0])).replace("LESS", str(tmp_path / "less.pt"))
        with pytest.raises(ValueError, match=message):
            built(*flags.split())


def test_frozen_parts_stay_as_they_are(run, tmp_path):
    """To the bit, batch statistics too; the optimizer holds only the rest."""
    flags = f"--init {run[0]} --freeze backbone encoder --epochs 1 --out {tmp_path}/run"
    train.main([*TINY, *TASK, *flags.split()])
    before, after = torch.load(run[0] / "best.pt"), torch.load(tmp_path / "run/last.pt")
    changed = {part_of(name) for name, x in before["model"].items()
               if not torch.equal(x, after["model"][name])}  # fmt: skip
    assert changed == {"decoder"}
    names = [name for name, _ in detr.build_detector(**after["detector"]).named_parameters()]
    held = sum(len(group["params"]) for group in after["optimizer"]["param_groups"])
    assert held == [*map(part_of, names)].count("decoder") + len(after["task_state"])


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
"""


@pytest.mark.parametrize("line", OVERRIDES.strip().splitlines())
def test_the_last_flag_counts_and_flags_without_effect_are_listed(line):
    flags, unused = line.format(root=ROOT).split("|")
    args, found = train.parse(flags.split())
    assert set(found) == set(unused.split())
    *_, name, value = flags.split()
    assert str(getattr(args, name[2:])) in (value, f"['{value}']")


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
    assert args.lr_drop == (6 if flags == "--lr_drop 6" else 40)


MISTAKES = """
--data nowhere | nowhere: folder not found
--out {file}/run | --out {file}/run
--batch_size 0 | --batch_size: expected a whole number of at least 1, got '0'
--lr_drop 1.5 | --lr_drop: expected a whole number of at least 1, got '1.5'
--limit_train 3 --grad_accum_steps 2 | 3 training images are fewer than one optimizer step needs
--model yolo | --model: invalid choice: 'yolo'
--hidden_dim 100 | hidden_dim (100) must be divisible by nheads
--two_stage --no-with_box_refine | two_stage needs with_box_refine
--frozen_bn --init {run} --init_parts encoder | --frozen_bn would freeze randomly initialized
--device cuda:99 | --device: device 'cuda:99' is not available
--seed -1 | --seed: expected a whole number of at least 0, got '-1'
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
def test_mistakes_get_one_line(line, folder, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    flags, message = line.format(folder=folder, run=run[0], file=tmp_path / "file").split(" | ")
    with pytest.raises(SystemExit) as stop:
        train.main([*(x for x in TINY if "@" not in flags), *flags.split()])
    code = stop.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err.removesuffix("\n")
    assert message in said and said.startswith("error: ") and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # found before a run was made


@pytest.mark.parametrize("culprit", ["the gradient", "boxes", "loss_ce and the gradient"])
def test_nan_stops_before_the_step_with_one_line(culprit, monkeypatch):
    run, args, _, batch = prepared()
    if culprit == "the gradient":
        run.model.query_embed.weight.register_hook(lambda gradient: gradient * math.nan)
    elif culprit == "boxes":
        run.model.bbox_embed[1].register_forward_hook(lambda _, x, out: out * math.nan)
    else:
        monkeypatch.setattr(detr, "sigmoid_focal_loss", lambda x, *_: x * math.nan)
    before = [p.detach().clone() for p in run.model.parameters()]
    monkeypatch.setattr(isaid, "epoch_loader", lambda *_: [batch])
    images = ", ".join(target["file_name"] for target in batch[2])
    message = f"{culprit} became NaN or Inf on images {images}; the optimizer step was skipped"
    with pytest.raises(SystemExit, match=f"^error: {message}. Restart with a lower --lr$"):
        cli_main(lambda _: train.train(run, None, None, args))()
    assert all(map(torch.equal, before, run.model.parameters()))


def test_all_images_of_a_step_are_named_if_its_gradient_is_nan(monkeypatch):
    run, args, data, _ = prepared("--grad_accum_steps", "2")
    batches = list(isaid.epoch_loader(data, args, 1))
    monkeypatch.setattr(isaid, "epoch_loader", lambda *_: batches)
    run.model.query_embed.weight.register_hook(lambda gradient: gradient * math.nan)
    targets = batches[0][2] + batches[1][2]
    images = ", ".join(target["file_name"] for target in targets)
    with pytest.raises(FloatingPointError, match=f"the gradient .* on images {images};"):
        train.train(run, None, None, args)


# ---------------------------------------------------------------- the house
FLOORS = ["deformable_attn util", "ssl_tasks detr", "isaid", "eval", "train", "reproduce", "tools"]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
FILES = [path for folder in ("", "deformable_attn/", "util/", "tools/")
         for path in ROOT.glob(f"{folder}*.py")]  # fmt: skip
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
CODE = {x: path.read_text(encoding="utf-8") for x, path in zip(MODULES, FILES)}


def test_the_house():
    """Imports go down only, at the top of files, in no circle; functions fit on a screen."""
    graph = {name: set() for name in FLOOR}
    for module, code in CODE.items():
        name = module.split(".")[0]
        for indent, below in re.findall(r"^( *)(?:import|from) (\w+)", code, re.M):
            if below in FLOOR:
                assert not indent, (module, below)
                graph[name] |= {below} - {name}
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno + 1
                assert lines <= 60 or node.name in ("train", "build_parser"), node.name
    assert all(FLOOR[x] <= FLOOR[name] for name, below in graph.items() for x in below), graph
    graphlib.TopologicalSorter(graph).prepare()  # CycleError


@pytest.mark.parametrize("arguments", ["check", "format --check"])
def test_ruff_is_content(arguments):
    pytest.importorskip("ruff")
    subprocess.run([sys.executable, "-m", "ruff", *arguments.split(), "."], cwd=ROOT, check=True)


def test_every_flag_is_used_somewhere():
    flags = [x for x in train.build_parser().format_usage().split() if x.startswith("[--")]
    files = ["README.md", "docs/*.md", "recipes/*.txt", "results/*/*.py", "tests/*.py"]
    text = " ".join(path.read_text(encoding="utf-8") for kind in files for path in ROOT.glob(kind))
    assert 40 < len(flags) <= 55
    unused = [x for x in flags if not re.search(rf"--(no-)?{x[3:].strip(']')}\b", text)]
    assert not unused


def test_idle_threads_sleep_unless_told_otherwise():
    """OpenMP reads the variable when torch is loaded, so its value at that moment counts."""
    name, policy = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
    plain = {key: value for key, value in os.environ.items() if key not in (name, policy)}
    code = "import os, sys; sys.modules['torch'] = None\ntry: import train\n"
    code += f"except ImportError: print(os.environ.get('{name}'))"
    for given, expected in (({}, 20000), ({name: "7"}, 7), ({policy: "passive"}, None)):
        call = [sys.executable, "-c", code]
        printed = subprocess.check_output(call, cwd=ROOT, env={**plain, **given}, text=True)
        assert printed == f"{expected}\n", given


# ---------------------------------------------------------------- losses, schedules, precision
@pytest.mark.parametrize("model", detr.DETECTORS)
@pytest.mark.parametrize("flags, backbone, encoder, decoder", [
    ("--setting detect", 1, [4], 1),
    ("--setting pretrain --ssl_on features", 1, [4], 0),
    ("--setting pretrain --ssl_on image", 1, [4], 0),
    ("--setting multitask --ssl_on features", 1, [4, 4], 1),  # clean, then corrupted
    ("--setting multitask --ssl_on image", 2, [4, 4], 1),
    ("--setting multitask --ssl_task reconstruct", 1, [4], 1)])  # fmt: skip
def test_who_reads_which_memory(model, flags, backbone, encoder, decoder, monkeypatch):
    run, args, _, batch = prepared("--model", model, *flags.split())
    model, task, (images, padding, targets) = run.model, run.task, batch
    levels = model.features(images, padding)
    clean = corrupted = model.encode(levels)
    if task and task.corrupts:
        corruption = task.sample_corruption(padding, [target["seed"] for target in targets])
        corrupted = task.corrupt_levels(levels, corruption) if args.ssl_on == "features" else (
            model.features(task.corrupt_images(images, corruption), padding))  # fmt: skip
        corrupted = model.encode(corrupted)
        assert not torch.allclose(clean[0].features, corrupted[0].features, atol=0.01)
    owners = (model.backbone, "forward"), (model, "encode"), (model, "decode"), (task, "loss")
    calls = spied(monkeypatch, *owners)
    losses = train.compute_losses(model, task, *batch, args)
    seen = {name: [call.args[0] for call in calls[name]] for name in calls}
    assert len(seen["forward"]) == backbone and len(seen["decode"]) == decoder
    assert [len(levels[0].features) for levels in seen["encode"]] == encoder
    for memory, wanted in ((seen["decode"], clean), (seen["loss"], corrupted)):
        for mine, right in zip(memory[0] if memory else [], wanted):
            torch.testing.assert_close(mine.features, right.features, rtol=1e-3, atol=1e-4)
    assert ("loss_ssl" in losses) == bool(seen["loss"]) == bool(task)
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
    assert factors["step"] == pytest.approx([0.1 ** (i // steps // 4) for i in range(total)])
    warmup = max(1, total // 10)
    up = [(i + 1) / warmup for i in range(warmup)]
    rest = total - warmup
    cosine = [math.cos(math.pi / 2 * i / rest) ** 2 for i in range(1, rest)]
    assert factors["cosine"] == pytest.approx([*up, 1, *cosine][:total])
    line = [1 - i / rest for i in range(1, rest)]
    assert factors["linear"] == pytest.approx([*up, 1, *line][:total])


@pytest.mark.parametrize("model", detr.DETECTORS)
def test_half_precision(model, monkeypatch):
    """Losses near those of fp32, to which matching and losses are given; weights stay fp32."""
    losses, layers = [], []
    for flags in ([], ["--amp", "bf16"]):
        run, args, _, batch = prepared(*TASK, "--model", model, *flags)
        criterion, linear = run.model.criterion, run.model.transformer.encoder.layers[0].linear1
        owners = [(criterion, "layer_losses"), (criterion, "matching_costs")]
        owners.append((run.task, "patch_losses"))
        given = spied(monkeypatch, *owners)
        linear.register_forward_hook(lambda layer, x, out: layers.append(out.dtype))
        losses.append(train.compute_losses(run.model, run.task, *batch, args))
        kinds = {x.dtype for calls in given.values() for call in calls for x in call.args[:2]}
        assert all(given.values()) and kinds == {torch.float32}
    # the encoder runs twice: on the clean images, then on the corrupted ones
    assert layers == [torch.float32] * 2 + [torch.bfloat16] * 2
    sum(values.sum() for values in losses[1].values()).backward()
    for p in (*run.model.parameters(), *run.task.parameters()):
        assert p.dtype == torch.float32 and (p.grad is None or p.grad.isfinite().all())
    for right, found in zip(*(x.values() for x in losses)):
        torch.testing.assert_close(found, right, rtol=0.1, atol=0.05)
    assert not all(map(torch.equal, *(x.values() for x in losses)))


@pytest.mark.parametrize("model", detr.DETECTORS)
def test_compiled(model, monkeypatch):
    """It gives the same, here by the compiler's front half; the back half takes minutes."""
    front = Mock(side_effect=functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", front)
    runs = [prepared(*TASK, "--model", model, *flags) for flags in ([], ["--compile"])]
    assert [x.args[0].__name__ for x in front.call_args_list] == ["features", "encode", "decode"]
    close(*(gradients_of_a_step(run, args, [batch]) for run, args, _, batch in runs))


# ---------------------------------------------------------------- several batches and processes
def close(found, right, kind=""):
    """Gradients {name: tensor or None}, to rounding."""
    assert found.keys() == right.keys(), kind
    for name, gradient in right.items():
        mine = found[name]
        assert (mine is None) == (gradient is None), (kind, name)
        if gradient is not None:  # batch norm of a few cells makes rounding large
            assert (mine - gradient).norm() <= 1e-2 * gradient.norm() + 1e-6, (kind, name)


def by_hand(run, args, batches, together):
    """Return the gradients of the mean loss of some batches, as the official code defines them.

    Box losses and focal loss are divided by the mean number of objects of a batch, the task's loss
    by that of patches, if the batches are computed `together`; else each by its own number. The
    class loss of DETR is divided by its own weights.
    """
    model, task = run.model, run.task
    detects = args.setting != "pretrain"
    run.optimizer.zero_grad()
    corruptions, objects, patches = [], [], []
    for _, padding, targets in batches:
        objects.append(sum(len(target["labels"]) for target in targets))
        if task:
            seeds = [target["seed"] for target in targets]
            corruptions.append(task.sample_corruption(padding, seeds))
            patches.append(int(task.counted_patches(corruptions[-1]).sum()))
    assert len(set(objects if detects else patches)) > 1
    if together:
        objects = [sum(objects) / len(batches)] * len(batches)
        patches = [sum(patches) / len(batches)] * len(batches)
    for i, (images, padding, targets) in enumerate(batches):
        loss = 0
        levels = model.features(images, padding)
        if detects:
            losses = model.criterion(model.decode(model.encode(levels)), targets, objects[i])
            weights = {"ce": 1 if args.model == "detr" else 2, "bbox": 5, "giou": 2}
            loss = sum(weights[name.split("_")[1]] * x.sum() for name, x in losses.items())
        if task:
            if task.on == "features":
                levels = task.corrupt_levels(levels, corruptions[i])
            else:
                levels = model.features(task.corrupt_images(images, corruptions[i]), padding)
            weight = args.ssl_weight if args.setting == "multitask" else 1
            memory = model.encode(levels)
            loss = loss + weight * task.loss(memory, images, corruptions[i], patches[i])
        (loss / len(batches)).backward()
    return gradients(run)


def some_batches(flags, count):
    """Return (run, its flags, `count` batches of images with objects, but the last without)."""
    run, args, data, _ = prepared("--limit_train", "60", *flags.split())
    full = [i for i, labels in enumerate(data.labels) if len(labels) > 0]
    empty = [i for i, labels in enumerate(data.labels) if len(labels) == 0]
    chosen = [full[3 * k : 3 * k + 3] for k in range(count - 1)] + [empty[:3]]
    return run, args, [isaid.collate([data[i] for i in indices]) for indices in chosen]


KINDS = {
    "detr": "--model detr",
    "deformable": "",
    "two-stage": "--two_stage",
    "no encoder": "--enc_layers 0",
    "no encoder, pretrain": "--enc_layers 0 --setting pretrain --ssl_task jigsaw-continuous "
    "--ssl_patch 16",
    "pretrain": "--setting pretrain --ssl_task jigsaw-continuous --ssl_patch 16",
    "multitask": "--setting multitask --ssl_task jigsaw-discrete --ssl_patch 16 "
    "--ssl_on image --ssl_weight 3",
}
GRADIENTS = """
import sys, torch, test_train
from util import distributed
distributed.init("cpu")
rank = distributed.rank()
for kind, flags in test_train.KINDS.items():
    run, args, batches = test_train.some_batches(flags, distributed.world_size())
    found = test_train.gradients_of_a_step(run, args, [batches[rank]])
    torch.save(found, f"{sys.argv[1]}/{kind} {rank}.pt")
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_of_several_processes(processes, tmp_path):
    """Each process has the gradients of all batches; one has images without objects only."""
    (tmp_path / "script.py").write_text(GRADIENTS)
    Command(tmp_path, tmp_path / "script.py", tmp_path, processes=processes).end()
    for kind, flags in KINDS.items():
        expected = by_hand(*some_batches(flags, processes), together=True)
        for rank in range(processes):
            close(torch.load(tmp_path / f"{kind} {rank}.pt"), expected, kind)


def test_gradients_of_two_batches_per_step():
    run, args, batches = some_batches("--grad_accum_steps 2 --setting multitask", 2)
    close(gradients_of_a_step(run, args, batches), by_hand(run, args, batches, together=False))


def test_accumulation_in_two_processes(tmp_path):
    """Gradients are averaged over processes once per step, over all of its batches."""
    script = """
import sys, torch, test_train
from util import distributed
distributed.init("cpu")
rank = distributed.rank()
run, args, batches = test_train.some_batches("--grad_accum_steps 2", 4)
found = test_train.gradients_of_a_step(run, args, [batches[rank], batches[rank + 2]])
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
"""
    (tmp_path / "script.py").write_text(script)
    Command(tmp_path, tmp_path / "script.py", tmp_path, processes=2).end()
    run, args, batches = some_batches("--grad_accum_steps 2", 4)
    first = by_hand(run, args, batches[:2], together=True)
    first = {name: g.clone() for name, g in first.items() if g is not None}
    second = by_hand(run, args, batches[2:], together=True)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        expected = {name: (g + second[name]) / 2 for name, g in first.items()}
        close({name: found[name] for name in expected}, expected)


def test_every_image_counts_once(tmp_path):
    """Seven of them in one, two and three processes, as in the log; one folder, printed once."""
    out, flags = tmp_path / "run", [*TINY, *TASK, "--limit_train", 16, "--limit_val", 7]
    flags += "--epochs", 2, "--out", out
    printed, _ = Command(tmp_path, "train.py", *flags, processes=2).end()
    assert printed.count("epoch   1/2") == 1 and "8 images per step, 2 steps per epoch" in printed
    best = max(log_of(out), key=lambda line: (line["ap"], line["epoch"]))
    assert len(log_of(out)) == 2 and [path.name for path in tmp_path.glob("run*")] == ["run"]
    names, tables = (*METRICS, "ssl_loss"), []
    for n in (1, 2, 3):
        Command(tmp_path, "eval.py", out, "--out", tmp_path / f"{n}", processes=n).end()
        metrics = json.loads((tmp_path / f"{n}/metrics.json").read_bytes())
        tables.append(metrics["per_class"])  # below, None is where there is no ground truth
        assert metrics["images"] == 7 and tables[-1] == tables[0]
        assert [metrics[x] or 0 for x in names] == pytest.approx([best[x] or 0 for x in names])


def test_an_error_in_one_process_ends_all(folder, tmp_path):
    """What all of them meet is said once, and so is what the second one alone meets."""
    _, errors = Command(tmp_path, "train.py", *TINY, "--data", "nowhere", processes=2).end(1)
    assert (
        errors.count("error: ") == errors.count("\n") == 1 and "nowhere: folder not found" in errors
    )
    (tmp_path / "elsewhere.py").write_text(
        "import os, sys, train\nif os.environ['RANK'] == '1': os.chdir('/')\n"
        f"else: os.chdir({str(folder.parent)!r})\ntrain.main(sys.argv[1:])")  # fmt: skip
    flags = *TINY, "--data", "data", "--out", tmp_path / "run"
    _, errors = Command(tmp_path, tmp_path / "elsewhere.py", *flags, processes=2).end(1)
    assert errors.startswith("error: /data: folder not found") and errors.count("\n") == 1


def test_a_bad_image_is_named(folder, tmp_path):
    """In one line, also by a loader process; met by one of two processes it ends both."""
    shutil.copytree(folder, tmp_path / "data")
    (bad := tmp_path / "data/train/images/scene_000003.png").write_bytes(b"nonsense")
    message = f"error: {bad}: not a readable image, or corrupted ("
    flags = ["train.py", *TINY, "--data", str(tmp_path / "data"), "--out"]
    for n in (0, 1):
        _, errors = Command(tmp_path, *flags, tmp_path / f"{n}", "--workers", n).end(1)
        assert errors.startswith(message) and errors.count("\n") == 1
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    flags = [sys.executable, *launch, *flags, str(tmp_path / "run")]
    done = subprocess.run(flags, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count(message) == 1


def test_a_slow_start_is_said(tmp_path, capsys):
    """DETR from random weights on more than the smallest scenes."""
    for n, (flags, said) in enumerate((
        ("--model detr", False), ("--model detr --image_size 96", True),
        ("--image_size 96", False), ("--model detr --image_size 96 --setting pretrain", False),
    )):  # fmt: skip
        train.main([*TINY, *f"{flags} --epochs 1 --out {tmp_path / str(n)}".split()])
        assert ("\nexpect " in capsys.readouterr().out) == said, flags
