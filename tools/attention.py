"""Where a detector looks: what its best queries, and the encoder's cells there, attend to.

    python -m tools.attention RUN [IMAGE] [--queries N] [--out FILE]

A row of the picture is a query: its box; what it looks at in the decoder's last layer, with a cross
at the mean; what the cell in the middle of the box, with a cross, looks at in the encoder's last.
DETR looks at all cells: a map, the mean of its heads. Deformable DETR looks at points on all
levels: those of all heads, larger and redder with their weight. Without IMAGE the first held-out
image with objects is drawn, and the run's metrics.json gets "attention", see `pointing_game`. IMAGE
is seen whole, resized as the run's images are; of a large one give a part.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

import detr
import isaid
from eval import coco_results, eval_loader, load_run, require_detector
from util import cli, plots
from util.cli import Parser, command, number
from util.files import DataError, check_writable, read_json, write_text
from util.images import read_image

COLUMNS = "its box", "decoder: what its query looks at", "encoder: what its middle cell looks at"


# ---------------------------------------------------------------- where it looks
class AttentionMap(NamedTuple):
    """Where Q queries look with M heads, at n points each; in DETR all queries at the same ones,
    the centres of the cells, so that Q and M are 1 in `points`."""

    points: Tensor  # (B, Q, M, n, 2): x, y in 0..1 of the unpadded image; outside nothing is seen
    weights: Tensor  # (B, Q, M, n), of sum 1
    shapes: list  # (height, width) of each level, finest first


@torch.no_grad()
def attention_of(model, images, padding, part="decoder"):
    """(outputs of a detector, a Look of the last layer of its "decoder" or "encoder").
    In the encoder all cells are queries. The model runs as always; what its attention is given is
    recorded, and from that the same module tells where it looks."""
    layer, calls = getattr(model.transformer, part).layers[-1], []
    names = ["self_attn"] if part == "encoder" else ["cross_attn", "multihead_attn"]
    module = next(getattr(layer, name) for name in names if hasattr(layer, name))
    hook = module.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with hook:
        memory = model.eval().encode(model.features(images, padding))
        outputs = model.decode(memory)
    (arguments, options), *_ = calls
    shapes = [level.features.shape[-2:] for level in memory]
    if isinstance(model, detr.DeformableDETR):
        query, reference, _, sizes, _ = arguments
        points, weights = module.sample(query, reference, sizes)  # (B, Q, M, L, P, 2)
        points = points / detr.valid_ratios(memory)[:, None, None, :, None]
        return outputs, AttentionMap(points.flatten(3, 4), weights.flatten(3), shapes)
    options.update(need_weights=True, average_attn_weights=False)
    weights = module(*arguments, **options)[1].transpose(1, 2)  # (B, Q, M, S)
    centres = torch.cat(detr.cell_centers(memory), 1)  # (B, S, 2)
    return outputs, AttentionMap(centres[:, None, None], weights, shapes)


def mean_point(seen):
    """The mean of the points that a query looks at, by weight: (B, Q, 2); NaN if all are outside
    the image, where nothing is seen."""
    inside = ((seen.points >= 0) & (seen.points <= 1)).all(-1)
    weights = (seen.weights * inside)[..., None]  # (B, Q, M, n, 1)
    return (seen.points * weights).sum((2, 3)) / weights.sum((2, 3))


@torch.no_grad()
def pointing_game(model, data, batch_size, device):
    """{"in_box": the share of the objects in `data` at which their query looks: the mean of its
    points lies in the object's box; "by_chance": the same of a point anywhere in the image;
    "objects": how many}. An object's query is the one that the matching of training gives it."""
    hits, areas = [], []
    for images, padding, targets in eval_loader(data, batch_size, 0, "attention"):
        outputs, seen = attention_of(model, images.to(device), padding.to(device))
        labels, boxes = detr.pad_targets(targets, device)  # (B, T), (B, T, 4)
        counts = [len(target["labels"]) for target in targets]
        last = outputs["logits"][-1:], outputs["boxes"][-1:]
        _, image, query, target = model.criterion.match(*last, labels, boxes, counts)
        centre, side = boxes[image, target].split(2, -1)  # (pairs, 2)
        hits += ((mean_point(seen)[image, query] - centre).abs() <= side / 2).all(1).tolist()
        areas += side.prod(1).tolist()
    return {"in_box": np.mean(hits), "by_chance": np.mean(areas), "objects": len(hits)}


# ---------------------------------------------------------------- a picture of it
def batch(image, image_size):
    """A PIL image as the evaluation shows it to a model: images (1, 3, H, W), padding (1, H, W).
    image_size: the run's flag."""
    return isaid.collate([(isaid.to_tensor(isaid.resize(image_size)(image)), None)])[:2]


def draw(path, model, image, run, n=4):
    """Save a picture of where the n best queries of a model look in a PIL image; of several
    whose boxes overlap, the best; none below a score of 0.1 but the best.
    run: its checkpoint, as eval.load_run returns it."""
    device = next(model.parameters()).device
    inputs = [x.to(device) for x in batch(image, run["args"]["image_size"])]
    outputs, seen = attention_of(model, *inputs)
    looks, means = [seen], mean_point(seen)[0].nan_to_num(0.5).cpu().numpy()  # (Q, 2)
    if model.transformer.encoder.layers:
        looks.append(attention_of(model, *inputs, "encoder")[1])
    (found,) = model.postprocess(outputs, [image.size[::-1]])
    best = nms(found["boxes"], found["scores"], 0.3)[:n]  # each of another object, best first
    best = best[: max(1, int((found["scores"][best] >= 0.1).sum()))]
    found = {name: values[best].cpu() for name, values in found.items()}
    results, rows = coco_results(found, 0, run["categories"]), {}
    h, w = seen.shapes[0]
    for k, (query, result) in enumerate(zip(found["queries"].tolist(), results)):
        x, y = outputs["boxes"][-1, 0, query, :2].tolist()
        column, row = min(int(x * w), w - 1), min(int(y * h), h - 1)
        middle = np.array([(column + 0.5) / w, (row + 0.5) / h])
        places = (query, means[query]), (row * w + column, middle)
        title = f"{run['categories'][found['labels'][k]]['name']} {result['score']:.2f}"
        overlays = [(*overlay(model, seen, q), mark) for seen, (q, mark) in zip(looks, places)]
        what = f": {' | '.join(COLUMNS[: 1 + len(looks)])}" if k == 0 else ""
        rows[f"{k + 1}. {title}{what}"] = result, overlays
    plots.draw_attention(path, image, rows, run["categories"])


def overlay(model, seen, q):
    """What query q looks at in the first image: (points (n, 2), weights (n,)) of all heads, or of
    DETR (None, map (h, w))."""
    weights = seen.weights[0, q].cpu()  # (M, n)
    if isinstance(model, detr.DETR):
        return None, weights.mean(0).view(*seen.shapes[0]).numpy()
    return seen.points[0, q].flatten(0, 1).cpu().numpy(), weights.flatten().numpy()


# ---------------------------------------------------------------- the command
def parse(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", help="run folder of train.py, or a checkpoint file")
    add("image", nargs="?", type=Path, help="default: the first held-out image with objects")
    add("--queries", type=number(int), default=4, help="how many of the best are drawn")
    add("--out", type=Path, help="picture; default: attention.png, or attention-IMAGE.png, in RUN")
    add("--device", type=cli.usable_device, default="auto", help="cpu, cuda, mps …")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse(argv)
    model, _, run = load_run(args.run, args.device)
    require_detector(run)
    flags, folder = argparse.Namespace(**run["args"]), run["path"].parent
    name = f"attention-{args.image.stem}.png" if args.image else "attention.png"
    out, metrics = args.out or folder / name, folder / "metrics.json"
    check_writable(out)
    before = read_json(metrics) if metrics.exists() and not args.image else {}
    if not isinstance(before, dict):
        raise ValueError(f"{metrics}: is not of eval.py; delete it")
    if args.image:
        image, (w, h) = read_image(args.image)
        if run["window"] and max(w, h) > run["window"]:
            larger = f"{w} x {h} pixels, more than the {run['window']} of the images trained on"
            print(f"{args.image}: {larger}; objects may be too small in it: try a part of it")
    else:
        check_writable(metrics)
        data = isaid.load_split("train" if flags.overfit else "val", flags, train=False)
        with_objects = (i for i, labels in enumerate(data.labels) if len(labels))
        if (first := next(with_objects, None)) is None:
            raise DataError(f"{data.name}: has no objects; name an image")
        image = data.load_image(first)
        share = pointing_game(model, data, flags.batch_size, args.device)
        write_text(metrics, json.dumps({**before, "attention": share}, indent=1))
        text = "of {objects:,} held-out objects {in_box:.1%} are looked at by the queries that are "
        print(f"{text}matched with them (by chance: {{by_chance:.1%}})".format(**share))
    draw(out, model, image, run, args.queries)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
