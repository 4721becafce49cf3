"""Metrics equal those of pycocotools; the command on a run's own images and on others; errors."""

import json
import os
import re
import shutil
import sys
from argparse import Namespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_weights import publish

import deformable_attn
import detr
import isaid
import train
from eval import (
    METRICS,
    checkpoint_file,
    coco_metrics,
    coco_results,
    default_evaluator,
    detect,
    detect_dataset,
    eval_loader,
    load_run,
    metrics_table,
)
from eval import main as eval_main
from util import coco, plots
from util.files import DataError, read_json
from util.pretrained import coco_categories

PERFECT = [*[pytest.approx(1)] * 5, None, pytest.approx(1)]  # of METRICS, without large objects


@pytest.fixture(params=["pycocotools", "faster-coco-eval"])
def evaluator(request):
    pytest.importorskip(request.param.replace("-", "_"))
    return request.param


class PerfectDetector(torch.nn.Module):
    """Predict the objects of the images of a dataset, which must come in order."""

    focal = True
    postprocess = detr.Detector.postprocess

    def __init__(self, data):
        super().__init__()
        self.items = iter(data)

    def forward(self, images, padding):
        B = len(images)
        logits = torch.full((1, B, 9, 15), -9.0)
        boxes = torch.rand(1, B, 9, 4)
        for b in range(B):
            _, target = next(self.items)
            queries = range(len(target["labels"]))
            boxes[0, b, queries] = target["boxes"]
            logits[0, b, queries, target["labels"]] = 9
        return {"logits": logits, "boxes": boxes}


@pytest.fixture(scope="module")
def data():
    """Images that the model sees at half their size."""
    return isaid.synthetic_dataset("val", 40, 128, isaid.make_transforms(False, 64))


@pytest.fixture(scope="module")
def perfect_results(data):
    """COCO results of a model that knows the objects."""
    results = []
    loader = eval_loader(data, 4, 0, "")
    for target, detection in detect(PerfectDetector(data), loader, "cpu"):
        results += coco_results(detection, target["image_id"], data.categories)
    return [result for result in results if result["score"] > 0.5]


def values_of(metrics):
    return [metrics[name] for name in METRICS]


def test_perfect_results_score_one_and_no_results_zero(data, perfect_results, evaluator):
    metrics = coco_metrics(data, perfect_results, evaluator)
    assert values_of(metrics) == PERFECT
    assert sum(row["boxes"] for row in metrics["per_class"]) == len(data.annotations)
    assert coco_metrics(data, [], evaluator)["ap"] == 0
    for key, value in (("image_id", 4040), ("category_id", 99)):
        wrong = [{**perfect_results[0], key: value}]
        with pytest.raises(DataError, match=f"results contain {key} {value}, which is not in"):
            coco_metrics(data, wrong)


@pytest.mark.parametrize("model", detr.DETECTORS)
def test_the_held_out_loss_is_that_of_training(model):
    """It adds all terms of all layers, weighted as in the training loop; batches count by size."""
    args, _ = train.parse(f"--model {model} --hidden_dim 32 --dec_layers 2 --amp no".split())
    torch.manual_seed(0)
    detector = detr.build_detector(**train.detector_config(args, 15)).eval()
    data = isaid.synthetic_dataset("val", 5, 64, isaid.make_transforms(False, 64))
    losses = []
    for batch in isaid.data_loader(data, 0, batch_size=3):
        terms = train.compute_losses(detector, None, *batch, args)
        weights = detector.criterion.weights
        losses.append(sum(weights[name] * loss.sum().item() for name, loss in terms.items()))
    expected = (3 * losses[0] + 2 * losses[1]) / 5
    options = Namespace(batch_size=3, workers=0, device="cpu")
    _, loss = detect_dataset(detector, data, options)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_right_wrong_and_missed():
    """A hit is of the same class with IoU 0.5, each object once, the best first."""
    plane = {"category_id": 1}
    ship = {"category_id": 2}
    truth = [{**plane, "bbox": [0, 0, 10, 10]}, {**ship, "bbox": [20, 0, 10, 10]}]
    results = [
        {**plane, "bbox": [0, 0, 10, 9]},
        {**plane, "bbox": [0, 0, 10, 10]},
        {**plane, "bbox": [20, 0, 10, 10]},
        {**ship, "bbox": [25, 0, 10, 10]},
    ]
    assert plots.greedy_match(results, truth) == ([True, False, False, False], [True, False])
    assert plots.greedy_match(results[1:2], truth) == ([True], [True, False])
    assert plots.greedy_match(results, []) == ([False] * 4, [])
    assert plots.greedy_match([], truth) == ([], [False, False])


def disturbed(results):
    """COCO results shifted, dropped, repeated and mislabeled at random."""
    rng = np.random.default_rng(0)
    repeated = []
    for result in results:
        repeated += [result] * rng.integers(0, 4)
    disturbed = []
    for result in repeated:
        box = (np.array(result["bbox"]) + rng.normal(0, 2.5, 4)).clip(1).tolist()
        category_id = result["category_id"]
        if rng.random() < 0.2:
            category_id = int(rng.integers(1, 16))
        score = rng.random()
        disturbed.append({**result, "category_id": category_id, "bbox": box, "score": score})
    return disturbed


def test_metrics_are_those_of_pycocotools(data, perfect_results, evaluator):
    """The results load there as they are, and score the same."""
    results = disturbed(perfect_results)
    metrics = coco_metrics(data, results, evaluator)
    truth = COCO()
    truth.dataset = {
        "images": data.images,
        "categories": data.categories,
        "annotations": data.annotations,
    }
    truth.createIndex()
    expected = COCOeval(truth, truth.loadRes(results), "bbox")
    expected.evaluate()
    expected.accumulate()
    expected.summarize()
    values = [-1 if value is None else value for value in values_of(metrics)]
    assert values == pytest.approx(expected.stats[[0, 1, 2, 3, 4, 5, 8]], abs=1e-9)
    aps = expected.eval["precision"][:, :, :, 0, -1].mean((0, 1))  # -1 without ground truth
    class_aps = [-1 if row["ap"] is None else row["ap"] for row in metrics["per_class"]]
    assert class_aps == pytest.approx(aps)
    assert 0.1 < metrics["ap"] < 0.9
    assert metrics["evaluator"] == evaluator


def test_the_devkits_ranges_and_a_class_without_truth(evaluator):
    """150 small objects of x and one of 200 pixels: medium for iSAID, large for COCO; none of y."""
    boxes = [[20 * (i % 15), 20 * (i // 15), 12, 12] for i in range(150)]
    boxes.append([300, 0, 200, 200])
    truth = [{"image_id": 0, "category_id": 1, "bbox": b, "score": 1 / b[2]} for b in boxes]
    content = {
        "images": [{"id": 0, "file_name": "", "width": 512, "height": 512}],
        "categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}],
        "annotations": truth,
    }
    data = isaid.DetectionDataset("", content, None, None)
    results = [*truth, {**truth[0], "category_id": 2}]
    usual = coco_metrics(data, results, evaluator)
    devkit = coco_metrics(data, results, evaluator, max_dets=1000, size_ranges="isaid")
    assert values_of(devkit) == PERFECT
    assert re.search("y +0 +n/a +n/a$", metrics_table(devkit))
    assert usual["ap_medium"] is None
    assert usual["ap_large"] == 0
    assert usual["ap"] < 0.7
    assert usual["ar"] == pytest.approx(100 / 151)  # the 151st does not count


LARGE = 2**63
IDS = {  # three ids of images
    "negative": [-1, -(2**40), 0],
    "over 31 bits": [2**31, 2**31 - 1, 2**33],
    "around 63 bits": [LARGE - 1, LARGE + 5, LARGE // 2],
    "of both signs": [-(2**80), 2**80, 2**80 + 1],
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_any_size(kind, evaluator):
    """The metrics are those of small ids, and the dataset and the results keep their own ids."""
    boxes = [[5, 5, 20, 20], [10, 40, 30, 20], [50, 50, 40, 40]]

    def metrics_with(image_ids, class_ids):
        images = [{"id": i, "file_name": "", "width": 99, "height": 99} for i in image_ids]
        truth = []
        for i, box in zip(image_ids, boxes):
            truth.append({"image_id": i, "category_id": class_ids[0], "bbox": box})
        truth.append({"image_id": image_ids[0], "category_id": class_ids[1], "bbox": boxes[2]})
        categories = [{"id": k, "name": f"class {k}"} for k in class_ids]
        content = {"images": images, "categories": categories, "annotations": truth}
        data = isaid.DetectionDataset("", content, None, None)
        results = [{**annotation, "score": 0.5} for annotation in truth]
        results[1] = {**results[1], "bbox": boxes[0]}
        metrics = coco_metrics(data, results, evaluator)
        assert {result["image_id"] for result in results} == set(image_ids)
        assert [row["id"] for row in metrics["per_class"]] == sorted(class_ids)
        aps = [row["ap"] for row in metrics["per_class"]]
        if class_ids[0] > class_ids[1]:
            aps.reverse()
        return values_of(metrics), aps

    ranks = [sorted(IDS[kind]).index(image_id) for image_id in IDS[kind]]
    expected, aps = metrics_with(ranks, [1, 2])
    assert 0.5 < expected[0] < 1
    assert metrics_with(IDS[kind], IDS[kind][:2]) == (expected, aps)


def test_a_broken_evaluator_is_replaced(data, perfect_results, tmp_path, monkeypatch, capsys):
    """faster-coco-eval is optional: if it cannot be imported, a line says why, once."""
    broken = tmp_path / "faster_coco_eval"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libGL.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.startswith("faster_coco_eval"):
            monkeypatch.delitem(sys.modules, name)
    default_evaluator.cache_clear()
    for _ in range(2):
        metrics = coco_metrics(data, perfect_results)
        assert values_of(metrics) == PERFECT
        assert metrics["evaluator"] == "pycocotools"
    default_evaluator.cache_clear()
    text = capsys.readouterr().err
    assert text.count("warning: faster-coco-eval cannot be imported (libGL.so.1: cannot open)") == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    isaid.write_scenes(root / "data", {"train": 8, "val": 3}, 64, seed=0)
    flags = "--hidden_dim 32 --enc_layers 1 --dec_layers 2 --image_size 64 --epochs 1 --attn torch"
    train.main(f"{flags} --data {root}/data --out {root}/run".split())
    eval_main([f"{root}/run"])
    return root / "run"


def modification_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_own_images_have_the_metrics_of_training(run):
    metrics = read_json(run / "metrics.json")
    logged = json.loads((run / "log.jsonl").read_text(encoding="utf-8"))
    for name in (*METRICS, "val_loss"):
        assert metrics[name] == logged[name]


def test_metrics_of_other_images_are_not_written_into_the_run(run, tmp_path):
    before = modification_times(run)
    data = f"--data {run}/../data"
    for flags, n in (
        (data, 3),
        ("--split train", 8),
        ("--limit_val 2", 2),
        (f"{data} --split train --limit_val 5 --max_dets 1000 --areas isaid", 5),
    ):
        eval_main([str(run), *flags.split()])
        eval_main([str(run), *flags.split(), "--out", str(tmp_path)])
        metrics = read_json(tmp_path / "metrics.json")
        assert metrics["images"] == n
    assert metrics["other"]["max_dets"] == 1000
    assert metrics["other"]["size_ranges"] == "isaid"
    assert (tmp_path / "detections.png").exists()
    assert modification_times(run) == before


def test_a_test_split_with_annotations_is_evaluated(run, tmp_path, capsys):
    """Its metrics are those of the same images as another split."""
    folder = tmp_path / "test"
    shutil.copytree(run / "../data/train", folder)
    (folder / "instancesonly_filtered_train.json").rename(coco.split_files(tmp_path, "test")[1])
    tables = []
    for flags in (["--split", "train"], ["--split", "test", "--data", str(tmp_path)]):
        eval_main([str(run), *flags])
        name, table = capsys.readouterr().out.split("\n", 1)
        assert name.endswith(f"_{flags[1]}.json")
        tables.append(table)
    assert "\n8 images, " in tables[0]
    assert tables[0] == tables[1]


def test_a_closed_pipe_loses_nothing(run, tmp_path, monkeypatch):
    """All files are written although only one printed line is read (`| head -1`)."""
    printed = Mock(side_effect=[None, BrokenPipeError])
    monkeypatch.setattr(os, "dup2", Mock())  # the test's own output stays
    monkeypatch.setattr("eval.print", printed, raising=False)
    flags = f"{run} --split train --out {tmp_path} --export {tmp_path}/x.json"
    with pytest.raises(SystemExit, match="141"):
        eval_main(flags.split())
    assert printed.call_count == 2
    assert read_json(tmp_path / "metrics.json")["images"] == 8
    assert len(read_json(tmp_path / "x.json")) == 800


def test_the_backend_of_attention_and_collapsed_predictions(run, tmp_path):
    """A run of the reference is evaluated with it; identical predictions are noticed."""
    state = torch.load(run / "best.pt", weights_only=True)
    auto, _ = deformable_attn.choose_backend("cpu")
    state["args"]["attn_backend"] = "auto"
    for name, weight in state["model"].items():
        if "input_proj" in name:
            weight.zero_()
    torch.save(state, tmp_path / "best.pt")
    eval_main([str(tmp_path)])
    for folder, backend, collapsed in ((run, "torch", False), (tmp_path, auto, True)):
        model = load_run(folder, "cpu").model
        assert model.transformer.encoder.layers[0].self_attn.backend == backend
        assert read_json(folder / "metrics.json")["collapsed"] is collapsed


def test_the_checkpoint_of_a_run(run, tmp_path):
    """The best one of a folder; a file or a URL stands for itself."""
    assert checkpoint_file(str(run)) == run / "best.pt"
    shutil.copy(run / "last.pt", tmp_path)
    assert checkpoint_file(tmp_path) == tmp_path / "last.pt"
    for name in (str(run / "last.pt"), "https://host/folder/a.pt"):
        assert checkpoint_file(name) == name


def test_errors_have_one_line(run, tmp_path, capsys):
    state = torch.load(run / "best.pt", weights_only=True)
    nan = {**state["model"], "class_embed.1.bias": torch.full((15,), float("nan"))}
    other_classes = [*state["categories"][1:], {"id": 99, "name": "other"}]
    wide = {**state["detector"], "hidden_dim": 64}
    pretrain = {**state["args"], "setting": "pretrain"}
    torch.save({"weight": torch.ones(1)}, tmp_path / "b.pt")
    a = "{tmp}/a.pt"
    b = "{tmp}/b.pt"
    for flags, changes, message in (
        (a, {"model": nan}, "_val.json: model outputs contain NaN or Inf"),
        (a, {"categories": other_classes}, "_val.json: dataset classes .1 ship, .*model's .2 stor"),
        (a, {"detector": wide}, "a.pt: weights do not match the stored config"),
        (f"{a} --export x", {"args": pretrain}, "a.pt: is a self-supervised pretraining"),
        (b, {}, "b.pt: .*not .* train.py.*--init"),
        ("{tmp}/none", {}, "none: no such run folder or checkpoint file"),
        ("{run}/..", {}, "no best.pt or last.pt found"),
        ("{run} --export {tmp}/none/x", {}, "none/x: cannot write"),
        ("{run} --split test", {}, "no annotated 'test' split found .*use python -m tools.predict"),
    ):
        torch.save({**state, **changes}, tmp_path / "a.pt")
        with pytest.raises(SystemExit) as stop:
            eval_main(flags.format(run=run, tmp=tmp_path).split())
        text = stop.value.code
        if not isinstance(text, str):
            text = capsys.readouterr().err
        assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n?", text), text


# ---------------------------------------------------------------- published models
def test_a_published_model_on_data_of_coco(tmp_path, monkeypatch, capsys):
    """Its best detection of each class as ground truth gives AP 1."""
    publish(tmp_path, monkeypatch, "deformable_detr")
    monkeypatch.chdir(tmp_path)
    resize = isaid.resize
    monkeypatch.setattr(isaid, "resize", lambda image_size: resize(96))  # not 800: faster
    (tmp_path / "data/val2017").mkdir(parents=True)
    (tmp_path / "data/annotations").mkdir()
    images = []
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (60, 120, 3), np.uint8)
        Image.fromarray(pixels).save(f"data/val2017/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 120, "height": 60})
    content = {"images": images, "categories": coco_categories(), "annotations": []}
    file = tmp_path / "data/annotations/instances_val2017.json"
    file.write_text(json.dumps(content))
    eval_main("tiny --data data --export found.json".split())

    best = {}  # the best detection of each class
    for result in sorted(read_json("found.json"), key=lambda result: result["score"]):
        best[result["category_id"]] = result
    truth = []  # without boxes that would be clipped
    for result in best.values():
        x, y, w, h = result["bbox"]
        if x >= 0 and y >= 0 and x + w <= 120 and y + h <= 60:
            truth.append(result)
    assert len(truth) > 3
    file.write_text(json.dumps({**content, "annotations": truth}))
    eval_main("tiny --data data --out out".split())
    metrics = read_json("out/metrics.json")
    assert metrics["checkpoint"] == "tiny"
    assert metrics["images"] == 2
    assert len(metrics["per_class"]) == 80
    for row in metrics["per_class"]:
        assert row["ap"] == (pytest.approx(1) if row["boxes"] else None), row
    with pytest.raises(SystemExit, match="error: tiny: requires --data DIR"):
        eval_main(["tiny"])


def test_the_file_of_a_runs_tokens_has_moved(run, tmp_path):
    state = torch.load(run / "best.pt", weights_only=True)
    state["task"] = {"name": "mim-discrete", "tokenizer_weights": f"{tmp_path}/encoder.pkl"}
    torch.save(state, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=f"^{tmp_path}/encoder.pkl: DALL-E's .* put it back there"):
        load_run(tmp_path, "cpu")
