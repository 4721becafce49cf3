"""What the README shows is true: its Python runs, its commands parse, the names it points to exist."""
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippets(capsys):
    for snippet in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(snippet, {})
    assert capsys.readouterr().out == "torch.Size([6, 2, 50, 15]) torch.Size([6, 2, 50, 4])\n"


@pytest.mark.parametrize("line", re.findall(r"^    (?:.* && )?python train\.py ?(.*)$", TEXT, re.M))
def test_train_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.parse(shlex.split(line))


def test_the_map_from_papers_to_code():
    rows = re.findall(r"^\| .* \| `(\S+): (.*)` \|$", TEXT, re.M)
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
