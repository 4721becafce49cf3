"""Detection in images larger than the model's, by a model that finds rectangles of plain colors."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage
from test_weights import publish

import detr
import isaid
import train
from tools import predict
from util import isaid_prepare
from util.files import read_json
from util.images import unnormalize


class RectangleDetector(torch.nn.Module):
    """A perfect detector of what it is shown: all connected pieces of red, green and blue."""

    focal = True
    postprocess = detr.Detector.postprocess
    num_queries = 60

    def forward(self, images, padding):
        logits = torch.full((1, len(images), self.num_queries, 3), -9.0)
        boxes = torch.full((1, len(images), self.num_queries, 4), 0.5)
        for b, image in enumerate(unnormalize(images).numpy()):
            H = int((~padding[b]).any(1).sum())
            W = int((~padding[b]).any(0).sum())
            query = 0
            for label, channel in enumerate(image):
                pieces, _ = ndimage.label(channel[:H, :W] > 0.76)
                for y, x in ndimage.find_objects(pieces):
                    w = (x.stop - x.start) / W
                    h = (y.stop - y.start) / H
                    box = [x.start / W + w / 2, y.start / H + h / 2, w, h]
                    boxes[0, b, query] = torch.tensor(box)
                    logits[0, b, query, label] = 2 + w * h
                    query += 1
        return {"logits": logits, "boxes": boxes}


def draw_rectangles(width, height, n, longest):
    """Return a black image with n separate rectangles, many of them on the borders of windows,
    and their boxes (n, 4) xyxy and labels (n,)."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), np.uint8)
    boxes = []
    labels = []
    while len(boxes) < n:
        w, h = rng.integers(8, longest, 2)
        on_border = min(max(0, 192 * rng.integers(1, 15) - rng.integers(w)), width - w)
        x = rng.choice([on_border, rng.integers(0, width - w)])
        y = rng.integers(0, height - h)
        surroundings = image[max(0, y - 6) : y + h + 6, max(0, x - 6) : x + w + 6]
        if not surroundings.any():
            label = int(rng.integers(3))
            image[y : y + h, x : x + w, label] = 255
            boxes.append([x, y, x + w, y + h])
            labels.append(label)
    return Image.fromarray(image), np.array(boxes), np.array(labels)


@pytest.mark.parametrize("size, n", [((2600, 2600), 45), ((1000, 300), 3), ((200, 150), 3)])
@pytest.mark.parametrize(
    "longest, image_size, tolerance", [(50, 256, 0.51), (500, 256, 0.51), (60, 128, 2.5)]
)
def test_windows_neither_cut_nor_repeat_objects(size, n, longest, image_size, tolerance):
    """In windows of 256 pixels that overlap by 64 the same is found as in the whole image. The
    objects are as large as the overlap or larger than a window; seen at half their size they are
    found to the nearest pixel."""
    image, boxes, labels = draw_rectangles(*size, n, min(longest, min(size) // 2))
    found = predict.detect_in_windows(
        RectangleDetector(), image, 256, 64, image_size, batch_size=3, workers=1
    )
    distance = np.abs(found["boxes"][:, None] - boxes).max(-1)
    assert distance.min(0).max() <= tolerance
    nearest = distance.argmin(1)
    assert sorted(nearest) == list(range(n))
    np.testing.assert_array_equal(found["labels"], labels[nearest])
    assert (np.diff(found["scores"]) <= 0).all()


def test_nothing_is_found_in_a_black_image():
    image = Image.new("RGB", (99, 70))
    found = predict.detect_in_windows(RectangleDetector(), image, 64, 16, 64)
    assert len(found["boxes"]) == 0


WINDOWS = np.array([[0, 0, 100, 100], [50, 0, 150, 100], [50, 0, 150, 100]])


@pytest.mark.parametrize(
    "boxes, labels, expected",
    [
        # one object in two windows, whole in the second; another class is another object
        ([[60.0, 10, 100, 40], [60, 10, 110, 40], [60, 10, 110, 40]], [0, 0, 1], [1, 2]),
        # the second box is a part of the first, at its window's border
        ([[10.0, 10, 60, 60], [50, 40, 60, 60]], [0, 0], [0]),
        ([[10.0, 10, 60, 60], [50, 40, 60, 60]], [0, 1], [0, 1]),
    ],
)
def test_a_box_that_is_not_truncated_wins(boxes, labels, expected):
    """The whole box of an object is kept, whatever the scores."""
    boxes = np.array(boxes)
    n = len(boxes)
    scores = np.array([0.9, 0.5, 0.4])[:n]
    merged, best = predict.merge_windows(
        boxes, np.array(labels), scores, WINDOWS[:n], (150, 100), margin=1
    )
    assert best.tolist() == expected
    assert merged.tolist() == boxes[expected].tolist()


@pytest.mark.parametrize("side, step", [(90, 25), (60, 15), (40, 8)])
def test_rows_of_overlapping_objects(side, step):
    """Parallel objects next to each other, such as parked trucks, stay as many as they are."""
    rng = np.random.default_rng(0)
    width = 1000
    lefts = range(5, width - side, step)
    truth = np.array([[x, 60, x + side, 60 + side] for x in lefts], float)
    boxes = []
    windows = []
    for x0, x1 in isaid_prepare.tile_intervals(width, 256, 64):
        window = np.array([x0, 0, x1, 256], float)
        seen = predict.intersect(truth, window)
        seen = seen[predict.area(seen) > 0.2 * side**2]
        boxes.append(predict.intersect(seen + rng.normal(0, 0.5, seen.shape), window))
        windows.append(np.tile(window, (len(seen), 1)))
    boxes = np.concatenate(boxes)
    windows = np.concatenate(windows)
    labels = np.zeros(len(boxes), int)
    scores = rng.random(len(boxes))
    merged, _ = predict.merge_windows(boxes, labels, scores, windows, (width, 256), margin=4)
    distance = np.abs(merged[:, None] - truth).max(-1)
    assert distance.min(1).max() < 4
    assert sorted(distance.argmin(1)) == list(range(len(truth)))


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = "--hidden_dim 32 --enc_layers 1 --dec_layers 1 --image_size 64 --epochs 1"
    train.main(f"{flags} --limit_train 8 --limit_val 4 --out {out}".split())
    return out


SIZES = [("a.png", 300, 200), ("deep/b.jpg", 64, 64), ("tiny.png", 9, 7)]


@pytest.fixture
def source(tmp_path):
    """A folder of images with a folder in it."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name, width, height in SIZES:
        Image.effect_noise((width, height), 99).save(folder / name)
    return folder


def test_the_files(run, source, tmp_path, capsys):
    """Pictures of all images; JSON that pycocotools reads, and CSV with the same content."""
    out = tmp_path / "out"
    predict.main(f"{run} {source} --out {out} --score 0 --max_dets 5".split())
    assert "in windows of 64 pixels that overlap by 16" in capsys.readouterr().out
    predictions = COCO(out / "predictions.json")
    images = predictions.dataset["images"]
    assert [(i["file_name"], i["width"], i["height"]) for i in images] == SIZES
    header, *rows = csv.reader((out / "predictions.csv").read_text(encoding="utf-8").splitlines())
    assert header == ["image", "class", "score", "x", "y", "width", "height"]
    assert len(rows) > 5
    for row, annotation in zip(rows, predictions.dataset["annotations"], strict=True):
        file_name, _, _ = SIZES[annotation["image_id"]]
        class_name = predictions.cats[annotation["category_id"]]["name"]
        x, y, w, h = annotation["bbox"]
        assert row == [file_name, class_name, *map(str, (annotation["score"], x, y, w, h))]
    for name, _, _ in SIZES:
        assert max(Image.open(out / f"{name}.boxes.jpg").size) >= 800


def test_pictures_next_to_the_images(run, source):
    """They neither replace the images nor are taken for images by the next call."""
    before = {path: path.read_bytes() for path in source.rglob("*.*")}
    for _ in range(2):
        predict.main(f"{run} {source} --out {source}".split())
        assert len(read_json(source / "predictions.json")["images"]) == 3
    assert all(path.read_bytes() == content for path, content in before.items())


def test_several_places_and_few_detections(run, source, capsys):
    predict.main(f"{run} {source}/a.png --score 1".split())
    assert "try --window 128" in capsys.readouterr().out
    assert read_json(run / "predictions/predictions.json")["annotations"] == []
    predict.main(f"{run} {source}/deep {source}/a.png {source}/./a.png".split())
    images = read_json(run / "predictions/predictions.json")["images"]
    assert [image["file_name"] for image in images] == ["deep/b.jpg", "a.png"]


def test_errors_have_one_line(run, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_text("no image")
    Image.new("RGB", (70, 70)).save(tmp_path / "bad/b.png")
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save({**state, "args": {**state["args"], "setting": "pretrain"}}, tmp_path / "a.pt")
    for flags, message in {
        "{run} {tmp}/none.png": "none.png: no such image or folder of images",
        "{run} {tmp}/bad": "failed to process 1 of 2 images: .*bad/a.png",
        "{run} {tmp}/bad --overlap 64": "--overlap 64 must be smaller than the window of 64",
        "{tmp}/a.pt {tmp}/bad": "a.pt: is a self-supervised pretraining checkpoint",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
            predict.main(flags.format(run=run, tmp=tmp_path).split())
    images = read_json(run / "predictions/predictions.json")["images"]
    assert [image["file_name"] for image in images] == ["b.png"]  # the readable one is done


def test_a_published_model_sees_whole_images(tmp_path, monkeypatch, capsys):
    """They are resized as in COCO, and results go into runs/NAME; --window cuts them."""
    publish(tmp_path, monkeypatch, "detr")
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((120, 60), 99).save("photo.png")
    sizes = []
    resize = isaid.resize

    def noted_resize(image_size=None):
        sizes.append(image_size)
        return resize(64)

    monkeypatch.setattr(isaid, "resize", noted_resize)
    predict.main("tiny photo.png --score 0".split())
    assert sizes == [None]
    assert "tiny on whole images\nphoto.png: 120 x 60, 11 objects\n" in capsys.readouterr().out
    predictions = COCO("runs/tiny/predictions/predictions.json")
    assert len(predictions.cats) == 80
    assert predictions.cats[90]["name"] == "toothbrush"
    assert all(a["category_id"] in predictions.cats for a in predictions.dataset["annotations"])
    predict.main("tiny photo.png --window 60 --out windows".split())
    assert "in windows of 60 pixels that overlap by 15, resized to 800" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: --overlap 9 requires --window: tiny sees whole"):
        predict.main("tiny photo.png --overlap 9".split())
