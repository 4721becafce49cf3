"""Prepare an exercise of COURSE.md: remove code from the source, or introduce a bug.

    python course/exercise.py matcher      removes the matching costs from detr.py
    git checkout detr.py                   restores the file; your other changes to it are lost

Exercises that are prepared: matcher, schedule, operator, inverted.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = 'raise NotImplementedError("your turn, see COURSE.md")'

# exercise: (file, function whose body is removed)
REMOVED = {
    "matcher": ("detr.py", "matching_costs"),
    "schedule": ("train.py", "build_schedule"),
    "operator": ("deformable_attn/reference.py", "ms_deform_attn_reference"),
}

# exercise: (file, code before, code after). Spoiler: this is the solution of the exercise.
REPLACED = {
    "inverted": ("ssl_tasks.py", "inside & corruption.changed()", "inside & ~corruption.changed()")
}


def file_of(name):
    """Return the file that an exercise changes. Exits with a message if there is no such one."""
    exercises = REMOVED | REPLACED
    if name not in exercises:
        sys.exit(f"error: unknown exercise {name!r}; choose from {', '.join(exercises)}")
    return exercises[name][0]


def prepare(name, root=ROOT):
    """Change the source in a folder for an exercise. Exits with a message if it cannot."""
    file = file_of(name)
    code = (root / file).read_text(encoding="utf-8")
    if name in REMOVED:
        _, function = REMOVED[name]
        changed = remove_body(code, function)
    else:
        _, before, after = REPLACED[name]
        changed = code.replace(before, after)
    if changed == code:
        message = f"does not contain the code that {name!r} modifies; start from a fresh clone"
        sys.exit(f"error: {file} {message}")
    (root / file).write_text(changed, encoding="utf-8")


def require_committed(file):
    """Exit with a message if the file has changes that `git checkout` would discard."""
    if has_uncommitted_changes(file):
        advice = "commit them first, git checkout would discard them"
        sys.exit(f"error: {file} has uncommitted changes; {advice}")


def has_uncommitted_changes(file):
    """Return True if git knows of changes to the file; False also without git."""
    if not shutil.which("git"):
        return False
    command = ["git", "status", "--porcelain", "--", file]
    status = subprocess.run(command, cwd=ROOT, capture_output=True)
    return status.stdout != b""


def remove_body(code, name):
    """Return the code of a module in which a function has only its head and its docstring left."""
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            docstring = node.body[0]
            indent = " " * docstring.col_offset
            lines[docstring.end_lineno : node.end_lineno] = [indent + PLACEHOLDER]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    exercise = sys.argv[1]
    require_committed(file_of(exercise))
    prepare(exercise)
    print(f"{file_of(exercise)} is prepared; check: python -m pytest course -k {exercise}")
