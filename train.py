"""Train DETR or Deformable DETR: to detect, on a self-supervised task, or on both at once.

    python train.py                              a demonstration: synthetic scenes, CPU, minutes
    python train.py @recipes/detr.txt --data DIR the full-size model on a dataset
    python train.py --setting pretrain --ssl_task mim-continuous --out runs/mim
    python train.py --init runs/mim              detection from a pretraining
    python train.py --setting multitask --ssl_task reconstruct --ssl_weight 0.1

A run is a folder: config.json, log.jsonl (a line an epoch), last.pt, best.pt, and pictures. Without
flags everything has the demonstration's small sizes; recipes hold the large ones.
"""

import os

# Idle OpenMP threads spin before they sleep. The default is so long that two runs on the same cores
# starve each other. OpenMP reads this variable when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import argparse
import collections
import inspect
import math
import shlex
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import deformable_attn
import detr
import isaid
import ssl_tasks
from eval import LOGGED, checkpoint_file, epoch_text, evaluate, metrics_table
from util import checkpoint, cli, dataset_check, distributed, plots
from util.cli import InitAction, Parser, command, number
from util.weights import PARTS, init_from_checkpoint, part_of


# ---------------------------------------------------------------- the losses and the loop
def compute_losses(model, task, images, padding, targets, args):
    """Losses of a batch by name, one value for each decoder layer: {"loss_…": (layers,)}.
    Here detectors and self-supervised tasks meet, in one of three settings:
    detect      the decoder reads the memory of the images
    pretrain    the task reads the memory of corrupted images or features; no decoder runs
    multitask   both: the decoder reads the clean memory, the task the corrupted one"""
    losses, detect, corruption = {}, args.setting != "pretrain", None
    if task:
        corruption = task.sample_corruption(padding, [target["seed"] for target in targets]).to(
            images.device
        )
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        if not task or not task.corrupts:
            corrupted = clean = model.encode(model.features(images, padding))
        else:
            levels = clean = None
            if detect or task.on == "features":
                levels = model.features(images, padding)
            if task.on == "features":  # between CNN and encoder: the CNN sees the images once
                corrupted = task.corrupt_levels(levels, corruption)
            else:
                corrupted = model.features(task.corrupt_images(images, corruption), padding)
            if detect:  # the encoder sees corrupted and clean levels as one batch of 2 B
                both = [a._make(map(torch.cat, zip(a, b))) for a, b in zip(corrupted, levels)]
                memory, B = model.encode(both), len(images)
                corrupted = [level._make(x[:B] for x in level) for level in memory]
                clean = [level._make(x[B:] for x in level) for level in memory]
            else:
                corrupted = model.encode(corrupted)
    if task:
        memory = detr.to_float32(corrupted)
        num_patches = distributed.mean_over_ranks(task.counted_patches(corruption).sum())
        losses["loss_ssl"] = task.loss(memory, images, corruption, num_patches)[None]
    if detect:
        outputs = model.decode(detr.to_float32(clean))
        check_finite(outputs, targets)
        num_boxes = distributed.mean_over_ranks(sum(len(target["labels"]) for target in targets))
        losses.update(model.criterion(outputs, targets, num_boxes))
    return losses


def train(run, train_set, val_set, args):
    """The training loop: epochs of batches, each epoch with its evaluation, log and checkpoint."""
    model, task, optimizer, out = run.model, run.task, run.optimizer, Path(args.out)
    ssl_weight = args.ssl_weight if args.setting == "multitask" else 1.0
    weights = {**model.criterion.weights, "loss_ssl": ssl_weight}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first, metrics = distributed.rank() == 0, None
    bar = tqdm(total=args.epochs * run.steps_per_epoch, initial=(run.epoch - 1) * run.steps_per_epoch + run.step,
               desc="training", unit="step", disable=None if first else True)  # fmt: skip
    with checkpoint.GracefulStop() as signals, bar:
        for epoch in range(run.epoch, args.epochs + 1):
            set_train_mode(model, args)
            done = run.step * args.accumulate  # batches, where the run goes on within an epoch
            loader = isaid.epoch_loader(train_set, args, epoch, done)
            for i, (images, padding, targets) in enumerate(run.timed_batches(loader), done + 1):
                images, padding = images.to(args.device), padding.to(args.device)
                losses = compute_losses(model, task, images, padding, targets, args)
                terms = {name: weights[name] * values.sum() for name, values in losses.items()}
                loss = sum(terms.values())
                check_finite({**losses, "the total": loss}, targets)
                check_divergence(loss, run)
                run.add_losses({**terms, "loss": loss}, 1 / args.accumulate)
                loss = loss / args.accumulate
                loss.backward()
                if i % args.accumulate:
                    continue
                distributed.average_gradients(parameters)
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_max_norm)
                check_finite({"the gradient": norm}, targets)
                optimizer.step()
                optimizer.zero_grad()
                run.schedule.step()
                run.step += 1
                bar.update()
                if distributed.mean_over_ranks(
                    signals.received
                ):  # any process got Ctrl-C or SIGTERM
                    checkpoint.save_resume_state(out / "last.pt", run)
                    there = (
                        f"stopped in epoch {epoch} after {run.step} of {run.steps_per_epoch} steps"
                    )
                    again = f"the same command with --out {shlex.quote(args.out)} --resume"
                    bar.write(f"{there}; to go on, {again}")
                    sys.exit(128 + (signals.received or signal.SIGTERM))

            check_finite(model.state_dict(), ())
            checkpoint.save_resume_state(out / "last.pt", run)
            line = run.log_line(isaid.batch_size(train_set, args) * args.accumulate)
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                metrics, _ = evaluate(model, task, val_set, args, out)
                line.update({name: metrics[name] for name in LOGGED if name in metrics})
                if metrics["score"] >= run.best:  # of equals the last: AP may stay at zero long
                    run.best = metrics["score"]
                    if first:
                        checkpoint.save(out / "best.pt", checkpoint.inference_state(run))
            run.log.append(line)
            if first:
                checkpoint.write_log(out / "log.jsonl", run.log)
                plots.draw_curves(out / "curves.png", run.log)
            bar.write(epoch_text(line, args.epochs))
            run.next_epoch()
        checkpoint.save_resume_state(out / "last.pt", run)
    return metrics


def check_finite(values, targets):
    """FloatingPointError, before any harm is done, if a tensor of `values` is NaN or infinite."""
    finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    bad = [name for name, fine in zip(values, finite) if not fine]
    if bad:
        images = ", ".join(target["file_name"] for target in targets)
        message = f"{' and '.join(bad[:4])} became NaN or infinite"
        message += f", with the images {images}; the step was not taken" if images else ""
        raise FloatingPointError(f"{message}; start anew with a lower --lr")


def check_divergence(loss, run):
    """FloatingPointError if the loss is a hundred times that of the run's first batch."""
    run.first_loss = run.first_loss or max(loss.item(), 1.0)
    if loss > 100 * run.first_loss:
        grown = f"the loss grew from {run.first_loss:.1f} to {loss:.1f}"
        raise FloatingPointError(f"{grown}: nothing is learnt; start anew with a lower --lr")


def set_train_mode(model, args):
    """Training mode, but frozen parts keep their batch statistics and drop nothing out."""
    model.train()
    for part in args.freeze:
        (model.backbone if part == "backbone" else getattr(model.transformer, part)).eval()


def build_optimizer(model, task, args):
    """AdamW with the papers' groups: CNN, sampling offsets and reference points, the rest."""
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
    groups[args.lr] += task.parameters() if task else []
    groups = [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def build_schedule(optimizer, args, steps_per_epoch):
    """The rate of each step as a factor. --lr_drop linear, cycle: up along a line in a tenth of the
    steps, then down to zero along a line or a cosine; N: a tenth every N epochs; 0: constant."""
    warmup = max(1, (total := args.epochs * steps_per_epoch) // 10)

    def factor(step):
        if isinstance(args.lr_drop, int):
            return 0.1 ** (step // (args.lr_drop * steps_per_epoch)) if args.lr_drop else 1.0
        left = 1 - max(0, step - warmup) / max(1, total - warmup)
        cosine = args.lr_drop == "cycle"
        return min((step + 1) / warmup, (1 - math.cos(math.pi * left)) / 2 if cosine else left)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ---------------------------------------------------------------- flags
def build_parser():
    """Every flag; defaults are the demonstration's, names the official ones where there are any."""
    count, natural = number(int), number(int, zero=True)
    size, images = number(int, most=10_000), number(int, most=isaid.MAX_SCENES)
    few, deep = number(int, True, most=256), number(int, most=256)
    rate, factor, share = number(float), number(float, zero=True), number(float, True, most=1)
    parts, switch = tuple(PARTS), argparse.BooleanOptionalAction
    parser = Parser(description=__doc__)

    add = parser.add_argument_group("run").add_argument
    settings = ("detect", "pretrain", "multitask")
    add("--setting", choices=settings, default="detect", help="detection, a task, or both")
    add("--model", choices=tuple(detr.DETECTORS), default="deformable_detr", help="the detector")
    add("--epochs", type=count, default=7, help="passes over the training images")
    add("--seed", type=natural, default=0, help="of weights, order, augmentation and scenes")
    add("--device", type=cli.usable_device, default="auto", help="cpu, cuda, cuda:1, mps")
    add("--out", help="run folder, must not exist; default: a new one in runs/")
    add("--resume", action="store_true", help="go on with the run in --out, or start it")
    add("--overfit", type=images, help="smoke test: train and evaluate on the same few images")
    add("--init", action=InitAction, default=[], help="start from a run or an official checkpoint")
    add("--init_parts", dest="init", nargs="+", choices=parts, action=InitAction, default=[],
        help="only these parts of the --init before it; default: all")  # fmt: skip
    add("--freeze", nargs="+", choices=parts, default=[], help="parts that are not trained")

    add = parser.add_argument_group("data").add_argument
    add("--data", help="a dataset, or to pretrain any folder of images; default: synthetic scenes")
    add("--image_size", type=size, help="N x N pixels; default: 128 for scenes, else multi-scale")
    add("--limit_train", type=images, help="the first training images; default: all, 1000 scenes")
    add("--limit_val", type=images, help="the first held-out images; default: all, 200 scenes")
    add("--workers", type=few, help="loader processes; default: 0 on the CPU, else up to 8")
    add("--augment", choices=isaid.AUGMENT, default="flip", help="see isaid.make_transforms")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=detr.BACKBONES, default="resnet18", help="the CNN, see detr.Backbone")
    add("--backbone_weights", choices=("none", "imagenet"), default="none", help="its start")
    add("--frozen_bn", action=switch, default=False, help="keep batch norm and the first stage")
    add("--dilation", action=switch, default=False, help="DC5: stride 16 instead of 32")
    add("--hidden_dim", type=size, default=128, help="channels of the transformer")
    add("--nheads", type=size, default=8, help="attention heads")
    add("--enc_layers", type=few, default=2, help="encoder layers")
    add("--dec_layers", type=deep, default=3, help="decoder layers")
    add("--dim_feedforward", type=size, default=256, help="hidden channels of its layers")
    add("--dropout", type=share, default=0.0, help="in the transformer")
    add("--num_queries", type=size, default=30, help="objects an image that can be found")
    add("--num_feature_levels", type=deep, default=3, help="strides 8, 16, 32 …; 2: 16, 32; 1: 32")
    add("--with_box_refine", action=switch, default=True, help="layers correct each other's boxes")
    add("--two_stage", action=switch, default=False, help="the encoder proposes the queries")
    add("--aux_loss", action=switch, default=True, help="losses of all decoder layers")
    add("--attn", choices=deformable_attn.BACKENDS, default="auto", help="kernel or reference")

    add = parser.add_argument_group("self-supervised task").add_argument
    add("--ssl_task", choices=tuple(ssl_tasks.TASKS), default="mim-continuous", help="which one")
    add("--ssl_on", choices=("features", "image"), default="features", help="what is corrupted")
    add("--ssl_ratio", type=share, default=0.5, help="share of the patches that is corrupted")
    add("--ssl_patch", type=size, help="pixels a side of a patch; default: the largest stride")
    add("--ssl_loss_on", choices=("corrupted", "all"), default="corrupted", help="what counts")
    add("--ssl_weight", type=factor, default=1.0, help="multitask: of the task's loss")
    add("--vocabulary", type=size, default=64, help="mim-discrete: tokens from k-means")
    add("--tokenizer_weights", help="mim-discrete: DALL-E's encoder.pkl instead of k-means")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=count, default=16, help="images at a time in each process")
    add("--lr", type=rate, default=1e-3, help="learning rate")
    add("--lr_backbone", type=rate, default=1e-3, help="of the CNN")
    add("--lr_linear_proj_mult", type=rate, default=1.0, help="of sampling offsets; officially 0.1")
    add("--weight_decay", type=factor, default=1e-4, help="of AdamW")
    add("--clip_max_norm", type=rate, default=0.1, help="largest norm of the gradient")
    add("--accumulate", type=count, default=1, help="batches a step")
    add("--amp", choices=("auto", "no", "bf16"), default="auto", help="auto: bf16 on CPUs with it")
    add("--compile", action=switch, default=False, help="torch.compile: minutes first, then faster")
    add("--lr_drop", type=number(int, zero=True, words=("linear", "cycle")), default="linear",
        help="a tenth every N epochs; 0: constant; linear, cycle: up and down")  # fmt: skip
    add("--eval_every", type=count, default=1, help="epochs between evaluations")
    return parser


def parse(argv=None):
    """(flags, those given that have no effect in this run); a mistake ends with one line.
    Of a flag that is given twice, as in a recipe and after it, the last one counts."""
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    unset = argparse.Namespace(**dict.fromkeys(defaults, argparse))  # any value that no flag has
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not argparse}
    args = argparse.Namespace(**{**defaults, **given})
    args.image_size = args.image_size or (None if args.data else isaid.SCENE_SIZE)
    trained = {"backbone", "encoder"} if args.setting == "pretrain" else set(PARTS)
    started = {part for _, parts in args.init for part in parts or PARTS}
    started |= {"backbone"} if args.backbone_weights == "imagenet" else set()
    for wrong, message in (
        (trained <= set(args.freeze), "--freeze leaves nothing to train; name fewer parts"),
        (args.frozen_bn and "backbone" not in started,
         "--frozen_bn freezes random layers; add --backbone_weights imagenet or --init"),
        (args.resume and not args.out, "--resume needs --out, the run folder to go on with"),
        (args.augment == "crop" and not args.image_size, "--augment crop needs --image_size N"),
        (args.image_size and args.image_size < 64, "--image_size must be at least 64"),
    ):  # fmt: skip
        if wrong:
            parser.error(message)
    if args.workers is None:
        args.workers = 0 if args.device == "cpu" else min(8, os.cpu_count() or 1)
    args.amp = cli.default_amp(args.device) if args.amp == "auto" else args.amp
    for name in ("data", "tokenizer_weights"):  # eval.py may run elsewhere
        if getattr(args, name):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    return args, [name for name in ignored_flags(args) if name in given]


def ignored_flags(args):
    """Flags that have no effect with these."""
    task = ssl_tasks.TASKS[args.ssl_task] if args.setting != "detect" else None
    tokens, detect = task is ssl_tasks.MaskedTokens, args.setting != "pretrain"
    deformable, whole = args.model == "deformable_detr", any(not x for _, x in args.init)
    used = {"num_feature_levels attn lr_linear_proj_mult": deformable,
            "with_box_refine two_stage": deformable and detect, "backbone_weights": not whole,
            "ssl_on ssl_ratio ssl_loss_on": task and task.corrupts, "ssl_task ssl_patch": task,
            "vocabulary": tokens and not args.tokenizer_weights, "tokenizer_weights": tokens,
            "ssl_weight": task and detect, "dec_layers num_queries aux_loss": detect,
            "limit_train limit_val augment": not args.overfit,
            "lr_backbone": "backbone" not in args.freeze}  # fmt: skip
    return [name for names, use in used.items() if not use for name in names.split()]


# ---------------------------------------------------------------- what a run is made of
def detector_config(args, num_classes):
    """The arguments of detr.build_detector as plain values; saved in the checkpoint."""
    names = inspect.signature(detr.DETECTORS[args.model]).parameters.keys() & vars(args).keys()
    config = {name: getattr(args, name) for name in sorted(names - {"backbone_weights"})}
    return {"name": args.model, "num_classes": num_classes, **config}


def build_model(config, args):
    """(the detector with the weights it starts from, a note about them). Raises ValueError.
    Parts that are not trained get no gradient; a pretraining never runs the decoder."""
    imagenet = args.backbone_weights == "imagenet" and all(parts for _, parts in args.init)
    weights = "IMAGENET1K_V1" if imagenet else None
    try:
        model = detr.build_detector(**config, backbone_weights=weights)
    except OSError as error:  # URLError is one
        message = f"the ImageNet weights of {config['backbone']} cannot be downloaded ({error})"
        raise ValueError(f"{message}; put them into {torch.hub.get_dir()}/checkpoints") from None
    source, anew = {"backbone": weights} if imagenet else {}, []
    for path, parts in args.init:
        taken, names = init_from_checkpoint(model, checkpoint_file(path), parts)
        source.update(dict.fromkeys(taken, path))
        anew = [name for name in anew if part_of(name) not in taken] + names
    parts = {path: [part for part in source if source[part] == path] for path in source.values()}
    note = "; ".join(f"{' and '.join(parts)} from {path}" for path, parts in parts.items())
    if anew:
        note += f"; absent or of another number of classes, start anew: {', '.join(anew)}"
    started = source.keys() - {part_of(name) for name in anew}
    for part in set(args.freeze) - started:
        raise ValueError(f"--freeze {part} would keep random weights; start it with --init")
    idle = [*args.freeze, "decoder"] if args.setting == "pretrain" else args.freeze
    for name, parameter in model.named_parameters():
        if part_of(name) in idle:
            parameter.requires_grad_(False)
    return model, note or "random weights"


def build_task(args, strides, train_set):
    """(the task or None, the arguments to build it again); visual tokens are fitted on images."""
    if args.setting == "detect":
        return None, None
    config = {"name": args.ssl_task, "dim": args.hidden_dim, "strides": list(strides)}
    config.update(patch=args.ssl_patch or max(strides), image_size=args.image_size)
    config.update(ratio=args.ssl_ratio, on=args.ssl_on, loss_patches=args.ssl_loss_on)
    config["hidden_layer"] = args.setting == "multitask"
    if ssl_tasks.TASKS[args.ssl_task] is ssl_tasks.MaskedTokens:
        config.update(vocab_size=args.vocabulary, tokenizer_weights=args.tokenizer_weights)
    task = ssl_tasks.build_task(**config)
    if hasattr(task, "tokenizer") and train_set:
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(args.seed))
        sample = isaid.data_loader(
            train_set, args.workers, batch_size=8, sampler=order[:256].tolist()
        )
        sample = (
            (x, ssl_tasks.patches_inside_image(padding, task.patch)) for x, padding, _ in sample
        )
        task.tokenizer.fit(sample, args.seed)
    if train_set:
        images, padding, _ = isaid.collate([train_set[i] for i in range(min(4, len(train_set)))])
        task.check(images, padding)
    return task.to(args.device), config


def build_run(args):
    """(the run, training images, held-out images, notes), before the first step; ValueError."""
    torch.manual_seed(args.seed)
    train_set, val_set = isaid.load_train_and_val(args)
    steps = len(isaid.epoch_batch_indices(train_set, args, 0)) // args.accumulate
    if not steps:
        images = f"{len(train_set)} training images do not fill a step"
        raise ValueError(f"{images}; lower --batch_size or --accumulate, or start fewer processes")
    state = checkpoint.load_resume_state(args) if args.resume else None
    detector = detector_config(args, max(1, len(train_set.categories)))
    model, start = build_model(detector, args)
    attention = deformable_attn.set_attention_backend(model, args.device, args.attn)
    model.to(args.device, memory_format=torch.channels_last)  # convolutions are faster so
    task, task_config = build_task(args, model.strides, None if state else train_set)
    content = {"args": vars(args), "detector": detector, "task": task_config}
    content.update(categories=train_set.categories, window=dataset_check.median_side(train_set))
    optimizer = build_optimizer(model, task, args)
    schedule = build_schedule(optimizer, args, steps)
    run = checkpoint.Run(model, task, optimizer, schedule, content, steps)
    torch.manual_seed(args.seed + distributed.rank())  # dropout differs between processes
    if state:
        checkpoint.resume(run, state, args.device)
        start = f"resumed in epoch {run.epoch} after {run.step} of {steps} steps"
    if args.compile:
        for name in ("features", "encode", "decode"):
            setattr(model, name, torch.compile(getattr(model, name)))
    return run, train_set, val_set, {"start": start, "attention": attention}


def print_summary(args, run, train_set, val_set, notes):
    """What a user should know before the first step."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    batch = isaid.batch_size(train_set, args) * args.accumulate * distributed.world_size()
    device = checkpoint.device_name(args.device)
    slow = args.model == "detr" and args.setting != "pretrain" and notes["start"][:6] == "random"
    lines = {
        "run": f"{args.out}, seed {args.seed}, revision {checkpoint.revision()}, on {device}",
        "model": f"{args.model}, {args.backbone}, {trained:.1f} M parameters are trained",
        **notes,
        "batch": f"{batch} images a step, {run.steps_per_epoch} steps an epoch, {args.epochs} epochs: "
        f"{run.steps_per_epoch * args.epochs * batch:,} images in all (DETR in the paper: 1,400,000)",
        "precision": args.amp == "bf16" and "bf16 in the CNN and the encoder, fp32 behind them",
        "task": run.task and f"{args.ssl_task}, patches of {run.task.patch} pixels",
        "expect": slow and args.image_size != 64 and "no object for many epochs; see --init",
        "train": dataset_check.summary(train_set, args.num_queries, args.image_size),
        "val": dataset_check.summary(val_set, args.num_queries, args.image_size),
        "classes": ", ".join(f"{c['id']} {c['name']} ({n:,})"
                             for c, n in zip(train_set.categories, dataset_check.class_counts(train_set))),
    }  # fmt: skip
    for name, text in lines.items():
        if text:
            print(f"{name:11} {text}")


@command
def main(argv=None):
    args, ignored = parse(argv)
    args.device = distributed.init(args.device)
    run, train_set, val_set, notes = distributed.run_on_all_ranks(build_run, args)
    args.out = distributed.run_on_rank0(checkpoint.make_run_folder, args)
    notes["not used"] = ", ".join(f"--{name}" for name in ignored)
    print_summary(args, run, train_set, val_set, notes)
    with checkpoint.remove_if_unused(args.out):
        metrics = train(run, train_set, val_set, args)
    if metrics and "per_class" in metrics:
        print(f"\n{metrics_table(metrics)}")
    print(f"\nlook at the pictures; evaluate: python eval.py {shlex.quote(args.out)}")


if __name__ == "__main__":
    main()
