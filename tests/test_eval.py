"""Metrics from pycocotools, with and without its faster twin; the truth as prediction; result files."""
import contextlib
import copy
import io
import json

import numpy as np
import pytest

import eval as evaluation
import isaid

EVALUATORS = ["pycocotools", "faster-coco-eval"]


def available(evaluator):
    if evaluator != "pycocotools":
        pytest.importorskip("faster_coco_eval")
    return evaluator


@pytest.fixture(scope="module")
def data():
    return isaid.synthetic("val", 40, 128, isaid.transforms(False, 128))


def truth(data):
    return [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
            for a in data.annotations]


def guesses(data, seed=0):
    """The truth shifted, dropped, repeated and mislabelled at random."""
    rng, results = np.random.default_rng(seed), []
    for a in data.annotations:
        for _ in range(rng.integers(0, 4)):
            box = (np.array(a["bbox"]) + rng.normal(0, 2.5, 4)).clip(1)
            label = a["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 16))
            results.append({"image_id": a["image_id"], "category_id": label, "bbox": box.tolist(), "score": rng.random()})
    return results


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_truth_scores_one(data, evaluator):
    metrics = evaluation.coco_metrics(data, truth(data), available(evaluator))
    assert [metrics[key] for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ar")] == pytest.approx([1] * 6)
    assert metrics["evaluator"] == evaluator and metrics["images"] == 40
    assert all(row["ap"] == pytest.approx(1) for row in metrics["per_class"] if row["boxes"])
    assert sum(row["boxes"] for row in metrics["per_class"]) == len(data.annotations)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_no_ground_truth_is_not_zero(data, evaluator):
    available(evaluator)
    some = copy.copy(data)
    some.annotations = [a for a in data.annotations if a["category_id"] != 3]
    metrics = evaluation.coco_metrics(some, truth(some), evaluator)
    row = metrics["per_class"][2]
    assert metrics["ap_large"] is None and row["ap"] is None and row["boxes"] == 0 and metrics["ap"] == pytest.approx(1)
    text = evaluation.table(metrics)
    assert "large n/a" in text and "n/a    n/a" in next(line for line in text.splitlines() if "baseball_diamond" in line)
    assert evaluation.coco_metrics(data, [], evaluator)["ap"] == 0  # nothing found


def test_evaluators_agree(data):
    available("faster-coco-eval")
    slow, fast = (evaluation.coco_metrics(data, guesses(data), evaluator) for evaluator in EVALUATORS)
    assert 0.1 < slow["ap"] < 0.9
    for a, b in zip([fast, *fast["per_class"]], [slow, *slow["per_class"]]):
        for key in a.keys() & set(evaluation.METRICS):
            assert (a[key] is None) == (b[key] is None) and abs((a[key] or 0) - (b[key] or 0)) <= 1e-9, (a.get("name"), key)


def test_results_load_in_pycocotools_as_they_are(data, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    results = guesses(data)
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "truth.json").write_text(json.dumps(
        {"images": data.images, "categories": data.categories, "annotations": data.annotations}))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        run = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    metrics = evaluation.coco_metrics(data, results, "pycocotools")
    for name, place in zip(evaluation.METRICS, (0, 1, 2, 3, 4, 5, 8)):
        assert (-1 if metrics[name] is None else metrics[name]) == pytest.approx(run.stats[place], abs=1e-12)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_the_devkits_ranges(evaluator):
    """An image with 150 small objects and one of 200 pixels: medium for iSAID, large for COCO."""
    boxes = [[20 * (i % 15), 20 * (i // 15), 12, 12] for i in range(150)] + [[300, 0, 200, 200]]
    coco = {"images": [{"id": 0, "width": 512, "height": 512, "file_name": ""}], "categories": [{"id": 1, "name": "thing"}],
            "annotations": [{"id": i, "image_id": 0, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]}
    data = isaid.Detection("many", coco, None, None)
    results = [{"image_id": 0, "category_id": 1, "bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)]
    usual = evaluation.coco_metrics(data, results, available(evaluator))
    devkit = evaluation.coco_metrics(data, results, evaluator, max_dets=1000, areas="isaid")
    assert usual["ar"] == pytest.approx(100 / 151) and devkit["ar"] == pytest.approx(1)
    assert usual["ap"] < 0.7 and devkit["ap"] == pytest.approx(1)
    few = evaluation.coco_metrics(data, results, evaluator, max_dets=5)
    assert few["ar"] == pytest.approx(5 / 151)
    assert usual["ap_medium"] is None and usual["ap_large"] == 0  # the 151st detection does not count
    assert devkit["ap_small"] == pytest.approx(1) and devkit["ap_medium"] == pytest.approx(1) and devkit["ap_large"] is None


@pytest.mark.parametrize("change", [{"image_id": 4040}, {"category_id": 99}])
def test_results_of_another_dataset_are_refused(data, change):
    key, value = next(iter(change.items()))
    with pytest.raises(isaid.DataError, match=f"{key} {value}"):
        evaluation.coco_metrics(data, [{**truth(data)[0], **change}])


def test_pictures(data, tmp_path):
    from matplotlib.figure import Figure
    from PIL import Image
    evaluation.draw_detections(tmp_path / "detections.png", data, truth(data), n=3)
    with Image.open(tmp_path / "detections.png") as image:
        assert image.width > image.height > 300 and len(image.getcolors(1 << 20)) > 100
    evaluation.draw_curves(tmp_path / "curves.png", [{"epoch": 1, "train_loss": 3.0, "ap": None}])  # no ground truth yet
    evaluation.draw_curves(tmp_path / "curves.png", [{"epoch": 1, "train_loss": 3.0, "ap": 0.2}, {"epoch": 2, "train_loss": 2}])
    axes = Figure().subplots()
    axes.plot([1], [0.5])
    evaluation.scale_axes(axes)
    assert axes.get_ylim() == pytest.approx((0, 0.54)) and axes.get_xlim() == (0.5, 1.5)  # inside the frame
    assert len({evaluation.colour(i, 15) for i in range(15)}) == 15
