"""Draw what the best queries of a detector attend to, and what the encoder does in their place.

    python -m tools.attention RUN [IMAGE] [--data DIR] [--queries N] [--out FILE]
    python -m tools.attention deformable-detr photo.jpg

Each row of the picture is one query. Its columns are the query's box; the attention of the query in
the last decoder layer, with a cross at the mean; and the attention of the cell in the center of the
box, with a cross at that cell, in the last encoder layer. DETR attends to all cells: the picture
shows a map, the mean over its heads. Deformable DETR attends to points on all levels: the picture
shows the points of all heads, larger and redder with their weight.

Without IMAGE the first held-out image with objects is drawn, and the run's metrics.json gets an
entry "attention", see `pointing_game`. With --data the image is one of that dataset, and
metrics.json stays as it is. IMAGE is seen whole, resized as the run's images are; of a large image,
pass a crop. RUN may be the name of a COCO model, see util/pretrained.py.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if it is started by its path

import detr
import isaid
from eval import RUN_HELP, coco_results, eval_loader, load_images, load_run, require_detector
from util import cli, plots
from util.files import DataError, check_writable, read_json, write_text
from util.images import read_image

NMS_IOU = 0.3  # of two boxes that overlap more, only the better one is drawn
MIN_SCORE = 0.1  # of the queries that are drawn, except for the best one


# ---------------------------------------------------------------- attention
class AttentionMap(NamedTuple):
    """What Q queries attend to with M heads, at n points each.

    In DETR all queries attend to the same points, the centers of all cells: Q and M are 1 in
    `points`.
    """

    points: Tensor  # (B, Q, M, n, 2): x, y in 0..1 of the image without padding; may be outside
    weights: Tensor  # (B, Q, M, n): the sum over n is 1
    shapes: list  # (height, width) of each level, finest first


@torch.no_grad()
def attention_of(model, images, padding, part="decoder"):
    """Return (outputs of a detector, AttentionMap of its last decoder or encoder layer).

    images:  (B, 3, H, W) normalized
    padding: (B, H, W) bool, True = padding
    part:    "decoder" or "encoder", where every cell is a query
    The model computes as always. What its attention module is called with is recorded, and the same
    module then returns its attention for this.
    """
    calls = []

    def record(module, args, kwargs):
        calls.append((args, kwargs))

    module = attention_module(model, part)
    with module.register_forward_pre_hook(record, with_kwargs=True):
        memory = model.eval().encode(model.features(images, padding))
        outputs = model.decode(memory)
    args, kwargs = calls[0]
    shapes = [level.features.shape[-2:] for level in memory]

    if isinstance(model, detr.DeformableDETR):
        query, reference, _, spatial_shapes, _ = args
        points, weights = module.sample(query, reference, spatial_shapes)  # (B, Q, M, L, P, 2)
        points = points / detr.valid_ratios(memory)[:, None, None, :, None]
        return outputs, AttentionMap(points.flatten(3, 4), weights.flatten(3), shapes)

    kwargs = {**kwargs, "need_weights": True, "average_attn_weights": False}
    _, weights = module(*args, **kwargs)  # (B, M, Q, S)
    centers = torch.cat(detr.cell_centers(memory), 1)  # (B, S, 2)
    return outputs, AttentionMap(centers[:, None, None], weights.transpose(1, 2), shapes)


def attention_module(model, part):
    """Return the module of the last layer with which queries or cells attend to cells."""
    if part == "encoder":
        return model.transformer.encoder.layers[-1].self_attn
    layer = model.transformer.decoder.layers[-1]
    if isinstance(model, detr.DeformableDETR):
        return layer.cross_attn
    return layer.multihead_attn


def mean_point(attention):
    """Return the weighted mean of the points inside the image for each query: (B, Q, 2).

    It is NaN if all points are outside the image, where a query attends to nothing.
    """
    inside = ((attention.points >= 0) & (attention.points <= 1)).all(-1)
    weights = (attention.weights * inside)[..., None]  # (B, Q, M, n, 1)
    return (attention.points * weights).sum((2, 3)) / weights.sum((2, 3))


@torch.no_grad()
def pointing_game(model, data, batch_size, device):
    """Compute how often queries attend to their object (pointing game, Zhang et al. 2016).

    An object's query is the one that the matching of training assigns to it; it hits if the mean of
    its attention lies in the object's box.
    Returns {"accuracy": share of hits, "chance": that of a random point in the image, "objects":
    number of objects in the dataset}.
    """
    hits = []
    areas = []
    for images, padding, targets in eval_loader(data, batch_size, 0, "attention"):
        outputs, attention = attention_of(model, images.to(device), padding.to(device))
        labels, boxes = detr.pad_targets(targets, device)  # (B, T), (B, T, 4)
        counts = [len(target["labels"]) for target in targets]
        logits = outputs["logits"][-1:]  # of the last layer
        pred_boxes = outputs["boxes"][-1:]
        _, image, query, obj = model.criterion.match(logits, pred_boxes, labels, boxes, counts)
        center, size = boxes[image, obj].split(2, -1)  # (pairs, 2)
        distance = (mean_point(attention)[image, query] - center).abs()
        hits += (distance <= size / 2).all(1).tolist()
        areas += size.prod(1).tolist()
    return {"accuracy": np.mean(hits), "chance": np.mean(areas), "objects": len(hits)}


# ---------------------------------------------------------------- the picture
def batch_of_one(image, image_size):
    """Return a PIL image as evaluation shows it to a model: images (1, 3, H, W), padding (1, H, W).

    image_size: the run's flag
    """
    pixels = isaid.to_tensor(isaid.resize(image_size)(image))
    images, padding, _ = isaid.collate([(pixels, None)])
    return images, padding


def draw_best_queries(path, run, image, n=4):
    """Draw what the n best queries of a model attend to in a PIL image; see the top of this file.

    Of queries whose boxes overlap, only the best is drawn.
    run: eval.TrainedRun
    """
    model = run.model
    images, padding = batch_of_one(image, run.args.image_size)
    device = next(model.parameters()).device
    images = images.to(device)
    padding = padding.to(device)
    outputs, decoder_attention = attention_of(model, images, padding)
    columns = ["box", "decoder: attention of its query"]
    has_encoder = len(model.transformer.encoder.layers) > 0
    if has_encoder:
        _, encoder_attention = attention_of(model, images, padding, "encoder")
        columns.append("encoder: attention of its center cell")

    (detection,) = model.postprocess(outputs, [(image.height, image.width)])
    best = best_detections(detection, n)
    detection = {name: values[best].cpu() for name, values in detection.items()}
    results = coco_results(detection, 0, run.categories)
    means = mean_point(decoder_attention)[0].nan_to_num(0.5).cpu().numpy()  # (Q, 2)
    rows = {}
    for k, (query, result) in enumerate(zip(detection["queries"].tolist(), results)):
        overlays = [overlay_of(model, decoder_attention, query, means[query])]
        if has_encoder:
            box = outputs["boxes"][-1, 0, query].tolist()
            cell, center = center_cell(box, encoder_attention.shapes[0])
            overlays.append(overlay_of(model, encoder_attention, cell, center))
        name = plots.class_text(run.categories[detection["labels"][k]])
        title = f"{k + 1}. {name} {result['score']:.2f}"
        if k == 0:
            title += f": {' | '.join(columns)}"
        rows[title] = (result, overlays)
    plots.draw_attention(path, image, rows, run.categories)


def best_detections(detection, n):
    """Return the indices of at most n detections of different objects, best first, at least one."""
    best = nms(detection["boxes"], detection["scores"], NMS_IOU)[:n]
    good = int((detection["scores"][best] >= MIN_SCORE).sum())
    return best[: max(1, good)]


def center_cell(box, shape):
    """Return the cell of a level in which the center of a box lies: (its index, its center (2,)).

    box:   cxcywh in 0..1
    shape: (height, width) of the level
    """
    x, y, _, _ = box
    h, w = shape
    row = min(int(y * h), h - 1)
    column = min(int(x * w), w - 1)
    return row * w + column, np.array([(column + 0.5) / w, (row + 0.5) / h])


class Overlay(NamedTuple):
    """What one query attends to, as plots.draw_attention expects it."""

    points: np.ndarray | None  # (n, 2) of all heads, x, y in 0..1; None in DETR
    weights: np.ndarray  # (n,) of the points, or a map (h, w)
    cross: np.ndarray  # (2,) the point to mark, x, y in 0..1


def overlay_of(model, attention, query, cross):
    """Return the Overlay of a query in the first image."""
    weights = attention.weights[0, query].cpu()  # (M, n)
    if isinstance(model, detr.DETR):
        attention_map = weights.mean(0).view(attention.shapes[0])
        return Overlay(None, attention_map.numpy(), cross)
    points = attention.points[0, query].flatten(0, 1)
    return Overlay(points.cpu().numpy(), weights.flatten().numpy(), cross)


# ---------------------------------------------------------------- the command
def parse(argv):
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("run", help=RUN_HELP)
    add(
        "image",
        nargs="?",
        type=Path,
        help="image file; default: the first held-out image with objects",
    )
    add("--queries", type=cli.POSITIVE_INT, default=4, help="number of queries to draw")
    add("--data", help="dataset to take the image from; default: the run's")
    out_help = (
        "picture to write; default: attention.png, or attention-IMAGE.png, in RUN or runs/RUN"
    )
    add("--out", type=Path, help=out_help)
    add("--device", type=cli.parse_device, default="auto", help="device: cpu, cuda, mps …")
    return parser.parse_args(argv)


@cli.cli_main
def main(argv=None):
    args = parse(argv)
    run = load_run(args.run, args.device)
    require_detector(run)
    name = f"attention-{args.image.stem}.png" if args.image else "attention.png"
    out = args.out
    if out is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        out = run.folder / name
    check_writable(out)
    plots.image_format(out)  # raises an error if it is unknown
    if args.image:
        image = read_whole_image(args.image, run.window)
    else:
        image = play_pointing_game(run, args.data, args.device)
    draw_best_queries(out, run, image, args.queries)
    print(f"written: {out}")


def read_whole_image(path, window):
    """Return a PIL image; print a note if it is larger than the training images.

    window: pixels per side of these; None: they had all sizes
    """
    image, (width, height) = read_image(path)
    if window is not None and max(width, height) > window:
        print(
            f"{path}: {width} x {height} pixels, more than the {window} of the images trained on; "
            f"objects may be too small after resizing; try a crop"
        )
    return image


def play_pointing_game(run, data_folder, device):
    """Print the result of the pointing game on held-out images, and add it to metrics.json.

    data_folder: dataset to use; None: the run's own, and only then metrics.json is changed
    Returns the first of these images that contains objects, a PIL image.
    """
    split = "train" if run.args.overfit else "val"
    flags = argparse.Namespace(**vars(run.args))
    if data_folder:
        flags.data = data_folder
    data = load_images(run, flags, split, export=None)
    with_objects = [i for i, labels in enumerate(data.labels) if len(labels) > 0]
    if not with_objects:
        raise DataError(f"{data.name}: contains no objects; pass an image file")
    metrics_path = run.folder / "metrics.json"
    metrics = {}
    if metrics_path.exists() and not data_folder:
        metrics = read_json(metrics_path)
    if not isinstance(metrics, dict):
        raise ValueError(f"{metrics_path}: not written by eval.py; delete or move it")

    game = pointing_game(run.model, data, flags.batch_size, device)
    print(
        f"pointing-game accuracy: {game['accuracy']:.1%} of {game['objects']:,} held-out objects "
        f"(chance: {game['chance']:.1%})"
    )
    if not data_folder:
        try:
            write_text(metrics_path, json.dumps({**metrics, "attention": game}, indent=1))
        except DataError as error:  # the picture may still be written, to --out
            print(f"not written: {error}")
    return data.load_image(with_objects[0])


if __name__ == "__main__":
    main()
