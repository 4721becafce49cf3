"""Patches from a raw release: against full masks, the devkit's counts, faults, interruptions."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

import isaid
from util import coco, isaid_prepare
from util.files import read_json

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT.parent / "shared/data/isaid_raw"
PACKED = isaid_prepare.pack(isaid_prepare.COLORS).tolist()
SMALL = "--patch 80 --overlap 20 --workers 1"
RAW, OUT = Path("raw/train/images"), Path("out/train")  # in the folder of a test


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw_raw(stem, height, width, n, seed=0):
    """An image of a raw release with n ellipses, some with holes, stray pixels, or two classes."""
    rng, (yy, xx) = np.random.default_rng(seed), np.ogrid[:height, :width]
    ids, kinds = np.zeros((2, height, width), np.int64)
    ids[-3:] = 77  # below 1000: no object
    for k, number in enumerate(rng.choice(2**24 - 2000, n, replace=False) + 1000):
        h, w = rng.integers(2, 30, 2)
        y, x = rng.integers((height - h, width - w))
        radius = ((yy - y + 0.5) / h - 0.5) ** 2 + ((xx - x + 0.5) / w - 0.5) ** 2
        shape = (radius <= 0.25) & ((radius > 0.04) | (k % 3 > 0))
        if k % 5 == 0:  # a stray part of one or two pixels, in a hole or elsewhere
            top, left = (y + h // 2, x + w // 2) if k % 2 else rng.integers((height - 3, width - 3))
            shape[top : top + 1 + k % 3 // 2, left] = True
        ids[shape], kinds[shape] = number, rng.choice(PACKED)
        if k % 7 == 0:
            kinds[shape & (xx == x)] = PACKED[14]
    RAW.mkdir(parents=True, exist_ok=True)
    files = {"": rng.integers(2**24, size=ids.shape)}
    files.update({"_instance_id_RGB": ids, "_instance_color_RGB": kinds})
    for suffix, x in files.items():
        pixels = np.stack([x & 255, x >> 8 & 255, x >> 16], -1).astype(np.uint8)
        Image.fromarray(pixels).save(RAW / f"{stem}{suffix}.png", compress_level=1)
    return ids, kinds


def by_full_masks(ids, kinds, window, devkit):
    """The objects of a window the plain way: a mask of the whole window for each of them."""
    y0, y1, x0, x1 = window
    ids, kinds = ids[y0:y1, x0:x1], kinds[y0:y1, x0:x1]
    found = []
    for number in np.unique(ids):
        mask = ids == number
        parts, _ = ndimage.label(ndimage.binary_fill_holes(mask), np.ones((3, 3)))
        tiny = np.bincount(parts.ravel())[1:].min() <= 2
        if number < 1000 or mask.sum() <= 10 or devkit and tiny:
            continue
        y, x = np.nonzero(mask)
        box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        rle["counts"] = rle["counts"].decode()
        kind = PACKED.index(kinds[mask].min()) + 1
        found.append({"category_id": kind, "segmentation": rle, "bbox": box})
        found[-1].update(area=mask.sum(), iscrowd=0)
    return sorted(found, key=lambda x: x["category_id"])  # stable: by id within a class


def prepare(flags):
    with pytest.raises(SystemExit) as stop:
        isaid.main(f"prepare {SMALL} {flags}".split())
    return stop.value.code


def annotations(split="train"):
    return read_json(coco.split_files("out", split)[1])


@pytest.mark.parametrize("flag", ["", "--devkit"])
def test_equals_full_masks(flag):
    """The devkit leaves P1527 out; hidden files are no images, nor folders that are called so."""
    sizes = {"P0002": (170, 210, 90), "P0010": (60, 200, 20), "P1527": (60, 70, 3)}
    truth = {stem: draw_raw(stem, *size) for stem, size in sizes.items()}
    (RAW / "._P0001.png").write_bytes(b"junk")
    (RAW / "P0003.png").mkdir()
    assert prepare(f"raw out {flag}") == 0
    names = [f"P0002_{y}_{y + 80}_{x}_{x + 80}.png" for y in (0, 60, 90) for x in (0, 60, 120, 130)]
    cut = [*(f"P0010_0_60_{x}_{x + 80}.png" for x in (0, 60, 120)), "P1527.png"]
    names += ["P0010.png"] if flag else cut
    expected, dropped = [], 0
    for i, name in enumerate(names):
        stem, *window = name.removesuffix(".png").split("_")
        y0, y1, x0, x1 = window = tuple(map(int, window)) or (0, 60, 0, 200)
        objects = by_full_masks(*truth[stem], window, flag)
        dropped += len(by_full_masks(*truth[stem], window, "")) - len(objects)
        expected += [{"image_id": i, **found} for found in objects]
        patch, whole = map(Image.open, (OUT / "images" / name, RAW / f"{stem}.png"))
        np.testing.assert_array_equal(patch, np.asarray(whole)[y0:y1, x0:x1])
    found = annotations()
    assert [(x["id"], x["file_name"]) for x in found["images"]] == list(enumerate(names))
    assert found["annotations"] == [{"id": k, **x} for k, x in enumerate(expected, 1)]
    assert (dropped > 0) == bool(flag)
    assert isaid.check(*coco.split_files("out", "train"))[1] is not None


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="real raw samples are not part of the project")
def test_golden_counts():
    """What the devkit makes of P0003 and P0004."""
    assert prepare(f"{SAMPLES} out --devkit --patch 800 --overlap 200") == 0
    val, test = annotations("val"), annotations("test")
    counts = np.bincount([a["image_id"] for a in val["annotations"]])
    assert counts.tolist() == [35, 27, 45, 32, 73, 75, 57, 57, 52, 52]
    assert val["images"][0]["file_name"] == "P0003_0_800_0_800.png"
    first = val["annotations"][0]
    assert (first["category_id"], first["area"], first["bbox"]) == (2, 403, [464, 653, 24, 22])
    assert test["images"] and not test["annotations"] and len(test["categories"]) == 15


def test_interrupted_and_called_again():
    """Killed in the middle, its workers end; continued, it writes the same bytes as at once."""
    for i in range(8):
        draw_raw(f"P{i:04d}", 300, 300, 40, seed=i)
    command = [sys.executable, ROOT / "isaid.py", *f"prepare raw out {SMALL}".split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(list(OUT.glob("parts/*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # returns when no worker holds the pipe any longer
    assert not coco.split_files("out", "train")[1].exists()
    finished = {path: path.stat().st_mtime_ns for path in OUT.glob("images/P0000_*.png")}
    assert "was prepared with devkit False, not True" in prepare("raw out --devkit")
    assert prepare("raw out") == prepare("raw once --workers 2") == 0
    names = [path.relative_to("once") for path in Path("once").rglob("*") if path.is_file()]
    assert len(names) == 8 * 25 + 2 and not (OUT / "parts").exists()
    for name in names:
        assert ("out" / name).read_bytes() == ("once" / name).read_bytes()
    assert finished and all(path.stat().st_mtime_ns == before for path, before in finished.items())
    (OUT / "prepare.json").unlink()
    assert "was not made by this command" in prepare("raw out")


@pytest.mark.parametrize("module, name", [(shutil, "rmtree"), (os, "replace")])
def test_stopped_while_the_parts_are_put_together(module, name, monkeypatch):
    """After and before the annotation file is there: calling again finishes, and then finds it."""
    draw_raw("P0001", 100, 100, 10)
    original, target = getattr(module, name), coco.split_files("out", "train")[1]

    def stop(*paths):
        if name == "rmtree" or os.path.realpath(paths[-1]) == os.path.realpath(target):
            raise KeyboardInterrupt
        original(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        assert prepare("raw out") == 130
    assert target.exists() == (name == "rmtree") and (OUT / "parts").is_dir()
    for _ in range(2):
        assert prepare("raw out") == 0
        assert target.exists() and not (OUT / "parts").exists()


def test_faults_are_named(capsys):
    """A bad image does not stop the others; without the bad ones the split is finished."""
    for i in range(1, 6):
        draw_raw(f"P000{i}", 100, 100, 10)
    (RAW / "P0002_instance_id_RGB.png").unlink()
    mask = Image.open(RAW / "P0003_instance_color_RGB.png")
    mask.putpixel((9, 7), (1, 2, 3))
    mask.save(mask.filename)
    os.truncate(RAW / "P0004.png", 9999)
    Image.new("RGB", (90, 100)).save(RAW / "P0005_instance_id_RGB.png")
    assert prepare("raw out") == 1
    problems = capsys.readouterr().err
    for text in (
        "P0002_instance_id_RGB.png: is missing",
        "P0003_instance_color_RGB.png: the colour (1, 2, 3) at x 9, y 7 is of no class",
        "P0004.png: is not an image that can be read, or it is damaged",
        "P0005_instance_id_RGB.png should have 100 x 100 pixels, the file has 90 x 100",
        "error: 4 images of train are bad; mend or remove them",
    ):
        assert text in problems
    assert not coco.split_files("out", "train")[1].exists()
    for i in range(2, 6):
        (RAW / f"P000{i}.png").unlink()
    assert prepare("raw out") == 0
    names = {image["file_name"] for image in annotations()["images"]}
    assert names == {path.name for path in OUT.glob("images/P0001_*.png")}  # kept
    assert len(names) == 4


MISTAKES = """none out | none: has no train/images
raw out --splits test | raw/test/images: holds no images
raw out --overlap 80 | --overlap 80 must be smaller than --patch 80
raw raw | is where the images come from
raw raw/train/images/P0001.png | P0001.png/train/images: Not a directory; name another"""


@pytest.mark.parametrize("line", MISTAKES.splitlines())
def test_mistakes_get_one_line(line):
    draw_raw("P0001", 30, 30, 2)
    flags, message = line.split(" | ")
    assert message in prepare(flags)
