"""Check COCO annotation files, clean their boxes, and find the files of a dataset.

Boxes in these files are [x, y, width, height] in pixels. The iSAID patches of isaid_prepare.py are
stored in the same format.
"""

import collections
import math
import os
import re
from pathlib import Path

from util.files import DataError, read_json

# The fields that each entry of a list must have, with their types
REQUIRED_FIELDS = {
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
}
OPTIONAL_NUMBERS = ("width", "height", "area", "iscrowd")
TYPE_NAMES = {int: "an integer", str: "a string", list: "a list"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


# ---------------------------------------------------------------- check annotations
def load_json(path, require_annotations=True):
    """Read a COCO file.

    require_annotations: False for files of test images, where the lists "categories" and
                         "annotations" may be empty or absent
    Returns a dict with the lists "images", "annotations" and "categories". Raises DataError.
    """
    content = read_json(path)
    if isinstance(content, dict) and not require_annotations:
        content.setdefault("categories", [])
        content.setdefault("annotations", [])
    errors = validation_errors(content, require_annotations)
    if errors:
        raise DataError(f"{path}: {errors[0]}")
    return content


def validation_errors(content, require_annotations=True):
    """Return all errors that make the content of a COCO file unusable, as a list of messages."""
    for key in REQUIRED_FIELDS:
        if not isinstance(content, dict) or not is_list_of_dicts(content.get(key)):
            lists = '"images", "annotations" and "categories"'
            return [f"missing list {key!r}; a COCO file must contain {lists}"]
    errors = []
    for key, fields in REQUIRED_FIELDS.items():
        for i, entry in enumerate(content[key]):
            for error in validate_entry(entry, fields):
                errors.append(f"entry {i} of {key!r}: {error}")
    for key in ("images", "categories"):
        for entry_id, count in count_ids(content[key]).items():
            if count > 1:
                errors.append(f"duplicate id {entry_id} in {key!r}: {count} entries have it")
    if require_annotations and not content["categories"]:
        errors.append("contains no categories")
        return errors
    errors += reference_errors(content)
    if boxes_are_fractions(content["annotations"]):
        errors.append(
            "all boxes lie within [0, 1], but COCO boxes are in pixels; multiply x and width by "
            "the image width, y and height by the image height"
        )
    return errors


def validate_entry(entry, fields):
    """Return what is wrong with an image, annotation or category, as a list of messages.

    fields: {name of a field that it must have: type}
    The messages show at most 60 characters of a value.
    """
    errors = []
    for field, kind in fields.items():
        if field not in entry:
            errors.append(f"missing {field!r}")
            continue
        value = entry[field]
        if not isinstance(value, kind) or isinstance(value, bool):
            errors.append(f"{field} must be {TYPE_NAMES[kind]}, got {value!r:.60}")
        elif kind is list and not is_box(value):
            errors.append(f"bbox must be [x, y, width, height] (4 numbers), got {value!r:.60}")
        elif value == "" or (field == "name" and not value.isprintable()):
            errors.append(f"{field} must be non-empty printable text, got {value!r:.60}")
    for field in OPTIONAL_NUMBERS:
        value = entry.get(field)
        if value is not None and not is_number_in(value, 0):
            errors.append(f"{field} must be a non-negative number, got {value!r:.60}")
    return errors


def reference_errors(content):
    """Return a message for each image or category that an annotation names and that is absent."""
    errors = []
    for field, key in (("category_id", "categories"), ("image_id", "images")):
        existing = count_ids(content[key])
        choices = ""
        if len(existing) < 30:
            choices = f" {sorted(existing)}"
        for annotation in content["annotations"]:
            entry_id = annotation.get(field)
            if isinstance(entry_id, int) and entry_id not in existing:
                name = f"annotation {annotation.get('id')}"
                errors.append(f"{name}: {field} {entry_id} does not exist in {key!r}{choices}")
    return errors


def is_list_of_dicts(value):
    """Return True if a value is a list whose entries are all dicts."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def is_number_in(value, low=-(10**9), high=10**9):
    """Return True if a value is a number from `low` to `high`; NaN is not."""
    return isinstance(value, (int, float)) and low <= value <= high


def is_box(values):
    """Return True for a list of 4 numbers, also NaN and infinity: clean_boxes counts those."""
    return len(values) == 4 and all(isinstance(v, float) or is_number_in(v) for v in values)


def boxes_are_fractions(annotations):
    """Return True if there are boxes and all their numbers lie in 0..1."""
    for annotation in annotations:
        box = annotation.get("bbox")
        if not isinstance(box, list) or not all(is_number_in(value, 0, 1) for value in box):
            return False
    return len(annotations) > 0


def count_ids(entries):
    """Return {id: number of entries that have it}."""
    ids = [entry["id"] for entry in entries if isinstance(entry.get("id"), int)]
    return collections.Counter(ids)


# ---------------------------------------------------------------- warn about annotations
def dataset_warnings(content):
    """Return what is valid in a COCO file but probably a mistake, as a list of messages.

    content: without validation errors; images with annotations have "width" and "height"
    """
    warnings = []
    files = collections.Counter(os.path.normpath(image["file_name"]) for image in content["images"])
    repeated = [name for name, count in files.items() if count > 1]
    if repeated:
        warnings.append(
            f"image files listed under several ids: {len(repeated):,} (first: {repeated[0]}); "
            "each entry is trained with its own annotations only, so merge the entries"
        )
    names = collections.Counter(c["name"].strip().lower() for c in content["categories"])
    for name, count in names.items():
        if count > 1:
            warnings.append(f"duplicate category name {name!r}; merge these categories")
    sizes = {}
    for image in content["images"]:
        sizes[image["id"]] = (image.get("width", 0), image.get("height", 0))
    annotations = [a for a in content["annotations"] if a["image_id"] in sizes]
    distinct = {(a["image_id"], a["category_id"], tuple(a["bbox"])) for a in annotations}
    duplicates = len(annotations) - len(distinct)
    if duplicates:
        warnings.append(f"duplicate annotations (same image, category and box): {duplicates:,}")
    if boxes_look_like_corners(annotations, sizes):
        warnings.append("boxes look like [x0, y0, x1, y1]; COCO expects [x, y, width, height]")
    return warnings


def boxes_look_like_corners(annotations, sizes):
    """Return True if all boxes fit their images as [x0, y0, x1, y1], but many do not as COCO's.

    sizes: {image id: (width, height)}
    """
    outside = 0  # boxes that end outside their image if they are [x, y, width, height]
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        image_width, image_height = sizes[annotation["image_id"]]
        if not (x < w <= image_width and y < h <= image_height):
            return False
        if x + w > image_width or y + h > image_height:
            outside += 1
    return outside > len(annotations) / 4


# ---------------------------------------------------------------- clean annotations
def clean_boxes(images, annotations):
    """Clip boxes to their images, remove empty ones, and complete "area" and "iscrowd".

    Annotations of other images than `images` are left out.
    Returns (new annotations, {what was done: to how many boxes}).
    """
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in images}
    cleaned = []
    counts = collections.Counter()
    for annotation in annotations:
        if annotation["image_id"] not in sizes:
            continue
        box = [float(value) for value in annotation["bbox"]]
        if box[2] < 0 or box[3] < 0:  # dragged to the left or upwards
            box = with_positive_sides(box)
            counts["with negative sides, corrected"] += 1
        clipped = clip_box(box, sizes[annotation["image_id"]])
        is_finite = all(math.isfinite(value) for value in box)
        if not is_finite or clipped[2] <= 0 or clipped[3] <= 0:
            counts["without area, removed"] += 1
            continue
        if max(abs(a - b) for a, b in zip(clipped, box)) > 1e-3:  # more than rounding
            counts["clipped to their image"] += 1
            box = clipped
        area = annotation.get("area")
        if not area:
            area = box[2] * box[3]
        iscrowd = annotation.get("iscrowd")
        if iscrowd is None:
            iscrowd = 0
        cleaned.append(
            {
                "id": len(cleaned) + 1,  # to pycocotools, id 0 means "none"
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": box,
                "area": area,
                "iscrowd": int(iscrowd),
            }
        )
    return cleaned, counts


def with_positive_sides(box):
    """Return the same xywh box from its upper left corner."""
    x, y, w, h = box
    return [min(x, x + w), min(y, y + h), abs(w), abs(h)]


def clip_box(box, size):
    """Return the part of an xywh box inside an image.

    size: (width, height) of the image
    If the box lies outside, a side of the result is zero or negative.
    """
    x, y, w, h = box
    x0 = max(x, 0.0)
    y0 = max(y, 0.0)
    x1 = min(x + w, size[0])
    y1 = min(y + h, size[1])
    return [x0, y0, x1 - x0, y1 - y0]


def class_names(categories):
    """Return the ids and names of categories as text."""
    return ", ".join(f"{category['id']} {category['name']}" for category in categories)


# ---------------------------------------------------------------- find files
def split_files(root, split):
    """Return the (folder of images, annotation file) of a split of iSAID's patches."""
    folder = Path(root, split)
    return folder / "images", folder / f"instancesonly_filtered_{split}.json"


def find_split(root, split):
    """Find a split of a dataset in the layout of iSAID's patches, of COCO or of Roboflow.

    split: "train", "val" or "test"
    Returns (folder of images, annotation file). Raises DataError that lists the layouts.
    """
    root = Path(root)
    candidates = [split_files(root, split)]
    for path in sorted((root / "annotations").glob(f"*_{split}*.json")):
        if path.name.startswith(("instances_", "image_info_")):  # the latter: test, no annotations
            name = re.sub("^(instances|image_info)_", "", path.stem)
            candidates.append((root / name, path))
            candidates.append((root / "images" / name, path))
    roboflow = root / split
    if split == "val":
        roboflow = root / "valid"
    candidates.append((roboflow, roboflow / "_annotations.coco.json"))
    for images, annotations in candidates:
        if annotations.is_file() and images.is_dir():
            return images, annotations
    if not root.is_dir():
        raise DataError(f"{root}: folder not found")
    raise DataError(
        f"{root}: no annotated {split!r} split found. Supported layouts: "
        f"{split}/images with {split}/instancesonly_filtered_{split}.json (iSAID patches); "
        f"{split}*/ or images/{split}*/ with annotations/instances_{split}*.json (COCO); "
        f"images next to {roboflow.name}/_annotations.coco.json (Roboflow)"
    )


def find_image(folder, name):
    """Return the path of an image by its `file_name`, which may come from another machine."""
    portable = name.replace("\\", "/")
    candidates = [folder / name, folder / portable, folder / portable.rsplit("/", 1)[-1]]
    for path in candidates:
        if path.is_file():
            return path
    return candidates[0]


def image_files(folder):
    """Return the sorted paths of all images in a folder and its subfolders.

    Links to folders are followed, but each folder is read once. Hidden files, files of the
    operating system and iSAID's masks are left out. Raises DataError if there are no images.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: image folder not found")
    paths = []
    visited = set()
    for root, subfolders, names in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(root)
        if real_path in visited:
            subfolders.clear()  # os.walk goes no deeper
            continue
        visited.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if is_user_file(name))
        for name in names:
            path = Path(root, name)
            is_image = path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
            if is_image and is_user_file(name) and not is_mask(path):
                paths.append(path)
    if not paths:
        formats = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder}: contains no images (supported formats: {formats})")
    return sorted(paths)


def is_user_file(name):
    """Return False for the names of files and folders that operating systems leave behind."""
    return not name.startswith((".", "@eaDir", "__MACOSX"))


def is_mask(path):
    """Return True for the masks that iSAID stores next to its images."""
    return re.search("_instance_(color|id)_RGB", path.stem) is not None


def find_images(root, split):
    """Find the images of a split for pretraining, which needs no annotations.

    root:  a dataset in one of the layouts of find_split; a folder with the subfolders train and
           val, as ImageNet has them; or any folder of images, of which every twentieth is val
    split: "train" or "val"
    Returns (name, paths). Raises DataError.
    """
    try:
        folders = {name: find_split(root, name)[0] for name in ("train", "val")}
    except DataError:
        folders = {name: Path(root, name) for name in ("train", "val")}
    if all(folder.is_dir() for folder in folders.values()):
        return folders[split], image_files(folders[split])
    paths = image_files(root)
    if len(paths) < 2:
        raise DataError(
            f"{root}: contains only one image; need at least two (one for training, one for "
            "validation)"
        )
    if split == "val":
        selected = paths[::20]
    else:
        selected = [path for i, path in enumerate(paths) if i % 20 != 0]
    return f"{root} ({split})", selected
