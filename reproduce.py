"""Run the rows of a table that are missing and print it: mean and standard deviation over seeds.

    python reproduce.py recipes/tasks.txt                            every task, setting and detector: is it learnt?
    python reproduce.py recipes/first_epochs.txt --seeds 0 1 2       does it help detection in the first epochs?

A table is a text file with a row a line, `name: flags of train.py`; {name} in the flags is the run folder of another row.
Runs are kept in runs/TABLE/NAME-SEED, and whole ones are not run again; beside them table.md and curves.png are written.
"""
import argparse
import concurrent.futures
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import eval as evaluation
import isaid
import ssl_tasks
import train

ROOT = Path(__file__).resolve().parent


def read_table(path):
    """The rows of a table: {name: list of flags}. Raises ValueError naming the line."""
    rows = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from None
    for n, line in enumerate(lines, 1):
        name, colon, flags = line.split("#")[0].partition(":")
        if not line.split("#")[0].strip():
            continue
        if not colon or not re.fullmatch(r"[\w-]+", name.strip()) or name.strip() in rows:
            raise ValueError(f"{path}, line {n}: expected is a new name, a colon and flags of train.py, not {line!r}")
        for start in re.findall(r"{(.*?)}", flags):
            if start not in rows or "{" in " ".join(rows[start]):
                raise ValueError(f"{path}, line {n}: {{{start}}} is not a row above it that starts by itself")
        rows[name.strip()] = flags.split()
    return rows


def log_of(run):
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_row(folder, name, flags, seed, threads):
    """Run one row with one seed unless its run is whole; the lines of its log. Raises RuntimeError if train.py fails."""
    run = folder / f"{name}-{seed}"
    flags = [re.sub(r"{(.*?)}", lambda match: str(folder / f"{match[1]}-{seed}"), flag) for flag in flags]
    epochs = train.build_parser().parse_args(flags).epochs
    log = log_of(run)
    if len(log) < epochs:
        if run.exists():
            run.rename(next(path for n in range(1, 1000) if not (path := run.with_name(f"{run.name}-broken-{n}")).exists()))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "train.py", *flags, "--seed", str(seed), "--out", str(run)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])}\n{done.stderr.strip().splitlines()[-1]}")
        log = log_of(run)
        print(f"{run.name:50} {sum(line['seconds'] for line in log):6.0f} s of training", flush=True)
    return log


@torch.no_grad()
def guess(run):
    """How well a task is solved without looking: {"loss": L1 of predicting the mean patch} for pixels, {"acc": share of the
    most frequent answer, "chance": one in so many} for classes."""
    _, task, flags, _, _ = evaluation.load_run(run, "cpu")
    data = isaid.open_split("val", flags, train=False)
    images, padding, targets = isaid.collate([data[i] for i in range(len(data))])
    corruption = task.corruption(padding, [target["seed"] for target in targets])
    counted, target = task.counted(corruption), task.target(images, corruption)
    if isinstance(task, ssl_tasks.PixelTask):
        patches = target.unfold(2, task.patch, task.patch).unfold(3, task.patch, task.patch)  # (B, 3, h, w, patch, patch)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[counted]
        return {"loss": (patches - patches.mean(0)).abs().mean().item()}
    answers = target.flatten(1)[counted]
    return {"acc": answers.bincount().max().item() / len(answers), "chance": 1 / task.outputs()}


def spread(values, digits=3):
    """Mean ± standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tables(folder, logs):
    """Two tables in Markdown: AP after each epoch, and the tasks' held-out figures next to those of a guess."""
    detect = {name: runs for name, runs in logs.items() if "ap" in runs[0][-1]}
    tasks = {name: runs for name, runs in logs.items() if "ssl_loss" in runs[0][-1]}
    text = []
    if detect:
        most = max(len(runs[0]) for runs in detect.values())
        head = ["AP (%) after epoch", *map(str, range(1, most + 1)), "AP50, last"]
        text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, runs in detect.items():
            cells = [spread([100 * (run[i]["ap"] or 0) for run in runs], 1) for i in range(len(runs[0]))]
            cells += [""] * (most - len(cells)) + [spread([100 * (run[-1]["ap50"] or 0) for run in runs], 1)]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        text.append("")
    if tasks:
        text += ["| task | held-out loss | mean patch | accuracy | most frequent | chance |", "|---|---|---|---|---|---|"]
        for name, runs in tasks.items():
            seed = next(folder.glob(f"{name}-[0-9]*"))
            blind = guess(seed)
            cells = [spread([run[-1]["ssl_loss"] for run in runs]), f"{blind['loss']:.3f}" if "loss" in blind else ""]
            cells += [spread([run[-1]["ssl_acc"] for run in runs]), f"{blind['acc']:.3f}", f"{blind['chance']:.3f}"] \
                if "acc" in blind else ["", "", ""]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def draw(path, logs):
    """AP by epoch, a line for each row with its spread over seeds; a panel for each model."""
    from matplotlib.figure import Figure
    rows = {name: runs for name, runs in logs.items() if "ap" in runs[0][-1]}
    models = sorted({name.split("-")[0] for name in rows})
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        for name, runs in rows.items():
            if name.split("-")[0] == model:
                epochs = [line["epoch"] for line in runs[0] if "ap" in line]
                ap = torch.tensor([[line["ap"] or 0.0 for line in run if "ap" in line] for run in runs])
                style = {"color": "black"} if name.endswith("scratch") else {"linestyle": "--" if "multitask" in name else "-"}
                line, = axes.plot(epochs, ap.mean(0), label=name.removeprefix(f"{model}-"), **style)
                if len(runs) > 1:
                    axes.fill_between(epochs, ap.mean(0) - ap.std(0), ap.mean(0) + ap.std(0), alpha=0.15,
                                      color=line.get_color())
        axes.set(title=model, xlabel="epoch", ylabel="AP on held-out images")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="a text file of rows, `name: flags`")
    parser.add_argument("--seeds", type=isaid.number(int, zero=True), nargs="+", default=[0], help="(default 0)")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows with one of these in their name")
    parser.add_argument("--jobs", type=isaid.number(int), default=1, metavar="N", help="runs at a time (default %(default)s)")
    parser.add_argument("--no_run", action="store_true", help="print what is there, run nothing")
    args = parser.parse_args(argv)
    try:
        rows = read_table(args.table)
        folder = ROOT / "runs" / Path(args.table).stem
        wanted = {name for name in rows if not args.rows or any(text in name for text in args.rows)}
        threads = max(1, torch.get_num_threads() // args.jobs)
        starts = [name for name in rows if any(f"{{{name}}}" in flag for flags in rows.values() for flag in flags)]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for names in (starts, [name for name in rows if name not in starts]):  # first what other rows start from
                jobs = [(folder, name, rows[name], seed, threads) for seed in args.seeds for name in names if name in wanted]
                list(pool.map(lambda job: run_row(*job), [] if args.no_run else jobs))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    logs = {name: [log for seed in args.seeds if (log := log_of(folder / f"{name}-{seed}"))] for name in rows if name in wanted}
    logs = {name: runs for name, runs in logs.items() if runs}
    text = tables(folder, logs)
    print(text)
    (folder / "table.md").write_text(text + "\n")
    if any("ap" in runs[0][-1] for runs in logs.values()):
        draw(folder / "curves.png", logs)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
