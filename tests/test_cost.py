"""Cost of a training step: what is measured, the exponents, the files."""

import math

import train
from results.cost import cost

SMALL = ["--backbone", "resnet18", "--hidden_dim", "32", "--nheads", "2"]
SMALL += ["--enc_layers", "1", "--dec_layers", "1", "--dim_feedforward", "32"]
SMALL += ["--num_queries", "5", "--image_size", "64"]


def test_a_measured_step():
    for flags in (["--model", "detr"], ["--setting", "multitask", "--ssl_task", "mim-continuous"]):
        figures = cost.measure(SMALL + flags, 1)
        assert figures.keys() == cost.UNITS.keys()
        for value in figures.values():
            assert 0 < value < math.inf
        assert figures["encoder"] < figures["step"]


def test_table_and_figure(tmp_path):
    """Costs that grow as the square of the number of pixels have exponent 2; as the number of
    queries, 1."""
    by_size = {}
    for size in (64, 128):
        by_size[size] = {"step": size**4, "encoder": size**2, "memory": 1234}
    by_queries = {}
    for queries in (100, 300):
        by_queries[queries] = {"step": queries, "encoder": 1, "memory": 1}
    measured = {("DETR", "image_size"): by_size, ("Deformable DETR", "num_queries"): by_queries}
    lines = cost.table(measured).splitlines()
    assert lines[0] == "| DETR: image_size | 64 | 128 | exponent |"
    assert [line.split(" | ")[-1] for line in lines[2:5]] == ["2.00 |", "1.00 |", "0.00 |"]
    assert lines[4] == "| memory, MB | 1234 | 1234 | 0.00 |"
    assert lines[8] == "| step, s | 100 | 300 | 1.00 |"
    cost.draw(tmp_path / "cost.png", measured)
    cost.draw(tmp_path / "cost", measured)  # without a suffix, the same
    assert (tmp_path / "cost").read_bytes() == (tmp_path / "cost.png").read_bytes()


def test_flags_of_every_measurement(tmp_path, monkeypatch):
    """The recipes are found from any folder."""
    monkeypatch.chdir(tmp_path)
    configs = list(cost.configs([128, 256]))
    assert len(configs) == 6 * 2 + 4 + 3
    for config in configs:
        args, _ = train.parse(config.flags)
        assert getattr(args, config.varied) == config.value
        assert args.setting == ("multitask" if "multi-task" in config.line else "detect")
