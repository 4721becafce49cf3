"""iSAID's raw release as patches: images and colour-coded masks cut into windows, as COCO.

    python isaid.py prepare RAW OUT

The patches, their names and their annotations are those of the devkit
(github.com/CAPTAIN-WHU/iSAID_Devkit), except that masks are exact run lengths where the devkit
writes polygons through pixel centres, without holes; that annotation ids start at 1, because 0
means "none" to pycocotools; and, unless `devkit` is asked for, that three oddities are left out:
- an image with one side up to `patch` is copied whole there, here it is cut along the longer side;
- an object with a separate part of one or two pixels is dropped there, here it is kept;
- P1527 and P1530 are left out there.
"""

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

import coco
from coco import DataError
from scenes import CLASSES

# fmt: off
COLOURS = ((0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255),
           (0, 127, 63), (0, 127, 127), (0, 0, 127), (0, 0, 191), (0, 0, 255), (0, 191, 127),
           (0, 127, 191), (0, 127, 255), (0, 100, 155))  # of CLASSES in the masks
# fmt: on
CATEGORIES = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
FIRST_ID, SMALLEST = 1000, 10  # ids below are no objects; an object must have more pixels
LEFT_OUT = ("P1527", "P1530")
BAND = 512  # rows that are worked on at a time where whole images would need much memory


def spans(length, patch, overlap):
    """Windows along a side of `length` pixels: [(start, stop)]; the last ends at the border."""
    starts = (max(0, min(start, length - patch)) for start in range(0, length, patch - overlap))
    return [(start, min(start + patch, length)) for start in dict.fromkeys(starts)]


def windows(stem, height, width, patch, overlap, devkit):
    """The patches of an image: [(name, (y0, y1, x0, x1))], row by row."""
    if max(height, width) <= patch or devkit and min(height, width) <= patch:
        return [(f"{stem}.png", (0, height, 0, width))]
    rows, columns = spans(height, patch, overlap), spans(width, patch, overlap)
    found = [(*y, *x) for y in rows for x in columns]
    return [(f"{stem}_{'_'.join(map(str, window))}.png", window) for window in found]


# ---------------------------------------------------------------- masks
def pack(colours):
    """Colours (..., 3) as single numbers R + 256 G + 65536 B."""
    return np.asarray(colours) @ (1, 256, 65536)


BY_COLOUR = np.argsort(pack(COLOURS))  # an object's class is the lowest of the colours under it
RANK_TO_ID = np.array([0, *(BY_COLOUR + 1), 0])  # of a category; the last rank is "unlabeled"
UNLABELED, UNKNOWN = len(COLOURS) + 1, len(COLOURS) + 2


@functools.cache
def rank_table():
    table = np.full(2**24, UNKNOWN, np.uint8)
    table[0] = UNLABELED
    table[pack(COLOURS)[BY_COLOUR]] = np.arange(1, len(COLOURS) + 1)
    return table


def bands(image):
    """Packed colours, some rows at a time: yields (first row, (rows, W) uint32)."""
    for top in range(0, image.height, BAND):
        rows = image.crop((0, top, image.width, min(top + BAND, image.height)))
        packed = np.frombuffer(rows.tobytes("raw", "RGBX"), "<u4")
        yield top, packed.reshape(rows.height, rows.width) & 0xFFFFFF


def read_ranks(path):
    """The class of every pixel as the rank of its colour: (H, W) uint8. Raises DataError."""
    image, _ = coco.read_image(path)
    ranks = np.empty((image.height, image.width), np.uint8)
    for top, colours in bands(image):
        mine = ranks[top : top + len(colours)]
        np.take(rank_table(), colours, out=mine)
        if (mine == UNKNOWN).any():
            y, x = np.argwhere(mine == UNKNOWN)[0].tolist()
            colour = image.getpixel((x, top + y))
            raise DataError(f"{path}: the colour {colour} at x {x}, y {top + y} is of no class")
    return ranks


def read_instances(path):
    """The instance of every pixel: (H, W) integers, 0 for none, numbered in order of their ids."""
    image, _ = coco.read_image(path)
    seen = np.zeros(2**24, bool)
    for _, colours in bands(image):
        seen[colours] = True
    seen[:FIRST_ID] = False
    kind = np.uint16 if seen.sum() < 2**16 else np.uint32
    number = np.where(seen, seen.cumsum(dtype=np.uint32), 0).astype(kind)
    labels = np.empty((image.height, image.width), kind)
    for top, colours in bands(image):
        np.take(number, colours, out=labels[top : top + len(colours)])
    return labels


def read_masks(source, image):
    """(instances, classes) of an image, from read_instances and read_ranks. Raises DataError."""
    paths = [source.with_name(f"{source.stem}_instance_{kind}_RGB.png") for kind in ("id", "color")]
    for path in paths:
        coco.check_size({"width": image.width, "height": image.height}, path, coco.read_size(path))
    return read_instances(paths[0]), read_ranks(paths[1])


def run_lengths(start, stop, first, size):
    """Masks as COCO compresses them, of objects that are given as runs of pixels.
    start, stop: (n,) pixels, counted down the columns of a window of `size`, (h, w). The runs of
    object k begin at first[k]."""
    h, w = size
    gap = start - np.append(0, stop[:-1])
    gap[first] = start[first]
    objects = []
    for runs in np.split(np.stack([gap, stop - start], 1), first[1:]):  # (runs of an object, 2)
        runs = [*runs.flatten().tolist(), h * w - int(runs.sum())]
        objects.append({"size": [h, w], "counts": runs if runs[-1] else runs[:-1]})
    return coco_mask.frPyObjects(objects, h, w)


def find_objects(labels, ranks):
    """The objects of a window: labels (h, w) of `read_instances`, ranks (h, w) of `read_ranks`.
    Returns annotations, without ids, in the devkit's order: by class, then by instance; each with
    "tiny": the devkit drops it."""
    columns = labels.T.reshape(-1)  # all pixels, down the columns
    start = np.flatnonzero(np.append(True, columns[1:] != columns[:-1]))  # of runs of a label
    stop = np.append(start[1:], labels.size)
    rank, label = np.minimum.reduceat(ranks.T.reshape(-1), start), columns[start]
    order = np.flatnonzero(label)
    if not len(order):
        return []
    order = order[np.argsort(label[order], kind="stable")]
    first = np.flatnonzero(np.diff(label[order], prepend=0))  # the first run of each object
    start, stop, label = start[order], stop[order], label[order[first]]
    masks = run_lengths(start, stop, first, labels.shape)
    areas = np.add.reduceat(stop - start, first)  # coco_mask.area fails for 256 objects and more
    boxes = coco_mask.toBbox(masks).astype(int).tolist()
    categories, found = RANK_TO_ID[np.minimum.reduceat(rank[order], first)], []
    for k in np.lexsort((label, categories)):
        if areas[k] > SMALLEST and categories[k]:
            x, y, w, h = boxes[k]
            tiny = has_tiny_part(labels[y : y + h, x : x + w] == label[k])
            mask = {**masks[k], "counts": masks[k]["counts"].decode()}
            kind = {"category_id": int(categories[k]), "segmentation": mask, "iscrowd": 0}
            found.append({**kind, "area": int(areas[k]), "bbox": boxes[k], "tiny": tiny})
    return found


def has_tiny_part(mask):
    """Whether a mask (h, w) has an outer contour of one or two points.
    That is a separate part of one or two pixels which lies in no hole of another part."""

    def has_tiny(mask):
        parts, _ = ndimage.label(mask, np.ones((3, 3)))
        return bool(np.bincount(parts.reshape(-1))[1:].min() < 3)

    return has_tiny(mask) and has_tiny(ndimage.binary_fill_holes(mask))  # filling is slow


# ---------------------------------------------------------------- from the raw release to patches
def cut(source, out, labelled, windowing):
    """Cut one image: writes its patches, then its record. Raises DataError.
    source: the image, its masks beside it. The record: [[name, height, width, [annotation]]]."""
    image, _ = coco.read_image(source)
    if labelled:
        labels, ranks = read_masks(source, image)
    record = []
    for name, (y0, y1, x0, x1) in windows(source.stem, image.height, image.width, **windowing):
        here = slice(y0, y1), slice(x0, x1)
        found = find_objects(labels[here], ranks[here]) if labelled else []
        record.append([name, y1 - y0, x1 - x0, found])
        target = out / "images" / name
        temporary = target.with_name(f".{name}")
        image.crop((x0, y0, x1, y1)).save(temporary, format="PNG", compress_level=4)
        os.replace(temporary, target)
    coco.write_text(out / "parts" / f"{source.stem}.json", json.dumps(record))


def is_cut(out, stem):
    """Whether an earlier call has finished this image."""
    try:
        record = json.loads((out / "parts" / f"{stem}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((out / "images" / name).is_file() for name, *_ in record)


def end_with_parent():
    """Let a worker process end when the command is killed; it would wait for images forever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def cut_all(sources, out, split, windowing, workers):
    """Cut the images that no earlier call has finished; returns [what is wrong with an image]."""
    todo, bad = [path for path in sources if not is_cut(out, path.stem)], []
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        jobs = [pool.submit(cut, path, out, split != "test", windowing) for path in todo]
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
    return sorted(bad, key=natural)


def begin(out, target, settings):
    """The folder of a split, new or of an earlier call with the same settings; else DataError."""
    note = out / "prepare.json"
    if target.exists() and not note.exists():
        raise DataError(f"{target}: was not made by this command; name another folder")
    for folder in ("images", "parts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if not note.exists():
        coco.write_text(note, json.dumps(settings))
    before = json.loads(note.read_text(encoding="utf-8"))
    differ = [name for name in settings if before.get(name) != settings[name]]
    if differ:
        text = ", ".join(f"{name} {before.get(name)}, not {settings[name]}" for name in differ)
        raise DataError(f"{out}: was prepared with {text}; name another folder, or remove it")


def natural(name):
    """A key that sorts P2 before P10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def sources_of(folder, devkit, limit):
    """The images of a split of the raw release. Raises DataError if there are none."""
    there = folder.iterdir() if folder.is_dir() else []
    found = [path for path in there if coco.is_ours(path.name) and path.is_file()]
    found = [path for path in found if path.suffix.lower() == ".png" and not coco.is_mask(path)]
    found = [path for path in found if not (devkit and path.stem in LEFT_OUT)]
    if not found:
        raise DataError(f"{folder}: holds no images; expected are P0000.png …, as iSAID has them")
    return sorted(found, key=lambda path: natural(path.name))[:limit]


def merge(out, target, stems, devkit):
    """Join the records of the images of a split into its annotation file; returns a summary."""
    images, annotations, tiny = [], [], 0
    for stem in stems:
        record = json.loads((out / "parts" / f"{stem}.json").read_text(encoding="utf-8"))
        for name, height, width, objects in record:
            for found in objects:
                is_tiny = found.pop("tiny")
                tiny += is_tiny
                if not (is_tiny and devkit):
                    ids = {"id": len(annotations) + 1, "image_id": len(images)}
                    annotations.append({**ids, **found})
            images.append({"id": len(images), "file_name": name, "height": height, "width": width})
    text = json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    coco.write_text(target, text)
    counts = f"{len(stems):,} images, {len(images):,} patches, {len(annotations):,} objects"
    dropped = "more are dropped" if devkit else "of them the devkit drops"
    return counts + (f"; {tiny:,} {dropped} for a part of one or two pixels" if tiny else "")


def prepare_split(args, split):
    """Turn a split into patches, or continue an interrupted call; the exit status."""
    folder, out = Path(args.raw) / split / "images", Path(args.out) / split
    if folder.resolve() == (out / "images").resolve():
        raise DataError(f"{folder}: is where the images come from; name another folder")
    windowing = {"patch": args.patch, "overlap": args.overlap, "devkit": args.devkit}
    sources, target = (
        sources_of(folder, args.devkit, args.limit),
        coco.split_files(args.out, split)[1],
    )
    begin(out, target, {**windowing, "limit": args.limit})
    text = "is there already, made with the same settings"
    if not target.exists():
        bad = cut_all(sources, out, split, windowing, args.workers)
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
