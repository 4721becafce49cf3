"""Handouts hold no solutions; submissions are graded with other numbers than students see."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_course import ANSWERS, MOBILENET, ROTATION

from course import exercise, grade, handout

ROOT = Path(__file__).resolve().parent.parent
needs_git = pytest.mark.skipif(
    not shutil.which("git") or not (ROOT / ".git").exists(), reason="needs a git checkout"
)


@needs_git
def test_a_handout(tmp_path):
    """Two are equal, byte for byte; solutions and the lecturer's files are missing."""
    command = [sys.executable, "course/handout.py"]
    for name in ("one", "two"):
        subprocess.run([*command, tmp_path / name], cwd=ROOT, check=True, capture_output=True)
    files = {}
    for name in ("one", "two"):
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        files[name] = {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}
    assert files["one"] == files["two"]
    copied = files["one"]
    assert {"README.md", "COURSE.md", "course/answers.py", "course/test_exercises.py"} <= set(
        copied
    )
    assert not [name for name in copied if name.startswith(handout.LECTURERS)]

    for name, (file, function) in exercise.REMOVED.items():
        code = copied[file].decode()
        body = code[code.index(f"def {function}(") :].split('"""')[2].strip()
        assert body.startswith(exercise.PLACEHOLDER), name
    file, before, after = exercise.REPLACED["inverted"]
    assert before not in copied[file].decode()
    assert after in copied[file].decode()
    everything = b"\n".join(content for name, content in copied.items() if name.endswith(".py"))
    for solution in (ANSWERS, ROTATION, MOBILENET, before):
        for line in solution.strip().splitlines():
            if len(line) > 60 and "def " not in line:
                assert line.strip().encode() not in everything, line

    again = subprocess.run([*command, tmp_path / "one"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.endswith("one: already exists; choose a new folder\n")


def test_a_handout_needs_git(tmp_path, monkeypatch):
    monkeypatch.setattr(handout, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="not a git checkout"):
        handout.tracked_files()


def make_submission(folder, **files):
    """Write a student's files: answers, detr, ssl_tasks; what is not given is missing."""
    for name, content in files.items():
        path = folder / grade.ANSWERS
        if name != "answers":
            path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def grades(submissions, exercises, *flags):
    """Run the command. Return {submission: {column: cell}}."""
    out = submissions / "grades.csv"
    command = [sys.executable, "course/grade.py", submissions, "--out", out, "--seed", "7", *flags]
    command += ["--exercises", *exercises.split()]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    with open(out, newline="", encoding="utf-8") as table:
        return {row.pop("submission"): row for row in csv.DictReader(table)}


CONSTANT = """
import torch

def attention(layer, query, memory):
    return torch.tensor(EXPECTED)
"""


def test_the_variants_accept_the_solutions(tmp_path):
    """All at once, in a copy in which every exercise is solved."""
    copy = tmp_path / "copy"
    grade.copy_originals(copy)
    (copy / grade.ANSWERS).write_text(ANSWERS, encoding="utf-8")
    for file, solution in (("ssl_tasks.py", ROTATION), ("detr.py", MOBILENET)):
        with open(copy / file, "a", encoding="utf-8") as code:
            code.write(solution)
    environment = {**os.environ, "ORIGINALS": str(ROOT), "VARIANT_SEED": "3"}
    command = [sys.executable, "-m", "pytest", "course/variants.py", "-q", "-rA"]
    process = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    passed = set(re.findall(r"^PASSED course/variants.py::test_(\w+)", process.stdout, re.M))
    assert passed == set(grade.FILES)


def test_solutions_pass_and_constants_fail(tmp_path):
    """Constants that pass the public check fail, since the hidden one has other numbers."""
    solved = (ROOT / "ssl_tasks.py").read_text(encoding="utf-8") + ROTATION
    make_submission(tmp_path / "right", answers=ANSWERS, ssl_tasks=solved)
    make_submission(tmp_path / "constant", answers=constant_answers())
    table = grades(tmp_path, "attention rotation")
    assert table["right"] == {"attention": "passed", "rotation": "passed", "points": "2"}
    assert table["constant"] == {"attention": "failed", "rotation": "missing", "points": "0"}


def constant_answers():
    """Answers that return what the public check of `attention` expects, whatever is asked."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    torch.nn.init.normal_(layer.in_proj_bias)
    query = torch.randn(32)
    memory = torch.randn(10, 32)
    _, weights = layer(query[None, None], memory[None], memory[None], average_attn_weights=False)
    return CONSTANT.replace("EXPECTED", str(weights[0, :, 0].tolist()))


HANGS = """
import time

def attention(layer, query, memory):
    time.sleep(3600)
"""
EXITS = "import os\nos._exit(0)\n"
CHATTY = ANSWERS + '\nprint("x" * 10_000_000)\n'
DESTRUCTIVE = """
import shutil
from pathlib import Path

shutil.rmtree(Path(__file__).parent)
"""


def test_what_goes_wrong_stays_with_its_submission(tmp_path):
    """Ending the process, deleting its folder, printing megabytes: the others are graded."""
    for name, answers in (("a", EXITS), ("b", DESTRUCTIVE), ("c", CHATTY)):
        make_submission(tmp_path / name, answers=answers)
    table = grades(tmp_path, "attention")
    assert table["a"]["attention"] == "error"
    assert table["b"]["attention"] in ("error", "failed")
    assert table["c"]["attention"] == "passed"
    assert (tmp_path / "b" / grade.ANSWERS).is_file()  # it ran in a copy


def test_a_submission_that_hangs(tmp_path):
    make_submission(tmp_path / "a", answers=HANGS)
    assert grades(tmp_path, "attention", "--time_limit", "2")["a"]["attention"] == "time out"


def test_mistakes_get_one_line(tmp_path):
    command = [sys.executable, "course/grade.py", tmp_path]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.endswith("contains no folders; expected one per submission\n")
