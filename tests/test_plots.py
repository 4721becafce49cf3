"""Pictures of detections: labels do not cover each other, the score shown is chosen by F1."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from util import plots

CATEGORIES = [{"id": 3, "name": "large_vehicle"}, {"id": 5, "name": "ship"}]


def entry(image_id, category_id, bbox, score=None):
    """A COCO annotation or, with a score, a result."""
    made = {"image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0}
    if score is not None:
        made["score"] = score
    return made


def test_names_have_spaces():
    assert plots.class_text(CATEGORIES[0]) == "large vehicle"


def overlap(a, b):
    """The area that two boxes have in common."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def test_labels_do_not_cover_each_other(monkeypatch):
    """Neither of boxes side by side, nor of boxes at the border of the image; all stay inside."""
    placed = []

    def record(draw, text_box, text, font, color):
        placed.append((text, text_box))

    monkeypatch.setattr(plots, "draw_label", record)
    image = Image.new("RGB", (300, 300))
    boxes = [[0, 0, 40, 30], [20, 2, 40, 30], [260, 0, 40, 20], [100, 280, 50, 20]]
    boxes += [[110, 281, 50, 19], [100, 100, 60, 60], [110, 110, 40, 40], [105, 100, 60, 60]]
    entries = [entry(0, 3, box, 0.5) for box in boxes]
    plots.draw_boxes(image, entries, CATEGORIES, 300)
    assert [text for text, _ in placed] == ["large vehicle 0.50"] * len(boxes)
    for i, (_, text_box) in enumerate(placed):
        assert text_box[0] >= 0 and text_box[1] >= 0
        assert text_box[2] <= 300 and text_box[3] <= 300
        for _, other in placed[:i]:
            assert overlap(text_box, other) == 0


def test_a_label_is_at_its_box():
    """Above it where that is free, else below it or inside."""
    draw = ImageDraw.Draw(Image.new("RGB", (200, 200)))
    font = ImageFont.load_default(11)
    box = (50, 80, 120, 120)
    above = plots.place_label(draw, "ship", font, box, (200, 200), [])
    assert above[3] <= 80 and above[3] > 70 and abs(above[0] - 50) < 3
    row_above = (0, 60, 200, 80)
    below = plots.place_label(draw, "ship", font, box, (200, 200), [row_above])
    assert below[1] >= 120 and below[1] < 130
    everything = (0, 0, 200, 200)
    assert plots.place_label(draw, "ship", font, box, (200, 200), [everything]) == above


@pytest.mark.parametrize("text", ["basketball court", "large type", "ship"])
def test_text_is_on_its_ground(text):
    """No letter of a label is cut off at the image's border, or leaves the colored ground."""
    image = Image.new("RGB", (200, 60), "blue")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    text_box = plots.place_label(draw, text, font, (20, 0, 150, 50), image.size, [])
    plots.draw_label(draw, text_box, text, font, plots.GREEN)
    pixels = np.asarray(image)
    rows, columns = (pixels != (0, 0, 255)).any(2).nonzero()
    ground = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    edges = [ground[0], ground[-1], ground[:, 0], ground[:, -1]]
    for edge in edges:
        assert (edge == plots.GREEN).all()
    letters = (ground != plots.GREEN).any(2)
    assert letters.any()


def dataset(annotations):
    return SimpleNamespace(annotations=annotations)


def test_the_score_with_the_best_f1():
    """By brute force over all thresholds."""
    rng = np.random.default_rng(0)
    annotations = []
    results = []
    for image_id in range(20):
        for k in range(3):
            category_id = int(rng.choice([3, 5]))
            box = [50.0 * k, 10.0, 30.0, 20.0]
            annotations.append(entry(image_id, category_id, box))
            shift = rng.normal(scale=6)
            results.append(
                entry(
                    image_id,
                    category_id,
                    [box[0] + shift, 10.0, 30.0, 20.0],
                    float(rng.uniform(0.2, 1) * np.exp(-abs(shift) / 20)),
                )
            )
        results.append(entry(image_id, 5, [5.0, 60.0, 9.0, 9.0], float(rng.uniform(0, 0.6))))

    def f1(threshold):
        num_correct = 0
        num_detections = 0
        for image_id in range(20):
            objects = [a for a in annotations if a["image_id"] == image_id]
            shown = [r for r in results if r["image_id"] == image_id and r["score"] >= threshold]
            shown.sort(key=lambda result: -result["score"])
            num_correct += sum(plots.greedy_match(shown, objects)[0])
            num_detections += len(shown)
        return 2 * num_correct / (num_detections + len(annotations))

    best = max(f1(result["score"]) for result in results if result["score"] >= 0.05)
    score = plots.best_f1_score(dataset(annotations), results)
    assert f1(score) == pytest.approx(best)
    assert f1(score) > f1(0.05)
    assert plots.best_f1_score(dataset(annotations), []) == 0.05
    assert plots.best_f1_score(dataset([]), results) == 0.05
