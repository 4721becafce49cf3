"""Evaluation: COCO metrics in total and per class, result files; the pictures of train.py.

    python eval.py RUN [--data DIR | --images DIR --json FILE] [--split val] [--limit_val N] [--out DIR] [--export FILE]
    python eval.py predict RUN IMAGE_OR_FOLDER [--out DIR] [--score 0.3]       images of any size

RUN is a run folder of train.py (its best.pt, else last.pt) or a checkpoint file.
"""
import argparse
import collections
import contextlib
import importlib.util
import io
import itertools
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import detr
import isaid
import parallel
import ssl_tasks

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")


# ---------------------------------------------------------------- predictions and metrics

@torch.no_grad()
def predict(model, data, batch_size, workers=0, device="cpu", top=100):
    """What the model finds in every image of a dataset, as COCO results.

    Returns [{"image_id", "category_id", "bbox": [x, y, w, h] pixels of the file, "score"}], ids as in the dataset; in every process
    those of all. Raises FloatingPointError if it is NaN.
    """
    model.eval()
    results = []
    loader = held_out_loader(data, batch_size, workers)
    for images, padding, targets in tqdm(loader, "evaluating", leave=False, disable=parallel.hidden()):
        outputs = model(images.to(device), padding.to(device))
        outputs = {name: outputs[name][-1:].cpu() for name in ("logits", "boxes")}
        if not all(output.isfinite().all() for output in outputs.values()):
            raise FloatingPointError(f"{data.name}: what the model finds is NaN or infinite; its training diverged, or its file is damaged")
        found = detr.detections(outputs, [target["size"] for target in targets], model.focal, top)
        for target, detection in zip(targets, found):
            boxes = detection["boxes"]
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
            for label, box, score in zip(detection["labels"].tolist(), boxes, detection["scores"].tolist()):
                results.append({"image_id": target["image_id"], "category_id": data.categories[label]["id"],
                                "bbox": [round(v, 3) for v in box], "score": round(score, 6)})
    return list(itertools.chain(*parallel.gather(results)))


def held_out_loader(data, batch_size, workers):
    """The images in order; of several processes each takes its share, every image is taken once."""
    mine = torch.utils.data.Subset(data, range(parallel.rank(), len(data), parallel.world()))
    return isaid.loader(mine, workers, batch_size=batch_size)


def collapsed(data, results):
    """Whether the same is found in every image, as by a model that does not look: classes and boxes relative to the image."""
    sizes, found = {image["id"]: (image["width"], image["height"]) for image in data.images}, collections.defaultdict(list)
    for result in results:
        w, h = sizes[result["image_id"]]
        x, y, bw, bh = result["bbox"]
        found[result["image_id"]].append((result["category_id"], *(round(v, 2) for v in (x / w, y / h, bw / w, bh / h))))
    return len(data) > 1 and len(found) == len(data) and len({tuple(sorted(boxes)) for boxes in found.values()}) == 1


def default_evaluator():
    return "faster-coco-eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"


AREAS = {"coco": (0, 32, 96, 1e5), "isaid": (10, 144, 512, 1e5)}  # sides in pixels: small from, medium from, large from and to


def coco_metrics(data, results, evaluator=None, max_dets=100, areas="coco"):
    """Box metrics of COCO results on a dataset; None stands where there is no ground truth.

    max_dets: detections an image that count. areas: of AREAS, what small, medium and large mean.
    Returns {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "per_class":
    [{"id", "name", "boxes", "ap", "ap50"}], "images", "evaluator"}. Raises isaid.DataError if results and dataset do
    not belong together.
    """
    evaluator = evaluator or default_evaluator()
    if evaluator == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    for key, known in (("image_id", {image["id"] for image in data.images}),
                       ("category_id", {category["id"] for category in data.categories})):
        unknown = {result[key] for result in results} - known
        if unknown:
            raise isaid.DataError(f"{data.name}: the results have {key} {min(unknown)}, which the dataset has not; "
                                  "they were made from another one")
    found = [{**r, "id": i + 1, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0} for i, r in enumerate(results)]
    with contextlib.redirect_stdout(io.StringIO()):  # both print what they do
        truth, predicted = COCO(), COCO()
        for coco, annotations in ((truth, [dict(a) for a in data.annotations]), (predicted, found)):
            coco.dataset = {"images": data.images, "categories": data.categories, "annotations": annotations}
            coco.createIndex()
        run = COCOeval(truth, predicted, "bbox")
        run.params.maxDets = [max_dets]
        sides = AREAS[areas]
        run.params.areaRng = [[0, 1e10], *([low ** 2, high ** 2] for low, high in zip(sides, sides[1:]))]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., -1]  # (IoU thresholds, recalls, classes, areas)
    per_class = precision[:, :, :, 0]
    boxes = dict.fromkeys((category["id"] for category in data.categories), 0)
    for annotation in data.annotations:
        boxes[annotation["category_id"]] += not annotation["iscrowd"]
    parts = (per_class, per_class[0], per_class[5], *(precision[..., k] for k in (1, 2, 3)), run.eval["recall"][:, :, 0, -1])
    metrics = {name: _mean(part) for name, part in zip(METRICS, parts)}
    metrics["per_class"] = [{**category, "boxes": boxes[category["id"]], "ap": _mean(per_class[..., k]),
                             "ap50": _mean(per_class[0, :, k])} for k, category in enumerate(data.categories)]
    return {**metrics, "images": len(data), "evaluator": evaluator}


def _mean(values):
    """The mean of what there is; the evaluators write -1 where there is no ground truth."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def show(value):
    return "n/a" if value is None else f"{value:.3f}"


def ssl_text(metrics):
    """The metrics of a self-supervised task as text."""
    accuracy = "" if metrics["ssl_acc"] is None else f", accuracy {metrics['ssl_acc']:.3f}"
    return f"loss {metrics['ssl_loss']:.3f}{accuracy}"


def totals(metrics):
    names = ("AP", "AP50", "AP75", "small", "medium", "large", "AR")
    return "  ".join(f"{name} {show(metrics[key])}" for name, key in zip(names, METRICS))


def table(metrics):
    """The metrics as text: one line of totals, then a line for each class."""
    lines = [totals(metrics),
             f"{metrics['images']} images, {metrics['evaluator']}; n/a: no ground truth", "",
             f"{'id':>4}  {'class':20} {'boxes':>7} {'AP':>6} {'AP50':>6}"]
    lines += [f"{row['id']:>4}  {row['name']:20} {row['boxes']:7,} {show(row['ap']):>6} {show(row['ap50']):>6}"
              for row in metrics["per_class"]]
    return "\n".join(lines)


@torch.no_grad()
def ssl_metrics(model, task, data, batch_size, workers=0, device="cpu"):
    """How well a self-supervised task is solved on every image of a dataset, and material for its picture.

    Returns {"ssl_loss": mean over all counted patches, "ssl_acc": share of them that is right, None for pixels} and the
    panels of the first batch, see `draw_ssl`. The corruption of an image is the same at every call. Raises isaid.DataError
    if no patch counts.
    """
    model.eval()
    errors, hits, patches, right, panels = 0.0, 0.0, 0, None, None
    loader = held_out_loader(data, batch_size, workers)
    for images, padding, targets in tqdm(loader, "evaluating the task", leave=False, disable=parallel.hidden()):
        corruption = task.corruption(padding, [target["seed"] for target in targets]).to(device)
        images, padding = images.to(device), padding.to(device)
        memory, _ = ssl_tasks.encode(model, task, images, padding, corruption)
        prediction, target, error, right = task.compare(memory, images, corruption)
        counted = task.counted(corruption)
        errors += (error * counted).sum()
        hits += 0 if right is None else (right & counted).sum()
        patches += counted.sum()
        if not panels:
            panels = {title: (isaid.unnormalise(rows).masked_fill(padding[:, None], 1), *marks)
                      for title, (rows, *marks) in task.panels(images, prediction, target, corruption).items()}
    sums = parallel.total({"errors": errors, "hits": hits, "patches": patches})
    if not sums["patches"]:
        raise isaid.DataError(f"{data.name}: no patch of {task.patch} pixels was corrupted; take larger images, a smaller "
                              "--ssl_patch or a larger --ssl_ratio")
    errors, hits, patches = map(float, sums.values())
    return {"ssl_loss": errors / patches, "ssl_acc": None if right is None else hits / patches}, panels


# ---------------------------------------------------------------- pictures

def colour(label, n):
    """A colour of its own for each of n classes."""
    return tuple(Image.new("HSV", (1, 1), (label * 255 // n, 200 if label % 2 else 255, 255)).convert("RGB").getpixel((0, 0)))


def draw_boxes(image, boxes, labels, names, scores=None, scale=1.0):
    """A copy of a PIL image, enlarged, with boxes xyxy in pixels of the original and their class names."""
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for i, (box, label) in enumerate(zip(boxes, labels)):
        ink = colour(label, len(names))
        x0, y0, x1, y1 = (v * scale for v in box)
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=ink, width=2)
        text = names[label] + (f" {scores[i]:.2f}" if scores is not None else "")
        corner = max(0, min(x0 + 1, image.width - pen.textlength(text, font=font) - 2)), max(y0 - 13, 0)  # inside the picture
        left, top, right, bottom = pen.textbbox(corner, text, font=font)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=ink)
        bright = 0.3 * ink[0] + 0.59 * ink[1] + 0.11 * ink[2] > 90
        pen.text(corner, text, fill="black" if bright else "white", font=font)
    return image


def draw_detections(path, data, results, n=6, score=0.3, side=320):
    """A picture of the first n images that hold objects: the truth above, what was found with at least `score` below."""
    index, names = {c["id"]: i for i, c in enumerate(data.categories)}, [c["name"] for c in data.categories]
    chosen = ([i for i, labels in enumerate(data.labels) if len(labels)] or range(len(data)))[:n]
    sheet, head = Image.new("RGB", (len(chosen) * (side + 4), 2 * (side + 20)), "white"), ImageFont.load_default(14)
    pen = ImageDraw.Draw(sheet)
    for row, text in enumerate(("ground truth", f"found, score at least {score}")):
        pen.text((4, row * (side + 20) + 1), text, fill="black", font=head)
    for column, i in enumerate(chosen):
        image, _ = data.read(i)
        scale = side / max(image.size)
        x, y, w, h = data.boxes[i].unbind(1)
        truth = draw_boxes(image, torch.stack([x, y, x + w, y + h], 1).tolist(), data.labels[i].tolist(), names, scale=scale)
        mine = [r for r in results if r["image_id"] == data.images[i]["id"] and r["score"] >= score]
        found = draw_boxes(image, [(r["bbox"][0], r["bbox"][1], r["bbox"][0] + r["bbox"][2], r["bbox"][1] + r["bbox"][3])
                                   for r in mine], [index[r["category_id"]] for r in mine], names,
                           [r["score"] for r in mine], scale)
        for row, picture in enumerate((truth, found)):
            sheet.paste(picture, (column * (side + 4), row * (side + 20) + 18))
    sheet.save(path)


def draw_ssl(path, panels, patch, n=6):
    """What a self-supervised task does to the first n images, a row for each panel.

    panels: {title: (images (B, 3, H, W) in 0..1, patches to frame (B, P) or None, right or not (B, P) or None)}; frames
    are white, or green where right and red where wrong.
    """
    n = min(n, *(len(images) for images, _, _ in panels.values()))
    H, W = next(iter(panels.values()))[0].shape[-2:]
    columns, rows = -(-W // patch), -(-H // patch)
    scale = (256 if max(columns, rows) <= 16 else 512) / max(H, W)
    w, h = round(W * scale), round(H * scale)
    sheet, font = Image.new("RGB", (n * (w + 4), len(panels) * (h + 20)), "white"), ImageFont.load_default(14)
    pen = ImageDraw.Draw(sheet)
    for row, (title, (images, framed, right)) in enumerate(panels.items()):
        pen.text((4, row * (h + 20) + 1), title, fill="black", font=font)
        images = (images[:n] * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for column, image in enumerate(images):
            x, y = column * (w + 4), row * (h + 20) + 18
            sheet.paste(Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST), (x, y))
            for i in [] if framed is None else framed[column].nonzero()[:, 0].tolist():
                top, left = (k * patch * scale for k in divmod(i, columns))
                ink = "white" if right is None else "lime" if right[column, i] else "red"
                pen.rectangle((x + left, y + top, x + left + patch * scale - 1, y + top + patch * scale - 1), outline=ink)
    sheet.save(path)


def draw_curves(path, log):
    """Losses, AP and the self-supervised task by epoch, from the lines of log.jsonl as dicts."""
    from matplotlib.figure import Figure  # takes a second to import; no window is opened
    curves = {"training loss (terms: last layer)": sorted({key for line in log for key in line if key.startswith("train_")}),
              "on held-out images: AP": METRICS[:3], "on held-out images: task": ("ssl_loss", "ssl_acc")}
    curves = {label: names for label, names in curves.items()
              if any(line.get(name) is not None for name in names for line in log)}
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for name in names:
            points = [(line["epoch"], line[name]) for line in log if line.get(name) is not None]
            if points:  # the total is drawn broad: it may be the same as its only term
                style = {"linewidth": 5, "alpha": 0.4} if name == "train_loss" else {}
                axes.plot(*zip(*points), marker=".", label=name.removeprefix("train_"), **style)
        axes.set(xlabel="epoch", ylabel=label)
        scale_axes(axes)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def scale_axes(axes):
    """Whole epochs below, and values from zero to a little more than the largest, also where all are alike."""
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
    axes.set_xlim(axes.dataLim.x0 - 0.5, axes.dataLim.x1 + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)


# ---------------------------------------------------------------- the command

def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name):
    """An argparse type: a device that exists here. "cuda" is the GPU of this process: others' are not touched."""
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({str(error).splitlines()[0]})") from None
    return name


def checkpoint_file(run):
    """The checkpoint that stands for a run folder, its best; a file stands for itself. Raises ValueError."""
    if not Path(run).is_dir():
        return run
    files = [Path(run) / name for name in ("best.pt", "last.pt") if (Path(run) / name).is_file()]
    if not files:
        raise ValueError(f"{run}: has no best.pt and no last.pt; is it a run folder of train.py?")
    return files[0]


def load_run(run, device):
    """A trained detector: (model, its task or None, its flags, its categories, the checkpoint's path). Raises ValueError."""
    path = Path(checkpoint_file(run))
    checkpoint = detr.load_checkpoint(path)
    if not {"model", "detector", "categories", "args", "task"} <= checkpoint.keys():
        raise ValueError(f"{path}: is not a checkpoint of train.py; start from it with train.py --init {path}")
    flags, task = argparse.Namespace(**checkpoint["args"]), None
    try:
        model, weights = detr.build_detector(**checkpoint["detector"]), checkpoint.get("ema") or checkpoint["model"]
        if flags.setting == "pretrain":  # such a run has no decoder
            weights = {**model.state_dict(), **weights}
        model.load_state_dict(weights)
        if checkpoint["task"]:
            task = ssl_tasks.build_task(**checkpoint["task"]["config"])
            task.load_state_dict(checkpoint["task"]["state"])
            task.to(device)
    except (TypeError, AttributeError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: its weights do not fit its flags; was it written by another version? "
                         f"({str(error).splitlines()[0]})") from None
    model.to(device, memory_format=torch.channels_last)  # convolutions are faster so
    return model, task, flags, checkpoint["categories"], path


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["predict"]:
            import large_images
            large_images.main(argv[1:])
        else:
            evaluate_run(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {isaid.one_line(error)}")


def open_run(args):
    """What an evaluation needs: (model, its task or None, its flags, the checkpoint's path, a folder for results, the images).

    Raises ValueError.
    """
    model, task, flags, categories, path = load_run(args.run, args.device)
    held_out = "train" if flags.overfit else "val"
    own = args.split in (None, held_out) and not (args.data or args.images or args.limit_val)
    args.split = args.split or held_out
    if args.export and flags.setting == "pretrain":
        raise ValueError(f"--export: {path} is of a pretraining, it detects nothing")
    if args.images and not args.json and flags.setting != "pretrain":
        raise ValueError("--images needs --json, their COCO annotations")
    if args.data or args.images:
        flags.data, flags.data_unlabeled, flags.limit_train, flags.limit_val = args.data, None, None, None
        flags.train_images, flags.train_json = flags.val_images, flags.val_json = args.images, args.json
    if args.split == "test" and not flags.data:
        raise ValueError("--split test is of a dataset in the patches layout; name it with --data")
    if args.limit_val:
        setattr(flags, f"limit_{args.split}", args.limit_val)
    data = isaid.open_split(args.split, flags, train=False)
    if flags.setting != "pretrain" and data.categories != categories:
        raise isaid.DataError(f"{data.name}: its classes {isaid.class_names(data.categories)} are not the model's "
                              f"{isaid.class_names(categories)}")
    return model, task, flags, path, Path(args.out or (path.parent if own else path.parent / "other")), data


def evaluate_run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of train.py, or a checkpoint file")
    parser.add_argument("--data", metavar="DIR", help="another dataset than the run's, in the patches layout")
    parser.add_argument("--images", metavar="DIR", help="or one with COCO annotations: its folder of images …")
    parser.add_argument("--json", metavar="FILE", help="… and its annotations")
    parser.add_argument("--split", choices=("train", "val", "test"),
                        help="test: without ground truth, for --export (default: the run's held-out images, val)")
    parser.add_argument("--limit_val", type=isaid.number(int), metavar="N", help="only the first N images")
    parser.add_argument("--batch_size", type=isaid.number(int), metavar="N", help="images at a time (default: the run's)")
    parser.add_argument("--workers", type=isaid.number(int, zero=True), default=0, metavar="N",
                        help="loader processes (default %(default)s)")
    parser.add_argument("--device", type=usable_device, default=default_device(), help="(default here: %(default)s)")
    parser.add_argument("--max_dets", type=isaid.number(int), default=100, metavar="N", help="detections an image that count (default "
                        "%(default)s, as COCO has it; iSAID's devkit: 1000)")
    parser.add_argument("--areas", choices=tuple(AREAS), default="coco", help="what small, medium and large mean (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="where metrics.json and ssl.png go (default: the run folder; of other images than "
                        "all those that the run held out: its folder `other`)")
    parser.add_argument("--export", metavar="FILE", help="write what was found as COCO results (xywh, the dataset's ids)")
    args = parser.parse_args(argv)
    args.device = parallel.start(args.device)
    if args.export and (Path(args.export).is_dir() or not Path(args.export).resolve().parent.is_dir()):
        parser.error(f"--export {args.export}: is a folder, or there is no folder {Path(args.export).resolve().parent}")
    if args.images and args.data:
        parser.error("--data and --images name two datasets; give one of them")
    if args.json and not args.images:
        parser.error("--json needs --images, the folder of the images")
    if args.split == "test" and not args.export:
        parser.error("--split test has no ground truth; add --export FILE for what is found")
    model, task, flags, path, out, data = parallel.everywhere(open_run, args)
    if data.bad:
        print(f"left out: {len(data.bad)} images that cannot be used, the first: {data.bad[0]}")
    print(f"{path} on {data.name}")
    how = args.batch_size or flags.batch_size, args.workers, args.device
    out.mkdir(parents=True, exist_ok=True)
    metrics, text, written = {"checkpoint": str(path), "data": data.name}, [], []
    if task:
        found, panels = ssl_metrics(model, task, data, *how)
        metrics.update(found)
        text.append(f"{flags.ssl_task}: {ssl_text(found)}")
    if flags.setting != "pretrain":
        results = predict(model, data, *how, max(100, args.max_dets))
    if parallel.rank():
        return
    if flags.setting != "pretrain" and args.split != "test":
        metrics.update(coco_metrics(data, results))
        text.append(table(metrics))
        if (args.max_dets, args.areas) != (100, "coco"):
            others = coco_metrics(data, results, max_dets=args.max_dets, areas=args.areas)
            metrics["other"] = {"max_dets": args.max_dets, "areas": args.areas, **others}
            text.append(f"\nwith {args.max_dets} detections an image and {args.areas}'s areas: {totals(others)}")
    if args.split != "test":
        written.append(out / "metrics.json")
        written[-1].write_text(json.dumps(metrics, indent=1))
    if task:
        written.append(out / "ssl.png")
        draw_ssl(written[-1], panels, task.patch)
    if args.export:
        written.append(args.export)
        Path(args.export).write_text(json.dumps(results))
        text.append(f"{len(results):,} detections exported")
    print("\n".join(text) + f"\n\nwritten: {', '.join(map(str, written))}")  # last: where it is piped to may have closed


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
