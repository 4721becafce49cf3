"""Evaluation: COCO metrics in total and per class, result files.

    python eval.py RUN [--data DIR] [--split val] [--limit_val N] [--out DIR] [--export FILE]

RUN is a run folder of train.py (its best.pt, else last.pt) or a checkpoint file. On the run's own
held-out images metrics.json is written into the run folder; of others only where --out says.
For images of any size see tools/predict.py.
"""

import argparse
import collections
import contextlib
import importlib.util
import io
import itertools
import json
import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_convert
from tqdm import tqdm

import deformable_attn
import detr
import isaid
import ssl_tasks
from util import checkpoint, coco, distributed, plots
from util.cli import Parser, command, number, usable_device
from util.files import DataError, check_writable, write_text
from util.images import unnormalize
from util.weights import load_checkpoint

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
SSL = "ssl_loss", "ssl_acc", "ssl_baseline", "ssl_chance"
LOGGED = *METRICS, "val_loss", *SSL, "collapsed", "eval_seconds"  # of an epoch
MAX_BASELINE_VALUES = 2**24  # values that the task's targets have
SIZE_RANGES = {
    "coco": (0, 32, 96, 1e5),
    "isaid": (10, 144, 512, 1e5),
}  # sides: small, medium, large


# ---------------------------------------------------------------- detection
def detect_dataset(model, data, batch_size, workers=0, device="cpu", top=100, losses=None):
    """What the model finds in every image of a dataset, as COCO results with the dataset's ids;
    in every process those of all. losses: see `detections`. Raises FloatingPointError if NaN."""
    batches, results = eval_loader(data, batch_size, workers, "evaluating"), []
    for target, found in detect(model, batches, device, top, data.name, losses):
        results += coco_results(found, target["image_id"], data.categories)
    return sum(distributed.all_gather(results), [])


@torch.no_grad()
def detect(model, batches, device, top, name, losses=None):
    """Pairs of an image's target and what the model's postprocess finds in it, on the CPU.
    losses: a list that gets (images, the loss of training, weighted and summed) of each batch.
    Raises FloatingPointError, with the name of the data, if what is found is NaN."""
    model.eval()
    for images, padding, targets in batches:
        every = model(images.to(device), padding.to(device))
        outputs = {key: every[key][-1:].cpu() for key in ("logits", "boxes")}
        if not all(output.isfinite().all() for output in outputs.values()):
            message = "what the model finds is NaN or infinite; its training diverged"
            raise FloatingPointError(f"{name}: {message}, or its file is damaged")
        if losses is not None:
            weights, terms = model.criterion.weights, model.criterion(every, targets)
            loss = sum(weights[term] * values.sum().item() for term, values in terms.items())
            losses.append((len(targets), loss))
        sizes = [target["size"] for target in targets]
        yield from zip(targets, model.postprocess(outputs, sizes, top))


def coco_results(found, image_id, categories, digits=3):
    """What postprocess finds in an image, one by one as {"image_id", "category_id", "bbox": [x, y,
    w, h] in pixels, "score"}."""
    boxes = box_convert(torch.as_tensor(found["boxes"]), "xyxy", "xywh").tolist()
    for label, score, box in zip(found["labels"].tolist(), found["scores"].tolist(), boxes):
        result = {"image_id": image_id, "category_id": categories[label]["id"]}
        yield {**result, "bbox": [round(v, digits) for v in box], "score": round(score, 6)}


def eval_loader(data, batch_size, workers, text):
    """Batches of the images in order; every process takes its share, each image once."""
    mine = range(distributed.rank(), len(data), distributed.world_size())
    batches = isaid.data_loader(torch.utils.data.Subset(data, mine), workers, batch_size=batch_size)
    return tqdm(batches, text, leave=False, disable=True if distributed.rank() else None)


def predictions_collapsed(data, results):
    """Whether the same is found in every image, as by a model that does not look."""
    sides = {image["id"]: 2 * (image["width"], image["height"]) for image in data.images}
    found = {i: [] for i in sides}
    for result in results:
        i = result["image_id"]
        box = (round(v / side, 2) for v, side in zip(result["bbox"], sides[i]))
        found[i].append((result["category_id"], *box))
    different = {tuple(sorted(boxes)) for boxes in found.values()}
    return len(data) > 1 and bool(results) and len(different) == 1


def coco_metrics(data, results, evaluator=None, max_dets=100, areas="coco"):
    """Box metrics of COCO results on a dataset; None stands where there is no ground truth.
    max_dets: detections an image that count. areas: of SIZE_RANGES, what small, medium and large mean.
    Returns {each of METRICS, "per_class": [{"id", "name", "boxes", "ap", "ap50"}], "images",
    "evaluator"}. Raises DataError if results and dataset do not belong together."""
    for key, entries in (("image_id", data.images), ("category_id", data.categories)):
        unknown = {result[key] for result in results} - {entry["id"] for entry in entries}
        if unknown:
            message = f"the results have {key} {min(unknown)}, which the dataset has not"
            raise DataError(f"{data.name}: {message}; they were made from another one")
    fast = importlib.util.find_spec("faster_coco_eval")
    evaluator = evaluator or ("faster-coco-eval" if fast else "pycocotools")
    found = run_evaluator(evaluator, data, results, max_dets, SIZE_RANGES[areas])
    # of all objects, and of each size of them: (IoU thresholds, recalls, classes)
    precision, *of_sizes = np.moveaxis(found["precision"][..., -1], -1, 0)
    parts = precision, precision[0], precision[5], *of_sizes, found["recall"][:, :, 0, -1]
    metrics = {name: _mean(part) for name, part in zip(METRICS, parts)}
    metrics.update(per_class=[], images=len(data), evaluator=evaluator)
    boxes = collections.Counter(a["category_id"] for a in data.annotations if not a["iscrowd"])
    for k, category in enumerate(data.categories):
        aps = {"ap": _mean(precision[..., k]), "ap50": _mean(precision[0, :, k])}
        metrics["per_class"].append({**category, "boxes": boxes[category["id"]], **aps})
    return metrics


def run_evaluator(evaluator, data, results, max_dets, sides):
    """{"precision", "recall"} by pycocotools' evaluation, or that of its faster twin."""
    if evaluator == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    true = [dict(a) for a in data.annotations]  # copies, which the evaluators mark
    found = [{**r, "id": i, "area": math.prod(r["bbox"][2:])} for i, r in enumerate(results, 1)]
    same, both = {"images": data.images, "categories": data.categories}, (COCO(), COCO())
    with contextlib.redirect_stdout(io.StringIO()):  # both evaluators print what they do
        for index, annotations in zip(both, (true, found)):
            index.dataset = {**same, "annotations": annotations}
            index.createIndex()
        run = COCOeval(*both, "bbox")
        run.params.maxDets = [max_dets]
        run.params.areaRng = [[0, 1e10], *([a**2, b**2] for a, b in itertools.pairwise(sides))]
        run.evaluate()
        run.accumulate()
    return run.eval


def _mean(values):
    """The mean of what there is; the evaluators write -1 where there is no ground truth."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


# ---------------------------------------------------------------- self-supervised tasks
@torch.no_grad()
def ssl_metrics(model, task, data, batch_size, workers, device):
    """How well a task is solved on every image of a dataset, each always corrupted in one way.
    Returns {"ssl_loss": mean over all counted patches, "ssl_acc": share of them that is right,
    None for pixels; "ssl_baseline", "ssl_chance": what is reached without looking, see task.guess,
    by the first images, about MAX_BASELINE_VALUES values} and the panels of the first batch.
    Raises DataError if no patch counts."""
    model.eval()
    sums, panels = torch.zeros(3, dtype=torch.float64), None  # errors, right ones, patches
    taken = []
    for images, padding, targets in eval_loader(data, batch_size, workers, "evaluating the task"):
        corruption = task.sample_corruption(padding, [target["seed"] for target in targets]).to(
            device
        )
        images, padding = images.to(device), padding.to(device)
        memory = task.encode(model, images, padding, corruption)
        prediction, target = task.predict_and_target(memory, images, corruption)
        error, right = task.patch_losses(prediction, target)
        counted = task.counted_patches(corruption)
        hits = counted if right is None else right & counted
        sums += torch.stack([(error * counted).sum(), hits.sum(), counted.sum()]).cpu().double()
        if sum(map(torch.numel, taken)) < MAX_BASELINE_VALUES:
            taken.append(task.counted_targets(target, counted).cpu())
        if not panels:
            panels = plots.ssl_panels(task, images, prediction, target, corruption)
            for panel in panels:
                panel.images = unnormalize(panel.images).masked_fill(padding[:, None], 1)
    error, hits, patches = sum(distributed.all_gather(sums)).tolist()
    if not patches:
        message = "no patch was corrupted; take larger images or smaller patches"
        raise DataError(f"{data.name}: {message}")
    accuracy = hits / patches if isinstance(task, ssl_tasks.ClassTask) else None
    baseline = {"ssl_baseline": None, "ssl_chance": None}
    targets = torch.cat(taken)
    if len(targets):
        baseline = task.baseline(targets)
    found = {"ssl_loss": error / patches, "ssl_acc": accuracy}
    return {**found, **baseline}, panels


# ---------------------------------------------------------------- text
def format_metric(value):
    return "n/a" if value is None else f"{value:.3f}"


def ssl_text(metrics):
    """How well the task is solved, and how well without looking."""
    loss, accuracy, guess, chance = map(format_metric, (metrics[name] for name in SSL))
    if metrics["ssl_acc"] is None:
        return f"loss {loss} (mean patch {guess})"
    return f"loss {loss}, accuracy {accuracy} (most frequent {guess}, chance {chance})"


def summary_line(metrics):
    names = "AP", "AP50", "AP75", "small", "medium", "large", "AR"
    return "  ".join(f"{name} {format_metric(metrics[key])}" for name, key in zip(names, METRICS))


def metrics_table(metrics):
    """The metrics as text: one line of totals, then a line for each class."""
    about = f"{metrics['images']} images, {metrics['evaluator']}; n/a: no ground truth"
    lines = [summary_line(metrics), about, "\n  id  class                  boxes     AP   AP50"]
    for row in metrics["per_class"]:
        name = f"{row['id']:>4}  {row['name']:20} {row['boxes']:7,}"
        lines.append(f"{name} {format_metric(row['ap']):>6} {format_metric(row['ap50']):>6}")
    return "\n".join(lines)


def epoch_text(line, epochs):
    """An epoch in one line of text."""
    text = f"epoch {line['epoch']:>3}/{epochs}  loss {line['train_loss']:.3f}"
    if "ap" in line:
        text += f" (held out {line['val_loss']:.3f})"
        text += "".join(
            f"  {key.upper()} {format_metric(line[key])}" for key in ("ap", "ap50", "ap75")
        )
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
    start, first = time.perf_counter(), distributed.rank() == 0
    metrics, results = {}, None
    if args.setting != "pretrain":
        losses = []
        what = args.batch_size, args.workers, args.device, top
        results = detect_dataset(model, data, *what, losses if data.annotations else None)
        losses = np.array(sum(distributed.all_gather(losses), [])).reshape(-1, 2)  # images, loss
        if first and data.annotations:
            metrics = {
                **coco_metrics(data, results),
                "collapsed": predictions_collapsed(data, results),
            }
            metrics["val_loss"] = float(np.average(losses[:, 1], weights=losses[:, 0]))
            metrics["score"] = metrics["ap"] or 0.0
            if out:
                plots.draw_detections(out / "detections.png", data, results)
    if task:
        found, panels = ssl_metrics(model, task, data, args.batch_size, args.workers, args.device)
        metrics = {"score": -found["ssl_loss"], **metrics, **found}
        if first and out:
            plots.draw_ssl(out / "ssl.png", panels, task.patch, ssl_text(found))
    metrics.setdefault("score", 0.0)  # without a box to compare with
    metrics["eval_seconds"] = round(time.perf_counter() - start, 2)
    return distributed.all_gather(metrics)[0], results


# ---------------------------------------------------------------- opening a run


def checkpoint_file(run):
    """The checkpoint of a run folder, its best; a file stands for itself. Raises ValueError."""
    for file in (Path(run, "best.pt"), Path(run, "last.pt")):
        if file.is_file():
            return file
    if Path(run).is_dir():
        raise ValueError(f"{run}: has no best.pt and no last.pt; is it a run folder of train.py?")
    return run


def load_run(run, device):
    """A trained detector: (model, its task or None, its checkpoint). Raises ValueError.
    The checkpoint is a dict with "args", "categories", "window" … and "path"."""
    path, task = Path(checkpoint_file(run)), None
    state = load_checkpoint(path)
    checkpoint.require_train_checkpoint(state, path)
    try:
        model = detr.build_detector(**state["detector"])
        if state["task"]:
            task = ssl_tasks.build_task(**state["task"]).to(device)
        checkpoint.load(model, task, state)
    except (TypeError, AttributeError, RuntimeError, KeyError) as error:
        message = f"{path}: its weights do not fit its flags; was it written by another version?"
        raise ValueError(f"{message} ({str(error).splitlines()[0]})") from None
    reference = state["args"].get("attn") == "torch"  # a kernel of there may be missing here
    deformable_attn.set_attention_backend(model, device, "torch" if reference else "auto")
    model.to(device, memory_format=torch.channels_last)  # convolutions are faster so
    return model, task, {**state, "path": path}


def require_detector(state):
    """Raises ValueError if a checkpoint, as `load_run` gives it, is of a pretraining."""
    if state["args"]["setting"] == "pretrain":
        raise ValueError(f"{state['path']}: is of a pretraining, it detects nothing")


def open_run(args):
    """What an evaluation needs: (model, its task or None, its checkpoint, images); args get the
    defaults that depend on the run. Raises ValueError."""
    model, task, state = load_run(args.run, args.device)
    flags = argparse.Namespace(**state["args"])
    if args.export:
        require_detector(state)
    own = "train" if flags.overfit else "val"
    args.split, args.setting = args.split or own, flags.setting
    args.batch_size = args.batch_size or flags.batch_size
    if args.data or args.limit_val:  # other images than the run's
        flags.data = args.data or flags.data
        setattr(flags, f"limit_{args.split}", args.limit_val)
        flags.overfit = None
    elif args.split == own:
        args.out = args.out or state["path"].parent
    if args.split == "test" and not flags.data:
        raise ValueError("--split test is of a dataset on disk; name it with --data")
    data = isaid.load_split(args.split, flags, train=False)
    if not (data.annotations or args.export or task):
        raise DataError(f"{data.name}: has nothing to compare with; add --export FILE")
    if args.split == "test" and not data.categories:  # test images need not tell the classes
        data.categories = state["categories"]
    if flags.setting != "pretrain" and data.categories != state["categories"]:
        theirs, ours = coco.class_names(data.categories), coco.class_names(state["categories"])
        raise DataError(f"{data.name}: its classes {theirs} are not the model's {ours}")
    return model, task, state, data


def parse(argv):
    parser, count, size = Parser(description=__doc__), number(int), number(int, most=10_000)
    add = parser.add_argument
    add("run", help="run folder of train.py, or a checkpoint file")
    add("--data", help="a dataset with other images than the run's")
    add("--split", choices=("train", "val", "test"), help="default: what the run held out, val")
    add("--limit_val", type=count, help="only the first images")
    add("--batch_size", type=count, help="images at a time; default: the run's")
    add("--workers", type=number(int, True, most=256), default=0, help="loader processes")
    add("--device", type=usable_device, default="auto", help="cpu, cuda, mps …")
    add("--max_dets", type=size, default=100, help="detections an image; iSAID's devkit: 1000")
    add(
        "--areas", choices=tuple(SIZE_RANGES), default="coco", help="what small, medium, large mean"
    )
    add("--out", type=Path, help="for metrics and pictures; default: the run, of its own images")
    add("--export", type=Path, help="file for what is found, as COCO results")
    args = parser.parse_args(argv)
    if args.split == "test" and not args.export:
        parser.error("--split test has no ground truth; add --export FILE for what is found")
    return args


@command
def main(argv=None):
    args = parse(argv)
    distributed.init(args.device)
    model, task, state, data = distributed.run_on_all_ranks(open_run, args)
    print(f"{state['path']} on {data.name}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    for path in filter(None, (args.export, args.out and args.out / "metrics.json")):
        distributed.run_on_rank0(check_writable, path)
    metrics, results = evaluate(model, task, data, args, args.out, max(100, args.max_dets))
    if distributed.rank():
        return
    text = [f"{state['task']['name']}: {ssl_text(metrics)}"] if task else []
    if args.export:
        write_text(args.export, json.dumps(results))
        text.append(f"{len(results):,} detections written to {args.export}")
    if "per_class" in metrics:
        text.append(metrics_table(metrics))
        how = {"max_dets": args.max_dets, "areas": args.areas}
        if how != {"max_dets": 100, "areas": "coco"}:
            other = metrics["other"] = {**how, **coco_metrics(data, results, **how)}
            text.append(
                f"\n{args.max_dets} detections, {args.areas}'s areas: {summary_line(other)}"
            )
    if args.out:
        metrics = {"checkpoint": str(state["path"]), "data": data.name, **metrics}
        write_text(args.out / "metrics.json", json.dumps(metrics, indent=1))
        text.append(f"\nwritten: {args.out}/metrics.json and pictures")
    print("\n".join(text))  # last: what it is piped to may have closed


if __name__ == "__main__":
    main()
