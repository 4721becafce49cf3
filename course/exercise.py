"""Prepare an exercise of COURSE.md: take code out of the source, or put a fault into it.

python course/exercise.py matcher      takes the matching costs out of detr.py
git checkout detr.py                   puts them back; what else you changed there is lost
"""

import ast
import codecs
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REMOVED = {"matcher": ("detr.py", "matching_costs"), "schedule": ("train.py", "build_schedule"),
           "operator": ("deformable_attn/reference.py", "ms_deform_attn_reference")}  # fmt: skip
PLANTED = {
    "inverted": ("ssl_tasks.py", "vafvqr & pbeehcgvba.punatrq()", "vafvqr & ~pbeehcgvba.punatrq()")
}  # ROT13
TURN = 'raise NotImplementedError("your turn, see COURSE.md")'


def without(code, function):
    """The source with nothing left of a function but its head and its docstring."""
    functions = (x for x in ast.walk(ast.parse(code)) if isinstance(x, ast.FunctionDef))
    found = next(x for x in functions if x.name == function)
    first, lines = found.body[1], code.splitlines()
    lines[first.lineno - 1 : found.end_lineno] = [" " * first.col_offset + TURN]
    return "\n".join(lines) + "\n"


def prepare(name):
    """Change the source for an exercise; the name of the file. SystemExit with a message."""
    if name not in REMOVED | PLANTED:
        sys.exit(f"error: {name!r} is none of {', '.join(REMOVED | PLANTED)}")
    file = (REMOVED | PLANTED)[name][0]
    status = ["git", "status", "--porcelain", "--", file]
    if shutil.which("git") and subprocess.run(status, cwd=ROOT, capture_output=True).stdout:
        sys.exit(f"error: {file} has changes of yours; commit them (git checkout would lose them)")
    code = (ROOT / file).read_text(encoding="utf-8")
    if name in REMOVED:
        changed = without(code, REMOVED[name][1])
    else:
        changed = code.replace(*(codecs.decode(text, "rot13") for text in PLANTED[name][1:]))
    if changed == code:
        sys.exit(f"error: {file} does not have what {name!r} changes; start from a fresh clone")
    (ROOT / file).write_text(changed, encoding="utf-8")
    return file


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(f"{prepare(sys.argv[1])} is prepared; check: python -m pytest course -k {sys.argv[1]}")
