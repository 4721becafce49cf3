"""isaid.py prepare on NWPU VHR-10: its archive or folder, the split, what is missing."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_checkpoint import ROOT, TINY, log_of

import isaid
import train
from util import coco, vhr10
from util.files import read_json

REAL = ROOT.parent / "shared/data/vhr10/annotations.json"
FOLDER = Path("raw/NWPU VHR-10 dataset")
ZIP = Path("raw/NWPU%20VHR-10%20dataset.zip")  # as curl names it


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw_raw(content, num_negatives):
    """Write black images of the sizes in a COCO file, some without objects, and the file."""
    positives = FOLDER / "positive image set"
    negatives = FOLDER / "negative image set"
    positives.mkdir(parents=True)
    negatives.mkdir()
    for image in content["images"]:
        size = (image["width"], image["height"])
        Image.new("L", size).save(positives / image["file_name"])
    for i in range(num_negatives):
        Image.new("L", (60, 50), 255).save(negatives / f"{i + 1:03d}.jpg")
    (FOLDER / "ground truth").mkdir()
    (FOLDER / "ground truth/001.txt").write_text("(1,2),(3,4),1")
    Path("raw/annotations.json").write_text(json.dumps(content))


def small_content(num_images):
    """Return the content of an annotation file with an object in each image."""
    images = []
    annotations = []
    for i in range(num_images):
        name = f"{i + 1:03d}.jpg"
        images.append({"id": i, "file_name": name, "width": 64 + i, "height": 48, "license": 0})
        polygon = [[8, 8, 40, 8, 40, 30]]
        annotation = {"id": i, "image_id": i, "category_id": 1 + i % 2, "segmentation": polygon}
        annotations.append({**annotation, "bbox": [8, 8, 32, 22], "area": 352, "iscrowd": 0})
    categories = [{"id": 1, "name": "ship"}, {"id": 2, "name": "vehicle"}]
    return {"images": images, "annotations": annotations, "categories": categories, "type": "x"}


def zip_folder():
    """Replace the folder of images by the archive, with what a Mac adds."""
    with zipfile.ZipFile(ZIP, "w") as archive:
        for path in FOLDER.rglob("*"):
            archive.write(path, path.relative_to("raw"))
            archive.writestr(f"__MACOSX/{path.parent.name}/._{path.name}", b"junk")
    shutil.rmtree(FOLDER)


def run(command):
    """Run a command of isaid.py; returns its exit status or its error message."""
    with pytest.raises(SystemExit) as stop:
        isaid.main(command.split())
    return stop.value.code


def files_of(folder):
    """Return the files below a folder, {relative path: content}."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_folder_and_archive(capsys):
    """They give the same; nothing is lost; a check and two trainings run."""
    content = small_content(10)
    draw_raw(content, 3)
    images = files_of(FOLDER)
    assert run("prepare raw data") == 0
    assert "3 unlabeled images in data/train/images/unlabeled" in capsys.readouterr().out
    zip_folder()
    assert run("prepare raw from_zip") == 0
    files = files_of("data")
    assert files_of("from_zip") == files

    for number in (1, 2, 3):
        name = f"{number:03d}.jpg"
        unlabeled = files.pop(Path("train/images/unlabeled", name))
        assert unlabeled == images[Path("negative image set", name)]
    ids = {}
    for split, count in (("train", 8), ("val", 2)):
        written = read_json(coco.split_files("data", split)[1])
        ids[split] = [image["id"] for image in written["images"]]
        assert len(ids[split]) == count
        assert written["images"] == [content["images"][i] for i in ids[split]]
        assert written["annotations"] == [content["annotations"][i] for i in ids[split]]
        assert written["categories"] == content["categories"]
        for i in ids[split]:
            name = content["images"][i]["file_name"]
            image = files.pop(Path(split, "images", name))
            assert image == images[Path("positive image set", name)]
    assert sorted(ids["train"] + ids["val"]) == list(range(10))
    assert len(files) == 4  # of each split the annotations and the settings

    assert run("check data") == 0
    tiny = [*TINY, "--data", "data", "--epochs", "1"]
    train.main([*tiny, "--out", "detect"])
    assert log_of(Path("detect"))[0]["train_loss"] > 0
    capsys.readouterr()
    train.main([*tiny, "--setting", "pretrain", "--limit_train", "100", "--out", "pretrain"])
    assert "train/images: 11 images" in capsys.readouterr().out


@pytest.mark.skipif(not REAL.is_file(), reason="the real annotations are not part of the project")
def test_real_annotations():
    """A fifth of the images is held out, and about a fifth of the objects of each class."""
    content = read_json(REAL)
    draw_raw(content, 150)
    assert run("prepare raw data") == 0
    objects = {}
    num_images = {}
    num_objects = {}
    for split in ("train", "val"):
        images_dir, target = coco.split_files("data", split)
        written = coco.load_json(target)
        num_images[split] = (len(written["images"]), len(list(images_dir.rglob("*.jpg"))))
        classes = [annotation["category_id"] for annotation in written["annotations"]]
        num_objects[split] = np.bincount(classes, minlength=11)[1:]
        for annotation in written["annotations"]:
            objects[annotation["id"]] = annotation
    assert num_images == {"train": (520, 670), "val": (130, 130)}
    assert [objects[i] for i in range(3921)] == content["annotations"]
    shares = num_objects["val"] / (num_objects["train"] + num_objects["val"])
    assert (0.13 < shares).all() and (shares < 0.27).all()


def test_called_again():
    """After an interruption, with other settings, and for another dataset in the same folder."""
    draw_raw(small_content(10), 1)
    assert run("prepare raw data --limit 4") == 0
    files = files_of("data")
    Path("data/train/images/001.jpg").write_bytes(b"half of an ima")
    coco.split_files("data", "train")[1].unlink()
    assert run("prepare raw data --limit 4") == 0
    assert files_of("data") == files
    assert len(read_json(coco.split_files("data", "train")[1])["images"]) == 4
    assert "was prepared with different settings (limit 4, not None)" in run("prepare raw data")
    assert "data: is prepared already; use it as train.py --data data" in run("prepare data again")
    (FOLDER / "train/images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(FOLDER / "train/images/P0001.png")
    shutil.move(FOLDER / "train", "isaid/train")
    assert "different settings (patch None, not 800" in run("prepare isaid data")


def test_what_is_missing_is_named():
    draw_raw(small_content(4), 1)
    archive_address = f"{vhr10.IMAGES.address}/{vhr10.IMAGES.name} (76,822,614 bytes, SHA-256 3e8c"
    Path("raw/annotations.json").rename("kept.json")
    message = run("prepare raw data")
    assert "raw: annotations.json not found" in message
    assert "/annotations.json (1,265,416 bytes, SHA-256 dde2" in message
    Path("kept.json").rename("raw/annotations.json")
    (FOLDER / "positive image set/003.jpg").unlink()
    message = run("prepare raw data")
    assert "1 of 4 images not found (first: 003.jpg)" in message
    assert archive_address in message

    Image.new("L", (66, 48)).save(FOLDER / "positive image set/003.jpg")
    zip_folder()
    content = ZIP.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"\xff\xd8") + 100] ^= 255  # in a picture
    for damaged in (content[:-100], bytes(flipped)):
        ZIP.write_bytes(damaged)
        message = run("prepare raw data")
        assert message.startswith(f"error: {ZIP}") and "incomplete or corrupted" in message
        assert archive_address in message
    ZIP.unlink()
    message = run("prepare raw data")
    assert "raw: images of NWPU VHR-10 not found" in message
    assert archive_address in message


MISTAKES = [
    ("raw data --splits train test", "NWPU VHR-10 has no 'test' split"),
    ("raw data --patch 400", "--patch, --overlap, --devkit are for iSAID"),
    ("raw raw", "output folder raw is the input folder"),
    ("both data", "both: contains both iSAID and NWPU VHR-10"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_mistakes_get_one_line(flags, message):
    draw_raw(small_content(2), 0)
    shutil.copytree("raw", "both")
    Path("both/train/images").mkdir(parents=True)
    assert message in run(f"prepare {flags}")
    assert not Path("data").exists()
