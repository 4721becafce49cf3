"""Measure how the cost of a training step grows with image size, levels and queries.

    python -m results.cost.cost [--sizes 128 256 512] [--out runs/cost]

Both detectors have their published architecture (ResNet-50, six encoder and decoder layers) and
random weights. A step has one image with ten objects; every configuration runs in a process of its
own. The table shows medians of the time of the whole step and of its encoder alone, forward and
backward, and the peak memory of the process. Configurations that run out of memory are skipped.

The exponent of a line is measured between its last two columns: 1 means that the cost grows
linearly with the number of pixels (levels, queries), 2 quadratically. Writes cost.md and cost.png.
"""

import concurrent.futures.process
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # if it is started by its path

import detr
import train
from util import distributed, plots
from util.cli import POSITIVE_INT, Parser, cli_main, is_out_of_memory
from util.files import check_writable, write_text

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DETECTORS = {
    "DETR": [f"@{RECIPES / 'detr.txt'}"],
    "DETR-DC5": [f"@{RECIPES / 'detr.txt'}", "--dilation"],
    "Deformable DETR": [f"@{RECIPES / 'deformable_detr.txt'}"],
}
SETTINGS = {"": [], ", multi-task": ["--setting", "multitask", "--ssl_task", "mim-continuous"]}
SWEEPS = {"num_feature_levels": [1, 2, 3, 4], "num_queries": [100, 300, 900]}  # at 512 pixels
UNITS = {"step": "s", "encoder": "s", "memory": "MB"}  # of what is measured


class Config(NamedTuple):
    """A measurement."""

    line: str  # of the table
    varied: str  # the flag that grows along the line
    value: int  # of this flag
    flags: list  # of train.py


def configs(sizes):
    """Yield everything that is measured; sizes: sides of the image in pixels."""
    for name, detector_flags in DETECTORS.items():
        for setting, setting_flags in SETTINGS.items():
            for size in sizes:
                flags = detector_flags + setting_flags + ["--image_size", str(size)]
                yield Config(name + setting, "image_size", size, flags)
    for flag, values in SWEEPS.items():
        for value in values:
            flags = DETECTORS["Deformable DETR"] + ["--image_size", "512", f"--{flag}", str(value)]
            yield Config("Deformable DETR, 512 pixels", flag, value, flags)


# ---------------------------------------------------------------- measure
def measure(flags, repeats):
    """Measure a training step with these flags of train.py.

    Returns {"step": seconds, "encoder": seconds, "memory": MB at the peak}.
    """
    args, _ = train.parse(flags)
    distributed.init(args.device)
    torch.manual_seed(0)
    model = detr.build_detector(**train.detector_config(args, 15)).to(args.device)
    model.to(memory_format=torch.channels_last)
    task, _ = train.build_task(args, model.strides)
    optimizer = train.build_optimizer(model, task, args)
    weights = {**model.criterion.weights, "loss_ssl": 1.0}
    images = torch.randn(1, 3, args.image_size, args.image_size, device=args.device)
    padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=args.device)
    boxes = torch.rand(10, 4) / 5 + torch.tensor([0.4, 0.4, 0.1, 0.1])
    targets = [{"labels": torch.arange(10), "boxes": boxes, "seed": 0, "file_name": "random"}]

    def step():
        losses = train.compute_losses(model, task, images, padding, targets, args)
        loss = sum(weights[name] * values.sum() for name, values in losses.items())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step_seconds = median_seconds(step, args.device, repeats)
    memory = peak_memory(args.device)

    levels = []
    for level in model.features(images, padding):
        levels.append(level.with_features(level.features.detach().requires_grad_()))

    def encode():
        sum(level.features.sum() for level in model.encode(levels)).backward()

    encoder_seconds = median_seconds(encode, args.device, repeats)
    return {"step": step_seconds, "encoder": encoder_seconds, "memory": memory}


def median_seconds(function, device, repeats):
    """Return the median time of a call, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_memory(device):
    """Return the peak memory of the GPU or of this process so far, in MB; NaN on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # in bytes
        return peak / 2**20
    return peak / 2**10  # in KB


# ---------------------------------------------------------------- show
def table(measured):
    """Format the measurements in Markdown, {(line, varied): {value: what `measure` returns}}."""
    rows = []
    for (name, varied), by_value in measured.items():
        values = " | ".join(str(value) for value in by_value)
        rows.append(f"| {name}: {varied} | {values} | exponent |")
        rows.append("|---" * (len(by_value) + 2) + "|")
        for quantity, unit in UNITS.items():
            digits = ".0f" if quantity == "memory" else ".3g"
            cells = [f"{figures[quantity]:{digits}}" for figures in by_value.values()]
            cells.append(exponent(varied, by_value, quantity))
            rows.append(f"| {quantity}, {unit} | {' | '.join(cells)} |")
        rows.append("")
    return "\n".join(rows[:-1])


def exponent(varied, by_value, quantity):
    """Return the power of the number of pixels (levels, queries) by which a quantity grew last.

    The result is a text, "" for fewer than two measurements.
    """
    if len(by_value) < 2:
        return ""
    before, last = list(by_value)[-2:]
    growth = math.log(last / before)
    if varied == "image_size":  # the number of pixels grows as the square of the side
        growth *= 2
    ratio = by_value[last][quantity] / by_value[before][quantity]
    return f"{math.log(ratio) / growth:.2f}"


def draw(path, measured):
    """Plot each quantity against the image's side, a curve per detector; logarithmic axes."""
    curves = {}  # by line of the table
    sizes = set()
    for (name, varied), by_value in measured.items():
        if varied == "image_size":
            curves[name] = by_value
            sizes.update(by_value)
    sizes = sorted(sizes)
    colors = {name: f"C{i}" for i, name in enumerate(DETECTORS)}

    figure = plots.Figure(figsize=(12, 4), layout="constrained")
    for axes, (quantity, unit) in zip(figure.subplots(1, len(UNITS)), UNITS.items()):
        for name, by_value in curves.items():
            detector = name.split(",")[0]
            style = "--" if "multi-task" in name else "-"
            values = [figures[quantity] for figures in by_value.values()]
            axes.plot(list(by_value), values, style, marker=".", color=colors[detector], label=name)
        axes.set(xscale="log", yscale="log", xlabel="image side (pixels)")
        axes.set_title(f"{quantity} ({unit})")
        axes.set_xticks(sizes, sizes)
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plots.save_figure(path, figure)


@cli_main
def main(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--sizes",
        type=POSITIVE_INT,
        nargs="+",
        default=[128, 256, 512, 768, 1024],
        help="sides of the image in pixels",
    )
    add("--repeats", type=POSITIVE_INT, default=3, help="number of timed steps")
    add("--out", type=Path, default=Path("runs/cost"), help="folder for cost.md and cost.png")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    check_writable(args.out / "cost.md")

    measured = {}
    spawn = multiprocessing.get_context("spawn")
    for config in configs(args.sizes):
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:  # peak memory is per process
            try:
                figures = pool.submit(measure, config.flags, args.repeats).result()
            except (RuntimeError, MemoryError) as error:
                was_killed = isinstance(error, concurrent.futures.process.BrokenProcessPool)
                if not was_killed and not is_out_of_memory(error):
                    raise
                print(f"{config.line}, {config.varied} {config.value}: skipped: out of memory")
                continue
        measured.setdefault((config.line, config.varied), {})[config.value] = figures
        texts = [f"{quantity} {figures[quantity]:.3g} {unit}" for quantity, unit in UNITS.items()]
        print(f"{config.line}, {config.varied} {config.value}: {' '.join(texts)}")
    write_text(args.out / "cost.md", table(measured) + "\n")
    draw(args.out / "cost.png", measured)


if __name__ == "__main__":
    main()
