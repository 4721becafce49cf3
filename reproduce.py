"""Run the rows of a table that are missing and print it: mean and standard deviation over seeds.

    python reproduce.py recipes/tasks.txt                            every task, setting and detector: is it learnt?
    python reproduce.py recipes/first_epochs.txt --seeds 0 1 2       does it help detection in the first epochs?

A table is a text file with a row a line, `name: flags of train.py`; {name} in the flags is the run folder of another row.
The log of each run is kept in results/TABLE/NAME-SEED.json with its command, versions and revision; what is there is not run
again, so delete it to repeat it. The runs themselves are in runs/TABLE. Beside the logs, table.md and curves.png are written;
rows whose names agree up to the first hyphen share a panel, rows without one are left out there if others have one.
"""
import argparse
import concurrent.futures
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import eval as evaluation
import isaid
import ssl_tasks

ROOT = Path(__file__).resolve().parent
RUNS, RESULTS = ROOT / "runs", ROOT / "results"


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
        for start in starts_of(flags.split()):
            if start not in rows:
                raise ValueError(f"{path}, line {n}: {{{start}}} is not a row above it")
        rows[name.strip()] = flags.split()
    return rows


def starts_of(flags):
    """The rows whose runs these flags start from."""
    return re.findall(r"{(.*?)}", " ".join(flags))


def depth(rows, name):
    """How many rows have to be run one after the other before this one."""
    return max((depth(rows, start) + 1 for start in starts_of(rows[name])), default=0)


def missing_after(table, name, rows, seed):
    """Whether a row that starts from this one has no result yet."""
    after = [other for other in rows if name in starts_of(rows[other])]
    return any(not (RESULTS / table / f"{other}-{seed}.json").exists() or missing_after(table, other, rows, seed)
               for other in after)


def command_of(table, name, rows, seed):
    """The command of a row, without the interpreter."""
    runs = os.path.relpath(RUNS / table, ROOT)
    flags = [re.sub(r"{(.*?)}", lambda match: f"{runs}/{match[1]}-{seed}", flag) for flag in rows[name]]
    return ["train.py", *flags, "--seed", str(seed), "--out", f"{runs}/{name}-{seed}"]


def starts_before(table, name, rows, seed):
    """The commands of the rows that a row starts from, directly or not."""
    return [command for start in starts_of(rows[name])
            for command in (*starts_before(table, start, rows, seed), f"python {' '.join(command_of(table, start, rows, seed))}")]


def read_results(table, rows):
    """{row: {seed: content of its result file}} of what is there. Raises ValueError if it was made with other flags."""
    results = {name: {} for name in rows}
    for path in sorted((RESULTS / table).glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        if name in rows and seed.isdecimal():
            content = json.loads(path.read_text())
            wanted = f"python {' '.join(command_of(table, name, rows, int(seed)))}"
            if content["command"] != wanted:
                raise ValueError(f"{path} is of another command than its row now has; delete it to run the row anew\n"
                                 f"then  {content['command']}\nnow   {wanted}")
            if content["starts"] != starts_before(table, name, rows, int(seed)):
                raise ValueError(f"{path} started from a row that has another command now; delete it to run the row anew")
            results[name][int(seed)] = content
    return {name: runs for name, runs in results.items() if runs}


def run_row(table, name, rows, seed, threads):
    """Run one row with one seed unless its result is there, or, as a start of others, is not needed any more.

    Raises RuntimeError if train.py fails.
    """
    result, run = RESULTS / table / f"{name}-{seed}.json", RUNS / table / f"{name}-{seed}"
    if result.exists() and (not missing_after(table, name, rows, seed) or read_log(run) == json.loads(result.read_text())["log"]):
        return
    command = command_of(table, name, rows, seed)
    if run.exists():  # of an earlier, interrupted call
        shutil.rmtree(run)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise RuntimeError(f"python {' '.join(command)}\n{said.splitlines()[-1]}")
    config = json.loads((run / "config.json").read_text())
    log = read_log(run)
    content = {"command": f"python {' '.join(command)}", "starts": starts_before(table, name, rows, seed),
               "revision": config["revision"], "versions": config["versions"],
               "guess": guess(run) if "ssl_loss" in log[-1] else None, "log": log}
    result.parent.mkdir(parents=True, exist_ok=True)
    temporary = result.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, result)
    print(f"{name + '-' + str(seed):60} {sum(line['seconds'] for line in log):6.0f} s of training", flush=True)


def read_log(run):
    """The log of a run as far as it has gone, a dict an epoch."""
    log = run / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@torch.no_grad()
def guess(run):
    """How well a task is solved without looking at the image, on the first 200 held-out ones: for pixels {"loss": the L1
    error of predicting the mean patch}, for classes {"acc": the share of the most frequent answer, "chance": one in K}."""
    _, task, flags, _, _ = evaluation.load_run(run, "cpu")
    data = isaid.open_split("val", flags, train=False)
    images, padding, targets = isaid.collate([data[i] for i in range(min(len(data), 200))])
    corruption = task.corruption(padding, [target["seed"] for target in targets])
    counted, target = task.counted(corruption), task.target(images, corruption)
    H, W = images.shape[-2:]
    if isinstance(task, ssl_tasks.PixelTask):
        target = F.pad(target, (0, -W % task.patch, 0, -H % task.patch))
        patches = target.unfold(2, task.patch, task.patch).unfold(3, task.patch, task.patch)  # (B, 3, h, w, patch, patch)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[counted]
        return {"loss": (patches - patches.mean(0)).abs().mean().item()}
    answers = target.flatten(1)[counted]
    return {"acc": answers.bincount().max().item() / len(answers), "chance": 1 / task.outputs()}


def mean_and_deviation(values, digits=3):
    """Mean ± standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tables(results):
    """Two tables in Markdown: AP after each epoch, and the tasks' held-out figures next to those of a guess.

    results: {row: [content of its result files, one a seed]}.
    """
    logs = {name: [result["log"] for result in runs] for name, runs in results.items()}
    detect = {name: runs for name, runs in logs.items() if "ap" in runs[0][-1]}
    text = []
    if detect:
        epochs = sorted({line["epoch"] for runs in detect.values() for line in runs[0] if "ap" in line})
        head = ["AP (%) after epoch", *map(str, epochs), "AP50, last", "runs"]
        text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, runs in detect.items():
            ap = [{line["epoch"]: 100 * (line["ap"] or 0) for line in run if "ap" in line} for run in runs]
            cells = [mean_and_deviation([run[epoch] for run in ap], 1) if epoch in ap[0] else "" for epoch in epochs]
            cells += [mean_and_deviation([100 * (run[-1]["ap50"] or 0) for run in runs], 1), str(len(runs))]
            text.append(f"| {name} | {' | '.join(cells)} |")
        text.append("")
    if any(runs[0]["guess"] for runs in results.values()):
        text += ["| task | held-out loss | mean patch | accuracy | most frequent | chance |", "|---|---|---|---|---|---|"]
        for name, runs in results.items():
            if runs[0]["guess"]:
                last = [{**log[-1], **run["guess"]} for log, run in zip(logs[name], runs)]
                columns = [[line.get(key) for line in last] for key in ("ssl_loss", "loss", "ssl_acc", "acc")]
                cells = ["" if None in values else mean_and_deviation(values) for values in (*columns, [last[0].get("chance")])]
                text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw(path, results):
    """AP by epoch, a line for each row with its spread over seeds; a panel for each first part of the names, the model."""
    from matplotlib.figure import Figure
    rows = {name: runs for name, runs in results.items() if "ap" in runs[0]["log"][-1]}
    rows = {name: runs for name, runs in rows.items() if "-" in name} or rows
    models = sorted({name.split("-")[0] for name in rows})
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        for name, runs in rows.items():
            if name.split("-")[0] == model:
                logs = [[line for line in run["log"] if "ap" in line] for run in runs]
                epochs = [line["epoch"] for line in logs[0]]
                ap = torch.tensor([[line["ap"] or 0.0 for line in log] for log in logs])  # (seeds, epochs)
                style = {"color": "black"} if name.endswith("scratch") else {"linestyle": "--" if "multitask" in name else "-"}
                line, = axes.plot(epochs, ap.mean(0), marker=".", label=name.removeprefix(f"{model}-"), **style)
                if len(runs) > 1:
                    axes.fill_between(epochs, ap.mean(0) - ap.std(0), ap.mean(0) + ap.std(0), alpha=0.15,
                                      color=line.get_color())
        axes.set(title=model, xlabel="epoch", ylabel="AP on held-out images")
        evaluation.scale_axes(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="a text file of rows, `name: flags`")
    parser.add_argument("--seeds", type=isaid.number(int, zero=True), nargs="+", default=[0], help="(default 0)")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="run only rows with one of these in their name")
    parser.add_argument("--jobs", type=isaid.number(int), default=1, metavar="N", help="runs at a time (default %(default)s)")
    parser.add_argument("--no_run", action="store_true", help="print the results that are there, run nothing")
    args = parser.parse_args(argv)
    try:
        rows = read_table(args.table)
        table = Path(args.table).stem
        read_results(table, rows)  # refuses before anything is run
        wanted = {name for name in rows if not args.rows or any(text in name for text in args.rows)}
        if rows and not wanted:
            raise ValueError(f"--rows {' '.join(args.rows)}: {args.table} has no row with that in its name")
        for name in reversed(rows):  # a row comes after what it starts from
            wanted |= set(starts_of(rows[name])) if name in wanted else set()
        threads = max(1, torch.get_num_threads() // args.jobs)
        jobs = [(table, name, rows, seed, threads) for seed in args.seeds for name in rows if name in wanted]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for wave in () if args.no_run else range(1 + max((depth(rows, name) for name in rows), default=0)):
                list(pool.map(lambda job: run_row(*job), [job for job in jobs if depth(rows, job[1]) == wave]))
        results = {name: list(runs.values()) for name, runs in read_results(table, rows).items()}
        folder = RESULTS / table
        if not results:
            raise ValueError(f"{folder} has no results of these rows")
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    text = tables(results)
    print(text)
    (folder / "table.md").write_text(text + "\n")
    if any("ap" in runs[0]["log"][-1] for runs in results.values()):
        draw(folder / "curves.png", results)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
