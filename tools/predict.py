"""Objects in images of any size: windows, and what several windows have seen put together.

    python -m tools.predict RUN IMAGE_OR_FOLDER … [--out DIR] [--score 0.3]

Writes for each image a picture with the boxes, and for all of them predictions.json (COCO's
format, with a score) and predictions.csv. Boxes here are xyxy in pixels of the whole image.
"""

import csv
import json
import os
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torchvision.transforms import v2
from tqdm import tqdm

import isaid
from eval import coco_results, detect, load_run, require_detector
from util import cli, coco, distributed, isaid_prepare, plots
from util.cli import Parser, command, number
from util.files import DataError, check_writable, write_text
from util.images import read_image

AGREE = 0.5  # IoU from which two boxes are of one object
INSIDE = 0.7  # share of a cut box inside another from which it is a part of that
PICTURE = ".boxes.jpg"  # end of the pictures' names, so that they are not taken for images


# ---------------------------------------------------------------- windows
class Windows(torch.utils.data.Dataset):
    """The windows of an image. Item i: (picture (3, h, w) normalised,
    {"size": (height, width) in the image, "window": xyxy})."""

    def __init__(self, image, window, overlap, image_size):
        self.image, self.scale = image, image_size / window
        rows, columns = (
            isaid_prepare.tile_intervals(n, window, overlap) for n in (image.height, image.width)
        )
        self.boxes = [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, i):
        x0, y0, x1, y1 = self.boxes[i]
        size = [max(1, round(side * self.scale)) for side in (y1 - y0, x1 - x0)]
        picture = v2.functional.resize(self.image.crop(self.boxes[i]), size)
        return isaid.to_tensor(picture), {"size": (y1 - y0, x1 - x0), "window": self.boxes[i]}


def detect_in_windows(model, image, window, overlap, image_size, score=0.3, batch_size=8, device="cpu",
         top=100, workers=0):  # fmt: skip
    """The objects of a PIL image: {"boxes" (n, 4), "labels" (n,), "scores" (n,)}, best first.
    window, overlap: pixels of the image; image_size: pixels that a window is resized to; top: at
    most, of each window."""
    data, parts = Windows(image, window, overlap, image_size), []
    batches = isaid.data_loader(data, workers, batch_size=batch_size)
    batches = tqdm(batches, "windows", leave=False, disable=None)
    for target, found in detect(model, batches, device, top, "the image"):
        good = found["scores"] >= score
        window_of = torch.tensor(target["window"]).expand(int(good.sum()), 4)
        boxes = (found["boxes"][good] + window_of[:, [0, 1, 0, 1]]).double()
        parts.append((boxes, found["labels"][good], found["scores"][good], window_of))
    boxes, labels, scores, windows = (torch.cat(part).numpy() for part in zip(*parts))
    boxes, best = merge_windows(boxes, labels, scores, windows, image.size, margin=window / 64)
    return {"boxes": boxes, "labels": labels[best], "scores": scores[best]}


# ---------------------------------------------------------------- one object, several windows
def intersect(a, b):
    """The common part of boxes (..., 4); one without area where there is none."""
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    return np.concatenate([low, np.maximum(low, high)], -1)


def area(boxes):
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def same_objects(boxes, labels, windows):
    """Pairs (m, 2) of detections of one object from two windows.
    They are of one class, one of each window at most, and alike in what both windows show."""
    pairs = [np.zeros((0, 2), int)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        places, number = np.unique(windows[members], axis=0, return_inverse=True)
        for b, place in enumerate(places):
            common = intersect(place, places[:b])
            for a in np.flatnonzero(area(common) > 0):
                mine, theirs = (members[number.reshape(-1) == k] for k in (a, b))
                first = intersect(boxes[mine], common[a])[:, None]
                second = intersect(boxes[theirs], common[a])
                shared = area(intersect(first, second))
                iou = shared / np.maximum(area(first) + area(second) - shared, 1e-9)
                i, j = linear_sum_assignment(iou, maximize=True)
                pairs.append(np.stack([mine[i], theirs[j]], 1)[iou[i, j] > AGREE])
    return np.concatenate(pairs)


def merge_windows(boxes, labels, scores, windows, size, margin):
    """Make one of what several windows have seen of an object: (boxes (k, 4), best (k,)).
    boxes, windows (n, 4), labels, scores (n,), size (width, height) of the image; best: the index
    of each object's best detection. Of its boxes the best one stands that does not end, within
    `margin`, at a border of its window inside the image; if all do, the box that holds them all.
    One cut off alone inside another object of its class is a part of that. (Where several objects
    reach across all that two windows share, parts may be joined crosswise: overlap by more.)"""
    inner = windows != np.array([0, 0, *size])  # (n, 4): left, top, right, bottom
    cut = (inner & (np.abs(boxes - windows) <= margin)).any(1)
    n, (first, second) = len(boxes), same_objects(boxes, labels, windows).T
    graph = coo_matrix((np.ones(len(first)), (first, second)), (n, n))
    group = connected_components(graph, directed=False)[1]
    order = np.lexsort((-scores, cut, group))  # the best of each group first
    best = order[np.diff(group[order], prepend=-1) > 0]
    joined = boxes[best].copy()
    for k in np.flatnonzero(cut[best]):
        parts = boxes[group == group[best[k]]]
        joined[k] = *parts[:, :2].min(0), *parts[:, 2:].max(0)
    part, alone = np.zeros(len(best), bool), np.bincount(group) == 1
    for k in np.flatnonzero(cut[best] & alone):  # of another object, seen by another window?
        others = (labels[best] == labels[best[k]]) & (windows[best] != windows[best[k]]).any(1)
        larger = area(joined) > area(joined[k])
        inside = area(intersect(joined[k], joined)) > INSIDE * area(joined[k])
        part[k] = (others & larger & inside).any()
    order = np.argsort(-scores[best], kind="stable")
    kept = order[~part[order]]
    return joined[kept], best[kept]


# ---------------------------------------------------------------- the command
def write(out, images, categories, found):
    """predictions.json and predictions.csv; found: COCO results in all the images."""
    names = {category["id"]: category["name"] for category in categories}
    rows = [["image", "class", "score", "x", "y", "width", "height"]]
    for i, result in enumerate(found, 1):
        file, box = images[result["image_id"]]["file_name"], result["bbox"]
        result.update(id=i, iscrowd=0, area=round(box[2] * box[3], 2))
        rows.append([file, names[result["category_id"]], result["score"], *box])
    content = {"images": images, "categories": categories, "annotations": found}
    write_text(out / "predictions.json", json.dumps(content))
    with open(
        out / "predictions.csv", "w", newline="", encoding="utf-8", errors="backslashreplace"
    ) as file:
        csv.writer(file).writerows(rows)


def find_files(places):
    """(the images at these places and in folders there, the folder that holds all). ValueError."""
    files, folders = [], []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place}: no such image or folder of images")
        files += coco.image_files(place) if place.is_dir() else [place]
        folders.append(place if place.is_dir() else place.parent)
    files = [file for file in dict.fromkeys(files) if not file.name.endswith(PICTURE)]
    if not files:
        raise ValueError(f"{places[0]}: is a picture that this command has made")
    return files, os.path.commonpath(folders)


def parse(argv):
    parser, count, natural = Parser(description=__doc__), number(int), number(int, zero=True)
    add, share = parser.add_argument, number(float, zero=True, most=1)
    add("run", help="run folder of train.py, or a checkpoint file")
    add("images", type=os.path.abspath, nargs="+", help="images, folders of images and folders")
    add("--out", type=Path, help="folder; default: predictions in the run folder")
    add("--score", type=share, default=0.3, help="least score that is kept")
    add("--window", type=count, help="pixels a side; default: as large as the training images")
    add("--overlap", type=natural, help="of windows; default: a quarter of them")
    add("--max_dets", type=count, default=100, help="detections a window")
    add("--batch_size", type=count, default=8, help="windows at a time")
    add("--workers", type=number(int, True, most=256), default=0, help="loader processes")
    add("--device", type=cli.usable_device, default="auto", help="cpu, cuda, mps …")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse(argv)
    distributed.init(args.device)
    if distributed.rank():  # one process does it all
        return
    model, _, run = load_run(args.run, args.device)
    require_detector(run)
    path, categories = run["path"], run["categories"]
    window, size = args.window or run["window"], run["args"]["image_size"] or 800
    overlap = window // 4 if args.overlap is None else args.overlap
    if overlap >= window:
        raise ValueError(f"--overlap {overlap} must be smaller than the window of {window} pixels")
    files, folder = find_files(args.images)
    out = args.out or path.parent / "predictions"
    out.mkdir(parents=True, exist_ok=True)
    for name in ("predictions.json", "predictions.csv"):
        check_writable(out / name)
    text = [f"{path} in windows of {window} pixels that overlap by {overlap}, resized to {size}"]
    how = args.score, args.batch_size, args.device, args.max_dets, args.workers
    images, results, bad = [], [], []
    for file in files:
        name = file.relative_to(folder)
        try:
            image, (w, h) = read_image(file)
        except DataError as error:
            bad.append(str(error))
            continue
        found = detect_in_windows(model, image, window, overlap, size, *how)
        results += coco_results(found, len(images), categories, digits=2)
        images.append({"id": len(images), "file_name": name.as_posix(), "width": w, "height": h})
        plots.draw_objects(out / f"{name}{PICTURE}", image, found, categories)
        text.append(f"{name}: {w} x {h}, {len(found['labels'])} objects")
        if max(w, h) > window and len(found["labels"]) * window**2 < w * h / 10:
            larger = "if objects look larger here than in the images trained on"
            text[-1] += f", fewer than in every tenth window; {larger}, try --window {2 * window}"
    if images:
        write(out, images, categories, results)
        text.append(f"written: predictions.json, predictions.csv, {len(images)} pictures in {out}")
    print("\n".join(text))  # last: what it is piped to may have closed
    if bad:
        raise ValueError(f"{len(bad)} of {len(files)} images cannot be used: {'; '.join(bad)}")


if __name__ == "__main__":
    main()
