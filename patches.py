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
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage
from tqdm import tqdm

from coco import DataError, is_mask, open_image, read_image, split_files
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


def natural(name):
    """A key that sorts P2 before P10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


# ---------------------------------------------------------------- windows


def spans(length, patch, overlap):
    """Windows along a side of `length` pixels: [(start, stop)]; the last ends at the border."""
    starts = (max(0, min(start, length - patch)) for start in range(0, length, patch - overlap))
    return [(start, min(start + patch, length)) for start in dict.fromkeys(starts)]


def windows(stem, height, width, patch, overlap, devkit):
    """The patches of an image: [(name, (y0, y1, x0, x1))] in natural order of their names."""
    if max(height, width) <= patch or devkit and min(height, width) <= patch:
        return [(f"{stem}.png", (0, height, 0, width))]
    rows, columns = spans(height, patch, overlap), spans(width, patch, overlap)
    found = [(*y, *x) for y in rows for x in columns]
    named = [(f"{stem}_{'_'.join(map(str, window))}.png", window) for window in found]
    return sorted(named, key=lambda patch: natural(patch[0]))


# ---------------------------------------------------------------- masks


def bands(image):
    """Colours as R + 256 G + 65536 B, some rows at a time: yields (first row, (rows, W) uint32)."""
    for top in range(0, image.height, BAND):
        rows = image.crop((0, top, image.width, min(top + BAND, image.height)))
        packed = np.frombuffer(rows.tobytes("raw", "RGBX"), "<u4")
        yield top, packed.reshape(rows.height, rows.width) & 0xFFFFFF


def pack(colour):
    r, g, b = colour
    return r + 256 * g + 65536 * b


RANKED = sorted(range(len(COLOURS)), key=lambda i: pack(COLOURS[i]))  # the lowest colour counts
RANK_TO_ID = np.array(
    [0, *(i + 1 for i in RANKED), 0]
)  # of a category; the last rank is "unlabeled"
UNLABELED, UNKNOWN = len(COLOURS) + 1, len(COLOURS) + 2


@functools.cache
def rank_table():
    table = np.full(2**24, UNKNOWN, np.uint8)
    table[0] = UNLABELED
    for rank, i in enumerate(RANKED, 1):
        table[pack(COLOURS[i])] = rank
    return table


def read_ranks(path):
    """The class of every pixel as the rank of its colour: (H, W) uint8.

    Raises DataError for an unknown colour.
    """
    image, _ = read_image(path)
    ranks = np.empty((image.height, image.width), np.uint8)
    for top, colours in bands(image):
        mine = ranks[top : top + len(colours)]
        np.take(rank_table(), colours, out=mine)
        if (mine == UNKNOWN).any():
            y, x = np.argwhere(mine == UNKNOWN)[0]
            r, g, b = (int(colours[y, x]) >> shift & 255 for shift in (0, 8, 16))
            place = f"the colour ({r}, {g}, {b}) at x {x}, y {top + y}"
            raise DataError(f"{path}: {place} is of no class")
    return ranks


def read_instances(path):
    """The instance of every pixel: (H, W) integers, 0 for none, numbered in order of their ids."""
    image, _ = read_image(path)
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


def run_lengths(start, stop, first, size):
    """COCO's compressed masks from runs of pixels down the columns; object k's from first[k] on."""
    h, w = size
    counts = np.stack([start - np.append(0, stop[:-1]), stop - start], 1)  # gap, run
    counts[first, 0] = start[first]
    last = np.append(first[1:], len(start)) - 1
    tails = h * w - stop[last]
    objects = []
    for i, j, tail in zip(first.tolist(), last.tolist(), tails.tolist()):
        runs = [*counts[i : j + 1].flatten().tolist(), *([tail] if tail else [])]
        objects.append({"size": [h, w], "counts": runs})
    packed = coco_mask.frPyObjects(objects, h, w)
    return [{"size": [h, w], "counts": rle["counts"].decode()} for rle in packed]


def describe(runs, size):
    """Areas, boxes and masks of objects, all at once, from runs of pixels within columns.

    runs: (object (n,) ascending, first pixel (n,), pixels (n,)), pixels counted down the columns
    of a window of `size`. Returns (areas (k,), boxes xywh (k, 4), [mask]).
    """
    label, start, length = runs
    stop = start + length
    first = np.flatnonzero(np.diff(label, prepend=-1))
    column, row = np.divmod(start, size[0])
    x0, x1 = np.minimum.reduceat(column, first), np.maximum.reduceat(column, first)
    y0, y1 = np.minimum.reduceat(row, first), np.maximum.reduceat(row + length, first)
    begins = np.append(True, start[1:] != stop[:-1])  # a mask's runs do cross columns
    begins[first] = True
    place = begins.cumsum() - 1
    masks = run_lengths(start[begins], stop[np.append(begins[1:], True)], place[first], size)
    return np.add.reduceat(length, first), np.stack([x0, y0, x1 - x0 + 1, y1 - y0], 1), masks


def find_objects(labels, ranks):
    """The objects of a window: labels (h, w) of `read_instances`, ranks (h, w) of `read_ranks`.

    Returns annotations, without ids, in the devkit's order: by class, then by instance; each with
    "tiny": the devkit drops it.
    """
    h, w = labels.shape
    label, rank = (x.T.reshape(-1) for x in (labels, ranks))  # down the columns
    edge = np.append(True, (label[1:] != label[:-1]) | (rank[1:] != rank[:-1]))
    edge[::h] = True
    start = np.flatnonzero(edge)
    length = np.diff(start, append=h * w)
    label, rank = label[start], rank[start]
    order = np.flatnonzero(label)
    order = order[np.argsort(label[order], kind="stable")]
    if not len(order):
        return []
    label = label[order].astype(np.int64)
    first = np.flatnonzero(np.diff(label, prepend=-1))
    areas, boxes, masks = describe((label, start[order], length[order]), (h, w))
    categories = RANK_TO_ID[np.minimum.reduceat(rank[order], first)]
    tiny = has_tiny_part(labels, label[first])
    found = []
    for k in np.lexsort((label[first], categories)):
        if areas[k] > SMALLEST and categories[k]:
            kind = {"category_id": int(categories[k]), "segmentation": masks[k], "iscrowd": 0}
            kind.update(area=int(areas[k]), bbox=boxes[k].tolist(), tiny=bool(tiny[k]))
            found.append(kind)
    return found


def has_tiny_part(labels, objects):
    """Which objects have an outer contour of one or two points: a part of as many pixels that

    lies in no hole of another part."""
    h, w = labels.shape
    padded = np.pad(labels, 1)
    steps = [(y, x) for y in (0, 1, 2) for x in (0, 1, 2) if (y, x) != (1, 1)]
    neighbours = sum((padded[y : y + h, x : x + w] == labels).astype(np.int8) for y, x in steps)
    y, x = np.nonzero((neighbours < 2) & (labels > 0))
    label, count = labels[y, x], neighbours[y, x]
    around = np.pad(neighbours, 1)
    pair = np.zeros(len(y), bool)
    for dy, dx in steps:
        pair |= (padded[y + dy, x + dx] == label) & (around[y + dy, x + dx] == 1)
    suspects = np.unique(label[(count == 0) | pair])
    found = [k for k in suspects if smallest_outer_part(labels == k) < 3] if len(suspects) else []
    return np.isin(objects, found)


def smallest_outer_part(mask):
    """Pixels of the smallest connected part of a mask, holes filled."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    filled = ndimage.binary_fill_holes(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    parts, _ = ndimage.label(filled, np.ones((3, 3)))
    return np.bincount(parts.flatten())[1:].min()


# ---------------------------------------------------------------- from the raw release to patches


def write_whole(path, write):
    """A file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def cut(source, out, labelled, windowing):
    """Cut one image: writes its patches, then its record. Raises DataError.

    source: the image, its masks beside it. The record: [[name, height, width, [annotation]]].
    """
    stem, record = source.stem, []
    image, _ = read_image(source)
    if labelled:
        labels, ranks = read_masks(source, image.size)
    for name, (y0, y1, x0, x1) in windows(stem, image.height, image.width, **windowing):
        here = slice(y0, y1), slice(x0, x1)
        found = find_objects(labels[here], ranks[here]) if labelled else []
        record.append([name, y1 - y0, x1 - x0, found])
        patch = image.crop((x0, y0, x1, y1))
        save = functools.partial(patch.save, format="PNG", compress_level=4)
        write_whole(out / "images" / name, save)
    record = json.dumps(record)
    write_whole(out / "parts" / f"{stem}.json", lambda path: path.write_text(record))


def read_masks(source, size):
    """(instances, classes) of an image, see read_instances, read_ranks. Raises DataError."""
    paths = [source.with_name(f"{source.stem}_instance_{kind}_RGB.png") for kind in ("id", "color")]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: is missing; {source.name} has no annotations without it")
        with open_image(path) as mask:
            (w, h), (W, H) = mask.size, size
        if (w, h) != (W, H):
            raise DataError(f"{path}: has {w} x {h} pixels, its image {W} x {H}")
    return read_instances(paths[0]), read_ranks(paths[1])


def is_cut(out, stem):
    """Whether an earlier call has finished this image."""
    try:
        record = json.loads((out / "parts" / f"{stem}.json").read_text())
    except (OSError, ValueError):
        return False
    return all((out / "images" / name).is_file() for name, *_ in record)


def begin(out, settings):
    """The folder of a split, new or of an earlier call with the same settings; else DataError."""
    note = out / "prepare.json"
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        (out / "parts").mkdir(exist_ok=True)
        if not note.exists():
            write_whole(note, lambda path: path.write_text(json.dumps(settings)))
        before = json.loads(note.read_text())
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from None
    differ = [name for name in settings if before.get(name) != settings[name]]
    if differ:
        text = ", ".join(f"{name} {before.get(name)}, not {settings[name]}" for name in differ)
        raise DataError(f"{out}: was prepared with {text}; name another folder, or remove it")


def sources_of(folder, devkit, limit):
    """The images of a split of the raw release. Raises DataError if there are none."""
    found = [path for path in folder.glob("[!.]*.png") if path.is_file() and not is_mask(path)]
    found = [path for path in found if not (devkit and path.stem in LEFT_OUT)]
    if not found:
        raise DataError(f"{folder}: holds no images; expected are P0000.png …, as iSAID has them")
    return sorted(found, key=lambda path: natural(path.name))[:limit]


def prepare_split(raw, out, split, windowing, workers=1, limit=None):
    """Turn a split of the raw release into patches, or go on with an interrupted call.

    Returns what was done, in words, and [what is wrong with an image]; the annotation file is
    written only if nothing is. Raises DataError if nothing can be done.
    """
    folder, out = Path(raw) / split / "images", Path(out) / split
    if folder.resolve() == (out / "images").resolve():
        raise DataError(f"{folder}: is where the images come from; name another folder")
    sources, target = (
        sources_of(folder, windowing["devkit"], limit),
        split_files(out.parent, split)[1],
    )
    begin(out, {**windowing, "limit": limit})
    if target.exists():
        shutil.rmtree(out / "parts")
        return f"{target}: is there already, made with the same settings", []
    todo, bad = [path for path in sources if not is_cut(out, path.stem)], []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(cut, path, out, split != "test", windowing): path for path in todo}
        done = concurrent.futures.as_completed(jobs)
        start = len(sources) - len(todo)
        try:
            for job in tqdm(done, split, len(sources), initial=start, unit="image", disable=None):
                try:
                    job.result()
                except (DataError, OSError) as error:
                    name = jobs[job].name
                    bad.append(str(error) if jobs[job].stem in str(error) else f"{name}: {error}")
        except concurrent.futures.BrokenExecutor:
            message = "a process was killed, probably for want of memory"
            raise DataError(f"{out}: {message}; call again with fewer --workers") from None
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if bad:
        whole = len(sources) - len(bad)
        return f"{out}: {whole} of {len(sources)} images are cut", sorted(bad, key=natural)
    return merge(out, target, [path.stem for path in sources], windowing["devkit"]), []


def merge(out, target, stems, devkit):
    """Join the records of the images of a split into its annotation file; returns a summary."""
    images, annotations, tiny = [], [], 0
    for stem in stems:
        for name, height, width, objects in json.loads(
            (out / "parts" / f"{stem}.json").read_text()
        ):
            for found in objects:
                is_tiny = found.pop("tiny")
                tiny += is_tiny
                if not (is_tiny and devkit):
                    ids = {"id": len(annotations) + 1, "image_id": len(images)}
                    annotations.append({**ids, **found})
            entry = {"id": len(images), "file_name": name, "height": height, "width": width}
            images.append(entry)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    text = json.dumps(content)
    write_whole(target, lambda path: path.write_text(text))
    shutil.rmtree(out / "parts")
    counts = f"{len(stems):,} images, {len(images):,} patches, {len(annotations):,} objects"
    dropped = "more are dropped" if devkit else "of them the devkit drops"
    tiny = f"; {tiny:,} {dropped} for a part of one or two pixels" if tiny else ""
    return f"{target}: {counts}{tiny}"


def prepare(args):
    """The command: prepare the splits, print what was done and what is wrong; the exit status."""
    if args.overlap >= args.patch:
        raise DataError(f"--overlap {args.overlap} must be smaller than --patch {args.patch}")
    there = [x for x in ("train", "val", "test") if (Path(args.raw) / x / "images").is_dir()]
    splits, wrong = list(dict.fromkeys(args.splits or there)), 0
    if not splits:
        raise DataError(f"{args.raw}: has no train/images, val/images or test/images")
    windowing = {"patch": args.patch, "overlap": args.overlap, "devkit": args.devkit}
    for split in splits:
        how = windowing, args.workers, args.limit
        text, bad = prepare_split(args.raw, args.out, split, *how)
        print(text)
        if bad:
            print("\n".join(f"  {problem}" for problem in bad), file=sys.stderr)
            advice = "mend or remove them and call again, what is finished is kept"
            print(f"error: {len(bad)} images of {split} are bad; {advice}", file=sys.stderr)
        wrong += len(bad)
    return int(wrong > 0)
