"""Patches from a raw release: against full masks one by one, the devkit's counts, faults, interruptions."""
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

import isaid
import patches

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT.parent / "shared/data/isaid_raw"
SMALL = ["--patch", "80", "--overlap", "20", "--workers", "1"]


def unpack(packed):
    return np.stack([packed & 255, packed >> 8 & 255, packed >> 16], -1).astype(np.uint8)


def draw_raw(folder, stem, height, width, n, seed=0, size=(2, 30)):
    """An image of a raw release with n ellipses, some with holes, stray pixels, or two classes under them."""
    rng = np.random.default_rng(seed)
    ids, kinds = np.zeros((height, width), np.int64), np.zeros((height, width), np.int64)
    ids[-3:] = 77  # below 1000: no object
    numbers = rng.choice(2 ** 24 - 2000, n, replace=False) + 1000
    for k, number in enumerate(numbers):
        h, w = rng.integers(*size, 2)
        y, x = rng.integers(0, height - h), rng.integers(0, width - w)
        yy, xx = np.ogrid[:h, :w]
        shape = ((yy + 0.5) / h - 0.5) ** 2 + ((xx + 0.5) / w - 0.5) ** 2 <= 0.25
        if k % 3 == 0:
            shape &= ~(((yy + 0.5) / h - 0.5) ** 2 + ((xx + 0.5) / w - 0.5) ** 2 <= 0.04)
        colour = patches.pack(patches.COLOURS[rng.integers(15)])
        ids[y:y + h, x:x + w][shape] = number
        kinds[y:y + h, x:x + w][shape] = colour
        if k % 5 == 0:  # a stray part of one or two pixels, in a hole or elsewhere
            top, left = (y + h // 2, x + w // 2) if k % 2 else (rng.integers(height - 3), rng.integers(width - 3))
            ids[top:top + 1 + k % 3 // 2, left], kinds[top:top + 1 + k % 3 // 2, left] = number, colour
        if k % 7 == 0:
            kinds[y:y + h, x:x + w][shape & (xx < 1)] = patches.pack(patches.COLOURS[14])
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{stem}.png", compress_level=0)
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
        found.append({"category_id": colours[kinds[mask].min()], "area": int(mask.sum()), "iscrowd": 0,
                      "bbox": [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1],
                      "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()}})
    return sorted(found, key=lambda annotation: annotation["category_id"])  # stable: by id within a class


def prepare(*arguments):
    with pytest.raises(SystemExit) as stop:
        isaid.main(["prepare", *map(str, arguments)])
    return stop.value.code


def without(annotation, *names):
    return {name: value for name, value in annotation.items() if name not in names}


@pytest.mark.parametrize("devkit", [False, True])
def test_equals_full_masks(tmp_path, devkit):
    truth = draw_raw(tmp_path / "raw/train/images", "P0002", 170, 210, 90), draw_raw(tmp_path / "raw/train/images", "P0010", 60, 200, 20, 1)
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL, *["--devkit"] * devkit) == 0
    coco = json.loads((tmp_path / "out/train/instancesonly_filtered_train.json").read_text())
    names = [f"P0002_{y}_{y + 80}_{x}_{x + 80}.png" for y in (0, 60, 90) for x in (0, 60, 120, 130)]
    long = ["P0010.png"] if devkit else ["P0010_0_60_0_80.png", "P0010_0_60_60_140.png", "P0010_0_60_120_200.png"]
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
        assert [without(a, "id", "image_id") for a in coco["annotations"] if a["image_id"] == image["id"]] == expected
        whole = np.asarray(Image.open(tmp_path / f"raw/train/images/{stem}.png"))
        y0, y1, x0, x1 = window
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/train/images" / image["file_name"])), whole[y0:y1, x0:x1])
    assert (dropped > 0) == devkit
    assert not isaid.check(*isaid.split_files(tmp_path / "out", "train"))[1]


@pytest.mark.skipif(not RAW.is_dir(), reason="needs real raw samples, which are not part of the project")
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


def official_file(path, ids, kinds, polygons=True):
    """Whole-image annotations as the release has them: ids of its own, no sizes."""
    categories = [{"id": 40 - i, "name": c["name"].lower()} for i, c in enumerate(patches.CATEGORIES)]
    full = by_full_masks(ids, kinds, (0, *ids.shape[:1], 0, ids.shape[1]), False)
    annotations = []
    for i, a in enumerate(full):
        x, y, w, h = a["bbox"]
        shape = [[x, y, x + w, y, x + w, y + h, x, y + h]] if polygons else a["segmentation"]
        annotations.append({"id": i, "image_id": 5, "category_id": 41 - a["category_id"], "segmentation": shape, "area": a["area"],
                            "bbox": a["bbox"], "iscrowd": 0})
    path.write_text(json.dumps({"images": [{"id": 5, "file_name": "P0002.png"}], "categories": categories, "annotations": annotations}))
    return full


@pytest.mark.parametrize("polygons", [True, False])
def test_from_official_annotations(tmp_path, polygons):
    """Boxes drawn as polygons, or masks, clipped to each patch; classes by name."""
    ids, kinds = draw_raw(tmp_path / "raw/val/images", "P0002", 170, 210, 60)
    full = official_file(tmp_path / "iSAID_val.json", ids, kinds, polygons)
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL, "--splits", "val", "--annotations", tmp_path / "iSAID_val.json") == 0
    coco = json.loads((tmp_path / "out/val/instancesonly_filtered_val.json").read_text())
    for image in coco["images"]:
        y0, y1, x0, x1 = map(int, image["file_name"].removesuffix(".png").split("_")[1:])
        expected = []
        for a in full:
            x, y, w, h = a["bbox"]
            mask = np.zeros(ids.shape, np.uint8)
            mask[y:y + h, x:x + w] = 1 if polygons else coco_mask.decode(a["segmentation"])[y:y + h, x:x + w]
            part = np.asfortranarray(mask[y0:y1, x0:x1])
            if part.sum() > 10:
                rle = coco_mask.encode(part)
                expected.append((a["category_id"], int(part.sum()), coco_mask.toBbox(rle).tolist(), rle["counts"].decode()))
        found = [(a["category_id"], a["area"], a["bbox"], a["segmentation"]["counts"]) for a in coco["annotations"]
                 if a["image_id"] == image["id"]]
        assert found == expected


@pytest.mark.parametrize("change, message", [
    ({"segmentation": [[1, 1, 9, 9]]}, "a polygon needs three points"),
    ({"segmentation": [[1, 1, 9, 9, float("nan"), 4]]}, "of finite numbers"),
    ({"segmentation": {"size": [9, 9], "counts": "1"}}, "its size is [9, 9], the image's [170, 210]"),
    ({"segmentation": [[500, 1, 600, 1, 600, 50]]}, None), ({"segmentation": None}, "has no segmentation"), ({}, "says 99 x 99 pixels")])
def test_official_files_with_faults(change, message, tmp_path, capsys):
    """Refused with the number of the annotation; what lies outside its image is counted."""
    ids, kinds = draw_raw(tmp_path / "raw/val/images", "P0002", 170, 210, 5)
    official_file(tmp_path / "a.json", ids, kinds)
    coco = json.loads((tmp_path / "a.json").read_text())
    coco["annotations"][1].update(change)
    if not change:
        coco["images"][0].update(width=99, height=99)
    (tmp_path / "a.json").write_text(json.dumps(coco))
    status = prepare(tmp_path / "raw", tmp_path / "out", *SMALL, "--splits", "val", "--annotations", tmp_path / "a.json")
    printed = capsys.readouterr()
    if message is None:
        assert status == 0 and "1 objects of the official file are in no patch" in printed.out
    else:
        assert status and message in f"{status}{printed.err}"


def test_interrupted_and_called_again(tmp_path):
    """Killed in the middle, continued: the same bytes as at once."""
    for i in range(12):
        draw_raw(tmp_path / "raw/train/images", f"P{i:04d}", 300, 300, 40, seed=i)
    command = [sys.executable, "isaid.py", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out/train/parts"
    while len(list(parts.glob("*.json")) if parts.is_dir() else []) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/train/instancesonly_filtered_train.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/train/images").glob("P0000_*.png")}
    assert "was prepared with devkit False, not True" in prepare(tmp_path / "raw", tmp_path / "out", *SMALL, "--devkit")
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 0
    assert prepare(tmp_path / "raw", tmp_path / "once", *SMALL[:-1], 2) == 0
    files = sorted(path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file())
    assert len(files) == 12 * 25 + 2 and not list((tmp_path / "out").rglob("parts"))
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert finished and all(path.stat().st_mtime_ns == before for path, before in finished.items())
    leftover = [path for path in (tmp_path / "out").rglob("*.tmp")]
    assert len(leftover) <= 1
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 0  # nothing left to do
    assert "was prepared with limit None, not 1" in prepare(tmp_path / "raw", tmp_path / "out", *SMALL, "--limit", 1)


def test_faults_are_named(tmp_path, capsys):
    folder = tmp_path / "raw/train/images"
    for stem in ("P0001", "P0002", "P0003", "P0004", "P0005"):
        draw_raw(folder, stem, 100, 100, 10)
    (folder / "P0002_instance_id_RGB.png").unlink()
    mask = np.asarray(Image.open(folder / "P0003_instance_color_RGB.png")).copy()
    mask[7, 9] = 1, 2, 3
    Image.fromarray(mask).save(folder / "P0003_instance_color_RGB.png")
    whole = (folder / "P0004.png").read_bytes()
    (folder / "P0004.png").write_bytes(whole[:len(whole) // 2])
    Image.new("RGB", (90, 100)).save(folder / "P0005_instance_id_RGB.png")
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL) == 1
    problems = capsys.readouterr().err
    for text in ("P0002_instance_id_RGB.png: is missing", "P0003_instance_color_RGB.png: the colour (1, 2, 3) at x 9, y 7 is of no class",
                 "P0004.png: is damaged", "P0005_instance_id_RGB.png: has 90 x 100 pixels, its image 100 x 100", "error: 4 images"):
        assert text in problems
    assert not (tmp_path / "out/train/instancesonly_filtered_train.json").exists()
    assert len(list((tmp_path / "out/train/images").glob("P0001_*.png"))) == 4  # kept
    assert prepare(tmp_path / "raw", tmp_path / "out", *SMALL, "--skip_bad") == 0
    coco = json.loads((tmp_path / "out/train/instancesonly_filtered_train.json").read_text())
    assert {image["file_name"][:5] for image in coco["images"]} == {"P0001"}
    (folder / "P0001.png").unlink()  # none is left
    assert prepare(tmp_path / "raw", tmp_path / "other", *SMALL, "--skip_bad") == 1
    assert "0 of 4 images are cut" in capsys.readouterr().out and not list((tmp_path / "other").rglob("instancesonly*"))


@pytest.mark.parametrize("arguments, message", [
    (["none", "out"], "none: has none of the folders train/images"),
    (["raw", "out", "--splits", "test"], "raw/test/images: holds no images"),
    (["raw", "out", "--patch", "100", "--overlap", "100"], "--overlap 100 must be smaller than --patch 100"),
    (["raw", "out", "--splits", "val", "--annotations", "none.json"], "none.json: cannot be read"),
    (["raw", "out", "--splits", "val", "--annotations", "classes.json"], "its class 'submarine' is none of iSAID's"),
    (["raw", "raw"], "is where the images come from"), (["raw", "raw/val/images/P0001.png"], "cannot be written")])
def test_mistakes_get_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_raw(Path("raw/val/images"), "P0001", 30, 30, 2)
    Path("classes.json").write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "submarine"}]}))
    assert message in prepare(*arguments)


def measure(folder):
    """Seconds and peak memory of preparing large images on one core, and of the plain way to find the objects of their windows."""
    peak = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); " \
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # from a small process: a child inherits its parent's peak
    samples = [(p.stem, None) for p in (RAW / "val/images").glob("P000?.png")]
    for stem, side, n in [*((stem, None, None) for stem, _ in samples), ("P8000", 8000, 2000), ("P13000", 13000, 5000)]:
        images = folder / stem / "val/images"
        if side:
            draw_raw(images, stem, side, side, n, size=(10, 80))
        else:
            images.mkdir(parents=True)
            for path in (RAW / "val/images").glob(f"{stem}*"):
                (images / path.name).symlink_to(path)
        start = time.perf_counter()
        command = [sys.executable, "isaid.py", "prepare", str(folder / stem), str(folder / stem / "out"), "--workers", "1"]
        memory = int(subprocess.run([sys.executable, "-c", peak, *command], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout)
        whole = time.perf_counter() - start
        paths = [images / f"{stem}_instance_{kind}_RGB.png" for kind in ("id", "color")]
        labels, ranks = patches.read_instances(paths[0]), patches.read_ranks(paths[1])
        found = [window for _, window in patches.windows(stem, *labels.shape, 800, 200, False)][:20]
        start = time.perf_counter()
        for y0, y1, x0, x1 in found:
            patches.find_objects(labels[y0:y1, x0:x1], ranks[y0:y1, x0:x1])
        ours = time.perf_counter() - start
        ids, kinds = (np.concatenate([rows for _, rows in patches.bands(isaid.read_image(path)[0])]) for path in paths)
        start = time.perf_counter()
        for window in found:
            by_full_masks(ids, kinds, window, True)
        plain = time.perf_counter() - start
        print(f"{stem}: {labels.shape[1]} x {labels.shape[0]}, {labels.max()} objects: {whole:.1f} s in all, {memory / 1e6:.2f} GB; "
              f"objects of {len(found)} windows {ours:.2f} s, with full masks {plain:.2f} s, {plain / ours:.0f} times as long", flush=True)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))
