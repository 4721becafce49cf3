"""Hostile input to every reader is used, or refused in one line; no other file appears.

FUZZ=2000 python -m pytest tests/test_fuzz.py -s        more cases; their number is printed
"""

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
import train
from eval import load_run
from tools import predict
from util import cli, coco, dataset_check
from util.files import DataError, read_json
from util.images import read_image
from util.weights import init_from_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_CASES = int(os.environ.get("FUZZ", 40))
fuzz = settings(
    max_examples=NUM_CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
tried = collections.Counter()  # cases of each kind of input

# ---------------------------------------------------------------- inputs
atoms = st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text()
junk = st.recursive(
    atoms, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8
)  # whatever JSON can hold
raw_bytes = st.just(b"") | st.binary(max_size=200) | st.text(max_size=60).map(str.encode)
byte_changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)

IMAGE_NAMES = ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp"]
SIZE = {"width": 30, "height": 20}
CATEGORIES = [{"id": 3, "name": "ship"}, {"id": 5, "name": "plane"}, {"id": 9, "name": "car"}]
BOX = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}
COCO = {
    "images": [{"id": 0, "file_name": "a.png", **SIZE}, {"id": 1, "file_name": "a.jpg", **SIZE}],
    "annotations": [BOX],
    "categories": CATEGORIES,
}
SMALL_DETR = {"backbone": "resnet18", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1}
MODEL = detr.build_detector("detr", 3, **SMALL_DETR)
SOME_WEIGHTS = {name: x[:2] for name, x in MODEL.state_dict().items() if "norm" in name}


def parse_flags(words):
    """Return the flags of train.py; raises ValueError where the command ends with one line."""
    try:
        args, _ = train.parse(words)
    except UnicodeDecodeError as error:
        raise ValueError(cli.one_line(error)) from None
    except SystemExit as stop:
        assert stop.code == 2
        raise ValueError("printed by the parser") from None
    return args


READERS = {
    "a.json": coco.load_json,
    "a.txt": lambda path: parse_flags([f"@{path}"]),
    "a.pt": lambda path: init_from_checkpoint(MODEL, path),
}
for name in IMAGE_NAMES:
    READERS[name] = lambda path: read_image(path, 8)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the input goes: among good files, in a working directory where nothing else appears."""
    for name in IMAGE_NAMES:
        Image.effect_noise((30, 20), 50).convert("RGB").save(tmp_path / name)
    torch.save({"model": SOME_WEIGHTS, "args": 1}, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps(COCO))
    (tmp_path / "a.txt").write_text("--epochs 1\n--lr 1 --overfit 2  # two flags\n\n--seed 3\n")
    monkeypatch.chdir(tmp_path)
    files_before = set(tmp_path.rglob("*"))
    yield tmp_path / "x"
    assert set(tmp_path.rglob("*")) - {tmp_path / "x"} <= files_before
    print(f"\nfuzz: {tried.total():,} cases: {tried}")


def attempt(kind, function, *arguments):
    """Return the result of a function, or None if it raises our errors for wrong input."""
    tried[kind] += 1
    try:
        return function(*arguments)
    except ValueError as error:
        assert type(error) in (ValueError, DataError) and str(error), repr(error)
        return None


def places(value):
    """Return (list or dict, index or key) of everything in nested lists and dicts."""
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    else:
        keys = []
    result = []
    for key in keys:
        result.append((value, key))
        result += places(value[key])
    return result


@st.composite
def spoiled(draw, value):
    """Draw copies of a value with up to three places replaced or removed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(places(value)))
        holder[key] = draw(junk)
        if draw(st.booleans()):
            del holder[key]
    return value


# ---------------------------------------------------------------- files
@fuzz
@given(spoiled(COCO) | junk)
def test_coco_files(file, content):
    file.write_text(json.dumps(content))
    transform = isaid.make_transforms(False, 64)
    data = attempt("COCO", isaid.load_coco, file.parent, file, transform)
    checked = attempt("checks", dataset_check.check, file.parent, file)
    if data is None:
        return
    labels = torch.cat(data.labels)
    boxes = torch.cat(data.boxes)
    assert boxes.isfinite().all() and (boxes[:, 2:] > 0).all()
    assert ((0 <= labels) & (labels < len(data.categories))).all()
    _, classes = checked
    assert classes in (None, coco.class_names(data.categories))


@pytest.mark.parametrize("name", READERS)
@fuzz
@given(st.sampled_from([0, 1]) | st.floats(0.1, 1), raw_bytes, byte_changes)
def test_damaged_files(file, name, fraction, more, changes):
    """The start of a good file or nothing of it, other bytes after that, single bytes changed."""
    content = (file.parent / name).read_bytes()
    content = bytearray(content[: int(fraction * len(content))] + more)
    for place, byte in changes:
        i = int(place * len(content))
        content[i : i + 1] = [byte]
    file.write_bytes(content)
    result = attempt(name, READERS[name], file)
    if result is not None and name in IMAGE_NAMES:
        assert result[0].mode == "RGB"


@fuzz
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_images_that_say_they_are_huge(file, width, height):
    if 4096 < width * height < Image.MAX_IMAGE_PIXELS * 2:
        return  # Pillow takes the memory for these
    content = (file.parent / "a.bmp").read_bytes()
    file.write_bytes(content[:18] + struct.pack("<II", width, height) + content[26:])
    attempt("huge images", read_image, file)


@fuzz
@given(junk)
def test_checkpoints_of_something_else(file, content):
    for value in (content, {"model": content}):
        torch.save(value, file)
        attempt("other weights", init_from_checkpoint, MODEL, file)
        attempt("other runs", load_run, file, "cpu")


# ---------------------------------------------------------------- images of all formats
def encode(picture, file_format, mode):
    """Return the bytes of an image, or None if Pillow cannot write it in this format and mode."""
    file = io.BytesIO()
    try:
        picture.convert(mode).save(file, file_format)
    except Exception:  # many kinds; some formats need a program that is not installed
        return None
    return file.getvalue()


def save_in_all_formats(folder, num_copies):
    """Write images in every format that Pillow writes: whole, cut off, with bytes changed.

    Returns their names.
    """
    Image.init()
    rng = np.random.default_rng(0)
    picture = Image.effect_noise((30, 20), 50)
    for file_format in sorted(Image.SAVE):
        for mode in ("RGB", "RGBA", "L", "P", "1"):
            content = encode(picture, file_format, mode)
            if content is None:
                continue
            for i in range(num_copies):
                damaged = bytearray(content)
                if i > 0:  # the first stays whole
                    for place in rng.integers(0, len(damaged), rng.integers(0, 6)):
                        damaged[place] = rng.integers(256)
                if i % 3 == 1:
                    damaged = damaged[: int(rng.random() * len(damaged))]
                (folder / f"{file_format}-{mode}-{i}.png").write_bytes(damaged)
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def all_formats(tmp_path):
    """A dataset of images in all formats: (root, names, {name that it cannot use: message})."""
    images_dir, json_path = coco.split_files(tmp_path, "train")
    images_dir.mkdir(parents=True)
    names = save_in_all_formats(images_dir, max(3, NUM_CASES // 40))
    images = [{"id": i, "file_name": name, **SIZE} for i, name in enumerate(names)]
    json_path.write_text(json.dumps({**COCO, "annotations": [], "images": images}))
    data = isaid.load_coco(images_dir, json_path, isaid.make_transforms(False, 64))
    errors = {}
    for i, name in enumerate(names):
        try:
            data[i]
        except DataError as error:
            errors[name] = str(error)
    return tmp_path, names, errors


def test_images_of_all_formats(all_formats, monkeypatch, capsys):
    """The dataset, its check, predict and prepare name each image that they cannot use."""
    root, names, errors = all_formats
    images_dir, json_path = coco.split_files(root, "train")
    assert len(names) > 150 and len(names) / 9 < len(errors) < len(names)
    for name, message in errors.items():
        assert name in message and "\n" not in message

    monkeypatch.setattr(dataset_check, "MAX_PRINTED_ERRORS", len(names))
    report, _ = dataset_check.check(images_dir, json_path)
    assert f"errors   {len(errors):,}\n" in report
    for name in errors:
        assert name in report

    unreadable = {name for name, message in errors.items() if "annotations say" not in message}
    check_predict(root, images_dir, names, unreadable, monkeypatch)
    (root / "test").symlink_to(root / "train")  # of this split no masks are expected
    with pytest.raises(SystemExit, match="1"):
        isaid.main(["prepare", str(root), str(root / "patches"), "--splits", "test"])
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1].startswith(f"error: {len(unreadable)} images in 'test'")
    assert "Traceback" not in stderr
    for name in unreadable:
        assert name.removesuffix(".png") in stderr
    for reader in ("dataset", "check", "predict", "prepare"):
        tried[f"formats: {reader}"] = len(names)


def check_predict(root, images_dir, names, unreadable, monkeypatch):
    """Let predict run on images, with a model that finds nothing."""
    checkpoint = {
        "model": MODEL.state_dict(),
        "detector": {"name": "detr", "num_classes": 3, **SMALL_DETR},
        "args": {**vars(train.parse([])[0]), "setting": "detect", "image_size": 64},
        "categories": CATEGORIES,
        "window": 64,
        "task": None,
        "task_state": None,
    }
    torch.save(checkpoint, root / "a.pt")
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, int)}
    monkeypatch.setattr(predict, "detect_in_windows", lambda *_, **__: nothing)
    with pytest.raises(SystemExit) as end:
        predict.main([str(root / "a.pt"), str(images_dir), "--out", str(root / "out")])
    assert f"{len(unreadable)} of {len(names)} images" in end.value.code
    for name in unreadable:
        assert name in end.value.code
    written = read_json(root / "out/predictions.json")["images"]
    assert {image["file_name"] for image in written} == set(names) - unreadable


# ---------------------------------------------------------------- flags
ACTIONS = [a for a in train.build_parser()._actions if "--help" not in a.option_strings]
WORDS = ["0", "1", "2", "64", "0.5", "-1", "1e400", "nan", "9" * 20, "", "\x00", "é", "cpu", "@x"]


def flags_with_values():
    """Return tuples of a flag and a value that it may be given, right or wrong."""
    result = []
    for action in ACTIONS:
        for flag in action.option_strings:
            if action.nargs == 0:
                result.append((flag,))
                continue
            values = WORDS
            if action.choices:
                values = action.choices
            for value in values:
                result.append((flag, value))
    return result


@fuzz
@given(st.lists(st.sampled_from(flags_with_values()) | st.tuples(st.text(max_size=5)), max_size=4))
def test_flags(file, capsys, parts):
    """Flags that are accepted have values of the type, the choices and the range they promise."""
    words = []
    for part in parts:
        words += part
    args = attempt("flags", parse_flags, words)
    stderr = capsys.readouterr().err
    if args is None:
        assert not stderr or stderr.startswith("error: ")
        return
    for action in ACTIONS:
        values = getattr(args, action.dest)
        if action.dest == "init" or values is None or values is False:
            continue
        if not isinstance(values, list):
            values = [values]
        for value in values:
            check_value(action, value)


def check_value(action, value):
    """Check the value of a flag."""
    if action.choices:
        assert value in action.choices
    if action.type:
        assert action.type(str(value)) == value
    elif action.nargs == 0:
        assert value is True
    if isinstance(value, (int, float)):
        assert 0 <= value <= 2**32
