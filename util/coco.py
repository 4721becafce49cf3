"""Files as users have them: COCO annotations, images, layouts of folders; faults in one line.

Boxes in files are xywh in pixels. The iSAID patches are such files too (see isaid_prepare.py).
"""

import collections
import contextlib
import json
import math
import os
import re
from pathlib import Path

import torch
from PIL import Image, ImageOps, PngImagePlugin

from util.cli import one_line

Image.MAX_IMAGE_PIXELS = 2**30  # Pillow warns of more than a tenth of it, but satellites see far
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # editors leave megabytes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbones expect
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class DataError(ValueError):
    """Something is wrong with the data; the message names the file, the value and what to do."""


@contextlib.contextmanager
def wrap_read_errors(path, what):
    """Whatever a library raises while it reads a file becomes a DataError of one line.
    Only calls of libraries, and looks at what they give, belong into it: our own mistakes elsewhere
    stay visible."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except Exception as error:  # Pillow, json and torch raise a dozen kinds
        why = f"{type(error).__name__}: {one_line(error):.150}"
        raise DataError(f"{path}: is not {what}, or it is damaged ({why})") from None


def read_json(path):
    with wrap_read_errors(path, "valid JSON"):
        return json.loads(Path(path).read_bytes())  # in any of Unicode's encodings


def write_text(path, text):
    """A file that is whole or not there, whenever the process ends. Links are followed, and what
    is no ordinary file stays as it is. Raises DataError."""
    target = resolve_regular_file(path)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None


def resolve_regular_file(path):
    """Where a file is behind links. DataError if a device, a pipe or a folder is there."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise DataError(f"{path}: cannot be written, it is no ordinary file; name another one")
    return target


def check_writable(path):
    """Whether a file can be written, before hours of work depend on it. Raises DataError."""
    target = resolve_regular_file(path)
    there = target.exists()
    try:
        open(target, "a").close()
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    if not there:
        target.unlink()


# ---------------------------------------------------------------- annotations
FIELDS = {
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
}
OPTIONAL = {"width", "height", "area", "iscrowd"}
WORDS = {int: "a whole number", str: "text", list: "a list"}


def load_json(path, truth=True):
    """A COCO file as a dict with images, annotations, categories; DataError if it is not one.
    Without `truth`, as files of test images are, it may have no annotations and no categories."""
    content = read_json(path)
    if not truth and isinstance(content, dict):
        content = {"categories": [], "annotations": [], **content}
    for fault in validation_errors(content, truth):
        raise DataError(f"{path}: {fault}")
    return content


def validation_errors(content, truth=True):
    """Everything that makes the content of a COCO file unusable, one message after the other."""
    for key in FIELDS:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield f"has no list {key!r}; a COCO file has images, annotations and categories"
            return
    for key, fields in FIELDS.items():
        for i, entry in enumerate(content[key]):
            yield from (f"entry {i} of {key!r} {fault}" for fault in validate_entry(entry, fields))
    known = {}
    for key in ("images", "categories"):
        ids = [entry["id"] for entry in content[key] if isinstance(entry.get("id"), int)]
        known[key] = collections.Counter(ids)
        yield from (f"id {i} occurs twice among the {key}" for i, n in known[key].items() if n > 1)
    if truth and not content["categories"]:
        yield "has no categories"
        return
    for annotation in content["annotations"]:
        for field, key in (("category_id", "categories"), ("image_id", "images")):
            i = annotation.get(field)
            if isinstance(i, int) and i not in known[key]:
                which = f" {sorted(known[key])}" if len(known[key]) < 30 else ""
                name = f"annotation {annotation.get('id')}"
                yield f"{name} has {field} {i}, which is not among the {key}{which}"
    boxes = [annotation.get("bbox") for annotation in content["annotations"]]
    if boxes and all(isinstance(b, list) and all(_sensible(v, 0, 1) for v in b) for b in boxes):
        yield "has boxes within 0..1 only; COCO's are in pixels: multiply by the image's sides"


def validate_entry(entry, fields):
    """What is wrong with the fields of an image, annotation or category."""
    for field, kind in fields.items():
        value = entry.get(field)
        if field not in entry:
            yield f"has no {field!r}"
        elif not isinstance(value, kind) or isinstance(value, bool):
            yield f"has {field} {value!r:.60}, which is not {WORDS[kind]}"
        elif kind is list and not (  # NaN in a box is removed with a count
            len(value) == 4 and all(isinstance(v, float) or _sensible(v) for v in value)
        ):
            yield f"has bbox {value!r:.60}; it must be 4 numbers, x, y, width, height"
        elif value == "" or field == "name" and not value.isprintable():
            yield f"has {field} {value!r:.60}, which is not printable text"
    for field in OPTIONAL & entry.keys():
        if entry[field] is not None and not _sensible(entry[field], 0):
            yield f"has {field} {entry[field]!r:.60}, which is not a number of at least 0"


def _sensible(value, low=-(10**9), high=10**9):
    return isinstance(value, (int, float)) and low <= value <= high


def dataset_warnings(content):
    """What a usable COCO file has that its author hardly meant, in lines; images have sizes."""
    images = content["images"]
    files = collections.Counter(os.path.normpath(image["file_name"]) for image in images)
    again = [name for name, n in files.items() if n > 1]
    if again:
        yield (f"{len(again):,} image files have several ids, the first is {again[0]}: each is "
               "trained on with the objects of one id only; join them")  # fmt: skip
    names = collections.Counter(c["name"].strip().lower() for c in content["categories"])
    for name in (name for name, n in names.items() if n > 1):
        yield f"several categories are called {name!r}; a detector cannot tell them apart"
    sizes = {image["id"]: (image.get("width", 0), image.get("height", 0)) for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in sizes]
    boxes = collections.Counter((a["image_id"], a["category_id"], *a["bbox"]) for a in annotations)
    twice = sum(n - 1 for n in boxes.values())
    if twice:
        yield f"{twice:,} annotations are there already: same image, category and box"
    corners = [(*a["bbox"], *sizes[a["image_id"]]) for a in annotations]
    outside = sum(x + w > W or y + h > H for x, y, w, h, W, H in corners)
    fit = all(x < w <= W and y < h <= H for x, y, w, h, W, H in corners)
    if fit and outside > len(corners) / 4:
        yield "the boxes look like x0 y0 x1 y1; COCO's are x y width height"


def clean_boxes(images, annotations):
    """Annotations with boxes inside their images and complete in area and iscrowd.
    Returns (annotations, {what was done: how many boxes})."""
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in images}
    kept, done = [], collections.Counter()
    for annotation in annotations:
        if annotation["image_id"] not in sizes:  # of an image beyond the limit
            continue
        W, H = sizes[annotation["image_id"]]
        x, y, w, h = box = [float(v) for v in annotation["bbox"]]
        if w < 0 or h < 0:  # dragged to the left or upwards
            x, y, w, h = box = [min(x, x + w), min(y, y + h), abs(w), abs(h)]
            done["with negative sides, turned round"] += 1
        x0, y0 = max(x, 0.0), max(y, 0.0)
        x1, y1 = min(x + w, W), min(y + h, H)
        if not (all(map(math.isfinite, box)) and x1 > x0 and y1 > y0):
            done["without area, removed"] += 1
            continue
        inside = [x0, y0, x1 - x0, y1 - y0]
        if max(abs(a - b) for a, b in zip(inside, box)) > 1e-3:
            done["clipped to their image"] += 1
            box = inside
        same = {key: annotation[key] for key in ("image_id", "category_id")}
        area, iscrowd = annotation.get("area") or box[2] * box[3], annotation.get("iscrowd") or 0
        # pycocotools takes id 0 for "none"
        kept.append(
            {"id": len(kept) + 1, **same, "bbox": box, "area": area, "iscrowd": int(iscrowd)}
        )
    return kept, done


def class_names(categories):
    return ", ".join(f"{c['id']} {c['name']}" for c in categories)


# ---------------------------------------------------------------- layouts of folders
def split_files(root, split):
    """Where iSAID's patches have a split: (folder of images, annotation file)."""
    folder = Path(root, split)
    return folder / "images", folder / f"instancesonly_filtered_{split}.json"


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
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    raise DataError(
        f"{root}: no annotated split {split!r} is recognised there; a dataset has "
        f"{split}/images and {split}/instancesonly_filtered_{split}.json (iSAID's patches), or "
        f"annotations/instances_{split}*.json and {split}*/ or images/{split}*/ (COCO), or "
        f"{folder.name}/_annotations.coco.json beside the images (Roboflow)"
    )


def image_files(folder):
    """All images in a folder and the folders below it, in order; DataError if there are none.
    Links are followed, each folder is read once; what systems leave behind is no image."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder of images")
    paths, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(root)
        folders[:] = [] if here in seen else sorted(filter(is_user_file, folders))
        files = [] if here in seen else [Path(root, name) for name in names if is_user_file(name)]
        paths += [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        seen.add(here)
    paths = sorted(path for path in paths if path.is_file() and not is_mask(path))
    if not paths:
        raise DataError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def is_user_file(name):
    """Whether a file or folder was put there by its user, not by the system."""
    return not name.startswith((".", "@eaDir", "__MACOSX"))


def find_image(folder, name):
    """The file of an annotation file's `file_name`, which may come from another machine."""
    plain = name.replace("\\", "/")
    places = [folder / name, folder / plain, folder / plain.rsplit("/", 1)[-1]]
    return next((path for path in places if path.is_file()), places[0])


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
def read_image(path, at_least=None):
    """(a picture as it is displayed, as RGB; its (width, height) so). Raises DataError.
    A JPEG is decoded at a half, a quarter or an eighth of its size if that leaves `at_least`
    pixels a side. What lies under transparency is shown; a fourth band of TIFF is left out."""
    with wrap_read_errors(path, "an image that can be read"), Image.open(path) as image:
        reject_high_bit_depth(path, image)
        turn, size = orientation(image), displayed_size(image)
        if at_least:
            image.draft("RGB", (at_least, at_least))
        image.load()
        image = ImageOps.exif_transpose(image) if turn > 1 else image
        if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
            image = image.convert("RGBA")  # which Pillow turns into RGB without a warning
        return image.convert("RGB"), size


def read_size(path):
    """(width, height) of an image as it is displayed. Raises DataError."""
    with wrap_read_errors(path, "an image that can be read"), Image.open(path) as image:
        return displayed_size(image)


def orientation(image):
    """How a camera was held, 1 to 8, as EXIF says it; 1 is upright."""
    try:
        turn = image.getexif().get(0x0112)
    except Exception:  # the picture itself may be whole
        turn = None
    return turn if turn in range(1, 9) else 1


def displayed_size(image):
    """(width, height) of an opened image after turning it."""
    tags = getattr(image, "tag_v2", {})  # of TIFF, whose size Pillow turns in some versions
    size = (tags[256], tags[257]) if {256, 257} <= tags.keys() else image.size
    return size[::-1] if orientation(image) > 4 else size


def reject_high_bit_depth(path, image):
    """DataError for more than 8 bits a channel: converting would make it white, or nearly black."""
    codec = " ".join(str(part) for tile in image.tile for part in tile)
    deep = image.mode.startswith(("I", "F")) or re.search(r"\w;(16|32)[BLN]|SGI16", codec)
    if image.format == "TIFF":
        deep = deep or max(image.tag_v2.get(258, (8,))) > 8
    if image.format == "PPM":  # the largest value stands last
        deep = deep or int((re.findall(r"\d+", codec) or [255])[-1]) > 255
    if image.format == "JPEG2000":  # the depth is in the header of its code stream
        with open(path, "rb") as file:
            header = file.read(2**16).partition(b"\xff\x4f\xff\x51")[2]
        deep = deep or len(header) > 38 and header[38] % 128 > 7
    if deep:
        message = f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 first"
        raise DataError(f"{path}: {message}")


def check_size(image, name, size):
    """DataError if an image has another size than its annotations say: boxes would be off."""
    said = image.get("width") or size[0], image.get("height") or size[1]
    if said != size:
        raise DataError(
            f"{name} should have {said[0]} x {said[1]} pixels, the file has {size[0]} x {size[1]}"
        )


def unnormalize(images):
    """Images (..., 3, H, W) as the models see them, in 0..1 again."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)
