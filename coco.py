"""Files as users have them: COCO annotations, images, layouts of folders; faults in one line.

Boxes in files are xywh in pixels. The iSAID patches are such files too (see patches.py).
"""

import argparse
import collections
import functools
import json
import math
import re
import sys
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = 2**30  # Pillow warns of more than a tenth of it, but satellites see far
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbones expect
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class DataError(ValueError):
    """Something is wrong with the data; the message names the file, the value and what to do."""


def one_line(error):
    """The message of an error, without the traceback that a loader process puts before it."""
    return (str(error).strip().splitlines() or [repr(error)])[-1].removeprefix("coco.DataError: ")


def number(kind, zero=False, most=2**32, words=()):
    """An argparse type: a number greater than 0, or 0 too, and at most `most`; or a word."""

    def parse(text):
        if text in words:
            return text
        value = kind(text)
        if not (0 < value <= most or zero and value == 0):
            least = "at least" if zero else "greater than"
            raise argparse.ArgumentTypeError(f"{text} is not {least} 0 and at most {most}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"  # argparse: "invalid … value"
    return parse


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Leaves the description as it is and shows defaults, where there are any."""

    def _get_help_string(self, action):
        none = action.default in (None, False, [])
        return action.help if none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Mistakes get one line; @FILE stands for the flags in a file, which may have comments."""

    def __init__(self, **options):
        super().__init__(fromfile_prefix_chars="@", formatter_class=Help, **options)

    def convert_arg_line_to_args(self, line):
        return line.split("#")[0].split()

    def parse_known_args(self, *args, **options):
        try:
            return super().parse_known_args(*args, **options)
        except UnicodeDecodeError:
            self.error("a file named with @ is not a text file of flags")

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def command(main):
    """Decorates the main of a script: wrong input ends it with one line, Ctrl-C with status 130."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {one_line(error)}")
        except KeyboardInterrupt:
            sys.exit(130)

    return run


# ---------------------------------------------------------------- annotations
FIELDS = {
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
}
OPTIONAL = {"width", "height", "area", "iscrowd"}
WORDS = {int: "a whole number", str: "text", list: "a list"}


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}); was it copied completely?") from None


def load_json(path):
    """A COCO file as a dict with images, annotations, categories; DataError if it is not one."""
    coco = read_json(path)
    for fault in faults(coco):
        raise DataError(f"{path}: {fault}")
    return coco


def faults(coco):
    """Everything that makes the content of a COCO file unusable, one message after the other."""
    for key in FIELDS:
        entries = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield f"has no list {key!r}; a COCO file has images, annotations and categories"
            return
    for key, fields in FIELDS.items():
        for i, entry in enumerate(coco[key]):
            yield from (f"entry {i} of {key!r} {fault}" for fault in entry_faults(entry, fields))
    known = {}
    for key in ("images", "categories"):
        ids = [entry["id"] for entry in coco[key] if isinstance(entry.get("id"), int)]
        known[key] = collections.Counter(ids)
        yield from (f"id {i} occurs twice among the {key}" for i, n in known[key].items() if n > 1)
    if not coco["categories"]:
        yield "has no categories"
        return
    for annotation in coco["annotations"]:
        for field, key in (("category_id", "categories"), ("image_id", "images")):
            i = annotation.get(field)
            if isinstance(i, int) and i not in known[key]:
                which = f" {sorted(known[key])}" if len(known[key]) < 30 else ""
                yield (
                    f"annotation {annotation.get('id')} has {field} {i}, "
                    f"which is not among the {key}{which}"
                )
    boxes = [annotation.get("bbox") for annotation in coco["annotations"]]
    if boxes and all(isinstance(b, list) and all(_sensible(v, 0, 1) for v in b) for b in boxes):
        yield (
            "has boxes within 0..1 only; COCO's are in pixels, so multiply them by width and "
            "height of their image"
        )


def entry_faults(entry, fields):
    """What is wrong with the fields of an image, annotation or category."""
    for field, kind in fields.items():
        value = entry.get(field)
        if field not in entry:
            yield f"has no {field!r}"
        elif not isinstance(value, kind):
            yield f"has {field} {value!r:.60}, which is not {WORDS[kind]}"
        elif kind is list and not (  # NaN in a box is removed with a count
            len(value) == 4 and all(isinstance(v, float) or _sensible(v) for v in value)
        ):
            yield f"has bbox {value!r:.60}; it must be 4 numbers, x, y, width, height"
    if isinstance(entry.get("name"), str) and not entry["name"].isprintable():
        yield f"has name {entry['name']!r:.60}, which is not printable text"
    for field in OPTIONAL & entry.keys():
        if entry[field] is not None and not _sensible(entry[field], 0):
            yield f"has {field} {entry[field]!r:.60}, which is not a number of at least 0"


def _sensible(value, low=-(10**9), high=10**9):
    return isinstance(value, (int, float)) and low <= value <= high


def clean_boxes(images, annotations):
    """Annotations with boxes clipped to their images and complete in area and iscrowd.
    Returns (annotations, how many were clipped, how many without area were removed)."""
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in images}
    kept, clipped, removed = [], 0, 0
    for annotation in annotations:
        if annotation["image_id"] not in sizes:  # of an image beyond the limit
            continue
        w, h = sizes[annotation["image_id"]]
        x0, y0, bw, bh = box = [float(v) for v in annotation["bbox"]]
        x1, y1 = min(x0 + bw, w), min(y0 + bh, h)
        x0, y0 = max(x0, 0.0), max(y0, 0.0)
        if not (all(map(math.isfinite, box)) and x1 > x0 and y1 > y0):
            removed += 1
            continue
        inside = [x0, y0, x1 - x0, y1 - y0]
        outside = max(abs(a - b) for a, b in zip(box, inside)) > 1e-3  # more than rounding
        clipped += outside
        kept.append(
            {
                "id": len(kept) + 1,  # pycocotools takes id 0 for "none"
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": inside if outside else box,
                "area": annotation.get("area") or inside[2] * inside[3],
                "iscrowd": int(annotation.get("iscrowd") or 0),
            }
        )
    return kept, clipped, removed


def class_names(categories):
    return ", ".join(f"{c['id']} {c['name']}" for c in categories)


# ---------------------------------------------------------------- layouts of folders
def split_files(root, split):
    """Where iSAID's patches have a split: (folder of images, annotation file)."""
    return Path(root) / split / "images", Path(
        root
    ) / split / f"instancesonly_filtered_{split}.json"


def find_split(root, split):
    """(folder of images, annotation file) of "train", "val" or "test" in one of three layouts:
    iSAID's patches, COCO's own and Roboflow's. Raises DataError that lists them."""
    root, found = Path(root), [split_files(root, split)]
    for path in sorted((root / "annotations").glob(f"*_{split}*.json")):
        if path.name.startswith(("instances_", "image_info_")):  # the latter: test, without objects
            name = re.sub("^(instances|image_info)_", "", path.stem)
            found += [(root / name, path), (root / "images" / name, path)]
    folder = root / {"val": "valid"}.get(split, split)
    found.append((folder, folder / "_annotations.coco.json"))
    for images, annotations in found:
        if annotations.is_file() and images.is_dir():
            return images, annotations
    raise DataError(
        f"{root}: no annotated split {split!r} is recognised there; a dataset has "
        f"{split}/images and {split}/instancesonly_filtered_{split}.json (iSAID's patches), or "
        f"annotations/instances_{split}*.json and {split}*/ or images/{split}*/ (COCO), or "
        f"{folder.name}/_annotations.coco.json beside the images (Roboflow)"
    )


def image_files(folder):
    """All images in a folder and the folders below it, in order; DataError if there are none."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder of images")
    paths = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_mask(path)
    )
    if not paths:
        raise DataError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def is_mask(path):
    """Whether this is one of the masks that iSAID keeps beside its images."""
    return re.search("_instance_(color|id)_RGB", path.stem) is not None


def find_images(root, split):
    """The images of a split for pretraining, without annotations: (a name, paths).
    Of the three layouts, of a folder with train and val in it as ImageNet has them, or of any
    folder of images, of which every twentieth is held out for val. Raises DataError."""
    try:
        folders = {name: find_split(root, name)[0] for name in ("train", "val")}
    except DataError:
        folders = {name: Path(root, name) for name in ("train", "val")}
    if all(folder.is_dir() for folder in folders.values()):
        return folders[split], image_files(folders[split])
    paths = image_files(root)
    if len(paths) < 2:
        raise DataError(f"{root}: holds one image; one is needed to train on and one to hold out")
    mine = [path for i, path in enumerate(paths) if (i % 20 == 0) == (split == "val")]
    return f"{root} ({split})", mine


# ---------------------------------------------------------------- images
def open_image(path):
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: is not an image that can be read, or it is damaged") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: is not an image that can be read ({error})") from None


def read_image(path, at_least=None):
    """(a picture as RGB, its (width, height) in the file). Raises DataError.
    A JPEG is decoded at a half, a quarter or an eighth of its size if that leaves `at_least`
    pixels a side."""
    with open_image(path) as image:
        size = image.size
        if image.mode.startswith(("I", "F")):  # converting would turn nearly all of it white
            raise DataError(
                f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 first"
            )
        try:
            if at_least:
                image.draft("RGB", (at_least, at_least))
            return image.convert("RGB"), size
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
            raise DataError(f"{path}: is damaged ({error}); copy it again or remove it") from None


def check_size(image, name, size):
    """DataError if an image has another size than its annotations say: boxes would be off."""
    said = image.get("width") or size[0], image.get("height") or size[1]
    if said != size:
        raise DataError(
            f"{name} should have {said[0]} x {said[1]} pixels, the file has {size[0]} x {size[1]}"
        )


def unnormalise(images):
    """Images (..., 3, H, W) as the models see them, in 0..1 again."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)
