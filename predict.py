"""Objects in images of any size: windows, and what several windows have seen put together.

    python predict.py RUN IMAGE_OR_FOLDER [--out DIR] [--score 0.3]

Writes for each image a picture with the boxes, and for all of them predictions.json (COCO's
format, with a score) and predictions.csv. Boxes here are xyxy in pixels of the whole image.
"""

import parallel  # isort: skip (before torch)

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torchvision.transforms import v2
from tqdm import tqdm

import coco
import eval as evaluation
import isaid
import patches
import pictures
from flags import Parser, command, number

AGREE = 0.5  # IoU from which two boxes are of one object
INSIDE = 0.7  # share of a cut box inside another from which it is a part of that
PICTURE = ".boxes.jpg"  # end of the pictures' names, so that they are not taken for images


# ---------------------------------------------------------------- windows
class Windows(torch.utils.data.Dataset):
    """The windows of an image. Item i: (picture (3, h, w) normalised,
    {"size": (height, width) in the image, "window": xyxy})."""

    def __init__(self, image, window, overlap, image_size):
        self.image, self.scale = image, image_size / window
        rows, columns = (patches.spans(n, window, overlap) for n in (image.height, image.width))
        self.boxes = [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, i):
        x0, y0, x1, y1 = self.boxes[i]
        size = [max(1, round(side * self.scale)) for side in (y1 - y0, x1 - x0)]
        picture = v2.functional.resize(self.image.crop(self.boxes[i]), size)
        return isaid.to_tensor(picture), {"size": (y1 - y0, x1 - x0), "window": self.boxes[i]}


@torch.no_grad()
def find(model, image, window, overlap, image_size, score=0.3, batch_size=8, device="cpu",
         top=100, workers=0):  # fmt: skip
    """The objects of a PIL image: {"boxes" (n, 4), "labels" (n,), "scores" (n,)}, best first.
    window, overlap: pixels of the image; image_size: pixels that a window is resized to; top: at
    most, of each window."""
    model.eval()
    loader = isaid.loader(
        Windows(image, window, overlap, image_size), workers, batch_size=batch_size
    )
    parts = []
    for images, padding, targets in tqdm(loader, "windows", leave=False, disable=None):
        outputs = model(images.to(device), padding.to(device))
        outputs = {name: outputs[name][-1:].cpu() for name in ("logits", "boxes")}
        if not all(output.isfinite().all() for output in outputs.values()):
            raise ValueError("what the model finds is NaN or infinite; its training diverged")
        sizes = [target["size"] for target in targets]
        for target, found in zip(targets, model.postprocess(outputs, sizes, top)):
            good = found["scores"] >= score
            window_of = torch.tensor(target["window"]).expand(int(good.sum()), 4)
            boxes = found["boxes"][good] + window_of[:, [0, 1, 0, 1]]
            parts.append((boxes, found["labels"][good], found["scores"][good], window_of))
    boxes, labels, scores, windows = (torch.cat(part).numpy() for part in zip(*parts))
    joined = join(boxes.astype(float), labels, scores, windows, image.size, margin=window / 64)
    return {"boxes": joined[0], "labels": labels[joined[1]], "scores": scores[joined[1]]}


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
    places, number = np.unique(windows, axis=0, return_inverse=True)
    number = number.reshape(-1)
    for a, place in enumerate(places):
        common = intersect(place, places)
        for b in np.flatnonzero((area(common) > 0) & (np.arange(len(places)) > a)):
            for label in np.intersect1d(labels[number == a], labels[number == b]):
                mine, theirs = (np.flatnonzero((number == k) & (labels == label)) for k in (a, b))
                first = intersect(boxes[mine], common[b])[:, None]
                second = intersect(boxes[theirs], common[b])[None]
                shared = area(intersect(first, second))
                iou = shared / np.maximum(area(first) + area(second) - shared, 1e-9)
                i, j = linear_sum_assignment(iou, maximize=True)
                good = iou[i, j] > AGREE
                pairs.append(np.stack([mine[i], theirs[j]], 1)[good])
    return np.concatenate(pairs)


def join(boxes, labels, scores, windows, size, margin):
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

    def is_part(k):  # of another object, seen by another window
        others = (labels[best] == labels[best[k]]) & (windows[best] != windows[best[k]]).any(1)
        larger = area(joined) > area(joined[k])
        inside = area(intersect(joined[k], joined)) > INSIDE * area(joined[k])
        return (others & larger & inside).any()

    alone = np.bincount(group, minlength=len(best)) == 1
    kept = [k for k in range(len(best)) if not (cut[best[k]] and alone[k] and is_part(k))]
    kept = sorted(kept, key=lambda k: -scores[best[k]])
    return joined[kept].reshape(-1, 4), best[kept]


# ---------------------------------------------------------------- the command
def write(out, images, categories, found):
    """predictions.json and predictions.csv; found: what `find` returns, for each image."""
    annotations, rows = [], [["image", "class", "score", "x", "y", "width", "height"]]
    for image, mine in zip(images, found):
        boxes, scores = mine["boxes"].tolist(), mine["scores"].tolist()
        for (x0, y0, x1, y1), label, score in zip(boxes, mine["labels"].tolist(), scores):
            box = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            ids = {"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 0}
            ids.update(category_id=categories[label]["id"], score=round(score, 6))
            annotations.append({**ids, "bbox": box, "area": round(box[2] * box[3], 2)})
            rows.append([image["file_name"], categories[label]["name"], round(score, 6), *box])
    content = {"images": images, "categories": categories, "annotations": annotations}
    (out / "predictions.json").write_text(json.dumps(content), encoding="utf-8")
    with open(out / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def parse(argv):
    parser, count, natural = Parser(description=__doc__), number(int), number(int, zero=True)
    add, share = parser.add_argument, number(float, zero=True, most=1)
    add("run", help="run folder of train.py, or a checkpoint file")
    add("images", help="an image, or a folder of images and folders")
    add("--out", help="folder; default: predictions in the run folder")
    add("--score", type=share, default=0.3, help="least score that is kept")
    add("--window", type=count, help="pixels a side; default: as large as the training images")
    add("--overlap", type=natural, help="of windows; default: a quarter of them")
    add("--max_dets", type=count, default=100, help="detections a window")
    add("--batch_size", type=count, default=8, help="windows at a time")
    add("--workers", type=natural, default=0, help="loader processes")
    device = evaluation.default_device()
    add("--device", type=evaluation.usable_device, default=device, help="cpu, cuda, mps …")
    return parser.parse_args(argv)


def predict(args):
    args.device = parallel.start(args.device)
    model, _, checkpoint = evaluation.load_run(args.run, args.device)
    path, size = checkpoint["path"], checkpoint["args"]["image_size"] or 800
    window = args.window or checkpoint["window"]
    if checkpoint["args"]["setting"] == "pretrain":
        raise ValueError(f"{path}: is of a pretraining, it detects nothing")
    overlap = window // 4 if args.overlap is None else args.overlap
    if overlap >= window:
        raise ValueError(f"--overlap {overlap} must be smaller than the window of {window} pixels")
    source, out = Path(args.images), Path(args.out or path.parent / "predictions")
    if not source.exists():
        raise ValueError(f"{source}: no such image or folder of images")
    files, folder = [source], source.parent
    if source.is_dir():
        files, folder = coco.image_files(source), source
    files = [file for file in files if not file.name.endswith(PICTURE)]
    out.mkdir(parents=True, exist_ok=True)
    print(f"{path} in windows of {window} pixels that overlap by {overlap}, resized to {size}")
    how = args.score, args.batch_size, args.device, args.max_dets, args.workers
    names = [category["name"] for category in checkpoint["categories"]]
    images, results, bad = [], [], []
    for file in files:
        name = file.relative_to(folder)
        try:
            image, (width, height) = coco.read_image(file)
        except coco.DataError as error:
            bad.append(str(error))
            continue
        results.append(find(model, image, window, overlap, size, *how))
        image_id = {"id": len(images), "file_name": name.as_posix()}
        images.append({**image_id, "width": width, "height": height})
        pictures.draw_objects(out / name.with_name(name.name + PICTURE), image, results[-1], names)
        print(f"{name}: {width} x {height}, {len(results[-1]['labels'])} objects")
    if images:
        write(out, images, checkpoint["categories"], results)
        print(f"written: predictions.json, predictions.csv and {len(images)} pictures in {out}")
    if bad:
        print("\n".join(bad[1:]), file=sys.stderr)
        raise ValueError(f"{len(bad)} of {len(files)} images cannot be used: {bad[0]}")


@command
def main(argv=None):
    predict(parse(argv))


if __name__ == "__main__":
    main()
