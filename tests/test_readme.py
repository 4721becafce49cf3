"""What the README shows is true: its Python runs, its commands parse, the names it points to exist."""
import json
import re
import shlex
from pathlib import Path

import pytest

import reproduce
import ssl_tasks
import train

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_python_snippets(capsys):
    for snippet in SNIPPETS:
        if "TASKS" not in snippet:
            exec(snippet, {})
    assert capsys.readouterr().out == "torch.Size([6, 2, 50, 15]) torch.Size([6, 2, 50, 4])\ntorch.Size([1, 5, 256])\n"


@pytest.mark.parametrize("line", re.findall(r"^    (?:.* && )?(?:python|torchrun .*)? *train\.py ?(.*)$", TEXT, re.M))
def test_train_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.parse(shlex.split(line))


def test_a_sixth_task(tmp_path, monkeypatch):
    """The README's task, added as it says, is learnt in both settings, and is gone afterwards."""
    snippet, = (snippet for snippet in SNIPPETS if "TASKS" in snippet)
    assert len(snippet.splitlines()) <= 22
    before = dict(ssl_tasks.TASKS)
    try:
        exec(snippet, vars(ssl_tasks))
        name, = ssl_tasks.TASKS.keys() - before.keys()
        for setting in ("pretrain", "multitask"):
            out = tmp_path / setting
            train.main(["--setting", setting, "--ssl_task", name, "--limit_train", "8", "--limit_val", "2", "--epochs", "4",
                        "--hidden_dim", "32", "--enc_layers", "1", "--dec_layers", "1", "--out", str(out)])
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            assert lines[-1]["train_loss_ssl"] < lines[0]["train_loss_ssl"] and (out / "ssl.png").exists()
    finally:
        ssl_tasks.TASKS.clear()
        ssl_tasks.TASKS.update(before)
        del ssl_tasks.MaskedEdges
    assert name not in train.build_parser().format_help()


def test_tables_parse(monkeypatch):
    """Every row of every table is a command that train.py takes; the 40 combinations are all there."""
    monkeypatch.chdir(ROOT)
    tables = [path for path in (ROOT / "recipes").glob("*.txt") if re.search(r"^[\w-]+:", path.read_text(), re.M)]
    assert len(tables) >= 1
    for table in tables:
        for flags in reproduce.read_table(table).values():
            train.parse([re.sub(r"{.*?}", "x", flag) for flag in flags])
    rows = [train.parse([re.sub(r"{.*?}", "x", flag) for flag in flags])
            for name, flags in reproduce.read_table(ROOT / "recipes/tasks.txt").items() if name != "backbone"]
    assert len({(row.model, row.setting, row.ssl_task, row.ssl_on) for row in rows}) == len(rows) == 40


def test_the_map_from_papers_to_code():
    rows = re.findall(r"`([\w/.]+): ([\w, .]+)`", TEXT.split("| paper | code |")[1])
    assert len(rows) >= 6
    for where, names in rows:
        path = ROOT / where.rstrip("/")
        code = "".join(p.read_text() for p in (path.glob("*.py") if path.is_dir() else [path]))
        for name in names.split(", "):
            assert re.search(rf"(def|class) {name.rsplit('.', 1)[-1]}\b", code), (where, name)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^):]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_every_file_of_the_table_exists():
    for cell in re.findall(r"^\| (`.*?) \|", TEXT.split("## Read")[1].split("\n\n    images")[0], re.M):
        for name in re.findall(r"`(.*?)`", cell):
            assert (ROOT / name).exists(), name
