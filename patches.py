"""iSAID's raw release as patches: images and colour-coded masks cut into windows, objects as COCO annotations.

    python isaid.py prepare RAW OUT

The patches, their names and their annotations are those of the devkit (github.com/CAPTAIN-WHU/iSAID_Devkit), except that masks are
exact run lengths where the devkit writes polygons through pixel centres, without holes; that annotation ids start at 1, because
0 means "none" to pycocotools; and, unless `devkit` is asked for, that three oddities are left out:
- an image with one side up to `patch` is copied whole there, here it is cut along its longer side;
- an object with a separate part of one or two pixels is dropped there, here it is kept;
- P1527 and P1530 are left out there.
"""
import collections
import concurrent.futures
import functools
import json
import os
import re
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage
from tqdm import tqdm

from coco import DataError, load_json, open_image, read_image, split_files
from scenes import CLASSES

COLOURS = ((0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255), (0, 127, 63), (0, 127, 127), (0, 0, 127),
           (0, 0, 191), (0, 0, 255), (0, 191, 127), (0, 127, 191), (0, 127, 255), (0, 100, 155))  # of CLASSES in the masks
CATEGORIES = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
FIRST_ID, SMALLEST = 1000, 10  # instance ids below are no objects; an object must have more pixels
LEFT_OUT = ("P1527", "P1530")
BAND = 512  # rows that are worked on at a time where whole images would need much memory


def natural(name):
    """A key that sorts P2 before P10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


# ---------------------------------------------------------------- windows

def spans(length, patch, overlap):
    """Windows along a side of `length` pixels: [(start, stop)]; the last one is moved back to end at the border."""
    starts = (max(0, min(start, length - patch)) for start in range(0, length, patch - overlap))
    return [(start, min(start + patch, length)) for start in dict.fromkeys(starts)]


def windows(stem, height, width, patch, overlap, devkit):
    """The patches of an image: [(name, (y0, y1, x0, x1))] in natural order of their names."""
    if max(height, width) <= patch or devkit and min(height, width) <= patch:
        return [(f"{stem}.png", (0, height, 0, width))]
    found = [(*y, *x) for y in spans(height, patch, overlap) for x in spans(width, patch, overlap)]
    return sorted(((f"{stem}_{'_'.join(map(str, window))}.png", window) for window in found), key=lambda patch: natural(patch[0]))


# ---------------------------------------------------------------- masks

def bands(image):
    """Colours as R + 256 G + 65536 B, some rows at a time: yields (first row, (rows, W) uint32)."""
    for top in range(0, image.height, BAND):
        rows = image.crop((0, top, image.width, min(top + BAND, image.height)))
        yield top, np.frombuffer(rows.tobytes("raw", "RGBX"), "<u4").reshape(rows.height, rows.width) & 0xFFFFFF


def pack(colour):
    r, g, b = colour
    return r + 256 * g + 65536 * b


RANKED = sorted(range(len(COLOURS)), key=lambda i: pack(COLOURS[i]))  # an object's class is the lowest colour under it
RANK_TO_ID = np.array([0, *(i + 1 for i in RANKED), 0])  # of a category; the last rank is "unlabeled"
UNLABELED, UNKNOWN = len(COLOURS) + 1, len(COLOURS) + 2


@functools.cache
def rank_table():
    table = np.full(2 ** 24, UNKNOWN, np.uint8)
    table[0] = UNLABELED
    for rank, i in enumerate(RANKED, 1):
        table[pack(COLOURS[i])] = rank
    return table


def read_ranks(path):
    """The class of every pixel as the rank of its colour: (H, W) uint8. Raises DataError for an unknown colour."""
    image, _ = read_image(path)
    ranks = np.empty((image.height, image.width), np.uint8)
    for top, colours in bands(image):
        mine = ranks[top:top + len(colours)]
        np.take(rank_table(), colours, out=mine)
        if (mine == UNKNOWN).any():
            y, x = np.argwhere(mine == UNKNOWN)[0]
            r, g, b = (int(colours[y, x]) >> shift & 255 for shift in (0, 8, 16))
            raise DataError(f"{path}: the colour ({r}, {g}, {b}) at x {x}, y {top + y} is of no class")
    return ranks


def read_instances(path):
    """The instance of every pixel: (H, W) integers, 0 for none, else numbers from 1 on in the order of their ids."""
    image, _ = read_image(path)
    seen = np.zeros(2 ** 24, bool)
    for _, colours in bands(image):
        seen[colours] = True
    seen[:FIRST_ID] = False
    kind = np.uint16 if seen.sum() < 2 ** 16 else np.uint32
    number = np.where(seen, seen.cumsum(dtype=np.uint32), 0).astype(kind)
    labels = np.empty((image.height, image.width), kind)
    for top, colours in bands(image):
        np.take(number, colours, out=labels[top:top + len(colours)])
    return labels


def run_lengths(start, stop, first, size):
    """COCO's compressed masks from runs of pixels counted down the columns, those of object k from first[k] on."""
    h, w = size
    counts = np.stack([start - np.append(0, stop[:-1]), stop - start], 1)  # gap, run
    counts[first, 0] = start[first]
    last = np.append(first[1:], len(start)) - 1
    tails = h * w - stop[last]
    objects = [{"size": [h, w], "counts": [*counts[i:j + 1].flatten().tolist(), *([tail] if tail else [])]}
               for i, j, tail in zip(first.tolist(), last.tolist(), tails.tolist())]
    return [{"size": [h, w], "counts": rle["counts"].decode()} for rle in coco_mask.frPyObjects(objects, h, w)]


def describe(runs, size):
    """Areas, boxes and masks of objects, all at once, from runs of pixels that do not cross columns.

    runs: (object (n,) ascending, first pixel (n,), pixels (n,)), pixels counted down the columns of a window of `size`.
    Returns (where each object's runs begin, area, bbox xywh (k, 4), [mask]).
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
    return first, np.add.reduceat(length, first), np.stack([x0, y0, x1 - x0 + 1, y1 - y0], 1), masks


def find_objects(labels, ranks):
    """The objects of a window: labels (h, w) of `read_instances`, ranks (h, w) of `read_ranks`.

    Returns annotations, without ids, in the devkit's order: by class, then by instance; each with "tiny": the devkit drops it.
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
    first, areas, boxes, masks = describe((label, start[order], length[order]), (h, w))
    categories = RANK_TO_ID[np.minimum.reduceat(rank[order], first)]
    tiny = has_tiny_part(labels, label[first])
    return [{"category_id": int(categories[k]), "segmentation": masks[k], "area": int(areas[k]), "bbox": boxes[k].tolist(), "iscrowd": 0,
             "tiny": bool(tiny[k])}
            for k in np.lexsort((label[first], categories)) if areas[k] > SMALLEST and categories[k]]


def has_tiny_part(labels, objects):
    """Which of the objects have an outer contour of one or two points, that is, a part of as many pixels, in no hole of another part."""
    h, w = labels.shape
    padded = np.pad(labels, 1)
    steps = [(y, x) for y in (0, 1, 2) for x in (0, 1, 2) if (y, x) != (1, 1)]
    neighbours = sum((padded[y:y + h, x:x + w] == labels).astype(np.int8) for y, x in steps)
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
    filled = ndimage.binary_fill_holes(mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])
    parts, _ = ndimage.label(filled, np.ones((3, 3)))
    return np.bincount(parts.flatten())[1:].min()


# ---------------------------------------------------------------- the official annotations of whole images

def by_name(categories, path):
    """{category id in the file: ours}: the two official files number the classes differently. Raises DataError."""
    def plain(name):
        return re.sub(r"[^a-z]", "", name.lower())
    ours = {plain(category["name"]): category["id"] for category in CATEGORIES}
    unknown = [c["name"] for c in categories if plain(c["name"]) not in ours]
    if unknown:
        raise DataError(f"{path}: its class {unknown[0]!r} is none of iSAID's: {', '.join(CLASSES)}")
    return {c["id"]: ours[plain(c["name"])] for c in categories}


def read_annotations(path):
    """{file name: ((width, height) or None, [annotation of the whole image, our category ids])}. Raises DataError."""
    coco = load_json(path)
    ids, objects = by_name(coco["categories"], path), collections.defaultdict(list)
    for annotation in coco["annotations"]:
        if not annotation.get("segmentation"):
            raise DataError(f"{path}: annotation {annotation.get('id')} has no segmentation")
        objects[annotation["image_id"]].append({**annotation, "category_id": ids[annotation["category_id"]]})
    sizes = {image["id"]: (image["width"], image["height"]) if image.get("width") and image.get("height") else None
             for image in coco["images"]}
    return {Path(image["file_name"]).name: (sizes[image["id"]], objects[image["id"]]) for image in coco["images"]}


def local_mask(annotation, height, width):
    """An object's mask in its own box: (y, x of the box, (h, w) bool). Raises DataError."""
    shape = annotation["segmentation"]
    try:
        if isinstance(shape, dict):
            if list(shape["size"]) != [height, width]:
                raise ValueError(f"its size is {shape['size']}, the image's {[height, width]}")
            rle = coco_mask.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
            x, y, w, h = coco_mask.toBbox(rle).astype(int)
            return y, x, coco_mask.decode(rle)[y:y + h, x:x + w].astype(bool)
        points = [np.asarray(polygon, float).reshape(-1, 2) for polygon in shape]
        if not all(len(p) > 2 and np.isfinite(p).all() for p in points):
            raise ValueError("a polygon needs three points, of finite numbers")
        low = np.floor(np.clip(np.min([p.min(0) for p in points], 0), 0, (width, height))).astype(int)
        high = np.ceil(np.clip(np.max([p.max(0) for p in points], 0), 0, (width, height))).astype(int)
        w, h = np.maximum(high - low + 1, 1)
        rles = coco_mask.frPyObjects([(p - low).flatten().tolist() for p in points], int(h), int(w))
        mask = coco_mask.decode(coco_mask.merge(rles)).astype(bool)
        return low[1], low[0], mask[:height - low[1], :width - low[0]]
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise DataError(f"annotation {annotation.get('id')} has a segmentation that cannot be read ({error})") from None


def clip_objects(objects, window):
    """Annotations of a window from objects [(y, x, mask, annotation)], in their order; each with "object": the place of its object."""
    y0, y1, x0, x1 = window
    h, w = y1 - y0, x1 - x0
    found = []
    for number, (y, x, mask, annotation) in enumerate(objects):
        part = mask[max(y0 - y, 0):max(y1 - y, 0), max(x0 - x, 0):max(x1 - x, 0)]
        if part.sum() <= SMALLEST:
            continue
        top, left = max(y - y0, 0), max(x - x0, 0)
        column = np.pad(part, ((1, 1), (0, 0))).T.astype(np.int8)  # (columns, rows + 2)
        edges = np.diff(column, axis=1)
        (c, start), stop = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]
        runs = np.zeros(len(c), np.int64), (c + left) * h + start + top, stop - start
        _, area, box, masks = describe(runs, (h, w))
        found.append({"category_id": annotation["category_id"], "segmentation": masks[0], "area": int(area[0]), "bbox": box[0].tolist(),
                      "iscrowd": int(annotation.get("iscrowd") or 0), "tiny": False, "object": number})
    return found


# ---------------------------------------------------------------- from the raw release to patches

def write_whole(path, write):
    """A file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def cut(source, out, labelled, settings, annotations=None):
    """Cut one image: writes its patches, then its record. Raises DataError.

    source: the image; masks lie beside it. annotations: its part of `read_annotations`, instead of the masks. The record: {"patches":
    [[name, height, width, [annotation]]], "lost": objects of the official file that are in no patch}.
    """
    stem = source.stem
    if labelled and annotations is None:
        paths = [source.with_name(f"{stem}_instance_{kind}_RGB.png") for kind in ("id", "color")]
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path}: is missing; {source.name} has no annotations without it")
        labels, ranks = read_instances(paths[0]), read_ranks(paths[1])
        with open_image(source) as image:
            height, width = image.height, image.width
        for path, mask in zip(paths, (labels, ranks)):
            if mask.shape != (height, width):
                raise DataError(f"{path}: has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}")
    image, _ = read_image(source)
    height, width = image.height, image.width
    said, whole = annotations or (None, [])
    if said and said != (width, height):
        raise DataError(f"{source.name}: the official file says {said[0]} x {said[1]} pixels, the image has {width} x {height}")
    objects = [(*local_mask(a, height, width), a) for a in whole]
    lost, record = set(range(len(objects))), []
    for name, window in windows(stem, height, width, **settings):
        y0, y1, x0, x1 = window
        found = []
        if annotations is not None:
            found = clip_objects(objects, window)
            lost -= {a.pop("object") for a in found}
        elif labelled:
            found = find_objects(labels[y0:y1, x0:x1], ranks[y0:y1, x0:x1])
        record.append([name, y1 - y0, x1 - x0, found])
        patch = image.crop((x0, y0, x1, y1))
        write_whole(out / "images" / name, lambda path, patch=patch: patch.save(path, "PNG", compress_level=4))
    write_whole(out / "parts" / f"{stem}.json", lambda path: path.write_text(json.dumps({"patches": record, "lost": len(lost)})))


def is_cut(out, stem):
    """Whether an earlier call has finished this image."""
    try:
        record = json.loads((out / "parts" / f"{stem}.json").read_text())
    except (OSError, ValueError):
        return False
    return all((out / "images" / name).is_file() for name, *_ in record["patches"])


def begin(out, settings):
    """The folder of a split, new or of an earlier call with the same settings. Raises DataError if they differ."""
    note = out / "prepare.json"
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        (out / "parts").mkdir(exist_ok=True)
        if not note.exists():
            write_whole(note, lambda path: path.write_text(json.dumps(settings)))
        before = json.loads(note.read_text())
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from None
    if before != settings:
        differ = [f"{name} {before.get(name)}, not {value}" for name, value in settings.items() if before.get(name) != value]
        raise DataError(f"{out}: was prepared with {', '.join(differ)}; name another folder, or remove it")


def prepare_split(raw, out, split, settings, workers=1, limit=None, skip_bad=False, annotations=None):
    """Turn a split of the raw release into patches. Continues what an earlier, interrupted call has left.

    Returns what was done, in words, and [what is wrong with an image]; the annotation file is written only if nothing is, or with
    skip_bad. Raises DataError if nothing can be done.
    """
    folder, out = Path(raw) / split / "images", Path(out) / split
    if folder.resolve() == (out / "images").resolve():
        raise DataError(f"{folder}: is where the images come from; name another folder for the patches")
    sources = sorted((path for path in folder.glob("*.png") if not re.search("_instance_(color|id)_RGB", path.stem)),
                     key=lambda path: natural(path.name))
    sources = [path for path in sources if not (settings["devkit"] and path.stem in LEFT_OUT)][:limit]
    if not sources:
        raise DataError(f"{folder}: holds no images; expected are {split}/images/P0000.png …, as iSAID and DOTA give them")
    wanted, bad = None, []
    if annotations:
        wanted = read_annotations(annotations)
        absent = [path for path in sources if path.name not in wanted]
        bad, sources = [f"{annotations}: does not list {path.name}" for path in absent], [p for p in sources if p.name in wanted]
    target = split_files(out.parent, split)[1]
    begin(out, {**settings, "limit": limit, "annotations": str(annotations) if annotations else None})
    if target.exists():
        (out / "parts").rmdir()
        return f"{target}: is there already, made with the same settings", []
    todo = [path for path in sources if not is_cut(out, path.stem)]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(cut, path, out, split != "test", settings, wanted and wanted[path.name]): path for path in todo}
        done = concurrent.futures.as_completed(jobs)
        try:
            for job in tqdm(done, split, len(sources), initial=len(sources) - len(todo), unit="image", disable=None):
                try:
                    job.result()
                except (DataError, OSError) as error:
                    name = jobs[job].name
                    bad.append(str(error) if jobs[job].stem in str(error) else f"{name}: {error}")
        except concurrent.futures.BrokenExecutor:
            raise DataError(f"{out}: a process was killed, probably for want of memory; call again with fewer --workers") from None
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    bad, done = sorted(bad, key=natural), [path.stem for path in sources if is_cut(out, path.stem)]
    if not done or bad and not skip_bad:
        return f"{out}: {len(done)} of {len(done) + len(bad)} images are cut; no annotation file yet", bad
    return merge(out, target, done, settings["devkit"]), bad


def merge(out, target, stems, devkit):
    """Join the records of the images of a split into its annotation file; returns what is in it, in words."""
    images, annotations, tiny, lost = [], [], 0, 0
    for stem in stems:
        record = json.loads((out / "parts" / f"{stem}.json").read_text())
        lost += record["lost"]
        for name, height, width, objects in record["patches"]:
            for found in objects:
                is_tiny = found.pop("tiny")
                tiny += is_tiny
                if not (is_tiny and devkit):
                    annotations.append({"id": len(annotations) + 1, "image_id": len(images), **found})
            images.append({"id": len(images), "file_name": name, "height": height, "width": width})
    coco = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_whole(target, lambda path: path.write_text(json.dumps(coco)))
    for path in (out / "parts").iterdir():
        path.unlink()
    (out / "parts").rmdir()
    text = f"{target}: {len(stems):,} images, {len(images):,} patches, {len(annotations):,} objects"
    if tiny:
        text += f"; {tiny:,} " + ("more, with a separate part of one or two pixels, are dropped" if devkit else "of them the devkit drops")
    return text + (f"; {lost:,} objects of the official file are in no patch: outside, or too small" if lost else "")
