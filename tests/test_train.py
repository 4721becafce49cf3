"""The real command lines, small: what a run leaves, that it learns, what it says of mistakes."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision

import coco
import detr
import eval as evaluation
import isaid
import ssl_tasks
import train

ROOT = Path(__file__).resolve().parents[1]
SIZES = (
    "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 2 --dim_feedforward 32 --num_queries 8"
)
TINY = [*SIZES.split(), *"--image_size 64 --limit_train 8 --limit_val 3 --batch_size 4".split()]
MULTITASK = "--setting multitask --ssl_task mim-continuous --ssl_patch 32".split()


def start(*args, processes=1, **options):
    """A script of the repository as a user starts it, or torchrun does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [sys.executable, *(launcher if processes > 1 else []), *args]
    options = {"cwd": ROOT, "stdout": -1, "stderr": -1, "text": True, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, **options)


def command(*args, **options):
    process = start(*args, **options)
    out, errors = process.communicate(timeout=300)
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=errors)


def lines_of(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("dataset") / "data"
    isaid.main(["scenes", str(out), "--train", "8", "--val", "3", "--image_size", "64"])
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder):
    """A run of the real command on a dataset on disk, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = "--data", folder, "--out", out, "--epochs", 2, "--workers", 2
    done = command("train.py", *TINY, *flags)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


# ---------------------------------------------------------------- a run


def test_a_run_leaves_what_it_promises(run):
    out, printed = run
    pictures = ["curves.png", "detections.png"]
    files = ["best.pt", "config.json", *pictures, "last.pt", "log.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == files
    lines = lines_of(out)
    assert [line["epoch"] for line in lines] == [1, 2]
    losses = {f"train_loss{name}" for name in ("", "_ce", "_bbox", "_giou")}
    times = {"seconds", "images_per_second", "data_wait", "eval_seconds"}
    assert losses | times | set(evaluation.METRICS) <= lines[0].keys()
    assert all(0 <= line["data_wait"] <= 1 and 0 <= line["ap"] <= 1 for line in lines)
    config = json.loads((out / "config.json").read_text())
    assert config["args"]["hidden_dim"] == 32 and config["versions"]["torch"] == torch.__version__
    assert re.search(r"attention +(cpu|torch): \S+", printed) and "4 images a step" in printed
    assert re.search(r"revision \w+", printed) and "M parameters" in printed
    assert all(f"{i} {name} (" in printed for i, name in enumerate(isaid.CLASSES, 1))
    last, best = (torch.load(out / f"{x}.pt", weights_only=True) for x in ("last", "best"))
    aps = [line["ap"] for line in lines]
    assert best["epoch"] == max((ap, epoch) for epoch, ap in enumerate(aps, 1))[1]
    assert [c["name"] for c in last["categories"]] == list(isaid.CLASSES)


@pytest.mark.parametrize("flags", [
    "--model detr", "--num_feature_levels 1", "--two_stage", "--no-with_box_refine --lr_drop 1"
])  # fmt: skip
def test_it_learns(flags, tmp_path):
    """The loss falls on a handful of scenes, for either detector and every kind of head."""
    flags += " --overfit 4 --epochs 2 --eval_every 2 --batch_size 2 --lr 1e-3 --lr_backbone 1e-3"
    train.main([*TINY, *flags.split(), "--out", str(tmp_path / "run")])
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["train_loss"] < 0.8 * lines[0]["train_loss"]
    assert [line["epoch"] for line in lines if "ap" in line] == [2]


def test_overfitting_four_scenes(tmp_path):
    """The smoke test of the README: the demonstration's model learns four scenes by heart."""
    flags = "--overfit 4 --image_size 64 --epochs 3 --eval_every 3".split()
    train.main([*flags, "--out", str(tmp_path / "run")])
    ap = lines_of(tmp_path / "run")[-1]["ap"]
    evaluation.main([str(tmp_path / "run")])  # on the same images
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["ap"] == pytest.approx(ap, abs=1e-6) and ap > 0.9 and found["images"] == 4


def test_the_same_seed_gives_the_same_run(tmp_path):
    logs = []
    for workers in (0, 2):
        flags = f"--epochs 1 --workers {workers} --augment aerial --out {tmp_path}/{workers}"
        train.main([*TINY, *flags.split()])
        logs.append(lines_of(tmp_path / str(workers))[0])
    assert all(logs[0][key] == logs[1][key] for key in ("train_loss", "ap"))


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [train.checkpoint.make_folder(train.parse([])[0]) for _ in range(3)]
    assert folders == [f"runs/deformable_detr-detect-{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("name, rates", [("detr", {1e-4, 1e-5}), ("deformable_detr", {2e-4, 2e-5})])
def test_recipes(name, rates, monkeypatch):
    """The official model with the official rates."""
    monkeypatch.chdir(ROOT)
    args, ignored = train.parse([f"@recipes/{name}.txt"])
    model = detr.build_detector(**train.detector_config(args, 15))
    official = detr.build_detector(name, 15).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in official.items()
    }
    optimizer = train.build_optimizer(model, None, args)
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == sum(p.requires_grad for p in model.parameters()) and not ignored
    assert {round(group["lr"], 12) for group in optimizer.param_groups} == rates


@pytest.mark.parametrize("flags, ignored", [
    ("@recipes/detr.txt --model deformable_detr", []),
    ("@recipes/deformable_detr.txt --model detr", "num_feature_levels with_box_refine "
     "lr_linear_proj_mult"),
    ("@recipes/detr.txt --lr_drop cycle", []),
    ("--setting pretrain --ssl_task reconstruct --ssl_loss_on all --ssl_weight 2", "ssl_weight "
     "ssl_loss_on"),
    ("--ssl_task jigsaw-discrete --vocabulary 9 --init_parts encoder", "ssl_task vocabulary "
     "init_parts"),
    ("--overfit 4 --augment none", "augment"),
])  # fmt: skip
def test_what_stands_last_counts_and_what_is_idle_is_said(flags, ignored, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, found = train.parse(flags.split())
    assert set(found) == set(ignored.split() if ignored else [])
    *_, name, value = flags.split()
    kept = str(getattr(args, name.removeprefix("--")))
    assert kept in (value, f"['{value}']", f"{value}.0")


def test_imagenet_weights(tmp_path, monkeypatch):
    """Torchvision's file from its cache, or downloaded; offline one line says what to do."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    args, _ = train.parse([*TINY, "--backbone_weights", "imagenet"])

    def offline(*args, **kwargs):
        raise URLError("offline")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(ValueError, match="weights of resnet18 cannot be downloaded.*offline"):
        train.build_model(train.detector_config(args, 3), args)
    resnet = torchvision.models.resnet18()
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(resnet.state_dict(), tmp_path / "checkpoints/resnet18-f37072fd.pth")
    for args.frozen_bn in (False, True):
        model, _ = train.build_model(train.detector_config(args, 3), args)
        mine = model.backbone[0].body.layer3[1].conv2.weight
        assert torch.equal(mine, resnet.layer3[1].conv2.weight)


def test_init_of_a_run_with_other_classes(run, folder, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(folder, other)
    for path in other.rglob("*.json"):
        content = json.loads(path.read_text())
        content["categories"] = [{"id": 3, "name": "thing"}]
        content["annotations"] = [{**a, "category_id": 3} for a in content["annotations"]]
        path.write_text(json.dumps(content))
    flags = "--data", other, "--init", run[0], "--epochs", 1, "--out", tmp_path / "run"
    done = command("train.py", *TINY, *flags)
    assert done.returncode == 0, done.stderr
    assert "dropped: class_embed.0.weight" in done.stdout and "3 thing (" in done.stdout
    model, _, checkpoint = evaluation.load_run(tmp_path / "run", "cpu")
    assert checkpoint["categories"] == [{"id": 3, "name": "thing"}]
    assert model.class_embed[0].out_features == 1


@pytest.mark.parametrize("parts", [["backbone"], ["backbone", "encoder"]])
def test_frozen_parts_stay_as_they_are(run, parts, tmp_path):
    """To the bit, batch statistics too, also beside a task; the optimizer holds the rest."""
    flags = [*MULTITASK, "--init", str(run[0]), "--freeze", *parts, "--dropout", "0.1"]
    train.main([*TINY, *flags, "--epochs", "1", "--out", str(tmp_path / "run")])
    before = torch.load(run[0] / "best.pt", weights_only=True)["model"]
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    changed = {
        detr.part_of(name) for name, x in before.items() if not torch.equal(x, state["model"][name])
    }
    assert changed == set(detr.PARTS) - set(parts)
    rest = [x for name, x in detr.build_detector(**state["detector"]).named_parameters()
            if detr.part_of(name) not in parts]  # fmt: skip
    held = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert held == len(rest) + len(state["task_state"])


# ---------------------------------------------------------------- mistakes

MISTAKES = [
    ("--data nowhere", "nowhere: no annotated split 'train' is recognised there"),
    ("--out {folder}", "exists already"),
    ("--out {file}/run", "cannot be made"),
    ("--batch_size 0", "--batch_size: 0 is not greater than 0"),
    ("--model yolo", "--model: invalid choice: 'yolo'"),
    ("--hidden_dim 100", "hidden_dim 100 must be a multiple"),
    ("--two_stage --no-with_box_refine", "two_stage needs with_box_refine"),
    ("--frozen_bn", "add --backbone_weights imagenet or --init"),
    ("--frozen_bn --init {run} --init_parts encoder", "add --backbone_weights imagenet or --init"),
    ("--device cuda:99", "--device: cuda:99 cannot be used here"),
    ("--seed -1", "--seed: -1 is not at least 0"),
    ("--lr inf", "--lr: inf is not greater than 0 and at most"),
    ("--lr fast", "--lr: invalid number value: 'fast'"),
    ("--image_size 32", "--image_size must be at least 64"),
    ("--dropout 1.5", "--dropout: 1.5 is not at least 0 and at most 1"),
    ("--init {folder}", "has no best.pt and no last.pt"),
    ("--init missing.pt", "missing.pt: no such checkpoint file"),
    ("--init {file}", "not a checkpoint of tensors"),
    ("--init {run} --model detr", "does not fit this model"),
    ("@missing.txt", "missing.txt"),
    ("--resume", "--resume needs --out"),
    ("--setting pretrain --data nowhere", "nowhere: no such folder of images"),
    ("--setting pretrain --data {empty}", "holds no images"),
    ("--setting pretrain --ssl_patch 24", "a patch of 24 pixels does not cover whole cells"),
    ("--setting pretrain --ssl_patch 64", "0 patches of 64 would be corrupted"),
    ("--setting pretrain --ssl_task mim-discrete --vocabulary 4000", "a vocabulary of 4000"),
    ("--setting pretrain --ssl_task mim-discrete --tokenizer_weights x.pkl", "x.pkl: no such file"),
    ("--freeze backbone", "--freeze backbone would keep random weights"),
    ("--freeze encoder --init {run} --init_parts backbone", "--freeze encoder would keep random"),
    ("--freeze backbone encoder decoder", "--freeze leaves nothing to train"),
    ("--setting pretrain --freeze backbone encoder", "--freeze leaves nothing to train"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_mistakes_get_one_line(flags, message, folder, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    names = {
        "folder": folder,
        "file": tmp_path / "file",
        "run": run[0],
        "empty": tmp_path / "empty",
    }
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *flags.format(**names).split()])
    code = stop.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err
    assert message in said and said.startswith("error: ") and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()  # found before anything was made


def test_a_bad_image_is_named(folder, run, tmp_path):
    """In one line through the real commands, also from a loader process."""
    broken = tmp_path / "data"
    shutil.copytree(folder, broken)
    (broken / "train/images/scene_000003.png").write_bytes(b"nonsense")
    for args in (
        ["train.py", *TINY, "--data", broken, "--out", tmp_path / "run"],
        ["train.py", *TINY, "--data", broken, "--out", tmp_path / "run-1", "--workers", 1],
        ["eval.py", run[0], "--data", broken, "--split", "train", "--workers", 1],
    ):
        done = command(*args)
        assert done.returncode == 1 and "scene_000003.png: is not an image" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_nan_stops_before_the_step(tmp_path, monkeypatch):
    """The line names the losses and the images; the weights are those before."""
    runs, prepare = [], train.prepare
    monkeypatch.setattr(train, "prepare", lambda args: runs.append(prepare(args)) or runs[-1])
    flags = "--lr_drop 0 --epochs 50 --eval_every 50 --lr 4e9 --weight_decay 4e9".split()
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *flags, "--out", str(tmp_path / "run")])
    said = stop.value.code
    assert "became NaN or infinite, with the images scene_" in said and said.count("scene_") == 4
    assert "the step was not taken; start anew with a lower --lr" in said
    assert all(x.isfinite().all() for x in runs[0][0].model.parameters())
    values = {"loss_ce": torch.tensor([1.0, torch.nan]), "loss_bbox": torch.ones(2)}
    with pytest.raises(FloatingPointError, match="^loss_ce became NaN"):
        train.stop_if_not_finite(values, ())


# ---------------------------------------------------------------- the loop and its house

FLOORS = ["deformable_attn coco scenes parallel", "patches ssl_tasks visual_tokens detr",
          "pictures checkpoint isaid", "eval", "train predict", "reproduce"]  # fmt: skip
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
SAME = {("ssl_tasks", "visual_tokens")}  # on one floor, one way


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", [name for name in FLOOR if name != "deformable_attn"])
def test_imports_go_down_only(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for other in set(imports_of(tree)) & FLOOR.keys():
        assert FLOOR[other] < FLOOR[name] or (name, other) in SAME, other
    inside = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert not any(set(imports_of(function)) & FLOOR.keys() for function in inside)


def test_functions_are_short():
    """None over 60 lines but the loop and the flags; the loop stands in train.train."""
    long = {}
    for path in [*ROOT.glob("*.py"), *(ROOT / "deformable_attn").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long[node.name] = node.end_lineno - node.lineno + 1
    assert long.keys() <= {"train", "build_parser"} and long.get("train", 0) <= 120
    source = (ROOT / "train.py").read_text()
    assert len(source.splitlines()) <= 450
    (loop,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == "train")
    body = ast.unparse(loop)
    places = [body.index(text) for text in (
        "for epoch in", "compute_losses(", "stop_if_not_finite(", "loss.backward()",
        "clip_grad_norm_(", "optimizer.step()", "schedule.step()", "evaluate(", "log_line(" )
        if text != "log_line("]  # fmt: skip
    assert places == sorted(places)


def test_ruff_is_content():
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not ruff:
        pytest.skip("ruff is not installed")
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *arguments, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_flag_is_used():
    """At most 55, each in a recipe, the README, docs/ or a test."""
    flags = {flag for action in train.build_parser()._actions for flag in action.option_strings}
    flags = {flag for flag in flags if not flag.startswith("--no-")} - {"-h", "--help"}
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*"),
             *ROOT.glob("tests/*.py")]  # fmt: skip
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    unused = [flag for flag in flags if not re.search(rf"{flag}\b", text.replace("--no-", "--"))]
    assert len(flags) <= 55 and not unused


@pytest.mark.parametrize("name", ["train", "eval", "predict", "isaid", "reproduce"])
def test_idle_threads_sleep_unless_told_otherwise(name):
    code = f"import {name}, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, wanted in (({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                          ({"OMP_WAIT_POLICY": "passive"}, "None")):  # fmt: skip
        if name != "train" and given:
            continue
        mine = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT",)}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**mine, **given},
                              capture_output=True, text=True)  # fmt: skip
        assert done.stdout == f"{wanted}\n", done.stderr


# ---------------------------------------------------------------- the losses of a step


def prepared(tmp_path, *flags, name="run"):
    """(run, a batch, flags) before the first step."""
    args, _ = train.parse([*TINY, *flags, "--out", str(tmp_path / name)])
    run, data, _, _ = train.prepare(args)
    train.train_mode(run.model, args)
    return run, next(iter(isaid.epoch_loader(data, args, 1))), args


def step(run, batch, args):
    """Losses and gradients of a batch."""
    losses = train.compute_losses(run.model, run.task, *batch, args)
    weights = {**run.model.criterion.weights, "loss_ssl": 1.0}
    sum(weights[name] * values.sum() for name, values in losses.items()).backward()
    return losses, [p.grad for p in run.model.parameters()]


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
@pytest.mark.parametrize("flags, calls", [
    ("--setting detect", "features 4, encode 4, decode 4"),
    ("--setting pretrain --ssl_on features", "features 4, encode 4"),
    ("--setting pretrain --ssl_on image", "features 4, encode 4"),
    ("--setting multitask --ssl_on features", "features 4, encode 8, decode 4"),
    ("--setting multitask --ssl_on image", "features 4, features 4, encode 8, decode 4"),
    ("--setting multitask --ssl_task reconstruct", "features 4, encode 4, decode 4"),
])  # fmt: skip
def test_what_runs_in_each_setting(model, flags, calls, tmp_path, monkeypatch):
    """As few passes as possible; the decoder reads the clean memory, the task the corrupted."""
    run, (images, padding, targets), args = prepared(
        tmp_path, "--model", model, "--ssl_patch", "32", *flags.split())  # fmt: skip
    run.model.eval()
    seen, memories = [], {}
    clean = run.model.encode(run.model.features(images, padding))
    for name in ("features", "encode", "decode"):
        original = getattr(run.model, name)

        def spy(*x, name=name, original=original):
            seen.append(f"{name} {len(x[0][0].features) if name != 'features' else len(x[0])}")
            memories[name] = x[0]
            return original(*x)

        monkeypatch.setattr(run.model, name, spy)  # fmt: skip
    if run.task:
        loss = run.task.loss
        monkeypatch.setattr(
            run.task, "loss", lambda memory, *x: memories.update(task=memory) or loss(memory, *x)
        )
    losses = train.compute_losses(run.model, run.task, images, padding, targets, args)
    assert ", ".join(seen) == calls
    assert ("loss_ssl" in losses) == bool(run.task) and ("loss_ce" in losses) == (
        "decode" in memories
    )
    same = {name: torch.allclose(memories[name][0].features, clean[0].features, atol=1e-4)
            for name in ("decode", "task") if name in memories}  # fmt: skip
    assert same.get("decode", True) and same.get("task") in (None, "reconstruct" in flags)


@pytest.mark.parametrize("epochs", [1, 2, 5, 10, 11])
def test_schedules(epochs):
    """One cycle: up and down to nothing. A drop: a tenth from then on. 0: constant."""
    for steps in (1, 2, 10):
        factors = {}
        for drop in ("cycle", "4", "0"):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
            args, _ = train.parse(["--lr_drop", drop, "--epochs", str(epochs)])
            schedule, factors[drop] = train.build_schedule(optimizer, args, steps), []
            for _ in range(epochs * steps):
                factors[drop].append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
        assert max(factors["cycle"]) == pytest.approx(1) and set(factors["0"]) == {1}
        assert factors["cycle"][-1] < 0.5 or epochs * steps < 4
        dropped = [0.1 ** (i // steps // 4) for i in range(epochs * steps)]
        assert factors["4"] == pytest.approx(dropped)


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
def test_half_precision(model, tmp_path, monkeypatch):
    """Losses near those of fp32, to which matching and losses are given; weights stay fp32."""
    flags = [*MULTITASK, "--model", model]
    right, _ = step(*prepared(tmp_path, *flags))
    seen, used = [], []
    set_losses, linear = detr.Criterion.set_losses, torch.nn.functional.linear
    errors = ssl_tasks.PixelTask.errors
    spies = {"set_losses": lambda self, *x: seen.extend(x[:2]) or set_losses(self, *x)}
    monkeypatch.setattr(detr.Criterion, "set_losses", spies["set_losses"])
    monkeypatch.setattr(
        ssl_tasks.PixelTask, "errors", lambda self, *x: seen.extend(x) or errors(self, *x)
    )
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *x: used.append(linear(*x)) or used[-1]
    )
    run, batch, args = prepared(tmp_path, *flags, "--amp", "bf16")
    found, gradients = step(run, batch, args)
    assert len(seen) == 4 and all(x.dtype == torch.float32 for x in seen)
    assert torch.bfloat16 in {x.dtype for x in used}
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    for name, values in found.items():
        torch.testing.assert_close(values, right[name], rtol=0.1, atol=0.05)
        assert not torch.equal(values, right[name])
    assert all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
def test_compiled(model, tmp_path, monkeypatch):
    """What is compiled gives the same (here by the compiler's front half)."""
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f: compiled.append(f.__name__) or compile_(f, backend="aot_eager")
    )
    flags = [*MULTITASK, "--model", model]
    plain, right = step(*prepared(tmp_path, *flags))
    found, gradients = step(*prepared(tmp_path, *flags, "--compile"))
    assert compiled == ["features", "encode", "decode"]
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, right):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_two_batches_a_step(tmp_path, monkeypatch):
    """Their gradients are averaged."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, most):
        norms.append([p.grad.clone() for p in parameters])
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train.main([*TINY, "--epochs", "1", "--out", str(tmp_path / "start")])
    norms.clear()
    flags = f"--frozen_bn --init {tmp_path}/start/last.pt --epochs 1 --augment none --lr_drop 0"
    train.main([*TINY, *flags.split(), "--accumulate", "2", "--out", str(tmp_path / "run")])
    args, _ = train.parse([*TINY, *flags.split()])
    run, data, _, _ = train.prepare(args)
    train.train_mode(run.model, args)
    for batch in isaid.epoch_loader(data, args, 1):
        step(run, batch, args)  # gradients add up
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for mine, parameter in zip(norms[0], parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad / 2, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- several processes

parallel = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
KINDS = {
    "detr": "--model detr",
    "deformable": "",
    "two-stage": "--two_stage",
    "pretrain": "--setting pretrain",
    "multitask": "--setting multitask --ssl_task jigsaw-continuous",
}
GRADIENTS = """
import sys, parallel, torch, test_train as t
parallel.start("cpu")
for kind, flags in t.KINDS.items():
    run, halves, args = t.two_halves(sys.argv[1], flags)
    t.step(run, halves[parallel.rank()], args)
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    parallel.average_gradients(parameters)
    if parallel.rank() == 0:
        torch.save([p.grad for p in parameters], f"{sys.argv[1]}/{kind}.pt")
"""


def two_halves(out, flags):
    """(run, two batches of four images, the second without objects, flags)."""
    flags = f"{flags} --ssl_patch 16 --limit_train 40 --out {out}/run".split()
    args, _ = train.parse([*TINY, *flags])
    run, data, _, _ = train.prepare(args)
    run.model.eval()  # no statistics of a batch, which differ between its parts
    kinds = [[i for i, labels in enumerate(data.labels) if bool(len(labels)) == full][:2]
             for full in (True, False)] if data.categories else [[0, 1], [2, 3]]  # fmt: skip
    return run, [isaid.collate([data[i] for i in kind]) for kind in kinds], args


@parallel
def test_gradients_of_two_processes(tmp_path, monkeypatch):
    """As in the official code: the mean of the halves', each divided by the mean count."""
    (tmp_path / "gradients.py").write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, "
                                           f"{str(ROOT / 'tests')!r}]\n{GRADIENTS}")  # fmt: skip
    done = command(tmp_path / "gradients.py", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    for kind, flags in KINDS.items():
        run, halves, args = two_halves(tmp_path, flags)
        counts = {"objects": [sum(len(t["labels"]) for t in batch[2]) for batch in halves]}
        if run.task:
            seeds = [[t["seed"] for t in batch[2]] for batch in halves]
            masks = [run.task.loss_mask(run.task.draw(b[1], s)) for b, s in zip(halves, seeds)]
            counts["patches"] = [int(mask.sum()) for mask in masks]
        means = {sum(x) / 2 for x in counts.values()}
        numbers = {float(n): mean for x in counts.values() for n, mean in zip(x, [sum(x) / 2] * 2)}
        monkeypatch.setattr(train.parallel, "mean", lambda n, known=numbers: known[float(n)])
        for batch in halves:
            step(run, batch, args)
        found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        parameters = [p for p in run.model.parameters() if p.requires_grad]
        assert len(found) == len(parameters) and means
        for mine, parameter in zip(found, parameters):
            right = parameter.grad / 2
            assert (mine - right).norm() <= 1e-3 * right.norm() + 1e-6, kind


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A run in two processes, and what it printed."""
    out = tmp_path_factory.mktemp("together") / "run"
    flags = [*MULTITASK, "--limit_train", 16, "--limit_val", 7, "--epochs", 2, "--enc_layers", 1]
    done = command("train.py", *TINY, *flags, "--out", out, processes=2)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@parallel
def test_evaluation_counts_every_image_once(together):
    """One folder, one line an epoch; seven images in one, two and three processes."""
    out, printed = together
    assert printed.count("epoch   1/2") == 1 and "8 images a step, 2 steps an epoch" in printed
    metrics = []
    for processes in (1, 2, 3):
        done = command("eval.py", out, processes=processes)
        assert done.returncode == 0 and done.stdout.count("AP50") == 2, done.stderr
        metrics.append(json.loads((out / "metrics.json").read_text()))
    best = max(lines_of(out), key=lambda line: (line["ap"], line["epoch"]))
    for found in metrics:
        assert found["images"] == 7 and found["per_class"] == metrics[0]["per_class"]
        for name in ("ap", "ar", "ssl_loss"):
            assert found[name] == pytest.approx(best[name], rel=1e-6)


@parallel
def test_an_encoder_without_layers_in_two_processes(tmp_path):
    flags = "--enc_layers", 0, "--limit_train", 16, "--epochs", 1, "--out", tmp_path / "run"
    done = command("train.py", *TINY, *flags, processes=2)
    assert done.returncode == 0, done.stderr


@parallel
def test_an_error_in_one_process_ends_all(folder, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(folder, broken)
    (broken / "train/images/scene_000003.png").write_bytes(b"nonsense")
    done = command("train.py", *TINY, "--data", broken, "--out", tmp_path / "run", processes=2)
    assert done.returncode and "scene_000003.png: is not an image" in done.stderr
    # the data are not there for the second process only, as on another machine
    (tmp_path / "elsewhere.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"os.chdir({str(tmp_path)!r} if os.environ['RANK'] == '0' else '/')\n"
        "import train\ntrain.main(sys.argv[1:])\n"
    )
    flags = "--data", "data", "--out", tmp_path / "other"
    done = command(tmp_path / "elsewhere.py", *TINY, *flags, processes=2)
    assert done.returncode and done.stderr.count("error: ") == 1
    assert "/data: no annotated split 'train'" in done.stderr and not (tmp_path / "other").exists()


def test_collapse_is_said(tmp_path):
    data = isaid.synthetic("val", 3, 64, None)
    box = {"category_id": 1, "bbox": [1, 2, 3, 4]}
    same = [{**box, "image_id": i, "score": 0.1 * i} for i in range(3)]
    assert evaluation.collapsed(data, same) and not evaluation.collapsed(data, same[:2])
    moved = {**same[2], "bbox": [9, 2, 3, 4]}
    assert not evaluation.collapsed(data, [*same[:2], moved])
    line = {"epoch": 1, "train_loss": 1.0, "seconds": 1, "images_per_second": 1, "data_wait": 0}
    assert "the same is found" in evaluation.epoch_text({**line, "collapsed": True}, 1)
    assert coco.one_line("a\ncoco.DataError: b") == "b"
