"""The costs of a step: what is measured, the exponents, the files."""

import math

from results.cost import cost

SMALL = """--backbone resnet18 --hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 1
    --dim_feedforward 32 --num_queries 5 --image_size 64"""


def test_a_measured_row():
    for flags in ("--model detr", "--setting multitask --ssl_task mim-continuous"):
        figures = cost.measure(f"{SMALL} {flags}", 1)
        assert figures.keys() == cost.FIGURES.keys()
        assert all(0 < value < math.inf for value in figures.values())
        assert figures["encoder"] < figures["step"]


def test_table_and_picture(tmp_path):
    """Costs that grow as the pixels squared have exponent 2; of queries, as their number, 1."""
    sides = {side: {"step": side**4, "encoder": side**2, "memory": 1234} for side in (64, 128)}
    queries = {n: {"step": n, "encoder": 1, "memory": 1} for n in (100, 300)}
    found = {("DETR", "image_size"): sides, ("Deformable DETR", "num_queries"): queries}
    lines = cost.table(found).splitlines()
    assert lines[0] == "| DETR: image_size | 64 | 128 | exponent |"
    assert [line.split(" | ")[-1] for line in lines[2:5]] == ["2.00 |", "1.00 |", "0.00 |"]
    assert lines[4] == "| memory, MB | 1234 | 1234 | 0.00 |"
    assert lines[8] == "| step, s | 100 | 300 | 1.00 |"
    cost.draw(tmp_path / "cost.png", found)
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_every_row_parses():
    rows = list(cost.rows([128, 256]))
    assert len(rows) == 6 * 2 + 4 + 3
    for name, grows, value, flags in rows:
        args, _ = cost.train.parse(flags.split())
        assert getattr(args, grows) == value
        assert args.setting == ("multitask" if "multi-task" in name else "detect")
