"""Times our detectors beside transformers' in one process, by turns: a training step and inference
of two 512 x 512 images with ten objects each, as published (ResNet-50, six layers each way), fp32,
the same optimiser, dropout wherever the official code has it; ours in channels-last layout, as
train.py has it. From the repository's root, with transformers installed:
PYTHONPATH=. python results/cost/beside_transformers.py [--keep_memory]"""

import functools
import re
import statistics
import sys
import time

import torch
import transformers

import detr
import train
from util import distributed

REPEATS = 7
torch.manual_seed(0)
SIZE, LABELS, BOXES = 512, torch.arange(10), torch.rand(10, 4) / 5 + 0.3


def ours(name):
    """(model, its loss on images and padding)."""
    args, _ = train.parse([f"@recipes/{name}.txt", "--amp", "no"])
    model = detr.build_detector(**train.detector_config(args, 15))
    model.to(memory_format=torch.channels_last)
    targets = [{"labels": LABELS, "boxes": BOXES, "file_name": "random"}] * 2
    weights = model.criterion.weights

    def loss(images, padding):
        losses = train.compute_losses(model, None, images, padding, targets, args)
        return sum(weights[term] * values.sum() for term, values in losses.items())

    return model, loss


def theirs(name):
    """The same of transformers."""
    stages = ["stage4"] if name == "detr" else ["stage2", "stage3", "stage4"]
    resnet = transformers.ResNetConfig(out_features=stages)
    sizes = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    sizes.update(backbone_config=resnet, auxiliary_loss=True, num_labels=15)
    sizes.update(dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)
    if name == "detr":
        model = transformers.DetrForObjectDetection(transformers.DetrConfig(**sizes))
    else:
        config = transformers.DeformableDetrConfig(**sizes, num_queries=300)
        model = transformers.DeformableDetrForObjectDetection(config)
    for parameter_name, parameter in model.named_parameters():  # 5.24 freezes the whole CNN
        parameter.requires_grad_(not re.search(r"embedder|stages\.0", parameter_name))
    labels = [{"class_labels": LABELS, "boxes": BOXES}] * 2
    return model, lambda images, padding: model(images, ~padding, labels=labels).loss


def step(model, loss, optimizer, *inputs):
    model.train()
    loss(*inputs).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def infer(model, is_ours, images, padding):
    model.eval()
    model(images, padding if is_ours else ~padding)


def by_turns(functions):
    """Median seconds of each, called by turns; the first turn does not count."""
    times = [[] for _ in functions]
    for _ in range(REPEATS + 1):
        for function, found in zip(functions, times):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in times]


if "--keep_memory" in sys.argv:
    distributed.keep_freed_memory()
inputs = torch.randn(2, 3, SIZE, SIZE), torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
print(f"torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
print(f"{torch.get_num_threads()} threads\n")
print("| | ours, s | transformers, s | ratio |\n|---|---|---|---|")
for name in ("detr", "deformable_detr"):
    steps, inferences = [], []
    for build in (ours, theirs):
        model, loss = build(name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        steps.append(functools.partial(step, model, loss, optimizer, *inputs))
        inferences.append(functools.partial(infer, model, build is ours, *inputs))
    for what, functions in (("training step", steps), ("inference", inferences)):
        a, b = by_turns(functions)
        print(f"| {name}, {what} | {a:.2f} | {b:.2f} | {b / a:.2f} |", flush=True)
