"""Train DETR or Deformable DETR: to detect, on a self-supervised task, or on both at once.

    python train.py                              a demonstration: synthetic scenes, CPU, minutes
    python train.py @recipes/detr.txt --data DIR the full-size model on a dataset
    python train.py --setting pretrain --ssl_task mim-continuous --out runs/mim
    python train.py --init runs/mim              detection, starting from a pretraining
    python train.py --setting multitask --ssl_task reconstruct --ssl_weight 0.1

A run is a folder with config.json, log.jsonl (one line per epoch), last.pt, best.pt and pictures.
The defaults are small sizes for the demonstration; files in recipes/ have other sets of flags.
"""

import os

# Idle OpenMP threads spin before they sleep. The default is so long that two runs on the same cores
# starve each other. OpenMP reads this variable when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import contextlib
import math
import shlex
import signal
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import deformable_attn
import detr
import isaid
import ssl_tasks
from eval import LOGGED, checkpoint_file, epoch_text, evaluate, metrics_table
from util import checkpoint, cli, dataset_check, distributed, plots
from util.pretrained import MODELS, fetch_imagenet_weights
from util.synthetic import MAX_SCENES
from util.weights import PARTS, init_from_checkpoint, part_of

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of --amp


# ---------------------------------------------------------------- losses
def compute_losses(model, task, images, padding, targets, args):
    """Compute the losses of a batch. Here detectors and self-supervised tasks meet.

    detect:    the decoder reads the memory of the clean images
    pretrain:  the task reads the memory of corrupted images or feature maps; no decoder runs
    multitask: both; the decoder reads the clean memory, the task the corrupted one

    task:    a ssl_tasks.Task, or None in the setting "detect"
    images:  (B, 3, H, W) normalized
    padding: (B, H, W) bool, True = padding
    targets: one dict per image, see isaid.DetectionDataset
    Returns {"loss_…": (n,)}, unweighted: of detection one value per decoder layer, of the task and
    of the two-stage proposals a single one.
    """
    detects = args.setting in ("detect", "multitask")
    if task:
        seeds = [target["seed"] for target in targets]
        corruption = task.sample_corruption(padding, seeds).to(images.device)

    amp_dtype = AMP_DTYPES.get(args.amp)
    with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
        if detects:
            levels = model.features(images, padding)
            clean_memory = model.encode(levels)
        if args.setting == "pretrain":
            task_memory = task.encode(model, images, padding, corruption)
        if args.setting == "multitask" and task.corrupts:
            task_memory = task.encode(model, images, padding, corruption, levels)
        if args.setting == "multitask" and not task.corrupts:  # reconstruction
            task_memory = clean_memory

    losses = {}
    if task:
        num_patches = distributed.mean_over_ranks(task.counted_patches(corruption).sum())
        memory = detr.to_float32(task_memory)
        loss_ssl = task.loss(memory, images, corruption, num_patches)
        check_finite({"loss_ssl": loss_ssl}, targets)
        losses["loss_ssl"] = loss_ssl[None]  # (1,): like the others, it has an axis of layers
    if detects:
        outputs = model.decode(detr.to_float32(clean_memory))
        check_finite(outputs, targets)
        num_boxes = distributed.mean_over_ranks(sum(len(target["labels"]) for target in targets))
        losses.update(model.criterion(outputs, targets, num_boxes))
    return losses


class LossModule(nn.Module):
    """The computation of the losses as a module, for DistributedDataParallel to wrap."""

    def __init__(self, model, task, args):
        super().__init__()
        self.model = model
        self.task = task
        self.args = args

    def forward(self, images, padding, targets):
        return compute_losses(self.model, self.task, images, padding, targets, self.args)


def parallel_loss_module(model, task, args):
    """Return the losses as a module that averages the gradients over all processes."""
    module = LossModule(model, task, args)
    if distributed.world_size() == 1:
        return module
    # without an encoder, a pretraining does not use the coarser levels
    some_unused = args.setting == "pretrain" and args.enc_layers == 0
    return DistributedDataParallel(module, find_unused_parameters=some_unused)


def gradient_sync(module, completes_step):
    """Return a context in which only the last batch of a step averages gradients over processes."""
    if completes_step or not isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


# ---------------------------------------------------------------- the loop
def train(run, train_set, val_set, args):
    """Train until args.epochs, with an evaluation, a log line and checkpoints after each epoch.

    Returns the metrics of the last evaluation, or None if no epoch was left to train.
    """
    model = run.model
    loss_module = parallel_loss_module(model, run.task, args)
    loss_weights = {**model.criterion.weights, "loss_ssl": 1.0}
    if args.setting == "multitask":
        loss_weights["loss_ssl"] = args.ssl_weight
    parameters = []
    for group in run.optimizer.param_groups:
        parameters += group["params"]
    metrics = None
    bar = progress_bar(run, args)
    with checkpoint.GracefulStop() as stop, bar:
        for epoch in range(run.epoch, args.epochs + 1):
            set_train_mode(model, args)
            batches_done = run.steps_done * args.grad_accum_steps  # 0, unless the run was resumed
            loader = isaid.epoch_loader(train_set, args, epoch, batches_done)
            step_targets = []  # of the images since the last step of the optimizer
            for i, (images, padding, targets) in enumerate(run.timed_batches(loader), 1):
                images = images.to(args.device)
                padding = padding.to(args.device)
                step_targets += targets
                completes_step = i % args.grad_accum_steps == 0
                with gradient_sync(loss_module, completes_step):
                    losses = loss_module(images, padding, targets)
                    terms = {name: loss_weights[name] * x.sum() for name, x in losses.items()}
                    loss = sum(terms.values())  # the log has the weighted terms, which add up to it
                    run.add_losses({**terms, "loss": loss}, 1 / args.grad_accum_steps)
                    run.scaler.scale(loss / args.grad_accum_steps).backward()
                if not completes_step:
                    continue
                run.scaler.unscale_(run.optimizer)
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_max_norm)
                must_be_finite = dict(losses)
                if not run.scaler.is_enabled():  # in fp16 it skips the step instead
                    must_be_finite["the gradient"] = norm
                check_finite(must_be_finite, step_targets)
                check_divergence(loss, run)
                run.scaler.step(run.optimizer)
                update_loss_scale(run)
                run.optimizer.zero_grad()
                run.schedule.step()
                run.steps_done += 1
                step_targets = []
                bar.update()
                if distributed.mean_over_ranks(stop.received) > 0:  # in any process
                    stop_training(run, bar, stop.received)

            check_finite(model.state_dict(), [])
            # before the evaluation: a run that is killed in it will resume there
            checkpoint.save_resume_state(run.out / "last.pt", run)
            line = run.log_line()
            evaluates = epoch % args.eval_every == 0 or epoch == args.epochs
            if evaluates:
                distributed.broadcast_buffers(model)
                metrics, _ = evaluate(model, run.task, val_set, args, run.out)
                line.update({name: metrics[name] for name in LOGGED if name in metrics})
                if metrics["score"] >= run.best_score:  # the later of equals: AP may stay at zero
                    run.best_score = metrics["score"]
                    if distributed.rank() == 0:
                        checkpoint.save(run.out / "best.pt", checkpoint.inference_state(run))
            run.log.append(line)
            if distributed.rank() == 0:
                checkpoint.write_log(run.out / "log.jsonl", run.log)
                if evaluates:
                    plots.draw_curves(run.out / "curves.png", run.log)
            bar.write(epoch_text(line, args.epochs))
            run.next_epoch()
        checkpoint.save_resume_state(run.out / "last.pt", run)  # with the last evaluation
    return metrics


def progress_bar(run, args):
    """Return a bar of all steps of the run; it is shown in terminals, by the first process."""
    done = (run.epoch - 1) * run.steps_per_epoch + run.steps_done
    disable = None if distributed.rank() == 0 else True  # None: shown unless piped to a file
    total = args.epochs * run.steps_per_epoch
    return tqdm(total=total, initial=done, desc="training", unit="step", disable=disable)


def stop_training(run, bar, signal_number):
    """Save the run after a signal, say how to resume it, and exit with the signal's status."""
    checkpoint.save_resume_state(run.out / "last.pt", run)
    bar.write(
        f"stopped in epoch {run.epoch} after {run.steps_done} of {run.steps_per_epoch} steps; "
        f"to resume, run the same command with --out {shlex.quote(str(run.out))} --resume"
    )
    if signal_number == 0:  # another process received it
        signal_number = signal.SIGTERM
    sys.exit(128 + signal_number)


def update_loss_scale(run):
    """Choose the factor of the next loss, which keeps small gradients from vanishing in fp16.

    The scaler has skipped this step if the gradient was infinite or NaN; now it halves the factor.
    Raises FloatingPointError if that does not help.
    """
    scale = run.scaler.get_scale()  # always 1, unless --amp is fp16
    run.scaler.update()
    if run.scaler.get_scale() < scale:
        run.skipped_steps += 1
    if run.scaler.get_scale() < 1:
        message = "the gradient became NaN or Inf in too many steps of fp16"
        raise FloatingPointError(f"{message}. Restart with --amp no or a lower --lr")


def check_finite(tensors, targets):
    """Raise FloatingPointError if a tensor of {name: tensor} contains NaN or infinity.

    targets: those of the images that the tensors were computed from, for the message
    """
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    bad = [name for name, is_finite in zip(tensors, finite) if not is_finite]
    if bad:
        message = f"{' and '.join(bad[:4])} became NaN or Inf"
        if targets:
            images = ", ".join(target["file_name"] for target in targets)
            message += f" on images {images}; training ended before the optimizer step"
        raise FloatingPointError(f"{message}. Restart with a lower --lr")


def check_divergence(loss, run):
    """Raise FloatingPointError if the loss is a hundred times that of the first step, or 100."""
    if run.first_loss == 0:
        run.first_loss = max(loss.item(), 1.0)
    if loss > 100 * run.first_loss:
        message = f"training diverged: loss went from {run.first_loss:.1f} to {loss:.1f}"
        raise FloatingPointError(f"{message}. Restart with a lower --lr")


def set_train_mode(model, args):
    """Set training mode, but frozen parts keep their batch statistics and use no dropout."""
    model.train()
    for part in args.freeze:
        if part == "backbone":
            model.backbone.eval()
        else:
            getattr(model.transformer, part).eval()


# ---------------------------------------------------------------- optimizer and schedule
def build_optimizer(model, task, args):
    """Return AdamW with the learning rates of the papers.

    The CNN has one of its own; so have, in Deformable DETR, the linear projections that predict
    sampling offsets and reference points (lr_linear_proj_mult times args.lr).
    """
    parameters_of = {}  # {learning rate: parameters}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = args.lr
        if name.startswith("backbone"):
            lr = args.lr_backbone
        elif "sampling_offsets" in name or "reference_points" in name:
            lr = args.lr * args.lr_linear_proj_mult
        parameters_of.setdefault(lr, []).append(parameter)
    if task:
        parameters_of.setdefault(args.lr, []).extend(task.parameters())
    groups = [{"params": parameters, "lr": lr} for lr, parameters in parameters_of.items()]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def build_schedule(optimizer, args, steps_per_epoch):
    """Return the schedule args.lr_schedule: a factor of the learning rate for each step.

    step:     a tenth after every args.lr_drop epochs
    linear:   up along a line in the first tenth of all steps, then down to zero along a line
    cosine:   the same, down along half a cosine
    constant: 1
    """
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = max(1, total_steps // 10)

    def lr_factor(step):
        if args.lr_schedule == "constant":
            return 1.0
        if args.lr_schedule == "step":
            return 0.1 ** (step // (args.lr_drop * steps_per_epoch))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        remaining = 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if args.lr_schedule == "linear":
            return remaining
        return (1 - math.cos(math.pi * remaining)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)


# ---------------------------------------------------------------- flags
class LrDropAction(argparse.Action):
    """`--lr_drop N` also selects the schedule "step". linear, cycle and 0 are old spellings."""

    OLD = {"linear": "linear", "cycle": "cosine", "0": "constant"}

    def __call__(self, parser, namespace, value, option=None):
        if value in self.OLD:
            namespace.lr_schedule = self.OLD[value]
            return
        namespace.lr_schedule = "step"
        try:
            namespace.lr_drop = cli.POSITIVE_INT(value)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument {option}: {error}")


def build_parser():
    """Return the parser of all flags. Names are the official ones where the meaning is the same."""
    parser = cli.Parser(description=__doc__)
    num_images = cli.int_range(1, MAX_SCENES)
    num_layers = cli.int_range(1, 256)
    size = cli.int_range(1, 10_000)  # channels, pixels, queries
    parts = tuple(PARTS)
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add(
        "--setting",
        choices=("detect", "pretrain", "multitask"),
        default="detect",
        help="detection, a self-supervised task, or both",
    )
    add("--model", choices=tuple(detr.DETECTORS), default="deformable_detr", help="detector")
    add("--epochs", type=cli.POSITIVE_INT, default=7, help="passes over the training images")
    add(
        "--seed",
        type=cli.NON_NEGATIVE_INT,
        default=0,
        help="seed of weights, order, augmentation and, without --scene_seed, synthetic scenes",
    )
    add("--device", type=cli.parse_device, default="auto", help="device: cpu, cuda, cuda:1, mps")
    add("--out", metavar="RUN", help="run folder, must not exist yet; default: a new one in runs/")
    add("--resume", action="store_true", help="continue the run in --out, or start it")
    add(
        "--overfit",
        type=num_images,
        metavar="N",
        help="smoke test: train and evaluate on the same N images",
    )
    add(
        "--init",
        action=cli.InitAction,
        default=[],
        metavar="RUN",
        help="initial weights: a run folder, a checkpoint file or its URL, or a COCO model: "
        + ", ".join(MODELS),
    )
    add(
        "--init_parts",
        dest="init",
        nargs="+",
        choices=parts,
        action=cli.InitAction,
        default=[],
        help="parts to take from the --init before it; default: all",
    )
    add("--freeze", nargs="+", choices=parts, default=[], help="parts that are not trained")

    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        metavar="DIR",
        help="dataset, or for pretraining any folder of images; default: synthetic scenes",
    )
    add(
        "--image_size",
        type=cli.IMAGE_SIDE,
        metavar="N",
        help="resize to N x N pixels; default: 128 for scenes, else multi-scale",
    )
    add(
        "--scene_seed",
        type=cli.NON_NEGATIVE_INT,
        metavar="N",
        help="seed of the synthetic scenes, for two runs on different scenes; default: --seed",
    )
    add(
        "--limit_train",
        type=num_images,
        metavar="N",
        help="first N training images only; default: all, or 1,000 scenes",
    )
    add(
        "--limit_val",
        type=num_images,
        metavar="N",
        help="first N held-out images only; default: all, or 200 scenes",
    )
    add(
        "--workers",
        type=cli.NUM_WORKERS,
        help="data loading processes; default: 0 on a CPU, else one per usable core, up to 8",
    )
    add(
        "--augment",
        choices=isaid.AUGMENT,
        default="flip",
        help="augmentation of training images, see isaid.make_transforms",
    )

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=tuple(detr.BACKBONES), default="resnet18", help="CNN")
    add(
        "--backbone_weights",
        choices=("none", "imagenet"),
        default="none",
        help="initial weights of the CNN",
    )
    add(
        "--frozen_bn",
        action=switch,
        default=False,
        help="freeze batch normalization and the first stage of the CNN",
    )
    add(
        "--dilation",
        action=switch,
        default=False,
        help="DC5: stride 16 instead of 32 in the last stage of the CNN",
    )
    add("--hidden_dim", type=size, default=128, help="channels of the transformer")
    add("--nheads", type=size, default=8, help="attention heads")
    add("--enc_layers", type=cli.int_range(0, 256), default=2, help="encoder layers")
    add("--dec_layers", type=num_layers, default=3, help="decoder layers")
    add(
        "--dim_feedforward",
        type=size,
        default=256,
        help="hidden channels of the feed-forward networks",
    )
    add("--dropout", type=cli.FRACTION, default=0.0, help="dropout probability in the transformer")
    add(
        "--num_queries",
        type=size,
        default=30,
        help="object queries, the most objects per image that can be found",
    )
    add(
        "--num_feature_levels",
        type=num_layers,
        default=3,
        help="levels: 3 have strides 8, 16, 32; 2: 16, 32; 1: 32; more: 64, …",
    )
    add(
        "--with_box_refine",
        action=switch,
        default=True,
        help="box refinement: each decoder layer corrects the boxes of the one before",
    )
    add(
        "--two_stage",
        action=switch,
        default=False,
        help="two-stage detector: the encoder proposes the queries",
    )
    add(
        "--aux_loss",
        action=switch,
        default=True,
        help="losses of all decoder layers, not only of the last one",
    )
    add(
        "--attn_backend",
        "--attn",
        choices=deformable_attn.BACKENDS,
        default="auto",
        help="kernel of deformable attention, or torch for the reference",
    )

    add = parser.add_argument_group("self-supervised task").add_argument
    add("--ssl_task", choices=tuple(ssl_tasks.TASKS), default="mim-continuous", help="task")
    add("--ssl_on", choices=("features", "image"), default="features", help="what is corrupted")
    add("--ssl_ratio", type=cli.FRACTION, default=0.5, help="fraction of patches to corrupt")
    add(
        "--ssl_patch",
        type=cli.IMAGE_SIDE,
        help="side of a patch in pixels; default: the largest stride; smaller patches mask whole "
        "cells of coarser levels",
    )
    add(
        "--ssl_loss_patches",
        "--ssl_loss_on",
        choices=("corrupted", "all"),
        default="corrupted",
        help="patches that count in the loss",
    )
    add(
        "--ssl_weight",
        type=cli.NON_NEGATIVE_FLOAT,
        default=1.0,
        help="weight of the task's loss in the setting multitask",
    )
    add(
        "--vocab_size",
        "--vocabulary",
        type=size,
        default=64,
        help="mim-discrete: number of visual tokens found by k-means",
    )
    add(
        "--tokenizer_weights",
        metavar="FILE",
        help="mim-discrete: DALL-E's encoder.pkl instead of k-means",
    )

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=cli.POSITIVE_INT, default=16, help="images per batch and process")
    add("--lr", type=cli.POSITIVE_FLOAT, default=1e-3, help="learning rate")
    add("--lr_backbone", type=cli.POSITIVE_FLOAT, default=1e-3, help="learning rate of the CNN")
    add(
        "--lr_linear_proj_mult",
        type=cli.POSITIVE_FLOAT,
        default=1.0,
        help="factor of --lr for sampling offsets and reference points; officially 0.1",
    )
    add("--weight_decay", type=cli.NON_NEGATIVE_FLOAT, default=1e-4, help="weight decay of AdamW")
    add(
        "--clip_max_norm",
        type=cli.POSITIVE_FLOAT,
        default=0.1,
        help="largest norm of the gradient; a larger one is scaled down to it",
    )
    add(
        "--grad_accum_steps",
        "--accumulate",
        type=cli.POSITIVE_INT,
        default=1,
        help="batches per optimizer step",
    )
    add(
        "--amp",
        choices=("auto", "no", "bf16", "fp16"),
        default="auto",
        help="mixed precision; auto: bf16 on CPUs and GPUs with instructions for it, fp16 on older "
        "GPUs, else no",
    )
    add(
        "--compile",
        action=switch,
        default=False,
        help="torch.compile: takes minutes at the start, faster afterwards",
    )
    add(
        "--lr_schedule",
        choices=("step", "linear", "cosine", "constant"),
        default="linear",
        help="learning rate over time, see build_schedule",
    )
    add(
        "--lr_drop",
        action=LrDropAction,
        default=40,
        metavar="N",
        help="selects --lr_schedule step: a tenth of the rate after every N epochs",
    )
    add("--eval_every", type=cli.POSITIVE_INT, default=1, help="epochs between evaluations")
    return parser


def parse(argv=None):
    """Return (flags, names of given flags that have no effect); mistakes end with one line.

    Of a flag that is given twice, as in a recipe and after it, the last one counts. Nothing
    changes the flags afterwards.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.image_size is None and not args.data:
        args.image_size = isaid.SCENE_SIZE
    check_flags(parser, args)
    if args.workers is None:
        args.workers = default_workers(args.device)
    if args.amp == "auto":
        args.amp = cli.default_amp(args.device)
    for name in ("data", "tokenizer_weights"):  # eval.py may be run from another folder
        if getattr(args, name):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    ignored = []
    for name in ignored_flags(args):
        if getattr(args, name) != parser.get_default(name):
            ignored.append(name)
    return args, ignored


def default_workers(device):
    """Return the number of data loading processes: on a GPU one per usable core, up to 8."""
    if device == "cpu":
        return 0
    return min(8, cli.usable_cores())


def check_flags(parser, args):
    """End with an error if flags contradict each other."""
    trained = set(PARTS)
    if args.setting == "pretrain":
        trained.remove("decoder")
    if trained <= set(args.freeze):
        parser.error("--freeze leaves no trainable parameters; freeze fewer parts")
    initialized = set()
    if args.backbone_weights == "imagenet":
        initialized.add("backbone")
    for _, parts in args.init:
        if parts is None:
            parts = PARTS
        initialized.update(parts)
    if args.frozen_bn and "backbone" not in initialized:
        parser.error(
            "--frozen_bn would freeze randomly initialized layers; "
            "add --backbone_weights imagenet, --init or --no-frozen_bn"
        )
    if args.resume and not args.out:
        parser.error("--resume requires --out RUN (the run folder to resume)")
    if args.augment == "crop" and not args.image_size:
        parser.error("--augment crop needs --image_size N")
    if args.image_size and args.image_size < 64:
        parser.error("--image_size must be at least 64")


def ignored_flags(args):
    """Return the names of the flags that have no effect together with the others."""
    detects = args.setting != "pretrain"
    task = None
    if args.setting != "detect":
        task = ssl_tasks.TASKS[args.ssl_task]
    uses_tokens = task is ssl_tasks.MaskedTokens
    ignored = []
    if args.data:
        ignored.append("scene_seed")
    if args.model != "deformable_detr":
        ignored += ["num_feature_levels", "attn_backend", "lr_linear_proj_mult"]
    if args.model != "deformable_detr" or not detects:
        ignored += ["with_box_refine", "two_stage"]
    if not detects:  # no decoder runs
        ignored += ["dec_layers", "num_queries", "aux_loss"]
    if not task:
        ignored += ["ssl_task", "ssl_patch"]
    if not task or not task.corrupts:
        ignored += ["ssl_on", "ssl_ratio", "ssl_loss_patches"]
    if not task or not detects:
        ignored += ["ssl_weight"]
    if not uses_tokens:
        ignored += ["tokenizer_weights"]
    if not uses_tokens or args.tokenizer_weights:
        ignored += ["vocab_size"]
    if args.overfit:
        ignored += ["limit_train", "limit_val", "augment"]
    if args.lr_schedule != "step":
        ignored += ["lr_drop"]
    if "backbone" in args.freeze:
        ignored += ["lr_backbone"]
    if any(parts is None or "backbone" in parts for _, parts in args.init):
        ignored += ["backbone_weights"]
    return ignored


# ---------------------------------------------------------------- building a run
DETECTOR_FLAGS = (
    "backbone",
    "hidden_dim",
    "nheads",
    "enc_layers",
    "dec_layers",
    "dim_feedforward",
    "dropout",
    "num_queries",
    "dilation",
    "frozen_bn",
    "aux_loss",
)
DEFORMABLE_DETR_FLAGS = ("num_feature_levels", "with_box_refine", "two_stage")


def detector_config(args, num_classes):
    """Return the arguments of detr.build_detector as plain values; the checkpoint holds them."""
    config = {"name": args.model, "num_classes": num_classes}
    for name in DETECTOR_FLAGS:
        config[name] = getattr(args, name)
    if args.model == "deformable_detr":
        for name in DEFORMABLE_DETR_FLAGS:
            config[name] = getattr(args, name)
    return config


def build_model(config, args):
    """Return (the detector with its initial weights, a note about them). Raises ValueError.

    Parts that are not trained get no gradients; a pretraining never runs the decoder.
    """
    weights = None
    origin = {}  # {part: where its weights come from}
    if args.backbone_weights == "imagenet" and "backbone_weights" not in ignored_flags(args):
        weights = "IMAGENET1K_V1"
        fetch_imagenet_weights(config["backbone"])
        origin["backbone"] = weights
    model = detr.build_detector(**config, backbone_weights=weights)
    reinitialized = []
    for path, parts in args.init:
        taken, names = init_from_checkpoint(model, checkpoint_file(path), parts)
        for part in taken:
            origin[part] = path
        reinitialized = [name for name in reinitialized if part_of(name) not in taken] + names
    check_frozen(args, origin, reinitialized)
    idle = list(args.freeze)
    if args.setting == "pretrain":
        idle.append("decoder")
    for name, parameter in model.named_parameters():
        if part_of(name) in idle:
            parameter.requires_grad_(False)
    return model, init_note(origin, reinitialized)


def check_frozen(args, origin, reinitialized):
    """Raise ValueError if a part would stay at random weights."""
    random_parts = set(PARTS) - origin.keys()
    random_parts.update(part_of(name) for name in reinitialized)
    for part in args.freeze:
        if part in random_parts:
            message = f"--freeze {part} would freeze randomly initialized weights"
            raise ValueError(f"{message}; load weights for it with --init")


def init_note(origin, reinitialized):
    """Return where the initial weights come from, in words."""
    if not origin:
        return "random weights"
    parts_from = {}
    for part, path in origin.items():
        parts_from.setdefault(path, []).append(part)
    note = "; ".join(f"{' and '.join(parts)} from {path}" for path, parts in parts_from.items())
    if reinitialized:
        note += "; re-initialized (missing, or different number of classes): "
        note += ", ".join(reinitialized)
    return note


def build_task(args, strides):
    """Return (the task or None, the arguments of ssl_tasks.build_task to build it again)."""
    if args.setting == "detect":
        return None, None
    patch = args.ssl_patch
    if patch is None:
        patch = max(strides)
    config = {
        "name": args.ssl_task,
        "dim": args.hidden_dim,
        "strides": list(strides),
        "patch": patch,
        "image_size": args.image_size,
        "ratio": args.ssl_ratio,
        "on": args.ssl_on,
        "loss_patches": args.ssl_loss_patches,
        "hidden_layer": args.setting == "multitask",  # as in the authors' code
    }
    if ssl_tasks.TASKS[args.ssl_task] is ssl_tasks.MaskedTokens:
        config["vocab_size"] = args.vocab_size
        config["tokenizer_weights"] = args.tokenizer_weights
    return ssl_tasks.build_task(**config), config


def prepare_task(task, train_set, args):
    """Fit the visual tokens of a new task on training images, and try it on a first batch."""
    if hasattr(task, "tokenizer"):
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(len(train_set), generator=generator)
        sample = order[:256].tolist()
        loader = isaid.data_loader(train_set, args.workers, batch_size=8, sampler=sample)
        task.tokenizer.fit(images_and_patches(loader, task.patch), args.seed)
    images, padding, _ = isaid.collate([train_set[i] for i in range(min(4, len(train_set)))])
    task.check(images, padding)


def images_and_patches(loader, patch):
    """Yield the images of each batch and which of their patches lie inside them."""
    for images, padding, _ in loader:
        yield images, ssl_tasks.patches_inside_image(padding, patch)


def build_run(args, train_set):
    """Return the run before its first step, or as it was saved. Raises ValueError."""
    torch.manual_seed(args.seed)
    steps = len(isaid.epoch_batch_indices(train_set, args, 0)) // args.grad_accum_steps
    if steps == 0:
        raise ValueError(
            f"{len(train_set)} training images are fewer than one optimizer step needs "
            "(batch size x accumulation x processes); lower --batch_size or --grad_accum_steps, "
            "or use fewer processes"
        )
    state = None
    if args.resume:
        defaults = vars(build_parser().parse_args([]))
        state = checkpoint.load_resume_state(args, defaults)
    config = detector_config(args, max(1, len(train_set.categories)))
    model, init = build_model(config, args)
    attention = deformable_attn.set_attention_backend(model, args.device, args.attn_backend)
    model.to(args.device, memory_format=torch.channels_last)  # makes convolutions faster
    task, task_config = build_task(args, model.strides)
    if task and state is None:
        prepare_task(task, train_set, args)
    if task:
        task.to(args.device)
    optimizer = build_optimizer(model, task, args)
    run = checkpoint.Run(
        model=model,
        task=task,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, args, steps),
        scaler=torch.amp.GradScaler(torch.device(args.device).type, enabled=args.amp == "fp16"),
        metadata={
            "args": vars(args),
            "detector": config,
            "task": task_config,
            "categories": train_set.categories,
            "window": dataset_check.median_side(train_set),
        },
        steps_per_epoch=steps,
        images_per_step=images_per_step(args, train_set),
    )
    torch.manual_seed(args.seed + distributed.rank())  # dropout differs between processes
    if state:
        checkpoint.resume(run, state, args.device)
        init = f"resumed in epoch {run.epoch} after {run.steps_done} of {steps} steps"
    run.notes = {"init": init, "attention": attention}
    if args.compile:
        model.features = torch.compile(model.features)
        model.encode = torch.compile(model.encode)
        model.decode = torch.compile(model.decode)
    return run


def images_per_step(args, train_set):
    """Return the number of images of an optimizer step, in all processes."""
    batch_size = isaid.actual_batch_size(train_set, args)
    return batch_size * args.grad_accum_steps * distributed.world_size()


def print_summary(args, run, train_set, val_set, ignored):
    """Print what a user should know before the first step."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    images = run.steps_per_epoch * args.epochs * run.images_per_step
    device = checkpoint.device_name(args.device)

    def show(title, text):
        print(f"{title:11} {text}")

    show("run", f"{run.out}, seed {args.seed}, revision {checkpoint.revision()}, on {device}")
    show("model", f"{args.model}, {args.backbone}, {trained:.1f} M trainable parameters")
    for title, text in run.notes.items():
        if text:
            show(title, text)
    show(
        "batch",
        f"{run.images_per_step} images per step, {run.steps_per_epoch} steps per epoch, "
        f"{args.epochs} epochs: {images:,} images in total",
    )
    if args.amp != "no":
        text = f"{args.amp} in the CNN and encoder, fp32 in the decoder, tasks, losses, evaluation"
        show("precision", text)
    if args.amp == "fp16" and args.device == "cpu":
        show("expect", "convolutions in fp16 are many times slower on a CPU; it is for GPUs")
    if run.task:
        show("task", f"{args.ssl_task}, patches of {run.task.patch} pixels")
    if ignored:
        show("ignored", ", ".join(f"--{name}" for name in ignored))
    is_slow = args.model == "detr" and run.notes["init"] == "random weights"
    if args.image_size == 64:  # scenes so small that it learns in minutes: recipes/small_scenes.txt
        is_slow = False
    if is_slow and args.setting != "pretrain":
        show("expect", "DETR from scratch detects nothing for many epochs; consider --init")
    show("train", dataset_check.summary(train_set, args.num_queries, args.image_size))
    show("val", dataset_check.summary(val_set, args.num_queries, args.image_size))
    classes = []
    for category, count in zip(train_set.categories, dataset_check.class_counts(train_set)):
        classes.append(f"{category['id']} {category['name']} ({count:,})")
    if classes:
        show("classes", ", ".join(classes))


@cli.cli_main
def main(argv=None):
    args, ignored = parse(argv)
    distributed.init(args.device)
    train_set, val_set = distributed.run_on_all_ranks(isaid.load_train_and_val, args)
    run = distributed.run_on_all_ranks(build_run, args, train_set)
    with checkpoint.run_folder(args) as out:
        run.out = out
        print_summary(args, run, train_set, val_set, ignored)
        metrics = train(run, train_set, val_set, args)
    if metrics and "per_class" in metrics:
        print(f"\n{metrics_table(metrics)}")
    print(f"\nFigures are in {run.out}. Evaluate with: python eval.py {shlex.quote(str(run.out))}")


if __name__ == "__main__":
    main()
