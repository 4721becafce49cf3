"""Train DETR or Deformable DETR: to detect, on a self-supervised task (pretrain), or on both at once (multitask).

    python train.py                                  a demonstration: synthetic aerial scenes, small model, CPU
    python train.py @recipes/deformable_detr.txt --data DIR    the official recipe on a dataset in iSAID's patches layout
    python train.py --setting pretrain --ssl_task mim-continuous --out runs/mim      then: python train.py --init runs/mim
    python train.py --setting multitask --ssl_task jigsaw-discrete --ssl_weight 0.1

A run is a folder: config.json (flags, versions, revision), log.jsonl (a line an epoch), last.pt, best.pt (by AP, or by the
task's held-out loss), curves.png, detections.png, ssl.png.
Without flags everything has the demonstration's small sizes; recipes hold the large ones.
"""
import argparse
import collections
import ctypes
import datetime
import inspect
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from tqdm import tqdm

import deformable_attn
import detr
import eval as evaluation
import isaid
import ssl_tasks

# flags that belong to one kind of model, setting or task, with their defaults there
DEFORMABLE = {"num_feature_levels": 3, "enc_n_points": 4, "dec_n_points": 4, "with_box_refine": True, "two_stage": False,
              "attn": "auto"}
SSL = {"ssl_task": "mim-continuous", "ssl_on": "features", "ssl_ratio": 0.5, "ssl_patch": None, "ssl_loss_on": "corrupted"}
TOKENS = {"tokenizer": "kmeans", "tokenizer_images": 256}


# ---------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line):
        return line.split("#")[0].split()  # recipes: several flags a line, comments

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def build_parser():
    """Every flag, in groups; the defaults are the demonstration's. The names are the official ones where there are any."""
    count, natural = isaid.number(int), isaid.number(int, zero=True)
    rate, switch = isaid.number(float), argparse.BooleanOptionalAction
    factor, share = isaid.number(float, zero=True), isaid.number(float, zero=True, most=1)
    parser = Parser(description=__doc__, fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)

    run = parser.add_argument_group("run").add_argument
    run("--setting", choices=("detect", "pretrain", "multitask"), default="detect",
        help="what is trained: the detector; its CNN and encoder on a self-supervised task; both (default %(default)s)")
    run("--model", choices=tuple(detr.DETECTORS), default="deformable_detr", help="(default %(default)s)")
    run("--epochs", type=count, default=9, metavar="N", help="passes over the training images (default %(default)s)")
    run("--seed", type=natural, default=0, metavar="N", help="of weights, order, augmentation and scenes (default %(default)s)")
    run("--device", type=evaluation.usable_device, default=evaluation.default_device(), help="(default here: %(default)s)")
    run("--out", metavar="DIR", help="run folder, must not exist (default: a new one in runs/)")
    run("--init", metavar="FILE", help="start from the weights of a run or of an official checkpoint, file or URL; class heads "
        "of another number of classes are dropped, anything else must fit")
    run("--init_parts", nargs="+", choices=tuple(detr.PARTS), help="take only these parts of it (default: those it has)")
    run("--freeze", nargs="+", choices=tuple(detr.PARTS), default=[], help="parts that are not trained")

    data = parser.add_argument_group("data; without --data or --train_json, synthetic scenes").add_argument
    data("--data", metavar="DIR", help="dataset with {train,val}/images and {split}/instancesonly_filtered_{split}.json")
    for split in ("train", "val"):
        data(f"--{split}_images", metavar="DIR", help=f"instead of --data: the folder of {split} images …")
        data(f"--{split}_json", metavar="FILE", help="… and their COCO annotations")
    data("--data_unlabeled", metavar="DIR", help="for pretraining: a folder of images and folders; if it has train and val, "
         "these, else every twentieth image is held out")
    data("--image_size", type=count, metavar="N", help="resize every image to N x N (the paper: 512); default: 128 for scenes, "
         "else the official multi-scale recipe, shorter side 480 to 800")
    data("--limit_train", type=count, metavar="N", help="the first N training images (default: all; 1000 scenes)")
    data("--limit_val", type=count, metavar="N", help="the first N held-out images (default: all; 200 scenes)")
    data("--workers", type=natural, metavar="N", help="loader processes (default: 0 on the CPU, else up to 8)")
    data("--prefetch", type=count, default=4, metavar="N", help="batches that a loader process holds ready (default %(default)s)")
    data("--pin_memory", action=switch, help="load into memory that is copied to a GPU faster (default: with a GPU)")
    data("--repeat_factor", type=share, metavar="P", help="show images more often whose classes are in less than this share of all, "
         "as for LVIS, 0.01 say (default: off)")
    data("--hflip", action=switch, default=True, help="random horizontal flips (default on)")
    data("--vflip", action=switch, default=False, help="random vertical flips")
    data("--quarter_turns", action=switch, default=False, help="random turns by 90, 180 and 270 degrees")

    model = parser.add_argument_group("model").add_argument
    model("--backbone", choices=detr.BACKBONES, default="resnet18", help="(default %(default)s)")
    model("--backbone_weights", choices=("none", "imagenet"), default="none",
          help="imagenet downloads torchvision's (default %(default)s)")
    model("--frozen_bn", action=switch, default=False,
          help="keep batch norm and the first stage as they are, as the official code does with pretrained backbones")
    model("--dilation", action=switch, default=False, help="DC5: the CNN's last stage at stride 16 instead of 32")
    model("--hidden_dim", type=count, default=128, metavar="N", help="(default %(default)s)")
    model("--nheads", type=count, default=8, metavar="N", help="(default %(default)s)")
    model("--enc_layers", type=natural, default=2, metavar="N", help="(default %(default)s)")
    model("--dec_layers", type=count, default=3, metavar="N", help="(default %(default)s)")
    model("--dim_feedforward", type=count, default=256, metavar="N", help="(default %(default)s)")
    model("--dropout", type=float, default=0.0, metavar="P", help="in the transformer (default %(default)s)")
    model("--num_queries", type=count, default=30, metavar="N", help="(default %(default)s)")
    deformable = parser.add_argument_group("deformable_detr only").add_argument
    deformable("--num_feature_levels", type=count, metavar="N", help="strides 8, 16, 32 … (default 3); 1: stride 32 only")
    deformable("--enc_n_points", type=count, metavar="N", help="points a head and level in the encoder (default 4)")
    deformable("--dec_n_points", type=count, metavar="N", help="… in the decoder (default 4)")
    deformable("--with_box_refine", action=switch, help="each layer corrects the boxes of the one before (default on)")
    deformable("--two_stage", action=switch, help="the encoder proposes the queries (default off)")
    deformable("--attn", choices=deformable_attn.BACKENDS, help="what computes deformable attention; torch: without a kernel "
               "(default auto: the device's kernel if it can be built)")

    ssl = parser.add_argument_group("self-supervised task; with --setting pretrain or multitask").add_argument
    ssl("--ssl_task", choices=tuple(ssl_tasks.TASKS), help="(default mim-continuous)")
    ssl("--ssl_on", choices=("features", "image"), help="corrupt the feature maps or the image (default features)")
    ssl("--ssl_ratio", type=share, metavar="P", help="share of the patches that is corrupted (default 0.5)")
    ssl("--ssl_patch", type=count, metavar="N", help="pixels a side of a patch (default: a cell of the coarsest feature map)")
    ssl("--ssl_loss_on", choices=("corrupted", "all"), help="patches that count (default corrupted; reconstruct: all)")
    ssl("--ssl_weight", type=factor, metavar="F", help="multitask: weight of the task's loss (default 1)")
    ssl("--tokenizer", choices=("kmeans", "dalle"), help="where mim-discrete has its visual tokens from (default kmeans)")
    ssl("--tokenizer_weights", metavar="FILE", help="dalle: the encoder.pkl that OpenAI published")
    ssl("--tokenizer_images", type=count, metavar="N", help="training images that a tokenizer looks at (default 256)")
    ssl("--vocabulary", type=count, metavar="N", help="number of k-means tokens (default 64)")

    optim = parser.add_argument_group("optimisation").add_argument
    optim("--batch_size", type=count, default=8, metavar="N", help="images a step (default %(default)s)")
    optim("--lr", type=rate, default=5e-4, metavar="R", help="learning rate (default %(default)s)")
    optim("--lr_backbone", type=rate, default=5e-4, metavar="R", help="of the CNN (default %(default)s)")
    optim("--lr_linear_proj_mult", type=rate, default=0.1, metavar="F",
          help="factor for sampling offsets and reference points (default %(default)s)")
    optim("--weight_decay", type=factor, default=1e-4, metavar="F", help="(default %(default)s)")
    optim("--clip_max_norm", type=rate, default=0.1, metavar="F", help="largest norm of the gradient (default %(default)s)")
    for name, text in (("cls", "2, detr: 1"), ("bbox", "5"), ("giou", "2")):
        optim(f"--{name}_loss_coef", type=factor, metavar="F", help=f"weight of the loss (default {text})")
    optim("--lr_schedule", choices=("onecycle", "step"), default="onecycle",
          help="up and down again, or one drop to a tenth (default %(default)s)")
    optim("--lr_drop", type=count, default=40, metavar="EPOCH", help="epochs before the drop of `step` (default %(default)s)")
    optim("--eval_every", type=count, default=1, metavar="N", help="epochs between evaluations (default %(default)s)")
    return parser


def parse(argv):
    """The flags, checked against each other; mistakes end the program with one line."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except UnicodeDecodeError:
        parser.error("a file named with @ is not a text file of flags")

    def settle(flags, belongs, where):
        """Fill in the defaults of flags that belong to this run; refuse the others."""
        for name, default in flags.items():
            if getattr(args, name) is not None and not belongs:
                parser.error(f"--{name} belongs to {where}; leave it out")
            if getattr(args, name) is None and belongs:
                setattr(args, name, default)
    settle(DEFORMABLE, args.model == "deformable_detr", "--model deformable_detr")
    settle(SSL, args.setting != "detect", "--setting pretrain or multitask")
    settle({"ssl_weight": 1.0}, args.setting == "multitask", "--setting multitask")
    settle(dict.fromkeys(("cls_loss_coef", "bbox_loss_coef", "giou_loss_coef")), args.setting != "pretrain",
           "--setting detect or multitask")
    settle({"repeat_factor": None}, args.setting != "pretrain", "--setting detect or multitask")
    settle({"data_unlabeled": None}, args.setting == "pretrain", "--setting pretrain")
    settle({"init_parts": None}, args.init, "--init")
    settle(TOKENS, args.ssl_task and ssl_tasks.TASKS[args.ssl_task].tokens, "--ssl_task mim-discrete")
    settle({"vocabulary": 64}, args.tokenizer == "kmeans", "--tokenizer kmeans, of --ssl_task mim-discrete")
    settle({"tokenizer_weights": None}, args.tokenizer == "dalle", "--tokenizer dalle, of --ssl_task mim-discrete")
    if args.tokenizer == "dalle" and not args.tokenizer_weights:
        parser.error("--tokenizer dalle needs --tokenizer_weights FILE, the encoder.pkl that OpenAI published")
    if args.tokenizer_weights:
        args.tokenizer_weights = str(Path(args.tokenizer_weights).resolve())  # eval.py may run elsewhere
    trained = detr.PARTS if args.setting == "detect" else ("backbone", "encoder")  # a task reaches no further
    if set(trained) <= set(args.freeze):
        parser.error("--freeze leaves nothing to train; name fewer parts")
    given = set(args.init_parts or detr.PARTS) if args.init else set()
    if args.backbone_weights == "imagenet":
        given.add("backbone")
    if set(args.freeze) - given:
        parser.error(f"--freeze {(set(args.freeze) - given).pop()} keeps random weights; start it from a run with --init")
    files = [name for name in ("train_images", "train_json", "val_images", "val_json") if getattr(args, name)]
    sources = [name for name in ("data", "data_unlabeled", *files[:1]) if getattr(args, name)]
    if len(sources) > 1:
        parser.error(f"--{sources[0]} and --{sources[1]} name two datasets; give one of them")
    if files and not {"train_images", "val_images"} <= set(files):
        parser.error("--train_images and --val_images go together")
    if 0 < len(files) < 4 and args.setting != "pretrain":
        parser.error("--train_images, --train_json, --val_images and --val_json go together")
    if not isaid.has_files(args):
        args.image_size = args.image_size or isaid.SCENE_SIZE
    if args.frozen_bn and "backbone" not in given:
        parser.error("--frozen_bn keeps random layers frozen here; add --backbone_weights imagenet or --init")
    if args.image_size and args.image_size < 64:
        parser.error(f"--image_size {args.image_size} leaves too few cells to a map; take at least 64")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout} is not in 0..1")
    if args.pin_memory is None:
        args.pin_memory = args.device.startswith("cuda")
    if args.workers is None:
        args.workers = 0 if args.device == "cpu" else min(8, os.cpu_count() or 1)
    return args


# ---------------------------------------------------------------- what a run is made of

def detector_config(args, num_classes):
    """The arguments of detr.build_detector, as plain values; saved in the checkpoint."""
    names = inspect.signature(detr.DETECTORS[args.model]).parameters.keys() - {"num_classes", "backbone_weights"}
    return {"name": args.model, "num_classes": num_classes, **{name: getattr(args, name) for name in sorted(names)}}


def build_model(config, backbone_weights):
    weights = {"none": None, "imagenet": "IMAGENET1K_V1"}[backbone_weights]
    try:
        return detr.build_detector(**config, backbone_weights=weights)
    except OSError as error:  # URLError is one
        raise ValueError(f"the ImageNet weights of {config['backbone']} cannot be downloaded ({error}); "
                         f"put them into {torch.hub.get_dir()}/checkpoints or leave --backbone_weights out") from None


def freeze(model, args):
    """Parts that are not trained get no gradient; a pretraining never runs the decoder."""
    frozen = {*args.freeze, *(["decoder"] if args.setting == "pretrain" else [])}
    for name, parameter in model.named_parameters():
        if detr.part_of(name) in frozen:
            parameter.requires_grad_(False)


def keep_memory():
    """Tell glibc to keep what is freed. By default every large activation is new memory, which the system hands out page by page; that took
    a fifth of a training step of Deformable DETR at 512 pixels on the CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def train_mode(model, args):
    """Training mode, but frozen parts keep their batch statistics and drop nothing out."""
    model.train()
    for part in args.freeze:
        {"backbone": model.backbone, "encoder": model.transformer.encoder, "decoder": model.transformer.decoder}[part].eval()


def build_task(args, model, train_set):
    """The self-supervised task; its visual tokens are fitted on a sample of the training images."""
    task = ssl_tasks.build_task(args.ssl_task, args.hidden_dim, list(model.strides), args.ssl_patch, args.tokenizer,
                                args.vocabulary, args.tokenizer_weights, ratio=args.ssl_ratio, on=args.ssl_on,
                                loss_on=args.ssl_loss_on, image_size=args.image_size)
    if task.tokens:
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(args.seed))[:args.tokenizer_images]
        loader = DataLoader(train_set, args.batch_size, sampler=order.tolist(), num_workers=args.workers,
                            collate_fn=isaid.collate)
        sample = tqdm(loader, "images for visual tokens", leave=False, disable=None)
        task.tokenizer.fit(((images, ssl_tasks.whole_patches(padding, task.patch)) for images, padding, _ in sample), args.seed)
    return task


def parameter_groups(model, task, args):
    """As in the official recipes: a rate of its own for the CNN, a tenth for sampling offsets and reference points."""
    groups = collections.defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone"):
            groups[args.lr_backbone].append(parameter)
        elif "sampling_offsets" in name or "reference_points" in name:
            groups[args.lr * args.lr_linear_proj_mult].append(parameter)
        else:
            groups[args.lr].append(parameter)
    if task:
        groups[args.lr] += task.parameters()
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def build_schedule(optimizer, args, steps_per_epoch):
    """The learning rate of each step, as a factor of the group's rate."""
    total, drop = args.epochs * steps_per_epoch, args.lr_drop * steps_per_epoch
    warmup = max(1, total // 10)

    def onecycle(step):  # a tenth of the steps up along a line, the rest down along a cosine
        down = max(0, step - warmup) / max(1, total - warmup)
        return min((step + 1) / warmup, (1 + math.cos(math.pi * down)) / 2)

    def step(step):
        return 0.1 ** (step // drop)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, {"onecycle": onecycle, "step": step}[args.lr_schedule])


def epoch_loader(data, args, epoch):
    """The shuffled batches of an epoch; the order depends on (seed, epoch) alone. An incomplete last batch is left out."""
    data.epoch = epoch
    generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
    images = torch.arange(len(data))
    if args.repeat_factor:
        images = repeated(isaid.repeat_factors(data, args.repeat_factor), torch.rand((), generator=generator))
    order, size = images[torch.randperm(len(images), generator=generator)].tolist(), args.batch_size
    batches = [order[i:i + size] for i in range(0, len(order) - size + 1, size)]
    return DataLoader(data, batch_sampler=batches, num_workers=args.workers, collate_fn=isaid.collate, pin_memory=args.pin_memory,
                      prefetch_factor=args.prefetch if args.workers else None)


def repeated(factors, offset):
    """Items of an epoch that shows image i factors[i] times on average, in every epoch as many in all; see isaid.Detection for items."""
    total = factors.double().cumsum(0)
    until = (total * (total[-1].round() / total[-1]) + offset).floor().long()  # whole numbers that keep step with the sums
    times = until.diff(prepend=torch.zeros(1, dtype=torch.int64))
    first = torch.arange(len(factors)).repeat_interleave(times)
    again = torch.arange(len(first)) - (until - times).repeat_interleave(times)  # 0 the first time, 1 the second …
    return first + len(factors) * again


def save(path, model, task, args, **content):
    """Write a checkpoint whole or not at all; the decoder of a pretraining is left out."""
    weights = {name: tensor for name, tensor in model.state_dict().items()
               if args.setting != "pretrain" or detr.part_of(name) != "decoder"}
    content.update(model=weights, task=task and {"config": task.config, "state": task.state_dict()}, args=vars(args))
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def window_size(data):
    """How many pixels a side the images of a dataset have, for windows of larger ones; None if it does not say."""
    sides = [max(image["width"], image["height"]) for image in data.images if "width" in image]
    return int(torch.tensor(sides).median()) if sides else None


def git_revision():
    try:
        where = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "text": True, "check": True}
        revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **where).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **where).stdout.strip()
        return revision + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def make_run_folder(args):
    """A new folder for the run; an existing one is never written into."""
    if args.out is None:
        kind = args.setting if args.setting == "detect" else f"{args.setting}-{args.ssl_task}"
        names = (f"runs/{args.model}-{kind}-{n}" for n in itertools.count(1))
        args.out = next(name for name in names if not Path(name).exists())
    out = Path(args.out)
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"--out {out} exists already; name a new folder or remove it") from None
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made ({error.strerror})") from None
    return out


def choose_attention(args):
    """Which implementation of attention runs, in words. Raises ValueError if it cannot."""
    if args.model != "deformable_detr":
        return "scaled_dot_product_attention"
    name, reason = deformable_attn.backend(args.device, args.attn)
    deformable_attn.MSDeformAttn.backend = name
    return f"{name}: {reason}"


def introduce(args, model, task, attention, train_set, val_set):
    """What a user should know before the first step."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    cuda = args.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"{args.device}, {torch.get_num_threads()} threads"
    print(f"revision    {git_revision()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"run         {args.out}, seed {args.seed}")
    print(f"device      {device}")
    print(f"model       {args.model}, {args.backbone}, {parameters / 1e6:.1f} M parameters"
          + (f" and {frozen / 1e6:.1f} M not trained" if frozen else ""))
    print(f"attention   {attention}")
    steps = len(train_set) // args.batch_size
    print(f"batch       {args.batch_size} images a step, {steps} steps an epoch, "
          f"{args.epochs} epochs: {steps * args.epochs * args.batch_size:,} images in all "
          + ("(the paper's pretraining: 10 epochs of iSAID or ImageNet)" if args.setting == "pretrain" else
             "(the paper's recipe: 50 epochs of iSAID, 1,400,000)"))
    if task:
        where = "the image" if task.on == "image" else "the feature maps"
        print(f"task        {args.ssl_task}, patches of {task.patch} pixels"
              + (f", {task.ratio:.0%} of them corrupted in {where}" if task.corrupts else "")
              + (f", {len(task.tokenizer.codes):,} visual tokens ({args.tokenizer})" if task.tokens else ""))
    for name, data in (("train", train_set), ("val", val_set)):
        if args.setting == "pretrain":
            print(f"{name:11} {data.name}: {len(data):,} images, their annotations are not used")
            continue
        print(f"{name:11} {data.name}: {len(data):,} images, {sum(data.counts()):,} boxes"
              + (f", {data.clipped:,} clipped to their image" if data.clipped else "")
              + (f", {data.removed:,} without area removed" if data.removed else ""))
        crowded = sum(len(labels) > args.num_queries for labels in data.labels)
        if crowded:
            print(f"            {crowded:,} of them ({crowded / len(data):.1%}) hold more objects than the model has queries "
                  f"({args.num_queries}): some are never learnt or found")
    if args.setting == "pretrain":
        return
    cells = [f"{c['id']:>4} {c['name']:20} {n:>7,}" for c, n in zip(train_set.categories, train_set.counts())]
    print("classes     id, name, training boxes")
    for i in range(0, len(cells), 3):
        print("      " + "  ".join(cells[i:i + 3]))


# ---------------------------------------------------------------- training

def batch_losses(model, task, args, images, padding, targets):
    """Every loss of a batch by name, a value for each decoder layer; where detectors and self-supervised tasks meet."""
    corruption = task and task.corruption(padding, [target["seed"] for target in targets]).to(args.device)
    images, padding = (x.to(args.device, non_blocking=True) for x in (images, padding))
    losses = {}
    if task:
        corrupted, memory = ssl_tasks.encode(model, task, images, padding, corruption, clean=args.setting == "multitask")
        losses["loss_ssl"] = task.loss(corrupted, images, corruption)[None]
    else:
        memory = model.encode(model.features(images, padding))
    if args.setting != "pretrain":
        losses.update(detr.detection_losses(model.decode(memory), targets, model.focal))
    return losses


def train_epoch(model, task, loader, optimizer, schedule, args, bar):
    """One pass; returns the mean of every loss (of the last layer) and of the weighted total, and the seconds waited."""
    train_mode(model, args)
    weights = loss_weights(args)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums, waited, ready = collections.Counter(), 0.0, time.perf_counter()
    for images, padding, targets in loader:
        waited += time.perf_counter() - ready
        losses = batch_losses(model, task, args, images, padding, targets)
        total = detr.total_loss(losses, weights)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.clip_max_norm)
        optimizer.step()
        schedule.step()
        for name, loss in losses.items():
            sums[name] += loss[-1].detach()  # stays on the device: no waiting for it here
        sums["loss"] += total.detach()
        bar.update()
        ready = time.perf_counter()
    return {f"train_{name}": float(value) / len(loader) for name, value in sums.items()}, waited


def loss_weights(args):
    """The weight of each loss, by name: the official ones unless a flag says otherwise."""
    weights = detr.loss_weights(detr.DETECTORS[args.model].focal)
    flags = {"loss_ce": args.cls_loss_coef, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    ssl = 1.0 if args.ssl_weight is None else args.ssl_weight
    return {**weights, **{name: value for name, value in flags.items() if value is not None}, "loss_ssl": ssl}


def evaluate(model, task, val_set, args, out):
    """Metrics on the held-out images, and the pictures of them in the run folder."""
    metrics, how = {}, (args.batch_size, args.workers, args.device)
    if args.setting != "pretrain":
        results = evaluation.predict(model, val_set, *how)
        metrics = evaluation.coco_metrics(val_set, results)
        evaluation.draw_detections(out / "detections.png", val_set, results)
    if task:
        found, panels = evaluation.ssl_metrics(model, task, val_set, *how)
        metrics.update(found)
        evaluation.draw_ssl(out / "ssl.png", panels, task.patch)
    return metrics


def main(argv=None):
    args = parse(argv)
    if args.device == "cpu":
        keep_memory()
    torch.manual_seed(args.seed)
    try:  # everything that can be wrong with the input is found before the first step
        train_set, val_set = isaid.open_split("train", args, train=True), isaid.open_split("val", args, train=False)
        if train_set.categories != val_set.categories:
            raise isaid.DataError(f"the classes of {train_set.name} ({isaid.class_names(train_set.categories)}) are not those "
                                  f"of {val_set.name} ({isaid.class_names(val_set.categories)})")
        args.batch_size = min(args.batch_size, len(train_set))
        config = detector_config(args, max(1, len(train_set.categories)))
        model = build_model(config, "none" if args.init and not args.init_parts else args.backbone_weights)
        if args.init:
            taken, left, dropped = detr.load_weights(model, evaluation.checkpoint_file(args.init), args.init_parts)
        freeze(model, args)
        attention = choose_attention(args)
        content = {"detector": config, "categories": train_set.categories, "window": window_size(train_set)}
        task = build_task(args, model, train_set).to(args.device) if args.setting != "detect" else None
        out = make_run_folder(args)
    except ValueError as error:
        sys.exit(f"error: {isaid.one_line(error)}")
    model.to(args.device, memory_format=torch.channels_last)  # convolutions are faster so
    introduce(args, model, task, attention, train_set, val_set)
    if args.init:
        print(f"init        {args.init}: {' and '.join(taken)} taken"
              + (f"; {' and '.join(left)} not" if left else "")
              + (f"; of another number of classes and dropped: {', '.join(dropped)}" if dropped else ""))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    (out / "config.json").write_text(json.dumps({"args": vars(args), "versions": versions, "revision": git_revision(),
                                                 "started": datetime.datetime.now().isoformat(timespec="seconds")}, indent=1))
    try:
        fit(args, out, model, task, content, train_set, val_set)
    except (isaid.DataError, FloatingPointError) as error:
        kept = (out / "last.pt").exists()
        if not kept:
            shutil.rmtree(out)  # nothing worth keeping, and the same command should work once its input is mended
        advice = "; try a lower --lr" if isinstance(error, FloatingPointError) else ""
        advice += f"; the weights of the last whole epoch are in {out}" if kept else ""
        sys.exit(f"error: {isaid.one_line(error)}{advice}")


def fit(args, out, model, task, content, train_set, val_set):
    """The training loop: epochs, evaluation, log, checkpoints, pictures."""
    optimizer = torch.optim.AdamW(parameter_groups(model, task, args), weight_decay=args.weight_decay, fused=True)
    steps = len(epoch_loader(train_set, args, 0))
    schedule = build_schedule(optimizer, args, steps)
    log, trained, best = [], 0, -math.inf
    bar = tqdm(total=args.epochs * steps, desc="training", unit="step", disable=None, smoothing=0.02)
    try:
        for epoch in range(1, args.epochs + 1):
            start = time.perf_counter()
            losses, waited = train_epoch(model, task, epoch_loader(train_set, args, epoch), optimizer, schedule, args, bar)
            trained, seconds = epoch, time.perf_counter() - start
            if not all(parameter.isfinite().all() for parameter in model.parameters()):
                raise FloatingPointError("the model's weights became NaN or infinite")
            line = {"epoch": epoch, **losses, "seconds": round(seconds, 2), "data_wait": round(waited / seconds, 4),
                    "images_per_second": round(steps * args.batch_size / seconds, 2)}
            save(out / "last.pt", model, task, args, epoch=epoch, **content)
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                start = time.perf_counter()
                metrics = evaluate(model, task, val_set, args, out)
                line.update({name: metrics[name] for name in (*evaluation.METRICS, "ssl_loss", "ssl_acc") if name in metrics})
                line["eval_seconds"] = round(time.perf_counter() - start, 2)
                score = -metrics["ssl_loss"] if args.setting == "pretrain" else metrics["ap"] or 0.0
                if score > best:
                    best = score
                    save(out / "best.pt", model, task, args, epoch=epoch, **content)
            log.append(line)
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if "eval_seconds" in line:
                evaluation.draw_curves(out / "curves.png", log)
            bar.write(epoch_text(line, args.epochs))
    except KeyboardInterrupt:
        bar.close()
        save(out / "last.pt", model, task, args, epoch=trained, **content)
        print(f"\nstopped after {trained} whole epochs; the weights are in {out / 'last.pt'}: python eval.py {out / 'last.pt'}")
        sys.exit(130)
    bar.close()
    pictures = " and ".join(str(path) for name in ("detections", "ssl", "curves") if (path := out / f"{name}.png").exists())
    print((f"\n{evaluation.table(metrics)}" if args.setting != "pretrain" else "") + f"\nlook at   {pictures}")
    print(f"evaluate  python eval.py {out}")
    if args.setting == "pretrain":
        print(f"next      python train.py --init {out} with the same flags of model and data, without those of the task")
    elif not isaid.has_files(args):
        if args.model == "deformable_detr":
            print("next      DETR on smaller scenes: python train.py @recipes/scenes_detr.txt")
        print("next      your own data: python train.py --data DIR --image_size 512")


def epoch_text(line, epochs):
    """An epoch in one line of text."""
    text = f"epoch {line['epoch']:>3}/{epochs}  loss {line['train_loss']:.3f}"
    if "ap" in line:
        text += "".join(f"  {key.upper()} {evaluation.show(line[key])}" for key in ("ap", "ap50", "ap75"))
    if "ssl_loss" in line:
        text += "  task: " + evaluation.ssl_text(line)
    return text + f"  {line['seconds']:.0f} s, {line['images_per_second']:.1f} images/s, {line['data_wait']:.0%} waiting"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first epoch; later ones are met in fit
        sys.exit(130)
