"""Make a copy of this repository for students: without solutions, the exercises prepared.

    python course/handout.py DIR
    python course/handout.py DIR --exercises matcher operator

The copy has the files that git tracks, except the tests, which contain solutions, and the
lecturer's commands. Two calls make the same files, byte for byte.
"""

import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it is started by its path

from course import exercise
from util.cli import Parser, cli_main

ROOT = Path(__file__).resolve().parents[1]
LECTURERS = (  # files and folders that students do not get
    "tests/",
    ".ci/",
    "course/exercise.py",
    "course/grade.py",
    "course/handout.py",
    "course/variants.py",
    "docs/teaching.md",
)
EXERCISES = [*exercise.REMOVED, *exercise.REPLACED]  # those that exercise.py prepares


def tracked_files():
    """Return the files that git tracks, relative to the repository. Raises ValueError."""
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        message = "not a git checkout (or git is not installed); make handouts from a clone"
        raise ValueError(f"{ROOT}: {message}") from None
    return sorted(listed.stdout.decode().split("\0")[:-1])


def make_handout(out, exercises):
    """Copy the students' files to a new folder and prepare exercises there. Raises ValueError."""
    if out.exists():
        raise ValueError(f"{out}: already exists; choose a new folder")
    for file in tracked_files():
        if file.startswith(LECTURERS) or not (ROOT / file).is_file():
            continue
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, out / file)
    for name in exercises:
        exercise.prepare(name, out)


@cli_main
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="DIR", help="new folder for the handout")
    parser.add_argument(
        "--exercises",
        nargs="+",
        choices=EXERCISES,
        default=EXERCISES,
        help="exercises to prepare; default: all that need it",
    )
    args = parser.parse_args(argv)
    make_handout(args.out, args.exercises)
    print(f"{args.out} is ready; prepared exercises: {', '.join(args.exercises)}")


if __name__ == "__main__":
    main()
