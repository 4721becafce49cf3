"""Files as users have them: COCO annotations, images, layouts of folders; faults in one line.

Boxes in files are xywh in pixels. The iSAID patches are such files too (see isaid_prepare.py).
"""

import collections
import math
import os
import re
from pathlib import Path

from util.files import DataError, read_json

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


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
