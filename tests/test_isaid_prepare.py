"""isaid.py prepare: full masks, the devkit's counts, layouts of RAW; errors; interruptions."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

import isaid
from util import coco, dataset_check, isaid_prepare, isaid_raw
from util.files import read_json

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT.parent / "shared/data/isaid_raw"
CLASS_COLORS = isaid_prepare.PACKED_COLORS.tolist()
SMALL = "--patch 80 --overlap 20 --workers 1"
RAW = Path("raw/train/images")  # in the folder of a test
OUT = Path("out/train")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw_raw(stem, height, width, num_objects, seed=0):
    """Write an image and its masks, with ellipses, some with holes, stray pixels or two classes.

    Returns (ids, classes): the masks (H, W) as packed colors.
    """
    rng = np.random.default_rng(seed)
    yy, xx = np.ogrid[:height, :width]
    ids = np.zeros((height, width), np.int64)
    classes = np.zeros((height, width), np.int64)
    ids[-3:] = 77  # below 1000: no object
    numbers = rng.choice(2**24 - 2000, num_objects, replace=False) + 1000
    for k, number in enumerate(numbers):
        h, w = rng.integers(2, 30, 2)
        y, x = rng.integers((height - h, width - w))
        radius = ((yy - y + 0.5) / h - 0.5) ** 2 + ((xx - x + 0.5) / w - 0.5) ** 2
        shape = radius <= 0.25
        if k % 3 == 0:
            shape &= radius > 0.04  # a hole
        if k % 5 == 0:  # a stray part of one or two pixels, in the hole or elsewhere
            top, left = y + h // 2, x + w // 2
            if k % 2 == 0:
                top, left = rng.integers((height - 3, width - 3))
            shape[top : top + 1 + k % 3 // 2, left] = True
        ids[shape] = number
        classes[shape] = rng.choice(CLASS_COLORS)
        if k % 7 == 0:
            classes[shape & (xx == x)] = CLASS_COLORS[14]
    RAW.mkdir(parents=True, exist_ok=True)
    noise = rng.integers(2**24, size=ids.shape)
    save_packed(RAW / f"{stem}.png", noise)
    save_packed(RAW / f"{stem}_instance_id_RGB.png", ids)
    save_packed(RAW / f"{stem}_instance_color_RGB.png", classes)
    return ids, classes


def save_packed(path, colors):
    """Write an image of packed colors (H, W)."""
    pixels = np.stack([colors & 255, colors >> 8 & 255, colors >> 16], -1)
    Image.fromarray(pixels.astype(np.uint8)).save(path, compress_level=1)


def objects_by_full_masks(ids, classes, window, devkit):
    """Return the annotations of a window the plain way: with a full mask for each object."""
    y0, y1, x0, x1 = window
    ids = ids[y0:y1, x0:x1]
    classes = classes[y0:y1, x0:x1]
    annotations = []
    for number in np.unique(ids):
        mask = ids == number
        parts, _ = ndimage.label(ndimage.binary_fill_holes(mask), np.ones((3, 3)))
        is_tiny = np.bincount(parts.ravel())[1:].min() <= 2
        if number < 1000 or mask.sum() <= 10 or (devkit and is_tiny):
            continue
        y, x = np.nonzero(mask)
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        rle["counts"] = rle["counts"].decode()
        annotation = {
            "category_id": CLASS_COLORS.index(classes[mask].min()) + 1,
            "segmentation": rle,
            "bbox": [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1],
            "area": mask.sum(),
            "iscrowd": 0,
        }
        annotations.append(annotation)
    return sorted(annotations, key=lambda x: x["category_id"])  # stable: by id within a class


def prepare(flags):
    """Run the command; returns its exit status or its error message."""
    with pytest.raises(SystemExit) as stop:
        isaid.main(f"prepare {SMALL} {flags}".split())
    return stop.value.code


def annotations_of(split="train"):
    """Return the content of the annotation file that was written."""
    return read_json(coco.split_files("out", split)[1])


@pytest.mark.parametrize("flag", ["", "--devkit"])
def test_equals_full_masks(flag):
    """The devkit leaves out P1527. Hidden files and folders named *.png are not images."""
    masks = {
        "P0002": draw_raw("P0002", 170, 210, 90),
        "P0010": draw_raw("P0010", 60, 200, 20),
        "P1527": draw_raw("P1527", 60, 70, 3),
    }
    (RAW / "._P0001.png").write_bytes(b"junk")
    (RAW / "P0003.png").mkdir()
    assert prepare(f"raw out {flag}") == 0

    windows = {}
    for y in (0, 60, 90):
        for x in (0, 60, 120, 130):
            windows[f"P0002_{y}_{y + 80}_{x}_{x + 80}.png"] = (y, y + 80, x, x + 80)
    if flag:
        windows["P0010.png"] = (0, 60, 0, 200)
    else:
        for x in (0, 60, 120):
            windows[f"P0010_0_60_{x}_{x + 80}.png"] = (0, 60, x, x + 80)
        windows["P1527.png"] = (0, 60, 0, 70)

    expected = []
    num_dropped = 0
    for i, (name, window) in enumerate(windows.items()):
        stem = name[:5]
        y0, y1, x0, x1 = window
        objects = objects_by_full_masks(*masks[stem], window, flag)
        num_dropped += len(objects_by_full_masks(*masks[stem], window, "")) - len(objects)
        for annotation in objects:
            expected.append({"id": len(expected) + 1, "image_id": i, **annotation})
        patch = np.asarray(Image.open(OUT / "images" / name))
        whole = np.asarray(Image.open(RAW / f"{stem}.png"))
        np.testing.assert_array_equal(patch, whole[y0:y1, x0:x1])
    content = annotations_of()
    names = [(image["id"], image["file_name"]) for image in content["images"]]
    assert names == list(enumerate(windows))
    assert content["annotations"] == expected
    assert (num_dropped > 0) == bool(flag)
    assert dataset_check.check(*coco.split_files("out", "train"))[1] is not None


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="real raw samples are not part of the project")
def test_golden_counts():
    """What the devkit makes of P0003 and P0004."""
    assert prepare(f"{SAMPLES} out --devkit --patch 800 --overlap 200") == 0
    val = annotations_of("val")
    test = annotations_of("test")
    counts = np.bincount([annotation["image_id"] for annotation in val["annotations"]])
    assert counts.tolist() == [35, 27, 45, 32, 73, 75, 57, 57, 52, 52]
    assert val["images"][0]["file_name"] == "P0003_0_800_0_800.png"
    first = val["annotations"][0]
    assert (first["category_id"], first["area"], first["bbox"]) == (2, 403, [464, 653, 24, 22])
    assert test["images"] and not test["annotations"] and len(test["categories"]) == 15


def test_interrupted_and_called_again():
    """Killed in the middle, the workers end; continued, the files are the same as at once."""
    for i in range(8):
        draw_raw(f"P{i:04d}", 300, 300, 40, seed=i)
    command = [sys.executable, ROOT / "isaid.py", *f"prepare raw out {SMALL}".split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(list(OUT.glob("parts/*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert f"out/train: is in use by process {process.pid} on " in prepare("raw out")
    process.kill()
    process.communicate(timeout=60)  # returns when no worker holds the pipe any longer
    assert not coco.split_files("out", "train")[1].exists()
    finished = {path: path.stat().st_mtime_ns for path in OUT.glob("images/P0000_*.png")}
    assert finished
    assert "devkit False, not True" in prepare("raw out --devkit")
    assert prepare("raw out") == 0
    assert prepare("raw once --workers 2") == 0

    names = [path.relative_to("once") for path in Path("once").rglob("*") if path.is_file()]
    assert len(names) == 8 * 25 + 2 and not (OUT / "parts").exists()
    for name in names:
        assert ("out" / name).read_bytes() == ("once" / name).read_bytes()
    for path, time_before in finished.items():
        assert path.stat().st_mtime_ns == time_before
    (OUT / "prepare.json").unlink()
    assert "not written by this command" in prepare("raw out")


@pytest.mark.parametrize("module, name", [(shutil, "rmtree"), (os, "replace")])
def test_interrupted_while_the_records_are_joined(module, name, monkeypatch):
    """After and before the annotation file exists: calling again finishes, and then finds it."""
    draw_raw("P0001", 100, 100, 10)
    original = getattr(module, name)
    target = coco.split_files("out", "train")[1]

    def stop(*paths, **options):
        if name == "rmtree" or os.path.realpath(paths[-1]) == os.path.realpath(target):
            raise KeyboardInterrupt
        original(*paths, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        assert prepare("raw out") == 130
    assert target.exists() == (name == "rmtree") and (OUT / "parts").is_dir()
    for _ in range(2):
        assert prepare("raw out") == 0
        assert target.exists() and not (OUT / "parts").exists()


def test_bad_images_are_named(capsys):
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
    stderr = capsys.readouterr().err
    for text in (
        "P0002_instance_id_RGB.png: file not found",
        "P0003_instance_color_RGB.png: color (1, 2, 3) at (x=9, y=7)",
        "P0004.png: not a readable image, or corrupted",
        "P0005_instance_id_RGB.png: annotations say 100 x 100 pixels, but the image is 90 x 100",
        "error: 4 images in 'train' could not be processed; fix or remove them",
    ):
        assert text in stderr
    assert not coco.split_files("out", "train")[1].exists()
    for i in range(2, 6):
        (RAW / f"P000{i}.png").unlink()
    assert prepare("raw out") == 0
    names = {image["file_name"] for image in annotations_of()["images"]}
    assert names == {path.name for path in OUT.glob("images/P0001_*.png")}  # kept
    assert len(names) == 4


# ---------------------------------------------------------------- other layouts of RAW
IMAGE_ARCHIVE = Path("raw/dotav1.0_images_train.tar.gz")
MASK_ARCHIVE = Path("raw/isaid_annotations_train.tar.gz")


def pack(archive, files):
    """Write an archive as the mirror has them, with what a Mac adds; files: {name: path}."""
    with tarfile.open(archive, "w:gz") as tar:
        for name, path in files.items():
            hidden = tarfile.TarInfo(name.replace("P", "._P"))
            hidden.size = 4
            tar.addfile(hidden, io.BytesIO(b"junk"))
            tar.add(path, name)


def move_images(place):
    """Move the images from raw/train/images into an archive, or into the folder raw/images."""
    paths = sorted(path for path in RAW.glob("*.png") if not coco.is_mask(path))
    if place == "archive":
        pack(IMAGE_ARCHIVE, {f"./images/{path.name}": path for path in reversed(paths)})
    for path in paths:
        if place == "shared":
            Path("raw/images").mkdir(exist_ok=True)
            shutil.copy(path, "raw/images")
        if place != "official":
            path.unlink()


def move_masks(place):
    """Move the masks from raw/train/images into an archive, or into folders of their own."""
    files = {}
    for path in sorted(RAW.glob("*_instance_*.png")):
        kind = "Instance_masks" if "_id_" in path.name else "Semantic_masks"
        files[f"train/{kind}/images/{path.name}"] = path
    if place == "archive":
        pack(MASK_ARCHIVE, files)
    for name, path in files.items():
        target = Path("raw", name)
        if place == "folders":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        path.unlink()


def files_of(folder):
    """Return the files below a folder, {relative path: content}."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


LAYOUTS = [  # places of the images and of the masks
    ("official", "folders"),
    ("official", "archive"),
    ("shared", "folders"),
    ("archive", "folders"),
    ("archive", "archive"),
]


def test_layouts_of_raw_give_the_same():
    draw_raw("P2", 100, 90, 10)
    draw_raw("P10", 100, 90, 10)
    assert prepare("raw official --limit 1") == 0
    expected = files_of("official")
    assert len(expected) == 4 + 2  # patches; annotations and settings
    shutil.move("raw", "original")
    for images, masks in LAYOUTS:
        shutil.copytree("original", "raw")
        move_images(images)
        move_masks(masks)
        assert prepare("raw out --limit 1") == 0
        assert files_of("out") == expected, (images, masks)
        shutil.rmtree("raw")
        shutil.rmtree("out")


def test_damaged_archives(capsys):
    """A download that ended early is named; with the whole one, finished images are kept."""
    for i in (1, 2, 3):
        draw_raw(f"P000{i}", 100, 90, 10, seed=i)
    move_images("archive")
    move_masks("archive")
    details = {MASK_ARCHIVE: "159 MB", IMAGE_ARCHIVE: "10,183,034,823 bytes, MD5 363b"}
    for archive, text in details.items():
        content = archive.read_bytes()
        for length in (0, len(content) // 2, len(content) - 4):
            archive.write_bytes(content[:length])
            message = prepare("raw out")
            assert f"{archive}: incomplete or corrupted (" in message
            assert f"{archive.name} ({text}" in message
        archive.write_bytes(content)
    assert not coco.split_files("out", "train")[1].exists()
    finished = {path: path.stat().st_mtime_ns for path in OUT.glob("images/P0003_*.png")}
    assert finished  # the archive's first
    assert prepare("raw out") == 0
    for path, time_before in finished.items():
        assert path.stat().st_mtime_ns == time_before

    Image.new("RGB", (90, 100)).save("black.png")
    pack(IMAGE_ARCHIVE, {"images/P0002.png": "black.png", "images/P0004.png": "black.png"})
    message = prepare("raw again")
    assert f"{IMAGE_ARCHIVE}: 2 images that have masks not found (first: P0001.png)" in message
    assert f"{IMAGE_ARCHIVE}: 1 images without masks left out" in capsys.readouterr().err


def test_what_is_missing_is_named(capsys):
    """In one line, with its address: masks of all images; images; a split."""
    for i in (1, 2):
        draw_raw(f"P000{i}", 30, 30, 2)
    shutil.copytree("raw", "original")
    image_address = f"{isaid_raw.DOTA}/{IMAGE_ARCHIVE.name} (10,183,034,823 bytes"
    mask_address = f"{isaid_raw.MASKS}/{MASK_ARCHIVE.name} (159 MB"
    move_masks("folders")
    shutil.rmtree("raw/train/Instance_masks")
    message = prepare("raw out")
    assert (
        f"no 'val' split, which training needs; download {isaid_raw.DOTA}"
        in capsys.readouterr().err
    )
    assert "masks of 2 of 2 images not found (first: P0001_instance_id_RGB.png)" in message
    assert mask_address in message
    move_images("archive")
    shutil.rmtree("raw/train")
    message = prepare("raw out")
    assert f"{IMAGE_ARCHIVE}: masks of its images not found" in message
    assert mask_address in message
    IMAGE_ARCHIVE.unlink()
    shutil.copytree("original", "raw", dirs_exist_ok=True)
    move_masks("archive")
    move_images("archive")
    IMAGE_ARCHIVE.unlink()
    message = prepare("raw out")
    assert f"{RAW}: contains no images" in message
    assert image_address in message


MISTAKES = [
    ("none out", "none: expected at least one of train/images"),
    ("raw out --splits test", "raw/test/images: contains no images"),
    ("raw out --overlap 80", "--overlap 80 must be smaller than --patch 80"),
    ("raw raw", "raw/train/images is the input folder"),
    ("raw raw/train/images/P0001.png", "P0001.png/train: Not a directory"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_mistakes_get_one_line(flags, message):
    draw_raw("P0001", 30, 30, 2)
    assert message in prepare(flags)
