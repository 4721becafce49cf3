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
from util.tables import goal_table

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
DOCS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
TEXT = "\n".join([README, *DOCS.values()])
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = re.findall(r"^(?:    |`)(?:.*&& )?python (.*?)`?$", TEXT, re.M)
COMMANDS += re.findall(r"(?<!python )(train\.py @.*)$", TEXT, re.M)  # by launchers
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
    assert max(map(len, TEXT.splitlines())) <= 120


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
        assert program in ("pytest", "deformable_attn.bench")


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
    pointers = re.findall(r"`([\w/.]+): ([\w, .]+)`", README)
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


# ---------------------------------------------------------------- figures
PAPER_CLAIMS = {  # beginning of the rows' names in results/scenes: the claim in README.md
    "detr-after": "pretraining speeds DETR up",
    "detr-multitask": "multi-task learning speeds DETR up",
    "deformable_detr": "multi-task learning does not speed Deformable DETR up",
}
SETTINGS = {  # beginning of the rows' names in results/NAME: the setting in RESULTS.md
    "detr-after": "pretraining",
    "features-after": "pretraining",
    "aux-after": "pretraining",
    "detr-multitask": "multi-task learning",
    "features-multitask": "multi-task learning",
    "aux-multitask": "multi-task learning",
    "deformable_detr": "Deformable DETR, multi-task learning",
    "other-multitask": "Deformable DETR, multi-task learning",
}


def published_comparisons(experiment):
    """Return {(row, baseline): {measure: (gain with interval, p, p after Holm)}} as published."""
    table = (ROOT / f"results/{experiment}/table.md").read_text(encoding="utf-8")
    comparisons = {}
    for line in table.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 7 and " - " in cells[0]:
            rows, measure, gain, interval, p, holm_p, _ = cells
            row, baseline = rows.split(" - ")
            measures = comparisons.setdefault((row, baseline), {})
            measures[measure] = (f"{gain} ({interval})", p, holm_p)
    return comparisons


def kind_and_task(row):
    """Split the name of a row: ("detr-after", "mim-continuous")."""
    for kind in SETTINGS:
        if row.startswith(f"{kind}-"):
            task = row.removeprefix(f"{kind}-")
            return kind, "reconstruct" if task == "v1" else task
    raise AssertionError(f"{row} is of no known kind")


def gain_of(text):
    return float(text.split()[0])


@pytest.mark.parametrize("experiment, number", [("scenes", 36), ("again", 2)])
def test_results_has_every_comparison(experiment, number):
    comparisons = published_comparisons(experiment)
    assert len(comparisons) == number
    for (row, _), measures in comparisons.items():
        kind, task = kind_and_task(row)
        last, p, holm_p = measures["last epoch"]
        mean, mean_p, mean_holm_p = measures["mean of the epochs"]
        cells = f"{last} | {p}; {holm_p} | {mean} | {mean_p}; {mean_holm_p}"
        assert f"| {SETTINGS[kind]}, `{task}` | {cells} |" in RESULTS


def test_readme_has_the_worst_and_the_best_task_of_each_claim():
    gains = {kind: [] for kind in PAPER_CLAIMS}
    for (row, _), measures in published_comparisons("scenes").items():
        kind, _ = kind_and_task(row)
        if kind in gains:
            gains[kind].append(measures["last epoch"][0])
    for kind, claim in PAPER_CLAIMS.items():
        cells = [min(gains[kind], key=gain_of)]
        if len(gains[kind]) > 1:
            cells.append(max(gains[kind], key=gain_of))
        assert f"| {claim} | {' | '.join(cells)} |" in README


def test_readme_has_the_significant_gains_beyond_the_paper():
    beyond = []
    for (row, baseline), measures in published_comparisons("scenes").items():
        kind, _ = kind_and_task(row)
        if kind not in PAPER_CLAIMS and baseline.endswith(("-scratch", "-v0")):
            beyond.append(measures["last epoch"])
    significant = [text for text, _, holm_p in beyond if float(holm_p) < 0.05]
    gains = [text for text in significant if gain_of(text) > 0]
    losses = [text for text in significant if gain_of(text) < 0]
    readme = README.replace("\n", " ")
    assert (len(beyond), len(gains), len(losses)) == (20, 2, 2)
    assert re.search("twenty more .* two are .*; two are losses", readme)
    for gain in gains:
        assert gain in readme

    again = []
    for measures in published_comparisons("again").values():
        text, _, _ = measures["last epoch"]
        again.append(text.split()[0])
    assert f"with other seeds ({', '.join(again)})" in readme


def test_the_demonstrations_line_is_in_the_results():
    line = re.search(r"epoch   7/7 .* AP (\S+)  AP50 (\S+)  AP75 (\S+) ", README)
    for name, value in zip(("AP", "AP50", "AP75"), line.groups()):
        row = re.search(rf"^\| {name} \|.* (\S+) \|$", RESULTS, re.M)
        assert row[1] == value


def test_the_speed_run_is_that_of_its_results():
    """AP50, minutes and the share of the first version's time are as reproduce.py prints them; the
    p of the record is from the seeds with which nothing was chosen, 5 to 9."""
    text = (ROOT / "SPEEDRUN.md").read_text(encoding="utf-8")
    experiment = reproduce.find_experiment("speedrun")
    results = reproduce.read_results([ROOT / "results/speedrun"], experiment)
    unseen_seeds = {seed: results["now"][seed] for seed in range(5, 10)}
    table = goal_table(results, experiment.goals)
    unseen_table = goal_table({**results, "now": unseen_seeds}, experiment.goals)
    assert len(table) == len(unseen_table) == 5
    for i, row in ((2, "cosine"), (3, "now")):
        _, ap50, _, _, minutes, _, share = table[i].strip("| ").split(" | ")
        p = unseen_table[i].split(" | ")[3]
        revisions = {run["revision"] for run in results[row].values()}
        assert len(revisions) == 1
        assert f"{revisions.pop()} | {ap50} | {p} | {minutes} | {share} |" in text
