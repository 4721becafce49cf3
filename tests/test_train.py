"""The real command lines, small: what a run leaves behind, that it learns, and what it says of every mistake."""
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

import detr
import eval as evaluation
import isaid
import run_state
import train

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "32",
        "--num_queries", "8", "--image_size", "64", "--limit_train", "8", "--limit_val", "3", "--batch_size", "4"]


def command(*args, **options):
    """Run a script of the repository as a user does."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("dataset") / "data"
    isaid.main(["scenes", str(out), "--train", "8", "--val", "3", "--image_size", "64"])
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder):
    """A run of the real command on a dataset on disk, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = command("train.py", *TINY, "--data", folder, "--out", out, "--epochs", 2, "--workers", 2)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_what_it_promises(run):
    out, printed = run
    assert sorted(p.name for p in out.iterdir()) == ["best.pt", "config.json", "curves.png", "detections.png", "last.pt",
                                                     "log.jsonl"]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"train_loss", "train_loss_ce", "train_loss_bbox", "train_loss_giou", "ap", "ap50", "ap_small", "ar", "seconds",
            "images_per_second", "data_wait"} <= lines[0].keys()
    assert all(0 <= line["data_wait"] <= 1 and 0 <= line["ap"] <= 1 for line in lines)
    config = json.loads((out / "config.json").read_text())
    assert config["args"]["hidden_dim"] == 32 and config["versions"]["torch"] == torch.__version__
    assert re.search(r"attention +(cpu|torch): \S+", printed) and "4 images a step, 2 steps an epoch" in printed
    assert re.search(r"revision +\w+", printed) and "M parameters" in printed and "8 images" in printed
    assert all(f"{i + 1:>4} {name}" in printed for i, name in enumerate(isaid.CLASSES))
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    aps = [json.loads(line)["ap"] for line in (out / "log.jsonl").read_text().splitlines()]
    best = max((ap, epoch) for epoch, ap in enumerate(aps, 1))[1]  # of equals the last one
    assert torch.load(out / "best.pt", weights_only=True)["epoch"] == best
    assert checkpoint["epoch"] == 2 and [c["name"] for c in checkpoint["categories"]] == list(isaid.CLASSES)


def test_evaluating_the_run(run, folder, tmp_path):
    out, _ = run
    done = command("eval.py", out, "--export", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert re.search(r"AP \d\.\d{3}  AP50 \d\.\d{3}  AP75", done.stdout) and "Swimming_pool" in done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    best = max(json.loads(line)["ap"] for line in (out / "log.jsonl").read_text().splitlines())
    assert metrics["ap"] == pytest.approx(best, abs=1e-6) and metrics["images"] == 3
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 3 * 100 and found[0].keys() == {"image_id", "category_id", "bbox", "score"}
    evaluation.main([str(out / "last.pt"), "--data", str(folder), "--split", "train", "--limit_val", "2"])
    assert json.loads((out / "other/metrics.json").read_text())["images"] == 2
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_evaluating_on_coco_files(run, folder, tmp_path):
    """Any images with their annotations; what is written is there although nobody reads what is printed."""
    images, annotations = isaid.split_files(folder, "train")
    flags = map(str, [run[0], "--images", images, "--json", annotations, "--out", tmp_path, "--export", tmp_path / "found.json"])
    process = subprocess.Popen([sys.executable, "-u", "eval.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    process.wait()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["images"] == 8 and str(annotations) in metrics["data"] and len(json.loads((tmp_path / "found.json").read_text())) == 800


@pytest.mark.parametrize("flags", [
    ["--model", "detr"], ["--num_feature_levels", "1"], ["--two_stage"], ["--no-with_box_refine"],
    ["--lr_schedule", "step", "--lr_drop", "1"]])
def test_it_learns(flags, tmp_path):
    """The loss falls on a handful of scenes, for either detector and every kind of head."""
    train.main([*TINY, *flags, "--out", str(tmp_path / "run"), "--overfit", "4", "--epochs", "2", "--eval_every", "2",
                "--batch_size", "2", "--lr", "1e-3", "--lr_backbone", "1e-3"])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["train_loss"] < 0.8 * lines[0]["train_loss"]
    assert [line["epoch"] for line in lines if "ap" in line] == [2]


def test_the_same_seed_gives_the_same_run(tmp_path):
    logs = []
    for name, workers in (("a", 0), ("b", 2)):
        train.main([*TINY, "--out", str(tmp_path / name), "--epochs", "1", "--workers", str(workers), "--vflip"])
        logs.append(json.loads((tmp_path / name / "log.jsonl").read_text()))
    assert logs[0]["train_loss"] == logs[1]["train_loss"] and logs[0]["ap"] == logs[1]["ap"]


def test_coco_files_and_init(run, folder, tmp_path):
    """The datasets of others: COCO flags, other classes, weights of an earlier run."""
    out, _ = run
    for split in ("train", "val"):
        coco = json.loads(isaid.split_files(folder, split)[1].read_text())
        coco["categories"] = [{"id": 3, "name": "thing"}]
        coco["annotations"] = [{**a, "category_id": 3} for a in coco["annotations"]]
        (tmp_path / f"{split}.json").write_text(json.dumps(coco))
    flags = [x for split in ("train", "val") for x in (f"--{split}_images", str(folder / split / "images"),
                                                       f"--{split}_json", str(tmp_path / f"{split}.json"))]
    done = command("train.py", *TINY, *flags, "--init", out, "--epochs", 1, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "dropped: class_embed.0.weight" in done.stdout and "3 thing" in done.stdout
    model, _, _, categories, _ = evaluation.load_run(tmp_path / "run", "cpu")
    assert categories == [{"id": 3, "name": "thing"}] and model.class_embed[0].out_features == 1


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [train.make_run_folder(train.parse([])) for _ in range(3)]
    assert [str(folder) for folder in folders] == [f"runs/deformable_detr-detect-{i}" for i in (1, 2, 3)]


def test_recipes():
    """Every recipe is a list of known flags and builds the official model."""
    for name in ("detr", "deformable_detr"):
        args = train.parse([f"@{ROOT}/recipes/{name}.txt"])
        config = train.detector_config(args, 15)
        official = detr.build_detector(name, 15)
        model = detr.build_detector(**config)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in official.state_dict().items()}
        groups = run_state.parameter_groups(model, None, args)
        trained = sum(p.requires_grad for p in model.parameters())
        assert sum(len(group["params"]) for group in groups) == trained
        rates = {"detr": {1e-4, 1e-5}, "deformable_detr": {2e-4, 2e-5}}[name]
        assert {round(group["lr"], 12) for group in groups} == rates


def test_imagenet_weights(tmp_path, monkeypatch):
    """Torchvision's file is taken from its cache, or downloaded; without a connection there is one line that says so."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = train.detector_config(train.parse(TINY), 3)

    def offline(*args, **kwargs):
        raise URLError("offline")
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(ValueError, match="ImageNet weights of resnet18 cannot be downloaded.*offline"):
        train.build_model(config, "imagenet")
    resnet = torchvision.models.resnet18()
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(resnet.state_dict(), tmp_path / "checkpoints/resnet18-f37072fd.pth")
    for frozen_bn in (False, True):
        model = train.build_model({**config, "frozen_bn": frozen_bn}, "imagenet")
        assert torch.equal(model.backbone[0].body.layer3[1].conv2.weight, resnet.layer3[1].conv2.weight)


def test_interrupt_leaves_a_usable_checkpoint(tmp_path):
    process = subprocess.Popen([sys.executable, "train.py", *TINY, "--epochs", "500", "--eval_every", "1000", "--out",
                                str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/log.jsonl"
    for _ in range(600):
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and re.search(r"stopped in epoch \d+ after \d of 2 steps", printed)
    evaluation.main([str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["images"] == 3


# ---------------------------------------------------------------- mistakes

MISTAKES = [
    (["--data", "nowhere"], "nowhere/train/instancesonly_filtered_train.json: cannot be read"),
    (["--data", "{folder}", "--train_json", "x"], "--data and --train_json name two datasets"),
    (["--train_json", "x"], "go together"),
    (["--out", "{folder}"], "exists already"),
    (["--out", "{file}/run"], "cannot be made"),
    (["--batch_size", "0"], "--batch_size: 0 is not greater than 0"),
    (["--model", "yolo"], "--model: invalid choice: 'yolo'"),
    (["--model", "detr", "--two_stage"], "--two_stage belongs to --model deformable_detr"),
    (["--hidden_dim", "100"], "hidden_dim 100 must be a multiple"),
    (["--two_stage", "--no-with_box_refine"], "two_stage needs with_box_refine"),
    (["--frozen_bn"], "add --backbone_weights imagenet or --init"),
    (["--device", "cuda:99"], "--device: cuda:99 cannot be used here"),
    (["--device", "toaster"], "--device: toaster cannot be used here"),
    (["--seed", "-1"], "--seed: -1 is not at least 0"),
    (["--seed", "99999999999999999999"], "--seed"),
    (["--lr", "inf"], "--lr: inf is not greater than 0 and at most"),
    (["--image_size", "32"], "--image_size 32 leaves too few cells"),
    (["--init", "{folder}"], "has no best.pt and no last.pt"),
    (["--lr", "fast"], "--lr: invalid number value: 'fast'"),
    (["--dropout", "1.5"], "--dropout 1.5"),
    (["--init", "missing.pt"], "missing.pt: no such checkpoint file"),
    (["--init", "{file}"], "not a checkpoint of tensors"),
    (["@missing.txt"], "missing.txt"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_mistakes_get_one_line(flags, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    names = {"folder": folder, "file": tmp_path / "file"}
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *(flag.format(**names) for flag in flags)])
    said = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert len(said.strip().splitlines()[-1]) == len(said.strip()) or said.startswith("usage")
    assert not (tmp_path / "runs").exists()  # found before anything was made


def test_mistakes_in_data_get_one_line(folder, run, tmp_path):
    """Through the real commands, also from a loader process."""
    broken = tmp_path / "data"
    shutil.copytree(folder, broken)
    (broken / "train/images/scene_000003.png").write_bytes(b"nonsense")
    for args in (["train.py", *TINY, "--data", broken, "--out", tmp_path / "run"],
                 ["train.py", *TINY, "--data", broken, "--out", tmp_path / "run-1", "--workers", 1],
                 ["eval.py", run[0], "--data", broken, "--split", "train", "--workers", 1]):
        done = command(*args)
        assert done.returncode == 1 and "scene_000003.png: is not an image" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_other_classes_are_refused(folder, run, tmp_path, capsys):
    other = tmp_path / "data"
    shutil.copytree(folder, other)
    path = isaid.split_files(other, "val")[1]
    coco = json.loads(path.read_text())
    coco["categories"][0]["name"] = "submarine"
    path.write_text(json.dumps(coco))
    with pytest.raises(SystemExit, match="1 submarine"):
        train.main([*TINY, "--data", str(other), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="1 submarine.*are not the model's"):
        evaluation.main([str(run[0]), "--data", str(other)])
    for wrong, message in ((tmp_path, "is it a run folder"), (tmp_path / "none.pt", "no such checkpoint")):
        with pytest.raises(SystemExit, match=message):
            evaluation.main([str(wrong)])
    for flag, value, message in (("--export", tmp_path / "none/x.json", "there is no folder"), ("--limit_val", "0", "greater"),
                                 ("--device", "toaster", "cannot be used"), ("--json", path, "--json needs --images")):
        with pytest.raises(SystemExit):
            evaluation.main([str(run[0]), flag, str(value)])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--images needs --json"):
        evaluation.main([str(run[0]), "--images", str(other)])


@pytest.mark.parametrize("epochs", [1, 2, 5, 10, 11])
def test_schedules(epochs):
    """One cycle: up to the full rate and down to nothing. Step: a tenth after each drop. At any number of steps."""
    for steps in (1, 2, 10):
        factors = {}
        for name in ("onecycle", "step"):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
            args = train.parse(["--lr_schedule", name, *(["--lr_drop", "4"] if name == "step" else []), "--epochs", str(epochs)])
            schedule, factors[name] = run_state.build_schedule(optimizer, args, steps), []
            for _ in range(epochs * steps):
                factors[name].append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
        assert max(factors["onecycle"]) == pytest.approx(1) and (factors["onecycle"][-1] < 0.5 or epochs * steps < 4)
        assert factors["step"] == pytest.approx([0.1 ** (i // steps // 4) for i in range(epochs * steps)])
