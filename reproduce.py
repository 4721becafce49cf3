"""Run the rows of a table that are missing and print it: mean and standard deviation over seeds.

    python reproduce.py recipes/tasks.txt                       is every task learnt?
    python reproduce.py recipes/first_epochs.txt --seeds 0 1 2  does it help detection?

A table is a text file with a row a line, `name: flags of train.py`; {name} in the flags is the run
folder of another row. What a row gave is kept in results/TABLE/NAME-SEED.json with its flags,
versions and revision; it is not run again, so delete it to repeat it. The runs are in runs/TABLE.
Beside the results are table.md and curves.png, where rows whose names agree up to the first
hyphen share a panel; rows without one are left out there if others have one.
"""

import parallel  # noqa: F401 # isort: skip (before torch)

import argparse
import collections
import concurrent.futures
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import checkpoint
import coco
import eval as evaluation
import isaid
import pictures
import ssl_tasks
import train
from flags import Parser, command, number, words

ROOT = Path(__file__).resolve().parent
RUNS, RESULTS = ROOT / "runs", ROOT / "results"
ELSEWHERE = {"out", "device", "workers", "resume", "seed", "data", "tokenizer_weights"}  # no change


# ---------------------------------------------------------------- rows and their results
def read_table(path):
    """The rows of a table: {name: list of flags}. Raises ValueError naming the line."""
    rows = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from None
    for n, line in enumerate(lines, 1):
        name, colon, text = line.partition(":")
        try:
            empty, flags = not words(line), words(text)
        except ValueError as error:  # a quote that is not closed
            raise ValueError(f"{path}, line {n}: {error}") from None
        if empty:
            continue
        if not colon or not re.fullmatch(r"[\w-]+", name.strip()) or name.strip() in rows:
            expected = "expected is a new name, a colon and flags of train.py"
            raise ValueError(f"{path}, line {n}: {expected}, not {line!r}")
        for start in starts_of(flags):
            if start not in rows:
                raise ValueError(f"{path}, line {n}: {{{start}}} is not a row above it")
        rows[name.strip()] = flags
    return rows


def starts_of(flags):
    """The rows whose runs these flags start from."""
    return re.findall(r"{(.*?)}", " ".join(flags))


def resolve(rows, name):
    """All flags of a row, recipes and defaults included, and those of what it starts from."""
    flags = [f"@{ROOT / flag[1:]}" if flag[0] == "@" else flag for flag in rows[name]]
    args, _ = train.parse(flags)
    starts = [resolve(rows, start) for start in starts_of(rows[name])]
    return {**{k: v for k, v in vars(args).items() if k not in ELSEWHERE}, "starts": starts}


def difference(before, now):
    """The flags that two resolved rows have both, with other values; "" if there are none."""
    changed = [k for k in before.keys() & now.keys() - {"starts"} if before[k] != now[k]]
    text = ", ".join(f"--{k} {before[k]}, now {now[k]}" for k in sorted(changed))
    if len(before["starts"]) != len(now["starts"]):
        text = text or "another start"
    starts = (difference(a, b) for a, b in zip(before["starts"], now["starts"]))
    return text or next((f"in what it starts from {text}" for text in starts if text), "")


def read_results(table, rows, seeds=None, chosen=None):
    """{row: {seed: its result}} of what is there. ValueError if it was made with other flags."""
    results = collections.defaultdict(dict)
    for name in chosen or rows:
        wanted = resolve(rows, name)
        for path in sorted((RESULTS / table).glob(f"{name}-*.json")):
            seed = path.stem.removeprefix(f"{name}-")
            if seed.isdecimal() and (not seeds or int(seed) in seeds):
                try:
                    result = json.loads(path.read_text(encoding="utf-8"))
                    changed = difference(result["flags"], wanted)
                except (ValueError, KeyError):
                    raise ValueError(f"{path}: is no result of reproduce.py; delete it") from None
                if changed:
                    raise ValueError(f"{path} was made with {changed}; delete it to run it anew")
                results[name][int(seed)] = result
    return dict(results)


# ---------------------------------------------------------------- running
def depth(rows, name):
    """How many rows have to be run one after the other before this one."""
    return max((depth(rows, start) + 1 for start in starts_of(rows[name])), default=0)


def needed(table, name, rows, seed):
    """Whether a row, or one that starts from it, has no result yet."""
    after = [other for other in rows if name in starts_of(rows[other])]
    missing = not (RESULTS / table / f"{name}-{seed}.json").exists()
    return missing or any(needed(table, other, rows, seed) for other in after)


def run_row(table, name, rows, seed, threads):
    """Run one row with one seed, if it is needed. Raises ValueError if train.py fails."""
    result, run = RESULTS / table / f"{name}-{seed}.json", RUNS / table / f"{name}-{seed}"
    there = json.loads(result.read_text(encoding="utf-8"))["log"] if result.exists() else None
    if not needed(table, name, rows, seed) or there and read_log(run) == there:
        return
    runs = os.path.relpath(RUNS / table, ROOT)
    flags = [re.sub(r"{(.*?)}", lambda m: f"{runs}/{m[1]}-{seed}", flag) for flag in rows[name]]
    row = ["train.py", *flags, "--seed", str(seed), "--out", f"{runs}/{name}-{seed}"]
    shutil.rmtree(run, ignore_errors=True)  # of an earlier, interrupted call
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *row], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise ValueError(f"python {shlex.join(row)}: {said.splitlines()[-1]}")
    config, log = json.loads((run / "config.json").read_text(encoding="utf-8")), read_log(run)
    content = {"command": f"python {shlex.join(row)}", "flags": resolve(rows, name)}
    content.update(revision=config["revision"], versions=config["versions"], log=log)
    content["guess"] = guess(run) if "ssl_loss" in log[-1] else None
    coco.write_text(result, json.dumps(content, indent=1) + "\n")
    seconds = sum(line["seconds"] for line in log)
    print(f"{name + '-' + str(seed):60} {seconds:6.0f} s of training", flush=True)


def read_log(run):
    """The log of a run as far as it has gone, a dict an epoch."""
    log = run / "log.jsonl"
    return (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        if log.exists()
        else []
    )


@torch.no_grad()
def guess(run):
    """How well a task is solved without looking at the image, on the first 200 held-out ones.
    For pixels {"loss": the L1 error of predicting the mean patch}, for classes {"acc": the share
    of the most frequent answer, "chance": one in K}."""
    _, task, state = evaluation.load_run(run, "cpu")
    data = isaid.open_split("val", argparse.Namespace(**state["args"]), train=False)
    batch = [data[i] for i in range(min(len(data), 200))]
    images, padding, targets = isaid.collate(batch)
    corruption = task.draw(padding, [target["seed"] for target in targets])
    counted, target = task.loss_mask(corruption), task.target(images, corruption)
    if isinstance(task, ssl_tasks.PixelTask):
        H, W, p = *images.shape[-2:], task.patch
        target = F.pad(target, (0, -W % p, 0, -H % p)).unfold(2, p, p).unfold(3, p, p)
        patches = target.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[counted]  # (n, 3, p, p)
        return {"loss": (patches - patches.mean(0)).abs().mean().item()}
    answers = target.flatten(1)[counted]
    return {"acc": answers.bincount().max().item() / len(answers), "chance": 1 / task.outputs()}


# ---------------------------------------------------------------- tables and curves
def mean_and_deviation(values, digits=3):
    """Mean ± standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tables(results):
    """Two tables in Markdown: AP after each epoch, and the tasks' figures next to a guess's.
    results: {row: [its results, one a seed]}."""
    text, detect, tasks = [], [], []
    for name, runs in results.items():
        last = [run["log"][-1] for run in runs]
        if "ap" in last[0]:
            aps = [
                {x["epoch"]: 100 * (x["ap"] or 0) for x in run["log"] if "ap" in x} for run in runs
            ]
            ap50 = mean_and_deviation([100 * (line["ap50"] or 0) for line in last], 1)
            detect.append((name, aps, ap50))
        if runs[0]["guess"]:
            lines = [{**line, **run["guess"]} for line, run in zip(last, runs)]
            keys = "ssl_loss", "loss", "ssl_acc", "acc", "chance"
            columns = [[line.get(key) for line in lines] for key in keys]
            cells = ["" if None in column else mean_and_deviation(column) for column in columns]
            tasks.append(f"| {name} | {' | '.join(cells)} |")
    if detect:
        epochs = sorted({epoch for _, aps, _ in detect for epoch in aps[0]})
        head = ["AP (%) after epoch", *map(str, epochs), "AP50, last", "runs"]
        text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, aps, ap50 in detect:
            cells = [mean_and_deviation([ap[epoch] for ap in aps], 1) if epoch in aps[0] else ""
                     for epoch in epochs]  # fmt: skip
            text.append(f"| {name} | {' | '.join([*cells, ap50, str(len(aps))])} |")
        text.append("")
    if tasks:
        text.append("| task | held-out loss | mean patch | accuracy | most frequent | chance |")
        text += ["|---|---|---|---|---|---|", *tasks]
    return "\n".join(text)


def draw(path, results):
    """AP by epoch, a line for each row with its spread over seeds; a panel for each model."""
    rows = {name: runs for name, runs in results.items() if "ap" in runs[0]["log"][-1]}
    rows = {name: runs for name, runs in rows.items() if "-" in name} or rows
    models = sorted({name.split("-")[0] for name in rows})
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        for name, runs in rows.items():
            if name.split("-")[0] == model:
                logs = [[line for line in run["log"] if "ap" in line] for run in runs]
                epochs = [line["epoch"] for line in logs[0]]
                ap = torch.tensor([[line["ap"] or 0.0 for line in log] for log in logs])
                style = {"linestyle": "--" if "multitask" in name else "-"}
                style = {"color": "black"} if name.endswith("scratch") else style
                label = name.removeprefix(f"{model}-")
                (line,) = axes.plot(epochs, ap.mean(0), marker=".", label=label, **style)
                if len(runs) > 1:
                    low, high = ap.mean(0) - ap.std(0), ap.mean(0) + ap.std(0)
                    axes.fill_between(epochs, low, high, alpha=0.15, color=line.get_color())
        axes.set(title=model, xlabel="epoch", ylabel="AP on held-out images")
        pictures.finish_axes(axes, fontsize=8)
    figure.savefig(path, dpi=110)


def make_table(args):
    """Run what is missing of a table and print it. Raises ValueError."""
    rows, table = read_table(args.table), Path(args.table).stem
    chosen = [name for name in rows if not args.rows or any(text in name for text in args.rows)]
    if rows and not chosen:
        raise ValueError(f"--rows {' '.join(args.rows)}: no row of {args.table} is called so")
    read_results(table, rows)  # refuses before anything is run
    wanted = set(chosen)
    for name in reversed(rows):  # a row comes after what it starts from
        wanted |= set(starts_of(rows[name])) if name in wanted else set()
    threads = max(1, torch.get_num_threads() // args.jobs)
    jobs = [(table, name, rows, seed, threads) for seed in args.seeds or [0] for name in wanted]
    (RESULTS / table).mkdir(parents=True, exist_ok=True)
    coco.try_output(RESULTS / table / "table.md")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for wave in [] if args.no_run else sorted({depth(rows, name) for name in rows}):
            mine = [job for job in jobs if depth(rows, job[1]) == wave]
            list(pool.map(lambda job: run_row(*job), mine))
    everything = read_results(table, rows)
    found = read_results(table, rows, args.seeds, chosen)
    if not found:
        raise ValueError(f"{RESULTS / table} has no results of these rows and seeds")
    ours = checkpoint.revision()
    revisions = (run["revision"] for runs in found.values() for run in runs.values())
    for revision, n in collections.Counter(revisions).items():
        if revision != ours:
            print(f"{n} results are of revision {revision}, yours is {ours}; they stay as they are")
    print(tables({name: list(runs.values()) for name, runs in found.items()}))
    results = {name: list(runs.values()) for name, runs in everything.items()}
    coco.write_text(RESULTS / table / "table.md", tables(results) + "\n")
    if any("ap" in runs[0]["log"][-1] for runs in results.values()):
        draw(RESULTS / table / "curves.png", results)


@command
def main(argv=None):
    parser = Parser(description=__doc__)
    add, natural = parser.add_argument, number(int, zero=True)
    add("table", help="a text file of rows, `name: flags`")
    add("--seeds", type=natural, nargs="+", help="to run and print (default: 0; print all)")
    add("--rows", nargs="+", metavar="TEXT", help="only rows with one of these in their name")
    add("--jobs", type=number(int), default=1, help="runs at a time")
    add("--no_run", action="store_true", help="print the results that are there, run nothing")
    make_table(parser.parse_args(argv))


if __name__ == "__main__":
    main()
