"""What RESULTS.md and results/*/README.md show is what the published results say."""

import re

import pytest
from test_checkpoint import ROOT
from test_readme import README

import reproduce
from util.tables import goal_table, mean_and_std, percent

RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
PAGES = {ROOT / "RESULTS.md": RESULTS}
for path in (ROOT / "results").glob("*/README.md"):
    PAGES[path] = path.read_text(encoding="utf-8")
SETTINGS = {  # beginning of the rows' names: the setting in the tables
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
            if task == "v1":
                task = "reconstruct"
            return kind, task
    raise AssertionError(f"{row} is of no known kind")


@pytest.mark.parametrize("experiment, number", [("scenes", 36), ("again", 2)])
def test_every_comparison_is_on_its_page(experiment, number):
    page = PAGES[ROOT / f"results/{experiment}/README.md"]
    comparisons = published_comparisons(experiment)
    assert len(comparisons) == number
    for (row, _), measures in comparisons.items():
        kind, task = kind_and_task(row)
        last, p, holm_p = measures["last epoch"]
        mean, mean_p, mean_holm_p = measures["mean of the epochs"]
        cells = f"{last} | {p}; {holm_p} | {mean} | {mean_p}; {mean_holm_p}"
        assert f"| {SETTINGS[kind]}, `{task}` | {cells} |" in page


SUMMARY = [  # question, experiment, rows of which each has a line
    ("Does pretraining", "scenes", r"detr-after-.*"),
    ("ten new seeds", "again", r"detr-after-.*"),
    ("Does multi-task", "scenes", r"detr-multitask-.*"),
    ("on feature maps", "scenes", r"features-multitask-jigsaw-discrete"),
    ("ten new seeds", "again", r"features-multitask-.*"),
    ("Deformable", "scenes", r"deformable_detr-v1"),
]


def test_the_summary_has_the_papers_claims_and_what_was_found():
    """Each line is that of a published comparison, and its verdict follows from it."""
    lines = re.findall(r"^\|(.*)\| `(.*)` \| (.*) \| (.*) \| (.*) \|$", RESULTS, re.M)
    expected = set()
    for _, experiment, pattern in SUMMARY:
        for (row, baseline), measures in published_comparisons(experiment).items():
            if re.fullmatch(pattern, row) and baseline in ("detr-scratch", "deformable_detr-v0"):
                gain, _, holm_p = measures["last epoch"]
                expected.add((kind_and_task(row)[1], gain, holm_p))
    assert {(task, gain, holm_p) for _, task, gain, holm_p, _ in lines} == expected
    assert len(lines) == len(expected) == 12
    for _, _, gain, holm_p, verdict in lines:
        if float(holm_p) < 0.05 and float(gain.split()[0]) > 0:
            assert verdict == "**yes**"
        elif float(holm_p) < 0.05:
            assert verdict == "**it hurts**"
        else:
            assert verdict in ("inconclusive", "see the next row", "**no**")


README_CLAIMS = {  # beginning of a line of README.md's table: rows of `scenes`, baseline
    "pretraining speeds up DETR": ("detr-after-.*", "detr-scratch"),
    "multi-task learning speeds up DETR": ("detr-multitask-.*", "detr-scratch"),
    "on feature maps": ("features-multitask-.*", "detr-scratch"),
    "multi-task learning does not speed up Deformable DETR": (".*-v1", "deformable_detr-v0"),
}


@pytest.mark.parametrize("claim", README_CLAIMS)
def test_readme_has_the_worst_and_the_best_task_of_each_claim(claim):
    pattern, expected_baseline = README_CLAIMS[claim]
    gains = []
    for (row, baseline), measures in published_comparisons("scenes").items():
        if re.fullmatch(pattern, row) and baseline == expected_baseline:
            gain, _, holm_p = measures["last epoch"]
            text = f"`{kind_and_task(row)[1]}`: {gain}"
            gains.append((float(gain.split()[0]), text, row, holm_p))
    gains.sort()
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {claim}")]
    _, worst, best, verdict = line.strip("| ").split(" | ")
    assert worst == gains[0][1]
    if len(gains) > 1:
        assert best == gains[-1][1]
    again = published_comparisons("again").get((gains[-1][2], "detr-scratch"))
    if again:  # repeated with other seeds
        gain, _, holm_p = again["last epoch"]
        assert float(holm_p) < 0.05
        assert gain in verdict
    elif len(gains) > 1:
        assert verdict == "inconclusive"
        assert float(gains[-1][3]) >= 0.05


def test_gains_in_sentences_are_published():
    """Every "+1.3, +0.4 to +2.2, p 0.047" and "+3.1 points (+1.8 to +4.5, p 0.027)"."""
    published = set()
    for experiment in ("scenes", "again", "tiles"):
        for measures in published_comparisons(experiment).values():
            for gain, p, holm_p in measures.values():
                mean, low, high = re.findall(r"[+-]\d+\.\d", gain)
                published |= {(mean, low, high, p), (mean, low, high, holm_p)}
    number = r"([+-]\d+\.\d)"
    found = 0
    for text in PAGES.values():
        pattern = rf"{number}(?: points(?: of AP)?)?[, (]+{number} to {number}, p (\d\.\d+)"
        for values in re.findall(pattern, text.replace("\n", " ")):
            assert values in published, values
            found += 1
    assert found >= 3


def test_rows_of_the_tiles():
    """AP, AP50 and the number of seeds of each row in results/tiles/README.md."""
    experiment = reproduce.find_experiment("tiles")
    results = reproduce.read_results([ROOT / "results/tiles"], experiment)
    page = PAGES[ROOT / "results/tiles/README.md"]
    for name, runs in results.items():
        if name == "start" or "-pretrain-" in name:
            continue
        last = [run["log"][-1] for run in runs.values()]
        ap = mean_and_std([percent(line["ap"]) for line in last], 1)
        ap50 = mean_and_std([percent(line["ap50"]) for line in last], 1)
        assert f" | {ap} | {ap50} | {len(last)} |" in page, name


def test_the_demonstrations_line_is_in_the_results():
    line = re.search(r"epoch   7/7 .* AP (\S+)  AP50 (\S+)  AP75 (\S+) ", README)
    for name, value in zip(("AP", "AP50", "AP75"), line.groups()):
        row = re.search(rf"^\| {name} \|.* (\S+) \|$", RESULTS, re.M)
        assert row[1] == value


def test_the_speed_run_is_that_of_its_results():
    """AP50, minutes and the share of the first version's time are as reproduce.py prints them; the
    p of the record is from the seeds with which nothing was chosen, 5 to 9."""
    text = PAGES[ROOT / "results/speedrun/README.md"]
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


def test_figures_of_the_operator_and_of_transformers_agree():
    """The short tables of RESULTS.md are those of the pages they link to."""
    operator = PAGES[ROOT / "results/operator/README.md"]
    for backend, cells in (("torch", "63.4 ms | 167.8 ms"), ("cpu", "2.7 ms | 7.7 ms")):
        row = re.search(rf"\| E512 \| {backend} \| (\S+) \| (\S+) \|", operator)
        assert f"{float(row[1]):.1f} ms | {float(row[2]):.1f} ms" == cells
        assert cells in RESULTS
    cost = PAGES[ROOT / "results/cost/README.md"]
    for detector in ("DETR", "Deformable DETR"):
        row = re.search(rf"\| {detector}, training step \| (\S+ s) \| (\S+ s) \|", cost)
        assert f"| {detector} | {row[1]} | {row[2]} |" in RESULTS
    rows = re.findall(r"^\| (\S[^|]*stride[^|]*) \| .* \| (\S+) \| (\S+) \|$", cost, re.M)
    assert len(rows) == 3
    for name, seconds, exponent in rows:
        assert f"| {name} | {seconds} | {exponent} |" in RESULTS


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist_and_lines_fit(page):
    text = PAGES[page]
    for target in re.findall(r"\]\(([^):#]+)\)", text):
        assert (page.parent / target).exists(), target
    for line in text.splitlines():
        assert len(line) <= 120 or line.startswith("|")
    for name in re.findall(r"reproduce\.py (\w+)", text):
        reproduce.find_experiment(name)
