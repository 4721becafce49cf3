"""Files and commands as people have them: each is used as it was meant, or refused in one line."""

import errno
import json
import os
import runpy
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, PngImagePlugin

import detr
import isaid
import reproduce
import ssl_tasks
import train
from eval import main as eval_main
from tools import predict
from util import cli, coco, dataset_check, files, isaid_prepare, isaid_raw, plots
from util.files import DataError, check_writable, read_json, replace_file, write_text
from util.images import read_image, read_size
from util.weights import init_from_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--image_size 64 --epochs 1 --batch_size 2 --num_queries 5 --hidden_dim 32 --nheads 2 "
    "--enc_layers 1 --dec_layers 1 --dim_feedforward 32"
).split()
BOX = (8, 12, 20, 30)  # x, y, width, height of the white object in every image
NAMES = ["0.png", "1.png", "2.png", "3.png"]  # of the images of each split


def draw_image(width=48, height=64):
    """Return a black image with a white rectangle."""
    x, y, w, h = BOX
    image = np.zeros((height, width, 3), np.uint8)
    image[y : y + h, x : x + w] = 255
    return Image.fromarray(image)


def save_coco(root, names, split="train", **changes):
    """Write an annotation file in the layout of iSAID's patches; returns the folder of images.

    names:   of images of 48 x 64 pixels, with one car each
    changes: other lists than these; None leaves a list out
    """
    folder, path = coco.split_files(root, split)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"images": [], "categories": [{"id": 1, "name": "car"}], "annotations": []}
    for i, name in enumerate(names):
        image = {"id": i, "file_name": name, "width": 48, "height": 64}
        content["images"].append(image)
        annotation = {"id": i + 1, "image_id": i, "category_id": 1, "bbox": list(BOX)}
        content["annotations"].append(annotation)
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path):
    """A dataset of four images for training and four for validation."""
    for split in ("train", "val"):
        folder = save_coco(tmp_path / "data", NAMES, split)
        for name in NAMES:
            draw_image().save(folder / name)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one epoch on synthetic scenes."""
    out = tmp_path_factory.mktemp("files") / "run"
    train.main([*TINY, "--limit_train", "2", "--limit_val", "2", "--out", str(out)])
    return out


def load_train(data, transform=None):
    """Return the dataset to train on."""
    images_dir, json_path = coco.find_split(data, "train")
    return isaid.load_coco(images_dir, json_path, transform)


def error_of(main, *arguments):
    """Run a command that must fail; returns the line with which it ends."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code not in (0, None)
    return str(end.value.code)


# ---------------------------------------------------------------- images
STORED = {  # EXIF orientation: how to turn a scene into what the camera stores
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_as_they_are_displayed(tmp_path, suffix, orientation):
    scene = draw_image()
    stored = scene
    if STORED[orientation] is not None:
        stored = scene.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.resize((8 * stored.width, 8 * stored.height)).save(path, exif=exif)
    for min_size in (None, 60):  # with 60, a JPEG is decoded at an eighth of its size
        image, size = read_image(path, min_size)
        assert size == (8 * 48, 8 * 64)
        assert read_size(path) == size
        small = np.asarray(image.convert("L").resize((48, 64))).astype(float)
        assert np.abs(small - np.asarray(scene.convert("L"))).mean() < 8


def png_chunk(kind, content):
    """Return a chunk of a PNG file."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png_file(bits, color_type, rows):
    """Return a PNG file of 4 x 4 pixels."""
    header = struct.pack(">IIBBBBB", 4, 4, bits, color_type, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    signature = b"\x89PNG\r\n\x1a\n"
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", content) + png_chunk(b"IEND", b"")
    return signature + chunks


def tiff_file(bits, bands, extra_samples=None):
    """Return an uncompressed TIFF file of 4 x 4 pixels whose bands hold 100, 110, 120 ..."""
    values = np.arange(100, 100 + 10 * bands, 10)
    pixels = np.tile(values, 16).astype(f"<u{bits // 8}").tobytes()
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: 2, 273: 8, 277: bands, 278: 4}
    tags[279] = len(pixels)
    if extra_samples is not None:
        tags[338] = extra_samples
    offset_of_bits = 8 + len(pixels) + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, value in tags.items():
        if tag == 258 and bands > 1:  # a value for each band, after the entries
            entries += struct.pack("<HHII", tag, 3, bands, offset_of_bits)
        else:
            entries += struct.pack("<HHIHH", tag, 3, 1, value, 0)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    directory += struct.pack("<H", bits) * bands
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def save_deep_files(folder):
    """Write files of more than 8 bits per channel; converting them would be silently wrong."""
    row = struct.pack(">12H", *[1000] * 12)  # 4 pixels in RGB, 16 bits each
    (folder / "rgb.png").write_bytes(png_file(16, 2, [row] * 4))
    (folder / "gray.png").write_bytes(png_file(16, 0, [row[:8]] * 4))
    (folder / "alpha.png").write_bytes(png_file(16, 6, [row + row[:8]] * 4))
    (folder / "rgb.tif").write_bytes(tiff_file(16, 3))
    (folder / "rgba.tif").write_bytes(tiff_file(16, 4, extra_samples=2))
    (folder / "rgb.ppm").write_bytes(b"P6\n4 4\n65535\n" + row * 4)
    sgi = struct.pack(">HBBHHHHll", 474, 0, 2, 3, 4, 4, 3, 0, 65535).ljust(512, b"\0")
    (folder / "rgb.sgi").write_bytes(sgi + row * 4)
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(folder / "float.tif")
    Image.new("RGB", (4, 4)).save(folder / "rgb.jp2")
    content = bytearray((folder / "rgb.jp2").read_bytes())
    content[content.index(b"\xff\x4f\xff\x51") + 4 + 38] = 15  # bits of a channel, less one
    (folder / "rgb.jp2").write_bytes(content)


def test_more_than_8_bits_are_refused(tmp_path):
    save_deep_files(tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 9
    for path in paths:
        with pytest.raises(DataError, match="more than 8 bits") as error:
            read_image(path)
        assert str(error.value).startswith(f"{path}: ")


def test_a_long_comment_in_a_ppm_file_is_not_a_bit_depth(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6\n# " + b"x" * 300 + b"\n4 4\n255\n" + bytes(48))
    assert read_size(path) == (4, 4)
    assert read_image(path)[0].size == (4, 4)


def test_bands_beyond_three_change_no_color(tmp_path):
    """With a fourth band, transparency or a palette the colors are those that are stored."""
    (tmp_path / "rgb.tif").write_bytes(tiff_file(8, 3))
    (tmp_path / "four.tif").write_bytes(tiff_file(8, 4))
    (tmp_path / "unspecified.tif").write_bytes(tiff_file(8, 4, extra_samples=0))
    (tmp_path / "alpha.tif").write_bytes(tiff_file(8, 4, extra_samples=2))
    opaque = Image.new("RGB", (4, 4), (100, 110, 120))
    for mode in ("RGBA", "LA", "CMYK"):
        opaque.convert(mode).save(tmp_path / f"{mode}.tif")
    transparent = opaque.copy()
    transparent.putalpha(7)
    transparent.save(tmp_path / "transparent.png")
    transparent.save(tmp_path / "transparent.webp", lossless=True, exact=True)
    palette = opaque.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png", transparency=bytes([0] * 256))
    opaque.save(tmp_path / "rgb.bmp")
    for path in tmp_path.iterdir():
        image, size = read_image(path)
        expected = (100, 110, 120)
        if path.stem == "LA":
            expected = (109, 109, 109)
        assert image.mode == "RGB" and size == (4, 4)
        assert np.abs(np.subtract(image.getpixel((1, 2)), expected)).max() <= 1, path.name


def test_megabytes_of_text_in_a_png_are_accepted(data, capsys):
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", "x" * 2**21, zip=True)
    draw_image().save(data / "train/images/0.png", pnginfo=note)
    assert isaid.check_dataset(data) == 0
    assert "errors   0" in capsys.readouterr().out


def test_damaged_pixels_are_noticed(tmp_path):
    """Also in the middle of a PNG file, which is loaded when its orientation is looked up."""
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="noise.png: not a readable image, or corrupted"):
        read_image(path)


# ---------------------------------------------------------------- annotations
def test_negative_sides_are_corrected(data):
    x, y, w, h = BOX
    boxes = [[x + w, y, -w, h], [x, y + h, w, -h], [x + w, y + h, -w, -h]]
    annotations = []
    for i, box in enumerate(boxes):
        annotations.append({"image_id": i, "category_id": 1, "bbox": box})
    save_coco(data, NAMES, annotations=annotations)
    loaded = load_train(data)
    assert [boxes.tolist() for boxes in loaded.boxes] == [[list(BOX)]] * 3 + [[]]
    assert "3 boxes with negative sides" in dataset_check.summary(loaded, 9, 64)


def test_repeated_entries_are_noticed(data, capsys):
    """Files, boxes and classes that occur again are listed by check and before training."""
    images = []
    for i, name in enumerate(("0.png", "./0.png", "2.png", "3.png")):
        images.append({"id": i, "file_name": name, "width": 48, "height": 64})
    images[2]["width"] = 1
    annotations = []
    for i in range(4):
        box = {"id": i, "image_id": i // 2, "category_id": 1, "bbox": list(BOX)}
        annotations.append(box)
    annotations.append({"id": 9, "image_id": 3, "category_id": 2, "bbox": list(BOX)})
    categories = [{"id": 0, "name": "bus"}, {"id": 1, "name": "car"}, {"id": 2, "name": "Car "}]
    changes = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val"):
        folder = save_coco(data, [], split, **changes)
        draw_image(1, 64).save(folder / "2.png")
    assert isaid.check_dataset(data) == 0
    printed = capsys.readouterr().out
    warnings = [
        "several ids: 1 (first: 0.png)",
        "duplicate category name 'car'",
        "duplicate annotations (same image, category and box): 2",
    ]
    for text in (*warnings, "under 2 pixels             1\n", "without boxes             bus\n"):
        assert printed.count(text) == 2, text
    summary = dataset_check.summary(load_train(data), 9, 64)
    for text in warnings:
        assert text in summary


def test_boxes_given_as_corners_are_noticed(data, capsys):
    x, y, w, h = BOX
    annotations = []
    for i in range(4):
        annotations.append({"image_id": i, "category_id": 1, "bbox": [x + w, y + h, 47, 63]})
    save_coco(data, NAMES, annotations=annotations)
    isaid.check_dataset(data)
    printed = capsys.readouterr().out
    assert printed.count("boxes look like [x0, y0, x1, y1]") == 1  # not those of val


def test_duplicate_ids_are_counted(data):
    images = [{"id": 7, "file_name": name, "width": 48, "height": 64} for name in NAMES]
    save_coco(data, [], images=images)
    with pytest.raises(DataError, match="duplicate id 7 in 'images': 4 entries"):
        coco.load_json(coco.split_files(data, "train")[1])


def test_names_from_other_machines(tmp_path):
    """Absolute and Windows paths, unicode, spaces and # in file_name."""
    names = ["/home/someone/data/0.png", "C:\\data\\1.png", "sub\\2.png", "図 #3.png"]
    folder = save_coco(tmp_path, [*names, str(tmp_path / "4.PNG")])
    (folder / "sub").mkdir()
    for path in ("0.png", "1.png", "sub/2.png", "図 #3.png"):
        draw_image().save(folder / path)
    draw_image().save(tmp_path / "4.PNG")
    loaded = load_train(tmp_path, isaid.make_transforms(False, 64))
    for i in range(5):
        loaded[i]


def test_one_picture_for_two_entries_is_an_error(data, capsys):
    """Of two cameras' pictures in one folder, or of names in upper and lower case, one is left."""
    folder = data / "train/images"
    for names in (["cam1/0.png", "cam2/0.png"], ["0.png", "cam2\\0.png"], ["0.PNG", "0.png"]):
        save_coco(data, ["1.png", *names])
        if names[0] == "0.PNG":  # where case is ignored, both names are of one file
            os.link(folder / "0.png", folder / "0.PNG")
        first, second = [name.replace("\\", "/") for name in names]
        message = f"0.png: read for {first} and for {second}, so one has the boxes of another"
        with pytest.raises(DataError, match=message):
            load_train(data)
        assert isaid.check_dataset(data) == 1
        printed = capsys.readouterr().out
        assert "errors   1\n" in printed
        assert message in printed


def test_guesses_about_files_are_warnings(data, capsys):
    """A picture found by its base name alone, and a link to the picture of another entry."""
    folder = save_coco(data, ["cam1/0.png", "1.png", "2.png", "sub\\3.png"])
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to(folder / "1.png")
    (folder / "sub").mkdir()
    (folder / "3.png").rename(folder / "sub/3.png")
    texts = [
        "image files listed under several ids: 1 (first: 2.png)",
        "images found by the last part of their file_name: 1 (first: cam1/0.png)",
    ]
    assert isaid.check_dataset(data) == 0
    printed = capsys.readouterr().out
    summary = dataset_check.summary(load_train(data), 9, 64)
    for text in texts:
        assert printed.count(text) == 1
        assert text in summary


@pytest.mark.parametrize("categories", [isaid_prepare.CATEGORIES, [], None])
def test_test_images_without_annotations(data, run, tmp_path, categories):
    """Their file has no annotations, and its categories may be empty or absent."""
    folder = save_coco(data, ["0.png"], "test", annotations=None, categories=categories)
    draw_image().save(folder / "0.png")
    out = tmp_path / "results.json"
    command = [str(run), "--data", str(data), "--split", "test"]
    message = error_of(eval_main, *command)
    assert "instancesonly_filtered_test.json: no ground truth" in message
    assert "--export FILE" in message
    eval_main([*command, "--export", str(out)])
    assert {result["image_id"] for result in read_json(out)} == {0}


def test_annotations_in_any_unicode(data):
    path = coco.split_files(data, "train")[1]
    text = path.read_text(encoding="utf-8").replace("car", "größer")
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        path.write_text(text, encoding=encoding)
        assert coco.load_json(path)["categories"] == [{"id": 1, "name": "größer"}]
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=f"{path}: .* save the file as UTF-8"):
        coco.load_json(path)


def test_nothing_to_train_on(data, tmp_path, capsys):
    empty_box = {"image_id": 0, "category_id": 1, "bbox": [1, 1, 0, 5]}
    save_coco(data, NAMES, annotations=[empty_box])
    message = error_of(train.main, *TINY, "--data", data, "--out", tmp_path / "out")
    assert "contains no boxes to train on; 1 boxes without area, removed" in message
    assert isaid.check_dataset(data) == 1
    assert capsys.readouterr().out.count("    contains no boxes to train on\n") == 1

    shutil.copytree(data / "val", data / "train", dirs_exist_ok=True)
    (data / "train/instancesonly_filtered_val.json").rename(coco.split_files(data, "train")[1])
    save_coco(data, NAMES, "val", annotations=[])
    assert isaid.check_dataset(data) == 0  # images for validation may have no boxes
    save_coco(data, [])
    assert isaid.check_dataset(data) == 1
    assert "    contains no images\n" in capsys.readouterr().out
    message = error_of(train.main, *TINY, "--setting", "pretrain", "--ssl_ratio", 0.001)
    assert "patches" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- folders
def test_files_of_the_system_are_no_images(tmp_path):
    names = ["a.PNG", "b/c.jpg", "ünï #1.png", "folder.png/d.png"]
    names += ["._a.png", ".ipynb_checkpoints/a.png", "@eaDir/a.png/thumb.jpg", "__MACOSX/a.png"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image().save(path, format="PNG")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "b")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    paths = coco.image_files(tmp_path)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in paths)
    assert found[1] in ("b/c.jpg", "elsewhere/c.jpg")  # one folder, which is read once
    assert found == ["a.PNG", found[1], "folder.png/d.png", "ünï #1.png"]


def test_images_of_the_raw_release(tmp_path):
    folder = tmp_path / "test/images"
    (folder / "P9.png").mkdir(parents=True)
    for name in ("P2.png", "P10.PNG", "._P1.png", "P2_instance_id_RGB.png", "notes.txt"):
        draw_image().save(folder / name, format="PNG")
    raw_split = isaid_raw.RawSplit(tmp_path, "test", devkit=False, limit=None)
    assert raw_split.stems == ["P2", "P10"]


# ---------------------------------------------------------------- command lines
LINES = {
    "--data data#2": ["--data", "data#2"],
    "--data 'my data' --init \"a b\"  # it's a comment": ["--data", "my data", "--init", "a b"],
    "--lr 1  # first line of a file from Windows": ["--lr", "1"],
    "--data C:\\data  #x": ["--data", "C:\\data"],
    "--data 'my '\"data\"\\t\\\t--lr '1'": ["--data", "my data\\t\\", "--lr", "1"],
    "--lr 1 \\": ["--lr", "1"],
    '--data "#1" \\': ["--data", "#1"],
    "--data ~/x --init '~'": ["--data", "/home/me/x", "--init", "~"],
    "--data $PLACE/a${PLACE}b": ["--data", "/my place/a/my placeb"],
    "--data '$PLACE' --init \"$PLACE\"": ["--data", "$PLACE", "--init", "/my place"],
    "--data=$PLACE/$": ["--data=/my place/$"],
    "# --epochs 3": [],
    "": [],
}


@pytest.mark.parametrize("line", LINES)
def test_lines_of_recipes(tmp_path, line, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/my place")
    words = LINES[line]
    assert cli.split_recipe_line(line) == words
    recipe = tmp_path / "recipe.txt"
    byte_order_mark = "\ufeff"
    recipe.write_text(f"{byte_order_mark}{line}\n--epochs 3\n", encoding="utf-8")
    args, _ = train.parse([f"@{recipe}"])
    expected, _ = train.parse([*words, "--epochs", "3"])
    assert args == expected


def test_recipes_from_any_folder(tmp_path, monkeypatch):
    """They are those of this code, unless the folder has files of this name."""
    monkeypatch.chdir(tmp_path)
    args, _ = train.parse(["@recipes/detr.txt"])
    assert args.model == "detr"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/detr.txt").write_text("--model deformable_detr")
    args, _ = train.parse(["@recipes/detr.txt"])
    assert args.model == "deformable_detr"


MISTAKES = [
    (train.main, ["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    (train.main, ["--epoch", "1"], "unrecognized arguments: --epoch"),  # no abbreviations
    (train.main, ["recipes/detr.txt"], "unrecognized arguments: recipes/detr.txt"),
    (train.main, ["--epochs", "2.5"], "--epochs: expected a whole number of at least 1, got '2.5'"),
    (train.main, ["--batch_size", "0"], "whole number of at least 1, got '0'"),
    (train.main, ["--lr", "0"], "--lr: expected a number greater than 0, got '0'"),
    (train.main, ["--lr", "nan"], "greater than 0, got 'nan'"),
    (train.main, ["--workers", "-1"], "at least 0 and at most 256, got '-1'"),
    (train.main, ["--lr_drop", "x"], "got 'x'"),
    (train.main, ["--dropout", "2"], "number of at least 0 and at most 1, got '2'"),
    (train.main, ["--num_queries", str(2**32)], "at most 10000, got '4294967296'"),
    (train.main, ["--enc_layers", "257"], "at least 0 and at most 256, got '257'"),
    (train.main, ["--limit_train", str(10**7)], "at most 1000000, got '10000000'"),
    (eval_main, ["RUN", "--max_dets", str(2**32)], "at most 10000, got '4294967296'"),
    (predict.main, ["RUN", "a.png", "--workers", "999"], "at most 256, got '999'"),
    (predict.main, ["RUN", "a", "--score", "0", "b"], "unrecognized arguments: b"),
    (isaid.main, ["scenes", "x", "--val", str(10**7)], "at most 1000000, got '10000000'"),
    (reproduce.main, ["tasks", "--jobs", str(2**32)], "at most 256, got '4294967296'"),
    (train.main, ["--data", ""], "--data is empty"),
    (train.main, ["--init", ""], "--init is empty"),
    (train.main, ["--init="], "--init is empty"),
    (train.main, ["--out", ""], "--out is empty"),
    (train.main, ["--tokenizer_weights", ""], "--tokenizer_weights is empty"),
    (eval_main, [""], "an argument is empty"),
    (eval_main, ["RUN", "--data", ""], "--data is empty"),
    (eval_main, ["RUN", "--export", ""], "--export is empty"),
    (eval_main, ["RUN", "--limit_vla", "1"], "unrecognized arguments: --limit_vla"),
    (predict.main, ["RUN", ""], "an argument is empty"),
    (predict.main, ["RUN", ".", "--out", ""], "--out is empty"),
    (isaid.main, ["check", ""], "an argument is empty"),
    (isaid.main, ["prepare", "", "x"], "an argument is empty"),
    (isaid.main, ["prepare", "x", "y", "--overlaps", "1"], "unrecognized arguments: --overlaps"),
    (isaid.main, ["scenes", ""], "an argument is empty"),
    (reproduce.main, [""], "an argument is empty"),
    (reproduce.main, ["t", "--rows", ""], "--rows is empty"),
]


@pytest.mark.parametrize("main, arguments, message", MISTAKES)
def test_mistakes_are_reported_at_once(main, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1


FLAGS_IN_FILES = {  # what a file of flags holds, and what is wrong with it
    "a variable": (b"--lr 1\r\n--data $UNSET/x", "variable $UNSET is not set"),
    "an open quote": (b"--lr 1\r\n--data 'x", "no closing quotation: 'x"),
    "UTF-16": ("--lr 1".encode("utf-16"), "save the file as UTF-8"),
    "Latin-1": ("--lr 1 # größer".encode("latin-1"), "save the file as UTF-8"),
}


@pytest.mark.parametrize("name", FLAGS_IN_FILES)
def test_files_of_flags_from_windows(tmp_path, capsys, name):
    content, message = FLAGS_IN_FILES[name]
    path = tmp_path / "flags.txt"
    path.write_bytes(content)
    error = error_of(train.main, f"@{path}") + capsys.readouterr().err
    assert message in error


def test_paths_that_cannot_be_folders(run, tmp_path):
    """For a name that is too long, or a file in the place of a folder, the remedy is named."""
    file = tmp_path / "file"
    file.write_text("not a folder")
    for path in (file, tmp_path / ("x" * 300)):
        commands = [
            (train.main, [*TINY, "--out", path]),
            (train.main, [*TINY, "--out", path, "--resume"]),
            (eval_main, [run, "--out", path]),
            (predict.main, [run, run / "detections.png", "--out", path]),
            (reproduce.main, ["tasks", "--no_run", "--out", path]),
            (isaid.main, ["scenes", path / "x"]),
        ]
        for main, arguments in commands:
            message = error_of(main, *arguments)
            assert str(path) in message and "choose a" in message
            assert "Errno" not in message and "--resume" not in message


def test_a_closed_pipe_is_no_error():
    """The rest of a long output is dropped without a word, with the status of SIGPIPE."""
    code = "from util import cli; cli.cli_main(lambda _: print('x\\n' * 10**6))()"
    line = f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["x", "141"] and not done.stderr


# ---------------------------------------------------------------- weights
SMALL_DETR = {
    "backbone": "resnet18",
    "hidden_dim": 32,
    "nheads": 2,
    "enc_layers": 1,
    "dec_layers": 1,
    "dim_feedforward": 32,
    "num_queries": 5,
}


def with_prefix(prefix, weights):
    """Return the weights with a prefix before every name."""
    return {prefix + name: x for name, x in weights.items()}


def test_wrapped_checkpoints(tmp_path):
    """As parallel training, Lightning and averaging write them, or without the class heads."""
    weights = detr.build_detector("detr", 3, **SMALL_DETR).state_dict()
    model = detr.build_detector("detr", 3, **SMALL_DETR)
    fresh = {name: x.clone() for name, x in model.state_dict().items()}
    heads = [name for name in weights if "class_embed" in name]
    headless = {name: x for name, x in weights.items() if name not in heads}
    lightning = {**with_prefix("model.", weights), "criterion.w": torch.ones(1)}
    checkpoints = {
        "ddp": {"model": with_prefix("module.", weights)},
        "lightning": {"state_dict": lightning},
        "ema": {"ema": {"module": weights}, "epoch": 3},
        "compiled": with_prefix("_orig_mod.", weights),
        "headless": {"model": headless},
    }
    for kind, content in checkpoints.items():
        torch.save(content, tmp_path / kind)
        model.load_state_dict(fresh)
        _, reinitialized = init_from_checkpoint(model, tmp_path / kind)
        assert reinitialized == (heads if kind == "headless" else [])
        for name, value in model.state_dict().items():
            expected = fresh[name] if name in reinitialized else weights[name]
            assert torch.equal(value, expected), (kind, name)


def test_weights_of_another_architecture(tmp_path):
    model = detr.build_detector("detr", 3, **SMALL_DETR)
    renamed = {}
    for name, x in model.state_dict().items():
        if "input_proj" in name:
            name = f"x{name}"
        renamed[name] = x
    path = tmp_path / "other.pt"
    torch.save({"model": renamed}, path)
    with pytest.raises(ValueError, match="missing input_proj.*unexpected xinput_proj"):
        init_from_checkpoint(model, path)


@pytest.mark.parametrize("key", ["args", "detector", "window", "categories"])
def test_checkpoints_of_other_programs(run, tmp_path, key):
    """What lacks a key of our checkpoints is refused; its weights may be used with --init."""
    state = torch.load(run / "best.pt")
    del state[key]
    path = tmp_path / "other.pt"
    torch.save(state, path)
    for main, arguments in ((eval_main, [path]), (predict.main, [path, run / "detections.png"])):
        message = error_of(main, *arguments)
        assert message.startswith(f"error: {path}: ")
        assert repr(key) in message and "--init" in message


def test_weights_that_are_not_finite(run, tmp_path):
    """They are refused when they are loaded; the learning rate is not to blame."""
    state = torch.load(run / "best.pt")
    path = tmp_path / "bad.pt"
    for value in (torch.nan, torch.inf):
        state["model"]["class_embed.0.bias"][0] = value
        torch.save(state, path)
        message = error_of(train.main, *TINY, "--init", path, "--out", tmp_path / "out")
        assert f"{path}: " in message and "class_embed.0.bias" in message
    flags = [*TINY, "--init", str(path), "--init_parts", "backbone"]
    flags += ["--limit_train", "2", "--limit_val", "1", "--out", str(tmp_path / "out")]
    train.main(flags)  # the backbone's are finite


# ---------------------------------------------------------------- outputs
def test_outputs_are_tried_first(run, tmp_path, monkeypatch):
    """A path that cannot be written is reported before anything is computed."""

    def fail(*_, **__):
        pytest.fail("computed first")

    monkeypatch.setattr("eval.evaluate", fail)
    monkeypatch.setattr(predict, "detect_in_windows", fail)
    file = tmp_path / "file"
    file.write_text("not a folder")
    image = tmp_path / "a.png"
    Image.new("RGB", (80, 80)).save(image)
    (tmp_path / "predictions.json").mkdir()
    commands = [
        (eval_main, [run, "--out", file / "x"]),
        (eval_main, [run, "--export", file / "x.json"]),
        (eval_main, [run, "--export", tmp_path]),
        (predict.main, [run, image, "--out", file / "x"]),
        (predict.main, [run, image, "--out", tmp_path]),
    ]
    for main, arguments in commands:
        assert str(tmp_path) in error_of(main, *arguments)


def test_only_regular_files_are_written(run, tmp_path):
    """A pipe is refused at once; a link stays, and the file that it points to is written."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    message = error_of(eval_main, run, "--export", pipe)
    assert f"{pipe}: " in message and "choose a different path" in message
    assert pipe.is_fifo()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "target.json")
    eval_main([str(run), "--export", str(link)])
    assert link.is_symlink()
    assert (tmp_path / "target.json").stat().st_size > 9


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Its name may be the longest possible, its permissions stay, no temporary file is left."""
    path = tmp_path / ("n" * 250 + ".json")
    check_writable(path)
    assert not path.exists()
    write_text(path, "one")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o664)
    with pytest.raises(ZeroDivisionError):
        with replace_file(path) as temporary:
            temporary.write_text("half of two")
            print(1 / 0)
    assert path.read_text() == "one"
    write_text(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o664

    def fail(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("os.replace", fail)  # as for a single file mounted into a container
    write_text(path, "three")
    assert path.read_text() == "three"
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, "plain"]


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    old = files.temporary_name(tmp_path / "last.pt")
    new = files.temporary_name(tmp_path / "last.pt")
    for file in (old, new, tmp_path / ".mine"):
        file.touch()
        os.utime(file, (0, 0))
    os.utime(new)  # its process may still write it
    files.remove_unfinished(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {new.name, ".mine"}


def test_results_are_printed_where_nothing_can_be_written(run, tmp_path, monkeypatch, capsys):
    """The files that are missing then are named; the command line has not asked for them."""
    metrics = run / "metrics.json"
    existed = metrics.exists()
    monkeypatch.setattr(files, "why_not_writable", lambda path: "Read-only file system")
    eval_main([str(run)])
    printed, notes = capsys.readouterr()
    assert "AP50" in printed
    assert f"{metrics} is not written (Read-only file system)" in notes
    assert metrics.exists() == existed

    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(reproduce, "RUNS", file / "runs")
    with pytest.raises(SystemExit, match="0"):
        reproduce.main(["tasks", "--no_run"])
    printed, notes = capsys.readouterr()
    assert "\n| AP (%) after epoch |" in printed
    assert "table.md and figures are not written" in notes


def test_validation_images_without_boxes(data, tmp_path):
    """They are no reason to stop a training, but an evaluation cannot report anything."""
    save_coco(data, NAMES, "val", annotations=[])
    train.main([*TINY, "--data", str(data), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run/best.pt").exists()
    assert "--export" in error_of(eval_main, tmp_path / "run")


def test_a_slash_at_the_end(tmp_path):
    flags = "--train 1 --val 1 --image_size 64".split()
    isaid.main(["scenes", f"{tmp_path}/data/", *flags])
    assert coco.find_split(tmp_path / "data", "train")


def test_metrics_survive_a_figure_that_fails(run, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("broken data stream")

    monkeypatch.setattr(Image.Image, "save", fail)
    eval_main([str(run), "--out", str(tmp_path / "out")])
    stderr = capsys.readouterr().err
    assert "detections.png" in stderr and "RuntimeError: broken data stream" in stderr
    assert read_json(tmp_path / "out/metrics.json")["images"] == 2


def test_predictions_survive_a_bad_image(run, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (80, 80)).save(images / "good.png")
    (images / "bad.png").write_bytes(b"nonsense")
    long_name = "n" * 251 + ".png"  # that of its picture would be too long
    shutil.copy(images / "good.png", images / long_name)
    message = error_of(predict.main, run, images, "--out", tmp_path / "out")
    assert "1 of 3 images" in message and "bad.png" in message
    content = read_json(tmp_path / "out/predictions.json")
    assert [image["file_name"] for image in content["images"]] == ["good.png", long_name]


def test_any_names_and_any_environment(tmp_path, data):
    """Class names and folders in Chinese, with a terminal that shows Western letters only.

    matplotlib is to use a backend that is not installed, as in the shell of a notebook, and the
    commands are started by their paths, from another folder.
    """
    for split in ("train", "val"):
        save_coco(data, NAMES, split, categories=[{"id": 1, "name": "汽车"}])
    moved = tmp_path / "数据 #1"
    shutil.move(data, moved)
    out = tmp_path / "跑"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "LC_ALL": "C"}
    environment.update({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    environment["MPLBACKEND"] = "no-such-backend"
    commands = [
        [ROOT / "train.py", *TINY, "--data", moved, "--out", out],
        [ROOT / "eval.py", out],
        [ROOT / "tools/predict.py", out, moved / "val/images", "--score", "0"],
    ]
    for command in commands:
        command = [sys.executable] + [str(word) for word in command]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert b"Glyph" not in done.stderr  # matplotlib's warning
    assert "汽车" in (out / "predictions/predictions.csv").read_text(encoding="utf-8")


def test_a_user_without_a_home(monkeypatch):
    """As in containers with a user id of their own: libraries get a temporary folder."""
    monkeypatch.setenv("HOME", "none")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    runpy.run_path(str(ROOT / "util/__init__.py"))
    assert Path(os.environ["HOME"]).is_dir()


def test_letters_are_drawn_or_replaced():
    """A class whose name has letters that the font may lack is drawn as its id."""
    font = ImageFont.load_default(12)
    for name in ("car", "Größe", "машина", "汽车", "\U000f0000"):
        text = plots.class_text({"name": name, "id": 7})
        assert text == name or (text == "class 7" and not name.isascii())
        masks = [bytes(font.getmask(letter)) for letter in set(text)]
        assert bytes(font.getmask("\U000f0001")) not in masks  # the box for a missing letter


# ---------------------------------------------------------------- training
def test_a_start_that_fails_leaves_nothing(data, tmp_path):
    """The same --out can be used again; a folder with anything else in it stays."""
    out = tmp_path / "run"
    command = [*TINY, "--data", data, "--out", out]
    (data / "train/images/2.png").write_bytes(b"nonsense")
    assert "2.png" in error_of(train.main, *command)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "2.png" in error_of(train.main, *command, "--resume")
    assert (out / "notes.txt").exists()


def test_a_loss_that_explodes_ends_the_run(tmp_path):
    flags = [*TINY, "--limit_train", "8", "--epochs", "30", "--lr", "10", "--lr_drop", "0"]
    message = error_of(train.main, *flags, "--clip_max_norm", 1000, "--out", tmp_path / "run")
    assert "--lr" in message
    assert "loss" in message


class Rotation(ssl_tasks.ClassTask):
    """A student's task with one of the mistakes that are tested below."""

    mistake = None

    def __init__(self, **config):
        num_outputs = 4
        if self.mistake == "target: class":
            num_outputs = 2
        super().__init__(num_outputs=num_outputs, **config)

    def permute(self, rng, patches, grid):
        if self.mistake == "permute":
            return patches, patches * 0
        return patches, patches

    def mask(self, rng, patches, grid):
        if self.mistake == "mask":
            return []
        return patches

    def target(self, images, corruption):
        target = torch.full_like(corruption.permutation, 3)
        if self.mistake == "target":
            return target
        return target.unflatten(1, corruption.grid)

    def patch_losses(self, prediction, target):
        losses, correct = super().patch_losses(prediction, target)
        if self.mistake == "patch_losses":
            losses = losses[:, :-1]
        return losses, correct


PRETRAIN = [*TINY, "--setting", "pretrain", "--ssl_task", "reconstruct"]


@pytest.mark.parametrize("mistake", ["permute", "mask", "target", "target: class", "patch_losses"])
def test_a_mistake_in_a_task_is_named_before_training(mistake, monkeypatch, tmp_path):
    monkeypatch.setitem(ssl_tasks.TASKS, "reconstruct", Rotation)
    monkeypatch.setattr(Rotation, "mistake", mistake)
    flags = ["--limit_train", "2", "--limit_val", "2", "--out", tmp_path / "run"]
    assert f"Rotation.{mistake}" in error_of(train.main, *PRETRAIN, *flags)
    assert not (tmp_path / "run").exists()


def test_a_new_task_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(ssl_tasks.TASKS, "reconstruct", Rotation)
    flags = ["--limit_train", "2", "--limit_val", "2", "--out", str(tmp_path / "run")]
    train.main([*PRETRAIN, *flags])


def test_a_task_without_its_methods_is_named(monkeypatch):
    monkeypatch.setitem(ssl_tasks.TASKS, "reconstruct", type("Empty", (ssl_tasks.Task,), {}))
    with pytest.raises(TypeError, match="Empty.*patch_losses.*predict.*target"):
        train.main(PRETRAIN)
