"""The rows of a table: run what is missing, print it with what it says of the table's comparisons.

    python reproduce.py                                   the tables there are
    python reproduce.py scenes --seeds 0 1                run and print one
    python reproduce.py paper --dry_run                   its commands, and what they still need

A table is a text file in recipes/ with a row a line, `name: flags of train.py`. {name} in the flags
is the run folder of another row, {data} the folder of --data; <x> stands for each word of a line
`x = words`; `compare family: row - other row` names a comparison, `goal: row / other row, AP50`
what a row must reach and the row by whose time its own is measured, `authors NAME: EPOCH:AP ...` a
curve of theirs, shown beside. What is published is in results/, your own runs and results in
runs/TABLE or --out: what is there is not run again, a row that was interrupted goes on. Delete a
result to repeat it.
"""

import collections
import concurrent.futures
import contextlib
import difflib
import io
import itertools
import json
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

import train
from results.leaks import backbones  # noqa: F401  (adds the backbones of the table leaks)
from util import checkpoint, cli, plots
from util.cli import Parser, command, number, one_line
from util.cli import split_recipe_line as words
from util.files import check_writable, read_json, write_text

ROOT = Path(__file__).resolve().parent
RUNS, RESULTS, RECIPES = ROOT / "runs", ROOT / "results", ROOT / "recipes"
NUMBER = r"\d+(?:\.\d+)?"
ELSEWHERE = checkpoint.MAY_CHANGE_ON_RESUME | {"seed"}  # flags that make no other row


# ---------------------------------------------------------------- rows and comparisons
def lines_of(path):
    """The lines of a table, for each word of its lists: (where, name, text behind the colon).
    Raises ValueError that names the line."""
    try:
        lines, lists = Path(path).read_text(encoding="utf-8-sig").splitlines(), {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a table ({one_line(error)})") from None
    for n, line in enumerate(lines, 1):
        where = f"{path}, line {n}"
        try:
            if not words(line):
                continue
            if named := re.fullmatch(r"(\w+) = (.*)", line):
                if named[1] in lists:
                    raise ValueError(f"{named[1]} is a list above; take another name")
                lists[named[1]] = words(named[2])
                continue
        except ValueError as error:  # a quote that is not closed
            raise ValueError(f"{where}: {error}") from None
        used = [name for name in lists if f"<{name}>" in line]
        if unknown := {*re.findall(r"<(\w+)>", line)} - {*used}:
            raise ValueError(f"{where}: no line above it is `{unknown.pop()} = words`")
        for values in itertools.product(*(lists[name] for name in used)):
            text = line
            for name, value in zip(used, values):
                text = text.replace(f"<{name}>", value)
            name, colon, text = text.partition(":")
            yield where, name.strip(), shlex.join(words(text)) if colon else None  # no comment


def read_table(path):
    """The rows of a table: {name: list of flags}. Raises ValueError naming the line."""
    rows = {}
    for where, name, text in lines_of(path):
        if name.startswith(("compare ", "authors ")) or name == "goal":
            continue
        if name.startswith(("--", "@")):
            raise ValueError(f"{where}: has flags, as a recipe has: python train.py @{path}")
        if text is None or not re.fullmatch(r"[\w-]+", name) or name in rows:
            expected = "expected is a new name, a colon and flags of train.py"
            line = name if text is None else f"{name}: {text}"
            raise ValueError(f"{where}: {expected}, not {line!r}")
        for start in starts_of(words(text)):
            if start not in rows:
                raise ValueError(f"{where}: {{{start}}} is not a row above it")
        parse(where, words(text))
        rows[name] = words(text)
    if not rows:
        raise ValueError(f"{path}: has no rows")
    return rows


def detects(rows, *names):
    """Whether all of these are rows that have an AP: not of a pretraining."""
    return all(name in rows and parse(name, rows[name]).setting != "pretrain" for name in names)


def read_comparisons(path, rows):
    """The comparisons of a table: [(family, row, what it is compared with)]. ValueError."""
    found = []
    for where, name, text in lines_of(path):
        if name.startswith("compare "):
            pair = (text or "").split(" - ")
            if len({*pair}) != 2 or not detects(rows, *pair):
                expected = "two rows that detect, ROW - ROW"
                raise ValueError(f"{where}: expected are {expected}, not {text!r}")
            found.append((name.removeprefix("compare "), *pair))
    return found


def read_goals(path, rows):
    """The goals of a table: [(row, the row its time is measured by, AP50 in %)]. ValueError."""
    found = []
    for where, name, text in lines_of(path):
        if name == "goal":
            goal = re.fullmatch(rf"([\w-]+) / ([\w-]+), ({NUMBER})", text or "")
            if not goal or not detects(rows, goal[1], goal[2]):
                raise ValueError(f"{where}: expected is ROW / OTHER ROW, AP50, not {text!r}")
            found.append((goal[1], goal[2], float(goal[3])))
    return found


def read_authors(path):
    """The authors' curves in a table, as results of one run: {"authors NAME": {0: its result}}."""
    found = {}
    for where, name, text in lines_of(path):
        if name.startswith("authors "):
            if not re.fullmatch(rf"\d+:{NUMBER}( \d+:{NUMBER})*", text or ""):
                raise ValueError(f"{where}: expected are EPOCH:AP ..., in %, not {text!r}")
            points = (point.split(":") for point in text.split())
            log = [{"epoch": int(epoch), "ap": float(ap) / 100} for epoch, ap in points]
            found[name] = {0: {"log": log}}
    return found


def starts_of(flags):
    """The rows whose runs these flags start from."""
    return [name for name in re.findall(r"{(.*?)}", " ".join(flags)) if name != "data"]


def parse(where, flags):
    """What train.py understands by the flags of a row. Raises ValueError that names its line."""
    flags = [f"@{ROOT / flag[1:]}" if flag.startswith("@") else flag for flag in flags]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            args, _ = train.parse(flags)
            given = {word.partition("=")[0] for word in Parser().expanded(flags)}
    except SystemExit:
        raise ValueError(f"{where}: {said.getvalue().strip().removeprefix('error: ')}") from None
    for flag in sorted({"--seed", "--out"} & given):
        raise ValueError(f"{where}: {flag} is not the row's; reproduce.py has --seeds and --out")
    return args


def resolve(rows, name):
    """All flags that a row uses, with those of recipes and defaults, and of what it starts from."""
    args = parse(name, rows[name])
    apart = ELSEWHERE | set(train.ignored_flags(args))
    flags = {k: v for k, v in vars(args).items() if k not in apart}
    return {**flags, "starts": [resolve(rows, start) for start in starts_of(rows[name])]}


def difference(before, now):
    """The flags that two resolved rows have both, with other values; "" if there are none."""
    changed = [k for k in before.keys() & now.keys() - {"starts"} if before[k] != now[k]]
    text = ", ".join(f"--{k} {before[k]}, now {now[k]}" for k in sorted(changed))
    if len(before["starts"]) != len(now["starts"]):
        text = text or "another start"
    starts = (difference(a, b) for a, b in zip(before["starts"], now["starts"]))
    return text or next((f"in what it starts from {text}" for text in starts if text), "")


def origin(result):
    """The revision, the device and the folder of --data, the last two or None, of a result."""
    flags = dict(itertools.pairwise(shlex.split(result["command"])))
    known = {"revision": result["revision"], "device": result["versions"].get("device")}
    return {**known, "data": flags.get("--data")}


def read_results(folders, rows):
    """{row: {seed: its result}} in these folders, the first one's before the others'. ValueError
    for a result of other flags."""
    results = collections.defaultdict(dict)
    for name in rows:
        wanted = resolve(rows, name)
        for path in (path for folder in folders for path in sorted(folder.glob(f"{name}-*.json"))):
            seed = path.stem.removeprefix(f"{name}-")
            if not seed.isdecimal():  # of another row, whose name goes on
                continue
            try:
                result = read_json(path)
                changed = difference(result["flags"], wanted)
                result["log"][-1]["epoch"], origin(result)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                raise ValueError(f"{path}: is no result of reproduce.py; delete it") from None
            if changed:
                raise ValueError(f"{path} was made with {changed}; delete it to run it anew")
            results[name].setdefault(int(seed), result)
    return dict(results)


# ---------------------------------------------------------------- running
class Runner:
    """Runs rows of a table; `slots` are the numbers of free places, each with a GPU of its own."""

    def __init__(self, path, rows, args):
        self.path, self.rows, self.args = path, rows, args
        self.out = Path(args.out or RUNS / path.stem)
        self.folders = [self.out] if args.out else [self.out, RESULTS / path.stem]  # with results
        self.slots = queue.Queue()
        for slot in range(args.jobs):
            self.slots.put(slot)

    def result(self, name, seed):
        """The file of a result, if there is one."""
        files = (folder / f"{name}-{seed}.json" for folder in self.folders)
        return next((file for file in files if file.exists()), None)

    def needed(self, name, seed, wanted):
        """Whether a row, or one of `wanted` that starts from it, has no result yet."""
        after = [other for other in wanted if name in starts_of(self.rows[other])]
        there = self.result(name, seed)
        return not there or any(self.needed(other, seed, wanted) for other in after)

    def depth(self, name):
        """How many rows have to be run one after the other before this one."""
        return max((self.depth(start) + 1 for start in starts_of(self.rows[name])), default=0)

    def command(self, name, seed):
        """The command of a row, to be called in the folder of this file."""
        inside = self.out.is_relative_to(self.args.code)
        out = self.out.relative_to(self.args.code) if inside else self.out
        places = {start: f"{out}/{start}-{seed}" for start in self.rows}
        places["data"] = self.args.data or "DIR"
        flags = [re.sub(r"{(.*?)}", lambda m: places[m[1]], flag) for flag in self.rows[name]]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launch = [*launch, str(self.args.nproc)] if self.args.nproc > 1 else []
        row = ["--seed", str(seed), "--out", f"{out}/{name}-{seed}", "--resume"]
        if self.args.jobs > 1 and torch.cuda.is_available():  # the runs share the processor's cores
            row += ["--workers", str(min(8, max(1, (os.cpu_count() or 1) // self.args.jobs)))]
        script = ["-m", "results.leaks.train"] if self.path.stem == "leaks" else ["train.py"]
        return ["python", *launch, *script, *flags, *row]

    def run(self, name, seed):
        """Run a row, or go on with it. Raises ValueError if train.py fails."""
        folder, command = self.out / f"{name}-{seed}", self.command(name, seed)
        slot, environment = self.slots.get(), dict(os.environ)
        if self.args.jobs > 1 and torch.cuda.is_available():
            all_of_them = ",".join(map(str, range(torch.cuda.device_count())))
            ours = (os.environ.get("CUDA_VISIBLE_DEVICES") or all_of_them).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = ours[slot % len(ours)]
        threads = max(1, torch.get_num_threads() // (self.args.jobs * self.args.nproc))
        environment["OMP_NUM_THREADS"] = str(threads)
        how = {"cwd": self.args.code, "env": environment, "capture_output": True, "text": True}
        start, anew = time.monotonic(), not folder.exists()
        try:
            done = subprocess.run([sys.executable, *command[1:]], **how)
        finally:
            self.slots.put(slot)
        if done.returncode:
            said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
            errors = [line for line in said if line.startswith("error: ")]  # torchrun says more
            raise ValueError(f"{shlex.join(command)}: {(errors or said)[-1]}")
        config, log = read_json(folder / "config.json"), read_log(folder)
        content = {"command": shlex.join(command), "flags": resolve(self.rows, name)}
        content.update(revision=config["revision"], versions=config["versions"], log=log)
        if anew:  # in one go; evaluations apart
            evaluations = sum(line.get("eval_seconds", 0) for line in log)
            content["seconds"] = round(time.monotonic() - start - evaluations, 1)
        write_text(self.out / f"{name}-{seed}.json", json.dumps(content, indent=1) + "\n")

    def finished(self, name, seed, wanted):
        """Whether a row need not be run: nothing needs it, or its run is there as its result is."""
        there = self.result(name, seed)
        log = there and read_json(there)["log"]
        run_there = log and read_log(self.out / f"{name}-{seed}") == log
        return run_there or not self.needed(name, seed, wanted)

    def run_all(self, names, seeds):
        """Run what is missing of these rows, those that others start from first."""
        jobs = [(name, seed) for seed, name in itertools.product(seeds, names)
                if not self.finished(name, seed, names)]  # fmt: skip
        if missing := self.missing(dict.fromkeys(name for name, _ in jobs)):
            raise ValueError("; ".join(missing))
        start, n = time.monotonic(), 0
        jobs.sort(key=lambda job: self.depth(job[0]))
        with concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                for _, wave in itertools.groupby(jobs, key=lambda job: self.depth(job[0])):
                    for future in [pool.submit(self.run, *job) for job in wave]:
                        future.result()
                        n += 1
                        minutes = (time.monotonic() - start) / 60
                        left = minutes / n * (len(jobs) - n)
                        print(f"{n} of {len(jobs)} runs, {minutes:.0f} min; about {left:.0f} to go",
                              file=sys.stderr, flush=True)  # fmt: skip
            except BaseException:  # what has not begun does not begin
                pool.shutdown(cancel_futures=True)
                raise

    def missing(self, names):
        """Lines that name what is not there of the files and folders that these rows need."""
        found = []
        for name in names:
            for flag, path in itertools.pairwise(self.rows[name]):
                file = flag in ("--init", "--tokenizer_weights", "--data")
                file = file and not re.search("{|://", path)
                if file and not Path(self.args.code, path).exists():
                    found.append(f"{name}: {flag} {path} is not there")
        top = f"where to get what is missing may stand at the top of {self.path}"
        return [*found, f"{top}; --rows leaves rows out"] if found else []

    def dry_run(self, names, seeds):
        """Print the commands; the exit status, 1 if something that they start from is not there."""
        for seed, name in itertools.product(seeds, names):
            print(shlex.join(self.command(name, seed)))
        for line in (missing := self.missing(names)):
            print(line, file=sys.stderr)
        return int(bool(missing))


def read_log(run):
    """The log of a run as far as it has gone, a dict an epoch."""
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    try:
        found = [json.loads(line) for line in lines]
        [line["epoch"] for line in found]
    except (ValueError, TypeError, KeyError):
        text = f"{log}: is not of train.py, or damaged; --resume writes it anew"
        raise ValueError(text) from None
    return found


# ---------------------------------------------------------------- tables and curves
def mean_and_deviation(values, digits=3):
    """Mean ± standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tables(results, comparisons=(), goals=()):
    """Tables in Markdown: AP after each epoch, comparisons, goals, the tasks' figures by a guess's.
    results: {row: {seed: its result}}."""
    detect, tasks, epochs = [], [], set()
    for name, runs in ((name, [*runs.values()]) for name, runs in results.items()):
        last = [run["log"][-1] for run in runs]
        if "ap" in last[0]:
            logs = [ap_of(run) for run in runs]
            ap50 = [100 * (line["ap50"] or 0) for line in last if "ap50" in line]
            detect.append((name, logs, ap50))
            epochs |= logs[0].keys()
        if "ssl_loss" in last[0]:
            keys = "ssl_loss", "ssl_baseline", "", "", ""
            if last[0]["ssl_acc"] is not None:
                keys = "ssl_loss", "", "ssl_acc", "ssl_baseline", "ssl_chance"
            cells = [key and mean_and_deviation([line[key] for line in last]) for key in keys]
            tasks.append(f"| {name} | {' | '.join(cells)} |")
    text, epochs = [], sorted(epochs)
    last = {max(log) for _, logs, _ in detect for log in logs}
    some = [e for e in epochs if e <= 5 or e % 10 == 0 or e in last]
    epochs = epochs if len(epochs) <= 12 else some
    if detect:
        head = ["AP (%) after epoch", *map(str, epochs), "AP50, last", "AP 10 from epoch", "runs"]
        text += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, logs, ap50 in detect:
            cells = [mean_and_deviation([ap[epoch] for ap in logs], 1) if epoch in logs[0] else ""
                     for epoch in epochs]  # fmt: skip
            first = [min((e for e, ap in log.items() if ap >= 10), default=None) for log in logs]
            reached = "not by all" if None in first else mean_and_deviation(first, 1)
            reached = "" if name.startswith("authors ") else reached  # some of theirs are missing
            cells += [mean_and_deviation(ap50, 1) if ap50 else "", reached, str(len(logs))]
            text.append(f"| {name} | {' | '.join(cells)} |")
        text += ["", *compare(results, comparisons), *speed(results, goals)]
    if tasks:
        text.append("| task | held-out loss | mean patch | accuracy | most frequent | chance |")
        text += ["|---|---|---|---|---|---|", *tasks]
    return "\n".join(text)


def speed(results, goals):
    """Lines of a table in Markdown: whether a row reaches its AP50, one-sided by Student's t, and
    its time as a share of another row's, over the seeds that both have run, in one go each."""
    text = []
    for row, other, goal in goals:
        runs = results.get(row, {})
        times = {
            seed: (run["seconds"], results[other][seed]["seconds"])
            for seed, run in runs.items()
            if "seconds" in run and "seconds" in results.get(other, {}).get(seed, {})
        }
        if len(runs) < 2:
            continue
        ap50 = [100 * (run["log"][-1]["ap50"] or 0) for run in runs.values()]
        p = scipy.stats.ttest_1samp(ap50, goal, alternative="greater").pvalue
        cells = [row, f"{mean_and_deviation(ap50, 1)} ({len(ap50)})", f"{goal:g}", f"{p:.4f}"]
        if len(times) > 1:
            minutes = np.array([*times.values()]) / 60  # (seeds, 2)
            share = minutes[:, 0] / minutes[:, 1]
            low, high = scipy.stats.ttest_1samp(share, 0).confidence_interval()
            cells += [mean_and_deviation(column, 2) for column in minutes.T]
            cells.append(f"{share.mean():.2f}, {low:.2f} to {high:.2f} ({len(share)})")
        else:
            cells += ["", "", ""]
        text.append(f"| {' | '.join(cells)} |")
    head = "row | AP50 (%) (seeds) | goal | p | minutes | of the other | share, interval (seeds)"
    return [f"| {head} |", "|---" * 7 + "|", *text, ""] if text else []


def ap_of(run):
    """AP in % of a result by epoch."""
    return {line["epoch"]: 100 * (line["ap"] or 0) for line in run["log"] if "ap" in line}


def curves(runs):
    """AP in % after the epochs that all runs were evaluated at: (epochs, (runs, epochs) array)."""
    logs = [ap_of(run) for run in runs]
    epochs = sorted(set.intersection(*map(set, logs)))
    return epochs, np.array([[log[epoch] for epoch in epochs] for log in logs])


def compare(results, comparisons):
    """Lines of a table in Markdown: differences of AP, paired by seed, with their 95 % interval
    (Student's t) and the p of flipping their signs, exact up to 16 seeds; Holm's is over the
    family as it is declared, run or not, for each of the two measures."""
    measures = {"last epoch": lambda ap: ap[:, -1], "mean of the epochs": lambda ap: ap.mean(1)}
    found = []
    for (family, row, other), measure in itertools.product(comparisons, measures):
        seeds = sorted(results.get(row, {}).keys() & results.get(other, {}).keys())
        if len(seeds) > 1:
            runs = [results[name][seed] for name in (row, other) for seed in seeds]
            a, b = np.split(measures[measure](curves(runs)[1]), 2)  # at epochs that all have
            low, high = scipy.stats.ttest_1samp(a - b, 0).confidence_interval()
            flips = {"permutation_type": "samples", "n_resamples": 2**16, "random_state": 0}
            p = scipy.stats.permutation_test((a - b,), np.mean, **flips).pvalue
            cells = [f"{row} - {other}", measure, f"{np.mean(a - b):+.1f}"]
            cells += [f"{low:+.1f} to {high:+.1f}", f"{p:.3f}"]
            found.append(((family, measure), p, cells, len(seeds)))
    if not found:
        return []
    head = "comparison | AP (%) | difference | 95 % interval | p | p, Holm | seeds"
    text = [f"| {head} |", "|---" * 7 + "|"]
    sizes = collections.Counter(family for family, *_ in comparisons)
    for family, p, cells, n in found:
        ps = sorted(q for other, q, *_ in found if other == family)
        holm = max(min(1, q * (sizes[family[0]] - i)) for i, q in enumerate(ps) if q <= p)
        text.append(f"| {' | '.join([*cells, f'{holm:.3f}', str(n)])} |")
    return [*text, ""]


@plots.best_effort
def draw(path, results, comparisons):
    """A panel for each comparison, what a row is compared with in grey: mean and deviation; one
    for the authors' curves."""
    pairs = [(row, other) for _, row, other in comparisons if {row, other} <= results.keys()]
    panels = [(f"{row}\n(grey: {other})", {other: "grey", row: "tab:blue"}) for row, other in pairs]
    theirs = {x: f"C{i}" for i, x in enumerate(x for x in results if x.startswith("authors "))}
    panels += [("the authors'", theirs)] if theirs else []
    columns = min(5, len(panels))
    if not panels:
        return
    figure = Figure(figsize=(3 * columns, 2.6 * -(-len(panels) // columns)), layout="constrained")
    places = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, (title, shown) in zip(places, panels):
        for name, colour in shown.items():
            epochs, ap = curves([*results[name].values()])
            line = "" if shown is theirs else "-"  # of theirs some points are missing
            label = name.removeprefix("authors ")
            axes.plot(epochs, ap.mean(0), linestyle=line, marker=".", color=colour, label=label)
            if len(ap) > 1:
                low, high = ap.mean(0) + np.outer((-1, 1), ap.std(0, ddof=1))
                axes.fill_between(epochs, low, high, alpha=0.2, color=colour)
        axes.set(xlabel="epoch", ylabel="AP (%)")
        axes.set_title(title, fontsize=7)
        if shown is theirs:
            axes.legend(fontsize=5)
        plots.finish_axes(axes)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- the command
def make_table(args):
    """Run what is missing of a table and print it; the exit status. Raises ValueError."""
    named = RECIPES / f"{args.table}.txt"
    path = named if named.is_file() else Path(args.table)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, tables_there(), n=1)
        meant = f"did you mean {near[0]}?" if near else "without a name they are listed"
        raise ValueError(f"{args.table}: no such table; {meant}")
    if args.data and not Path(args.data).exists():
        raise ValueError(f"--data {args.data}: is not there")
    if not Path(args.code, "train.py").exists():
        raise ValueError(f"--code {args.code}: holds no train.py")
    args.seeds = list(dict.fromkeys(args.seeds or []))
    rows = read_table(path)
    comparisons, goals = read_comparisons(path, rows), read_goals(path, rows)
    theirs = read_authors(path)
    chosen = [name for name in rows if not args.rows or any(text in name for text in args.rows)]
    if not chosen:
        raise ValueError(f"--rows {' '.join(args.rows)}: no row of {path} has this in its name")
    needs_data = any("{data}" in flags for flags in rows.values())
    if needs_data and not (args.data or args.dry_run or args.no_run):
        raise ValueError(f"{path}: its rows need --data DIR")
    if args.jobs > 1 and args.nproc > 1:
        raise ValueError("take --jobs, several runs at a time, or --nproc, several processes a run")
    wanted, runner = set(chosen), Runner(path, rows, args)
    for name in reversed(rows):  # a row comes after what it starts from
        wanted |= set(starts_of(rows[name])) if name in wanted else set()
    wanted = [name for name in rows if name in wanted]
    if args.dry_run:
        return runner.dry_run(wanted, args.seeds or [0])
    there = read_results(runner.folders, rows)  # refuses before anything is run
    if args.no_run and not there and not theirs:
        raise ValueError(f"{runner.out}: no results; name a folder with some or leave out --no_run")
    runner.out.mkdir(parents=True, exist_ok=True)
    check_writable(runner.out / "table.md")
    if not args.no_run:
        runner.run_all(wanted, args.seeds or [0])
    results = read_results(runner.folders, rows)
    found = {name: {seed: run for seed, run in results.get(name, {}).items()
                    if not args.seeds or seed in args.seeds} for name in chosen}  # fmt: skip
    found = {name: runs for name, runs in found.items() if runs}
    if not found and not theirs:
        folders = " or ".join(map(str, runner.folders))
        raise ValueError(f"no results of these rows and seeds in {folders}")
    device = checkpoint.device_name(cli.usable_device("auto"))
    here = {"revision": checkpoint.revision(), "device": device, "data": args.data}
    for what, ours in here.items():
        of = (origin(run)[what] for name, runs in found.items() for run in runs.values()
              if what != "data" or "{data}" in rows[name])  # fmt: skip
        for other, n in collections.Counter(of).items():
            if other and ours and other != ours:
                print(f"{n} results are of {what} {other}, yours is {ours}")
    print(tables({**found, **theirs}, comparisons, goals))
    results.update(theirs)
    write_text(runner.out / "table.md", tables(results, comparisons, goals) + "\n")
    draw(runner.out / "curves.png", results, comparisons)


def tables_there():
    """The tables in recipes/: {name: rows}."""
    tables = {}
    for path in sorted(RECIPES.glob("*.txt")):
        with contextlib.suppress(ValueError):  # flags of train.py
            tables[path.stem] = read_table(path)
    return tables


def list_tables():
    """Print the tables there are: rows, how many results are published, what it needs."""
    for name, rows in tables_there().items():
        published = len(list((RESULTS / name).glob("*.json")))
        needs = "; needs --data" if any("{data}" in flags for flags in rows.values()) else ""
        print(f"{name:20} {len(rows)} rows, {published} results published{needs}")


@command
def main(argv=None):
    parser = Parser(description=__doc__)
    add, natural, few = parser.add_argument, number(int, zero=True), number(int, most=256)
    add("table", nargs="?", help="its name, or a file; without it the tables are listed")
    add("--data", type=os.path.abspath, help="a dataset, for tables that need one")
    add("--seeds", type=natural, nargs="+", help="to run and print (default: 0; print all)")
    add("--rows", nargs="+", metavar="TEXT", help="only rows with one of these in their name")
    add("--jobs", type=few, default=1, help="runs at a time, each on its GPU if there are")
    add("--nproc", type=few, default=1, help="processes, or GPUs, of each run")
    add("--out", type=os.path.abspath, help="folder of runs and results; nothing published counts")
    add("--code", type=os.path.abspath, default=ROOT, help="of another revision, to compare speed")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--dry_run", action="store_true", help="print the command of every row, and what it lacks")
    add("--no_run", action="store_true", help="print the results that are there, run nothing")
    args = parser.parse_args(argv)
    if not args.table and args != parser.parse_args([]):
        parser.error("flags without a table; its name comes first")
    sys.exit(make_table(args) if args.table else list_tables())


if __name__ == "__main__":
    main()
