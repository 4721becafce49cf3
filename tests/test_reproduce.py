"""Tables of runs: rows are run once, starts before what starts from them; mean and standard deviation; mistakes."""
import json
import shutil
from types import SimpleNamespace

import pytest

import reproduce

TINY = ("--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 1 --dim_feedforward 32 --num_queries 5 --image_size 64 "
        "--limit_train 4 --limit_val 2 --batch_size 4 --epochs 2")


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    path = tmp_path / "small.txt"
    path.write_text(f"""# a comment
deformable-scratch: {TINY} --eval_every 1
start: {TINY} --setting pretrain --ssl_task mim-discrete --vocabulary 4
deformable-pretrained: {TINY} --init {{start}} --freeze backbone  # from the row above
""")
    return path


def test_a_table(table, tmp_path, capsys):
    reproduce.main([str(table), "--seeds", "0", "1", "--jobs", "2"])
    results = tmp_path / "results/small"
    names = {f"{row}-{seed}.json" for row in ("deformable-scratch", "start", "deformable-pretrained") for seed in (0, 1)}
    assert {path.name for path in results.iterdir()} == names | {"table.md", "curves.png"}
    contents = {name: json.loads((results / name).read_text()) for name in names}
    assert "runs/small/start-1 --freeze backbone --seed 1" in contents["deformable-pretrained-1.json"]["command"]
    last = [contents[f"deformable-scratch-{seed}.json"]["log"][-1]["ap50"] * 100 for seed in (0, 1)]
    mean, deviation = sum(last) / 2, abs(last[0] - last[1]) / 2 ** 0.5
    printed = capsys.readouterr().out
    assert f"| {mean:.1f} ± {deviation:.1f} | 2 |" in printed and "| deformable-pretrained |" in printed
    guesses = [contents[f"start-{seed}.json"]["guess"] for seed in (0, 1)]
    assert all(guess["chance"] == 0.25 <= guess["acc"] <= 1 for guess in guesses)
    assert f"| {reproduce.mean_and_deviation([guess['acc'] for guess in guesses])} | 0.250 |" in printed
    times = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}

    def again(*flags):
        """Run the table once more: the results that were made anew."""
        reproduce.main([str(table), "--seeds", "0", "1", *flags])
        changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
        times.update({path: path.stat().st_mtime_ns for path in times})
        return changed
    (results / "deformable-scratch-1.json").unlink()
    times.pop(results / "deformable-scratch-1.json")
    shutil.rmtree(tmp_path / "runs")  # the logs are enough …
    assert again("--rows", "start") == set() and not (results / "deformable-scratch-1.json").exists()
    start = tmp_path / "runs/small/start-1"
    start.mkdir(parents=True)  # … unless a row starts from a run, and one that was interrupted is not taken for whole
    (start / "log.jsonl").write_text(json.dumps(contents["start-1.json"]["log"][0]) + "\n")
    (results / "deformable-pretrained-1.json").unlink()
    times.pop(results / "deformable-pretrained-1.json")
    assert again("--jobs", "2") == {"start-1.json"}
    assert all((results / f"deformable-{name}-1.json").exists() for name in ("pretrained", "scratch"))
    assert len(reproduce.read_log(start)) == 2
    table_before = (results / "table.md").read_text()
    reproduce.main([str(table), "--no_run", "--rows", "scratch"])
    assert (results / "table.md").read_text() == table_before
    shutil.copy(results / "start-0.json", results / "start-0-0.json")  # of another row, start-0
    reproduce.main([str(table), "--no_run"])
    assert (results / "table.md").read_text() == table_before
    table.write_text(table.read_text().replace("--vocabulary 4", "--vocabulary 5"))
    with pytest.raises(SystemExit, match="deformable-pretrained-0.json started from a row that has another command now"):
        reproduce.main([str(table)])
    for path in results.glob("deformable-pretrained-*.json"):
        path.unlink()
    with pytest.raises(SystemExit, match="(?s)start-0.json is of another command than its row now has.*vocabulary 4.*vocabulary 5"):
        reproduce.main([str(table)])


def test_names_without_hyphens_are_drawn(tmp_path):
    reproduce.draw(tmp_path / "curves.png", {"one": [{"log": [{"epoch": 1, "ap": 0.1}]}]})
    assert (tmp_path / "curves.png").exists()


def test_a_row_that_dies_silently(table, monkeypatch):
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=-9, stderr=""))
    with pytest.raises(SystemExit, match="(?s)--epochs 2.*exit status -9"):
        reproduce.main([str(table), "--rows", "scratch"])
    with pytest.raises(SystemExit, match="error: --rows none: .* has no row with that in its name"):
        reproduce.main([str(table), "--rows", "none"])


def test_the_mean_patch_by_hand(tmp_path):
    """The loss of a guess is that of predicting the mean of all counted patches."""
    import eval as evaluation
    import isaid
    import train
    flags = TINY.replace("--image_size 64", "--image_size 80").split()  # a border of 16 pixels belongs to no whole patch
    train.main([*flags, "--setting", "pretrain", "--ssl_task", "reconstruct", "--out", str(tmp_path / "run")])
    data = isaid.open_split("val", evaluation.load_run(tmp_path / "run", "cpu")[2], train=False)
    patches = [data[i][0][:, y:y + 32, x:x + 32] for i in range(2) for y in (0, 32) for x in (0, 32)]
    mean = sum(patches) / len(patches)
    expected = sum((patch - mean).abs().mean() for patch in patches) / len(patches)
    assert reproduce.guess(tmp_path / "run")["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("text, message", [
    ("a --epochs 1", "line 1: expected is a new name"), ("a: x\na: y", "line 2: expected is a new name"),
    ("a: --init {b}", "line 1: {b} is not a row above it"), ("a: --epochs nine", "train.py --epochs nine"),
    ("", "has no results")])
def test_mistakes_get_one_line(text, message, table):
    table.write_text(text)
    with pytest.raises(SystemExit) as stop:
        reproduce.main([str(table)])
    assert message in str(stop.value.code) and "Traceback" not in str(stop.value.code)
    with pytest.raises(SystemExit, match="cannot be read as a table"):
        reproduce.main([str(table.with_name("none.txt"))])
