"""Evaluate a trained detector or self-supervised task: COCO metrics, result files, figures.

    python eval.py RUN [--data DIR] [--split val] [--limit_val N] [--out DIR] [--export FILE]

RUN is a run folder of train.py (its best.pt, else its last.pt), a checkpoint file, or the name of a
COCO model (see util/pretrained.py) for a dataset with the classes of COCO. Metrics on the run's own
held-out images are written to metrics.json in the run folder; metrics on other images only to the
folder given by --out. For images of any size see tools/predict.py.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import sys
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
from util import checkpoint, cli, coco, distributed, plots
from util.files import DataError, can_write, check_writable, write_text
from util.images import unnormalize
from util.pretrained import MODELS, coco_categories, is_model_name, keep_coco_classes
from util.weights import PARTS, load_checkpoint, load_parts, read_state_dict

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
METRIC_TITLES = ("AP", "AP50", "AP75", "small", "medium", "large", "AR")
SSL_METRICS = ("ssl_loss", "ssl_acc", "ssl_baseline", "ssl_chance")
LOGGED = METRICS + ("val_loss",) + SSL_METRICS + ("collapsed", "eval_seconds")  # in log.jsonl

# Square roots of areas in pixels: an object is small from the first to the second number, medium
# to the third, large to the last. "isaid" are the ranges of iSAID's devkit.
SIZE_RANGES = {"coco": (0, 32, 96, 1e5), "isaid": (10, 144, 512, 1e5)}
RUN_HELP = f"run folder of train.py, its checkpoint file, or a COCO model: {', '.join(MODELS)}"
# of the checkpoints in a folder: the first two are train.py's, the others those of transformers
CHECKPOINT_NAMES = ("best.pt", "last.pt", "model.safetensors", "pytorch_model.bin")
MAX_BASELINE_VALUES = 2**24  # pixels or classes of the targets that the baseline is computed from


# ---------------------------------------------------------------- detection
def eval_loader(data, batch_size, workers, text):
    """Return the batches of a dataset in order, under a progress bar with this text.

    Of several processes each gets a share of the images, and each image is in one of them.
    """
    own_images = range(distributed.rank(), len(data), distributed.world_size())
    subset = torch.utils.data.Subset(data, own_images)
    loader = isaid.data_loader(subset, workers, batch_size=batch_size)
    disable = None if distributed.rank() == 0 else True  # None: shown unless piped to a file
    return tqdm(loader, text, leave=False, disable=disable)


@torch.no_grad()
def detect(model, loader, device, max_dets=100, name="images"):
    """Yield (target, detection) of every image.

    loader:   batches (images, padding, targets), see isaid.collate
    max_dets: largest number of detections per image
    name:     of the images, for the error
    A detection is what `postprocess` of the model returns for an image, on the CPU.
    Raises FloatingPointError if the model's outputs contain NaN or Inf.
    """
    model.eval()
    for images, padding, targets in loader:
        outputs = model(images.to(device), padding.to(device))
        yield from zip(targets, postprocess(model, outputs, targets, max_dets, name))


def postprocess(model, outputs, targets, max_dets, name):
    """Return the detections of a batch from the last decoder layer, computed on the CPU."""
    last_layer = {key: outputs[key][-1:].cpu() for key in ("logits", "boxes")}
    for output in last_layer.values():
        if not output.isfinite().all():
            raise FloatingPointError(
                f"{name}: model outputs contain NaN or Inf: training diverged, or the checkpoint "
                f"is corrupted"
            )
    sizes = [target["size"] for target in targets]
    return model.postprocess(last_layer, sizes, max_dets)


@torch.no_grad()
def detect_dataset(model, data, args, max_dets=100):
    """Run the detector on a dataset. Returns (COCO results of all images, mean loss or None).

    The loss is that of detection in training, without that of a task; it is None if the dataset has
    no annotations.
    args: batch_size, workers, device. Of several processes each returns what all have found.
    """
    model.eval()
    results = []
    losses = []  # of batches
    batch_sizes = []
    for images, padding, targets in eval_loader(data, args.batch_size, args.workers, "evaluating"):
        outputs = model(images.to(args.device), padding.to(args.device))
        detections = postprocess(model, outputs, targets, max_dets, data.name)
        for target, detection in zip(targets, detections):
            results += coco_results(detection, target["image_id"], data.categories)
        if data.annotations:
            losses.append(weighted_loss(model.criterion, outputs, targets))
            batch_sizes.append(len(targets))

    results = gather_items(results)
    losses = gather_items(losses)
    if not losses:
        return results, None
    return results, float(np.average(losses, weights=gather_items(batch_sizes)))


def weighted_loss(criterion, outputs, targets):
    """Return the weighted sum of all losses of detection in all decoder layers."""
    loss = 0.0
    for name, values in criterion(outputs, targets).items():
        loss += criterion.weights[name] * values.sum().item()
    return loss


def gather_items(items):
    """Return the items of the lists of all processes."""
    gathered = []
    for part in distributed.all_gather(items):
        gathered += part
    return gathered


def coco_results(detection, image_id, categories, digits=3):
    """Return the detections of an image as a list of COCO results.

    detection:  {"boxes" (n, 4) xyxy in pixels, "labels" (n,), "scores" (n,)}
    categories: COCO categories, in the order of the labels
    digits:     decimals of the boxes
    Each result is {"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}.
    """
    boxes = box_convert(torch.as_tensor(detection["boxes"]), "xyxy", "xywh").tolist()
    labels = detection["labels"].tolist()
    scores = detection["scores"].tolist()
    results = []
    for box, label, score in zip(boxes, labels, scores):
        result = {
            "image_id": image_id,
            "category_id": categories[label]["id"],
            "bbox": [round(value, digits) for value in box],
            "score": round(score, 6),
        }
        results.append(result)
    return results


def predictions_collapsed(data, results):
    """Return True if the model predicts the same detections for every image."""
    if len(data) < 2 or not results:
        return False
    sizes = {image["id"]: (image["width"], image["height"]) for image in data.images}
    detections = {image_id: [] for image_id in sizes}
    for result in results:
        W, H = sizes[result["image_id"]]
        x, y, w, h = result["bbox"]
        box = (round(x / W, 2), round(y / H, 2), round(w / W, 2), round(h / H, 2))
        detections[result["image_id"]].append((result["category_id"], *box))
    different = {tuple(sorted(boxes)) for boxes in detections.values()}
    return len(different) == 1


# ---------------------------------------------------------------- COCO metrics
def coco_metrics(data, results, evaluator=None, max_dets=100, size_ranges="coco"):
    """Compute the box metrics of COCO results; None stands where there is no ground truth.

    evaluator:   "pycocotools" or "faster-coco-eval"; None: the latter if it can be imported
    max_dets:    detections per image that count
    size_ranges: key of SIZE_RANGES, the meaning of small, medium and large
    Returns {each of METRICS, "per_class": [{"id", "name", "boxes", "ap", "ap50"}], "images",
    "evaluator"}.
    Raises DataError if the results are not of this dataset.
    """
    check_ids(data.name, results, "image_id", data.images)
    check_ids(data.name, results, "category_id", data.categories)
    if evaluator is None:
        evaluator = default_evaluator()
    sides = SIZE_RANGES[size_ranges]
    arrays = run_evaluator(evaluator, data, results, max_dets, sides)

    # (IoU thresholds 0.5 … 0.95, recall thresholds, classes, sizes: all, small …, max_dets)
    all_sizes = arrays["precision"]
    precision = all_sizes[:, :, :, 0, -1]
    metrics = {
        "ap": mean_of_valid(precision),
        "ap50": mean_of_valid(precision[0]),
        "ap75": mean_of_valid(precision[5]),
        "ap_small": mean_of_valid(all_sizes[:, :, :, 1, -1]),
        "ap_medium": mean_of_valid(all_sizes[:, :, :, 2, -1]),
        "ap_large": mean_of_valid(all_sizes[:, :, :, 3, -1]),
        "ar": mean_of_valid(arrays["recall"][:, :, 0, -1]),
        "per_class": [],
        "images": len(data),
        "evaluator": evaluator,
    }
    boxes = collections.Counter(a["category_id"] for a in data.annotations if not a["iscrowd"])
    for k, category in enumerate(data.categories):
        row = {
            **category,
            "boxes": boxes[category["id"]],
            "ap": mean_of_valid(precision[:, :, k]),
            "ap50": mean_of_valid(precision[0, :, k]),
        }
        metrics["per_class"].append(row)
    return metrics


@functools.cache  # so that a warning is printed once
def default_evaluator():
    """Return "faster-coco-eval" if it can be imported, else "pycocotools"."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        return "pycocotools"
    try:
        from faster_coco_eval import COCO, COCOeval_faster  # noqa: F401
    except Exception as error:  # of the package, or of a library that it needs
        text = "warning: faster-coco-eval cannot be imported"
        print(f"{text} ({cli.one_line(error)}); using pycocotools", file=sys.stderr)
        return "pycocotools"
    return "faster-coco-eval"


def check_ids(name, results, key, entries):
    """Raise DataError if a result has an image or category id that no entry of the dataset has."""
    unknown = {result[key] for result in results} - {entry["id"] for entry in entries}
    if unknown:
        raise DataError(
            f"{name}: results contain {key} {min(unknown)}, which is not in the dataset; "
            f"were they produced on a different dataset?"
        )


def run_evaluator(evaluator, data, results, max_dets, sides):
    """Return the arrays {"precision", "recall"} of pycocotools or of its faster replacement.

    sides: square roots of the areas between which objects are small, medium and large
    """
    if evaluator == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    # The evaluators read ids beyond 64 bits, or of both signs, wrongly or not at all. Numbers take
    # their place, which sort the images, and so detections of equal score, in the same way.
    image_ids = sorted(image["id"] for image in data.images)
    image_numbers = {image_id: i for i, image_id in enumerate(image_ids)}
    class_numbers = {category["id"]: i for i, category in enumerate(data.categories)}
    ground_truth = with_numbers(data.annotations, image_numbers, class_numbers)
    detections = with_numbers(results, image_numbers, class_numbers)
    for i, detection in enumerate(detections, start=1):
        _, _, w, h = detection["bbox"]
        detection["id"] = i
        detection["area"] = w * h
    areas = [[0, 1e10]]
    for smallest, largest in zip(sides[:-1], sides[1:]):
        areas.append([smallest**2, largest**2])

    with contextlib.redirect_stdout(io.StringIO()):  # both evaluators print their progress
        truth_index = coco_index(COCO, image_numbers, class_numbers, ground_truth)
        detection_index = coco_index(COCO, image_numbers, class_numbers, detections)
        coco_eval = COCOeval(truth_index, detection_index, "bbox")
        coco_eval.params.maxDets = [max_dets]
        coco_eval.params.areaRng = areas
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval.eval


def with_numbers(annotations, image_numbers, class_numbers):
    """Return copies of annotations or results with numbers from 0 in place of ids, {id: number}."""
    numbered = []
    for annotation in annotations:
        image_id = image_numbers[annotation["image_id"]]
        category_id = class_numbers[annotation["category_id"]]
        numbered.append({**annotation, "image_id": image_id, "category_id": category_id})
    return numbered


def coco_index(COCO, image_numbers, class_numbers, annotations):
    """Return an evaluator's index of annotations; see with_numbers."""
    index = COCO()
    index.dataset = {
        "images": [{"id": number} for number in image_numbers.values()],
        "categories": [{"id": number} for number in class_numbers.values()],
        "annotations": annotations,
    }
    index.createIndex()
    return index


def mean_of_valid(values):
    """Return the mean of an array without its -1, which marks missing ground truth, or None."""
    values = values[values > -1]
    if values.size == 0:
        return None
    return float(values.mean())


# ---------------------------------------------------------------- self-supervised tasks
@torch.no_grad()
def ssl_metrics(model, task, data, args):
    """Evaluate a self-supervised task on a dataset, each image with its own fixed corruption.

    args: batch_size, workers, device
    Returns (metrics, panels of the first batch for plots.draw_ssl); the metrics are
        ssl_loss:     mean over all counted patches
        ssl_acc:      share of them that is predicted correctly; None if the task predicts pixels
        ssl_baseline: score of a constant prediction, the mean patch or the most frequent class,
                      computed from the first images
        ssl_chance:   accuracy of a random guess; None for pixels
    Raises DataError if no patch is counted.
    """
    model.eval()
    loss_sum = 0.0
    num_correct = 0
    num_patches = 0
    baseline_targets = []
    num_baseline_values = 0
    panels = None
    loader = eval_loader(data, args.batch_size, args.workers, "evaluating the task")
    for images, padding, image_targets in loader:
        seeds = [image_target["seed"] for image_target in image_targets]
        corruption = task.sample_corruption(padding, seeds).to(args.device)
        images = images.to(args.device)
        padding = padding.to(args.device)
        memory = task.encode(model, images, padding, corruption)
        prediction, target = task.predict_and_target(memory, images, corruption)
        losses, correct = task.patch_losses(prediction, target)  # (B, P)
        counted = task.counted_patches(corruption)  # (B, P)

        loss_sum += (losses * counted).sum().item()
        num_patches += counted.sum().item()
        if correct is not None:
            num_correct += (correct & counted).sum().item()
        if num_baseline_values < MAX_BASELINE_VALUES:
            baseline_targets.append(task.counted_targets(target, counted).cpu())
            num_baseline_values += baseline_targets[-1].numel()
        if panels is None:
            panels = plots.ssl_panels(task, images, prediction, target, corruption)
            for panel in panels:
                panel.images = unnormalize(panel.images).masked_fill(padding[:, None], 1)  # white

    num_patches = sum(distributed.all_gather(num_patches))
    if num_patches == 0:
        message = "no patch was corrupted; use larger images or smaller patches"
        raise DataError(f"{data.name}: {message}")
    metrics = {
        "ssl_loss": sum(distributed.all_gather(loss_sum)) / num_patches,
        "ssl_acc": None,
        "ssl_baseline": None,
        "ssl_chance": None,
    }
    num_correct = sum(distributed.all_gather(num_correct))
    if isinstance(task, ssl_tasks.ClassTask):
        metrics["ssl_acc"] = num_correct / num_patches
    if num_baseline_values > 0:  # the share of this process may have no counted patch
        metrics.update(task.baseline(torch.cat(baseline_targets)))
    return metrics, panels


# ---------------------------------------------------------------- both
def evaluate(model, task, data, args, out=None, max_dets=100):
    """Evaluate a model on a dataset, and draw figures in the folder `out`.

    task:     a ssl_tasks.Task or None
    args:     setting, batch_size, workers, device
    max_dets: largest number of detections per image in the results
    Returns (metrics, COCO results or None). metrics["score"] is what the best checkpoint is chosen
    by: AP, or in a pretraining the negative loss.
    """
    start = time.perf_counter()
    is_first = distributed.rank() == 0
    metrics = {"score": 0.0}
    results = None
    if args.setting != "pretrain":
        results, val_loss = detect_dataset(model, data, args, max_dets)
        if is_first and data.annotations:
            metrics.update(coco_metrics(data, results))
            metrics["collapsed"] = predictions_collapsed(data, results)
            metrics["val_loss"] = val_loss
            if metrics["ap"] is not None:
                metrics["score"] = metrics["ap"]
            if out:
                plots.draw_detections(out / "detections.png", data, results)
    if task:
        task_metrics, panels = ssl_metrics(model, task, data, args)
        metrics.update(task_metrics)
        if "ap" not in metrics:
            metrics["score"] = -metrics["ssl_loss"]
        if is_first and out:
            plots.draw_ssl(out / "ssl.png", panels, task.patch, ssl_text(metrics))
    metrics["eval_seconds"] = round(time.perf_counter() - start, 2)
    return distributed.all_gather(metrics)[0], results


# ---------------------------------------------------------------- text
def format_metric(value):
    """Return a metric with three decimals, or n/a for None."""
    if value is None:
        return "n/a"
    return f"{value:.3f}"


def summary_line(metrics):
    """Return the metrics over all classes in one line."""
    cells = []
    for title, name in zip(METRIC_TITLES, METRICS):
        cells.append(f"{title} {format_metric(metrics[name])}")
    return "  ".join(cells)


def metrics_table(metrics):
    """Return the metrics as text: one line over all classes, then a line per class."""
    lines = [
        summary_line(metrics),
        f"{metrics['images']} images, {metrics['evaluator']}; n/a: no ground truth",
        "",
        "  id  class                  boxes     AP   AP50",
    ]
    for row in metrics["per_class"]:
        ap = format_metric(row["ap"])
        ap50 = format_metric(row["ap50"])
        lines.append(f"{row['id']:>4}  {row['name']:20} {row['boxes']:7,} {ap:>6} {ap50:>6}")
    return "\n".join(lines)


def ssl_text(metrics):
    """Return the metrics of a self-supervised task in one line."""
    loss = format_metric(metrics["ssl_loss"])
    baseline = format_metric(metrics["ssl_baseline"])
    if metrics["ssl_acc"] is None:
        return f"loss {loss} (baseline {baseline})"
    accuracy = format_metric(metrics["ssl_acc"])
    chance = format_metric(metrics["ssl_chance"])
    return f"loss {loss}, accuracy {accuracy} (baseline {baseline}, chance {chance})"


def epoch_text(line, epochs):
    """Return a line of log.jsonl, {name: value}, as a line of text."""
    text = f"epoch {line['epoch']:>3}/{epochs}  loss {line['train_loss']:.3f}"
    if "ap" in line:
        if "train_loss_ssl" in line:  # which is not part of the held-out loss
            text += f" (held out, detection alone {line['val_loss']:.3f})"
        else:
            text += f" (held out {line['val_loss']:.3f})"
        for name in ("ap", "ap50", "ap75"):
            text += f"  {name.upper()} {format_metric(line[name])}"
    if "ssl_loss" in line:
        text += f"  held-out task: {ssl_text(line)}"
    if line.get("collapsed"):
        text += "  (warning: identical detections in every image)"
    if "skipped_steps" in line:
        text += f"  ({line['skipped_steps']} steps skipped: gradient too large for fp16)"
    text += f"  {line['seconds']:.0f} s"
    return f"{text}, {line['images_per_second']:.1f} images/s, {line['data_wait']:.0%} waiting"


# ---------------------------------------------------------------- opening a run
@dataclasses.dataclass
class TrainedRun:
    """The trained model of a run, and what its checkpoint contains about it."""

    model: torch.nn.Module
    task: torch.nn.Module | None
    args: argparse.Namespace  # flags of train.py
    categories: list  # [{"id", "name"}] in the order of the labels
    window: int | None  # pixels per side of the images trained on; None: those of COCO
    path: Path  # of the checkpoint
    folder: Path  # where figures and metrics are written by default


def checkpoint_file(run):
    """Return the checkpoint of a folder, the first of CHECKPOINT_NAMES that exists.

    A file, a URL or the name of a published model is returned as it is. Raises ValueError if the
    folder has no checkpoint.
    """
    for name in CHECKPOINT_NAMES:
        if Path(run, name).is_file():
            return Path(run, name)
    if Path(run).is_dir():
        raise ValueError(f"{run}: no best.pt or last.pt found; is this a train.py run folder?")
    return run


def load_run(run, device):
    """Return the TrainedRun of a run folder, a checkpoint file or a published model.

    Raises ValueError.
    """
    if is_model_name(run):
        return load_published_model(run, device)
    path = Path(checkpoint_file(run))
    state = load_checkpoint(path)
    checkpoint.require_train_checkpoint(state, path)
    task = None
    try:
        args = argparse.Namespace(**state["args"])
        model = detr.build_detector(**state["detector"])
        if state["task"]:
            require_tokenizer(state["task"])
            task = ssl_tasks.build_task(**state["task"]).to(device)
        checkpoint.load(model, task, state)
        attn_backend = "auto"  # the kernel that the run was trained with may not exist here
        if args.attn_backend == "torch":
            attn_backend = "torch"
    except (TypeError, AttributeError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path}: weights do not match the stored config; "
            f"was it written by a different version? ({str(error).splitlines()[0]})"
        ) from None
    deformable_attn.set_attention_backend(model, device, attn_backend)
    model.to(device, memory_format=torch.channels_last)  # convolutions are faster in this layout
    return TrainedRun(
        model, task, args, state["categories"], state["window"], path, folder=path.parent
    )


def require_tokenizer(task_config):
    """Raise ValueError if the file of a run's visual tokens is not where the run had it."""
    path = task_config.get("tokenizer_weights")
    if path and not Path(path).exists():
        raise ValueError(f"{path}: DALL-E's encoder of this run was not found; put it back there")


def load_published_model(name, device):
    """Return a detector trained on COCO, see util/pretrained.py, as a TrainedRun.

    Raises ValueError.
    """
    config = MODELS[name].config
    categories = coco_categories()
    model = detr.build_detector(num_classes=len(categories), **config)
    state = keep_coco_classes(read_state_dict(name), config)
    not_loaded = load_parts(model, state, name, PARTS)
    if not_loaded:
        raise ValueError(f"{name}: its file lacks {not_loaded[0]}")
    deformable_attn.set_attention_backend(model, device, "auto")
    model.to(device, memory_format=torch.channels_last)
    args = argparse.Namespace(  # the flags that an evaluation needs
        setting="detect",
        data=None,
        image_size=None,
        augment="none",
        batch_size=4,
        overfit=None,
        limit_train=None,
        limit_val=None,
        seed=0,
    )
    folder = Path("runs", name)
    return TrainedRun(model, None, args, categories, window=None, path=Path(name), folder=folder)


def require_detector(run):
    """Raise ValueError if a TrainedRun is a self-supervised pretraining."""
    if run.args.setting == "pretrain":
        raise ValueError(
            f"{run.path}: is a self-supervised pretraining checkpoint without a trained detection "
            f"head; fine-tune it with train.py --init"
        )


# ---------------------------------------------------------------- the command
def parse(argv):
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("run", help=RUN_HELP)
    add("--data", help="dataset folder; default: the run's")
    add("--split", choices=("train", "val", "test"), help="default: val, the held-out images")
    add("--limit_val", type=cli.POSITIVE_INT, help="use only the first N images")
    add("--batch_size", type=cli.POSITIVE_INT, help="images per batch; default: the run's")
    add("--workers", type=cli.NUM_WORKERS, default=0, help="data loader processes")
    add("--device", type=cli.parse_device, default="auto", help="device: cpu, cuda, mps …")
    max_dets_help = "detections per image that count; iSAID's devkit: 1000"
    add("--max_dets", type=cli.int_range(1, 10_000), default=100, help=max_dets_help)
    ranges_help = "which objects are called small, medium and large"
    add("--size_ranges", "--areas", choices=SIZE_RANGES, default="coco", help=ranges_help)
    out_help = "folder for metrics.json and figures; default: RUN, if its own images are evaluated"
    add("--out", type=Path, help=out_help)
    add("--export", type=Path, help="file for the detections, in COCO's result format")
    return parser.parse_args(argv)


def evaluation_flags(run, args, split):
    """Return the flags of a run, with those that this command changes."""
    flags = argparse.Namespace(**vars(run.args))
    flags.workers = args.workers
    flags.device = args.device
    if args.batch_size is not None:
        flags.batch_size = args.batch_size
    if args.data is not None:
        flags.data = args.data
    if args.data is not None or args.limit_val is not None:  # not with the limits of the run
        flags.overfit = None
        setattr(flags, f"limit_{split}", args.limit_val)
    return flags


def load_images(run, flags, split, export):
    """Return the dataset to evaluate on. Raises ValueError if it does not suit the run."""
    if export:
        require_detector(run)
    if split == "test" and not flags.data:
        raise ValueError("--split test requires --data (synthetic scenes have no test split)")
    if run.window is None and not flags.data:
        raise ValueError(f"{run.path}: requires --data DIR, a dataset with the classes of COCO")
    if flags.data and flags.data == run.args.data and not Path(flags.data).exists():
        message = "the folder of the run's data was not found; if it has moved, name it with --data"
        raise DataError(f"{flags.data}: {message}")
    data = isaid.load_split(split, flags, train=False)
    if not data.annotations and not run.task and not export:
        raise DataError(
            f"{data.name}: no ground truth to evaluate against; "
            f"add --export FILE to save the detections"
        )
    if split == "test" and not data.categories:  # a file of test images may lack them
        data.categories = run.categories
    if run.args.setting != "pretrain" and data.categories != run.categories:
        found = coco.class_names(data.categories)
        expected = coco.class_names(run.categories)
        raise DataError(
            f"{data.name}: dataset classes ({found}) do not match the model's ({expected})"
        )
    return data


@cli.cli_main
def main(argv=None):
    args = parse(argv)
    distributed.init(args.device)
    run = distributed.run_on_all_ranks(load_run, args.run, args.device)
    own_split = "train" if run.args.overfit else "val"
    split = own_split if args.split is None else args.split
    flags = evaluation_flags(run, args, split)
    data = distributed.run_on_all_ranks(load_images, run, flags, split, args.export)
    print(f"{run.path} on {data.name}")

    out = args.out
    is_own_data = split == own_split and args.data is None and args.limit_val is None
    if out:
        out.mkdir(parents=True, exist_ok=True)
        distributed.run_on_rank0(check_writable, out / "metrics.json")
    elif is_own_data and distributed.run_on_rank0(can_write, run.folder / "metrics.json"):
        out = run.folder
    if args.export:
        distributed.run_on_rank0(check_writable, args.export)

    max_dets = max(100, args.max_dets)  # 100: COCO's metrics are computed in any case
    metrics, results = evaluate(run.model, run.task, data, flags, out, max_dets)
    if distributed.rank() == 0:
        print(write_results(metrics, results, run, data, args, out))


def write_results(metrics, results, run, data, args, out):
    """Write metrics and detections where the flags say so; return them as text.

    The text is printed after all files are written: its reader may have closed the pipe.
    """
    text = []
    if run.task:
        text.append(f"{run.args.ssl_task}: {ssl_text(metrics)}")
    if args.export:
        write_text(args.export, json.dumps(results))
        text.append(f"{len(results):,} detections written to {args.export}")
    if "per_class" in metrics:
        text.append(metrics_table(metrics))
        options = {"max_dets": args.max_dets, "size_ranges": args.size_ranges}
        if options != {"max_dets": 100, "size_ranges": "coco"}:
            other = coco_metrics(data, results, **options)
            metrics["other"] = {**options, **other}
            title = f"{args.max_dets} detections per image, size ranges of {args.size_ranges}"
            text.append(f"\n{title}: {summary_line(other)}")
    if out:
        metrics = {"checkpoint": str(run.path), "data": data.name, **metrics}
        write_text(out / "metrics.json", json.dumps(metrics, indent=1))
        text.append(f"\nwritten: {out}/metrics.json and figures")
    return "\n".join(text)


if __name__ == "__main__":
    main()
