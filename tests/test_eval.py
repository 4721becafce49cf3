"""Metrics are pycocotools'; the command on a run's own images and on others; its mistakes."""

import os
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import deformable_attn
import detr
import isaid
import train
from eval import METRICS, coco_metrics, detect_dataset, load_run, metrics_table
from eval import main as eval_main
from util import plots
from util.files import DataError, read_json

PERFECT = [*[pytest.approx(1)] * 5, None, pytest.approx(1)]  # of METRICS, without large objects


@pytest.fixture(params=["pycocotools", "faster-coco-eval"])
def evaluator(request):
    pytest.importorskip(request.param.replace("-", "_"))
    return request.param


class Truth(torch.nn.Module):
    focal, postprocess = True, detr.Detector.postprocess

    def forward(self, images, padding):
        logits, boxes = torch.full((1, 4, 9, 15), -9.0), torch.rand(1, 4, 9, 4)
        for b, (_, target) in zip(range(4), self.images):
            k = range(len(target["labels"]))
            boxes[0, b, k], logits[0, b, k, target["labels"]] = target["boxes"], 9
        return {"logits": logits, "boxes": boxes}


@pytest.fixture(scope="module")
def data():
    """Images that the model sees at half their size, and what one finds that knows them."""
    data, model = isaid.synthetic_dataset("val", 40, 128, isaid.make_transforms(False, 64)), Truth()
    model.images = iter(data)
    data.truth = [found for found in detect_dataset(model, data, 4) if found["score"] > 0.5]
    return data


def test_truth_scores_one_and_nothing_zero(data, evaluator):
    metrics = coco_metrics(data, data.truth, evaluator)
    assert [metrics[key] for key in METRICS] == PERFECT
    assert sum(row["boxes"] for row in metrics["per_class"]) == len(data.annotations)
    assert coco_metrics(data, [], evaluator)["ap"] == 0
    for key, value in (("image_id", 4040), ("category_id", 99)):
        with pytest.raises(DataError, match=f"the results have {key} {value}, which"):
            coco_metrics(data, [{**data.truth[0], key: value}])


@pytest.mark.parametrize("model", detr.DETECTORS)
def test_the_held_out_loss_is_that_of_training(model):
    """Of each batch, all terms of all layers, weighted: what the training loop would add up."""
    args, _ = train.parse(f"--model {model} --hidden_dim 32 --dec_layers 2 --amp no".split())
    torch.manual_seed(0)
    made = detr.build_detector(**train.detector_config(args, 15)).eval()
    data, losses = isaid.synthetic_dataset("val", 5, 64, isaid.make_transforms(False, 64)), []
    detect_dataset(made, data, 3, losses=losses)
    assert [images for images, _ in losses] == [3, 2]
    for (_, loss), batch in zip(losses, isaid.data_loader(data, 0, batch_size=3)):
        terms = train.compute_losses(made, None, *batch, args)
        total = sum(made.criterion.weights[name] * x.sum() for name, x in terms.items())
        assert loss == pytest.approx(total.item(), rel=1e-4)


def test_right_wrong_and_missed():
    """A hit is of the same class with IoU 0.5, each object once, the best first."""
    plane, ship = {"category_id": 1}, {"category_id": 2}
    truth = [{**plane, "bbox": [0, 0, 10, 10]}, {**ship, "bbox": [20, 0, 10, 10]}]
    found = [{**plane, "bbox": [0, 0, 10, 9]}, {**plane, "bbox": [0, 0, 10, 10]},
             {**plane, "bbox": [20, 0, 10, 10]}, {**ship, "bbox": [25, 0, 10, 10]}]  # fmt: skip
    assert plots.greedy_match(found, truth) == ([True, False, False, False], [True, False])
    assert plots.greedy_match(found[1:2], truth) == ([True], [True, False])
    assert plots.greedy_match(found, []) == ([False] * 4, [])
    assert plots.greedy_match([], truth) == ([], [False, False])


def test_results_load_in_pycocotools_as_they_are(data, evaluator):
    """The truth shifted, dropped, repeated and mislabelled at random scores the same there."""
    rng, results = np.random.default_rng(0), []
    for found in [found for found in data.truth for _ in range(rng.integers(0, 4))]:
        box = (np.array(found["bbox"]) + rng.normal(0, 2.5, 4)).clip(1).tolist()
        label = int(rng.integers(1, 16)) if rng.random() < 0.2 else found["category_id"]
        results.append({**found, "category_id": label, "bbox": box, "score": rng.random()})
    metrics = coco_metrics(data, results, evaluator)
    truth = COCO()
    truth.dataset = {key: getattr(data, key) for key in ("images", "categories", "annotations")}
    truth.createIndex()
    run = COCOeval(truth, truth.loadRes(results), "bbox")
    for step in (run.evaluate, run.accumulate, run.summarize):
        step()
    found = [-1 if metrics[key] is None else metrics[key] for key in METRICS]
    assert found == pytest.approx(run.stats[[0, 1, 2, 3, 4, 5, 8]], abs=1e-9)
    aps = run.eval["precision"][:, :, :, 0, -1].mean((0, 1))  # -1 without ground truth
    assert [row["ap"] or 0 for row in metrics["per_class"]] == pytest.approx(aps.clip(0))
    assert 0.1 < metrics["ap"] < 0.9 and metrics["evaluator"] == evaluator


def test_the_devkits_ranges_and_a_class_without_truth(evaluator):
    """150 small objects of x and one of 200 pixels: medium for iSAID, large for COCO; none of y."""
    boxes = [[20 * (i % 15), 20 * (i // 15), 12, 12] for i in range(150)] + [[300, 0, 200, 200]]
    found = [{"image_id": 0, "category_id": 1, "bbox": b, "score": 1 / b[2]} for b in boxes]
    content = {"images": [{"id": 0, "file_name": "", "width": 512, "height": 512}]}
    content["categories"] = [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]
    data = isaid.DetectionDataset("", {**content, "annotations": found}, None, None)
    results = [*found, {**found[0], "category_id": 2}]
    usual = coco_metrics(data, results, evaluator)
    devkit = coco_metrics(data, results, evaluator, max_dets=1000, areas="isaid")
    assert [devkit[key] for key in METRICS] == PERFECT
    assert re.search("y +0 +n/a +n/a$", metrics_table(devkit))
    assert usual["ap_medium"] is None and usual["ap_large"] == 0 and usual["ap"] < 0.7
    assert usual["ar"] == pytest.approx(100 / 151)  # the 151st does not count


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    isaid.write_scenes(root / "data", {"train": 8, "val": 3}, 64, seed=0)
    flags = "--hidden_dim 32 --enc_layers 1 --dec_layers 2 --image_size 64 --epochs 1 --attn torch"
    train.main(f"{flags} --data {root}/data --out {root}/run".split())
    eval_main([f"{root}/run"])
    return root / "run"


def test_own_images_and_others(run, tmp_path):
    """Of others nothing is written into the run; the figures of its own are those of training."""
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    metrics, logged = (read_json(run / name) for name in ("metrics.json", "log.jsonl"))
    same = *METRICS, "val_loss"
    assert [metrics[key] for key in same] == [logged[key] for key in same]
    data = f"--data {run}/../data"
    other = f"{data} --split train --limit_val 5 --max_dets 1000 --areas isaid"
    for flags, n in ((data, 3), ("--split train", 8), ("--limit_val 2", 2), (other, 5)):
        for out in ([], ["--out", str(tmp_path)]):
            eval_main([str(run), *flags.split(), *out])
        assert (metrics := read_json(tmp_path / "metrics.json"))["images"] == n
    assert metrics["other"]["max_dets"] == 1000 and (tmp_path / "detections.png").exists()
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}


def test_a_closed_pipe_loses_nothing(run, tmp_path, monkeypatch):
    """What is written is there although only a line is read of what is printed (`| head -1`)."""
    printed = Mock(side_effect=[None, BrokenPipeError])
    monkeypatch.setattr(os, "dup2", Mock())  # the test's own output stays
    monkeypatch.setattr("eval.print", printed, raising=False)
    flags = f"{run} --split train --out {tmp_path} --export {tmp_path}/x.json"
    with pytest.raises(SystemExit, match="141"):
        eval_main(flags.split())
    assert printed.call_count == 2
    assert read_json(tmp_path / "metrics.json")["images"] == 8
    assert len(read_json(tmp_path / "x.json")) == 800


def test_attention_and_collapse(run, tmp_path):
    """The run's --attn is applied; it is noticed when the same is found in every image."""
    state, auto = torch.load(run / "best.pt", weights_only=True), deformable_attn.backend("cpu")[0]
    state["args"]["attn"] = "auto"
    for name, weight in state["model"].items():
        weight.mul_("input_proj" not in name)
    torch.save(state, tmp_path / "best.pt")
    eval_main([str(tmp_path)])
    for folder, attn, collapsed in ((run, "torch", False), (tmp_path, auto, True)):
        model, _, _ = load_run(folder, "cpu")
        assert model.transformer.encoder.layers[0].self_attn.backend == attn
        assert read_json(folder / "metrics.json")["collapsed"] is collapsed


def test_mistakes_get_one_line(run, tmp_path, capsys):
    state = torch.load(run / "best.pt", weights_only=True)
    nan = {**state["model"], "class_embed.1.bias": torch.full((15,), float("nan"))}
    other = [*state["categories"][1:], {"id": 99, "name": "other"}]
    wide = {**state["detector"], "hidden_dim": 64}
    pretrain, a, b = {**state["args"], "setting": "pretrain"}, "{tmp}/a.pt", "{tmp}/b.pt"
    torch.save({"weight": torch.ones(1)}, tmp_path / "b.pt")
    for flags, content, message in (
        (a, {"model": nan}, "_val.json: what the model finds is NaN or infinite; its training"),
        (a, {"categories": other}, "_val.json: its classes 1 ship, .* are not the model's 2 stor"),
        (a, {"detector": wide}, "a.pt: its weights do not fit its flags"),
        (f"{a} --export x", {"args": pretrain}, "a.pt: is of a pretraining, it detects nothing"),
        (b, {}, "b.pt: is not a checkpoint of train.py, which has 'args'; start from it with"),
        ("{tmp}/none", {}, "none: no such run folder or checkpoint file"),
        ("{run}/..", {}, "has no best.pt and no last.pt; is it a run folder of train.py"),
        ("{run} --export {tmp}/none/x", {}, "none/x: cannot write"),
        ("{run} --split test", {}, "--split test has no ground truth; add --export"),
    ):
        torch.save({**state, **content}, tmp_path / "a.pt")
        with pytest.raises(SystemExit) as stop:
            eval_main(flags.format(run=run, tmp=tmp_path).split())
        said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
        assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n?", said), said
