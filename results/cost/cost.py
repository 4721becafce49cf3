"""How the cost of a training step grows with image, levels and queries, on this machine.

    python -m results.cost.cost [--sizes 128 256 512] [--out runs/cost]

Both detectors as published (ResNet-50, six layers each way), one image with ten objects at a time,
random weights, every row in a process of its own. Seconds are medians of the whole step, and of its
encoder alone, forward and backward; memory is the peak of the process. The exponent of a line: the
cost grows as the number of pixels to that power, from the last size but one to the last; 1 is
linear, 2 quadratic. What the memory does not suffice for is left out. Writes cost.md and cost.png.
"""

import concurrent.futures.process
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

import detr
import train
from util import distributed, plots
from util.cli import Parser, command, number
from util.files import check_writable, write_text

DETECTORS = {"DETR": "@recipes/detr.txt", "DETR-DC5": "@recipes/detr.txt --dilation",
             "Deformable DETR": "@recipes/deformable_detr.txt"}  # fmt: skip
SETTINGS = {"": "", ", multi-task": "--setting multitask --ssl_task mim-continuous"}
OTHERS = {"num_feature_levels": (1, 2, 3, 4), "num_queries": (100, 300, 900)}  # at 512 pixels
FIGURES = {"step": "s", "encoder": "s", "memory": "MB"}


def rows(sizes):
    """What is measured: (a line of the table, what grows along it, its value, flags)."""
    for (name, flags), (setting, more) in itertools.product(DETECTORS.items(), SETTINGS.items()):
        for size in sizes:
            yield name + setting, "image_size", size, f"{flags} {more} --image_size {size}"
    for flag, values in OTHERS.items():
        for value in values:
            flags = f"{DETECTORS['Deformable DETR']} --image_size 512 --{flag} {value}"
            yield "Deformable DETR, 512 pixels", flag, value, flags


def measure(flags, repeats):
    """{"step", "encoder": seconds, "memory": MB at the peak} of a row."""
    args, _ = train.parse(flags.split())
    distributed.init(args.device)
    torch.manual_seed(0)
    model = detr.build_detector(**train.detector_config(args, 15)).to(args.device)
    model.to(memory_format=torch.channels_last)
    task, _ = train.build_task(args, model.strides, None)
    optimizer = train.build_optimizer(model, task, args)
    weights = {**model.criterion.weights, "loss_ssl": 1.0}
    images = torch.randn(1, 3, args.image_size, args.image_size, device=args.device)
    padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=args.device)
    boxes = torch.rand(10, 4) / 5 + torch.tensor([0.4, 0.4, 0.1, 0.1])
    targets = [{"labels": torch.arange(10), "boxes": boxes, "seed": 0, "file_name": "random"}]

    def step():
        losses = train.compute_losses(model, task, images, padding, targets, args)
        sum(weights[name] * values.sum() for name, values in losses.items()).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {"step": seconds(step, args.device, repeats), "memory": peak(args.device)}
    levels = [level.with_features(level.features.detach().requires_grad_())
              for level in model.features(images, padding)]  # fmt: skip

    def encode():
        sum(level.features.sum() for level in model.encode(levels)).backward()

    return {**found, "encoder": seconds(encode, args.device, repeats)}


def seconds(function, device, repeats):
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak(device):
    """Most memory that was in use so far, in MB: of the GPU or of this process; NaN on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def table(found):
    """Lines in Markdown of {(line, what grows): {its value: figures}}."""
    text = []
    for (name, grows), line in found.items():
        text += ["", f"| {name}: {grows} | {' | '.join(map(str, line))} | exponent |"]
        text.append("|---" * (len(line) + 2) + "|")
        for figure, unit in FIGURES.items():
            digits = ".0f" if figure == "memory" else ".3g"
            cells = [f"{x[figure]:{digits}}" for x in line.values()]
            cells.append(exponent(grows, line, figure))
            text.append(f"| {figure}, {unit} | {' | '.join(cells)} |")
    return "\n".join(text[1:])


def exponent(grows, line, figure):
    """By which power of the number of pixels (levels, queries) a figure grew at last."""
    if len(line) < 2:
        return ""
    (a, x), (b, y) = [*line.items()][-2:]
    growth = math.log(b / a) * (2 if grows == "image_size" else 1)
    return f"{math.log(y[figure] / x[figure]) / growth:.2f}"


@plots.best_effort
def draw(path, found):
    """Each figure against the image's side, a line a detector and setting; logarithmic axes."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    sizes = sorted({size for (_, grows), line in found.items() if grows == "image_size"
                    for size in line})  # fmt: skip
    for axes, (name, unit) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items()):
        for (label, grows), line in found.items():
            if grows == "image_size":
                style = "--" if "multi-task" in label else "-"
                colour = f"C{[*DETECTORS].index(label.split(',')[0])}"
                values = [x[name] for x in line.values()]
                axes.plot([*line], values, style, marker=".", color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel="image side (pixels)", title=f"{name} ({unit})")
        axes.set_xticks(sizes, sizes)
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


@command
def main(argv=None):
    parser = Parser(description=__doc__)
    add, count = parser.add_argument, number(int)
    add("--sizes", type=count, nargs="+", default=[128, 256, 512, 768, 1024], help="of the image")
    add("--repeats", type=count, default=3, help="steps, of which the median counts")
    add("--out", type=Path, default=Path("runs/cost"), help="folder for cost.md and cost.png")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    check_writable(args.out / "cost.md")
    found, fresh = {}, multiprocessing.get_context("spawn")
    for name, grows, value, flags in rows(args.sizes):
        with concurrent.futures.ProcessPoolExecutor(1, fresh) as process:  # has a peak of its own
            try:
                figures = process.submit(measure, flags, args.repeats).result()
            except concurrent.futures.process.BrokenProcessPool:
                print(f"{name}, {grows} {value}: ended, probably for lack of memory")
                continue
        found.setdefault((name, grows), {})[value] = figures
        said = (f"{figure} {figures[figure]:.3g} {unit}" for figure, unit in FIGURES.items())
        print(f"{name}, {grows} {value}:", *said)
    write_text(args.out / "cost.md", table(found) + "\n")
    draw(args.out / "cost.png", found)


if __name__ == "__main__":
    main()
