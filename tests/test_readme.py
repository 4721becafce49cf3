"""What README.md and docs/ show is true: Python runs, commands parse, names and figures exist."""

import re
import shlex

import pytest
import torch
from test_checkpoint import ROOT, TINY, log_of
from torchvision.ops import box_convert

import isaid
import reproduce
import ssl_tasks
import train
from eval import parse as eval_parse
from tools import attention, compare, predict

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
TEXT = "\n".join([README, *DOCS.values()])
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = re.findall(r"^(?:    |`)(?:.*&& )?python (.*?)`?$", TEXT, re.M)
COMMANDS += re.findall(r"(?<!python )(train\.py @.*)$", TEXT, re.M)  # by launchers
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
COMMANDS += re.findall(r"(?<!`)`python\s([^`]+)`", PROSE)  # in tables and sentences
COMMANDS = [command for command in COMMANDS if "NAME" not in command and "`" not in command]
PARSERS = {
    "train.py": train.parse,
    "eval.py": eval_parse,
    "tools.predict": predict.parse,
    "tools.attention": attention.parse,
    "tools.compare": compare.parse,
}


def snippet_with(text):
    """Return the only Python snippet of the README and the docs that contains a text."""
    snippets = [snippet for snippet in SNIPPETS if text in snippet]
    assert len(snippets) == 1
    return snippets[0]


def test_lines_fit_a_terminal():
    for line in TEXT.splitlines():
        assert len(line) <= 120 or line.startswith("|")


def test_the_training_loop_learns(capsys):
    names = {}
    exec(snippet_with("optimizer.step()"), names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < 0.9 * losses[0]
    assert len(names["detections"]) == 4
    assert names["detections"][0]["boxes"].shape[1] == 4


def test_a_run_from_python(tmp_path, monkeypatch, capsys):
    """The lines for a notebook: each box is that of its query; a picture comes last."""
    lines = snippet_with("load_run")
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--epochs", "1"])
    capsys.readouterr()
    names = {}
    exec(lines, names)
    printed = capsys.readouterr().out.splitlines()
    detection = names["detection"]
    query_boxes = names["outputs"]["boxes"][-1, 0]
    boxes = box_convert(detection["boxes"] / 128, "xyxy", "cxcywh")
    torch.testing.assert_close(boxes, query_boxes[detection["queries"]])
    assert len(printed) == 3
    assert f" {round(detection['scores'][0].item(), 2)} " in printed[0]
    assert names["points"].shape == (2, 12, 2)
    assert names["weights"].shape == (2, 12)
    picture = eval(lines.splitlines()[-1], names)
    assert picture.width == 3 * 324


def test_the_operator_from_python(capsys):
    exec(snippet_with("ms_deform_attn"), {})
    assert capsys.readouterr().out == "torch.Size([1, 5, 256])\n"


@pytest.mark.parametrize("setting", ["pretrain", "multitask"])
def test_a_sixth_task(setting, tmp_path, monkeypatch):
    """The README's task, added as it says, beats the mean color on held-out images."""
    before = ssl_tasks.TASKS
    monkeypatch.setattr(ssl_tasks, "TASKS", dict(before))
    exec(snippet_with("TASKS"), vars(ssl_tasks))
    new_tasks = [name for name in ssl_tasks.TASKS if name not in before]
    assert len(new_tasks) == 1
    flags = "--image_size 64 --hidden_dim 64 --limit_train 96 --limit_val 40 --dec_layers 1"
    flags += f" --ssl_patch 16 --ssl_weight 20 --epochs 4 --eval_every 4 --setting {setting}"
    flags += f" --ssl_task {new_tasks[0]} --out {tmp_path / 'run'}"
    train.main(flags.split())
    last = log_of(tmp_path / "run")[-1]
    assert last["ssl_loss"] < 0.95 * last["ssl_baseline"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *flags = shlex.split(command.split("#")[0])
    if program == "-m":
        program, *flags = flags
    if "block-colors" in flags:  # the README's own task
        monkeypatch.setitem(ssl_tasks.TASKS, "block-colors", ssl_tasks.PixelTask)
    if flags == ["--help"]:
        flags = []
    if program in PARSERS:
        PARSERS[program](flags)
    elif program == "reproduce.py":
        for name in flags[:1]:
            reproduce.find_experiment(name)
    elif program == "isaid.py":
        with pytest.raises(SystemExit) as stop:
            isaid.main(flags)
        assert stop.value.code not in (0, 2)  # RAW and DATA do not exist; 2: a mistake in the flags
    else:
        others = ("pytest", "deformable_attn.bench", "course/handout.py", "course/grade.py")
        assert program in others


def test_every_combination_is_tried(monkeypatch):
    """The experiment `tasks` has all 40 combinations of detectors, settings, tasks and places."""
    monkeypatch.chdir(ROOT)
    tasks = reproduce.find_experiment("tasks")
    combinations = set()
    for name in tasks.rows:
        if name != "backbone":
            args = reproduce.parse_row(tasks, name)
            combinations.add((args.model, args.setting, args.ssl_task, args.ssl_on))
    assert len(combinations) == len(tasks.rows) - 1 == 40


def test_names_exist():
    """Every `file: name, name`, every file and every link."""
    pointers = re.findall(r"`([\w/.]+): ([\w, .]+)`", TEXT)
    assert len(pointers) >= 11
    for file, names in pointers:
        path = ROOT / file
        files = [path]
        if path.is_dir():
            files = path.glob("*.py")
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        for name in names.split(", "):
            name = name.split(".")[-1]
            assert re.search(rf"(def|class) {name}\b", code), (file, name)
    for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", README):
        assert (ROOT / name).exists(), name
    for path, text in {ROOT / "README.md": README, **DOCS}.items():
        for target in re.findall(r"\]\(([^):]+)\)", text):
            assert (path.parent / target).exists(), target


def test_the_table_has_every_experiment_and_its_number_of_rows():
    names = {path.parent.name for path in (ROOT / "results").glob("*/experiment.py")}
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (\d+)[^|]* \| [^|]+ \|$", README, re.M)
    numbers = {name: int(number) for name, number in rows}
    assert numbers.keys() == names
    for name, number in numbers.items():
        assert number == len(reproduce.find_experiment(name).rows)
