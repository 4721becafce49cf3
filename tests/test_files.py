"""Files and commands as people have them: each is taken as it was meant, or refused in one line."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import detr
import isaid
import reproduce
import ssl_tasks
import train
from eval import main as eval_main
from tools import predict
from util import cli, coco, dataset_check, isaid_prepare, plots
from util.files import DataError
from util.images import read_image, read_size
from util.weights import init_from_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--image_size 64 --epochs 1 --batch_size 2 --num_queries 5 --hidden_dim 32 --nheads 2 "
    "--enc_layers 1 --dec_layers 1 --dim_feedforward 32"
).split()
BOX = (8, 12, 20, 30)  # x, y, width, height of the white object in every image


def picture(width=48, height=64):
    image = np.zeros((height, width, 3), np.uint8)
    image[BOX[1] : BOX[1] + BOX[3], BOX[0] : BOX[0] + BOX[2]] = 255
    return Image.fromarray(image)


def save_coco(root, names, split="train", **changes):
    """An annotation file in the patches layout, of images of 48 x 64 pixels with one car each."""
    images, path = coco.split_files(root, split)
    images.mkdir(parents=True, exist_ok=True)
    entries = [{"id": i, "file_name": x, "width": 48, "height": 64} for i, x in enumerate(names)]
    content = {"images": entries, "categories": [{"id": 1, "name": "car"}]}
    content["annotations"] = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": list(BOX)}
                              for i in range(len(names))]  # fmt: skip
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return images


@pytest.fixture
def data(tmp_path):
    """A dataset of four images each to train on and held out."""
    for split in ("train", "val"):
        images = save_coco(tmp_path / "data", [f"{i}.png" for i in range(4)], split)
        for i in range(4):
            picture().save(images / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch on scenes."""
    out = tmp_path_factory.mktemp("files") / "run"
    train.main([*TINY, "--limit_train", "2", "--limit_val", "2", "--out", str(out)])
    return out


def error_of(main, *arguments):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main([str(x) for x in arguments])
    assert end.value.code not in (0, None)
    return str(end.value.code)


# ---------------------------------------------------------------- images
TURNS = [None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90",
         "TRANSVERSE", "ROTATE_270"]  # fmt: skip  # from the scene to what a camera stores


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_turned_as_they_are_displayed(tmp_path, suffix, turn):
    stored, exif = picture(), Image.Exif()
    if turn > 1:
        stored = stored.transpose(getattr(Image.Transpose, TURNS[turn]))
    exif[0x0112] = turn
    images = save_coco(tmp_path, [f"a.{suffix}"])
    stored.resize([8 * side for side in stored.size]).save(images / f"a.{suffix}", exif=exif)
    for at_least in (None, 60):  # JPEG is decoded at an eighth of its size then
        image, size = read_image(images / f"a.{suffix}", at_least)
        assert size == read_size(images / f"a.{suffix}") == (8 * 48, 8 * 64)
        small = np.asarray(image.convert("L").resize((48, 64))).astype(float)
        assert np.abs(small - np.asarray(picture().convert("L"))).mean() < 8


def png(depth, colour, rows):
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 4, 4, depth, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def tiff(bits, bands, extra=None):
    """An uncompressed 4 x 4 TIFF whose bands hold 100, 110, 120 …"""
    pixels = np.tile(np.arange(100, 100 + 10 * bands, 10), 16).astype(f"<u{bits // 8}").tobytes()
    tags = [(256, 4), (257, 4), (258, bits), (259, 1), (262, 2), (273, 8), (277, bands),
            (278, 4), (279, len(pixels))]  # fmt: skip
    tags += [(338, extra)] if extra is not None else []
    after = 8 + len(pixels) + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, value in tags:
        count = bands if tag == 258 else 1
        inside = struct.pack("<HH", value, 0) if count == 1 else struct.pack("<I", after)
        entries += struct.pack("<HHI", tag, 3, count) + inside
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4) + struct.pack("<H", bits) * bands
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + ifd


def deep_files(folder):
    """Files of more than 8 bits a channel; converting them would be silently wrong."""
    sixteen = struct.pack(">12H", *[1000] * 12)
    (folder / "rgb.png").write_bytes(png(16, 2, [sixteen] * 4))
    (folder / "grey.png").write_bytes(png(16, 0, [sixteen[:8]] * 4))
    (folder / "alpha.png").write_bytes(png(16, 6, [sixteen + sixteen[:8]] * 4))
    (folder / "rgb.tif").write_bytes(tiff(16, 3))
    (folder / "rgba.tif").write_bytes(tiff(16, 4, 2))
    (folder / "rgb.ppm").write_bytes(b"P6\n4 4\n65535\n" + sixteen * 4)
    sgi = struct.pack(">HBBHHHHll", 474, 0, 2, 3, 4, 4, 3, 0, 65535).ljust(512, b"\0")
    (folder / "rgb.sgi").write_bytes(sgi + sixteen * 4)
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(folder / "float.tif")
    Image.new("RGB", (4, 4)).save(folder / "rgb.jp2")
    content = (folder / "rgb.jp2").read_bytes()
    place = content.index(b"\xff\x4f\xff\x51") + 4 + 38
    (folder / "rgb.jp2").write_bytes(content[:place] + b"\x0f" + content[place + 1 :])


def test_more_than_8_bits_are_refused(tmp_path):
    deep_files(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9
    for path in files:
        with pytest.raises(DataError, match="more than 8 bits") as error:
            read_image(path)
        assert str(error.value).startswith(f"{path}: ")


def test_bands_beyond_three_change_no_colour(tmp_path):
    """A fourth band, transparency and palettes: the colours are those that are stored."""
    kinds = {(3, None): "rgb", (4, None): "four", (4, 0): "unspecified", (4, 2): "alpha"}
    for (bands, extra), name in kinds.items():
        (tmp_path / f"{name}.tif").write_bytes(tiff(8, bands, extra))
    whole = Image.new("RGB", (4, 4), (100, 110, 120))
    for mode in ("RGBA", "LA", "CMYK"):
        whole.convert(mode).save(tmp_path / f"{mode}.tif")
    clear = Image.merge("RGBA", [*whole.split(), Image.new("L", (4, 4), 7)])
    clear.save(tmp_path / "clear.png")
    clear.save(tmp_path / "clear.webp", lossless=True, exact=True)
    palette = whole.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png", transparency=bytes([0] * 256))
    whole.save(tmp_path / "rgb.bmp")
    for path in tmp_path.iterdir():
        image, size = read_image(path)
        expected = (109, 109, 109) if path.stem == "LA" else (100, 110, 120)
        assert image.mode == "RGB" and size == (4, 4)
        assert np.abs(np.subtract(image.getpixel((1, 2)), expected)).max() <= 1, path.name


def test_megabytes_of_text_are_no_fault(data, capsys):
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", "x" * 2**21, zip=True)
    picture().save(data / "train/images/0.png", pnginfo=note)
    assert isaid.check_dataset(data) == 0 and "errors   0" in capsys.readouterr().out


# ---------------------------------------------------------------- annotations
def test_negative_sides_are_turned_round(data):
    x, y, w, h = BOX
    boxes = [[x + w, y, -w, h], [x, y + h, w, -h], [x + w, y + h, -w, -h]]
    found = [{"image_id": i, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    save_coco(data, [f"{i}.png" for i in range(4)], annotations=found)
    loaded = isaid.load_coco(*coco.find_split(data, "train"), None)
    assert [boxes.tolist() for boxes in loaded.boxes] == [[list(BOX)]] * 3 + [[]]
    assert "3 boxes with negative sides, turned round" in dataset_check.summary(loaded, 9, 64)


def test_contents_are_compared(data, capsys):
    """What ids alone do not show is said by check and before training."""
    images = [{"id": i, "file_name": name, "width": 48, "height": 64}
              for i, name in enumerate(("0.png", "./0.png", "2.png", "3.png"))]  # fmt: skip
    images[2]["width"] = 1
    found = [{"id": i, "image_id": i // 2, "category_id": 1, "bbox": list(BOX)} for i in range(4)]
    found.append({"id": 9, "image_id": 3, "category_id": 2, "bbox": list(BOX)})
    classes = [{"id": i, "name": name} for i, name in enumerate(("bus", "car", "Car "))]
    for split in ("train", "val"):
        changes = {"images": images, "annotations": found, "categories": classes}
        picture(1, 64).save(save_coco(data, [], split, **changes) / "2.png")
    assert isaid.check_dataset(data) == 0
    said = capsys.readouterr().out
    seen = ["1 image files have several ids, the first is 0.png", "are called 'car'",
            "2 annotations are there already"]  # fmt: skip
    for text in (*seen, "under 2 pixels             1\n", "without boxes             bus\n"):
        assert said.count(text) == 2, text
    loaded = isaid.load_coco(*coco.find_split(data, "train"), None)
    summary = dataset_check.summary(loaded, 9, 64)
    assert all(text in summary for text in seen)


def test_corners_are_recognised(data, capsys):
    x, y, w, h = BOX
    corners = [{"image_id": i, "category_id": 1, "bbox": [x + w, y + h, 47, 63]} for i in range(4)]
    save_coco(data, [f"{i}.png" for i in range(4)], annotations=corners)
    isaid.check_dataset(data)
    assert capsys.readouterr().out.count("the boxes look like x0 y0 x1 y1") == 1  # not those of val


def test_names_from_other_machines(tmp_path):
    """Absolute and Windows paths, unicode, spaces and # in file_name."""
    names = ["/home/someone/data/0.png", "C:\\data\\1.png", "sub\\2.png", "図 #3.png"]
    images = save_coco(tmp_path, [*names, str(tmp_path / "4.PNG")])
    (images / "sub").mkdir()
    for path in ("0.png", "1.png", "sub/2.png", "図 #3.png"):
        picture().save(images / path)
    picture().save(tmp_path / "4.PNG")
    loaded = isaid.load_coco(*coco.find_split(tmp_path, "train"), isaid.make_transforms(False, 64))
    assert len([loaded[i] for i in range(5)]) == 5


def test_files_without_truth(data, run, tmp_path):
    """A file of test images has no annotations, and its categories may be empty or left out."""
    for n, categories in enumerate((isaid_prepare.CATEGORIES, [], None)):
        images = save_coco(data, ["0.png"], "test", annotations=None, categories=categories)
        picture().save(images / "0.png")
        out = tmp_path / f"{n}.json"
        eval_main([str(run), "--data", str(data), "--split", "test", "--export", str(out)])
        assert {r["image_id"] for r in json.loads(out.read_text(encoding="utf-8"))} == {0}


def test_annotations_in_any_unicode(data):
    path = coco.split_files(data, "train")[1]
    text = path.read_text(encoding="utf-8").replace("car", "größer")
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        path.write_text(text, encoding=encoding)
        assert coco.load_json(path)["categories"] == [{"id": 1, "name": "größer"}]
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="is not valid JSON, .* no UTF-8; save it as UTF-8"):
        coco.load_json(path)


def test_nothing_to_train_on(data, tmp_path, capsys):
    zero = [{"image_id": 0, "category_id": 1, "bbox": [1, 1, 0, 5]}]
    save_coco(data, [f"{i}.png" for i in range(4)], annotations=zero)
    said = error_of(train.main, *TINY, "--data", data, "--out", tmp_path / "out")
    assert "contains no boxes to train on; 1 boxes without area, removed" in said
    assert isaid.check_dataset(data) == 1
    assert capsys.readouterr().out.count("    contains no boxes to train on\n") == 1
    shutil.copytree(data / "val", data / "train", dirs_exist_ok=True)
    (data / "train/instancesonly_filtered_val.json").rename(coco.split_files(data, "train")[1])
    save_coco(data, [f"{i}.png" for i in range(4)], "val", annotations=[])
    assert isaid.check_dataset(data) == 0  # held-out images may have none
    save_coco(data, [])
    assert isaid.check_dataset(data) == 1 and "    contains no images\n" in capsys.readouterr().out
    said = error_of(train.main, *TINY, "--setting", "pretrain", "--ssl_ratio", 0.001)
    assert "patches" in said and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- folders
def test_what_systems_leave_behind_is_no_image(tmp_path):
    for name in ("a.PNG", "b/c.jpg", "ünï #1.png", "._a.png", ".ipynb_checkpoints/a.png",
                 "@eaDir/a.png/thumb.jpg", "__MACOSX/a.png", "folder.png/d.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name, format="PNG")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "b")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = [path.relative_to(tmp_path).as_posix() for path in coco.image_files(tmp_path)]
    assert sorted(found) in (["a.PNG", x, "folder.png/d.png", "ünï #1.png"]
                             for x in ("b/c.jpg", "elsewhere/c.jpg"))  # fmt: skip
    raw = tmp_path / "raw/val/images"
    raw.mkdir(parents=True)
    (raw / "P9.png").mkdir()
    for name in ("P2.png", "P10.PNG", "._P1.png", "P2_instance_id_RGB.png", "notes.txt"):
        picture().save(raw / name, format="PNG")
    assert [path.name for path in isaid_prepare.find_sources(raw, False, None)] == [
        "P2.png",
        "P10.PNG",
    ]


# ---------------------------------------------------------------- command lines
LINES = {
    "--data data#2": ["--data", "data#2"],
    "--data 'my data' --init \"a b\"  # it's a comment": ["--data", "my data", "--init", "a b"],
    "--lr 1  # first line of a file from Windows": ["--lr", "1"],
    "--data C:\\data  #x": ["--data", "C:\\data"],
    "# --epochs 3": [],
    "": [],
}


@pytest.mark.parametrize("line", LINES)
def test_lines_of_recipes_and_tables(tmp_path, line):
    assert cli.split_recipe_line(line) == LINES[line]
    bom = "\ufeff"
    (recipe := tmp_path / "recipe.txt").write_text(f"{bom}{line}\n--epochs 3\n", encoding="utf-8")
    expected = dict(zip(LINES[line][::2], LINES[line][1::2]))
    args, _ = train.parse([f"@{recipe}"])
    assert args.epochs == 3 and args.init == [[x, None] for x in expected.values() if x == "a b"]
    assert args.data == (os.path.abspath(expected["--data"]) if "--data" in expected else None)
    (table := tmp_path / "table.txt").write_text(f"{bom}row: {line}", encoding="utf-8")
    assert reproduce.read_table(table) == {"row": LINES[line]}


MISTAKES = [
    (train.main, ["--learning_rate", "1"], "did you mean --lr?"),
    (train.main, ["--epoch_s", "1"], "did you mean --epochs?"),
    (train.main, ["--epoch", "1"], "did you mean --epochs?"),  # no part of a name is one
    (train.main, ["recipes/detr.txt"], "did you mean @recipes/detr.txt?"),
    (train.main, ["--epochs", "2.5"], "expected is a whole number of at least 1, not '2.5'"),
    (train.main, ["--batch_size", "0"], "expected is a whole number of at least 1, not '0'"),
    (train.main, ["--lr", "0"], "expected is a number greater than 0, not '0'"),
    (train.main, ["--lr", "nan"], "expected is a number greater than 0, not 'nan'"),
    (train.main, ["--workers", "-1"], "a whole number of at least 0 and at most 256, not '-1'"),
    (train.main, ["--lr_drop", "x"], "a whole number of at least 0 or linear or cycle, not 'x'"),
    (train.main, ["--dropout", "2"], "expected is a number of at least 0 and at most 1, not '2'"),
    (train.main, ["--num_queries", str(2**32)], "least 1 and at most 10000, not '4294967296'"),
    (train.main, ["--enc_layers", "257"], "a whole number of at least 0 and at most 256, not"),
    (train.main, ["--limit_train", str(10**7)], "at most 1000000, not '10000000'"),
    (eval_main, ["RUN", "--max_dets", str(2**32)], "at most 10000, not '4294967296'"),
    (predict.main, ["RUN", "a.png", "--workers", "999"], "at most 256, not '999'"),
    (predict.main, ["RUN", "a.png", "--score", "0", "README.md"], "unknown: README.md (--help"),
    (isaid.main, ["scenes", "x", "--val", str(10**7)], "at most 1000000, not '10000000'"),
    (reproduce.main, ["tasks", "--jobs", str(2**32)], "at most 256, not '4294967296'"),
    (train.main, ["--data", ""], "--data is empty"),
    (train.main, ["--init", ""], "--init is empty"),
    (train.main, ["--init="], "--init is empty"),
    (train.main, ["--out", ""], "--out is empty"),
    (train.main, ["--tokenizer_weights", ""], "--tokenizer_weights is empty"),
    (eval_main, [""], "an argument is empty"),
    (eval_main, ["RUN", "--data", ""], "--data is empty"),
    (eval_main, ["RUN", "--export", ""], "--export is empty"),
    (eval_main, ["RUN", "--limit_vla", "1"], "did you mean --limit_val?"),
    (predict.main, ["RUN", ""], "an argument is empty"),
    (predict.main, ["RUN", ".", "--out", ""], "--out is empty"),
    (isaid.main, ["check", ""], "an argument is empty"),
    (isaid.main, ["prepare", "", "x"], "an argument is empty"),
    (isaid.main, ["prepare", "x", "y", "--overlaps", "1"], "did you mean --overlap?"),
    (isaid.main, ["scenes", ""], "an argument is empty"),
    (reproduce.main, [""], "an argument is empty"),
    (reproduce.main, ["t", "--rows", ""], "--rows is empty"),
]


@pytest.mark.parametrize("main, arguments, message", MISTAKES)
def test_mistakes_are_answered_at_once(main, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


FLAGS_IN_FILES = [  # contents, and what is wrong with them
    (b"--lr 1 \\\r\n--epochs 2", r"leave out \ at the end of a line"),
    ("--lr 1".encode("utf-16"), "byte 0 is no UTF-8; save it as UTF-8"),
    ("--lr 1 # größer".encode("latin-1"), "byte 11 is no UTF-8; save it as UTF-8"),
]


@pytest.mark.parametrize("content, message", FLAGS_IN_FILES)
def test_files_of_flags_from_windows(tmp_path, capsys, content, message):
    (tmp_path / "flags.txt").write_bytes(content)
    assert error_of(train.main, f"@{tmp_path}/flags.txt") == "2"
    assert message in capsys.readouterr().err
    (tmp_path / "table.txt").write_bytes(b"row: " + content if b"\\" in content else content)
    assert message in error_of(reproduce.main, tmp_path / "table.txt", "--dry_run")


def test_names_that_no_file_can_have(run, tmp_path):
    """A name that is too long, or a file where a folder should be: what to do is said."""
    (wall := tmp_path / "wall").write_text("a file")
    for name in (wall, tmp_path / ("x" * 300)):
        image = run / "detections.png"
        for main, arguments in (
            (train.main, [*TINY, "--out", name]),
            (train.main, [*TINY, "--out", name, "--resume"]),
            (eval_main, [run, "--out", name]),
            (predict.main, [run, image, "--out", name]),
            (reproduce.main, ["tasks", "--no_run", "--out", name]),
            (isaid.main, ["scenes", name / "x"]),
        ):
            said = error_of(main, *arguments)
            assert str(name) in said and "name a" in said, said
            assert "Errno" not in said and "--resume" not in said


def test_a_pipe_that_closes_is_no_error():
    """The rest of a long output is dropped without a word, with the status of SIGPIPE."""
    code = "from util import cli; cli.command(lambda _: print('x\\n' * 10**6))()"
    line = f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["x", "141"] and not done.stderr


# ---------------------------------------------------------------- weights
def test_wrapped_checkpoints(tmp_path):
    """As parallel training, Lightning and averaging leave them, or without the class heads."""
    options = {"backbone": "resnet18", "hidden_dim": 32, "nheads": 2, "enc_layers": 1,
               "dec_layers": 1, "dim_feedforward": 32, "num_queries": 5}  # fmt: skip
    source, start = (
        detr.build_detector("detr", 3, **options),
        detr.build_detector("detr", 3, **options),
    )
    state, fresh = source.state_dict(), start.state_dict()
    heads = [name for name in state if "class_embed" in name]
    wraps = {
        "ddp": {"model": {f"module.{k}": x for k, x in state.items()}},
        "lightning": {
            "state_dict": {"criterion.w": torch.ones(1)}
            | {f"model.{k}": x for k, x in state.items()}
        },
        "ema": {"ema": {"module": state}, "epoch": 3},
        "compiled": {f"_orig_mod.{k}": x for k, x in state.items()},
        "headless": {"model": {k: x for k, x in state.items() if k not in heads}},
    }
    for name, content in wraps.items():
        torch.save(content, tmp_path / name)
        start.load_state_dict(fresh)
        _, anew = init_from_checkpoint(start, tmp_path / name)
        assert anew == (heads if name == "headless" else [])
        for key, value in start.state_dict().items():
            assert torch.equal(value, (fresh if key in anew else state)[key]), (name, key)
    torch.save(
        {"model": {f"x{k}" if "input_proj" in k else k: x for k, x in state.items()}},
        tmp_path / "x",
    )
    with pytest.raises(ValueError, match="missing input_proj.*unexpected xinput_proj"):
        init_from_checkpoint(start, tmp_path / "x")


CHANGES = [  # of what a checkpoint says of its run
    ("args", None, "is not a checkpoint of train.py, which has 'args'"),
    ("detector", [], "is not a checkpoint of train.py, which has 'detector'"),
    ("window", ..., "is not a checkpoint of train.py, which has 'window'"),
    ("window", "64", "'window' is '64', not the side of its images in pixels"),
    ("window", 0, "'window' is 0, not the side"),
    ("categories", "cars", "has no list 'categories'"),
    ("categories", [{"id": 1, "name": 5}], "entry 0 of 'categories' has name 5, which is not text"),
    ("categories", [{"id": 1, "name": "car"}], "are more or fewer than its detector has classes"),
    ("args/image_size", ..., "its 'args' have no usable 'image_size', but None"),
    ("args/image_size", -1, "no usable 'image_size', but -1"),
    ("args/batch_size", None, "no usable 'batch_size', but None"),
    ("args/seed", "x", "no usable 'seed', but 'x'"),
]


@pytest.mark.parametrize("place, value, message", CHANGES)
def test_checkpoints_that_say_odd_things(run, tmp_path, place, value, message):
    state = torch.load(run / "best.pt")
    *holders, key = place.split("/")
    holder = state[holders[0]] if holders else state
    holder[key] = value
    if value is ...:
        del holder[key]
    torch.save(state, path := tmp_path / "odd.pt")
    for main, more in ((eval_main, []), (predict.main, [run / "detections.png"])):
        said = error_of(main, path, *more)
        assert said.startswith(f"error: {path}: ") and message in said and "--init" in said


def test_weights_that_are_not_finite(run, tmp_path):
    """They are refused when they are loaded, not laid to the learning rate."""
    state = torch.load(run / "best.pt")
    for value in (torch.nan, torch.inf):
        state["model"]["class_embed.0.bias"][0] = value
        torch.save(state, path := tmp_path / "bad.pt")
        said = error_of(train.main, *TINY, "--init", path, "--out", tmp_path / "out")
        assert f"{path}: 1 of these" in said and "the first is class_embed.0.bias" in said
    train.main([*TINY, "--init", str(path), "--init_parts", "backbone", "--limit_train", "2",
                "--limit_val", "1", "--out", str(tmp_path / "out")])  # fmt: skip


# ---------------------------------------------------------------- outputs
def test_outputs_are_tried_first(run, tmp_path, monkeypatch):
    """Where nothing can be written, it is said before anything is computed."""
    (wall := tmp_path / "file").write_text("not a folder")
    never = pytest.fail
    monkeypatch.setattr("eval.evaluate", lambda *_: never("computed first"))
    monkeypatch.setattr(predict, "detect_in_windows", lambda *_, **__: never("computed first"))
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    (tmp_path / "predictions.json").mkdir()
    for main, arguments in (
        (eval_main, [run, "--out", wall / "x"]),
        (eval_main, [run, "--export", wall / "x.json"]),
        (eval_main, [run, "--export", tmp_path]),
        (predict.main, [run, tmp_path / "a.png", "--out", wall / "x"]),
        (predict.main, [run, tmp_path / "a.png", "--out", tmp_path]),
    ):
        assert str(tmp_path) in error_of(main, *arguments)


def test_what_is_no_ordinary_file_stays(run, tmp_path):
    """A pipe is refused at once, a link is followed."""
    os.mkfifo(tmp_path / "pipe")
    said = error_of(eval_main, run, "--export", tmp_path / "pipe")
    assert "pipe: cannot be written, it is no ordinary file" in said
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    eval_main([str(run), "--export", str(tmp_path / "link.json")])
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").stat().st_size > 9


def test_held_out_images_without_boxes(data, tmp_path):
    """They are no reason to stop training; an evaluation alone has nothing to say of them."""
    save_coco(data, [f"{i}.png" for i in range(4)], "val", annotations=[])
    train.main([*TINY, "--data", str(data), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run/best.pt").exists()
    assert "nothing to compare with; add --export" in error_of(eval_main, tmp_path / "run")


def test_a_slash_at_the_end(tmp_path):
    isaid.main(["scenes", f"{tmp_path}/data/", *"--train 1 --val 1 --image_size 64".split()])
    assert coco.find_split(tmp_path / "data", "train")


def test_a_failed_picture_costs_no_figures(run, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("broken data stream")

    monkeypatch.setattr(Image.Image, "save", fail)
    eval_main([str(run), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "detections.png: is not drawn (RuntimeError: broken data stream)" in said
    assert json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))["images"] == 2


def test_a_bad_image_costs_no_results(run, tmp_path, capsys):
    (images := tmp_path / "images").mkdir()
    Image.new("RGB", (80, 80)).save(images / "good.png")
    (images / "bad.png").write_bytes(b"nonsense")
    assert "1 of 2 images" in error_of(predict.main, run, images, "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out/predictions.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in content["images"]] == ["good.png"]


def test_names_in_any_script_and_any_terminal(tmp_path, data):
    """Class names and folders in Chinese, with a terminal that knows Western letters only."""
    for split in ("train", "val"):
        names = [{"id": 1, "name": "汽车"}]
        save_coco(data, [f"{i}.png" for i in range(4)], split, categories=names)
    shutil.move(data, there := tmp_path / "数据 #1")
    out, environment = tmp_path / "跑", {**os.environ, "PYTHONIOENCODING": "cp1252", "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (["train.py", *TINY, "--data", there, "--out", out], ["eval.py", out],
                    ["-m", "tools.predict", out, there / "val/images", "--score", "0"]):  # fmt: skip
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b"Glyph" not in done.stderr
    assert "汽车" in (out / "predictions/predictions.csv").read_text(encoding="utf-8")


def test_letters_are_drawn_or_replaced():
    """Each text is drawn with a font that has its letters, or else the class's id is."""
    for name in ("car", "Größe", "машина", "汽车", "\U000f0000"):
        font, text = plots.legible(name, "7", 12)
        assert text in (name, "7") and (text == name or not name.isascii())
        masks = [bytes(font.getmask(letter)) for letter in set(text)]
        assert bytes(font.getmask("\U000f0001")) not in masks  # the box for what a font lacks


# ---------------------------------------------------------------- training that is of no use
def test_a_start_that_fails_leaves_nothing(data, tmp_path):
    """The same --out is free again; a folder with anything else in it stays."""
    command = [*TINY, "--data", data, "--out", tmp_path / "run"]
    (data / "train/images/2.png").write_bytes(b"nonsense")
    for there in (False, True):
        assert "2.png" in error_of(train.main, *command, *["--resume"] * there)
        assert (tmp_path / "run").exists() == there
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/notes.txt").write_text("mine")


def test_a_loss_that_explodes_ends_the_run(tmp_path):
    flags = [*TINY, "--limit_train", "8", "--epochs", "30", "--lr", "10", "--lr_drop", "0"]
    said = error_of(train.main, *flags, "--clip_max_norm", 1000, "--out", tmp_path / "run")
    assert "the loss grew from" in said and "lower --lr" in said


class Rotation(ssl_tasks.ClassTask):
    """A student's task with the mistakes of the table below."""

    fault = None

    def __init__(self, **config):
        super().__init__(num_outputs=2 if self.fault == "target: class" else 4, **config)

    def permute(self, rng, patches, grid):
        return patches, patches * 0 if self.fault == "permute" else patches

    def mask(self, rng, patches, grid):
        return [] if self.fault == "mask" else patches

    def target(self, images, corruption):
        target = torch.full_like(corruption.permutation, 3)
        return target if self.fault == "target" else target.unflatten(1, corruption.grid)

    def patch_losses(self, prediction, target):
        losses, correct = super().patch_losses(prediction, target)
        return (losses[:, :-1] if self.fault == "patch_losses" else losses), correct


@pytest.mark.parametrize(
    "fault", [None, "permute", "mask", "target", "target: class", "patch_losses"]
)
def test_a_task_that_does_not_fit_is_named_before_training(fault, monkeypatch, tmp_path):
    monkeypatch.setitem(ssl_tasks.TASKS, "reconstruct", Rotation)
    monkeypatch.setattr(Rotation, "fault", fault)
    command = [*TINY, "--setting", "pretrain", "--ssl_task", "reconstruct", "--limit_train", "2"]
    command += ["--limit_val", "2", "--out", str(tmp_path / "run")]
    if not fault:
        return train.main(command)
    assert f"Rotation.{fault}" in error_of(train.main, *command)
    assert not (tmp_path / "run").exists()


def test_a_task_without_its_methods_is_named(monkeypatch):
    monkeypatch.setitem(ssl_tasks.TASKS, "reconstruct", type("Empty", (ssl_tasks.Task,), {}))
    flags = [*TINY, "--setting", "pretrain", "--ssl_task", "reconstruct"]
    with pytest.raises(TypeError, match="Empty.* patch_losses.* predict.* target"):
        train.main([str(flag) for flag in flags])
