"""Patches from a raw release: against full masks, the devkit's counts, faults, interruptions."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

import coco as files
import isaid
import patches

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT.parent / "shared/data/isaid_raw"
PACKED = patches.pack(patches.COLOURS).tolist()
SMALL = ["--patch", "80", "--overlap", "20", "--workers", "1"]


def draw_raw(folder, stem, height, width, n, seed=0):
    """An image of a raw release with n ellipses, some with holes, stray pixels, or two classes."""
    rng = np.random.default_rng(seed)
    ids, kinds = np.zeros((2, height, width), np.int64)
    ids[-3:] = 77  # below 1000: no object
    for k, number in enumerate(rng.choice(2**24 - 2000, n, replace=False) + 1000):
        h, w = rng.integers(2, 30, 2)
        y, x = rng.integers(0, height - h), rng.integers(0, width - w)
        yy, xx = np.ogrid[:h, :w]
        radius = ((yy + 0.5) / h - 0.5) ** 2 + ((xx + 0.5) / w - 0.5) ** 2
        shape = (radius <= 0.25) & ((radius > 0.04) | (k % 3 > 0))
        colour = rng.choice(PACKED)
        ids[y : y + h, x : x + w][shape] = number
        kinds[y : y + h, x : x + w][shape] = colour
        if k % 5 == 0:  # a stray part of one or two pixels, in a hole or elsewhere
            top, left = rng.integers(height - 3), rng.integers(width - 3)
            top, left = (y + h // 2, x + w // 2) if k % 2 else (top, left)
            here = slice(top, top + 1 + k % 3 // 2), left
            ids[here], kinds[here] = number, colour
        if k % 7 == 0:
            kinds[y : y + h, x : x + w][shape & (xx < 1)] = PACKED[14]
    folder.mkdir(parents=True, exist_ok=True)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    masks = (np.stack([x & 255, x >> 8 & 255, x >> 16], -1).astype(np.uint8) for x in (ids, kinds))
    for suffix, pixels in zip(("", "_instance_id_RGB", "_instance_color_RGB"), (image, *masks)):
        Image.fromarray(pixels).save(folder / f"{stem}{suffix}.png", compress_level=1)
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
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        shape = {"size": list(mask.shape), "counts": rle["counts"].decode()}
        box = [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
        found.append({"category_id": PACKED.index(kinds[mask].min()) + 1, "segmentation": shape})
        found[-1].update(area=int(mask.sum()), iscrowd=0, bbox=box)
    return sorted(found, key=lambda x: x["category_id"])  # stable: by id within a class


def prepare(*arguments):
    with pytest.raises(SystemExit) as stop:
        isaid.main(["prepare", *map(str, arguments)])
    return stop.value.code


def annotations(out, split):
    return json.loads(files.split_files(out, split)[1].read_text(encoding="utf-8"))


@pytest.mark.parametrize("devkit", [False, True])
def test_equals_full_masks(tmp_path, devkit):
    folder, out = tmp_path / "raw/train/images", tmp_path / "out"
    truth = draw_raw(folder, "P0002", 170, 210, 90), draw_raw(folder, "P0010", 60, 200, 20, 1)
    assert prepare(tmp_path / "raw", out, *SMALL, *["--devkit"] * devkit) == 0
    coco = annotations(out, "train")
    names = [f"P0002_{y}_{y + 80}_{x}_{x + 80}.png" for y in (0, 60, 90) for x in (0, 60, 120, 130)]
    names += ["P0010.png"] if devkit else [f"P0010_0_60_{x}_{x + 80}.png" for x in (0, 60, 120)]
    assert [image["file_name"] for image in coco["images"]] == names
    assert [image["id"] for image in coco["images"]] == list(range(len(names)))
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    dropped = 0
    for image in coco["images"]:
        stem, *window = image["file_name"].removesuffix(".png").split("_")
        ids, kinds = truth[stem == "P0010"]
        y0, y1, x0, x1 = window = tuple(map(int, window)) or (0, 60, 0, 200)
        expected = by_full_masks(ids, kinds, window, devkit)
        dropped += len(by_full_masks(ids, kinds, window, False)) - len(expected)
        mine = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        numbers = [{"id": a["id"], "image_id": image["id"]} for a in mine]
        assert mine == [{**ids, **a} for ids, a in zip(numbers, expected, strict=True)]
        patch = np.asarray(Image.open(out / "train/images" / image["file_name"]))
        whole = np.asarray(Image.open(folder / f"{stem}.png"))
        np.testing.assert_array_equal(patch, whole[y0:y1, x0:x1])
    assert (dropped > 0) == devkit
    assert isaid.check(*files.split_files(out, "train"))[1] is not None


@pytest.mark.skipif(not RAW.is_dir(), reason="real raw samples are not part of the project")
def test_golden_counts(tmp_path):
    """What the devkit makes of P0003 and P0004."""
    assert prepare(RAW, tmp_path, "--devkit", "--workers", 1) == 0
    coco = annotations(tmp_path, "val")
    counts = np.bincount([a["image_id"] for a in coco["annotations"]])
    assert counts.tolist() == [35, 27, 45, 32, 73, 75, 57, 57, 52, 52]
    assert coco["images"][0]["file_name"] == "P0003_0_800_0_800.png"
    first = coco["annotations"][0]
    assert (first["category_id"], first["area"], first["bbox"]) == (2, 403, [464, 653, 24, 22])
    test = annotations(tmp_path, "test")
    assert test["images"] and not test["annotations"] and len(test["categories"]) == 15


def test_what_is_no_image(tmp_path):
    """Hidden files and folders that are called like images, and what the devkit leaves out."""
    folder = tmp_path / "raw/val/images"
    for stem in ("P1526", "P1527"):
        draw_raw(folder, stem, 30, 30, 3)
    (folder / "._P0001.png").write_bytes(b"junk")
    (folder / "P0002.png").mkdir()
    for flags, stems in ((["--devkit"], ["P1526.png"]), ([], ["P1526.png", "P1527.png"])):
        out = tmp_path / f"out{len(flags)}"
        assert prepare(tmp_path / "raw", out, *SMALL, *flags) == 0
        assert [image["file_name"] for image in annotations(out, "val")["images"]] == stems


def test_interrupted_and_called_again(tmp_path):
    """Killed in the middle, its workers end; continued, it writes the same bytes as at once."""
    raw, out, once = tmp_path / "raw", tmp_path / "out", tmp_path / "once"
    for i in range(12):
        draw_raw(raw / "train/images", f"P{i:04d}", 300, 300, 40, seed=i)
    command = [sys.executable, "isaid.py", "prepare", raw, out, *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while len(list(out.glob("train/parts/*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # returns when no worker holds the pipe any longer
    assert not files.split_files(out, "train")[1].exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("train/images/P0000_*.png")}
    assert "was prepared with devkit False, not True" in prepare(raw, out, *SMALL, "--devkit")
    assert prepare(raw, out, *SMALL) == 0
    assert prepare(raw, once, *SMALL[:-1], 2) == 0
    names = [path.relative_to(once) for path in once.rglob("*") if path.is_file()]
    assert len(names) == 12 * 25 + 2 and not (out / "train/parts").exists()
    for name in names:
        assert (out / name).read_bytes() == (once / name).read_bytes()
    assert finished and all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert prepare(raw, out, *SMALL) == 0  # nothing left to do
    assert "was prepared with limit None, not 1" in prepare(raw, out, *SMALL, "--limit", 1)
    (out / "train/prepare.json").unlink()
    assert "was not made by this command" in prepare(raw, out, *SMALL)


@pytest.mark.parametrize("moment", ["rmtree", "replace"])
def test_killed_while_the_parts_are_put_together(tmp_path, moment):
    """Before and after the annotation file is there: calling again finishes, and then finds it."""
    draw_raw(tmp_path / "raw/train/images", "P0001", 100, 100, 10)
    code = f"""
import os, shutil, sys, isaid
def killed(*args, original=os.replace):
    if "{moment}" == "rmtree" or "instancesonly" in str(args[-1]):
        os._exit(9)
    return original(*args)
setattr(shutil if "{moment}" == "rmtree" else os, "{moment}", killed)
isaid.main(sys.argv[1:])"""
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, "prepare", tmp_path / "raw", out, *SMALL]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 9
    target = files.split_files(out, "train")[1]
    assert target.exists() == (moment == "rmtree") and (out / "train/parts").is_dir()
    for _ in range(2):
        assert prepare(tmp_path / "raw", out, *SMALL) == 0
        assert target.exists() and not (out / "train/parts").exists()


def test_faults_are_named(tmp_path, capsys):
    """A bad image does not stop the others; without the bad ones the split is finished."""
    folder, out = tmp_path / "raw/train/images", tmp_path / "out"
    for i in range(1, 6):
        draw_raw(folder, f"P000{i}", 100, 100, 10)
    (folder / "P0002_instance_id_RGB.png").unlink()
    mask = np.array(Image.open(folder / "P0003_instance_color_RGB.png"))
    mask[7, 9] = 1, 2, 3
    Image.fromarray(mask).save(folder / "P0003_instance_color_RGB.png")
    whole = (folder / "P0004.png").read_bytes()
    (folder / "P0004.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (90, 100)).save(folder / "P0005_instance_id_RGB.png")
    assert prepare(tmp_path / "raw", out, *SMALL) == 1
    problems = capsys.readouterr().err
    for text in (
        "P0002_instance_id_RGB.png: is missing",
        "P0003_instance_color_RGB.png: the colour (1, 2, 3) at x 9, y 7 is of no class",
        "P0004.png: is damaged",
        "P0005_instance_id_RGB.png should have 100 x 100 pixels, the file has 90 x 100",
        "error: 4 images of train are bad; mend or remove them",
    ):
        assert text in problems
    assert not files.split_files(out, "train")[1].exists()
    for i in range(2, 6):
        (folder / f"P000{i}.png").unlink()
    assert prepare(tmp_path / "raw", out, *SMALL) == 0
    names = {image["file_name"] for image in annotations(out, "train")["images"]}
    assert names == {path.name for path in out.glob("train/images/P0001_*.png")}  # kept
    assert len(names) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none", "out"], "none: has no train/images"),
        (["raw", "out", "--splits", "test"], "raw/test/images: holds no images"),
        (["raw", "out", "--overlap", "800"], "--overlap 800 must be smaller than --patch 800"),
        (["raw", "raw"], "is where the images come from"),
        (["raw", "raw/val/images/P0001.png"], "error: [Errno"),
    ],
)
def test_mistakes_get_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_raw(Path("raw/val/images"), "P0001", 30, 30, 2)
    assert message in prepare(*arguments)
