"""Check COCO annotation files, clean their boxes, and find the files of a dataset.

Boxes in these files are [x, y, width, height] in pixels. The iSAID patches of isaid_prepare.py are
stored in the same format.
"""

import collections
import math
import os
import re
from dataclasses import dataclass
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
SPLIT_NAMES = {"train": ["train"], "val": ["val", "valid", "validation"], "test": ["test"]}
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

    file_warnings looks at the images' files.

    content: without validation errors; images with annotations have "width" and "height"
    """
    warnings = []
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


# ---------------------------------------------------------------- find a split
@dataclass
class SplitFiles:
    """Where a split of a dataset is: the name of the layout, its images and its annotations."""

    layout: str
    images_dir: Path
    json_path: Path

    def exist(self):
        """Return True if there are both."""
        return self.json_path.is_file() and self.images_dir.is_dir()

    def text(self, root):
        """Return the names of both, relative to the dataset's folder."""
        return f"{self.json_path.relative_to(root)} with {self.images_dir.relative_to(root)}/"


def split_files(root, split):
    """Return the (folder of images, annotation file) of a split of iSAID's patches."""
    folder = Path(root, split)
    return folder / "images", folder / f"instancesonly_filtered_{split}.json"


def possible_splits(root, split):
    """Return where a split can be in the supported layouts, as a list of SplitFiles."""
    images_dir, json_path = split_files(root, split)
    places = [SplitFiles("iSAID patches", images_dir, json_path)]
    for json_path in sorted((root / "annotations").glob("*.json")):
        match = re.fullmatch("(instances|image_info)_(.+)", json_path.stem)  # the latter: test
        if match and splits_named_in(match[2]) == [split]:
            for images_dir in (root / match[2], root / "images" / match[2]):
                places.append(SplitFiles("COCO", images_dir, json_path))
    for name in SPLIT_NAMES[split]:
        folder = root / name
        places.append(SplitFiles("Roboflow", folder, folder / "_annotations.coco.json"))
        places.append(SplitFiles("a file beside each folder", folder, root / f"{name}.json"))
    return places


def splits_named_in(text):
    """Return the splits whose names are words of a text: "val" of val2017, none of trainval."""
    words = set(re.findall("[a-z]+", text.lower()))
    return [split for split, names in SPLIT_NAMES.items() if words.intersection(names)]


def existing_splits(root, split):
    """Return those of the possible_splits that exist; a link to another one counts once."""
    splits = {}
    for place in possible_splits(root, split):
        if place.exist():
            splits.setdefault((place.images_dir.resolve(), place.json_path.resolve()), place)
    return list(splits.values())


def find_split_files(root, split):
    """Find a split of a dataset.

    root:  folder of a dataset in the layout of iSAID's patches, of COCO, of Roboflow, or with
           train.json and val.json or valid.json next to folders of the same names
    split: "train", "val" or "test"
    Returns its SplitFiles. Raises DataError that lists the layouts, or names several such splits.
    """
    root = Path(root)
    splits = existing_splits(root, split)
    if len(splits) == 1:
        return splits[0]
    if splits:
        texts = "; ".join(place.text(root) for place in splits)
        remedy = "keep one, or link one into another folder"
        raise DataError(f"{root}: contains several {split!r} splits ({texts}); {remedy}")
    if not root.exists():
        raise DataError(f"{root}: folder not found")
    roboflow = split
    beside = f"{split}.json beside {split}/"
    if split == "val":
        roboflow = "valid"
        beside += " or valid.json beside valid/"
    raise DataError(
        f"{root}: no annotated {split!r} split found{advice(root, split)}. Supported layouts: "
        f"{split}/images with {split}/instancesonly_filtered_{split}.json (iSAID patches); "
        f"{split}*/ or images/{split}*/ with annotations/instances_{split}*.json (COCO); "
        f"{beside}; images next to {roboflow}/_annotations.coco.json (Roboflow)"
    )


def find_split(root, split):
    """Return (folder of images, annotation file) of a split; see find_split_files."""
    files = find_split_files(root, split)
    return files.images_dir, files.json_path


def advice(root, split):
    """Return what may be wrong with a folder in which there is no such split, or ""."""
    for place in possible_splits(root, split):
        if place.json_path.is_file():
            return f" ({place.json_path} is there, but not the folder {place.images_dir})"
    neighbors = list(Path(os.path.abspath(root)).parents[:2])
    neighbors += sorted(path for path in root.glob("*") if os.access(path, os.X_OK))
    for folder in neighbors:
        if folder.is_dir() and existing_splits(folder, split):
            return f"; there is one in {folder}"
    if split == "test":
        return " (for images without such a file, use python -m tools.predict)"
    return ""


# ---------------------------------------------------------------- find images
def portable_name(name):
    """Return a `file_name`, which may come from Windows, as a path of this machine."""
    return os.path.normpath(name.replace("\\", "/"))


def find_image(folder, name):
    """Return the path of an image by its `file_name`, which may come from another machine.

    The last resort is its base name. If there is no such file, its path is returned all the same.
    """
    portable = portable_name(name)
    candidates = [folder / name, folder / portable, folder / os.path.basename(portable)]
    for path in candidates:
        if path.is_file():
            return path
    return candidates[0]


def file_warnings(folder, images, paths):
    """Return what is probably a mistake about the files of images, as a list of messages.

    folder: of the images
    images: entries of a COCO file
    paths:  of their files, which exist, as find_image returns them
    Raises DataError if entries of different names are read from the same file: then the boxes of
    some of them belong to another picture.
    """
    first_entry = {}  # {the file: (name, path) of the first entry that is read from it}
    repeated = {}
    guessed = []
    for image, path in zip(images, paths):
        name = portable_name(image["file_name"])
        if path not in (folder / image["file_name"], folder / name):
            guessed.append(image["file_name"])
        status = path.stat()
        file_id = (status.st_dev, status.st_ino)  # the same through links, and in upper case
        if file_id not in first_entry:
            first_entry[file_id] = (name, path)
            continue
        first_name, first_path = first_entry[file_id]
        # two paths of one file are links, which are made on purpose
        is_same_path = os.path.normpath(path).lower() == os.path.normpath(first_path).lower()
        if name != first_name and is_same_path:
            raise DataError(
                f"{path}: read for {first_name} and for {name}, so one has the boxes of another "
                "picture; store each image under its own file_name"
            )
        repeated[file_id] = name
    warnings = []
    if repeated:
        names = list(repeated.values())
        warnings.append(
            f"image files listed under several ids: {len(names):,} (first: {names[0]}); "
            "each entry is trained with its own annotations only, so merge the entries"
        )
    if guessed:
        warnings.append(
            f"images found by the last part of their file_name: {len(guessed):,} "
            f"(first: {guessed[0]})"
        )
    return warnings


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


def image_folder(root, split):
    """Return the folder of a split's images, annotated or not; None if there is none.

    Raises DataError if there are several annotated ones.
    """
    root = Path(root)
    if existing_splits(root, split):
        return find_split_files(root, split).images_dir
    for name in SPLIT_NAMES[split]:
        if (root / name).is_dir():
            return root / name
    return None


def find_images(root, split):
    """Find the images of a split for pretraining, which needs no annotations.

    root:  a dataset in one of the layouts of find_split_files; a folder with the subfolders train
           and val, as ImageNet has them; or any folder of images, of which every twentieth is val
    split: "train", "val" or "test"
    Returns (name, paths). Raises DataError.
    """
    needed = ["train", "val"]  # one of them alone may be a class of images
    if split == "test":
        needed = ["test"]
    folders = {name: image_folder(root, name) for name in needed}
    if all(folders.values()):
        return folders[split], image_files(folders[split])
    if split == "test":
        raise DataError(f"{root}: no test images found; expected a folder {Path(root, 'test')}")
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
