"""Grade submissions: run the checks of course/variants.py and write a table.

    python course/grade.py SUBMISSIONS --out grades.csv

SUBMISSIONS has a folder per submission: a handout that a student has filled in, or the files that
students may change (FILES below). Every exercise runs in a process and a copy of its own, with a
time limit; there, only the files of that exercise are the student's, all others are the ones next
to this command. It is no sandbox: code that means harm can do what you can.
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it is started by its path

from util.cli import NON_NEGATIVE_INT, POSITIVE_INT, Parser, cli_main
from util.files import check_writable

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = "course/answers.py"
FILES = {  # {exercise: the student's file}
    "shapes": ANSWERS,
    "star": ANSWERS,
    "share": ANSWERS,
    "schedule": "train.py",
    "null": ANSWERS,
    "attention": ANSWERS,
    "matcher": "detr.py",
    "operator": "deformable_attn/reference.py",
    "rotation": "ssl_tasks.py",
    "inverted": "ssl_tasks.py",
    "backbone": "detr.py",
    "backward": ANSWERS,
}
NEEDED = ("course", "deformable_attn", "recipes", "util", "results/scenes")  # by the checks
PASSED, FAILED, TIME_OUT, ERROR, MISSING = "passed", "failed", "time out", "error", "missing"


def copy_originals(folder):
    """Copy what the checks need of this repository into a new folder."""
    ignore = shutil.ignore_patterns("__pycache__", "*.png")
    for name in NEEDED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copyfile(path, folder / path.name)


def grade(submission, exercise, args):
    """Return PASSED, FAILED, TIME_OUT, ERROR or MISSING for an exercise of a submission."""
    file = submission / FILES[exercise]
    if not file.is_file():
        return MISSING
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        copy_originals(copy)
        shutil.copyfile(file, copy / FILES[exercise])
        report = Path(folder, "report.xml")
        finished = run_checks(copy, exercise, report, args)
        if not finished:
            return TIME_OUT
        return outcome(report)


def run_checks(copy, exercise, report, args):
    """Run the checks of an exercise. Return False if they exceed the time limit."""
    command = [sys.executable, "-m", "pytest", "course/variants.py", "-q", "-s", "-x"]
    command += ["-k", f"test_{exercise}", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {**os.environ, "ORIGINALS": str(ROOT), "VARIANT_SEED": str(args.seed)}
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(args.time_limit)
    except subprocess.TimeoutExpired:
        return False
    finally:  # also what it has started
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return True


def outcome(report):
    """Return PASSED, FAILED or ERROR of a report of pytest."""
    try:
        suite = ElementTree.parse(report).getroot()[0]
    except (OSError, ElementTree.ParseError, IndexError):
        return ERROR  # the process ended before the checks did
    if int(suite.get("errors")) > 0 or int(suite.get("tests")) == 0:
        return ERROR
    if int(suite.get("failures")) > 0:
        return FAILED
    return PASSED


@cli_main
def main(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("submissions", type=Path, help="folder with a folder per submission")
    add("--out", type=Path, default=Path("grades.csv"), help="table to write")
    add("--exercises", nargs="+", choices=FILES, default=list(FILES), help="default: all")
    add("--time_limit", type=POSITIVE_INT, default=120, metavar="SECONDS", help="per exercise")
    add("--seed", type=NON_NEGATIVE_INT, help="of the variants; default: a random one")
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1, 10_000)
    submissions = []
    if args.submissions.is_dir():
        submissions = sorted(path for path in args.submissions.iterdir() if path.is_dir())
    if not submissions:
        raise ValueError(f"{args.submissions}: contains no folders; expected one per submission")
    check_writable(args.out)
    print(f"seed {args.seed}")
    with open(args.out, "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["submission", *args.exercises, "points"])
        for submission in submissions:
            grades = [grade(submission, exercise, args) for exercise in args.exercises]
            writer.writerow([submission.name, *grades, grades.count(PASSED)])
            table.flush()
            print(f"{submission.name}: {grades.count(PASSED)} of {len(grades)}", flush=True)


if __name__ == "__main__":
    main()
