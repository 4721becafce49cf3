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


def test_lines_fit_a_terminal():
    assert max(map(len, TEXT.splitlines())) <= 120


def test_the_training_loop_learns(capsys):
    """The README's loop from Python runs as it stands, and its loss falls."""
    (loop,) = (snippet for snippet in SNIPPETS if "optimizer.step()" in snippet)
    names = {}
    exec(loop, names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5 and losses[-1] < 0.9 * losses[0]
    assert len(names["found"]) == 4 and names["found"][0]["boxes"].shape[1] == 4


def test_a_run_from_python(tmp_path, monkeypatch, capsys):
    """The README's lines for a notebook: each box is its query's; a picture comes last."""
    (lines,) = (snippet for snippet in SNIPPETS if "load_run" in snippet)
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--epochs", "1"])
    capsys.readouterr()
    names = {}
    exec(lines, names)
    printed = capsys.readouterr().out.splitlines()
    found, boxes = names["found"], names["outputs"]["boxes"][-1, 0]
    found["boxes"] = box_convert(found["boxes"] / 128, "xyxy", "cxcywh")
    torch.testing.assert_close(found["boxes"], boxes[found["queries"]])
    assert len(printed) == 3
    assert f" {found['scores'][0]:.2f}".rstrip("0") in printed[0]
    assert names["points"].shape == (2, 12, 2) and names["weights"].shape == (2, 12)
    assert eval(lines.splitlines()[-1], names).width == 3 * 324


def test_the_operator_from_python(capsys):
    (snippet,) = (snippet for snippet in SNIPPETS if "ms_deform_attn" in snippet)
    exec(snippet, {})
    assert capsys.readouterr().out == "torch.Size([1, 5, 256])\n"


@pytest.mark.parametrize("setting", ["pretrain", "multitask"])
def test_a_sixth_task(setting, tmp_path, monkeypatch):
    """The README's task, added as it says, beats the mean colour on held-out images."""
    (snippet,) = (snippet for snippet in SNIPPETS if "TASKS" in snippet)
    before = ssl_tasks.TASKS
    monkeypatch.setattr(ssl_tasks, "TASKS", dict(before))
    flags = "--image_size 64 --hidden_dim 64 --limit_train 96 --limit_val 40 --dec_layers 1"
    flags += f" --ssl_patch 16 --ssl_weight 20 --epochs 4 --eval_every 4 --setting {setting}"
    exec(snippet, vars(ssl_tasks))
    (name,) = ssl_tasks.TASKS.keys() - before.keys()
    train.main([*flags.split(), "--ssl_task", name, "--out", f"{tmp_path}/run"])
    last = log_of(tmp_path / "run")[-1]
    assert last["ssl_loss"] < 0.95 * last["ssl_baseline"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *flags = shlex.split(command.split("#")[0])
    if script == "-m" and flags[0].startswith("tools."):
        script, *flags = flags
    parsers = {"train.py": train.parse, "eval.py": eval_parse}
    parsers |= {"tools.predict": predict.parse, "tools.attention": attention.parse}
    parsers |= {"tools.compare": compare.parse}
    if script in parsers:
        assert "block-colours" in flags or parsers[script](flags)
    elif script == "reproduce.py":
        for name in flags[:1]:
            reproduce.find_experiment(name)
    elif script == "isaid.py":
        with pytest.raises(SystemExit) as stop:  # there is no such folder
            isaid.main(flags)
        assert "RAW: has no" in str(stop.value.code) or stop.value.code == 1
    else:
        assert script == "-m" and flags[0] in ("pytest", "deformable_attn.bench")


def test_tables_parse(monkeypatch):
    """The 40 combinations of the experiment `tasks` are there."""
    monkeypatch.chdir(ROOT)
    tasks = reproduce.find_experiment("tasks")
    rows = [name for name in tasks.rows if name != "backbone"]
    found = [vars(reproduce.parse_row(tasks, name)) for name in rows]
    kinds = {tuple(row[key] for key in ("model", "setting", "ssl_task", "ssl_on")) for row in found}
    assert len(kinds) == len(found) == 40


def test_names_exist():
    """Every `file: name, name` that the README points to."""
    found = re.findall(r"`([\w/.]+): ([\w, .]+)`", README)
    assert len(found) >= 11
    for where, names in found:
        path = ROOT / where.rstrip("/")
        files = path.glob("*.py") if path.is_dir() else [path]
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        for name in names.split(", "):
            assert re.search(rf"(def|class) {name.rsplit('.', 1)[-1]}\b", code), (where, name)
    for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", README):
        assert (ROOT / name).exists(), name
    for path, text in {ROOT / "README.md": README, **DOCS}.items():
        for target in re.findall(r"\]\(([^):]+)\)", text):
            assert (path.parent / target).exists(), target


def test_verdicts_are_those_of_the_results():
    """Each task's differences in RESULTS.md as shipped; in README.md the least and largest of the
    paper's claims, and the gains and losses beyond them that are established."""
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    multitask, deformable = "multi-task learning", "Deformable DETR, multi-task learning"
    beyond, again = [], []
    for folder, kind, other, claim, short in (
        ("scenes", "detr-after", "detr-scratch", "pretraining", "pretraining speeds DETR up"),
        ("scenes", "detr-multitask", "detr-scratch", multitask, f"{multitask} speeds"),
        ("scenes", "deformable_detr", ".*", deformable, f"{multitask} does not"),
        ("scenes", "features-after", "detr-scratch", "pretraining", ""),
        ("scenes", "features-multitask", "detr-scratch", multitask, ""),
        ("scenes", "features-after", r"detr-after-\S+", "pretraining", ""),
        ("scenes", "features-multitask", r"detr-multitask-\S+", multitask, ""),
        ("scenes", "aux-after", "aux-scratch", "pretraining", ""),
        ("scenes", "aux-multitask", "aux-scratch", multitask, ""),
        ("scenes", "other-multitask", "other-v0", deformable, ""),
        ("again", "detr-after", "detr-scratch", "pretraining", ""),
        ("again", "features-multitask", "detr-scratch", multitask, ""),
    ):
        table = (ROOT / f"results/{folder}/table.md").read_text(encoding="utf-8")
        row = rf"^\| {kind}-(\S+) - {other} \| {{}} \| (\S+) \| (.*?) \| (\S+) \| (\S+) \|"
        last, mean = (
            {task: f"{gain} ({interval}) | {p}; {holm}"
             for task, gain, interval, p, holm in re.findall(row.format(how), table, re.M)}
            for how in ("last epoch", "mean of the epochs")
        )  # fmt: skip
        assert last
        for task, text in last.items():
            name = {"v1": "reconstruct"}.get(task, task)
            assert f"| {claim}, `{name}` | {text} | {mean[task]} |" in results
        by_gain = sorted(last.values(), key=lambda text: float(text.split()[0]))
        ends = dict.fromkeys(text.split(" |")[0] for text in (by_gain[0], by_gain[-1]))
        line = rf"^\| {short}.*? \| {re.escape(' | '.join(ends))} \|"
        assert not short or re.search(line, README, re.M)
        if folder == "again":
            again.append(by_gain[-1].split()[0])
        elif not short and other.endswith(("-scratch", "-v0")):
            beyond += last.values()
    sure = [text.split(" |")[0] for text in beyond if float(text.split("; ")[1]) < 0.05]
    gains = [text for text in sure if text.startswith("+")]
    assert (len(beyond), len(gains), len(sure) - len(gains)) == (20, 2, 2)
    readme = README.replace("\n", " ")
    assert re.search(r"twenty more .* two are .*; two are losses", readme)
    assert all(gain in readme for gain in gains)
    assert f"with other seeds ({', '.join(again)})" in readme


def test_the_demonstrations_line_is_in_the_results():
    line = re.search(r"epoch   7/7 .* AP (\S+)  AP50 (\S+)  AP75 (\S+) ", README)
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    rows = [re.search(rf"^\| {name} \|.* (\S+) \|$", results, re.M)[1] for name in ("AP", "AP50")]
    assert rows == [line[1], line[2]]


def test_the_speed_run_is_that_of_its_results():
    """AP50, minutes and the share of the first version's time, as reproduce.py prints them; p of
    the record by the seeds with which nothing was chosen."""
    text = (ROOT / "SPEEDRUN.md").read_text(encoding="utf-8")
    experiment = reproduce.find_experiment("speedrun")
    results = reproduce.read_results([ROOT / "results/speedrun"], experiment)
    new = {**results, "now": {seed: results["now"][seed] for seed in range(5, 10)}}
    lines = reproduce.goal_table(results, experiment.goals)
    of_new = reproduce.goal_table(new, experiment.goals)
    assert len(lines) == len(of_new) == 5
    for row, line, other in zip(("cosine", "now"), lines[2:], of_new[2:]):
        _, ap50, _, _, minutes, _, share = line.strip("| ").split(" | ")
        p = other.split(" | ")[3]
        (revision,) = {run["revision"] for run in results[row].values()}
        assert f"{revision} | {ap50} | {p} | {minutes} | {share} |" in text
