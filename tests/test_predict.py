"""Objects in images larger than the model's, by one that finds rectangles of plain colours."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

import detr
import train
from tools import predict
from util import isaid_prepare
from util.files import read_json
from util.images import unnormalize


class Rectangles(torch.nn.Module):
    """A perfect detector of what it is shown: all connected pieces of red, green and blue."""

    focal, postprocess, most = True, detr.Detector.postprocess, 60

    def forward(self, images, padding):
        shape = 1, len(images), self.most
        logits, boxes = torch.full((*shape, 3), -9.0), torch.full((*shape, 4), 0.5)
        for b, image in enumerate(unnormalize(images).numpy()):
            H, W, q = *(int((~padding[b]).any(d).sum()) for d in (1, 0)), 0
            for label, channel in enumerate(image):
                pieces, _ = ndimage.label(channel[:H, :W] > 0.76)
                for y, x in ndimage.find_objects(pieces):
                    w, h = (x.stop - x.start) / W, (y.stop - y.start) / H
                    boxes[0, b, q] = torch.tensor([x.start / W + w / 2, y.start / H + h / 2, w, h])
                    logits[0, b, q, label], q = 2 + w * h, q + 1
        return {"logits": logits, "boxes": boxes}


def scene(width, height, n, longest):
    """(A black image with n rectangles apart, many on the seams, boxes xyxy, labels)."""
    rng, boxes, labels = np.random.default_rng(0), [], []
    image = np.zeros((height, width, 3), np.uint8)
    while len(boxes) < n:
        w, h = rng.integers(8, longest, 2)
        seam = min(max(0, 192 * rng.integers(1, 15) - rng.integers(w)), width - w)
        x, y = rng.choice([seam, rng.integers(0, width - w)]), rng.integers(0, height - h)
        if not image[max(0, y - 6) : y + h + 6, max(0, x - 6) : x + w + 6].any():
            labels.append(int(rng.integers(3)))
            image[y : y + h, x : x + w, labels[-1]] = 255
            boxes.append([x, y, x + w, y + h])
    return Image.fromarray(image), np.array(boxes), np.array(labels)


@pytest.mark.parametrize("size, n", [((2600, 2600), 45), ((1000, 300), 3), ((200, 150), 3)])
@pytest.mark.parametrize("longest, seen, off", [(50, 256, 0.51), (500, 256, 0.51), (60, 128, 2.5)])
def test_seams_neither_cut_nor_double(size, n, longest, seen, off):
    """In windows of 256 pixels that overlap by 64 the same is found as at once. The objects are
    as large as the overlap or larger than a window; at half their size to the nearest pixel."""
    image, boxes, labels = scene(*size, n, min(longest, min(size) // 2))
    found = predict.detect_in_windows(Rectangles(), image, 256, 64, seen, batch_size=3, workers=1)
    distance = np.abs(found["boxes"][:, None] - boxes).max(-1)
    assert distance.min(0).max() <= off and sorted(distance.argmin(1)) == list(range(n))
    np.testing.assert_array_equal(found["labels"], labels[distance.argmin(1)])
    assert (np.diff(found["scores"]) <= 0).all()


def test_what_is_not_cut_wins():
    """The whole box of an object stays, whatever the scores; another class is another object."""
    windows = np.array([[0, 0, 100, 100], [50, 0, 150, 100], [50, 0, 150, 100]])
    whole = np.array([[60.0, 10, 100, 40], [60, 10, 110, 40], [60, 10, 110, 40]])
    part = np.array([[10.0, 10, 60, 60], [50, 40, 60, 60]])  # of the first, at its window's border
    cases = (whole, [0, 0, 1], [1, 2]), (part, [0, 0], [0]), (part, [0, 1], [0, 1])
    for boxes, labels, best in cases:
        n, labels, scores = len(boxes), np.array(labels), np.array([0.9, 0.5, 0.4])
        joined, kept = predict.merge_windows(
            boxes, labels, scores[:n], windows[:n], (150, 100), margin=1
        )
        assert kept.tolist() == best and joined.tolist() == boxes[best].tolist()
    assert not len(
        predict.detect_in_windows(Rectangles(), Image.new("RGB", (99, 70)), 64, 16, 64)["boxes"]
    )


@pytest.mark.parametrize("side, step", [(90, 25), (60, 15), (40, 8)])
def test_rows_that_overlap(side, step):
    """Parallel things side by side, as parked lorries, stay as many as they are."""
    rng, width, found = np.random.default_rng(0), 1000, []
    truth = np.array([[x, 60, x + side, 60 + side] for x in range(5, width - side, step)], float)
    for x0, x1 in isaid_prepare.tile_intervals(width, 256, 64):
        window = np.array([x0, 0, x1, 256], float)
        seen = predict.intersect(truth, window)
        seen = seen[predict.area(seen) > 0.2 * side**2]
        seen = predict.intersect(seen + rng.normal(0, 0.5, seen.shape), window)
        found.append(np.concatenate([seen, np.tile(window, (len(seen), 1))], 1))
    boxes, windows = np.split(np.concatenate(found), 2, axis=1)
    labels, scores = np.zeros(len(boxes), int), rng.random(len(boxes))
    joined, _ = predict.merge_windows(boxes, labels, scores, windows, (width, 256), margin=4)
    distance = np.abs(joined[:, None] - truth).max(-1)
    assert distance.min(1).max() < 4 and sorted(distance.argmin(1)) == list(range(len(truth)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = "--hidden_dim 32 --enc_layers 1 --dec_layers 1 --image_size 64 --epochs 1"
    train.main(f"{flags} --limit_train 8 --limit_val 4 --out {out}".split())
    return out


def test_the_command(run, tmp_path, capsys):
    """On a folder with folders: pictures, COCO's JSON and CSV with the same content."""
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    sizes = [("a.png", 300, 200), ("deep/b.jpg", 64, 64), ("tiny.png", 9, 7)]
    for name, *size in sizes:
        Image.effect_noise(size, 99).save(source / name)
    files = {path: path.read_bytes() for path in source.rglob("*.*")}
    predict.main(f"{run} {source} --out {out} --score 0 --max_dets 5".split())
    assert "in windows of 64 pixels that overlap by 16" in capsys.readouterr().out
    found = COCO(out / "predictions.json")
    assert [(i["file_name"], i["width"], i["height"]) for i in found.dataset["images"]] == sizes
    header, *rows = csv.reader((out / "predictions.csv").read_text(encoding="utf-8").splitlines())
    assert header == ["image", "class", "score", "x", "y", "width", "height"] and len(rows) > 5
    for row, a in zip(rows, found.dataset["annotations"], strict=True):
        names = [sizes[a["image_id"]][0], found.cats[a["category_id"]]["name"]]
        assert row == [*names, *map(str, (a["score"], *a["bbox"]))]
    assert all(max(Image.open(out / f"{name}.boxes.jpg").size) >= 800 for name, _, _ in sizes)
    for _ in range(2):  # pictures beside the images neither replace them nor are taken for images
        predict.main(f"{run} {source} --out {source}".split())
        assert len(read_json(source / "predictions.json")["images"]) == 3
    assert all(path.read_bytes() == content for path, content in files.items())
    capsys.readouterr()
    predict.main(f"{run} {source}/a.png --score 1".split())
    assert "fewer than in every tenth window; if objects look larger" in capsys.readouterr().out
    assert read_json(run / "predictions/predictions.json")["annotations"] == []
    predict.main(f"{run} {source}/deep {source}/a.png {source}/./a.png".split())
    images = read_json(run / "predictions/predictions.json")["images"]
    assert [image["file_name"] for image in images] == ["deep/b.jpg", "a.png"]


def test_mistakes_get_one_line(run, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_text("no image")
    Image.new("RGB", (70, 70)).save(tmp_path / "bad/b.png")
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save({**state, "args": {**state["args"], "setting": "pretrain"}}, tmp_path / "a.pt")
    for flags, message in {
        "{run} {tmp}/none.png": "none.png: no such image or folder of images",
        "{run} {tmp}/bad": "1 of 2 images cannot be used: .*bad/a.png",
        "{run} {tmp}/bad --overlap 64": "--overlap 64 must be smaller than the window of 64",
        "{tmp}/a.pt {tmp}/bad": "a.pt: is of a pretraining, it detects nothing",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
            predict.main(flags.format(run=run, tmp=tmp_path).split())
    images = read_json(run / "predictions/predictions.json")["images"]
    assert [image["file_name"] for image in images] == ["b.png"]  # the others are done
