"""Compare the speed of our detectors with that of the package transformers.

    python -m results.cost.beside_transformers

Both are timed in one process in alternating calls: a training step and inference with two images of
512 x 512 pixels with ten objects each. The models have their published architecture (ResNet-50, six
encoder and decoder layers) and the dropout of the official code; both use fp32 and the same
optimizer. Ours are in channels-last layout, as in train.py.
"""

import functools
import re
import statistics
import time
from pathlib import Path

import torch
import transformers

import detr
import train
from util.cli import Parser, cli_main

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
REPEATS = 7
SIZE = 512
CLASSES = 15
LABELS = torch.arange(10)


# ---------------------------------------------------------------- models
def our_model(name, boxes):
    """Build our "detr" or "deformable_detr".

    Returns (model, a function of images and padding that computes the loss).
    """
    args, _ = train.parse([f"@{RECIPES / name}.txt", "--amp", "no"])
    model = detr.build_detector(**train.detector_config(args, CLASSES))
    model.to(memory_format=torch.channels_last)
    targets = [{"labels": LABELS, "boxes": boxes, "file_name": "random"}] * 2
    weights = model.criterion.weights

    def compute_loss(images, padding):
        losses = train.compute_losses(model, None, images, padding, targets, args)
        return sum(weights[name] * values.sum() for name, values in losses.items())

    return model, compute_loss


def their_model(name, boxes):
    """Build the same model of transformers; see `our_model`."""
    if name == "detr":
        stages = ["stage4"]
    else:
        stages = ["stage2", "stage3", "stage4"]
    options = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": transformers.ResNetConfig(out_features=stages),
        "auxiliary_loss": True,
        "num_labels": CLASSES,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
    }
    if name == "detr":
        model = transformers.DetrForObjectDetection(transformers.DetrConfig(**options))
    else:
        config = transformers.DeformableDetrConfig(num_queries=300, **options)
        model = transformers.DeformableDetrForObjectDetection(config)
    for parameter_name, parameter in model.named_parameters():  # 5.24 freezes the whole CNN
        frozen = re.search(r"embedder|stages\.0", parameter_name)
        parameter.requires_grad_(not frozen)
    labels = [{"class_labels": LABELS, "boxes": boxes}] * 2

    def compute_loss(images, padding):
        return model(images, ~padding, labels=labels).loss

    return model, compute_loss


# ---------------------------------------------------------------- time
def train_step(model, compute_loss, optimizer, images, padding):
    """Take a training step."""
    model.train()
    compute_loss(images, padding).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def infer(model, images, mask):
    """Run a model; mask: True = padding for ours, True = image for transformers."""
    model.eval()
    model(images, mask)


def alternating_medians(functions):
    """Return the median seconds of each function; they are called in turn, once to warm up."""
    times = [[] for _ in functions]
    for _ in range(REPEATS + 1):
        for function, function_times in zip(functions, times):
            start = time.perf_counter()
            function()
            function_times.append(time.perf_counter() - start)
    return [statistics.median(function_times[1:]) for function_times in times]


def optimizer_of(model):
    """Build the optimizer of the trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def compare(name, images, padding, boxes):
    """Time a detector and print its two rows of the table."""
    ours, our_loss = our_model(name, boxes)
    theirs, their_loss = their_model(name, boxes)
    steps = [
        functools.partial(train_step, ours, our_loss, optimizer_of(ours), images, padding),
        functools.partial(train_step, theirs, their_loss, optimizer_of(theirs), images, padding),
    ]
    inferences = [
        functools.partial(infer, ours, images, padding),
        functools.partial(infer, theirs, images, ~padding),
    ]
    for title, functions in [("training step", steps), ("inference", inferences)]:
        our_seconds, their_seconds = alternating_medians(functions)
        ratio = their_seconds / our_seconds
        print(
            f"| {name}, {title} | {our_seconds:.2f} | {their_seconds:.2f} | {ratio:.2f} |",
            flush=True,
        )


@cli_main
def main(argv=None):
    Parser(description=__doc__).parse_args(argv)
    torch.manual_seed(0)
    boxes = torch.rand(10, 4) / 5 + 0.3
    images = torch.randn(2, 3, SIZE, SIZE)
    padding = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} threads")
    print("\n| | ours, s | transformers, s | ratio |\n|---|---|---|---|")
    for name in ("detr", "deformable_detr"):
        compare(name, images, padding, boxes)


if __name__ == "__main__":
    main()
