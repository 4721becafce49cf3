"""Hostile input to every reader: it is taken, or refused with one line; no traceback, no file anywhere else.

    FUZZ=2000 python -m pytest tests/test_fuzz.py -s        more cases; the number tried is printed
"""
import copy
import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import detr
import isaid
import patches
import reproduce
import train

CASES = int(os.environ.get("FUZZ", 40))  # of each test
tried = {}  # kind of input: number of cases
fuzz = settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
junk = st.recursive(st.none() | st.booleans() | st.integers(-10 ** 25, 10 ** 25) | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=8)
COCO = {"images": [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 7} for i in range(2)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0,
                         "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]}],
        "categories": [{"id": 3, "name": "ship"}, {"id": 5, "name": "plane"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader may read; nothing may appear in it, nor in the working directory."""
    folder = tmp_path_factory.mktemp("fuzz")
    for i in range(2):
        Image.new("RGB", (9, 7)).save(folder / f"{i}.png")
    yield folder
    assert {path.name for path in folder.iterdir()} <= {"0.png", "1.png", "a.json", "a.pt", "a.png", "a.txt"}


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print(f"\nfuzz: {sum(tried.values()):,} cases: " + ", ".join(f"{name} {n:,}" for name, n in tried.items()))


def attempt(name, function, *arguments):
    """The result, or the refusal in one line."""
    tried[name] = tried.get(name, 0) + 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments)
    except ValueError as error:
        assert type(error) in (ValueError, isaid.DataError), repr(error)
        assert str(error) and "\n" not in isaid.one_line(error)


def places(value, path=()):
    """The paths of everything in nested lists and dicts."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@st.composite
def spoilt(draw, value=COCO):
    """A COCO file with up to three places replaced or removed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(value) if path]))
        inner = value
        for key in path:
            inner = inner[key]
        if draw(st.booleans()) or isinstance(inner, list):
            inner[last] = draw(junk)
        else:
            del inner[last]
    return value


@fuzz
@given(st.one_of(spoilt(), junk))
def test_coco_files(folder, content):
    (folder / "a.json").write_text(json.dumps(content))
    data = attempt("COCO files", isaid.load_coco, folder, folder / "a.json", isaid.transforms(False, 64))
    if data:
        assert len(data) and all((0 <= labels).all() and (labels < len(data.categories)).all() for labels in data.labels)
        assert all(boxes.isfinite().all() for boxes in data.boxes)
    attempt("checks", isaid.check, folder, folder / "a.json")
    found = attempt("official annotations", patches.read_annotations, folder / "a.json")
    for annotation in [a for _, each in (found or {}).values() for a in each]:
        mask = attempt("segmentations", patches.local_mask, annotation, 7, 9)
        if mask:
            patches.clip_objects([(*mask, annotation)], (0, 7, 0, 9))


@fuzz
@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
def test_files_that_are_something_else(folder, content):
    for name in ("a.json", "a.pt", "a.png", "a.txt"):
        (folder / name).write_bytes(content)
    attempt("JSON", isaid.load_json, folder / "a.json")
    attempt("checkpoints", detr.load_checkpoint, folder / "a.pt")
    attempt("images", isaid.read_image, folder / "a.png")
    attempt("tables", reproduce.read_table, folder / "a.txt")


def spoil(content, changes, keep):
    content = bytearray(content[:max(1, int(keep * len(content)))])
    for place, byte in changes:
        content[int(place * (len(content) - 1))] = byte
    return bytes(content)


changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)


def picture(kind):
    out = io.BytesIO()
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(out, kind)
    return out.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")}


@fuzz
@given(st.sampled_from(sorted(PICTURES)), changes, st.floats(0.1, 1) | st.just(1.0))
def test_damaged_images(folder, kind, changes, keep):
    (folder / "a.png").write_bytes(spoil(PICTURES[kind], changes, keep))
    found = attempt("images", isaid.read_image, folder / "a.png", 8)
    assert found is None or found[0].mode == "RGB"


@fuzz
@given(st.integers(0, 2 ** 32 - 1), st.integers(0, 2 ** 32 - 1))
def test_images_that_say_they_are_huge(folder, width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    if 4096 < width * height < isaid.Image.MAX_IMAGE_PIXELS * 2:
        return  # allowed: its memory is wanted
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    attempt("images", isaid.read_image, folder / "a.png")


@pytest.fixture(scope="module")
def checkpoint():
    model, out = detr.build_detector("detr", 3, backbone="resnet18", hidden_dim=32, enc_layers=1, dec_layers=1), io.BytesIO()
    torch.save({"model": {name: tensor.flatten()[:2] for name, tensor in model.state_dict().items()}, "args": {"a": 1}}, out)
    return model, out.getvalue()


@fuzz
@given(changes, st.floats(0.1, 1) | st.just(1.0))
def test_damaged_checkpoints(folder, checkpoint, changes, keep):
    (folder / "a.pt").write_bytes(spoil(checkpoint[1], changes, keep))
    attempt("checkpoints", detr.load_weights, checkpoint[0], folder / "a.pt")


@fuzz
@given(junk)
def test_checkpoints_of_something_else(folder, checkpoint, content):
    for value in (content, {"model": content}):
        try:
            torch.save(value, folder / "a.pt")
        except Exception:  # what torch cannot save nobody will load
            continue
        attempt("checkpoints", detr.load_weights, checkpoint[0], folder / "a.pt")


FLAGS = sorted(flag for action in train.build_parser()._actions for flag in action.option_strings if flag not in ("-h", "--help"))
values = st.sampled_from(["0", "-1", "1e400", "nan", "x", "", "detr", "pretrain", "backbone", "64", "0.5", "9" * 20, "cpu", "@x",
                          "mim-discrete", "../x", "\x00", "é"]) | st.text(max_size=5)


@fuzz
@given(st.lists(st.sampled_from(FLAGS) | values, max_size=8))
def test_flags(capsys, flags):
    tried["flags"] = tried.get("flags", 0) + 1
    try:
        args = train.parse(flags)
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 2 and said.startswith("error: ") and "Traceback" not in said
    else:
        assert args.batch_size >= 1 and Path(args.out or "x").name is not None


TABLE = "a: --epochs 1\nb: --init {a}  # after a\n\nc-1: @x.txt\n"


@fuzz
@given(changes, st.floats(0.1, 1) | st.just(1.0), st.text(max_size=20))
def test_damaged_tables(folder, changes, keep, more):
    (folder / "a.txt").write_bytes(spoil(TABLE.encode(), changes, keep) + more.encode(errors="replace"))
    attempt("tables", reproduce.read_table, folder / "a.txt")
