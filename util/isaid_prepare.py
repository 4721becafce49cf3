"""iSAID's raw release as patches: images and colour-coded masks cut into windows, as COCO.

    python isaid.py prepare RAW OUT

The patches, their names and their annotations are those of the devkit
(github.com/CAPTAIN-WHU/iSAID_Devkit), except that masks are exact run lengths where the devkit
writes polygons through pixel centres, without holes; that annotation ids start at 1, because 0
means "none" to pycocotools; and, unless `devkit` is asked for, that three oddities are left out:
- an image with one side up to `patch` is copied whole there, here it is cut along the longer side;
- an object with a separate part of one or two pixels is dropped there, here it is kept;
- P1527 and P1530 are left out there."""

import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage
from tqdm import tqdm

from util import coco
from util.files import DataError, read_json, write_text
from util.images import check_size, read_image, read_size
from util.synthetic import CLASSES

# fmt: off
COLORS = ((0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255),
           (0, 127, 63), (0, 127, 127), (0, 0, 127), (0, 0, 191), (0, 0, 255), (0, 191, 127),
           (0, 127, 191), (0, 127, 255), (0, 100, 155))  # of CLASSES in the masks
# fmt: on
CATEGORIES = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
FIRST_ID, SMALLEST = 1000, 10  # ids below are no objects; an object must have more pixels
LEFT_OUT = ("P1527", "P1530")
BAND = 512  # rows that are worked on at a time where whole images would need much memory


def tile_intervals(length, patch, overlap):
    """Windows along a side of `length` pixels: [(start, stop)]; the last ends at the border."""
    starts = (max(0, min(start, length - patch)) for start in range(0, length, patch - overlap))
    return [(start, min(start + patch, length)) for start in dict.fromkeys(starts)]


def tile_windows(stem, height, width, patch, overlap, devkit):
    """The patches of an image: [(name, (y0, y1, x0, x1))], row by row."""
    if max(height, width) <= patch or devkit and min(height, width) <= patch:
        return [(f"{stem}.png", (0, height, 0, width))]
    rows, columns = tile_intervals(height, patch, overlap), tile_intervals(width, patch, overlap)
    found = [(*y, *x) for y in rows for x in columns]
    return [(f"{stem}_{'_'.join(map(str, window))}.png", window) for window in found]


# ---------------------------------------------------------------- masks
def pack(colours):
    """Colours (..., 3) as single numbers R + 256 G + 65536 B."""
    return np.asarray(colours) @ (1, 256, 65536)


BY_COLOUR = np.argsort(pack(COLORS))  # an object's class is the lowest of the colours under it
RANK_TO_ID = np.array([0, *(BY_COLOUR + 1), 0])  # of a category; the last rank is "unlabeled"
UNLABELED, UNKNOWN = len(COLORS) + 1, len(COLORS) + 2


@functools.cache
def color_to_class_table():
    table = np.full(2**24, UNKNOWN, np.uint8)
    table[0] = UNLABELED
    table[pack(COLORS)[BY_COLOUR]] = np.arange(1, len(COLORS) + 1)
    return table


def row_chunks(mask):
    """Packed colours, some rows at a time: yields (rows, W) uint32."""
    for top in range(0, mask.height, BAND):
        rows = mask.crop((0, top, mask.width, min(top + BAND, mask.height)))
        packed = np.frombuffer(rows.tobytes("raw", "RGBX"), "<u4")
        yield packed.reshape(rows.height, rows.width) & 0xFFFFFF


def read_class_map(path):
    """The class of every pixel as the rank of its colour: (H, W) uint8. Raises DataError."""
    mask, _ = read_image(path)
    ranks = np.concatenate([color_to_class_table()[colours] for colours in row_chunks(mask)])
    if ranks.max() == UNKNOWN:
        y, x = divmod(int(ranks.argmax()), mask.width)  # the first of them
        colour = mask.getpixel((x, y))
        raise DataError(f"{path}: the colour {colour} at x {x}, y {y} is of no class")
    return ranks


def read_instances(path):
    """The instance of every pixel: (H, W) integers, 0 for none, numbered in order of their ids."""
    mask, _ = read_image(path)
    seen = np.zeros(2**24, bool)
    for colours in row_chunks(mask):
        seen[colours] = True
    seen[:FIRST_ID] = False
    kind = np.uint16 if seen.sum() < 2**16 else np.uint32
    number = np.where(seen, seen.cumsum(dtype=np.uint32), 0).astype(kind)
    return np.concatenate([number[colours] for colours in row_chunks(mask)])


def find_objects(labels, ranks):
    """The objects of a window: labels and ranks (h, w), of `read_instances` and `read_ranks`.
    Returns annotations, without ids, in the devkit's order: by class, then by instance. "tiny":
    the devkit drops it for a part of one or two pixels that lies in no hole of another part."""
    found = []
    for label, here in enumerate(ndimage.find_objects(labels), 1):
        if here is None:  # not in this window
            continue
        mask = labels[here] == label
        area, category = int(mask.sum()), int(RANK_TO_ID[ranks[here][mask].min()])
        if area > SMALLEST and category:
            whole = np.zeros(labels.shape, np.uint8, order="F")
            whole[here] = mask
            rle = coco_mask.encode(whole)
            rle["counts"] = rle["counts"].decode()
            box = [here[1].start, here[0].start, *mask.shape[::-1]]
            tiny = smallest_part(mask) < 3  # looked at first because filling is slow
            tiny = tiny and smallest_part(ndimage.binary_fill_holes(mask)) < 3
            kind = {"category_id": category, "segmentation": rle, "iscrowd": 0}
            found.append({**kind, "area": area, "bbox": box, "tiny": tiny})
    return sorted(found, key=lambda annotation: annotation["category_id"])


def smallest_part(mask):
    """Pixels of the smallest connected part of a mask (h, w)."""
    parts, _ = ndimage.label(mask, np.ones((3, 3)))
    return int(np.bincount(parts.reshape(-1))[1:].min())


# ---------------------------------------------------------------- from the raw release to patches
def tile_image(source, out, labelled, windowing):
    """Cut one image: writes its patches, then its record. Raises DataError.
    source: the image, its masks beside it. The record: [[name, height, width, [annotation]]]."""
    width, height = read_size(source)
    if labelled:
        masks = [source.with_name(f"{source.stem}_instance_{x}_RGB.png") for x in ("id", "color")]
        for path in masks:
            check_size({"width": width, "height": height}, path, read_size(path))
        labels, ranks = read_instances(masks[0]), read_class_map(masks[1])
    image, record = read_image(source)[0], []
    for name, (y0, y1, x0, x1) in tile_windows(source.stem, height, width, **windowing):
        here = slice(y0, y1), slice(x0, x1)
        found = find_objects(labels[here], ranks[here]) if labelled else []
        record.append([name, y1 - y0, x1 - x0, found])
        target = out / "images" / name
        temporary = target.with_name(f".{name}")
        image.crop((x0, y0, x1, y1)).save(temporary, format="PNG", compress_level=4)
        os.replace(temporary, target)
    write_text(out / "parts" / f"{source.stem}.json", json.dumps(record))


def is_tiled(out, stem):
    """Whether an earlier call has finished this image."""
    try:
        record = read_json(out / "parts" / f"{stem}.json")
    except DataError:
        return False
    return all((out / "images" / name).is_file() for name, *_ in record)


def exit_with_parent():
    """Let a worker process end when the command is killed; it would wait for images forever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def tile_images(sources, out, split, windowing, workers):
    """Cut the images that no earlier call has finished; returns [what is wrong with an image]."""
    todo, bad = [path for path in sources if not is_tiled(out, path.stem)], []
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=exit_with_parent) as pool:
        jobs = [pool.submit(tile_image, path, out, split != "test", windowing) for path in todo]
        done = concurrent.futures.as_completed(jobs)
        start = len(sources) - len(todo)
        try:
            for job in tqdm(done, split, len(sources), initial=start, unit="image", disable=None):
                try:
                    job.result()
                except DataError as error:
                    bad.append(str(error))
        except concurrent.futures.BrokenExecutor:
            message = "a process was killed, probably for want of memory"
            raise DataError(f"{out}: {message}; call again with fewer --workers") from None
        except BaseException:  # a full disk, Ctrl-C: the images that wait would go on otherwise
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(bad, key=natural_sort_key)


def init_split_folder(out, target, settings):
    """Make the folder of a split, or accept that of an earlier call with the same settings."""
    note = out / "prepare.json"
    if target.exists() and not note.exists():
        raise DataError(f"{target}: was not made by this command; name another folder")
    before = read_json(note) if note.exists() else settings
    differ = [name for name in settings if before.get(name) != settings[name]]
    if differ:
        text = ", ".join(f"{name} {before.get(name)}, not {settings[name]}" for name in differ)
        raise DataError(f"{out}: was prepared with {text}; name another folder, or remove it")
    for folder in ("images", "parts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(settings))


def natural_sort_key(name):
    """A key that sorts P2 before P10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def sources_of(folder, devkit, limit):
    """The images of a split of the raw release. Raises DataError if there are none."""
    found = [path for path in folder.glob("*") if path.suffix.lower() == ".png" and path.is_file()]
    found = [path for path in found if coco.is_user_file(path.name) and not coco.is_mask(path)]
    found = [path for path in found if not (devkit and path.stem in LEFT_OUT)]
    if not found:
        raise DataError(f"{folder}: holds no images; expected are P0000.png …, as iSAID has them")
    return sorted(found, key=lambda path: natural_sort_key(path.name))[:limit]


def merge(out, target, stems, devkit):
    """Join the records of the images of a split into its annotation file; returns a summary."""
    images, annotations, tiny = [], [], 0
    for stem in stems:
        for name, height, width, objects in read_json(out / "parts" / f"{stem}.json"):
            for found in objects:
                is_tiny = found.pop("tiny")
                tiny += is_tiny
                if not (is_tiny and devkit):
                    ids = {"id": len(annotations) + 1, "image_id": len(images)}
                    annotations.append({**ids, **found})
            images.append({"id": len(images), "file_name": name, "height": height, "width": width})
    text = json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    write_text(target, text)
    counts = f"{len(stems):,} images, {len(images):,} patches, {len(annotations):,} objects"
    dropped = "more are dropped" if devkit else "of them the devkit drops"
    return counts + (f"; {tiny:,} {dropped} for a part of one or two pixels" if tiny else "")


def prepare_split(args, split):
    """Turn a split into patches, or continue an interrupted call; the exit status."""
    folder, out = Path(args.raw) / split / "images", Path(args.out) / split
    if folder.resolve() == (out / "images").resolve():
        raise DataError(f"{folder}: is where the images come from; name another folder")
    windowing = {"patch": args.patch, "overlap": args.overlap, "devkit": args.devkit}
    sources = sources_of(folder, args.devkit, args.limit)
    _, target = coco.split_files(args.out, split)
    init_split_folder(out, target, {**windowing, "limit": args.limit})
    text = "is there already, made with the same settings"
    if not target.exists():
        bad = tile_images(sources, out, split, windowing, args.workers)
        if bad:
            print(*bad, sep="\n", file=sys.stderr)
            advice = "mend or remove them and call again, what is finished is kept"
            print(f"error: {len(bad)} images of {split} are bad; {advice}", file=sys.stderr)
            return 1
        text = merge(out, target, [path.stem for path in sources], args.devkit)
    shutil.rmtree(out / "parts")  # a call that was killed here is finished by the next
    print(f"{target}: {text}")
    return 0


def prepare(args):
    """The command: prepare the splits, print what was done and what is wrong; the exit status."""
    if args.overlap >= args.patch:
        raise DataError(f"--overlap {args.overlap} must be smaller than --patch {args.patch}")
    there = [x for x in ("train", "val", "test") if (Path(args.raw) / x / "images").is_dir()]
    splits = dict.fromkeys(args.splits or there)
    if not splits:
        raise DataError(f"{args.raw}: has no train/images, val/images or test/images")
    return max([prepare_split(args, split) for split in splits])
