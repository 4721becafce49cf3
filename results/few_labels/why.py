"""What does pretraining change in the encoder?

    python -m results.few_labels.why --seeds 20 21      after python reproduce.py few_labels
    python -m results.few_labels.why                    draw the published measurements again

The memory (the encoder's output) of the clean held-out scenes is measured with random weights,
after each pretraining, before it has seen a label, and of the detector that was trained longest:

    spread   how much of the standard deviation of the memory's features is within an image, a mean
             over the features: 0 if all cells of an image have the same memory
    rank     effective rank: exp of the entropy of the normalized variances along the principal
             components (Roy & Vetterli 2007); at most 128 here
    cka      similarity to the memory of the longest trained detector, 0 to 1: linear centered
             kernel alignment (Kornblith et al. 2019)

Writes a file of measurements per seed and a figure per task to results/few_labels/why or --out.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # if it is started by its path

import isaid
import train
from eval import load_run
from util import checkpoint, plots
from util.cli import NON_NEGATIVE_INT, Parser, cli_main
from util.files import read_json, write_text

TASKS = ["mim-continuous", "mim-discrete", "jigsaw-continuous", "jigsaw-discrete"]
ENCODERS = ["random", *TASKS, "trained"]
MEASURES = {"spread": "spread within an image", "rank": "effective rank", "cka": "CKA to trained"}


# ---------------------------------------------------------------- measurements
@torch.no_grad()
def memory_of(model, data):
    """Return the memory of DETR for a dataset of images of one size: (images, cells, C)."""
    memories = []
    model.eval()
    for images, padding, _ in isaid.data_loader(data, workers=0, batch_size=50):
        (level,) = model.encode(model.features(images, padding))
        memories.append(level.features.flatten(2).transpose(1, 2))  # (B, cells, C)
    return torch.cat(memories).double()


def spread_within_images(memory):
    """Return the share of the standard deviation that is within an image, 0 to 1."""
    within = memory.var(1, correction=0).mean(0).sqrt()  # (C,)
    total = memory.flatten(0, 1).std(0, correction=0)  # (C,)
    return (within / total).mean().item()


def effective_rank(memory):
    """Return exp of the entropy of the variances along the principal components."""
    cells = memory.flatten(0, 1)
    singular_values = torch.linalg.svdvals(cells - cells.mean(0))
    shares = singular_values**2 / (singular_values**2).sum()
    return torch.special.entr(shares).sum().exp().item()


def linear_cka(memory, other_memory):
    """Return the linear centered kernel alignment of two memories of the same cells."""
    x = memory.flatten(0, 1)
    y = other_memory.flatten(0, 1)
    x = x - x.mean(0)
    y = y - y.mean(0)
    alignment = (y.T @ x).norm() ** 2
    return (alignment / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def cell_similarities(memory):
    """Return the mean cosine similarity of each two cells of an image: (cells, cells)."""
    centered = memory - memory.mean((0, 1))
    directions = torch.nn.functional.normalize(centered, dim=-1)
    return (directions @ directions.transpose(1, 2)).mean(0)


def initial_model(run):
    """Return the detector of a TrainedRun as it was before its first step."""
    torch.manual_seed(run.args.seed)
    config = train.detector_config(run.args, len(run.categories))
    model, _ = train.build_model(config, run.args)
    return model


def measure_seed(runs, seed):
    """Return {encoder: {measure: value}} of the run folders in `runs`. Raises ValueError."""
    trained = load_run(runs / f"detr-long-1000-{seed}" / "last.pt", "cpu")
    models = {"random": initial_model(trained), "trained": trained.model}
    for task in TASKS:
        models[task] = load_run(runs / f"detr-pretrain-{task}-{seed}" / "last.pt", "cpu").model
    data = isaid.load_split("val", trained.args, train=False)
    trained_memory = memory_of(trained.model, data)
    measured = {}
    for name in ENCODERS:
        memory = memory_of(models[name], data)
        similarities = cell_similarities(memory).numpy().round(3)
        measured[name] = {
            "spread": spread_within_images(memory),
            "rank": effective_rank(memory),
            "cka": linear_cka(memory, trained_memory),
            "similarities": similarities.tolist(),
        }
    return measured


# ---------------------------------------------------------------- figures
def draw_task(path, measurements, task):
    """Draw the encoder before and after a task and when trained.

    measurements: [{encoder: {measure: value}}], one per seed
    """
    figure = plots.Figure(figsize=(10, 6), layout="constrained")
    similarity_axes, measure_axes = figure.subplots(2, 3)
    for axes, name in zip(similarity_axes, ["random", task, "trained"]):
        similarities = np.mean([measured[name]["similarities"] for measured in measurements], 0)
        picture = axes.imshow(similarities, vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_title(f"{name}: similarity of two cells", fontsize=9)
        axes.set(xlabel="cell", ylabel="cell")
    figure.colorbar(picture, ax=similarity_axes, label="cosine")
    for axes, (measure, title) in zip(measure_axes, MEASURES.items()):
        for x, name in enumerate(ENCODERS):
            values = [measured[name][measure] for measured in measurements]
            color = "grey"
            if name == task:
                color = "C3"
            axes.plot([x] * len(values), values, ".", color=color)
            axes.plot(x, np.mean(values), "_", color=color, markersize=20)
        axes.set_xticks(range(len(ENCODERS)), ENCODERS, rotation=30, ha="right", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_ylim(bottom=0)
    plots.save_figure(path, figure)


# ---------------------------------------------------------------- the command
@cli_main
def main(argv=None):
    root = Path(__file__).resolve().parents[2]
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=NON_NEGATIVE_INT, nargs="+", default=[], help="to measure")
    runs_help = "folder of the runs; default: runs/few_labels"
    parser.add_argument("--runs", type=Path, default=root / "runs/few_labels", help=runs_help)
    out_help = "folder of the measurements; default: results/few_labels/why"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "why", help=out_help)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        content = {"revision": checkpoint.revision(), "encoders": measure_seed(args.runs, seed)}
        write_text(args.out / f"{seed}.json", json.dumps(content) + "\n")
    files = sorted(args.out.glob("*.json"))
    if not files:
        raise ValueError(f"{args.out}: no measurements found; measure some with --seeds")
    measurements = [read_json(path)["encoders"] for path in files]
    print(f"{'encoder':20}" + "".join(f"{title:>28}" for title in MEASURES.values()))
    for name in ENCODERS:
        cells = []
        for measure in MEASURES:
            values = [measured[name][measure] for measured in measurements]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"{name:20}" + "".join(f"{cell:>28}" for cell in cells))
    for task in TASKS:
        draw_task(args.out / f"{task}.png", measurements, task)


if __name__ == "__main__":
    main()
