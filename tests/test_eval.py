"""Metrics are pycocotools'; the command on a run's own images and on others; its mistakes."""

import contextlib
import copy
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import coco
import deformable_attn
import detr
import eval as evaluation
import isaid
import train

TINY = (
    "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 2 --dim_feedforward 32 --num_queries 8 "
    "--image_size 64 --batch_size 4 --epochs 1 --attn torch"
).split()


@pytest.fixture(params=["pycocotools", "faster-coco-eval"])
def evaluator(request):
    if request.param != "pycocotools":
        pytest.importorskip("faster_coco_eval")
    return request.param


@pytest.fixture(scope="module")
def data():
    return isaid.synthetic("val", 40, 128, isaid.transforms(False, 64))


def guesses(data, noise):
    """The truth, or the truth shifted, dropped, repeated and mislabelled at random."""
    rng, results = np.random.default_rng(0), []
    for a in data.annotations:
        for _ in range(rng.integers(0, 4) if noise else 1):
            box = (np.array(a["bbox"]) + noise * rng.normal(0, 2.5, 4)).clip(noise)
            label = int(rng.integers(1, 16)) if rng.random() < 0.2 * noise else a["category_id"]
            result = {"image_id": a["image_id"], "category_id": label, "score": rng.random()}
            results.append({**result, "bbox": box.tolist()})
    return results


def test_truth_scores_one_and_no_truth_is_not_zero(data, evaluator):
    truth, some = guesses(data, noise=0), copy.copy(data)
    metrics = evaluation.coco_metrics(data, truth, evaluator)
    found = [metrics[key] for key in evaluation.METRICS if key != "ap_large"]
    assert found == pytest.approx([1] * 6) and metrics["evaluator"] == evaluator
    assert sum(row["boxes"] for row in metrics["per_class"]) == len(data.annotations)
    some.annotations = [a for a in data.annotations if a["category_id"] != 3]
    metrics = evaluation.coco_metrics(some, truth, evaluator)
    assert metrics["ap_large"] is None and metrics["ap"] == pytest.approx(1)
    assert re.search("baseball_diamond +0 +n/a +n/a\n", evaluation.table(metrics))
    assert evaluation.coco_metrics(data, [], evaluator)["ap"] == 0  # nothing found
    for key, value in (("image_id", 4040), ("category_id", 99)):
        with pytest.raises(coco.DataError, match=f"the results have {key} {value}, which"):
            evaluation.coco_metrics(data, [{**truth[0], key: value}])


def test_results_load_in_pycocotools_as_they_are(data, tmp_path, evaluator):
    results, keys = guesses(data, noise=1), ("images", "categories", "annotations")
    metrics = evaluation.coco_metrics(data, results, evaluator)
    (tmp_path / "truth.json").write_text(json.dumps({key: getattr(data, key) for key in keys}))
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        whole = COCO(str(tmp_path / "truth.json"))
        run = COCOeval(whole, whole.loadRes(str(tmp_path / "results.json")), "bbox")
        for ids, mine in ((sorted(whole.cats), metrics), ([1], metrics["per_class"][0])):
            run.params.catIds = ids
            run.evaluate()
            run.accumulate()
            run.summarize()
            for name, place in zip(evaluation.METRICS, (0, 1, 2, 3, 4, 5, 8)):
                value = mine.get(name, run.stats[place])  # a class has AP and AP50 only
                assert (-1 if value is None else value) == pytest.approx(run.stats[place], abs=1e-9)
    assert 0.1 < metrics["ap"] < 0.9 and 0 < metrics["per_class"][0]["ap"] < 1


def test_the_devkits_ranges(evaluator):
    """An image with 150 small objects and one of 200 pixels: medium for iSAID, large for COCO."""
    boxes = [[20 * (i % 15), 20 * (i // 15), 12, 12] for i in range(150)] + [[300, 0, 200, 200]]
    found = [{"image_id": 0, "category_id": 1, "bbox": box} for box in boxes]
    content = {"images": [{"id": 0, "width": 512, "height": 512}], "annotations": found}
    data = isaid.Detection("", {**content, "categories": [{"id": 1, "name": "x"}]}, None, None)
    results, one = [{**box, "score": 1 - i / 1000} for i, box in enumerate(found)], pytest.approx(1)
    usual = evaluation.coco_metrics(data, results, evaluator)
    devkit = evaluation.coco_metrics(data, results, evaluator, max_dets=1000, areas="isaid")
    assert [devkit[key] for key in evaluation.METRICS] == [one, one, one, one, one, None, one]
    found = [usual[key] for key in evaluation.METRICS[4:]]  # the 151st does not count
    assert found == [None, 0, pytest.approx(100 / 151)] and usual["ap"] < 0.7


def test_what_is_found_is_in_pixels_of_the_file(data):
    """A model that knows what is in the images, in order, scores one; it sees them resized."""

    class Truth(detr.DETR):
        focal, targets = True, (data[i][1] for i in range(40))

        def forward(self, images, padding):
            logits, boxes = (
                torch.full((1, len(images), 9, 15), -9.0),
                torch.rand(1, len(images), 9, 4),
            )
            for b, target in zip(range(len(images)), self.targets):
                k = range(len(target["labels"]))
                boxes[0, b, k], logits[0, b, k, target["labels"]] = target["boxes"], 9
            return {"logits": logits, "boxes": boxes}

    results = evaluation.predict(Truth(15, backbone="resnet18"), data, batch_size=4)
    assert evaluation.coco_metrics(data, results)["ap"] == pytest.approx(1)
    assert len(results) == 40 * 100 and not evaluation.collapsed(data, results)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    isaid.write_scenes(root / "data", {"train": 8, "val": 3}, 64, seed=0)
    train.main([*TINY, "--data", str(root / "data"), "--out", str(root / "run")])
    evaluation.main([str(root / "run")])
    return root / "run"


def test_own_images_and_others(run, tmp_path):
    """Of others nothing is written into the run; the figures of its own are those of training."""
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    metrics, logged = (json.loads((run / x).read_text()) for x in ("metrics.json", "log.jsonl"))
    assert [metrics[key] for key in evaluation.METRICS] == [logged[k] for k in evaluation.METRICS]
    assert metrics["images"] == 3 and metrics["checkpoint"] == str(run / "best.pt")
    data = f"--data {run.parent / 'data'}"
    other = f"{data} --split train --limit_val 5 --max_dets 1000 --areas isaid"
    for flags, n in ((data, 3), ("--split train", 8), ("--limit_val 2", 2), (other, 5)):
        evaluation.main([str(run), *flags.split()])
        evaluation.main([str(run), *flags.split(), "--out", str(tmp_path)])
        assert (metrics := json.loads((tmp_path / "metrics.json").read_text()))["images"] == n
    assert metrics["other"]["max_dets"] == 1000 and (tmp_path / "detections.png").exists()
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}


def test_a_closed_pipe_loses_nothing(run, tmp_path):
    """What is written is there although nobody reads what is printed, as with `| head -1`."""
    file = tmp_path / "found.json"
    flags = f"-u {evaluation.__file__} {run} --split train --out {tmp_path} --export {file}"
    command = [sys.executable, *flags.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    process.stdout.close()
    process.wait()
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 8
    found = json.loads(file.read_text())
    assert len(found) == 800 and found[0].keys() == {"image_id", "category_id", "bbox", "score"}


def test_checkpoints(run, tmp_path):
    """The run's --attn is applied; the same in every image is noticed; NaN gets one line."""
    state = torch.load(run / "best.pt", weights_only=True)

    def changed(**content):
        torch.save({**state, **content}, tmp_path / "a.pt")
        return [str(tmp_path / "a.pt")]

    for attn, name in (("torch", "torch"), ("auto", deformable_attn.backend("cpu")[0])):
        model, _, _ = evaluation.load_run(changed(args={**state["args"], "attn": attn})[0], "cpu")
        assert model.transformer.encoder.layers[0].self_attn.backend == name
    weights = state["model"]
    blind = {k: torch.zeros_like(x) if "input_proj" in k else x for k, x in weights.items()}
    evaluation.main(changed(model=blind))
    assert json.loads((tmp_path / "metrics.json").read_text())["collapsed"] is True
    assert json.loads((run / "metrics.json").read_text())["collapsed"] is False
    weights["class_embed.1.bias"][3] = float("nan")
    with pytest.raises(SystemExit, match="^error: .*_val.json: what the model finds is NaN[^\n]*$"):
        evaluation.main(changed())
    for content, flags, message in (
        ({"categories": state["categories"][1:]}, [], "1 ship, .* are not the model's 2 storage"),
        ({"detector": {**state["detector"], "hidden_dim": 64}}, [], "a.pt: its weights do not fit"),
        ({"args": {**state["args"], "setting": "pretrain"}}, ["--export", "x"], "detects nothing"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}[^\n]*$"):
            evaluation.main([*changed(**content), *flags])


def test_mistakes_get_one_line(run, tmp_path, capsys):
    torch.save({"weight": torch.ones(1)}, tmp_path / "bare.pt")
    for flags, message in {
        "{tmp}": "has no best.pt and no last.pt; is it a run folder of train.py",
        "{tmp}/none.pt": "no such checkpoint",
        "{tmp}/bare.pt": "is not a checkpoint of train.py; start from it with train.py --init",
        "{run} --data {tmp}": "no annotated split 'val' is recognised",
        "{run} --export {tmp}/none/x": "none/x: its folder does not exist",
        "{run} --split test": "--split test has no ground truth; add --export",
        "{run} --max_dets 0": "--max_dets: 0 is not greater than 0",
    }.items():
        with pytest.raises(SystemExit) as stop:
            evaluation.main(flags.format(run=run, tmp=tmp_path).split())
        said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
        assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n?", said)
