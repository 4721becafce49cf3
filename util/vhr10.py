"""Arrange NWPU VHR-10, 650 aerial images with 3,921 objects, in the layout of iSAID's patches.

    python isaid.py prepare RAW OUT

RAW holds "NWPU VHR-10 dataset.zip", or the folder that it unpacks to, and annotations.json. The
images stay as they are, and their annotations too. A fifth of the images is held out. The 150
images without objects go to train/images/unlabeled: pretraining uses all images in train/images,
detection those with annotations.

NWPU VHR-10 is for research only: Gong Cheng et al., "Multi-class geospatial object detection and
geographic image classification based on collection of part detectors" (2014).
"""

import json
import zipfile
from pathlib import Path

import numpy as np

from util import coco
from util.files import DataError, write_text
from util.isaid_prepare import OVERLAP, PATCH, check_split_folder, make_split_folder
from util.isaid_raw import Download, find_file, report_damage

VHR10 = "https://hf.co/datasets/isaaccorley/vhr10/resolve"
IMAGES = Download(
    f"{VHR10}/60ecc4be33609184e2224606858cd00b7daba8df",
    "NWPU%20VHR-10%20dataset.zip",
    "76,822,614 bytes, SHA-256 3e8c0299bad6b5d2b4d4034095c3581f50a02bc0dcb97fca70f6ad739f7cbf53",
)
ANNOTATIONS = Download(
    f"{VHR10}/7e7968ad265dadc4494e0ca4a079e0b63dc6f3f8",
    "annotations.json",
    "1,265,416 bytes, SHA-256 dde27d9362d9c6aa358a1cab160c9e075e57405d3fe876de049973c6e6150f0e",
)
POSITIVES = "positive image set"
NEGATIVES = "negative image set"
HELD_OUT = 0.2  # share of the images with objects
SPLIT_SEED = 14  # of the seeds 0 to 19 the one that comes closest to this share in every class
UNLABELED = "unlabeled"  # folder of the images without objects, in train/images


# ---------------------------------------------------------------- find
def find_zip(raw):
    """Return the path of the images' archive in RAW, under any program's spelling; or None."""
    return find_file(raw, "*VHR-10*.zip")


def find_positives(raw):
    """Return the path of the folder of images with objects in RAW; None if there is none."""
    for pattern in (POSITIVES, f"*/{POSITIVES}", f"*/*/{POSITIVES}"):
        for folder in sorted(raw.glob(pattern)):
            return folder
    return None


def has_images(raw):
    """Return True if RAW contains the images of NWPU VHR-10."""
    return find_zip(raw) is not None or find_positives(raw) is not None


def has_annotations(raw):
    """Return True if RAW contains a file with the name of NWPU VHR-10's annotations."""
    return find_file(raw, ANNOTATIONS.name) is not None


def find_images(raw):
    """Return the images with objects and those without, each as {file name: path}.

    The paths are of files, or zipfile.Path if they are in the archive. Raises DataError.
    """
    folder = find_positives(raw)
    archive = find_zip(raw)
    if folder:
        paths = folder.parent.glob("*/*")
    elif archive:
        with report_damage(archive, IMAGES):
            file = zipfile.ZipFile(archive)
        paths = [zipfile.Path(file, name) for name in file.namelist()]
    else:
        raise DataError(f"{raw}: images of NWPU VHR-10 not found; download {IMAGES} into {raw}")
    images = {POSITIVES: {}, NEGATIVES: {}}
    for path in sorted(paths, key=str):
        is_image = Path(path.name).suffix.lower() in coco.IMAGE_SUFFIXES
        if is_image and coco.is_user_file(path.name) and path.parent.name in images:
            images[path.parent.name][path.name] = path
    return images[POSITIVES], images[NEGATIVES]


# ---------------------------------------------------------------- write
def base_name(image):
    """Return the file name of an image's record without folders."""
    return image["file_name"].replace("\\", "/").rpartition("/")[2]


def split_images(images):
    """Return the records of images as {"train": list, "val": list}."""
    images = sorted(images, key=base_name)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(images))  # the same in all versions
    held_out = set(order[: round(HELD_OUT * len(images))].tolist())
    splits = {"train": [], "val": []}
    for i, image in enumerate(images):
        if i in held_out:
            splits["val"].append(image)
        else:
            splits["train"].append(image)
    return splits


def copy_images(paths, folder):
    """Write copies of images into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        with report_damage(path, IMAGES):
            content = path.read_bytes()
        (folder / path.name).write_bytes(content)


def prepare(args):
    """Write the splits, and print a line for each.

    args: raw, out (folders), splits (None: both), limit (images per split, or None); patch,
          overlap and devkit have their default values
    Raises DataError.
    """
    raw = Path(args.raw)
    if (args.patch, args.overlap, args.devkit) != (PATCH, OVERLAP, False):
        raise DataError(f"{raw}: --patch, --overlap, --devkit are for iSAID, not for NWPU VHR-10")
    if raw.resolve() == Path(args.out).resolve():
        raise DataError(f"output folder {raw} is the input folder; choose a different one")
    chosen_splits = args.splits
    if chosen_splits is None:
        chosen_splits = ["train", "val"]
    if "test" in chosen_splits:
        raise DataError(f"{raw}: NWPU VHR-10 has no 'test' split; choose train or val")
    annotation_file = find_file(raw, ANNOTATIONS.name)
    if not annotation_file:
        raise DataError(f"{raw}: {ANNOTATIONS.name} not found; download {ANNOTATIONS} into {raw}")
    content = coco.load_json(annotation_file)
    positives, negatives = find_images(raw)
    names = [base_name(image) for image in content["images"]]
    missing = [name for name in names if name not in positives]
    if missing:
        problem = f"{len(missing):,} of {len(names):,} images not found (first: {missing[0]})"
        raise DataError(f"{annotation_file}: {problem}; download {IMAGES} again")

    splits = split_images(content["images"])
    for split in chosen_splits:
        out = Path(args.out, split)
        images_dir, target = coco.split_files(args.out, split)
        settings = {"dataset": "NWPU VHR-10", "seed": SPLIT_SEED, "limit": args.limit}
        check_split_folder(out, target, settings)
        make_split_folder(out, settings)
        images = splits[split][: args.limit]
        copy_images([positives[base_name(image)] for image in images], images_dir)
        remark = ""
        if split == "train":
            copy_images(negatives.values(), images_dir / UNLABELED)
            remark = f"; {len(negatives):,} unlabeled images in {images_dir / UNLABELED}"
        summary = write_annotations(target, content, images)
        print(f"{target}: {summary}{remark}")


def write_annotations(target, content, images):
    """Write the part of a COCO file, content, that belongs to some images; returns a summary."""
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    write_text(target, json.dumps({**content, "images": images, "annotations": annotations}))
    return f"{len(images):,} images, {len(annotations):,} objects"
