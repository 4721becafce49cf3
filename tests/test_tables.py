"""The statistics of experiments, their tables in Markdown and their figures."""

import itertools

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from util import tables
from util.experiments import Experiment


def test_holm():
    """A worked example, and the definition: the step-down procedure at every level."""
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert tables.holm([0.5, 0.9]) == [1.0, 1.0]
    assert tables.holm([]) == []
    rng = np.random.default_rng(0)
    for _ in range(100):
        p_values = rng.uniform(size=5) ** 3
        corrected = tables.holm(p_values)
        for level in (0.01, 0.05, 0.2):
            assert [p <= level for p in corrected] == rejected_by_holm(p_values, level)


def rejected_by_holm(p_values, level):
    """Which hypotheses are rejected: the smallest p at level / n, the next at level / (n - 1) …"""
    rejected = [False] * len(p_values)
    for rank, i in enumerate(np.argsort(p_values)):
        if p_values[i] > level / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def test_paired_difference():
    """The interval of Student's t; p over all flips of the signs."""
    rng = np.random.default_rng(0)
    for gain in (0.0, 1.5):
        a = rng.normal(size=6) + gain
        b = rng.normal(size=6)
        found = tables.paired_difference(a, b)
        d = a - b
        half = 2.570582 * d.std(ddof=1) / 6**0.5  # the quantile for five degrees of freedom
        assert found.mean == pytest.approx(d.mean())
        assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half))
        num_as_large = 0
        for signs in itertools.product((1, -1), repeat=6):
            num_as_large += abs((d * signs).mean()) >= abs(d.mean()) - 1e-12
        assert found.p == pytest.approx(num_as_large / 2**6)


def result_of(*aps):
    """A result with these AP (0 to 1) after epochs 1, 2, …"""
    return {"log": [{"epoch": i, "ap": ap} for i, ap in enumerate(aps, 1)]}


def test_comparisons():
    """Both measures of each comparison, with Holm's p over the family for each measure."""
    rng = np.random.default_rng(0)
    aps = {}  # (seeds, epochs)
    results = {}
    for row, gain in (("scratch", 0), ("better", 0.05), ("same", 0)):
        aps[row] = 0.3 + rng.normal(scale=0.01, size=(6, 2)) + gain
        results[row] = {seed: result_of(*aps[row][seed]) for seed in range(6)}
    comparisons = [("few", "better", "scratch"), ("few", "same", "scratch")]
    lines = tables.comparison_table(tables.compare(results, comparisons), "comparison")[2:-1]
    cells = [line.strip("| ").split(" | ") for line in lines]

    measures = {"last epoch": lambda ap: 100 * ap[:, -1]}
    measures["mean of the epochs"] = lambda ap: 100 * ap.mean(1)
    expected = {}
    for name, measure in measures.items():
        scratch = measure(aps["scratch"])
        better = tables.paired_difference(measure(aps["better"]), scratch)
        same = tables.paired_difference(measure(aps["same"]), scratch)
        holm = tables.holm([better.p, same.p])
        expected["better - scratch", name] = (better, holm[0])
        expected["same - scratch", name] = (same, holm[1])
    assert [(row[0], row[1]) for row in cells] == [
        ("better - scratch", "last epoch"),
        ("better - scratch", "mean of the epochs"),
        ("same - scratch", "last epoch"),
        ("same - scratch", "mean of the epochs"),
    ]
    for pair, measure, difference, interval, p, holm, seeds in cells:
        paired, corrected = expected[pair, measure]
        assert difference == f"{paired.mean:+.1f}"
        assert interval == f"{paired.low:+.1f} to {paired.high:+.1f}"
        assert (p, holm) == (f"{paired.p:.3f}", f"{corrected:.3f}")
        assert seeds == "6"


def test_a_family_is_what_was_declared():
    """What was not run counts in Holm's p; runs of unequal length are compared at their ends."""
    scratch = {seed: result_of(0.1, 0.2) for seed in range(6)}
    better = {seed: result_of(*(np.array([0.2, 0.3, 0.9]) + seed / 500)) for seed in range(6)}
    results = {"scratch": scratch, "better": better}
    comparisons = [("few", row, "scratch") for row in ("better", "not run", "nor this")]
    lines = tables.comparison_table(tables.compare(results, comparisons), "comparison")[2:-1]
    (line,) = lines
    _, measure, difference, _, p, holm, _ = line.split(" | ")
    assert measure == "last epoch"
    assert difference == "+70.5"
    assert p == "0.031"
    assert holm == f"{3 * 2 / 64:.3f}"


def test_comparisons_of_ap50():
    """It is compared like AP, and corrected for itself."""
    rng = np.random.default_rng(2)
    values = {row: rng.uniform(size=(6, 2, 2)) for row in ("after", "scratch")}
    results = {}
    for row, of_row in values.items():
        results[row] = {}
        for seed, of_run in enumerate(of_row):
            log = []
            for epoch, (ap, ap50) in enumerate(of_run, 1):
                log.append({"epoch": epoch, "ap": ap, "ap50": ap50})
            results[row][seed] = {"log": log}
    comparisons = [("few", "after", "scratch"), ("few", "not run", "scratch")]
    made = tables.compare(results, comparisons, ["ap", "ap50"])
    measures = ["last epoch", "mean of the epochs", "AP50, last epoch", "AP50, mean of the epochs"]
    assert [comparison.measure for comparison in made] == measures
    difference = 100 * (values["after"] - values["scratch"])  # (seeds, epochs, metrics)
    expected = [difference[:, 1, 0], difference[:, :, 0].mean(1)]
    expected += [difference[:, 1, 1], difference[:, :, 1].mean(1)]
    for comparison, by_seed in zip(made, expected):
        assert comparison.difference.mean == pytest.approx(by_seed.mean())
        assert comparison.corrected_p == min(1, 2 * comparison.difference.p)
    gains = [("few", ("after", "scratch"), ("scratch", "scratch"))]
    interaction = tables.compare_gains(results, gains, ["ap50"])[0]
    assert interaction.measure == "AP50, last epoch"
    assert interaction.difference.mean == pytest.approx(expected[2].mean())


def test_goals():
    """AP50 over all seeds, time over those that both rows have run without interruption."""
    now = {}
    for seed, ap50 in enumerate((0.82, 0.83, 0.81)):
        now[seed] = {"log": [{"ap50": ap50}]}
    now[0]["seconds"] = 60
    now[1]["seconds"] = 66
    first = {seed: {"seconds": 120} for seed in (0, 1, 2)}
    goals = [("now", "first", 80.0)]
    (line,) = tables.goal_table({"now": now, "first": first}, goals)[2:-1]
    p = scipy.stats.t.sf(2.0 / (1.0 / 3**0.5), 2)  # mean 82, standard deviation 1, three seeds
    half = 12.7062 * (0.05 / 2**0.5) / 2**0.5  # shares 0.50 and 0.55; the quantile for 1 degree
    share = f"0.53, {0.525 - half:.2f} to {0.525 + half:.2f} (2)"
    cells = ["now", "82.0 ± 1.0 (3)", "80", f"{p:.4f}", "1.05 ± 0.07", "2.00 ± 0.00", share]
    assert line == f"| {' | '.join(cells)} |"
    (line,) = tables.goal_table({"now": now}, goals)[2:-1]  # without a pair only AP50
    assert line == f"| {' | '.join([*cells[:4], '', '', ''])} |"


def test_interactions():
    """One gain minus another, paired by seed, for both measures; its p is of its own family."""
    rng = np.random.default_rng(1)
    ap = {}
    results = {}
    for row, gain in (("few", 0.0), ("few-after", 0.01), ("many", 0.0), ("many-after", 0.04)):
        ap[row] = 0.3 + gain + rng.normal(scale=0.005, size=(8, 3))
        results[row] = {seed: result_of(*ap[row][seed]) for seed in range(8)}
    interactions = [("labels", ("few-after", "few"), ("many-after", "many"))]
    last, mean = tables.compare_gains(results, interactions)
    few = 100 * (ap["few-after"] - ap["few"])
    many = 100 * (ap["many-after"] - ap["many"])
    for made, difference in ((last, few[:, -1] - many[:, -1]), (mean, (few - many).mean(1))):
        interval = scipy.stats.ttest_1samp(difference, 0).confidence_interval()
        found = made.difference
        assert (found.low, found.mean, found.high) == pytest.approx(
            (interval[0], difference.mean(), interval[1])
        )
        assert made.corrected_p == found.p == 2 / 2**8
    assert (last.measure, mean.measure) == ("last epoch", "mean of the epochs")
    assert last.label == "gain of few-after - gain of many-after"
    del results["many"][3]
    assert {made.num_seeds for made in tables.compare_gains(results, interactions)} == {7}
    assert tables.compare_gains({"few": results["few"]}, interactions) == []


def experiment_of(rows, **names):
    """An Experiment of these rows, {name: flags}."""
    empty = {"comparisons": [], "goals": [], "authors": {}, "interactions": [], "costs": []}
    empty["metrics"] = ["ap"]
    return Experiment(path=None, rows=rows, program=["train.py"], **{**empty, **names})


def test_costs():
    """A row is charged with the rows it starts from, but for those its baseline starts from too."""
    rows = {
        "cnn": "",
        "pretrain": "--init {cnn}",
        "after": "--init {cnn} --init {pretrain}",
        "scratch": "--init {cnn}",
    }
    seconds = {"cnn": 500, "pretrain": 10, "after": 20, "scratch": 10}
    results = {}
    for row, first_epoch in seconds.items():
        results[row] = {}
        for seed in (0, 1):
            log = [{"epoch": 1, "seconds": first_epoch}, {"epoch": 2, "seconds": seed}]
            results[row][seed] = {"log": log}
    experiment = experiment_of(rows, costs=[("after", "scratch")])
    assert experiment.all_starts("after") == {"cnn", "pretrain"}
    (line,) = tables.cost_table(results, experiment)[2:-1]
    low, high = scipy.stats.ttest_1samp([30 / 10, 32 / 11], 0).confidence_interval()
    share = f"{(30 / 10 + 32 / 11) / 2:.2f}, {low:.2f} to {high:.2f} (2)"
    assert line == f"| after - scratch | 31 ± 1 | 10 ± 1 | {share} |"
    del results["pretrain"]
    assert tables.cost_table(results, experiment) == []


def color_at(path, color):
    """The pixels of a picture with exactly this color, as a mask."""
    pixels = np.array(Image.open(path).convert("RGB"))
    return (pixels == color).all(-1)


def test_the_forest_plot(tmp_path):
    """One interval per comparison, only that of the last epoch; filled where it is significant."""
    blue = (31, 119, 180)  # C0
    paired = tables.PairedDifference(mean=2.0, low=1.0, high=3.0, p=0.01)
    made = []
    for measure in (tables.LAST_EPOCH, tables.MEAN_OF_EPOCHS):
        made.append(tables.Comparison("detr", "a - b", measure, paired, 10, 0.01))
    tables.draw_forest(tmp_path / "filled.png", made)
    for comparison in made:
        comparison.corrected_p = 0.06
    tables.draw_forest(tmp_path / "open.png", made)
    filled = color_at(tmp_path / "filled.png", blue)
    empty = color_at(tmp_path / "open.png", blue)
    assert filled.sum() > empty.sum() > 0
    tables.draw_forest(tmp_path / "two.png", [*made, made[0]])
    assert Image.open(tmp_path / "two.png").height > Image.open(tmp_path / "open.png").height
    tables.draw_forest(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


def test_curves_have_a_panel_per_family_and_baseline(tmp_path, monkeypatch):
    """At most MAX_PANELS, one of them for the authors' curves."""
    titles = []

    def record(axes, title):
        titles.append((title, [line.get_label() for line in axes.get_lines()]))

    monkeypatch.setattr(tables, "finish_panel", record)
    rows = {row: {0: result_of(0.1, 0.2), 1: result_of(0.2, 0.3)} for row in "abcd"}
    comparisons = [("one", "b", "a"), ("one", "c", "a"), ("one", "d", "b"), ("two", "b", "a")]
    results = {**rows, f"{tables.AUTHORS}v1": {0: result_of(0.3)}}
    tables.draw_curves(tmp_path / "curves.png", results, [*comparisons, ("two", "b", "not run")])
    assert titles == [
        ("one", ["a", "b", "c"]),
        ("one", ["b", "d"]),
        ("two", ["a", "b"]),
        ("the authors'", ["v1"]),
    ]
    titles.clear()
    monkeypatch.setattr(tables, "MAX_PANELS", 2)
    tables.draw_curves(tmp_path / "curves.png", results, comparisons)
    assert [title for title, _ in titles] == ["one", "the authors'"]
