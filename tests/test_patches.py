"""Patches from a raw release: against full masks, the devkit's counts, faults, interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

import coco as files
import isaid
import patches

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT.parent / "shared/data/isaid_raw"
SMALL = ["--patch", "80", "--overlap", "20", "--workers", "1"]


def unpack(packed):
    return np.stack([packed & 255, packed >> 8 & 255, packed >> 16], -1).astype(np.uint8)


def draw_raw(folder, stem, height, width, n, seed=0, size=(2, 30)):
    """An image of a raw release with n ellipses, some with holes, stray pixels, or two classes."""
    rng = np.random.default_rng(seed)
    ids, kinds = np.zeros((height, width), np.int64), np.zeros((height, width), np.int64)
    ids[-3:] = 77  # below 1000: no object
    numbers = rng.choice(2**24 - 2000, n, replace=False) + 1000
    for k, number in enumerate(numbers):
        h, w = rng.integers(*size, 2)
        y, x = rng.integers(0, height - h), rng.integers(0, width - w)
        yy, xx = np.ogrid[:h, :w]
        shape = ((yy + 0.5) / h - 0.5) ** 2 + ((xx + 0.5) / w - 0.5) ** 2 <= 0.25
        if k % 3 == 0:
            shape &= ~(((yy + 0.5) / h - 0.5) ** 2 + ((xx + 0.5) / w - 0.5) ** 2 <= 0.04)
        colour = patches.pack(patches.COLOURS[rng.integers(15)])
        ids[y : y + h, x : x + w][shape] = number
        kinds[y : y + h, x : x + w][shape] = colour
        if k % 5 == 0:  # a stray part of one or two pixels, in a hole or elsewhere
            top, left = rng.integers(height - 3), rng.integers(width - 3)
            top, left = (y + h // 2, x + w // 2) if k % 2 else (top, left)
            here = slice(top, top + 1 + k % 3 // 2), left
            ids[here], kinds[here] = number, colour
        if k % 7 == 0:
            kinds[y : y + h, x : x + w][shape & (xx < 1)] = patches.pack(patches.COLOURS[14])
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(folder / f"{stem}.png", compress_level=0)
    Image.fromarray(unpack(ids)).save(folder / f"{stem}_instance_id_RGB.png")
    Image.fromarray(unpack(kinds)).save(folder / f"{stem}_instance_color_RGB.png")
    return ids, kinds


def by_full_masks(ids, kinds, window, devkit):
    """The objects of a window the plain way: a mask of the whole window for each of them."""
    y0, y1, x0, x1 = window
    ids, kinds = ids[y0:y1, x0:x1], kinds[y0:y1, x0:x1]
    colours = {patches.pack(colour): i + 1 for i, colour in enumerate(patches.COLOURS)}
    found = []
    for number in np.unique(ids):
        mask = ids == number
        if number < 1000 or mask.sum() <= 10:
            continue
        parts, _ = ndimage.label(ndimage.binary_fill_holes(mask), np.ones((3, 3)))
        if devkit and np.bincount(parts.ravel())[1:].min() <= 2:
            continue
        y, x = np.nonzero(mask)
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        shape = {"size": list(mask.shape), "counts": rle["counts"].decode()}
        box = [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
        found.append({"category_id": colours[kinds[mask].min()], "segmentation": shape})
        found[-1].update(area=int(mask.sum()), iscrowd=0, bbox=box)
    return sorted(
        found, key=lambda annotation: annotation["category_id"]
    )  # stable: by id within a class


def prepare(*arguments):
    with pytest.raises(SystemExit) as stop:
        isaid.main(["prepare", *map(str, arguments)])
    return stop.value.code


def without(annotation, *names):
    return {name: value for name, value in annotation.items() if name not in names}


@pytest.mark.parametrize("devkit", [False, True])
def test_equals_full_masks(tmp_path, devkit):
    folder = tmp_path / "raw/train/images"
    truth = draw_raw(folder, "P0002", 170, 210, 90), draw_raw(folder, "P0010", 60, 200, 20, 1)
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL, *["--devkit"] * devkit) == 0
    coco = json.loads((tmp_path / "out/train/instancesonly_filtered_train.json").read_text())
    names = [f"P0002_{y}_{y + 80}_{x}_{x + 80}.png" for y in (0, 60, 90) for x in (0, 60, 120, 130)]
    long = [f"P0010_0_60_{x}_{x + 80}.png" for x in (0, 60, 120)]
    long = ["P0010.png"] if devkit else long
    assert [image["file_name"] for image in coco["images"]] == names + long
    assert [image["id"] for image in coco["images"]] == list(range(len(names + long)))
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    dropped = 0
    for image in coco["images"]:
        stem, *window = image["file_name"].removesuffix(".png").split("_")
        ids, kinds = truth[stem == "P0010"]
        window = tuple(map(int, window)) or (0, 60, 0, 200)
        expected = by_full_masks(ids, kinds, window, devkit)
        dropped += len(by_full_masks(ids, kinds, window, False)) - len(expected)
        mine = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert [without(a, "id", "image_id") for a in mine] == expected
        whole = np.asarray(Image.open(tmp_path / f"raw/train/images/{stem}.png"))
        y0, y1, x0, x1 = window
        patch = np.asarray(Image.open(tmp_path / "out/train/images" / image["file_name"]))
        np.testing.assert_array_equal(patch, whole[y0:y1, x0:x1])
    assert (dropped > 0) == devkit
    assert isaid.check(*files.split_files(tmp_path / "out", "train"))[1] is not None


@pytest.mark.skipif(not RAW.is_dir(), reason="real raw samples are not part of the project")
def test_golden_counts(tmp_path):
    """What the devkit makes of P0003 and P0004."""
    assert prepare(RAW, tmp_path, "--devkit", "--workers", 1) == 0
    coco = json.loads((tmp_path / "val/instancesonly_filtered_val.json").read_text())
    counts = np.bincount([a["image_id"] for a in coco["annotations"]])
    assert counts.tolist() == [35, 27, 45, 32, 73, 75, 57, 57, 52, 52]
    assert coco["images"][0]["file_name"] == "P0003_0_800_0_800.png"
    first = coco["annotations"][0]
    assert (first["category_id"], first["area"], first["bbox"]) == (2, 403, [464, 653, 24, 22])
    test = json.loads((tmp_path / "test/instancesonly_filtered_test.json").read_text())
    assert test["images"] and not test["annotations"] and len(test["categories"]) == 15


def test_left_out_images(tmp_path):
    for stem in ("P1526", "P1527"):
        draw_raw(tmp_path / "raw/val/images", stem, 30, 30, 3)
    for flags, stems in ((["--devkit"], ["P1526.png"]), ([], ["P1526.png", "P1527.png"])):
        assert prepare(tmp_path / "raw", tmp_path / f"out{len(flags)}", *SMALL, *flags) == 0
        coco = COCO(tmp_path / f"out{len(flags)}/val/instancesonly_filtered_val.json")
        assert [image["file_name"] for image in coco.dataset["images"]] == stems


def test_interrupted_and_called_again(tmp_path):
    """Killed in the middle, continued: the same bytes as at once."""
    for i in range(12):
        draw_raw(tmp_path / "raw/train/images", f"P{i:04d}", 300, 300, 40, seed=i)
    flags = "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), *SMALL
    command = [sys.executable, "isaid.py", *flags]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out/train/parts"
    while len(list(parts.glob("*.json")) if parts.is_dir() else []) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/train/instancesonly_filtered_train.json").exists()
    images = (tmp_path / "out/train/images").glob("P0000_*.png")
    finished = {path: path.stat().st_mtime_ns for path in images}
    again = prepare(tmp_path / "raw", tmp_path / "out", *SMALL, "--devkit")
    assert "was prepared with devkit False, not True" in again
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 0
    assert prepare(tmp_path / "raw", tmp_path / "once", *SMALL[:-1], 2) == 0
    once = [path for path in (tmp_path / "once").rglob("*") if path.is_file()]
    names = sorted(path.relative_to(tmp_path / "once") for path in once)
    assert len(names) == 12 * 25 + 2 and not list((tmp_path / "out").rglob("parts"))
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert finished and all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 0  # nothing left to do
    again = prepare(tmp_path / "raw", tmp_path / "out", *SMALL, "--limit", 1)
    assert "was prepared with limit None, not 1" in again


def test_faults_are_named(tmp_path, capsys):
    folder = tmp_path / "raw/train/images"
    for stem in ("P0001", "P0002", "P0003", "P0004", "P0005"):
        draw_raw(folder, stem, 100, 100, 10)
    (folder / "P0002_instance_id_RGB.png").unlink()
    mask = np.asarray(Image.open(folder / "P0003_instance_color_RGB.png")).copy()
    mask[7, 9] = 1, 2, 3
    Image.fromarray(mask).save(folder / "P0003_instance_color_RGB.png")
    whole = (folder / "P0004.png").read_bytes()
    (folder / "P0004.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (90, 100)).save(folder / "P0005_instance_id_RGB.png")
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 1
    problems = capsys.readouterr().err
    for text in (
        "P0002_instance_id_RGB.png: is missing",
        "P0003_instance_color_RGB.png: the colour (1, 2, 3) at x 9, y 7 is of no class",
        "P0004.png: is damaged",
        "P0005_instance_id_RGB.png: has 90 x 100 pixels, its image 100 x 100",
        "error: 4 images",
    ):
        assert text in problems
    assert not (tmp_path / "out/train/instancesonly_filtered_train.json").exists()
    assert len(list((tmp_path / "out/train/images").glob("P0001_*.png"))) == 4  # kept
    for stem in ("P0002", "P0003", "P0004", "P0005"):
        (folder / f"{stem}.png").unlink()
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 0
    target = tmp_path / "out/train/instancesonly_filtered_train.json"
    names = {image["file_name"][:5] for image in json.loads(target.read_text())["images"]}
    assert names == {"P0001"}


@pytest.mark.parametrize("moment", ["rmtree", "replace"])
def test_killed_while_the_parts_are_put_together(tmp_path, moment):
    """Before and after the annotation file is there: calling again finishes, and then finds it."""
    draw_raw(tmp_path / "raw/train/images", "P0001", 100, 100, 10)
    command = [
        sys.executable,
        "-c",
        f"""
import os, shutil, signal, sys, isaid, patches
def killed(*args, original=os.replace):
    if "{moment}" == "rmtree" or "instancesonly" in str(args[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
module = shutil if "{moment}" == "rmtree" else os
module.{moment} = killed
isaid.main(sys.argv[1:])""",
    ]
    flags = "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), *SMALL
    assert subprocess.run([*command, *flags], cwd=ROOT, capture_output=True).returncode == -9
    target = tmp_path / "out/train/instancesonly_filtered_train.json"
    assert target.exists() == (moment == "rmtree") and (tmp_path / "out/train/parts").is_dir()
    for _ in range(2):
        assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 0
        assert target.exists() and not (tmp_path / "out/train/parts").exists()


def test_what_is_no_image(tmp_path):
    """Hidden files and folders that are called like images are left alone."""
    folder = tmp_path / "raw/val/images"
    draw_raw(folder, "P0001", 30, 30, 3)
    (folder / "._P0001.png").write_bytes(b"junk")
    (folder / "P0002.png").mkdir()
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 0
    coco = COCO(tmp_path / "out/val/instancesonly_filtered_val.json").dataset
    assert [image["file_name"] for image in coco["images"]] == ["P0001.png"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none", "out"], "none: has no train/images"),
        (["raw", "out", "--splits", "test"], "raw/test/images: holds no images"),
        (
            ["raw", "out", "--patch", "100", "--overlap", "100"],
            "--overlap 100 must be smaller than --patch 100",
        ),
        (["raw", "raw"], "is where the images come from"),
        (["raw", "raw/val/images/P0001.png"], "cannot be written"),
    ],
)
def test_mistakes_get_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_raw(Path("raw/val/images"), "P0001", 30, 30, 2)
    assert message in prepare(*arguments)
