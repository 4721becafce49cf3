"""Checks of a dataset: the report of `isaid.py check`, and the summary that train.py prints."""

import collections

import numpy as np
import torch

from util import coco
from util.files import DataError, read_json
from util.images import check_size, read_image

MAX_PRINTED_ERRORS = 20
NUM_QUERIES = {"DETR": 100, "Deformable DETR": 300}  # of the full-size models


# ---------------------------------------------------------------- before training
def class_counts(data):
    """Return the number of boxes of each class, in the order of the labels."""
    return torch.cat(data.labels).bincount(minlength=len(data.categories)).tolist()


def median_side(data):
    """Return the median of the images' longer sides in pixels; None without recorded sizes."""
    sides = [max(image["width"], image["height"]) for image in data.images if "width" in image]
    if not sides:
        return None
    return int(np.median(sides))


def num_subpixel_boxes(data, image_size):
    """Return how many boxes are under a pixel wide or high in images of image_size x image_size.

    Training leaves them out.
    """
    count = 0
    for image, boxes in zip(data.images, data.boxes):
        if len(boxes):
            original_size = torch.tensor([image["width"], image["height"]])
            sides = boxes[:, 2:] * image_size / original_size
            count += int((sides < 1).any(1).sum())
    return count


def summary(data, num_queries, image_size):
    """Return a text about a dataset: its size, and everything unusual about its boxes.

    num_queries: of the detector, which cannot find more objects per image
    image_size:  N if images are resized to N x N pixels, else None
    """
    num_objects = [len(labels) for labels in data.labels]
    lines = [f"{data.name}: {len(data):,} images, {sum(num_objects):,} boxes"]
    for what, count in data.cleaning_counts.items():
        lines.append(f"{count:,} boxes {what}")
    if image_size:
        num_tiny = num_subpixel_boxes(data, image_size)
        if num_tiny:
            lines.append(f"{num_tiny:,} boxes under a pixel after resizing, not trained on")
    num_crowded = sum(n > num_queries for n in num_objects)
    if num_crowded:
        share = f"{num_crowded:,} images ({num_crowded / len(data):.1%})"
        lines.append(f"{share} contain more objects than there are queries ({num_queries})")
    lines += data.warnings
    return f"\n{'':12}".join(lines)


# ---------------------------------------------------------------- the command `check`
def check_dataset(root):
    """Print a report of both splits; return the exit status, 1 if a training would stop on them."""
    classes = {}
    for split in ("train", "val"):
        try:
            files = coco.find_split_files(root, split)
            layout = f"{files.layout} ({files.text(root)})"
            is_train = split == "train"
            report, classes[split] = check(files.images_dir, files.json_path, is_train, layout)
        except DataError as error:
            report = f"error: {error}"
            classes[split] = None
        print(f"{report}\n")
    if classes["train"] is None or classes["val"] is None:
        return 1
    if classes["train"] != classes["val"]:
        print(f"the splits have different classes: {classes['train']} | {classes['val']}")
        return 1
    return 0


def check(images_dir, json_path, train=False, layout=None):
    """Check the COCO file of a split, and read all of its images.

    train:  True if the split must have boxes to train on
    layout: name of the dataset's layout, for the report
    Returns (the report as text, the classes as text or None if there are errors). Raises DataError
    if the file is not JSON.
    """
    content = read_json(json_path)
    errors = coco.validation_errors(content)
    images = []
    if not errors:
        images, errors = read_images(images_dir, content["images"])
        if not content["images"]:
            errors.append("contains no images")
    details = []
    warnings = []
    if images:  # the statistics are of the readable ones
        categories = sorted(content["categories"], key=lambda category: category["id"])
        content = {**content, "images": images, "categories": categories}
        annotations, cleaning_counts = coco.clean_boxes(images, content["annotations"])
        if train and not errors and all(a["iscrowd"] for a in annotations):
            errors.append("contains no boxes to train on")
        details = statistics(content, annotations, cleaning_counts)
        try:
            paths = [coco.find_image(images_dir, image["file_name"]) for image in images]
            warnings += coco.file_warnings(images_dir, images, paths)
        except DataError as error:
            errors.append(str(error))
        warnings += coco.dataset_warnings(content)

    lines = [str(json_path)]
    if layout:
        lines.append(f"  layout   {layout}")
    lines.append(f"  errors   {len(errors):,}")
    for error in errors[:MAX_PRINTED_ERRORS]:
        lines.append(f"    {error}")
    if len(errors) > MAX_PRINTED_ERRORS:
        lines.append(f"    … and {len(errors) - MAX_PRINTED_ERRORS:,} more")
    lines += details
    lines += [f"  warning: {warning}" for warning in warnings]
    report = "\n".join(lines)
    if errors:
        return report, None
    return report, coco.class_names(content["categories"])


def read_images(images_dir, records):
    """Read every image of a COCO file.

    Returns (the records of the readable images with their sizes, messages about the others).
    """
    readable = []
    errors = []
    for record in records:
        path = coco.find_image(images_dir, record["file_name"])
        try:
            _, (width, height) = read_image(path)
            check_size(record, path, (width, height))
            readable.append({**record, "width": width, "height": height})
        except DataError as error:
            errors.append(str(error))
    return readable, errors


def statistics(content, annotations, cleaning_counts):
    """Return lines of text about the images, boxes and classes of a split.

    content:         images with sizes, annotations and categories, as in a COCO file
    annotations:     its annotations after coco.clean_boxes
    cleaning_counts: {what coco.clean_boxes did: number of boxes}
    """
    images = content["images"]
    objects = [a for a in annotations if not a["iscrowd"]]
    sizes = collections.Counter((image["width"], image["height"]) for image in images)
    common = ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes.most_common(5))
    objects_of = collections.Counter(a["image_id"] for a in objects)
    per_image = np.array([objects_of[image["id"]] for image in images])
    median, high, most = np.percentile(per_image, [50, 95, 100])
    lines = [
        f"  images   {len(images):,}, {np.sum(per_image == 0):,} of them without objects",
        f"  sizes    {len(sizes):,}, most often {common}",
        f"  objects  {len(objects):,}; per image: median {median:.0f}, "
        f"95th percentile {high:.0f}, maximum {most:.0f}",
    ]
    lines += class_table(content["categories"], objects)

    ids = [str(a["id"]) for a in content["annotations"] if a.get("id") is not None]
    counts = {f"boxes {what}": count for what, count in cleaning_counts.items()}
    counts["crowd regions, not trained on"] = len(annotations) - len(objects)
    counts["images under 2 pixels"] = sum(n for size, n in sizes.items() if min(size) < 2)
    counts["duplicate annotation ids"] = len(ids) - len(set(ids))
    for what, count in counts.items():
        lines.append(f"  {what:32}  {count:,}")
    for model, num_queries in NUM_QUERIES.items():
        crowded = per_image > num_queries
        share = f"{crowded.sum():,} ({crowded.mean():.1%})"
        lines.append(f"  images with more objects than {model}'s {num_queries} queries  {share}")
    return lines


def class_table(categories, objects):
    """Return lines with the number of boxes of each class and their sizes, sqrt(width * height)."""
    lines = [
        f"  {'id':>4}  {'class':20} {'boxes':>8} {'smallest':>9} {'median':>7} {'largest':>8} px"
    ]
    sizes_of = collections.defaultdict(list)
    for annotation in objects:
        sizes_of[annotation["category_id"]].append(annotation["bbox"][2:])
    without = []
    for category in categories:
        sizes = np.array(sizes_of[category["id"]], dtype=np.float32).reshape(-1, 2)
        line = f"  {category['id']:>4}  {category['name']:20} {len(sizes):8,}"
        if len(sizes):
            sides = np.sqrt(sizes.prod(1))
            smallest, median, largest = np.percentile(sides, [0, 50, 100])
            line += f" {smallest:9.0f} {median:7.0f} {largest:8.0f}"
        else:
            without.append(category["name"])
        lines.append(line)
    if without:
        names = ", ".join(without[:9])
        if len(without) > 9:
            names += f" and {len(without) - 9:,} more"
        lines.append(f"  classes without boxes             {names}")
    return lines
