"""Run the rows of an experiment with several seeds, and print its table and comparisons.

    python reproduce.py                           list the experiments
    python reproduce.py scenes --seeds 0 1        run one and print its table
    python reproduce.py paper --dry_run           print its commands, and which files they lack

An experiment is a folder in results/ with a file experiment.py, which names the rows (each is a
set of flags of train.py) and the comparisons; util/experiments.py describes its format. Published
results are next to it. Your own runs and results are written to runs/EXPERIMENT or --out, with
table.md, forest.png (the differences and their intervals) and curves.png.

A row is run only if it has no result yet, and an interrupted run is resumed. Delete a result to
repeat it.
"""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import queue
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

import train
from util import checkpoint
from util.cli import NON_NEGATIVE_INT, Parser, cli_main, int_range, usable_cores
from util.experiments import dependencies, load_experiment
from util.files import DataError, check_writable, read_json, write_text
from util.pretrained import MODELS
from util.tables import AUTHORS, compare, compare_gains, draw_curves, draw_forest, make_tables

ROOT = Path(__file__).resolve().parent
RUNS = ROOT / "runs"
RESULTS = ROOT / "results"
NOT_COMPARED = checkpoint.MAY_CHANGE_ON_RESUME | {"seed"}  # these flags make no different row
FLAGS_WITH_FILES = ("--init", "--tokenizer_weights", "--data")
RESULT_KEYS = {"command", "flags", "log", "revision", "versions"}


# ---------------------------------------------------------------- rows
def find_experiment(name):
    """Return the Experiment of a folder, or of a name in results/. Raises ValueError."""
    for folder in (RESULTS / name, Path(name).resolve()):
        if (folder / "experiment.py").is_file():
            experiment = load_experiment(folder / "experiment.py")
            check_experiment(experiment)
            return experiment
    raise ValueError(f"unknown experiment {name!r}; run without arguments to list them")


def check_experiment(experiment):
    """Raise a ValueError that names the first row with something wrong."""
    detecting = set()  # rows that have an AP
    defined = set()
    for name, flags in experiment.rows.items():
        for start in dependencies(flags):
            if start not in defined:
                message = f"{{{start}}} refers to a row that is not defined above"
                raise ValueError(f"{experiment.path}, row {name!r}: {message}")
        args = parse_row(experiment, name)
        if args.setting != "pretrain":
            detecting.add(name)
        defined.add(name)
    pairs = [(row, baseline) for _, row, baseline in experiment.comparisons]
    pairs += [(row, baseline) for row, baseline, _ in experiment.goals]
    pairs += experiment.costs
    for _, pair, other_pair in experiment.interactions:
        pairs += [pair, other_pair]
    for pair in pairs:
        for name in pair:
            if name not in detecting:
                message = f"{name!r} is compared, but is not a row with detection"
                raise ValueError(f"{experiment.path}: {message}")


def parse_row(experiment, name):
    """Return what train.py understands by the flags of a row. Raises ValueError."""
    flags = []
    for word in shlex.split(experiment.rows[name]):
        if word.startswith("@"):
            word = f"@{ROOT / word[1:]}"
        flags.append(word)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            args, _ = train.parse(flags)
    except SystemExit:
        message = stderr.getvalue().strip().removeprefix("error: ")
        raise ValueError(f"{experiment.path}, row {name!r}: {message}") from None
    if args.seed != 0 or args.out is not None:
        message = "--seed and --out are not allowed; use --seeds and --out of reproduce.py"
        raise ValueError(f"{experiment.path}, row {name!r}: {message}")
    return args


def resolve(experiment, name):
    """Return all flags that have an effect in a row, and under "starts" those of its starts."""
    args = parse_row(experiment, name)
    excluded = NOT_COMPARED | set(train.ignored_flags(args))
    flags = {flag: value for flag, value in vars(args).items() if flag not in excluded}
    starts = dependencies(experiment.rows[name])
    flags["starts"] = [resolve(experiment, start) for start in starts]
    return flags


def difference(before, now):
    """Compare two resolved rows, and return a text that names the flags that differ, or "".

    A flag that only one of them has counts as its default on the other side.
    """
    defaults = vars(train.parse([])[0])
    changes = []
    for flag in sorted((before.keys() | now.keys()) - {"starts"}):
        if flag not in defaults:
            changes.append(f"--{flag}, which train.py no longer has")
            continue
        old_value = before.get(flag, defaults[flag])
        new_value = now.get(flag, defaults[flag])
        if old_value != new_value:
            changes.append(f"--{flag} {old_value}, now {new_value}")
    if changes:
        return ", ".join(changes)
    if len(before["starts"]) != len(now["starts"]):
        return "a different start"
    for start_before, start_now in zip(before["starts"], now["starts"]):
        text = difference(start_before, start_now)
        if text:
            return f"in its start, {text}"
    return ""


# ---------------------------------------------------------------- results
def read_results(folders, experiment):
    """Return the results as {row: {seed: result}}; the first folder that has one counts.

    Raises ValueError for a result of other flags than the row has now.
    """
    results = {}
    for name in experiment.rows:
        flags = resolve(experiment, name)
        runs = {}
        for folder in folders:
            for path in sorted(folder.glob(f"{name}-*.json")):
                seed = path.stem.removeprefix(f"{name}-")
                if not seed.isdecimal():  # a row whose name begins with this row's name
                    continue
                result = read_result(path, flags)
                runs.setdefault(int(seed), result)
        if runs:
            results[name] = runs
    return results


def read_result(path, flags):
    """Return the content of a result file. Raises ValueError if it is not of a row with `flags`."""
    result = read_json(path)
    if not is_result(result):
        raise ValueError(f"{path}: not a result file of reproduce.py; delete or move it")
    changed = difference(result["flags"], flags)
    if changed:
        raise ValueError(
            f"{path} was produced with different flags ({changed}); delete it to rerun"
        )
    return result


def is_result(content):
    """Return True if this is what Runner.run writes."""
    if not isinstance(content, dict) or not RESULT_KEYS <= content.keys():
        return False
    return bool(content["log"]) and "epoch" in content["log"][-1]


def read_log(run):
    """Return the log of a run folder, a dict per epoch so far. Raises ValueError."""
    path = run / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        log = [json.loads(line) for line in lines]
        is_log = all(isinstance(line, dict) and "epoch" in line for line in log)
    except ValueError:
        is_log = False
    if not is_log:
        message = "not a train.py log, or corrupted; resuming the run rewrites it"
        raise ValueError(f"{path}: {message}")
    return log


def provenance(result):
    """Return the revision, the device and the dataset of a result, None for what is unknown."""
    words = shlex.split(result["command"])
    data = None
    if "--data" in words:
        data = words[words.index("--data") + 1]
    return {
        "revision": result["revision"],
        "device": result["versions"].get("device"),
        "dataset": data,
    }


def report_provenance(results, experiment, data):
    """Print how many results have a different revision, device or dataset than this call."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = {
        "revision": checkpoint.revision(),
        "device": checkpoint.device_name(device),
        "dataset": data,
    }
    for key, value in here.items():
        counts = collections.Counter()
        for name, runs in results.items():
            if key == "dataset" and "{data}" not in experiment.rows[name]:
                continue  # the row names its own data
            for result in runs.values():
                counts[provenance(result)[key]] += 1
        for other, count in counts.items():
            if other and value and other != value:
                text = f"{count} results were produced with a different {key}: {other}"
                print(f"{text} (here: {value})")


# ---------------------------------------------------------------- running
class Runner:
    """Runs rows of an experiment, args.jobs of them at a time."""

    def __init__(self, experiment, args):
        self.experiment = experiment
        self.rows = experiment.rows
        self.args = args
        if args.out:
            self.out = Path(args.out)
            self.result_folders = [self.out]
        else:
            self.out = RUNS / experiment.path.parent.name
            self.result_folders = [self.out, experiment.path.parent]
        self.shares_gpus = args.jobs > 1 and torch.cuda.is_available()
        self.free_slots = queue.Queue()  # a run takes one; its number chooses the GPU
        for slot in range(args.jobs):
            self.free_slots.put(slot)

    def run_folder(self, name, seed):
        """Return the run folder of a row."""
        return self.out / f"{name}-{seed}"

    def result_file(self, name, seed):
        """Return the file with the result of a row, or None if there is none yet."""
        for folder in self.result_folders:
            path = folder / f"{name}-{seed}.json"
            if path.exists():
                return path
        return None

    def is_needed(self, name, seed, wanted):
        """Return True if a row, or one of `wanted` that starts from it, has no result yet."""
        if self.result_file(name, seed) is None:
            return True
        for other in wanted:
            if name in dependencies(self.rows[other]) and self.is_needed(other, seed, wanted):
                return True
        return False

    def is_done(self, name, seed, wanted):
        """Return True if a row need not run: it is not needed, or its run folder is complete."""
        path = self.result_file(name, seed)
        if path is not None and read_log(self.run_folder(name, seed)) == read_json(path)["log"]:
            return True
        return not self.is_needed(name, seed, wanted)

    def depth(self, name):
        """Return how many rows have to run one after another before this one."""
        depths = [self.depth(start) + 1 for start in dependencies(self.rows[name])]
        return max(depths, default=0)

    def command(self, name, seed):
        """Return the command of a row as a list of words, to be called in the folder --code."""
        out = self.out
        if out.is_relative_to(self.args.code):
            out = out.relative_to(self.args.code)
        folders = {row: f"{out}/{row}-{seed}" for row in self.rows}
        folders["data"] = "DIR" if self.args.data is None else self.args.data

        command = ["python"]
        if self.args.nproc > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(self.args.nproc)]
        command += self.experiment.program
        for word in shlex.split(self.rows[name]):
            command.append(word.format(**folders))
        command += ["--seed", str(seed), "--out", folders[name], "--resume"]
        if self.shares_gpus:  # the runs share the CPU's cores
            workers = max(1, usable_cores() // self.args.jobs)
            command += ["--workers", str(min(8, workers))]
        return command

    def environment(self, slot):
        """Return the environment variables of a run: its GPU and its number of threads."""
        environment = dict(os.environ)
        if self.shares_gpus:
            gpus = environment.get("CUDA_VISIBLE_DEVICES")
            if not gpus:
                gpus = ",".join(map(str, range(torch.cuda.device_count())))
            gpus = gpus.split(",")
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        threads = torch.get_num_threads() // (self.args.jobs * self.args.nproc)
        environment["OMP_NUM_THREADS"] = str(max(1, threads))
        return environment

    def run(self, name, seed):
        """Start or resume a row, and write its result. Raises ValueError if train.py fails."""
        folder = self.run_folder(name, seed)
        command = self.command(name, seed)
        is_resumed = folder.exists()
        slot = self.free_slots.get()
        start = time.monotonic()
        try:
            process = subprocess.run(
                [sys.executable, *command[1:]],
                cwd=self.args.code,
                env=self.environment(slot),
                capture_output=True,
                text=True,
            )
        finally:
            self.free_slots.put(slot)
        seconds = time.monotonic() - start
        if process.returncode:
            raise ValueError(f"{shlex.join(command)}: {last_error(process)}")

        config = read_json(folder / "config.json")
        result = {
            "command": shlex.join(command),
            "flags": resolve(self.experiment, name),
            "revision": config["revision"],
            "versions": config["versions"],
            "log": read_log(folder),
        }
        if not is_resumed:  # else the time of the whole run is unknown
            evaluation = sum(line.get("eval_seconds", 0) for line in result["log"])
            result["seconds"] = round(seconds - evaluation, 1)
        write_text(self.out / f"{name}-{seed}.json", json.dumps(result, indent=1) + "\n")

    def run_all(self, names, seeds):
        """Run what is not done of these rows; those that others start from come first."""
        jobs = []
        for seed, name in itertools.product(seeds, names):
            if not self.is_done(name, seed, names):
                jobs.append((name, seed))
        missing = self.missing_files(dict.fromkeys(name for name, _ in jobs))  # each row once
        if missing:
            raise ValueError("; ".join(missing))

        jobs_by_depth = collections.defaultdict(list)
        for name, seed in jobs:
            jobs_by_depth[self.depth(name)].append((name, seed))
        start = time.monotonic()
        num_done = 0
        with concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                for depth in sorted(jobs_by_depth):
                    runs = [
                        pool.submit(self.run, name, seed) for name, seed in jobs_by_depth[depth]
                    ]
                    for run in runs:
                        run.result()  # waits for it, and raises its error
                        num_done += 1
                        report_progress(num_done, len(jobs), time.monotonic() - start)
            except BaseException:  # also Ctrl-C: start no further run
                pool.shutdown(cancel_futures=True)
                raise

    def missing_files(self, names):
        """Return lines that name the files and folders these rows need and that do not exist."""
        lines = []
        for name in names:
            words = shlex.split(self.rows[name])
            for flag, path in zip(words, words[1:]):
                if flag not in FLAGS_WITH_FILES or "{" in path or "://" in path or path in MODELS:
                    continue
                if not Path(self.args.code, path).exists():
                    lines.append(f"{name}: {flag}: {path} not found")
        if lines:
            where = f"see the text at the top of {self.experiment.path} for where to get it"
            lines.append(f"{where}; --rows leaves rows out")
        return lines

    def dry_run(self, names, seeds):
        """Print the commands. Return the exit status, 1 if something they need does not exist."""
        for seed, name in itertools.product(seeds, names):
            print(shlex.join(self.command(name, seed)))
        missing = self.missing_files(names)
        for line in missing:
            print(line, file=sys.stderr)
        if missing:
            return 1
        return 0


def last_error(process):
    """Return the line in which a process that failed says why."""
    lines = process.stderr.strip().splitlines()
    if not lines:
        return f"exit status {process.returncode}"
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:  # torchrun writes more after it
        return errors[-1]
    return lines[-1]


def report_progress(num_done, num_jobs, seconds):
    """Print how many runs are done and about how long the others will take."""
    minutes = seconds / 60
    remaining = minutes / num_done * (num_jobs - num_done)
    text = f"{num_done} of {num_jobs} runs, {minutes:.0f} min; about {remaining:.0f} min left"
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the command
def reproduce(args):
    """Run the missing rows of an experiment, and print its tables. Return the exit status."""
    experiment = find_experiment(args.experiment)
    rows = select_rows(experiment, args.rows)
    check_args(args, experiment)
    runner = Runner(experiment, args)
    rows_to_run = with_dependencies(experiment, rows)
    seeds_to_run = [0]
    if args.seeds:
        seeds_to_run = list(dict.fromkeys(args.seeds))  # each once
    if args.dry_run:
        return runner.dry_run(rows_to_run, seeds_to_run)

    authors = authors_as_results(experiment)
    results = read_results(runner.result_folders, experiment)  # refuses before anything is run
    if args.no_run and not results and not authors:
        message = "no results found; choose another --out or drop --no_run"
        raise ValueError(f"{runner.out}: {message}")
    is_saved = True
    try:
        runner.out.mkdir(parents=True, exist_ok=True)
        check_writable(runner.out / "table.md")
    except (OSError, DataError) as error:
        if not args.no_run:
            raise
        is_saved = False
        print(f"table.md and figures are not written ({error})", file=sys.stderr)
    if not args.no_run:
        runner.run_all(rows_to_run, seeds_to_run)
        results = read_results(runner.result_folders, experiment)

    selected = select_results(results, rows, args.seeds)
    if not selected and not authors:
        folders = " or ".join(map(str, runner.result_folders))
        raise ValueError(f"no results for the selected rows and seeds in {folders}")
    report_provenance(selected, experiment, args.data)
    print(make_tables({**selected, **authors}, experiment))
    if experiment.comparisons and max(map(len, selected.values()), default=0) == 1:
        print("Comparisons need results of at least two seeds: --seeds 0 1")
    results.update(authors)
    if is_saved:
        write_text(runner.out / "table.md", make_tables(results, experiment) + "\n")
        draw_curves(runner.out / "curves.png", results, experiment.comparisons)
        made = compare(results, experiment.comparisons)
        made += compare_gains(results, experiment.interactions)
        draw_forest(runner.out / "forest.png", made)
    return 0


def check_args(args, experiment):
    """Raise a ValueError for flags of reproduce.py that cannot be followed."""
    if args.data and not Path(args.data).exists():
        raise ValueError(f"--data {args.data}: not found")
    if not Path(args.code, "train.py").exists():
        raise ValueError(f"--code {args.code}: contains no train.py")
    runs_something = not args.dry_run and not args.no_run
    if runs_something and needs_data(experiment) and not args.data:
        raise ValueError(f"{experiment.path}: its rows require --data DIR")
    if args.jobs > 1 and args.nproc > 1:
        message = "--jobs (parallel runs) and --nproc (processes per run) cannot be combined"
        raise ValueError(message)


def needs_data(experiment):
    """Return True if a row is run with the folder of --data."""
    return any("{data}" in flags for flags in experiment.rows.values())


def select_rows(experiment, texts):
    """Return the rows with one of these texts in their name, or all if `texts` is None.

    Raises ValueError if there are none.
    """
    if texts is None:
        return list(experiment.rows)
    rows = []
    for name in experiment.rows:
        if any(text in name for text in texts):
            rows.append(name)
    if not rows:
        raise ValueError(f"no row of {experiment.path} matches --rows {' '.join(texts)}")
    return rows


def with_dependencies(experiment, rows):
    """Return these rows and all that they start from, in the order of the experiment."""
    needed = set(rows)
    for name in reversed(experiment.rows):  # a row is defined after those it starts from
        if name in needed:
            needed.update(dependencies(experiment.rows[name]))
    return [name for name in experiment.rows if name in needed]


def select_results(results, rows, seeds):
    """Return the results of these rows and these seeds; of all seeds if they are None."""
    selected = {}
    for name in rows:
        runs = {}
        for seed, result in results.get(name, {}).items():
            if seeds is None or seed in seeds:
                runs[seed] = result
        if runs:
            selected[name] = runs
    return selected


def authors_as_results(experiment):
    """Return the authors' curves in the form of results, each as that of one run."""
    results = {}
    for name, curve in experiment.authors.items():
        log = [{"epoch": epoch, "ap": ap / 100} for epoch, ap in curve.items()]
        results[f"{AUTHORS}{name}"] = {0: {"log": log}}
    return results


def list_experiments():
    """Print the experiments: their rows, published results and what they need."""
    for path in sorted(RESULTS.glob("*/experiment.py")):
        experiment = load_experiment(path)
        num_results = len(list(path.parent.glob("*.json")))
        text = f"{len(experiment.rows)} rows, {num_results} results published"
        if needs_data(experiment):
            text += "; needs --data"
        print(f"{path.parent.name:20} {text}")


@cli_main
def main(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("experiment", nargs="?", help="name in results/, or a folder; default: list them")
    add("--data", type=os.path.abspath, help="dataset, for experiments that need one")
    add("--seeds", type=NON_NEGATIVE_INT, nargs="+", help="seeds to run (default: 0) and print")
    add(
        "--rows",
        nargs="+",
        metavar="TEXT",
        help="only rows with one of these texts in their names, and the rows they start from",
    )
    add(
        "--jobs", type=int_range(1, 256), default=1, help="parallel runs, each on a GPU if possible"
    )
    add("--nproc", type=int_range(1, 256), default=1, help="processes (GPUs) per run")
    add("--out", type=os.path.abspath, help="folder of runs and results; ignores published ones")
    add(
        "--code",
        type=os.path.abspath,
        default=ROOT,
        help="checkout of the revision to run; compares the speed of revisions",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--dry_run", action="store_true", help="print the commands, and which files they lack")
    add("--no_run", action="store_true", help="print the existing results, run nothing")
    args = parser.parse_args(argv)
    if args.experiment:
        sys.exit(reproduce(args))
    if args != parser.parse_args([]):
        parser.error("missing name of an experiment: python reproduce.py EXPERIMENT [flags]")
    list_experiments()


if __name__ == "__main__":
    main()
