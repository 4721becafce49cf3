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
import contextlib
import ctypes
import datetime
import functools
import inspect
import itertools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.utils.checkpoint
import torchvision
from tqdm import tqdm

import deformable_attn
import detr
import eval as evaluation
import isaid
import parallel
import run_state
import ssl_tasks

# flags that belong to one kind of model, setting or task, with their defaults there
DEFORMABLE = {"num_feature_levels": 3, "enc_n_points": 4, "dec_n_points": 4, "with_box_refine": True, "two_stage": False,
              "attn": "auto"}
SSL = {"ssl_task": "mim-continuous", "ssl_on": "features", "ssl_patch": None}
CORRUPTION = {"ssl_ratio": 0.5, "ssl_loss_on": "corrupted"}
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
    run("--resume", nargs="?", const="last.pt", metavar="FILE",
        help="go on with the run in --out, with the same flags, from its last.pt or another file there; if there is none yet, start it")
    run("--save_every", type=count, metavar="N", help="save last.pt every N steps (default: once an epoch)")
    run("--overfit", type=count, metavar="N",
        help="a smoke test: train and evaluate on the same N images, not augmented, 50 steps an epoch")
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
    data("--repeat_factor", type=isaid.number(float, most=1), metavar="P",
         help="show images more often whose classes are in less than this share of all, as for LVIS, 0.01 say (default: off)")
    data("--skip_bad", action=switch, default=False, help="read every image before the first step and leave out those that cannot be read")
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
    ssl("--ssl_loss_on", choices=("corrupted", "all"), help="patches that count (default corrupted)")
    ssl("--ssl_weight", type=factor, metavar="F", help="multitask: weight of the task's loss (default 1)")
    ssl("--tokenizer", choices=("kmeans", "dalle"), help="where mim-discrete has its visual tokens from (default kmeans)")
    ssl("--tokenizer_weights", metavar="FILE", help="dalle: the encoder.pkl that OpenAI published")
    ssl("--tokenizer_images", type=count, metavar="N", help="training images that a tokenizer looks at (default 256)")
    ssl("--vocabulary", type=count, metavar="N", help="number of k-means tokens (default 64)")

    optim = parser.add_argument_group("optimisation").add_argument
    optim("--batch_size", type=count, default=8, metavar="N", help="images at a time in each process (default %(default)s)")
    optim("--lr", type=rate, default=5e-4, metavar="R", help="learning rate (default %(default)s)")
    optim("--lr_backbone", type=rate, default=5e-4, metavar="R", help="of the CNN (default %(default)s)")
    optim("--lr_linear_proj_mult", type=rate, default=0.1, metavar="F",
          help="factor for sampling offsets and reference points (default %(default)s)")
    optim("--weight_decay", type=factor, default=1e-4, metavar="F", help="(default %(default)s)")
    optim("--clip_max_norm", type=rate, default=0.1, metavar="F", help="largest norm of the gradient (default %(default)s)")
    for name, text in (("cls", "2, detr: 1"), ("bbox", "5"), ("giou", "2")):
        optim(f"--{name}_loss_coef", type=factor, metavar="F", help=f"weight of the loss (default {text})")
    optim("--accumulate", type=count, default=1, metavar="N", help="batches a step, as one N times as large (default %(default)s)")
    optim("--amp", choices=("bf16", "fp16"), help="compute in half precision; weights, matching and losses stay in fp32 (default: off)")
    optim("--compile", action=switch, default=False, help="torch.compile the model: minutes at first, faster then on a GPU")
    optim("--checkpoint_activations", action=switch, default=False,
          help="compute layers twice instead of keeping what they computed: less memory")
    optim("--ema", type=share, metavar="DECAY",
          help="average the weights over steps, 0.999 say; the averages are evaluated and are best.pt's (default: off)")
    optim("--lr_schedule", choices=("onecycle", "step"), default="onecycle",
          help="up and down again, or one drop to a tenth (default %(default)s)")
    optim("--lr_drop", type=count, metavar="EPOCH", help="epochs before the drop of `step` (default 40)")
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
                parser.error(f"--{name} belongs to {where}; add that or leave this out")
            if getattr(args, name) is None and belongs:
                setattr(args, name, default)
    settle(DEFORMABLE, args.model == "deformable_detr", "--model deformable_detr")
    settle(SSL, args.setting != "detect", "--setting pretrain or multitask")
    settle(CORRUPTION, args.ssl_task and ssl_tasks.TASKS[args.ssl_task].corrupts, "an --ssl_task that corrupts something")
    settle({"ssl_weight": 1.0}, args.setting == "multitask", "--setting multitask")
    settle(dict.fromkeys(("cls_loss_coef", "bbox_loss_coef", "giou_loss_coef")), args.setting != "pretrain",
           "--setting detect or multitask")
    settle({"lr_drop": 40}, args.lr_schedule == "step", "--lr_schedule step")
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
    trained = ("backbone", "encoder") if args.setting == "pretrain" else detr.PARTS
    if set(trained) <= set(args.freeze):
        parser.error("--freeze leaves nothing to train; name fewer parts")
    if set(args.freeze) - set(trained):
        parser.error("--freeze decoder: a pretraining has no decoder; leave it out")
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
    if args.frozen_bn and args.backbone_weights == "none" and "backbone" not in ((args.init_parts or detr.PARTS) if args.init else ()):
        parser.error("--frozen_bn keeps random layers frozen here; add --backbone_weights imagenet or --init")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the run folder to go on with")
    if args.overfit:
        args.limit_train = args.overfit
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


def start_model(config, args):
    """The model with the weights that a run starts from, and what to say of them. Raises ValueError if frozen parts would be random."""
    weights = "none" if args.init and not args.init_parts else args.backbone_weights
    model, loaded, notes = build_model(config, weights), {"backbone"} if weights == "imagenet" else set(), []
    if args.init:
        taken, left, dropped = detr.load_weights(model, evaluation.checkpoint_file(args.init), args.init_parts)
        loaded = {*loaded, *taken} - {detr.part_of(name) for name in dropped}
        notes.append(f"init        {args.init}: {' and '.join(taken)} taken"
                     + (f"; {' and '.join(left)} not" if left else "")
                     + (f"; of another number of classes and dropped: {', '.join(dropped)}" if dropped else ""))
    for part in args.freeze:
        if part not in loaded:
            what = f"not all of them are taken from {args.init}" if args.init else "start it from a run with --init"
            raise ValueError(f"--freeze {part} keeps random weights; {what}")
    return model, notes


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
    mmap_max, trim_threshold = -4, -1  # the numbers of these options in malloc.h
    mallopt(mmap_max, 0)  # nothing apart from the heap …
    mallopt(trim_threshold, -1)  # … and nothing of the heap given back: the largest number


def train_mode(model, args):
    """Training mode, but frozen parts keep their batch statistics and drop nothing out."""
    model.train()
    for part in args.freeze:
        {"backbone": model.backbone, "encoder": model.transformer.encoder, "decoder": model.transformer.decoder}[part].eval()


def build_task(args, model, train_set, fit=True):
    """The self-supervised task; its visual tokens are fitted on a sample of the training images, unless a checkpoint has them."""
    task = ssl_tasks.build_task(args.ssl_task, args.hidden_dim, list(model.strides), args.ssl_patch, args.tokenizer,
                                args.vocabulary, args.tokenizer_weights, ratio=args.ssl_ratio, on=args.ssl_on,
                                loss_on=args.ssl_loss_on, image_size=args.image_size)
    if task.tokens and fit:
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(args.seed))[:args.tokenizer_images]
        loader = isaid.loader(train_set, args.workers, batch_size=args.batch_size, sampler=order.tolist())
        sample = tqdm(loader, "images for visual tokens", leave=False, disable=parallel.hidden())
        task.tokenizer.fit(((images, ssl_tasks.whole_patches(padding, task.patch)) for images, padding, _ in sample), args.seed)
    return task


def epoch_batches(data, args, epoch):
    """The shuffled batches of an epoch for this process, as lists of items; they depend on (seed, epoch) alone.

    What is left over at the end and does not fill a step of all processes is left out.
    """
    generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
    items, size = torch.arange(len(data)), args.batch_size
    if args.overfit:
        items = torch.arange(50 * size * args.accumulate * parallel.world())
    elif args.repeat_factor:
        items = repeated(isaid.repeat_factors(data, args.repeat_factor), torch.rand((), generator=generator))
    order = items[torch.randperm(len(items), generator=generator)].tolist()
    batches = [order[i:i + size] for i in range(0, len(order) - size + 1, size)]
    together = args.accumulate * parallel.world()
    return batches[:len(batches) // together * together][parallel.rank()::parallel.world()]


def epoch_loader(data, args, epoch, done=0):
    """Loads the batches of an epoch after the first `done`."""
    data.epoch = epoch
    return isaid.loader(data, args.workers, batch_sampler=epoch_batches(data, args, epoch)[done:], pin_memory=args.pin_memory,
                        prefetch_factor=args.prefetch if args.workers else None)


def repeated(factors, offset):
    """Items of an epoch that shows image i factors[i] times on average, in every epoch as many in all; see isaid.Detection for items."""
    total = factors.double().cumsum(0)
    until = (total * (total[-1].round() / total[-1]) + offset).floor().long()  # whole numbers that keep step with the sums
    times = until.diff(prepend=torch.zeros(1, dtype=torch.int64))
    first = torch.arange(len(factors)).repeat_interleave(times)
    again = torch.arange(len(first)) - (until - times).repeat_interleave(times)  # 0 the first time, 1 the second …
    return first + len(factors) * again


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
    """A new folder for the run; an existing one is never written into, unless it is to be resumed."""
    if args.out is None:
        kind = args.setting if args.setting == "detect" else f"{args.setting}-{args.ssl_task}"
        names = (f"runs/{args.model}-{kind}-{n}" for n in itertools.count(1))
        args.out = next(name for name in names if not Path(name).exists())
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=bool(args.resume))
        run_state.enter(out)
    except FileExistsError:
        raise ValueError(f"--out {out} exists already; name a new folder, remove it, or go on with it: --resume") from None
    except BlockingIOError:
        raise ValueError(f"--out {out}: another process is training in it; wait for its end, or stop it") from None
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made ({error.strerror})") from None
    return out


def choose_attention(model, args):
    """Let the model's attention run as --attn says; returns which implementation that is, in words. Raises ValueError if it cannot."""
    if args.model != "deformable_detr":
        return "scaled_dot_product_attention"
    name, reason = deformable_attn.backend(args.device, args.attn)
    for module in model.modules():
        if isinstance(module, deformable_attn.MSDeformAttn):
            module.backend = name
    return f"{name}: {reason}"


def introduce(args, run, notes, train_set, val_set):
    """What a user should know before the first step."""
    model, task = run.model, run.task
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    cuda = args.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"{args.device}, {torch.get_num_threads()} threads"
    print(f"revision    {git_revision()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"run         {args.out}, seed {args.seed}")
    print(f"device      {device}")
    print(f"model       {args.model}, {args.backbone}, {parameters / 1e6:.1f} M parameters"
          + (f" and {frozen / 1e6:.1f} M not trained" if frozen else ""))
    print("\n".join(notes))
    batch = args.batch_size * args.accumulate * parallel.world()
    print(f"batch       {batch} images a step, {run.steps} steps an epoch, "
          f"{args.epochs} epochs: {run.steps * args.epochs * batch:,} images in all "
          + ("(the paper's pretraining: 10 epochs of iSAID or ImageNet)" if args.setting == "pretrain" else
             "(the paper's recipe: 50 epochs of iSAID, 1,400,000)"))
    print("size        " + (f"{args.image_size} x {args.image_size} pixels" if args.image_size else "the shorter side 480 to 800 pixels"))
    if task:
        where = "the image" if task.on == "image" else "the feature maps"
        number = ((args.image_size or 480) // task.patch) ** 2
        print(f"task        {args.ssl_task}, patches of {task.patch} pixels"
              + (f", {task.ratio:.0%} of them corrupted in {where}" if task.corrupts else ", none is corrupted: --ssl_on does not matter")
              + (f", {len(task.tokenizer.codes):,} visual tokens ({args.tokenizer})" if task.tokens else ""))
        if task.corrupts and number < 16:
            print(f"            an image has only {number} patches; a larger --image_size or a smaller --ssl_patch gives more")
        if task.corrupts and task.on == "features" and task.patch < max(task.strides):
            print("            a cell of a coarser map that touches a corrupted patch is masked: of such maps little is left")
    for name, data in (("train", train_set), ("val", val_set)):
        if args.setting == "pretrain":
            print(f"{name:11} {data.name}: {len(data):,} images" + ("" if args.data_unlabeled else ", their annotations are not used"))
            continue
        tiny = data.tiny(args.image_size) if args.image_size else 0
        print(f"{name:11} {data.name}: {len(data):,} images, {sum(data.counts()):,} boxes"
              + (f", {data.clipped:,} clipped to their image" if data.clipped else "")
              + (f", {data.removed:,} without area removed" if data.removed else "")
              + (f", {tiny:,} under a pixel after resizing, not trained on" if tiny else ""))
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

class BadStep(Exception):
    """A loss or gradient that is NaN or infinite; the run is as it was before the step, but for batch norm's statistics."""


class Learner(torch.nn.Module):
    """The losses of a batch; where detectors and self-supervised tasks meet. (A module, so that several processes can share it.)"""

    def __init__(self, model, task, args):
        super().__init__()
        self.model, self.task, self.setting = model, task, args.setting
        self.amp = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[args.amp]

    def forward(self, images, padding, targets, corruption, totals):
        """Every loss by name, a value for each decoder layer. totals: the `counts` of all that belongs to the step."""
        losses, outputs = {}, None
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            if self.task:
                corrupted, memory = ssl_tasks.encode(self.model, self.task, images, padding, corruption, clean=self.setting == "multitask")
            else:
                memory = self.model.encode(self.model.features(images, padding))
            if self.setting != "pretrain":
                outputs = self.model.decode(memory)
        if self.task:
            corrupted = [level._replace(features=level.features.float()) for level in corrupted]
            losses["loss_ssl"] = self.task.loss(corrupted, images, corruption, totals["patches"])[None]
        if outputs:
            outputs = {name: tensor.float() for name, tensor in outputs.items()}
            losses.update(detr.detection_losses(outputs, targets, self.model.focal, totals))
        return losses


def counts(model, task, targets, corruption):
    """What the losses of a batch are divided by; see detr.loss_counts."""
    return {**detr.loss_counts(targets, model.num_queries, model.focal), "patches": int(task.counted(corruption).sum()) if task else 0}


def steps_of(loader, task, args):
    """The batches of each step: lists of (images, padding, targets, corruption)."""
    batches = []
    for images, padding, targets in loader:
        corruption = task.corruption(padding, [target["seed"] for target in targets]) if task else None
        batches.append((images, padding, targets, corruption))
        if len(batches) == args.accumulate:
            yield batches
            batches = []


def take_step(learner, batches, run, args):
    """One step of the optimizer over one or more batches: {name: loss}. Raises FloatingPointError before weights are spoilt."""
    model, task = run.model, run.task
    totals = collections.Counter()
    for _, _, targets, corruption in batches:
        totals.update(counts(model, task, targets, corruption))
    # gradients are averaged over processes, so each divides by its share of what all have
    totals = {name: max(value, 1) / parallel.world() for name, value in parallel.total(totals).items()}
    weights, sums = loss_weights(args), collections.Counter()
    run.optimizer.zero_grad()
    for i, (images, padding, targets, corruption) in enumerate(batches):
        images, padding = (x.to(args.device, non_blocking=True) for x in (images, padding))
        corruption = corruption.to(args.device) if corruption else None
        alone = contextlib.nullcontext() if i == len(batches) - 1 or parallel.world() == 1 else learner.no_sync()
        with alone:
            losses = learner(images, padding, targets, corruption, totals)
            total = detr.total_loss(losses, weights)
            if not total.isfinite():
                bad = [name for name, loss in losses.items() if not loss.isfinite().all()]
                raise FloatingPointError(f"{' and '.join(bad) or 'the total'} is NaN or infinite")
            run.scaler.scale(total).backward()
        for name, loss in losses.items():
            sums[name] += loss[-1].detach()  # stays on the device: no waiting for it here
        sums["loss"] += total.detach()
    run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_max_norm)
    # with fp16 the scaler leaves such a step out and scales by less, but where it does not scale any more that is no help
    if not norm.isfinite() and run.scaler.get_scale() <= 1:
        raise FloatingPointError("the gradient is NaN or infinite")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.schedule.step()
    if run.ema:
        run.ema.update_parameters(model)
    return sums


def train_epoch(learner, run, train_set, args, bar, pause):
    """The rest of an epoch; its losses and times are added to the run's. `pause` is called after each step."""
    train_mode(run.model, args)
    loader = epoch_loader(train_set, args, run.epoch, run.step * args.accumulate)
    start = ready = time.perf_counter()
    for batches in steps_of(loader, run.task, args):
        run.waited += time.perf_counter() - ready
        before = run.random_state()
        try:
            sums = take_step(learner, batches, run, args)
        except FloatingPointError as error:
            names = {image["id"]: image["file_name"] for image in train_set.images}
            names = [names[target["image_id"]] for _, _, targets, _ in batches for target in targets]
            run.random = before
            raise BadStep(f"{error} in step {run.step + 1} of epoch {run.epoch}, with the images {', '.join(names)}") from None
        for name, value in sums.items():
            run.sums[name] = run.sums.get(name, 0) + value
        run.step += 1
        bar.update()
        run.seconds += time.perf_counter() - start
        start = time.perf_counter()
        pause()
        ready = time.perf_counter()


def loss_weights(args):
    """The weight of each loss, by name: the official ones unless a flag says otherwise."""
    weights = detr.loss_weights(detr.DETECTORS[args.model].focal)
    flags = {"loss_ce": args.cls_loss_coef, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    ssl = 1.0 if args.ssl_weight is None else args.ssl_weight
    return {**weights, **{name: value for name, value in flags.items() if value is not None}, "loss_ssl": ssl}


# ---------------------------------------------------------------- the loop

def evaluate(model, task, val_set, args, out):
    """Metrics on the held-out images, and the pictures of them in the run folder."""
    metrics, how, first = {}, (args.batch_size, args.workers, args.device), parallel.rank() == 0
    if args.setting != "pretrain":
        results = evaluation.predict(model, val_set, *how)
        if first:
            metrics = {**evaluation.coco_metrics(val_set, results), "collapsed": evaluation.collapsed(val_set, results)}
            evaluation.draw_detections(out / "detections.png", val_set, results)
        metrics = parallel.first(metrics)
    if task:
        found, panels = evaluation.ssl_metrics(model, task, val_set, *how)
        metrics.update(found)
        if first:
            evaluation.draw_ssl(out / "ssl.png", panels, task.patch)
    return metrics


def open_data(args):
    """The images to train on and those held out, and the number of steps of an epoch. Raises ValueError."""
    held_out = "train" if args.overfit else "val"
    train_set, val_set = isaid.open_split("train", args, train=not args.overfit), isaid.open_split(held_out, args, train=False)
    if train_set.categories != val_set.categories:
        raise isaid.DataError(f"the classes of {train_set.name} ({isaid.class_names(train_set.categories)}) are not those "
                              f"of {val_set.name} ({isaid.class_names(val_set.categories)})")
    args.batch_size = min(args.batch_size, len(train_set))
    steps = len(epoch_batches(train_set, args, 0)) // args.accumulate
    if not steps:
        raise ValueError(f"{len(train_set)} training images do not fill a step of {args.batch_size} x {args.accumulate} images in "
                         f"{parallel.world()} processes; lower --batch_size or --accumulate")
    return train_set, val_set, steps


def build(args, train_set, state):
    """(arguments of the detector, model, task, what to say of them), as they start or for the state to go on from. Raises ValueError."""
    config = detector_config(args, max(1, len(train_set.categories)))
    model, notes = (build_model(config, "none"), []) if state else start_model(config, args)
    freeze(model, args)
    notes.insert(0, f"attention   {choose_attention(model, args)}")
    task = build_task(args, model, train_set, fit=not state).to(args.device) if args.setting != "detect" else None
    return config, model, task, notes


def prepare(args):
    """All that comes before the first step: (folder, run, data, what to say of the start). Raises ValueError if the input is wrong;
    images are looked at only when they are needed, unless --skip_bad is set."""
    train_set, val_set, steps = parallel.everywhere(open_data, args)
    state = parallel.everywhere(run_state.open_checkpoint, args) if args.resume else None
    config, model, task, notes = parallel.everywhere(build, args, train_set, state)
    if bad := train_set.bad + val_set.bad:
        notes.append(f"skipped     {len(bad)} images that cannot be used, the first: {bad[0]}")
    out = parallel.from_first(make_run_folder, args)
    args.out = str(out)
    parallel.from_first(run_state.check_disk, out, model, args.ema)
    model.to(args.device, memory_format=torch.channels_last)  # convolutions are faster so
    content = {"detector": config, "categories": train_set.categories, "window": window_size(train_set)}
    run = run_state.Run(model, task, args, content, steps)
    if state:
        parallel.everywhere(run.load, state, Path(args.out, args.resume))
        notes.append(f"resumed     in epoch {run.epoch} after {run.step} of {steps} steps" if run.epoch <= args.epochs else
                     "resumed     the run is complete")
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile:
        for name in ("features", "encode", "decode"):
            setattr(model, name, torch.compile(getattr(model, name)))
    return out, run, train_set, val_set, notes


def checkpoint_activations(model):
    """Compute the transformer's layers once more in the backward pass instead of keeping what they computed."""
    for stack in (model.transformer.encoder, model.transformer.decoder):
        for layer in stack.layers:
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    args.device = parallel.start(args.device)
    if args.device == "cpu":
        keep_memory()
    torch.manual_seed(args.seed)
    try:
        out, run, train_set, val_set, notes = prepare(args)
    except ValueError as error:
        run_state.leave(Path(args.out or ""))
        sys.exit(f"error: {isaid.one_line(error)}")
    torch.manual_seed(args.seed + parallel.rank())  # dropout differs between processes
    introduce(args, run, notes, train_set, val_set)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    if parallel.rank() == 0:
        (out / "config.json").write_text(json.dumps({"args": vars(args), "versions": versions, "revision": git_revision(),
                                                     "started": datetime.datetime.now().isoformat(timespec="seconds")}, indent=1))
    try:
        fit(args, out, run, train_set, val_set)
    except (isaid.DataError, OSError) as error:
        where = f"{out}: " if getattr(error, "errno", None) and not error.filename else ""  # a disk that is full
        sys.exit(f"error: {where}{isaid.one_line(error)}{what_is_left(out)}")
    except FloatingPointError as error:
        sys.exit(f"error: {error}; start anew with a lower --lr")
    except BadStep as error:
        name = f"failed{f'-{parallel.rank()}' if parallel.rank() else ''}.pt"
        run_state.save(out / name, run.state(alone=True))
        launcher = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}" if parallel.world() > 1 else "python"
        again = shlex.join([*argv, *([] if "--out" in argv else ["--out", str(out)]), "--resume", name])
        sys.exit(f"error: {error}; start anew with a lower --lr. The step was not taken. The same batch again: {launcher} train.py {again}")
    except KeyboardInterrupt as interrupt:
        print(f"\nstopped in epoch {run.epoch} after {run.step} of {run.steps} steps" + what_is_left(out))
        sys.exit(interrupt.args[0] if interrupt.args else 130)
    except RuntimeError as error:
        known = [text for sign, text in FAILURES.items() if sign in str(error)]
        if not known:
            raise
        sys.exit(f"error: {known[0]}{what_is_left(out)}")
    finally:
        run_state.leave(out)


FAILURES = {"DataLoader worker": "a loader process was killed, perhaps for want of memory; fewer --workers need less",
            "by peer": "another process has ended, its message says why",  # a connection was closed or reset
            "out of memory": "the device's memory is too small; a lower --batch_size, --amp bf16 and --checkpoint_activations need less"}


def what_is_left(out):
    if not (out / "last.pt").exists():
        return "; nothing was saved yet"
    return f"; what was saved is in {out / 'last.pt'}; to go on, the same command with --out {out} --resume"


def fit(args, out, run, train_set, val_set):
    """The training loop: epochs, evaluation, log, checkpoints, pictures."""
    learner, metrics, first = Learner(run.model, run.task, args), None, parallel.rank() == 0
    if parallel.world() > 1:
        learner = torch.nn.parallel.DistributedDataParallel(learner)

    def save_state():
        state = run.state()
        if first:
            with signals.held():
                run_state.save(out / "last.pt", state)

    def pause():
        """After each step: is it time to save or to stop?"""
        stop = parallel.total({"caught": signals.caught})["caught"] > 0  # by any process
        if stop or args.save_every and run.step % args.save_every == 0:
            save_state()
        if stop:
            raise KeyboardInterrupt(128 + (signals.caught or signal.SIGTERM))
    bar = tqdm(total=args.epochs * run.steps, initial=(run.epoch - 1) * run.steps + run.step, desc="training", unit="step",
               disable=parallel.hidden(), smoothing=0.02)
    run.restore_random()
    with run_state.Signals() as signals, bar:
        while run.epoch <= args.epochs:
            train_epoch(learner, run, train_set, args, bar, pause)
            if not all(tensor.isfinite().all() for tensor in run.model.state_dict().values()):
                raise FloatingPointError("the model's weights became NaN or infinite")
            save_state()
            signals.at_once = True  # nothing is lost from here on
            signals.check()
            line = epoch_line(run, args)
            if run.epoch % args.eval_every == 0 or run.epoch == args.epochs:
                start = time.perf_counter()
                parallel.share_buffers(run.best_model)
                metrics = evaluate(run.best_model, run.task, val_set, args, out)
                line.update({name: metrics[name] for name in (*evaluation.METRICS, "ssl_loss", "ssl_acc") if name in metrics})
                line["eval_seconds"] = round(time.perf_counter() - start, 2)
                score = -metrics["ssl_loss"] if args.setting == "pretrain" else metrics["ap"] or 0.0
                if score >= run.best:  # of equals the last: AP may stay at zero for a while
                    run.best = score
                    if first:
                        with signals.held():
                            run_state.save(out / "best.pt", run.product(run.best_model))
            run.log.append(line)
            if first:
                write_log(out, run.log)
            bar.write(epoch_text(line, args.epochs))
            if "ap" in line and metrics["collapsed"]:
                bar.write("warning: the same is found in every image: the model does not look at them, not yet or not any more; see that "
                          "--overfit 4 works")
            run.epoch += 1
            run.begin_epoch()
            signals.at_once = False
        save_state()
    conclude(args, out, metrics, train_set.bad + val_set.bad)


def epoch_line(run, args):
    """The log's line of an epoch: losses are means over steps and processes."""
    sums = parallel.total({name: float(value) for name, value in run.sums.items()})
    losses = {f"train_{name}": value / (run.steps * parallel.world()) for name, value in sums.items()}
    images = run.steps * args.batch_size * args.accumulate * parallel.world()
    seconds = max(run.seconds, 1e-9)
    return {"epoch": run.epoch, **losses, "seconds": round(seconds, 2), "data_wait": round(run.waited / seconds, 4),
            "images_per_second": round(images / seconds, 2)}


def write_log(out, log):
    """log.jsonl and its curves; written anew each time, so that no epoch is doubled or missing after an interruption."""
    (out / "log.tmp").write_text("".join(json.dumps(line) + "\n" for line in log))
    os.replace(out / "log.tmp", out / "log.jsonl")
    if "eval_seconds" in log[-1]:
        evaluation.draw_curves(out / "curves.png", log)


def conclude(args, out, metrics, bad):
    """What to look at and to do next."""
    if metrics and args.setting != "pretrain":
        print(f"\n{evaluation.table(metrics)}")
    pictures = " and ".join(str(path) for name in ("detections", "ssl", "curves") if (path := out / f"{name}.png").exists())
    if bad:
        print(f"\nleft out  {len(bad)} images that cannot be used, the first: {bad[0]}")
    print(f"\nlook at   {pictures}\nevaluate  python eval.py {out}")
    if args.setting == "pretrain":
        data = "--data DIR and the same flags of the model" if args.data_unlabeled else "the same flags of model and data"
        print(f"next      python train.py --init {out} with {data}, without those of the task")
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
        text += "  held-out task: " + evaluation.ssl_text(line)
    return text + f"  {line['seconds']:.0f} s, {line['images_per_second']:.1f} images/s, {line['data_wait']:.0%} waiting"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first step; later ones are met in main
        sys.exit(130)
