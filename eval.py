"""Evaluation: COCO metrics in total and per class, result files.

    python eval.py RUN [--data DIR] [--split val] [--limit_val N] [--out DIR] [--export FILE]

RUN is a run folder of train.py (its best.pt, else last.pt) or a checkpoint file. On the run's own
held-out images metrics.json is written into the run folder; of others only where --out says.
For images of any size see predict.py.
"""

import parallel  # isort: skip (before torch)

import argparse
import collections
import contextlib
import importlib.util
import io
import itertools
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import coco
import detr
import isaid
import pictures
import ssl_tasks
from coco import DataError
from flags import Parser, command, number

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
LOGGED = (
    *METRICS,
    "ssl_loss",
    "ssl_acc",
    "collapsed",
    "eval_seconds",
)  # after each epoch of training
AREAS = {"coco": (0, 32, 96, 1e5), "isaid": (10, 144, 512, 1e5)}  # sides: small, medium, large


# ---------------------------------------------------------------- detection
@torch.no_grad()
def predict(model, data, batch_size, workers=0, device="cpu", top=100):
    """What the model finds in every image of a dataset, as COCO results.
    Returns [{"image_id", "category_id", "bbox": [x, y, w, h] pixels of the file, "score"}], ids as
    in the dataset; in every process those of all. Raises FloatingPointError if it is NaN."""
    model.eval()
    results = []
    batches = held_out(data, batch_size, workers, "evaluating")
    for images, padding, targets in batches:
        outputs = model(images.to(device), padding.to(device))
        outputs = {name: outputs[name][-1:].cpu() for name in ("logits", "boxes")}
        if not all(output.isfinite().all() for output in outputs.values()):
            message = "what the model finds is NaN or infinite; its training diverged"
            raise FloatingPointError(f"{data.name}: {message}, or its file is damaged")
        sizes = [target["size"] for target in targets]
        for target, found in zip(targets, model.postprocess(outputs, sizes, top)):
            boxes = found["boxes"]
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
            scores = found["scores"].tolist()
            for label, box, score in zip(found["labels"].tolist(), boxes, scores):
                result = {"image_id": target["image_id"], "score": round(score, 6)}
                result["category_id"] = data.categories[label]["id"]
                results.append({**result, "bbox": [round(v, 3) for v in box]})
    return list(itertools.chain(*parallel.gather(results)))


def held_out(data, batch_size, workers, text):
    """Batches of the images in order; every process takes its share, each image once."""
    mine = range(parallel.rank(), len(data), parallel.world())
    batches = isaid.loader(torch.utils.data.Subset(data, mine), workers, batch_size=batch_size)
    return tqdm(batches, text, leave=False, disable=True if parallel.rank() else None)


def collapsed(data, results):
    """Whether the same is found in every image, as by a model that does not look."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in data.images}
    found = collections.defaultdict(list)
    for result in results:
        w, h = sizes[result["image_id"]]
        box = (round(v / side, 2) for v, side in zip(result["bbox"], (w, h, w, h)))
        found[result["image_id"]].append((result["category_id"], *box))
    alike = len({tuple(sorted(boxes)) for boxes in found.values()}) == 1
    return len(data) > 1 and len(found) == len(data) and alike


def coco_metrics(data, results, evaluator=None, max_dets=100, areas="coco"):
    """Box metrics of COCO results on a dataset; None stands where there is no ground truth.
    max_dets: detections an image that count. areas: of AREAS, what small, medium and large mean.
    Returns {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "per_class":
    [{"id", "name", "boxes", "ap", "ap50"}], "images", "evaluator"}. Raises DataError if results
    and dataset do not belong together."""
    for key, entries in (("image_id", data.images), ("category_id", data.categories)):
        unknown = {result[key] for result in results} - {entry["id"] for entry in entries}
        if unknown:
            message = f"the results have {key} {min(unknown)}, which the dataset has not"
            raise DataError(f"{data.name}: {message}; they were made from another one")
    evaluator = evaluator or default_evaluator()
    run = run_evaluator(evaluator, data, results, max_dets, AREAS[areas])
    precision = run.eval["precision"][..., -1]  # (IoU thresholds, recalls, classes, areas)
    per_class = precision[:, :, :, 0]
    boxes = collections.Counter(a["category_id"] for a in data.annotations if not a["iscrowd"])
    parts = [per_class, per_class[0], per_class[5], *(precision[..., k] for k in (1, 2, 3))]
    parts.append(run.eval["recall"][:, :, 0, -1])
    metrics = {name: _mean(part) for name, part in zip(METRICS, parts)}
    metrics["per_class"] = [
        {
            **category,
            "boxes": boxes[category["id"]],
            "ap": _mean(per_class[..., k]),
            "ap50": _mean(per_class[0, :, k]),
        }
        for k, category in enumerate(data.categories)
    ]
    return {**metrics, "images": len(data), "evaluator": evaluator}


def default_evaluator():
    fast = importlib.util.find_spec("faster_coco_eval")
    return "faster-coco-eval" if fast else "pycocotools"


def run_evaluator(evaluator, data, results, max_dets, sides):
    """pycocotools' evaluation, or that of its faster twin, accumulated."""
    if evaluator == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    found = [
        {**r, "id": i + 1, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0}
        for i, r in enumerate(results)
    ]
    same = {"images": data.images, "categories": data.categories}
    with contextlib.redirect_stdout(io.StringIO()):  # both print what they do
        truth, predicted = COCO(), COCO()
        truth.dataset = {**same, "annotations": [dict(a) for a in data.annotations]}
        predicted.dataset = {**same, "annotations": found}
        truth.createIndex()
        predicted.createIndex()
        run = COCOeval(truth, predicted, "bbox")
        run.params.maxDets = [max_dets]
        ranges = ([low**2, high**2] for low, high in zip(sides, sides[1:]))
        run.params.areaRng = [[0, 1e10], *ranges]
        run.evaluate()
        run.accumulate()
    return run


def _mean(values):
    """The mean of what there is; the evaluators write -1 where there is no ground truth."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


# ---------------------------------------------------------------- self-supervised tasks
@torch.no_grad()
def ssl_metrics(model, task, data, batch_size, workers=0, device="cpu"):
    """How well a task is solved on every image of a dataset, and material for its picture.
    Returns {"ssl_loss": mean over all counted patches, "ssl_acc": share of them that is right,
    None for pixels} and the panels of the first batch, see pictures.draw_ssl. The corruption of an
    image is the same at every call. Raises DataError if no patch counts."""
    model.eval()
    sums, panels = torch.zeros(3, dtype=torch.float64), None  # errors, right ones, patches
    for images, padding, targets in held_out(data, batch_size, workers, "evaluating the task"):
        corruption = task.draw(padding, [target["seed"] for target in targets]).to(device)
        images, padding = images.to(device), padding.to(device)
        if task.corrupts and task.on == "features":
            levels = task.corrupt_levels(model.features(images, padding), corruption)
        else:
            levels = model.features(task.corrupt_images(images, corruption), padding)
        prediction, target = task.compare(model.encode(levels), images, corruption)
        error, right = task.errors(prediction, target)
        counted = task.loss_mask(corruption)
        hits = (right if right is not None else counted) & counted
        sums += torch.stack([(error * counted).sum(), hits.sum(), counted.sum()]).double().cpu()
        if not panels:
            rows = task.panels(images, prediction, target, corruption).items()
            panels = {
                title: (coco.unnormalise(x).masked_fill(padding[:, None], 1), *marks)
                for title, (x, *marks) in rows
            }
    error, hits, patches = sum(parallel.gather(sums)).tolist()
    if not patches:
        message = f"no patch of {task.patch} pixels was corrupted; take larger images"
        raise DataError(f"{data.name}: {message}, smaller patches or a larger share")
    accuracy = hits / patches if isinstance(task, ssl_tasks.ClassTask) else None
    return {"ssl_loss": error / patches, "ssl_acc": accuracy}, panels


# ---------------------------------------------------------------- text
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
    lines = [
        totals(metrics),
        f"{metrics['images']} images, {metrics['evaluator']}; n/a: no ground truth",
        f"\n{'id':>4}  {'class':20} {'boxes':>7} {'AP':>6} {'AP50':>6}",
    ]
    for row in metrics["per_class"]:
        name = f"{row['id']:>4}  {row['name']:20} {row['boxes']:7,}"
        lines.append(f"{name} {show(row['ap']):>6} {show(row['ap50']):>6}")
    return "\n".join(lines)


def epoch_text(line, epochs):
    """An epoch in one line of text."""
    text = f"epoch {line['epoch']:>3}/{epochs}  loss {line['train_loss']:.3f}"
    if "ap" in line:
        shown = (f"{key.upper()} {show(line[key])}" for key in ("ap", "ap50", "ap75"))
        text += "  " + "  ".join(shown)
    if "ssl_loss" in line:
        text += "  held-out task: " + ssl_text(line)
    if line.get("collapsed"):
        text += "  (the same is found in every image, not yet or not any more the objects)"
    speed = f"{line['images_per_second']:.1f} images/s, {line['data_wait']:.0%} waiting"
    return f"{text}  {line['seconds']:.0f} s, {speed}"


# ---------------------------------------------------------------- all of it
def evaluate(model, task, data, args, out=None, top=100):
    """(metrics of a model on a dataset, what it found), and pictures in the folder `out`.
    args: setting, batch_size, workers, device. "score" is what the best checkpoint is chosen by."""
    start, first, metrics, results = time.perf_counter(), parallel.rank() == 0, {}, None
    how = args.batch_size, args.workers, args.device
    parallel.share_buffers(model)
    if args.setting != "pretrain":
        results = predict(model, data, *how, top)
        if first and data.annotations:
            metrics = {**coco_metrics(data, results), "collapsed": collapsed(data, results)}
            metrics["score"] = metrics["ap"] or 0.0
            if out:
                pictures.draw_detections(out / "detections.png", data, results)
    if task:
        found, panels = ssl_metrics(model, task, data, *how)
        metrics = {"score": -found["ssl_loss"], **metrics, **found}
        if first and out:
            pictures.draw_ssl(out / "ssl.png", panels, task.patch)
    metrics["eval_seconds"] = round(time.perf_counter() - start, 2)
    return parallel.gather(metrics)[0], results


# ---------------------------------------------------------------- opening a run
def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name):
    """An argparse type: a device that exists here; "cuda" is the GPU of this process."""
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        torch.empty(1, device=name).tolist()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({why})") from None
    return name


def checkpoint_file(run):
    """The checkpoint of a run folder, its best; a file stands for itself. Raises ValueError."""
    if not Path(run).is_dir():
        return run
    files = [Path(run) / name for name in ("best.pt", "last.pt") if (Path(run) / name).is_file()]
    if not files:
        raise ValueError(f"{run}: has no best.pt and no last.pt; is it a run folder of train.py?")
    return files[0]


def load_run(run, device):
    """A trained detector: (model, its task or None, its checkpoint). Raises ValueError.
    The checkpoint is a dict with "args", "categories", "window" … and "path"."""
    path, task = Path(checkpoint_file(run)), None
    state = detr.load_checkpoint(path)
    if not {"model", "detector", "categories", "args", "task"} <= state.keys():
        message = f"{path}: is not a checkpoint of train.py"
        raise ValueError(f"{message}; start from it with train.py --init {path}")
    try:
        model = detr.build_detector(**state["detector"])
        if state["task"]:
            task = ssl_tasks.build_task(**state["task"]).to(device)
        checkpoint.load(model, task, state)
    except (TypeError, AttributeError, RuntimeError, KeyError) as error:
        message = f"{path}: its weights do not fit its flags; was it written by another version?"
        raise ValueError(f"{message} ({str(error).splitlines()[0]})") from None
    attn, kind = state["args"].get("attn", "auto"), torch.device(device).type
    # a run of a GPU may be evaluated elsewhere
    detr.use_backend(model, device, attn if attn in ("torch", kind) else "auto")
    model.to(device, memory_format=torch.channels_last)  # convolutions are faster so
    return model, task, {**state, "path": path}


def open_run(args):
    """What an evaluation needs: (model, its task or None, its checkpoint), images, own or not.
    Raises ValueError."""
    run = load_run(args.run, args.device)
    state = run[2]
    flags = argparse.Namespace(**state["args"])
    held_out = "train" if flags.overfit else "val"
    own = not args.data and not args.limit_val and args.split in (None, held_out)
    args.split = args.split or held_out
    if args.export and flags.setting == "pretrain":
        raise ValueError(f"--export: {state['path']} is a pretraining, it detects nothing")
    if args.data:
        flags.data, flags.limit_train, flags.limit_val = args.data, None, None
    if args.split == "test" and not flags.data:
        raise ValueError("--split test is of a dataset on disk; name it with --data")
    if args.limit_val:
        setattr(flags, f"limit_{args.split}", args.limit_val)
    data = isaid.open_split(args.split, flags, train=False)
    if flags.setting != "pretrain" and data.categories != state["categories"]:
        theirs, ours = coco.class_names(data.categories), coco.class_names(state["categories"])
        raise DataError(f"{data.name}: its classes {theirs} are not the model's {ours}")
    args.batch_size = args.batch_size or flags.batch_size
    args.out = args.out or (str(state["path"].parent) if own else None)
    return run, data


def parse(argv):
    parser, count = Parser(description=__doc__), number(int)
    add = parser.add_argument
    add("run", help="run folder of train.py, or a checkpoint file")
    add("--data", help="a dataset with other images than the run's")
    add("--split", choices=("train", "val", "test"), help="default: what the run held out, val")
    add("--limit_val", type=count, help="only the first images")
    add("--batch_size", type=count, help="images at a time; default: the run's")
    add("--workers", type=number(int, zero=True), default=0, help="loader processes")
    add("--device", type=usable_device, default=default_device(), help="cpu, cuda, mps …")
    add("--max_dets", type=count, default=100, help="detections an image; iSAID's devkit: 1000")
    add("--areas", choices=tuple(AREAS), default="coco", help="what small, medium, large mean")
    add("--out", help="where metrics.json and pictures go; default: the run, if they are its own")
    add("--export", help="file for what is found as COCO results (xywh, the dataset's ids)")
    args = parser.parse_args(argv)
    if args.export and not Path(args.export).resolve().parent.is_dir():
        parser.error(f"--export {args.export}: its folder does not exist")
    if args.split == "test" and not args.export:
        parser.error("--split test has no ground truth; add --export FILE for what is found")
    return args


def evaluate_run(args):
    args.device = parallel.start(args.device)
    (model, task, state), data = parallel.everywhere(open_run, args)
    print(f"{state['path']} on {data.name}")
    out = Path(args.out) if args.out and args.split != "test" else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    args.setting = state["args"]["setting"]
    metrics, results = evaluate(model, task, data, args, out, max(100, args.max_dets))
    if parallel.rank():
        return
    text = []
    if task:
        text.append(f"{state['task']['name']}: {ssl_text(metrics)}")
    if args.export:
        Path(args.export).write_text(json.dumps(results), encoding="utf-8")
        text.append(f"{len(results):,} detections written to {args.export}")
    if "per_class" in metrics:
        text.append(table(metrics))
        if (args.max_dets, args.areas) != (100, "coco"):
            other = coco_metrics(data, results, max_dets=args.max_dets, areas=args.areas)
            metrics["other"] = {"max_dets": args.max_dets, "areas": args.areas, **other}
            text.append(f"\n{args.max_dets} detections, {args.areas}'s areas: {totals(other)}")
    if out:
        metrics = {"checkpoint": str(state["path"]), "data": data.name, **metrics}
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        text.append(f"\nwritten: {out}/metrics.json and pictures")
    print("\n".join(text))  # last: what it is piped to may have closed


@command
def main(argv=None):
    evaluate_run(parse(argv))


if __name__ == "__main__":
    main()
