"""Objects in images of any size: overlapping windows, and what several windows have seen of one object put together.

    python eval.py predict RUN IMAGE_OR_FOLDER [--out DIR] [--score 0.3]

Writes for each image a picture with the boxes, and for all of them predictions.json (COCO's format, with a score) and predictions.csv.
Boxes here are xyxy in pixels of the whole image.
"""
import argparse
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import detr
import eval as evaluation
import isaid
import parallel
import patches

AGREE = 0.5  # IoU from which two boxes are of one object
PICTURE = ".boxes.jpg"  # the end of the names of pictures, so that they are not taken for what they show
INSIDE = 0.7  # share of a cut box inside another from which it is a part of that


# ---------------------------------------------------------------- windows

class Windows(torch.utils.data.Dataset):
    """The windows of an image. Item i: (picture (3, h, w) normalised, {"size": (height, width) in the image, "window": xyxy})."""

    def __init__(self, image, window, overlap, image_size):
        self.image, self.scale = image, image_size / window
        self.boxes = [(x0, y0, x1, y1) for y0, y1 in patches.spans(image.height, window, overlap)
                      for x0, x1 in patches.spans(image.width, window, overlap)]

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, i):
        x0, y0, x1, y1 = self.boxes[i]
        size = [max(1, round(side * self.scale)) for side in (y1 - y0, x1 - x0)]
        picture = v2.functional.resize(self.image.crop(self.boxes[i]), size)
        return isaid.to_tensor(picture), {"size": (y1 - y0, x1 - x0), "window": self.boxes[i]}


@torch.no_grad()
def find(model, image, window, overlap, image_size, score=0.3, batch_size=8, device="cpu", top=100, workers=0):
    """The objects of a PIL image: {"boxes" (n, 4), "labels" (n,), "scores" (n,)} as arrays, best first.

    window, overlap: pixels of the image; image_size: pixels that a window is resized to; top: at most, of each window.
    """
    model.eval()
    data = Windows(image, window, overlap, image_size)
    loader, parts = DataLoader(data, batch_size, collate_fn=isaid.collate, num_workers=workers), []
    for images, padding, targets in tqdm(loader, "windows", leave=False, disable=parallel.hidden()):
        outputs = model(images.to(device), padding.to(device))
        outputs = {name: outputs[name][-1:].cpu() for name in ("logits", "boxes")}
        for target, found in zip(targets, detr.detections(outputs, [target["size"] for target in targets], model.focal, top)):
            good = found["scores"] >= score
            window_of = torch.tensor(target["window"]).expand(int(good.sum()), 4)
            corner = window_of[:, [0, 1, 0, 1]]
            parts.append([found["boxes"][good] + corner, found["labels"][good], found["scores"][good], window_of])
    boxes, labels, scores, windows = (torch.cat(part).numpy() for part in zip(*parts))
    boxes, kept = join(boxes.astype(float), labels, scores, windows, image.size, margin=window / 64)
    return {"boxes": boxes, "labels": labels[kept], "scores": scores[kept]}


# ---------------------------------------------------------------- one object, several windows

def intersect(a, b):
    """The common part of boxes (..., 4); one without area where there is none."""
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    return np.concatenate([low, np.maximum(low, high)], -1)


def area(boxes):
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def cut_off(boxes, windows, size, margin):
    """Which boxes end, within `margin`, at a border of their window that is not one of the image: (n,) bool."""
    inner = windows != np.array([0, 0, *size])  # (n, 4): left, top, right, bottom
    return (inner & (np.abs(boxes - windows) <= margin)).any(1)


def same_objects(boxes, labels, windows):
    """Pairs (m, 2) of detections of one object from two windows: of one class, one of each window at most, alike in what both show."""
    pairs = []
    places, number = np.unique(windows, axis=0, return_inverse=True)
    number = number.reshape(-1)
    for a, place in enumerate(places):
        common = intersect(place, places)
        for b in np.flatnonzero((area(common) > 0) & (np.arange(len(places)) > a)):
            for label in np.intersect1d(labels[number == a], labels[number == b]):
                mine, theirs = (np.flatnonzero((number == k) & (labels == label)) for k in (a, b))
                first, second = intersect(boxes[mine], common[b])[:, None], intersect(boxes[theirs], common[b])[None]
                shared = area(intersect(first, second))
                agreement = shared / np.maximum(area(first) + area(second) - shared, 1e-9)
                chosen = linear_sum_assignment(agreement, maximize=True)
                good = agreement[chosen] > AGREE
                pairs.append(np.stack([mine[chosen[0]], theirs[chosen[1]]], 1)[good])
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), int)


def join(boxes, labels, scores, windows, size, margin):
    """Make one of what several windows have seen of an object: (boxes (k, 4), the index of each one's best detection (k,)).

    boxes, windows (n, 4), labels, scores (n,), size (width, height) of the image. Of an object's boxes the best one stands that is not cut
    off by the border of its window; if all are, the box that holds them all. A cut one alone inside another object of its class is a
    part of that. (Where several objects reach across all that two windows share, parts may be joined crosswise: let windows overlap by
    more.)
    """
    n, cut = len(boxes), cut_off(boxes, windows, size, margin)
    first, second = same_objects(boxes, labels, windows).T
    _, group = connected_components(coo_matrix((np.ones(len(first)), (first, second)), (n, n)), directed=False)
    order = np.lexsort((-scores, cut, group))  # the best of each group first
    best = order[np.diff(group[order], prepend=-1) > 0]
    joined = boxes[best].copy()
    for k in np.flatnonzero(cut[best]):
        parts = boxes[group == group[best[k]]]
        joined[k] = *parts[:, :2].min(0), *parts[:, 2:].max(0)
    alone = np.bincount(group, minlength=len(best)) == 1
    kept = [k for k in range(len(best)) if not (cut[best[k]] and alone[k] and np.any(
        (labels[best] == labels[best[k]]) & (windows[best] != windows[best[k]]).any(1) & (area(joined) > area(joined[k]))
        & (area(intersect(joined[k], joined)) > INSIDE * area(joined[k]))))]
    kept = sorted(kept, key=lambda k: -scores[best[k]])
    return joined[kept].reshape(-1, 4), best[kept]


# ---------------------------------------------------------------- pictures and files

def draw(path, image, found, names, smallest=800, largest=4000):
    """The image, brought to a side between the two, with boxes in the colours of their classes and a legend."""
    scale = min(max(1, smallest / max(image.size)), largest / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    line = max(16, max(width, height) // 60)
    sheet, font = Image.new("RGB", (width + 12 * line, max(height, line * (len(names) + 1))), "white"), ImageFont.load_default(line * 0.7)
    sheet.paste(image.resize((width, height)))
    pen = ImageDraw.Draw(sheet)
    for box, label in zip(found["boxes"] * scale, found["labels"]):
        pen.rectangle(tuple(box), outline=evaluation.colour(label, len(names)), width=max(2, line // 12))
    counts = np.bincount(found["labels"], minlength=len(names))
    for row, label in enumerate(np.flatnonzero(counts)):
        y = line * (row + 0.5)
        pen.rectangle((width + line / 2, y, width + line * 1.2, y + line * 0.7), fill=evaluation.colour(label, len(names)))
        pen.text((width + line * 1.5, y - line * 0.1), f"{names[label]}  {counts[label]}", fill="black", font=font)
    if not counts.any():
        pen.text((width + line / 2, line / 2), "nothing found", fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


def write(out, images, categories, found):
    """predictions.json and predictions.csv; found: one for each of `images` {"id", "file_name", "width", "height"}."""
    annotations, rows = [], []
    for image, mine in zip(images, found):
        for (x0, y0, x1, y1), label, score in zip(mine["boxes"].tolist(), mine["labels"].tolist(), mine["scores"].tolist()):
            box = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": categories[label]["id"], "bbox": box,
                                "area": round(box[2] * box[3], 2), "iscrowd": 0, "score": round(score, 6)})
            rows.append([image["file_name"], categories[label]["name"], round(score, 6), *box])
    (out / "predictions.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    with open(out / "predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "class", "score", "x", "y", "width", "height"], *rows])


def main(argv):
    parser = argparse.ArgumentParser(prog="eval.py predict", description=__doc__.split("\n")[0])
    count, share = isaid.number(int), isaid.number(float, zero=True, most=1)
    parser.add_argument("run", help="run folder of train.py, or a checkpoint file")
    parser.add_argument("images", help="an image, or a folder of images and folders")
    parser.add_argument("--out", metavar="DIR", help="(default: predictions in the run folder)")
    parser.add_argument("--score", type=share, default=0.3, metavar="P", help="least score of what is kept (default %(default)s)")
    parser.add_argument("--window", type=count, metavar="N", help="pixels a side (default: as large as the training images)")
    parser.add_argument("--overlap", type=isaid.number(int, zero=True), metavar="N", help="of windows (default: a quarter of them)")
    parser.add_argument("--max_dets", type=count, default=100, metavar="N", help="at most, of each window (default %(default)s)")
    parser.add_argument("--batch_size", type=count, default=8, metavar="N", help="windows at a time (default %(default)s)")
    parser.add_argument("--workers", type=isaid.number(int, zero=True), default=0, metavar="N",
                        help="loader processes (default %(default)s)")
    parser.add_argument("--device", type=evaluation.usable_device, default=evaluation.default_device(), help="(default here: %(default)s)")
    args = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("predict runs in one process; start it without torchrun")
    args.device = parallel.start(args.device)
    model, _, flags, categories, path = evaluation.load_run(args.run, args.device)
    if flags.setting == "pretrain":
        raise ValueError(f"{path}: is of a pretraining, it detects nothing")
    window = args.window or detr.load_checkpoint(path).get("window")
    if not window:
        raise ValueError(f"{path}: does not say how large its training images were; add --window N")
    overlap = window // 4 if args.overlap is None else args.overlap
    if overlap >= window:
        raise ValueError(f"--overlap {overlap} must be smaller than the window of {window} pixels")
    folder = Path(args.images)
    if not folder.exists():
        raise ValueError(f"{folder}: no such image or folder of images")
    files = [file for file in isaid.image_files(folder) if not file.name.endswith(PICTURE)] if folder.is_dir() else [folder]
    folder, out = folder if folder.is_dir() else folder.parent, Path(args.out or path.parent / "predictions")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{path} in windows of {window} pixels that overlap by {overlap}, resized to {flags.image_size or 800}")
    images, results, bad = [], [], []
    for file in files:
        name = file.relative_to(folder)
        try:
            image, _ = isaid.read_image(file)
        except isaid.DataError as error:
            bad.append(error)
            continue
        found = find(model, image, window, overlap, flags.image_size or 800, args.score, args.batch_size, args.device, args.max_dets,
                     args.workers)
        images.append({"id": len(images), "file_name": str(name), "width": image.width, "height": image.height})
        results.append(found)
        draw(out / name.with_name(name.name + PICTURE), image, found, [category["name"] for category in categories])
        print(f"{name}: {image.width} x {image.height}, {len(found['labels'])} objects")
    if images:
        write(out, images, categories, results)
        print(f"written: {out / 'predictions.json'}, {out / 'predictions.csv'} and {len(images)} pictures")
    for error in bad[1:]:
        print(error, file=sys.stderr)
    if bad:
        raise ValueError(f"{len(bad)} of {len(files)} images cannot be used: {bad[0]}")
