"""Hostile input to every reader is taken, or refused with one line; no file appears anywhere else.

FUZZ=2000 python -m pytest tests/test_fuzz.py -s        more cases; the number tried is printed
"""

import collections
import copy
import io
import json
import os
import struct
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import coco
import detr
import eval as evaluation
import isaid
import reproduce
import train

pytestmark = pytest.mark.filterwarnings("ignore")
tried = collections.Counter()  # cases of each kind of input
fuzz = settings(max_examples=int(os.environ.get("FUZZ", 40)), deadline=None, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip
atoms = st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text()
junk = st.recursive(atoms, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8)
BOX = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}
IMAGES = [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 7} for i in range(2)]
CLASSES = [{"id": 3, "name": "ship"}, {"id": 5, "name": "plane"}]
COCO = {"images": IMAGES, "annotations": [BOX], "categories": CLASSES}
TABLE = "a: --epochs 1\nb: --init {a}  # after a\n\nc-1: @x.txt\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader may read; nothing may appear there, nor in the working directory."""
    for i in range(2):
        Image.new("RGB", (9, 7)).save(tmp_path / f"{i}.png")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield tmp_path
    assert {x.name for x in tmp_path.rglob("*")} <= {"0.png", "1.png", "a.json", "cwd", *READERS}
    print(f"\nfuzz: {tried.total():,} cases: {tried}")


def attempt(name, function, *arguments):
    """The result, or the refusal in one line."""
    tried[name] += 1
    try:
        return function(*arguments)
    except ValueError as error:
        assert type(error) in (ValueError, coco.DataError), repr(error)
        assert str(error) and "\n" not in coco.one_line(error)


def places(value, path=()):
    """The paths of everything in nested lists and dicts."""
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    return [path, *(x for key in keys for x in places(value[key], (*path, key)))]


@st.composite
def spoilt(draw, value):
    value = copy.deepcopy(value)  # with up to three places replaced or removed
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(value)[1:]))
        inner = value
        for key in path:
            inner = inner[key]
        inner[last] = draw(junk)
        if draw(st.booleans()):
            del inner[last]
    return value


@fuzz
@given(spoilt(COCO) | junk)
def test_coco_files(folder, content):
    (folder / "a.json").write_text(json.dumps(content))
    data = attempt("COCO", isaid.load_coco, folder, folder / "a.json", isaid.transforms(False, 64))
    if data:
        labels, boxes = torch.cat(data.labels), torch.cat(data.boxes)
        assert boxes.isfinite().all() and (boxes[:, 2:] > 0).all()
        assert ((0 <= labels) & (labels < len(data.categories))).all()
    found = attempt("checks", isaid.check, folder, folder / "a.json")
    assert not data or found[1] is None or found[1] == coco.class_names(data.categories)


def saved(save, *options):
    save(out := io.BytesIO(), *options)
    return out.getvalue()


SMALL = {"backbone": "resnet18", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1}
MODEL = detr.build_detector("detr", 3, **SMALL)
WEIGHTS = {"model": {name: x.flatten()[:2] for name, x in MODEL.state_dict().items()}, "args": 1}
RUN = {"model": {}, "args": {"setting": "pretrain", "attn": "auto"}, "task": {"name": "x"}}
RUN.update(task_state={}, categories=CLASSES)
PICTURE = Image.effect_noise((30, 20), 50).convert("RGB")
FILES = [("a.png", saved(PICTURE.save, kind)) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")]
FILES += [("a.txt", TABLE.encode()), ("a.pt", saved(lambda out: torch.save(WEIGHTS, out)))]
READERS = {
    "a.png": lambda path: coco.read_image(path, 8),
    "a.pt": lambda path: detr.load_weights(MODEL, path),
    "a.txt": reproduce.read_table,
}
changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)


@pytest.mark.parametrize("name, content", FILES)
@fuzz
@given(changes, st.floats(0.1, 1) | st.just(1.0), st.text(max_size=20))
def test_damaged_files(folder, name, content, changes, keep, more):
    content = bytearray(content[: max(1, int(keep * len(content)))])
    for place, byte in changes:
        content[int(place * (len(content) - 1))] = byte
    (folder / name).write_bytes(content + more.encode(errors="replace"))
    found = attempt(name, READERS[name], folder / name)
    assert not found or name != "a.png" or found[0].mode == "RGB"


@fuzz
@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
def test_files_that_are_something_else(folder, content):
    for name, reader in {**READERS, "a.json": coco.load_json}.items():
        (folder / name).write_bytes(content)
        attempt(f"other {name}", reader, folder / name)


@fuzz
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_images_that_say_they_are_huge(folder, width, height):
    if not 4096 < width * height < coco.Image.MAX_IMAGE_PIXELS * 2:  # of these memory is wanted
        content = FILES[0][1]
        head = content[12:16] + struct.pack(">II", width, height) + content[24:29]
        head += struct.pack(">I", zlib.crc32(head))
        (folder / "a.png").write_bytes(content[:12] + head + content[33:])
        attempt("huge images", coco.read_image, folder / "a.png")


@fuzz
@given(junk | spoilt(RUN))
def test_checkpoints_of_something_else(folder, content):
    if isinstance(content, dict):
        content["detector"] = {"name": "detr", "num_classes": 3, **SMALL}
    for value in (content, {"model": content}):
        try:
            torch.save(value, folder / "a.pt")
        except Exception:  # what torch cannot save nobody will load
            continue
        attempt("other checkpoints", READERS["a.pt"], folder / "a.pt")
        attempt("other runs", evaluation.load_run, folder / "a.pt", "cpu")


ACTIONS = [a for a in train.build_parser()._actions if "--help" not in a.option_strings]
WORDS = ["0", "1", "2", "64", "0.5", "-1", "1e400", "nan", "9" * 20, "", "\x00", "é", "cpu", "@x"]
WITH_VALUES = [(flag, *value) for a in ACTIONS for flag in a.option_strings
               for value in ([()] if a.nargs == 0 else zip(a.choices or WORDS))]  # fmt: skip


@fuzz
@given(st.lists(st.sampled_from(WITH_VALUES) | st.tuples(st.text(max_size=5)), max_size=4))
def test_flags(folder, capsys, parts):
    """What is taken is of the kind that the flags promise."""
    tried["flags"] += 1
    try:
        args, _ = train.parse([word for part in parts for word in part])
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 2 and said.startswith("error: ") and "Traceback" not in said
        return
    tried["flags that are taken"] += 1
    for action in ACTIONS:
        value = getattr(args, action.dest)
        for one in value if isinstance(value, list) else [value]:
            kind = bool if action.nargs == 0 else action.type or str
            assert one in (None, False) or one == kind(str(one)) in (action.choices or [one])
            assert not isinstance(one, int | float) or 0 <= one <= 2**32
