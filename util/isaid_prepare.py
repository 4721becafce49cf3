"""Cut iSAID's raw release into patches: images and color-coded masks in, a COCO dataset out.

    python isaid.py prepare RAW OUT

isaid_raw.py says what RAW may contain. The patches, their names and their annotations are those of
the official devkit (github.com/CAPTAIN-WHU/iSAID_Devkit), with these differences:
- A mask is an exact run-length encoding. The devkit writes polygons through the centers of the
  pixels and fills holes.
- Annotation ids start at 1, because to pycocotools 0 means "none".
Three oddities of the devkit are reproduced with --devkit only:
- It copies an image whole if one side is at most `patch`; we cut it along the longer side.
- It drops an object if one of its separate parts has one or two pixels; we keep it.
- It leaves out the images P1527 and P1530.
"""

import concurrent.futures
import contextlib
import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage
from tqdm import tqdm

from util import coco, isaid_raw
from util.files import DataError, FolderLock, read_json, remove_unfinished, replace_file, write_text
from util.images import check_size, read_image, read_size
from util.loader_processes import exit_with_parent

# The color of each class in iSAID's masks; the classes are in the order of the category ids
CLASS_COLORS = {
    "ship": (0, 0, 63),
    "storage_tank": (0, 63, 63),
    "baseball_diamond": (0, 63, 0),
    "tennis_court": (0, 63, 127),
    "basketball_court": (0, 63, 191),
    "Ground_Track_Field": (0, 63, 255),
    "Bridge": (0, 127, 63),
    "Large_Vehicle": (0, 127, 127),
    "Small_Vehicle": (0, 0, 127),
    "Helicopter": (0, 0, 191),
    "Swimming_pool": (0, 0, 255),
    "Roundabout": (0, 191, 127),
    "Soccer_ball_field": (0, 127, 191),
    "plane": (0, 127, 255),
    "Harbor": (0, 100, 155),
}
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(CLASS_COLORS, start=1)]
FIRST_INSTANCE_ID = 1000  # lower numbers in the masks of instances are not objects
MIN_PIXELS = 11  # the devkit ignores smaller objects
NOTE_NAME = "prepare.json"  # in the folder of a split: the settings it was prepared with
ROWS_PER_CHUNK = 512  # to convert a whole mask at once would need gigabytes
PATCH = 800  # pixels per side of a patch, by default
OVERLAP = 200  # pixels that neighboring patches share, by default


# ---------------------------------------------------------------- windows
def tile_intervals(length, patch, overlap):
    """Return the windows along a side of an image: [(start, stop)]; the last ends at the border.

    length:  pixels of the side
    patch:   pixels of a window; a shorter side is one window
    overlap: pixels that neighboring windows share at least
    """
    intervals = []
    for start in range(0, length, patch - overlap):
        start = max(0, min(start, length - patch))
        interval = (start, min(start + patch, length))
        if interval not in intervals:
            intervals.append(interval)
    return intervals


def tile_windows(stem, height, width, patch, overlap, devkit):
    """Return the patches of an image, row by row: [(file name, (y0, y1, x0, x1))].

    stem:           name of the image's file without its suffix
    height, width:  of the image in pixels
    patch, overlap: of the windows, as in tile_intervals
    devkit:         True: an image with one side of at most `patch` is a single patch
    """
    is_single = max(height, width) <= patch
    if devkit:
        is_single = min(height, width) <= patch
    if is_single:
        return [(f"{stem}.png", (0, height, 0, width))]
    windows = []
    for y0, y1 in tile_intervals(height, patch, overlap):
        for x0, x1 in tile_intervals(width, patch, overlap):
            windows.append((f"{stem}_{y0}_{y1}_{x0}_{x1}.png", (y0, y1, x0, x1)))
    return windows


# ---------------------------------------------------------------- masks
def pack_colors(colors):
    """Return colors (..., 3) as single numbers R + 256 G + 65536 B."""
    return np.asarray(colors) @ (1, 256, 65536)


# The devkit gives an object the class with the lowest packed color under it. A class map therefore
# holds for each pixel the rank of its color among the sorted class colors, from 1: the smallest
# value under an object is its class. UNLABELED is larger, so it decides only where it stands alone.
PACKED_COLORS = pack_colors(list(CLASS_COLORS.values()))
SORTED_CLASSES = np.argsort(PACKED_COLORS)
UNLABELED = len(CLASS_COLORS) + 1  # black
UNKNOWN = len(CLASS_COLORS) + 2  # any other color; an error
CATEGORY_IDS = np.concatenate([[0], SORTED_CLASSES + 1, [0]])  # by value in a class map; 0: none


@functools.cache
def color_to_class_table():
    """Return the value in a class map of every packed color: (2**24,) uint8."""
    table = np.full(2**24, UNKNOWN, np.uint8)
    table[0] = UNLABELED
    table[PACKED_COLORS[SORTED_CLASSES]] = np.arange(1, len(CLASS_COLORS) + 1)
    return table


def row_chunks(mask):
    """Yield the packed colors of a mask, some rows at a time: (rows, W) uint32."""
    for top in range(0, mask.height, ROWS_PER_CHUNK):
        rows = mask.crop((0, top, mask.width, min(top + ROWS_PER_CHUNK, mask.height)))
        colors = np.frombuffer(rows.tobytes("raw", "RGBX"), "<u4")
        yield colors.reshape(rows.height, rows.width) & 0xFFFFFF


def read_class_map(path):
    """Read a mask of classes; returns the class map (H, W) uint8, see SORTED_CLASSES.

    Raises DataError for a color of no class.
    """
    mask, _ = read_image(path)
    table = color_to_class_table()
    class_map = np.concatenate([table[colors] for colors in row_chunks(mask)])
    if class_map.max() == UNKNOWN:
        y, x = divmod(int(class_map.argmax()), mask.width)  # the first such pixel
        color = mask.getpixel((x, y))
        raise DataError(f"{path}: color {color} at (x={x}, y={y}) does not belong to any class")
    return class_map


def read_instances(path):
    """Read a mask of instances; returns labels (H, W): 0 for no object, 1, 2, ... by their ids."""
    mask, _ = read_image(path)
    is_used = np.zeros(2**24, bool)
    for ids in row_chunks(mask):
        is_used[ids] = True
    is_used[:FIRST_INSTANCE_ID] = False
    dtype = np.uint16 if is_used.sum() < 2**16 else np.uint32
    label_of_id = np.where(is_used, is_used.cumsum(dtype=np.uint32), 0).astype(dtype)
    return np.concatenate([label_of_id[ids] for ids in row_chunks(mask)])


def find_objects(labels, class_map):
    """Return the annotations of a window in the devkit's order: by class, then by instance.

    labels:    (h, w) of read_instances
    class_map: (h, w) of read_class_map
    The annotations have no ids yet. "tiny" says that the devkit drops the object.
    """
    annotations = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:  # not in this window
            continue
        rows, columns = box
        mask = labels[box] == label
        area = int(mask.sum())
        category_id = int(CATEGORY_IDS[class_map[box][mask].min()])
        if area < MIN_PIXELS or category_id == 0:
            continue
        h, w = mask.shape
        annotations.append(
            {
                "category_id": category_id,
                "segmentation": encode_mask(mask, box, labels.shape),
                "iscrowd": 0,
                "area": area,
                "bbox": [columns.start, rows.start, w, h],
                "tiny": has_tiny_part(mask),
            }
        )
    return sorted(annotations, key=lambda annotation: annotation["category_id"])


def encode_mask(mask, box, window_shape):
    """Return COCO's run-length encoding of an object's mask in its window.

    mask:         (h, w) bool, of the object's bounding box
    box:          two slices, rows and columns of that box in the window
    window_shape: (height, width)
    """
    window = np.zeros(window_shape, np.uint8, order="F")
    window[box] = mask
    encoding = coco_mask.encode(window)
    encoding["counts"] = encoding["counts"].decode()
    return encoding


def has_tiny_part(mask):
    """Return True if a part of a mask (h, w) has one or two pixels and lies in no hole of another.

    For such a part the devkit drops the whole object.
    """
    if smallest_part(mask) > 2:  # tested first because filling is slow
        return False
    return smallest_part(ndimage.binary_fill_holes(mask)) <= 2


def smallest_part(mask):
    """Return the number of pixels of the smallest connected part of a mask (h, w)."""
    parts, _ = ndimage.label(mask, np.ones((3, 3)))
    return int(np.bincount(parts.reshape(-1))[1:].min())


# ---------------------------------------------------------------- images
def tile_image(source, out, windowing):
    """Write the patches of an image, and then a record of them in the folder `parts`.

    source:    isaid_raw.Source
    out:       folder of the split
    windowing: {"patch", "overlap", "devkit"} for tile_windows
    The record, [[file name, height, width, annotations] of each patch], tells the next call that
    the image is finished. Temporary files are deleted. Raises DataError.
    """
    try:
        record = write_patches(source, out, windowing)
    finally:
        for path in source.temporary:
            path.unlink()
    write_text(out / "parts" / f"{source.image.stem}.json", json.dumps(record))


def write_patches(source, out, windowing):
    """Write the patches of an image; returns their record. See tile_image."""
    width, height = read_size(source.image)
    if source.masks:
        for path in source.masks:
            check_size({"width": width, "height": height}, path, read_size(path))
        instance_mask, class_mask = source.masks
        labels = read_instances(instance_mask)
        class_map = read_class_map(class_mask)
    image, _ = read_image(source.image)
    record = []
    for name, (y0, y1, x0, x1) in tile_windows(source.image.stem, height, width, **windowing):
        annotations = []
        if source.masks:
            annotations = find_objects(labels[y0:y1, x0:x1], class_map[y0:y1, x0:x1])
        record.append([name, y1 - y0, x1 - x0, annotations])
        with replace_file(out / "images" / name) as temporary:
            image.crop((x0, y0, x1, y1)).save(temporary, format="PNG", compress_level=4)
    return record


def is_tiled(out, stem):
    """Return True if an earlier call has finished an image."""
    try:
        record = read_json(out / "parts" / f"{stem}.json")
    except DataError:
        return False
    return all((out / "images" / patch[0]).is_file() for patch in record)


def finished_jobs(pool, sources, out, windowing, limit):
    """Cut images in a pool of processes and yield their jobs as they finish, in any order.

    sources: an iterator; the next source is read when fewer than `limit` images are being cut
    out, windowing: see tile_image
    """
    jobs = set()
    for source in sources:
        jobs.add(pool.submit(tile_image, source, out, windowing))
        if len(jobs) == limit:
            is_first = concurrent.futures.FIRST_COMPLETED
            finished, jobs = concurrent.futures.wait(jobs, return_when=is_first)
            yield from finished
    yield from concurrent.futures.as_completed(jobs)


def tile_images(raw_split, out, windowing, workers):
    """Cut the images that no earlier call has finished, in several processes.

    Returns a message for each image that could not be processed. Raises DataError.
    """
    num_images = len(raw_split.stems)
    todo = [stem for stem in raw_split.stems if not is_tiled(out, stem)]
    sources = raw_split.sources(todo, out / "parts")
    errors = []
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=exit_with_parent) as pool:
        progress = tqdm(
            finished_jobs(pool, sources, out, windowing, workers + 2),
            desc=raw_split.split,
            total=num_images,
            initial=num_images - len(todo),
            unit="image",
            disable=None,  # unless a terminal shows it
        )
        try:
            for job in progress:
                try:
                    job.result()
                except DataError as error:
                    errors.append(str(error))
        except concurrent.futures.BrokenExecutor:
            problem = "a worker process was killed, probably out of memory"
            raise DataError(f"{out}: {problem}; retry with fewer --workers") from None
        except BaseException:  # a full disk, Ctrl-C: the waiting images would be cut first
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(errors, key=isaid_raw.natural_sort_key)


# ---------------------------------------------------------------- splits
def check_split_folder(out, target, settings):
    """Raise DataError unless a split's folder is new or of an earlier call with the same settings.

    out:    the folder
    target: the annotation file that will be written
    """
    note = out / NOTE_NAME
    if note.exists():
        previous = read_json(note)
        differences = []
        for name, value in settings.items():
            if previous.get(name) != value:
                differences.append(f"{name} {previous.get(name)}, not {value}")
        if differences:
            problem = f"was prepared with different settings ({', '.join(differences)})"
            raise DataError(f"{out}: {problem}; choose another folder or delete this one")
    elif target.exists():
        problem = "exists but was not written by this command"
        raise DataError(f"{target}: {problem}; choose a different output folder")


def make_split_folder(out, settings):
    """Make the folder of a split, with a note of the settings."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    remove_unfinished(out / "images")
    write_text(out / NOTE_NAME, json.dumps(settings))


def merge_records(out, target, stems, devkit):
    """Join the records of the images of a split into its annotation file; returns a summary."""
    images = []
    annotations = []
    num_tiny = 0
    for stem in stems:
        for name, height, width, objects in read_json(out / "parts" / f"{stem}.json"):
            for annotation in objects:
                is_tiny = annotation.pop("tiny")
                num_tiny += is_tiny
                if not (is_tiny and devkit):
                    ids = {"id": len(annotations) + 1, "image_id": len(images)}
                    annotations.append({**ids, **annotation})
            images.append({"id": len(images), "file_name": name, "height": height, "width": width})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_text(target, json.dumps(content))
    summary = f"{len(stems):,} images, {len(images):,} patches, {len(annotations):,} objects"
    if num_tiny and devkit:
        summary += f"; {num_tiny:,} more dropped because a part has one or two pixels"
    elif num_tiny:
        summary += f"; {num_tiny:,} of them dropped by the devkit: a part has one or two pixels"
    return summary


def prepare_split(args, split):
    """Cut a split into patches, or continue an interrupted call; returns the exit status."""
    folder = Path(args.raw, split, "images")
    out = Path(args.out, split)
    if folder.resolve() == (out / "images").resolve():
        raise DataError(f"output folder {folder} is the input folder; choose a different one")
    settings = {"patch": args.patch, "overlap": args.overlap, "devkit": args.devkit}
    settings["limit"] = args.limit
    _, target = coco.split_files(args.out, split)
    check_split_folder(out, target, settings)
    if target.exists():
        shutil.rmtree(out / "parts", ignore_errors=True)  # an earlier call was killed before it
        print(f"{target}: already exists, prepared with the same settings")
        return 0
    raw_split = isaid_raw.RawSplit(Path(args.raw), split, args.devkit, args.limit)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(FolderLock(out)):
        make_split_folder(out, settings)
        return cut_split(raw_split, out, target, args)


def cut_split(raw_split, out, target, args):
    """Cut the images of a split, and write its annotation file; returns the exit status.

    out:    the folder of the split
    target: the annotation file
    """
    (out / "parts").mkdir(exist_ok=True)
    windowing = {"patch": args.patch, "overlap": args.overlap, "devkit": args.devkit}
    errors = tile_images(raw_split, out, windowing, args.workers)
    if errors:
        print("\n".join(errors), file=sys.stderr)
        problem = f"{len(errors)} images in {raw_split.split!r} could not be processed"
        remedy = "fix or remove them and rerun (finished images are kept)"
        print(f"error: {problem}; {remedy}", file=sys.stderr)
        return 1
    summary = merge_records(out, target, raw_split.stems, args.devkit)
    shutil.rmtree(out / "parts", ignore_errors=True)
    print(f"{target}: {summary}")
    return 0


def prepare(args):
    """Prepare the splits of a raw release, print a line for each; returns the exit status.

    args: raw, out (folders), splits (None: all that exist), patch, overlap (pixels), devkit,
          limit (images per split, or None), workers (processes)
    Raises DataError.
    """
    if args.overlap >= args.patch:
        raise DataError(f"--overlap {args.overlap} must be smaller than --patch {args.patch}")
    splits = args.splits
    if not splits:
        splits = isaid_raw.find_splits(Path(args.raw))
        for split, images in isaid_raw.IMAGE_ARCHIVES.items():
            if split not in splits:
                files = f"{images} and {isaid_raw.MASK_ARCHIVES[split]}"
                note = f"no {split!r} split, which training needs; download {files} into it"
                print(f"note: {args.raw} has {note}", file=sys.stderr)
    statuses = [prepare_split(args, split) for split in dict.fromkeys(splits)]  # each once
    return max(statuses)
