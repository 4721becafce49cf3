"""The tables and figures of an experiment: AP, paired comparisons, costs, the tasks.

Results are {row: {seed: result}}; a result is what reproduce.py writes for a run. AP is in points,
0 to 100.
"""

import collections
import dataclasses
import math
import statistics

import numpy as np
import scipy.stats

from util import plots

AUTHORS = "authors "  # begins the names of the authors' curves in tables
AP_TO_REACH = 10  # tables name the first epoch that reaches it
SIGNIFICANT = 0.05  # a comparison with a smaller p, after Holm's correction, is significant
LAST_EPOCH = "last epoch"  # the two measures of a comparison
MEAN_OF_EPOCHS = "mean of the epochs"
MAX_PANELS = 12  # of a figure with curves


# ---------------------------------------------------------------- statistics
@dataclasses.dataclass
class PairedDifference:
    """The mean of paired differences, its 95 % interval, and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float


def paired_difference(a, b):
    """Return the PairedDifference a - b of two arrays (n,), such as the AP of two rows by seed.

    The interval is that of Student's t. p is two-sided and that of a permutation test, which flips
    the signs of the differences; it is exact up to 16 pairs.
    """
    differences = a - b
    low, high = scipy.stats.ttest_1samp(differences, 0).confidence_interval()
    test = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**16, random_state=0
    )
    return PairedDifference(np.mean(differences), low, high, test.pvalue)


def holm(p_values):
    """Return the p-values of a family corrected for their number, in the same order (Holm 1979).

    The smallest of n is multiplied by n, the next by n - 1 and so on. None becomes smaller than
    the one before it, or larger than 1.
    """
    corrected = [0.0] * len(p_values)
    previous = 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        p = p_values[i] * (len(p_values) - rank)
        previous = max(previous, min(1, p))
        corrected[i] = previous
    return corrected


def mean_and_std(values, digits=3):
    """Return the mean ± the standard deviation over seeds as text."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def percent(ap):
    """Return an AP of a log in %; None, where no class has an object, counts as 0."""
    if ap is None:
        return 0.0
    return 100 * ap


def ap_by_epoch(result, metric="ap"):
    """Return {epoch: AP in %} of a result."""
    return {line["epoch"]: percent(line[metric]) for line in result["log"] if metric in line}


def ap_curves(results, metric="ap"):
    """Return the epochs at which all of these runs were evaluated, and AP in % (runs, epochs)."""
    logs = [ap_by_epoch(result, metric) for result in results]
    epochs = set(logs[0])
    for log in logs:
        epochs &= set(log)
    epochs = sorted(epochs)
    curves = np.zeros((len(logs), len(epochs)))
    for i, log in enumerate(logs):
        curves[i] = [log[epoch] for epoch in epochs]
    return epochs, curves


# ---------------------------------------------------------------- comparisons
@dataclasses.dataclass
class Comparison:
    """A difference of AP, paired by seed."""

    family: str
    label: str
    measure: str  # LAST_EPOCH, MEAN_OF_EPOCHS or, of AP50, "AP50, " and one of them
    difference: PairedDifference
    num_seeds: int
    corrected_p: float = None  # by Holm's method, within the family and the measure


def compare(results, comparisons, metrics=("ap",)):
    """Return a list of Comparison, those that at least two seeds of both rows were run for.

    Each is made for the AP after the last epoch and, if both rows were evaluated after the same
    epochs, for its mean over these.

    comparisons: [(family, row, baseline)]
    metrics:     "ap", "ap50" or others of the log
    """
    made = []
    for family, row, baseline in comparisons:
        seeds = common_seeds(results, [row, baseline])
        if len(seeds) < 2:
            continue
        gains = gains_by_measure(results, row, baseline, seeds, metrics)
        for measure, (row_ap, baseline_ap) in gains.items():
            difference = paired_difference(row_ap, baseline_ap)
            label = f"{row} - {baseline}"
            made.append(Comparison(family, label, measure, difference, len(seeds)))
    sizes = collections.Counter(family for family, _, _ in comparisons)
    correct_by_family(made, sizes)
    return made


def compare_gains(results, interactions, metrics=("ap",)):
    """Return a list of Comparison: one gain over a baseline minus another (an interaction).

    interactions: [(family, (row, baseline), (other row, its baseline))]
    metrics:      "ap", "ap50" or others of the log
    """
    made = []
    for family, pair, other_pair in interactions:
        seeds = common_seeds(results, [*pair, *other_pair])
        if len(seeds) < 2:
            continue
        gains = gains_by_measure(results, *pair, seeds, metrics)
        other_gains = gains_by_measure(results, *other_pair, seeds, metrics)
        for measure in gains:
            if measure not in other_gains:
                continue
            gain = gains[measure][0] - gains[measure][1]
            other_gain = other_gains[measure][0] - other_gains[measure][1]
            difference = paired_difference(gain, other_gain)
            label = f"gain of {pair[0]} - gain of {other_pair[0]}"
            made.append(Comparison(family, label, measure, difference, len(seeds)))
    sizes = collections.Counter(family for family, _, _ in interactions)
    correct_by_family(made, sizes)
    return made


def common_seeds(results, rows):
    """Return the sorted seeds that all of these rows were run with."""
    seeds = set(results.get(rows[0], {}))
    for row in rows[1:]:
        seeds &= set(results.get(row, {}))
    return sorted(seeds)


def gains_by_measure(results, row, baseline, seeds, metrics):
    """Return {measure: (AP of the row, AP of its baseline)}, arrays (seeds,) in points."""
    row_runs = [results[row][seed] for seed in seeds]
    baseline_runs = [results[baseline][seed] for seed in seeds]
    gains = {}
    for metric in metrics:
        prefix = ""
        if metric != "ap":
            prefix = f"{metric.upper()}, "
        row_epochs, row_ap = ap_curves(row_runs, metric)  # (seeds, epochs)
        baseline_epochs, baseline_ap = ap_curves(baseline_runs, metric)
        gains[prefix + LAST_EPOCH] = (row_ap[:, -1], baseline_ap[:, -1])
        if row_epochs == baseline_epochs:
            gains[prefix + MEAN_OF_EPOCHS] = (row_ap.mean(1), baseline_ap.mean(1))
    return gains


def correct_by_family(made, sizes):
    """Set corrected_p of each Comparison; a declared comparison that was not made has p = 1.

    sizes: {family: number of comparisons declared}
    """
    families = collections.defaultdict(list)
    for comparison in made:
        families[comparison.family, comparison.measure].append(comparison)
    for (family, _), members in families.items():
        p_values = [comparison.difference.p for comparison in members]
        p_values += [1.0] * (sizes[family] - len(members))
        for comparison, p in zip(members, holm(p_values)):
            comparison.corrected_p = p


# ---------------------------------------------------------------- tables in Markdown
def make_tables(results, experiment):
    """Return the tables of an experiment in Markdown: AP, comparisons, goals, costs and the tasks.

    experiment: util.experiments.Experiment
    """
    detection = detection_table(results)
    lines = []
    if detection:
        lines += [*detection, ""]
        made = compare(results, experiment.comparisons, experiment.metrics)
        lines += comparison_table(made, "comparison")
        made = compare_gains(results, experiment.interactions, experiment.metrics)
        lines += comparison_table(made, "interaction")
        lines += goal_table(results, experiment.goals)
        lines += cost_table(results, experiment)
    lines += task_table(results)
    return "\n".join(lines)


def table_row(cells):
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def table_head(cells):
    """Return the first two lines of a table."""
    return [table_row(cells), "|---" * len(cells) + "|"]


def last_lines(runs):
    """Return the last line of the log of each of {seed: result}."""
    return [result["log"][-1] for result in runs.values()]


def detection_table(results):
    """Return lines with each row's AP by epoch, last AP50 and first epoch with AP_TO_REACH."""
    logs = {}  # of each row, {epoch: AP} of each of its runs
    for name, runs in results.items():
        if "ap" in last_lines(runs)[0]:
            logs[name] = [ap_by_epoch(result) for result in runs.values()]
    if not logs:
        return []
    epochs = shown_epochs(logs)
    head = ["AP (%) after epoch", *map(str, epochs)]
    head += ["AP50, last", f"AP {AP_TO_REACH} from epoch", "runs"]
    lines = table_head(head)
    for name, row_logs in logs.items():
        cells = [name]
        for epoch in epochs:
            if epoch in row_logs[0]:
                cells.append(mean_and_std([log[epoch] for log in row_logs], 1))
            else:
                cells.append("")
        if name.startswith(AUTHORS):  # their logs have gaps, and no AP50
            cells += ["", ""]
        else:
            ap50 = [percent(line["ap50"]) for line in last_lines(results[name])]
            cells += [mean_and_std(ap50, 1), first_epoch(row_logs)]
        cells.append(str(len(row_logs)))
        lines.append(table_row(cells))
    return lines


def shown_epochs(logs):
    """Return the epochs of a table: all; of more than twelve the first, every tenth, the last.

    logs: {row: [{epoch: AP} of each run]}
    """
    epochs = set()
    last_epochs = set()
    for row_logs in logs.values():
        epochs |= row_logs[0].keys()
        last_epochs |= {max(log) for log in row_logs}
    epochs = sorted(epochs)
    if len(epochs) <= 12:
        return epochs
    return [x for x in epochs if x <= 5 or x % 10 == 0 or x in last_epochs]


def first_epoch(logs):
    """Return the mean first epoch with an AP of AP_TO_REACH as text, if all runs have one."""
    first = []
    for log in logs:
        reached = [epoch for epoch, ap in log.items() if ap >= AP_TO_REACH]
        if not reached:
            return "not by all"
        first.append(min(reached))
    return mean_and_std(first, 1)


def task_table(results):
    """Return lines with the tasks' held-out metrics next to those of constant predictions."""
    lines = []
    for name, runs in results.items():
        last = last_lines(runs)
        if "ssl_loss" not in last[0]:
            continue
        loss = mean_and_std([line["ssl_loss"] for line in last])
        baseline = mean_and_std([line["ssl_baseline"] for line in last])
        if last[0]["ssl_acc"] is None:  # a task that predicts pixels
            cells = [name, loss, baseline, "", "", ""]
        else:
            accuracy = mean_and_std([line["ssl_acc"] for line in last])
            chance = mean_and_std([line["ssl_chance"] for line in last])
            cells = [name, loss, "", accuracy, baseline, chance]
        lines.append(table_row(cells))
    if not lines:
        return []
    head = ["task", "held-out loss", "mean patch", "accuracy", "most frequent", "chance"]
    return table_head(head) + lines


def comparison_table(made, kind):
    """Return lines with a list of Comparison; `kind` is what they are called."""
    if not made:
        return []
    head = [kind, "AP (%)", "difference", "95 % interval", "p", "p, Holm", "seeds"]
    lines = table_head(head)
    for comparison in made:
        paired = comparison.difference
        cells = [comparison.label, comparison.measure, f"{paired.mean:+.1f}"]
        cells += [f"{paired.low:+.1f} to {paired.high:+.1f}", f"{paired.p:.3f}"]
        cells += [f"{comparison.corrected_p:.3f}", str(comparison.num_seeds)]
        lines.append(table_row(cells))
    return [*lines, ""]


def goal_table(results, goals):
    """Return lines that say whether rows reach their AP50, and in what share of a baseline's time.

    p is one-sided, by Student's t. Time is compared over the seeds that both rows have run
    without interruption.
    """
    lines = []
    for row, baseline, goal in goals:
        runs = results.get(row, {})
        if len(runs) < 2:
            continue
        ap50 = [percent(line["ap50"]) for line in last_lines(runs)]
        p = scipy.stats.ttest_1samp(ap50, goal, alternative="greater").pvalue
        cells = [row, f"{mean_and_std(ap50, 1)} ({len(ap50)})", f"{goal:g}", f"{p:.4f}"]
        minutes = minutes_of_both(runs, results.get(baseline, {}))
        if len(minutes) > 1:
            share = minutes[:, 0] / minutes[:, 1]
            cells += [mean_and_std(minutes[:, 0], 2), mean_and_std(minutes[:, 1], 2)]
            cells.append(mean_and_interval(share))
        else:
            cells += ["", "", ""]
        lines.append(table_row(cells))
    if not lines:
        return []
    head = ["row", "AP50 (%) (seeds)", "goal", "p", "minutes", "of the other"]
    head.append("share, interval (seeds)")
    return [*table_head(head), *lines, ""]


def mean_and_interval(shares):
    """Return the mean of (n,), its 95 % interval and n as text."""
    low, high = scipy.stats.ttest_1samp(shares, 0).confidence_interval()
    return f"{shares.mean():.2f}, {low:.2f} to {high:.2f} ({len(shares)})"


def minutes_of_both(runs, baseline_runs):
    """Return the minutes of two rows for the seeds that have both: (seeds, 2)."""
    minutes = []
    for seed, result in runs.items():
        other = baseline_runs.get(seed, {})
        if "seconds" in result and "seconds" in other:
            minutes.append((result["seconds"] / 60, other["seconds"] / 60))
    return np.array(minutes)


def cost_table(results, experiment):
    """Return lines with the seconds of training that rows took, and their share of a baseline's.

    The seconds are those of the epochs, without evaluations. A row is charged with the rows it
    starts from, unless its baseline starts from them too.
    """
    lines = []
    for row, baseline in experiment.costs:
        charged = {row} | experiment.all_starts(row)
        baseline_charged = {baseline} | experiment.all_starts(baseline)
        shared = charged & baseline_charged
        seeds = common_seeds(results, sorted(charged | baseline_charged))
        if len(seeds) < 2:
            continue
        seconds = training_seconds(results, charged - shared, seeds)
        baseline_seconds = training_seconds(results, baseline_charged - shared, seeds)
        cells = [f"{row} - {baseline}", mean_and_std(seconds, 0)]
        cells += [mean_and_std(baseline_seconds, 0), mean_and_interval(seconds / baseline_seconds)]
        lines.append(table_row(cells))
    if not lines:
        return []
    head = ["cost", "seconds", "of the baseline", "share, interval (seeds)"]
    return [*table_head(head), *lines, ""]


def training_seconds(results, rows, seeds):
    """Return the seconds that these rows trained, in all, by seed: (seeds,)."""
    seconds = np.zeros(len(seeds))
    for row in rows:
        for i, seed in enumerate(seeds):
            seconds[i] += sum(line["seconds"] for line in results[row][seed]["log"])
    return seconds


# ---------------------------------------------------------------- figures
def draw_forest(path, made):
    """Draw the differences of AP after the last epoch with their intervals, one line each.

    A marker is filled where the difference is significant. Each family has a heading.

    made: list of Comparison
    """
    families = {}
    for comparison in made:
        if comparison.measure == LAST_EPOCH:
            families.setdefault(comparison.family, []).append(comparison)
    if not families:
        return
    labels = []  # of the lines, from the top
    drawn = {}  # {line: (color, Comparison)}
    for number, (family, members) in enumerate(families.items()):
        heading, member_labels = forest_labels(family, members)
        labels.append(heading)
        for label, comparison in zip(member_labels, members):
            drawn[len(labels)] = (f"C{number % 10}", comparison)
            labels.append(label)
    figure = plots.Figure(figsize=(7.5, 0.8 + 0.2 * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="grey", linewidth=0.8)
    for y, (color, comparison) in drawn.items():
        paired = comparison.difference
        fill = "white"
        if comparison.corrected_p < SIGNIFICANT:
            fill = color
        axes.plot([paired.low, paired.high], [y, y], color=color)
        axes.plot(paired.mean, y, marker="o", color=color, markerfacecolor=fill)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    for y, text in enumerate(axes.get_yticklabels()):
        if y not in drawn:
            text.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("difference of AP (points)", fontsize=8)
    text = f"last epoch, 95 % intervals; filled: p < {SIGNIFICANT} after Holm's correction"
    figure.suptitle(text, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    plots.save_figure(path, figure)


def forest_labels(family, members):
    """Return the heading of a family, and the label of each of its comparisons.

    A baseline that they all have in common stands in the heading alone.
    """
    baselines = {comparison.label.split(" - ")[1] for comparison in members}
    if len(baselines) > 1:
        return family, [comparison.label for comparison in members]
    rows = [comparison.label.split(" - ")[0] for comparison in members]
    return f"{family}: minus {baselines.pop()}", rows


def draw_curves(path, results, comparisons):
    """Draw AP by epoch: a panel per family and baseline, and one for the authors' curves.

    A panel shows the mean over the seeds and, shaded, the standard deviation. Of more than
    MAX_PANELS panels the first ones are drawn.
    """
    panels = {}  # {(family, baseline): its rows}
    for family, row, baseline in comparisons:
        if row in results and baseline in results:
            panels.setdefault((family, baseline), []).append(row)
    authors = [name for name in results if name.startswith(AUTHORS)]
    max_panels = MAX_PANELS
    if authors:
        max_panels -= 1
    shown = list(panels.items())[:max_panels]
    num_panels = len(shown)
    if authors:
        num_panels += 1
    if num_panels == 0:
        return
    num_columns = min(4, num_panels)
    num_rows = math.ceil(num_panels / num_columns)
    figure = plots.Figure(figsize=(4 * num_columns, 3.2 * num_rows), layout="constrained")
    axes_grid = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in axes_grid[num_panels:]:
        axes.remove()
    for axes, ((family, baseline), rows) in zip(axes_grid, shown):
        draw_row(axes, results[baseline], color="black", label=baseline, linestyle="--")
        for i, row in enumerate(rows):
            draw_row(axes, results[row], color=f"C{i}", label=row)
        finish_panel(axes, family)
    if authors:
        axes = axes_grid[num_panels - 1]
        for i, name in enumerate(authors):  # points without a line, because some are missing
            label = name.removeprefix(AUTHORS)
            draw_row(axes, results[name], color=f"C{i}", linestyle="", label=label)
        finish_panel(axes, "the authors'")
    plots.save_figure(path, figure)


def draw_row(axes, runs, color, label, linestyle="-"):
    """Draw the mean AP of the runs of a row, and its standard deviation."""
    epochs, ap = ap_curves(list(runs.values()))
    mean = ap.mean(0)
    axes.plot(epochs, mean, linestyle=linestyle, marker=".", color=color, label=label)
    if len(ap) > 1:
        std = ap.std(0, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, alpha=0.1, color=color)


def finish_panel(axes, title):
    """Add the labels, the legend and the title of a panel."""
    axes.set(xlabel="epoch", ylabel="AP (%)")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=6, framealpha=0.5)
    plots.finish_axes(axes)
