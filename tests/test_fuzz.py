"""Hostile input to every reader is taken, or refused with one line; no file appears anywhere.
FUZZ=2000 python -m pytest tests/test_fuzz.py -s        more cases; the number tried is printed"""

import collections
import copy
import io
import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import detr
import isaid
import reproduce
import train
from eval import load_run
from tools import predict
from util import coco, dataset_check
from util.files import DataError, read_json
from util.images import read_image
from util.weights import init_from_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
tried = collections.Counter()  # cases of each kind of input
fuzz = settings(max_examples=int(os.environ.get("FUZZ", 40)), deadline=None, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip
atoms = st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text()
junk = st.recursive(atoms, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8)
texts = st.just(b"") | st.binary(max_size=200) | st.text(max_size=60).map(str.encode)
changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)

PICTURES = ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp"]
SIZE = {"width": 30, "height": 20}
IMAGES = [{"id": i, "file_name": PICTURES[i], **SIZE} for i in range(2)]
BOX = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}
CLASSES = [{"id": 3, "name": "ship"}, {"id": 5, "name": "plane"}, {"id": 9, "name": "car"}]
COCO = {"images": IMAGES, "annotations": [BOX], "categories": CLASSES}
SMALL = {"backbone": "resnet18", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1}
DETECTOR = {"name": "detr", "num_classes": 3, **SMALL}
MODEL = detr.build_detector("detr", 3, **SMALL)
WEIGHTS = {"model": {k: x[:2] for k, x in MODEL.state_dict().items() if "norm" in k}, "args": 1}
RUN = {"model": {}, "args": {**vars(train.parse([])[0]), "setting": "pretrain"}, "window": 64}
RUN.update(task={"name": "x"}, task_state={}, categories=CLASSES)
READERS = dict.fromkeys(PICTURES, lambda path: read_image(path, 8))
READERS.update({"a.json": coco.load_json, "a.txt": reproduce.read_table})
READERS["a.pt"] = lambda path: init_from_checkpoint(MODEL, path)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the input goes: among good files, in a working directory where nothing else appears."""
    for name in PICTURES:
        Image.effect_noise((30, 20), 50).convert("RGB").save(tmp_path / name)
    torch.save(WEIGHTS, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps(COCO))
    (tmp_path / "a.txt").write_text("a: --epochs 1\nb: --init {a}  # after a\n\nc-1: --lr 1\n")
    monkeypatch.chdir(tmp_path)
    good = set(tmp_path.rglob("*"))
    yield tmp_path / "x"
    assert set(tmp_path.rglob("*")) <= {*good, tmp_path / "x"}
    print(f"\nfuzz: {tried.total():,} cases: {tried}")


def attempt(name, function, *arguments):
    """The result, or the refusal in one line."""
    tried[name] += 1
    try:
        return function(*arguments)
    except ValueError as error:
        assert type(error) in (ValueError, DataError) and str(error), repr(error)


def places(value):
    """(list or dict, index or key) of everything in nested lists and dicts."""
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    return [(value, key) for key in keys] + [x for key in keys for x in places(value[key])]


@st.composite
def spoilt(draw, value):
    value = copy.deepcopy(value)  # with up to three places replaced or removed
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(places(value)))
        holder[key] = draw(junk)
        if draw(st.booleans()):
            del holder[key]
    return value


@fuzz
@given(spoilt(COCO) | junk)
def test_coco_files(file, content):
    file.write_text(json.dumps(content))
    data = attempt("COCO", isaid.load_coco, file.parent, file, isaid.make_transforms(False, 64))
    if data:
        labels, boxes = torch.cat(data.labels), torch.cat(data.boxes)
        assert boxes.isfinite().all() and (boxes[:, 2:] > 0).all()
        assert ((0 <= labels) & (labels < len(data.categories))).all()
    found = attempt("checks", dataset_check.check, file.parent, file)
    assert not data or found[1] is None or found[1] == coco.class_names(data.categories)


@pytest.mark.parametrize("name", READERS)
@fuzz
@given(st.sampled_from([0, 1]) | st.floats(0.1, 1), texts, changes)
def test_damaged_files_and_others(file, name, keep, more, changes):
    """A part of a good file or nothing of it, something else after that, single bytes changed."""
    content = (file.parent / name).read_bytes()
    content = bytearray(content[: int(keep * len(content))] + more)
    for place, byte in changes:
        i = int(place * len(content))
        content[i : i + 1] = [byte]
    file.write_bytes(content)
    found = attempt(name, READERS[name], file)
    assert not found or name not in PICTURES or found[0].mode == "RGB"


def of_all_formats(folder, copies):
    """Images in every format that Pillow writes: whole, cut off, with bytes changed; the names."""
    Image.init()
    rng, picture = np.random.default_rng(0), Image.effect_noise((30, 20), 50)
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "RGBA", "L", "P", "1"):
            try:
                picture.convert(mode).save(content := io.BytesIO(), kind)
            except Exception:  # not in this mode, or not without a program that is not here
                continue
            for i in range(copies):
                data = bytearray(content.getvalue())
                for place in rng.integers(0, len(data), rng.integers(0, 6) if i else 0):
                    data[place] = rng.integers(256)
                share = rng.random() if i % 3 == 1 else 1
                (folder / f"{kind}-{mode}-{i}.png").write_bytes(data[: int(share * len(data))])
    return sorted(path.name for path in folder.iterdir())


def test_images_of_all_formats(tmp_path, monkeypatch, capsys):
    """The check, the dataset, predict and prepare: each names what it cannot use, no more."""
    images = coco.split_files(tmp_path, "train")[0]
    images.mkdir(parents=True)
    names = of_all_formats(images, max(3, int(os.environ.get("FUZZ", 40)) // 40))
    entries = [{"id": i, "file_name": name, **SIZE} for i, name in enumerate(names)]
    content = {**COCO, "annotations": [], "images": entries}
    coco.split_files(tmp_path, "train")[1].write_text(json.dumps(content))
    loaded = isaid.load_coco(*coco.find_split(tmp_path, "train"), isaid.make_transforms(False, 64))
    bad = {}
    for i, name in enumerate(names):
        try:
            loaded[i]
        except DataError as error:
            bad[name] = str(error)
            assert name in bad[name] and "\n" not in bad[name]
    assert len(names) > 150 and len(names) / 9 < len(bad) < len(names)
    monkeypatch.setattr(dataset_check, "MAX_PRINTED_ERRORS", len(names))
    said, _ = dataset_check.check(images, coco.split_files(tmp_path, "train")[1])
    assert f"errors   {len(bad):,}\n" in said, said[:99]
    assert all(name in said for name in bad)
    unread = {name for name, text in bad.items() if "should have" not in text}
    state = {**RUN, "window": 64, "task": None, "model": MODEL.state_dict()}
    state["args"] = {**RUN["args"], "setting": "detect", "image_size": 64}
    torch.save({**state, "detector": DETECTOR}, tmp_path / "a.pt")
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, int)}
    monkeypatch.setattr(predict, "find", lambda *_: nothing)
    with pytest.raises(SystemExit, match=f"error: {len(unread)} of {len(names)} images") as end:
        predict.main([str(tmp_path / "a.pt"), str(images), "--out", str(tmp_path / "out")])
    assert all(name in end.value.code for name in unread)
    found = read_json(tmp_path / "out/predictions.json")["images"]
    assert {image["file_name"] for image in found} == {*names} - unread
    with pytest.raises(SystemExit, match="1"):
        isaid.main(["prepare", str(tmp_path), str(tmp_path / "patches"), "--splits", "train"])
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"error: {len(names)} images of train are bad")
    assert all(name[:-4] in said for name in unread) and "Traceback" not in said
    tried.update({f"formats: {x}": len(names) for x in ("dataset", "check", "predict", "prepare")})


@fuzz
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_images_that_say_they_are_huge(file, width, height):
    if not 4096 < width * height < Image.MAX_IMAGE_PIXELS * 2:  # of these memory is wanted
        content = (file.parent / "a.bmp").read_bytes()
        file.write_bytes(content[:18] + struct.pack("<II", width, height) + content[26:])
        attempt("huge images", read_image, file)


@fuzz
@given(junk | spoilt(RUN))
def test_checkpoints_of_something_else(file, content):
    if isinstance(content, dict):
        content["detector"] = DETECTOR
    for value in (content, {"model": content}):
        torch.save(value, file)
        attempt("other checkpoints", READERS["a.pt"], file)
        attempt("other runs", load_run, file, "cpu")


ACTIONS = [a for a in train.build_parser()._actions if "--help" not in a.option_strings]
WORDS = ["0", "1", "2", "64", "0.5", "-1", "1e400", "nan", "9" * 20, "", "\x00", "é", "cpu", "@x"]
WITH_VALUES = [(flag, *value) for a in ACTIONS for flag in a.option_strings
               for value in ([()] if a.nargs == 0 else zip(a.choices or WORDS))]  # fmt: skip


@fuzz
@given(st.lists(st.sampled_from(WITH_VALUES) | st.tuples(st.text(max_size=5)), max_size=4))
def test_flags(file, capsys, parts):
    """What is taken is of the kind that the flags promise."""
    tried["flags"] += 1
    try:
        args, _ = train.parse([word for part in parts for word in part])
    except SystemExit as stop:
        assert stop.code == 2 and capsys.readouterr().err.startswith("error: ")
        return
    for action in ACTIONS:
        value = getattr(args, action.dest) if action.dest != "init" else None
        for one in value if isinstance(value, list) else [value]:
            kind = bool if action.nargs == 0 else action.type or str
            assert one in (None, False) or one == kind(str(one)) in (action.choices or [one])
            assert not isinstance(one, int | float) or 0 <= one <= 2**32
