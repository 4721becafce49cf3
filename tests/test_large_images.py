"""Objects in images larger than the model's: windows, seams, files. The detector here finds rectangles of plain colours."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

import eval as evaluation
import isaid
import large_images
import train

INKS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])  # of the classes


class Rectangles(torch.nn.Module):
    """A perfect detector of what it is shown: every connected piece of a class's colour is an object."""

    focal, most = True, 60

    def forward(self, images, padding):
        logits, boxes = torch.full((1, len(images), self.most, 3), -9.0), torch.full((1, len(images), self.most, 4), 0.5)
        for b, image in enumerate((isaid.unnormalise(images) * 255).permute(0, 2, 3, 1).numpy()):
            H, W = (int((~padding[b]).any(d).sum()) for d in (1, 0))
            q = 0
            for label, ink in enumerate(INKS):
                pieces, _ = ndimage.label(np.abs(image[:H, :W] - ink).max(-1) < 60)
                for rows, columns in ndimage.find_objects(pieces):
                    y0, y1, x0, x1 = rows.start / H, rows.stop / H, columns.start / W, columns.stop / W
                    boxes[0, b, q] = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
                    logits[0, b, q, label] = 2 + (x1 - x0) * (y1 - y0)
                    q += 1
        return {"logits": logits, "boxes": boxes}


def scene(width, height, n, longest, seed=0):
    """A black image with n rectangles that do not touch, many of them on the seams of windows: (image, boxes xyxy, labels)."""
    rng, boxes, labels = np.random.default_rng(seed), [], []
    taken, image = np.zeros((height, width), bool), np.zeros((height, width, 3), np.uint8)
    while len(boxes) < n:
        w, h = rng.integers(8, longest, 2)
        x = rng.integers(0, width - w) if rng.random() < 0.5 else min(max(0, 192 * rng.integers(1, 15) - rng.integers(w)), width - w)
        y = rng.integers(0, height - h)
        if taken[max(0, y - 6):y + h + 6, max(0, x - 6):x + w + 6].any():
            continue
        taken[y:y + h, x:x + w] = True
        labels.append(int(rng.integers(3)))
        image[y:y + h, x:x + w] = INKS[labels[-1]]
        boxes.append([x, y, x + w, y + h])
    return Image.fromarray(image), np.array(boxes), np.array(labels)


@pytest.mark.parametrize("longest", [50, 500], ids=["smaller than the overlap", "larger than a window"])
@pytest.mark.parametrize("size", [(3000, 3000), (1000, 300), (200, 150)], ids=str)
def test_seams_neither_cut_nor_double(size, longest):
    """In windows of 256 pixels that overlap by 64 the same is found as at once, with the same boxes."""
    longest = min(longest, min(size) // 2)
    image, boxes, labels = scene(*size, n=max(3, 60 * size[0] * size[1] // 3000 ** 2), longest=longest)
    found = large_images.find(Rectangles(), image, 256, 64, 256)
    assert len(found["boxes"]) == len(boxes)
    order, truth = (np.lexsort(np.round(b).astype(int).T) for b in (found["boxes"], boxes))
    np.testing.assert_allclose(found["boxes"][order], boxes[truth], atol=0.51)
    np.testing.assert_array_equal(found["labels"][order], labels[truth])
    assert (np.diff(found["scores"]) <= 0).all()


def test_resized_windows():
    """Windows seen at half their size: boxes to the nearest of the model's pixels."""
    image, boxes, labels = scene(900, 700, 12, 60)
    found = large_images.find(Rectangles(), image, 256, 64, 128, batch_size=3, workers=1)
    assert len(found["boxes"]) == len(boxes)
    distance = np.abs(found["boxes"][:, None] - boxes).max(-1)
    assert distance.min(0).max() <= 2.5 and sorted(distance.argmin(1)) == list(range(12))
    np.testing.assert_array_equal(found["labels"], labels[distance.argmin(1)])


def test_what_is_not_cut_wins():
    """A whole box and a cut one of the same object: the whole one stays, whatever the scores; another class is another object."""
    windows = np.array([[0, 0, 100, 100], [50, 0, 150, 100], [50, 0, 150, 100]])
    boxes, scores = np.array([[60.0, 10, 100, 40], [60, 10, 110, 40], [60, 10, 110, 40]]), np.array([0.9, 0.5, 0.4])
    joined, kept = large_images.join(boxes, np.array([0, 0, 1]), scores, windows, (150, 100), margin=1)
    assert kept.tolist() == [1, 2] and joined.tolist() == boxes[1:].tolist()
    joined, kept = large_images.join(boxes[:0], np.array([]), scores[:0], windows[:0], (150, 100), margin=1)
    assert len(joined) == len(kept) == 0


@pytest.mark.parametrize("side, step", [(90, 25), (60, 15), (40, 8)])
def test_rows_that_overlap(side, step):
    """Parallel things side by side, as parked lorries: boxes that overlap by half and more stay as many as they are."""
    rng, width = np.random.default_rng(0), 1000
    truth = np.array([[x, 60, x + side, 60 + side] for x in range(5, width - side, step)], float)
    places = np.array([(x0, 0, x1, 256) for x0, x1 in large_images.patches.spans(width, 256, 64)], float)
    boxes, windows = [], []
    for place in places:
        seen = large_images.intersect(truth, place)
        seen = seen[large_images.area(seen) > 0.2 * side ** 2]
        boxes.append(large_images.intersect(seen + rng.normal(0, 0.5, seen.shape), place))
        windows.append(np.tile(place, (len(seen), 1)))
    boxes, windows = np.concatenate(boxes), np.concatenate(windows)
    joined, _ = large_images.join(boxes, np.zeros(len(boxes), int), rng.random(len(boxes)), windows, (width, 256), margin=4)
    distance = np.abs(joined[:, None] - truth).max(-1)
    assert distance.min(1).max() < 4 and sorted(distance.argmin(1)) == list(range(len(truth)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(["--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "1", "--num_queries", "7", "--image_size", "64",
                "--limit_train", "8", "--limit_val", "4", "--epochs", "1", "--out", str(out)])
    return out


def test_the_command(run, tmp_path, capsys):
    """On a folder with folders: pictures, COCO's JSON and CSV with the same content; the run knows the size of its windows."""
    Path(tmp_path / "in/deep").mkdir(parents=True)
    for name, size in (("a.png", (300, 200)), ("deep/b.jpg", (64, 64))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    evaluation.main(["predict", str(run), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--score", "0", "--max_dets", "5"])
    assert "in windows of 64 pixels that overlap by 16" in capsys.readouterr().out
    coco = COCO(tmp_path / "out/predictions.json").dataset
    assert [(image["file_name"], image["width"]) for image in coco["images"]] == [("a.png", 300), (str(Path("deep/b.jpg")), 64)]
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert len(rows) == len(coco["annotations"]) > 5
    for row, annotation in zip(rows, coco["annotations"]):
        assert row["class"] == names[annotation["category_id"]] and float(row["score"]) == annotation["score"]
        assert [float(row[key]) for key in ("x", "y", "width", "height")] == annotation["bbox"]
    for name in ("a.png.boxes.jpg", "deep/b.jpg.boxes.jpg"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > picture.height * 0.5 and max(picture.size) >= 800
    files = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*.*")}
    for _ in range(2):  # pictures beside the images neither replace them nor are taken for images
        evaluation.main(["predict", str(run), str(tmp_path / "in"), "--out", str(tmp_path / "in")])
        assert len(json.loads((tmp_path / "in/predictions.json").read_text())["images"]) == 2
    assert all(path.read_bytes() == content for path, content in files.items())
    evaluation.main(["predict", str(run), str(tmp_path / "in/a.png"), "--score", "1"])
    assert json.loads((run / "predictions/predictions.json").read_text())["annotations"] == []
    Image.new("RGB", (9, 7)).save(tmp_path / "tiny.png")
    evaluation.main(["predict", str(run), str(tmp_path / "tiny.png")])  # one cell on the coarsest map


@pytest.mark.parametrize("flags, message", [
    (["none.png"], "none.png: no such image or folder of images"),
    (["bad"], "1 of 1 images cannot be used: bad/a.png"),
    (["empty"], "holds no images"), (["bad", "--overlap", "64"], "--overlap 64 must be smaller than the window of 64")])
def test_mistakes_get_one_line(flags, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("bad", "empty"):
        Path(folder).mkdir()
    Path("bad/a.png").write_text("no image")
    with pytest.raises(SystemExit, match=message):
        evaluation.main(["predict", str(run), *flags])
