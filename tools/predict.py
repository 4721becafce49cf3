"""Detect objects in images of any size.

    python -m tools.predict RUN IMAGE_OR_FOLDER … [--out DIR] [--score 0.3]

The detector runs on overlapping windows as large as the training images, and duplicate detections
of an object are merged. A COCO model, which RUN may name (see util/pretrained.py), sees each image
whole unless --window is given. Writes a picture with boxes for each image, and for all images
together predictions.json (COCO's format, with scores) and predictions.csv.
"""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is started by its path

import isaid
from eval import RUN_HELP, coco_results, detect, load_run, require_detector
from util import cli, coco, distributed, isaid_prepare, plots
from util.files import DataError, check_writable, replace_file, write_text
from util.images import read_image

MERGE_IOU = 0.5  # detections in two windows that overlap more are of one object
CONTAINED_FRACTION = 0.7  # a truncated box is a fragment of a box that contains more of it
PICTURE_SUFFIX = ".boxes.jpg"  # of the pictures that are written: they are no input


# ---------------------------------------------------------------- windows
class Windows(torch.utils.data.Dataset):
    """The windows of an image. Item i: (pixels (3, h, w) normalized, {"size": (height, width)
    in the image, "window": xyxy}).

    window, overlap: pixels per side in the image; window None: the whole image is the only one
    image_size:      pixels per side that a window is resized to; None: see isaid.resize
    """

    def __init__(self, image, window, overlap, image_size):
        self.image = image
        self.windows = []
        if window is None:
            self.scale = None
            self.windows.append((0, 0, image.width, image.height))
            return
        self.scale = image_size / window
        for y0, y1 in isaid_prepare.tile_intervals(image.height, window, overlap):
            for x0, x1 in isaid_prepare.tile_intervals(image.width, window, overlap):
                self.windows.append((x0, y0, x1, y1))

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        x0, y0, x1, y1 = self.windows[i]
        height = y1 - y0
        width = x1 - x0
        if self.scale is None:
            crop = isaid.resize()(self.image)
        else:
            size = [max(1, round(height * self.scale)), max(1, round(width * self.scale))]
            crop = v2.functional.resize(self.image.crop(self.windows[i]), size)
        return isaid.to_tensor(crop), {"size": (height, width), "window": self.windows[i]}


def detect_in_windows(
    model,
    image,
    window,
    overlap,
    image_size,
    score=0.3,
    batch_size=8,
    device="cpu",
    max_dets=100,
    workers=0,
):
    """Detect the objects in a PIL image.

    window, overlap, image_size: see Windows
    score:           smallest score that is kept
    max_dets:        largest number of detections per window
    Returns {"boxes" (n, 4) xyxy, "labels" (n,), "scores" (n,)} as numpy arrays, best first.
    """
    data = Windows(image, window, overlap, image_size)
    loader = isaid.data_loader(data, workers, batch_size=batch_size)
    loader = tqdm(loader, "windows", leave=False, disable=None)
    boxes = []
    labels = []
    scores = []
    windows = []  # of each detection
    for target, detection in detect(model, loader, device, max_dets):
        good = detection["scores"] >= score
        x0, y0, _, _ = target["window"]
        offset = torch.tensor([x0, y0, x0, y0])
        boxes.append((detection["boxes"][good] + offset).double())
        labels.append(detection["labels"][good])
        scores.append(detection["scores"][good])
        windows.append(torch.tensor(target["window"]).expand(len(boxes[-1]), 4))
    boxes = torch.cat(boxes).numpy()
    labels = torch.cat(labels).numpy()
    scores = torch.cat(scores).numpy()
    windows = torch.cat(windows).numpy()
    margin = 0  # a whole image cuts no objects
    if window is not None:
        margin = window / 64
    merged, best = merge_windows(boxes, labels, scores, windows, image.size, margin)
    return {"boxes": merged, "labels": labels[best], "scores": scores[best]}


# ---------------------------------------------------------------- merging
# Boxes are xyxy in pixels of the whole image.
def intersect(a, b):
    """Return the intersection of boxes, (..., 4) each; it has no area if they do not overlap."""
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., 2:], b[..., 2:])
    return np.concatenate([low, np.maximum(low, high)], -1)


def area(boxes):
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def same_objects(boxes, labels, windows):
    """Return pairs of detections of one object in two windows: (m, 2) indices.

    Both have the same class, and are alike in the part of the image that both windows show. A
    detection has at most one partner in each other window.
    """
    pairs = [np.zeros((0, 2), int)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        places, window_of = np.unique(windows[members], axis=0, return_inverse=True)
        window_of = window_of.reshape(-1)  # numpy 2.0 gives it two dimensions
        for b in range(len(places)):
            overlaps = intersect(places[b], places[:b])
            for a in np.flatnonzero(area(overlaps) > 0):
                first = members[window_of == a]
                second = members[window_of == b]
                i, j = match_in_overlap(boxes[first], boxes[second], overlaps[a])
                pairs.append(np.stack([first[i], second[j]], 1))
    return np.concatenate(pairs)


def match_in_overlap(a, b, overlap):
    """Match boxes of two windows one to one by their IoU in the overlap of the windows.

    Returns the indices (m,) into a (n, 4) and into b of the matches with more than MERGE_IOU.
    """
    seen_a = intersect(a, overlap)[:, None]
    seen_b = intersect(b, overlap)
    shared = area(intersect(seen_a, seen_b))
    union = area(seen_a) + area(seen_b) - shared
    iou = shared / np.maximum(union, 1e-9)
    i, j = linear_sum_assignment(iou, maximize=True)
    agree = iou[i, j] > MERGE_IOU
    return i[agree], j[agree]


def merge_windows(boxes, labels, scores, windows, size, margin):
    """Merge the detections of all windows into one per object.

    Each object keeps its highest-scoring box that is not truncated by its window. If all its boxes
    are truncated, their enclosing box is used. A truncated box without a partner that lies mostly
    inside a larger box of the same class is dropped as a fragment of it. (Where several objects
    reach across all that two windows share, parts may be joined crosswise: overlap by more.)

    boxes, windows: (n, 4); each detection's box and window
    labels, scores: (n,)
    size:           (width, height) of the image
    margin:         pixels, see `touches_border`
    Returns (boxes (k, 4), index of each object's best detection (k,)), best first.
    """
    n = len(boxes)
    truncated = touches_border(boxes, windows, size, margin)
    pairs = same_objects(boxes, labels, windows)
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (n, n))
    _, object_of = connected_components(graph, directed=False)  # of each detection

    order = np.lexsort((-scores, truncated, object_of))  # the best of each object first
    is_best = np.diff(object_of[order], prepend=-1) > 0
    best = order[is_best]  # of objects 0, 1, 2 …
    merged = boxes[best]
    for k in np.flatnonzero(truncated[best]):
        parts = boxes[object_of == k]
        merged[k, :2] = parts[:, :2].min(0)
        merged[k, 2:] = parts[:, 2:].max(0)

    alone = np.bincount(object_of) == 1
    fragment = is_fragment(merged, labels[best], windows[best], truncated[best] & alone)
    order = np.argsort(-scores[best], kind="stable")
    kept = order[~fragment[order]]
    return merged[kept], best[kept]


def touches_border(boxes, windows, size, margin):
    """Return which boxes may be truncated: (n,) bool.

    They end within `margin` pixels of a border of their window that is inside the image.
    """
    inside_image = windows != np.array([0, 0, *size])  # (n, 4): left, top, right, bottom
    near = np.abs(boxes - windows) <= margin
    return (inside_image & near).any(1)


def is_fragment(boxes, labels, windows, candidates):
    """Return which candidates are parts of a larger object of their class: (k,) bool.

    candidates: (k,) bool; the larger object is one that another window shows
    """
    result = np.zeros(len(boxes), bool)
    for k in np.flatnonzero(candidates):
        same_class = labels == labels[k]
        other_window = (windows != windows[k]).any(1)
        larger = area(boxes) > area(boxes[k])
        contains = area(intersect(boxes[k], boxes)) > CONTAINED_FRACTION * area(boxes[k])
        result[k] = (same_class & other_window & larger & contains).any()
    return result


# ---------------------------------------------------------------- files
def find_input_images(places):
    """Return (the images at these paths and in these folders, the folder that contains them all).

    Raises ValueError if there are none.
    """
    files = []
    folders = []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place}: no such image or folder of images")
        if place.is_dir():
            files += coco.image_files(place)
            folders.append(place)
        else:
            files.append(place)
            folders.append(place.parent)
    unique = dict.fromkeys(files)
    files = [file for file in unique if not file.name.endswith(PICTURE_SUFFIX)]
    if not files:
        raise ValueError(f"{places[0]}: output of an earlier predict.py call, not an input image")
    return files, os.path.commonpath(folders)


def write_predictions(out, images, categories, results):
    """Write predictions.json and predictions.csv; results: COCO results in all images."""
    names = {category["id"]: category["name"] for category in categories}
    annotations = []
    rows = [["image", "class", "score", "x", "y", "width", "height"]]
    for i, result in enumerate(results, start=1):
        x, y, w, h = result["bbox"]
        annotations.append({**result, "id": i, "iscrowd": 0, "area": round(w * h, 2)})
        file_name = images[result["image_id"]]["file_name"]
        rows.append([file_name, names[result["category_id"]], result["score"], x, y, w, h])
    content = {"images": images, "categories": categories, "annotations": annotations}
    write_text(out / "predictions.json", json.dumps(content))
    with replace_file(out / "predictions.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows(rows)


# ---------------------------------------------------------------- the command
def parse(argv):
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("run", help=RUN_HELP)
    add(
        "images",
        type=os.path.abspath,
        nargs="+",
        help="images, or folders that are searched for images",
    )
    add("--out", type=Path, help="folder to write; default: predictions in RUN, or runs/RUN")
    add("--score", type=cli.FRACTION, default=0.3, help="smallest score that is kept")
    window_help = (
        "pixels per side of a window; default: as large as the training images, or with a COCO "
        "model the whole image"
    )
    add("--window", type=cli.POSITIVE_INT, help=window_help)
    overlap_help = "pixels that neighboring windows share; default: a quarter of a window"
    add("--overlap", type=cli.NON_NEGATIVE_INT, help=overlap_help)
    add("--max_dets", type=cli.POSITIVE_INT, default=100, help="detections per window")
    add("--batch_size", type=cli.POSITIVE_INT, default=8, help="windows per batch")
    add("--workers", type=cli.NUM_WORKERS, default=0, help="data loader processes")
    add("--device", type=cli.parse_device, default="auto", help="device: cpu, cuda, mps …")
    return parser.parse_args(argv)


def choose_windows(args, run):
    """Return (window, overlap) in pixels, from the flags or the run; None for whole images.

    Raises ValueError if they contradict each other.
    """
    window = run.window if args.window is None else args.window
    overlap = args.overlap
    if window is None and overlap is not None:
        raise ValueError(f"--overlap {overlap} requires --window: {run.path} sees whole images")
    if window is not None and overlap is None:
        overlap = window // 4
    if window is not None and overlap >= window:
        raise ValueError(f"--overlap {overlap} must be smaller than the window of {window} pixels")
    return window, overlap


@cli.cli_main
def main(argv=None):
    args = parse(argv)
    distributed.init(args.device)
    if distributed.rank() > 0:  # one process does it all
        return
    run = load_run(args.run, args.device)
    require_detector(run)
    window, overlap = choose_windows(args, run)
    image_size = 800 if run.args.image_size is None else run.args.image_size
    files, folder = find_input_images(args.images)
    out = run.folder / "predictions" if args.out is None else args.out
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "predictions.json")
    check_writable(out / "predictions.csv")

    seen = "on whole images"
    if window is not None:
        seen = f"in windows of {window} pixels that overlap by {overlap}, resized to {image_size}"
    text = [f"{run.path} {seen}"]
    images = []
    results = []
    errors = []
    for file in files:
        name = file.relative_to(folder)
        try:
            image, (width, height) = read_image(file)
        except DataError as error:
            errors.append(str(error))
            continue
        detection = detect_in_windows(
            run.model,
            image,
            window,
            overlap,
            image_size,
            score=args.score,
            batch_size=args.batch_size,
            device=args.device,
            max_dets=args.max_dets,
            workers=args.workers,
        )
        image_id = len(images)
        results += coco_results(detection, image_id, run.categories, digits=2)
        images.append(
            {"id": image_id, "file_name": name.as_posix(), "width": width, "height": height}
        )
        plots.draw_objects(out / f"{name}{PICTURE_SUFFIX}", image, detection, run.categories)
        n = len(detection["labels"])
        text.append(f"{name}: {width} x {height}, {n} objects{window_advice(n, image, window)}")
    if images:
        write_predictions(out, images, run.categories, results)
        text.append(f"written to {out}: predictions.json, predictions.csv, pictures")
    print("\n".join(text))  # last: what it is piped to may have closed
    if errors:
        message = f"failed to process {len(errors)} of {len(files)} images"
        raise ValueError(f"{message}: {'; '.join(errors)}")


def window_advice(n, image, window):
    """Return a remark if there are very few detections, n, for the number of windows, else ""."""
    one_window = window is None or max(image.size) <= window
    if one_window or n * window**2 >= image.width * image.height / 10:
        return ""
    return (
        f"; fewer than one detection per ten windows: if objects are larger than in the training "
        f"images, try --window {2 * window}"
    )


if __name__ == "__main__":
    main()
