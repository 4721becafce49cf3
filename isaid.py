"""Data: COCO-format datasets such as iSAID's patches, augmentation, synthetic aerial scenes, a check of a dataset.

iSAID: Waqas Zamir et al., "iSAID: A Large-scale Dataset for Instance Segmentation in Aerial Images" (arXiv 1905.12886).
Boxes in files are xywh pixels; an item's boxes are cxcywh in 0..1; masks of padding are True where there is no image.

    python isaid.py prepare RAW OUT                patches from iSAID's raw release
    python isaid.py check DATA                     what is in a dataset and what is wrong with it
    python isaid.py scenes OUT --train 20 --val 5  synthetic scenes as a dataset on disk
"""
import argparse
import atexit
import collections
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import parallel
from scenes import CLASSES, draw_scene, scene_objects

SCENE_SIZE, SCENES = 128, {"train": 1000, "val": 200}  # of the synthetic dataset
Image.MAX_IMAGE_PIXELS = 2 ** 30  # Pillow warns of more than a tenth of it, but satellites see far
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbones expect


class DataError(ValueError):
    """Something is wrong with the data; the message names the file, the value and what to do."""


def one_line(error):
    """The message of an error, without the traceback that a loader process puts in front of it."""
    return str(error).strip().splitlines()[-1].removeprefix("isaid.DataError: ")


# ---------------------------------------------------------------- COCO format

class Detection(torch.utils.data.Dataset):
    """Images with boxes. Item i: (image (3, H, W) float normalised, target), a target being

    {"image_id": int, "size": (height, width) before resizing, "labels": (T,) int64, "boxes": (T, 4) cxcywh in 0..1,
    "seed": int, for whatever else is random about this image in this epoch}.

    coco: {"images", "annotations", "categories"} as in a COCO file, every image that has annotations with its size.
    read(i, at_least) returns the PIL image, which may be smaller than its file if that leaves at_least pixels a side, and the
    (width, height) of the file. bad: what is wrong with images that were left out.
    Boxes are clipped to their image; those left without area are removed. `clipped` and `removed` count them.
    Crowd regions (iscrowd 1) are kept for the evaluation, which ignores them, and are no training targets.
    Augmentation depends on (seed, epoch, i) alone, not on workers or order; set `epoch` before each pass. Item i + k * len(self) is
    image i once more, with another augmentation.
    """

    def __init__(self, name, coco, read, transform, seed=0, bad=()):
        self.name, self.read, self.transform, self.seed, self.epoch, self.at_least = name, read, transform, seed, 0, None
        self.images, self.bad = coco["images"], list(bad)
        self.categories = sorted(({"id": c["id"], "name": str(c["name"])} for c in coco["categories"]), key=lambda c: c["id"])
        self.annotations, self.clipped, self.removed = clean_boxes(self.images, coco["annotations"])
        label = {category["id"]: i for i, category in enumerate(self.categories)}
        per_image = collections.defaultdict(list)
        for annotation in self.annotations:
            if not annotation["iscrowd"]:
                per_image[annotation["image_id"]].append(annotation)
        none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)  # one for all: there may be a million
        found = {i: (torch.tensor([a["bbox"] for a in mine]), torch.tensor([label[a["category_id"]] for a in mine]))
                 for i, mine in per_image.items()}
        self.boxes, self.labels = zip(*(found.get(image["id"], none) for image in self.images))  # xywh

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i):
        number, i = i, i % len(self)
        image, (picture, (w, h)) = self.images[i], self.read(i, self.at_least)
        check_size(image, f"{self.name}: {image['file_name']}", (w, h))
        shrink = torch.tensor(picture.size * 2) / torch.tensor([w, h, w, h])
        boxes = tv_tensors.BoundingBoxes(self.boxes[i] * shrink, format="XYWH", canvas_size=picture.size[::-1])
        sample = {"image": picture, "boxes": boxes, "labels": self.labels[i]}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence([self.seed, self.epoch, number]).generate_state(1)[0]))
            sample, seed = self.transform(sample), int(torch.randint(2 ** 62, ()))
        height, width = sample["image"].shape[-2:]
        boxes = sample["boxes"].as_subclass(torch.Tensor) / torch.tensor([width, height, width, height])
        return sample["image"].as_subclass(torch.Tensor), {"image_id": image["id"], "size": (h, w), "labels": sample["labels"],
                                                           "boxes": boxes, "seed": seed}

    def counts(self):
        """Number of boxes of each class, in the order of the labels."""
        return np.bincount(torch.cat(self.labels).numpy(), minlength=len(self.categories)).tolist()

    def tiny(self, image_size):
        """Number of boxes that are under a pixel, and dropped, once images are image_size x image_size."""
        resized = (boxes[:, 2:] * image_size / torch.tensor([image["width"], image["height"]])
                   for image, boxes in zip(self.images, self.boxes) if len(boxes))
        return sum(int((sides < 1).any(1).sum()) for sides in resized)


def repeat_factors(data, threshold):
    """How often to show each image so that rare classes are seen more often: (len(data),) at least 1 (LVIS, arXiv 1908.03195).

    A class in less than `threshold` of the images counts as if it were in the geometric mean of its share and the threshold.
    """
    present = torch.zeros(len(data), len(data.categories))
    for i, labels in enumerate(data.labels):
        present[i, labels] = 1
    factors = (threshold / present.mean(0)).sqrt().nan_to_num(posinf=0)  # of the classes
    return (present * factors).amax(1).clamp(min=1)


def clean_boxes(images, annotations):
    """Annotations with boxes clipped to their images and complete in area and iscrowd; how many were clipped, removed."""
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in images}
    kept, clipped, removed = [], 0, 0
    for annotation in annotations:
        if annotation["image_id"] not in sizes:  # of an image beyond the limit
            continue
        w, h = sizes[annotation["image_id"]]
        x0, y0, bw, bh = box = [float(v) for v in annotation["bbox"]]
        x1, y1 = min(x0 + bw, w), min(y0 + bh, h)
        x0, y0 = max(x0, 0.0), max(y0, 0.0)
        if not (all(map(math.isfinite, box)) and x1 > x0 and y1 > y0):
            removed += 1
            continue
        inside = [x0, y0, x1 - x0, y1 - y0]
        outside = max(abs(a - b) for a, b in zip(box, inside)) > 1e-3  # more than rounding
        clipped += outside
        kept.append({"id": len(kept) + 1,  # pycocotools takes id 0 for "none"
                     "image_id": annotation["image_id"], "category_id": annotation["category_id"],
                     "bbox": inside if outside else box, "area": annotation.get("area") or inside[2] * inside[3],
                     "iscrowd": int(annotation.get("iscrowd") or 0)})
    return kept, clipped, removed


FIELDS = {"images": {"id": int, "file_name": str}, "categories": {"id": int, "name": str},
          "annotations": {"image_id": int, "category_id": int, "bbox": list}}
OPTIONAL = {"width", "height", "area", "iscrowd"}
WORDS = {int: "a whole number", str: "text", list: "a list"}


def _relative(box):
    return isinstance(box, list) and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in box)


def _sensible(value, low=-10 ** 9):
    return isinstance(value, (int, float)) and low <= value <= 10 ** 9


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); the annotations are expected there") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}); was it copied completely?") from None


def faults(coco):
    """Everything that makes the content of a COCO file unusable, one message after the other."""
    for key in FIELDS:
        entries = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield f"has no list {key!r}; a COCO file has images, annotations and categories"
            return
    for key, fields in FIELDS.items():
        for i, entry in enumerate(coco[key]):
            yield from (f"entry {i} of {key!r} {fault}" for fault in entry_faults(entry, fields))
    known = {}
    for key in ("images", "categories"):
        known[key] = collections.Counter(entry["id"] for entry in coco[key] if isinstance(entry.get("id"), int))
        yield from (f"id {number} occurs twice among the {key}" for number, n in known[key].items() if n > 1)
    if not coco["categories"]:
        yield "has no categories"
        return
    for annotation in coco["annotations"]:
        for field, key in (("category_id", "categories"), ("image_id", "images")):
            number = annotation.get(field)
            if isinstance(number, int) and number not in known[key]:
                yield (f"annotation {annotation.get('id')} has {field} {number}, which is not among the {key}"
                       + (f" {sorted(known[key])}" if len(known[key]) < 30 else ""))
    if coco["annotations"] and all(_relative(annotation.get("bbox")) for annotation in coco["annotations"]):
        yield "has boxes within 0..1 only; COCO's are in pixels, so multiply them by width and height of their image"


def entry_faults(entry, fields):
    """What is wrong with the fields of an image, annotation or category."""
    for field, kind in fields.items():
        if field not in entry:
            yield f"has no {field!r}"
        elif not isinstance(entry[field], kind):
            yield f"has {field} {entry[field]!r:.60}, which is not {WORDS[kind]}"
        elif field == "bbox" and not (len(entry["bbox"]) == 4 and all(isinstance(v, float) or _sensible(v) for v in entry["bbox"])):
            yield f"has bbox {entry['bbox']!r:.60}; it must be 4 numbers, x, y, width, height"  # NaN is removed with a count
    if isinstance(entry.get("name"), str) and not entry["name"].isprintable():
        yield f"has name {entry['name']!r:.60}, which is not printable text"
    for field in OPTIONAL & entry.keys():
        if entry[field] is not None and not _sensible(entry[field], 0):
            yield f"has {field} {entry[field]!r:.60}, which is not a number of at least 0"


def load_json(path):
    """A COCO file as a dict with images, annotations, categories; DataError if it is anything else."""
    coco = read_json(path)
    for fault in faults(coco):
        raise DataError(f"{path}: {fault}")
    return coco


def load_coco(images_dir, json_path, transform, limit=None, seed=0, skip_bad=False):
    """The dataset of a folder of images and a COCO file; `limit` takes the first images only, `skip_bad` leaves out those that cannot be
    used. Raises DataError."""
    images_dir, coco = Path(images_dir), load_json(json_path)
    if not images_dir.is_dir():
        raise DataError(f"{images_dir}: no such folder; the images of {json_path} are expected there")
    images = coco["images"][:limit]
    if not images:
        raise DataError(f"{json_path}: has no images")
    images, paths, bad = look_at(images, [images_dir / image["file_name"] for image in images], json_path, skip_bad)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{json_path}: {len(missing)} of {len(paths)} images are missing, the first is {missing[0]}")
    for image, path in zip(images, paths):
        if not image.get("width") or not image.get("height"):  # as in some of iSAID's own files
            with open_image(path) as opened:
                image["width"], image["height"] = opened.size
    return Detection(str(json_path), {**coco, "images": images}, functools.partial(_read, paths), transform, seed, bad)


def look_at(images, paths, name, skip_bad):
    """Read every image, if skip_bad, and leave out those that cannot be used: (images, paths, what is wrong with the others).

    Raises DataError if none is left.
    """
    if not skip_bad:
        return images, paths, []
    kept, bad = [], []
    for image, path in tqdm(list(zip(images, paths)), f"reading {name}", leave=False, disable=parallel.hidden()):
        try:
            check_size(image, path, read_image(path)[1])
            kept.append((image, path))
        except DataError as error:
            bad.append(str(error))
    if not kept:
        raise DataError(f"{name}: none of its images can be used, the first: {bad[0]}")
    return *map(list, zip(*kept)), bad


def check_size(image, name, size):
    """Raises DataError if an image has another size than its annotations say: the boxes would be in other places."""
    said = image.get("width") or size[0], image.get("height") or size[1]
    if said != size:
        raise DataError(f"{name} should have {said[0]} x {said[1]} pixels, the file has {size[0]} x {size[1]}")


def split_files(root, split):
    """Where the patches layout keeps a split: (folder of images, annotation file)."""
    return Path(root) / split / "images", Path(root) / split / f"instancesonly_filtered_{split}.json"


def has_files(args):
    """Whether a run's flags name a dataset on disk; without one it uses synthetic scenes."""
    return bool(args.data or args.train_images or args.data_unlabeled)


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def image_files(folder):
    """All images in a folder and the folders below it, in order. Raises DataError if there are none."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder of images")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
                   and not re.search("_instance_(color|id)_RGB", path.stem))  # iSAID keeps its masks beside the images
    if not paths:
        raise DataError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def unlabeled_files(folder, split):
    """The images of a split in a folder without annotations: its train and val if it has both, as ImageNet does, else
    every twentieth image is held out for val. Returns (a name, paths). Raises DataError."""
    if all((Path(folder) / name).is_dir() for name in ("train", "val")):
        return Path(folder) / split, image_files(Path(folder) / split)
    paths = image_files(folder)
    if len(paths) < 2:
        raise DataError(f"{folder}: holds one image only; one is needed for training and one to hold out")
    held_out = paths[::20]
    return f"{folder} ({split})", held_out if split == "val" else [path for i, path in enumerate(paths) if i % 20]


def load_images(name, paths, transform, limit=None, seed=0, skip_bad=False):
    """The dataset of images without annotations; `limit` takes the first images only, `skip_bad` leaves out those that cannot be used."""
    images = [{"id": i, "file_name": str(path)} for i, path in enumerate(paths[:limit])]
    images, paths, bad = look_at(images, paths[:limit], name, skip_bad)
    return Detection(str(name), {"images": images, "annotations": [], "categories": []}, functools.partial(_read, paths),
                     transform, seed, bad)


def class_names(categories):
    return ", ".join(f"{c['id']} {c['name']}" for c in categories)


def open_split(split, args, train):
    """The split that a run's flags name: a folder (data), COCO files ({split}_images, {split}_json), or synthetic scenes.

    args also holds image_size, limit_{split}, seed, skip_bad, hflip, vflip, quarter_turns. With the setting "pretrain" the images are
    taken without annotations, from the same places or from data_unlabeled. Raises DataError.
    """
    limit = getattr(args, f"limit_{split}", None)
    augmentation = transforms(train, args.image_size, args.hflip, args.vflip, args.quarter_turns)
    if not has_files(args):
        return synthetic(split, limit or SCENES[split], args.image_size, augmentation, args.seed)
    files = split_files(args.data, split) if args.data else (getattr(args, f"{split}_images"), getattr(args, f"{split}_json"))
    if args.data_unlabeled:
        data = load_images(*unlabeled_files(args.data_unlabeled, split), augmentation, limit, args.seed, args.skip_bad)
    elif args.setting == "pretrain":
        data = load_images(files[0], image_files(files[0]), augmentation, limit, args.seed, args.skip_bad)
    else:
        data = load_coco(*files, augmentation, limit, args.seed, args.skip_bad)
    data.at_least = args.image_size
    return data


def open_image(path):
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: is not an image that can be read (an unknown format, or damaged)") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: is not an image that can be read ({error})") from None


def read_image(path, at_least=None):
    """(a picture as RGB, its (width, height) in the file). Raises DataError.

    A JPEG is decoded at a half, a quarter or an eighth of its size if that leaves at_least pixels a side.
    """
    with open_image(path) as image:
        size = image.size
        if image.mode.startswith(("I", "F")):  # converting would turn nearly all of it white
            raise DataError(f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 first")
        try:
            if at_least:
                image.draft("RGB", (at_least, at_least))
            return image.convert("RGB"), size
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
            raise DataError(f"{path}: is damaged ({error}); copy it again or remove it") from None


def _read(paths, i, at_least=None):
    return read_image(paths[i], at_least)


def leave_signals(_):
    """In a loader process: signals, which launchers and terminals send to all processes, are the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_loaders():
    """Loader processes ignore SIGTERM, with which multiprocessing would end those that are left after an error, and wait for them."""
    left = multiprocessing.active_children()
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for an error
    for process in left:
        process.kill()


def collate(batch):
    """[(image, target)] -> images (B, 3, H, W) padded right and below, padding (B, H, W), [target]."""
    images, targets = zip(*batch)
    H, W = (max(image.shape[d] for image in images) for d in (1, 2))
    batch, padding = images[0].new_zeros(len(images), 3, H, W), torch.ones(len(images), H, W, dtype=torch.bool)
    for i, image in enumerate(images):
        _, h, w = image.shape
        batch[i, :, :h, :w], padding[i, :h, :w] = image, False
    return batch, padding, list(targets)


def loader(data, workers, **options):
    """Batches of a dataset, in loader processes if workers > 0; the model's random numbers are left alone."""
    return DataLoader(data, num_workers=workers, collate_fn=collate, generator=torch.Generator(), worker_init_fn=leave_signals, **options)


def unnormalise(images):
    """The opposite of the last step of `transforms`: (..., 3, H, W) in 0..1."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


# ---------------------------------------------------------------- augmentation

to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])  # what the models see


class RandomSizeCrop(v2.Transform):
    """A crop whose sides are drawn between `smallest` and `largest` pixels, as in the official DETR code."""

    def __init__(self, smallest, largest):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs):
        H, W = v2.functional.get_size(next(x for x in flat_inputs if isinstance(x, (Image.Image, torch.Tensor))))
        h, w = (int(torch.randint(min(self.smallest, n), min(n, self.largest) + 1, ())) for n in (H, W))
        top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
        return {"top": top, "left": left, "height": h, "width": w}

    def transform(self, inpt, params):
        return self._call_kernel(v2.functional.crop, inpt, **params)


def transforms(train, image_size=None, hflip=True, vflip=False, quarter_turns=False):
    """From a PIL image and its boxes to a normalised tensor and boxes cxcywh in pixels.

    image_size: every image becomes image_size x image_size, as in the paper. None: the official multi-scale recipe, in
    training the shorter side 480 to 800 with or without a random crop, else 800; the longer side at most 1333.
    The flips and turns (for aerial images, which have no up) apply in training only. Boxes under a pixel are dropped.
    """
    steps = []
    if train:
        steps += [v2.RandomHorizontalFlip()] * hflip + [v2.RandomVerticalFlip()] * vflip
        steps += [v2.RandomChoice([v2.RandomRotation((a, a), expand=True) for a in (0, 90, 180, 270)])] * quarter_turns
    if image_size:
        steps.append(v2.Resize((image_size, image_size)))
    elif train:
        scales = v2.RandomShortestSize(list(range(480, 801, 32)), max_size=1333)
        cropped = v2.Compose([v2.RandomShortestSize([400, 500, 600]), RandomSizeCrop(384, 600), scales])
        steps.append(v2.RandomChoice([scales, cropped]))
    else:
        steps.append(v2.RandomShortestSize([800], max_size=1333))
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1),
                       v2.ConvertBoundingBoxFormat("CXCYWH"), to_tensor])


# ---------------------------------------------------------------- synthetic scenes

VAL_START = 1_000_000  # scenes from here on are held out


def synthetic(split, n, size, transform, seed=0):
    """A dataset of n synthetic scenes of size x size pixels, those of the split "train" or "val"; drawn when asked for."""
    start = VAL_START if split == "val" else 0
    images, annotations = [], []
    for i in range(n):
        images.append({"id": i, "file_name": f"scene_{i:06d}.png", "width": size, "height": size})
        for label, (x0, y0, x1, y1), area in zip(*scene_objects(seed, start + i, size)):
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": int(label) + 1, "iscrowd": 0,
                                "area": float(area), "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    return Detection(f"synthetic scenes ({split})", coco, functools.partial(_read_scene, seed, start, size), transform, seed)


@functools.lru_cache(maxsize=4096)
def _read_scene(seed, start, size, i, at_least=None):
    return draw_scene(seed, start + i, size), (size, size)


# ---------------------------------------------------------------- commands

def number(kind, zero=False, most=2 ** 32):
    """An argparse type: a number greater than 0, or 0 too, and at most `most`."""
    def parse(text):
        value = kind(text)
        if not (0 < value <= most or zero and value == 0):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if zero else 'greater than'} 0 and at most {most}")
        return value
    parse.__name__ = "number" if kind is float else "whole number"  # argparse: "invalid … value"
    return parse


MOST_FAULTS = 20  # that are printed
QUERIES = {"DETR": 100, "Deformable DETR": 300}


def first_of(faults, indent="  "):
    """Lines for the first faults, and one for how many there are more."""
    more = [f"{indent}… and {len(faults) - MOST_FAULTS:,} more"] if len(faults) > MOST_FAULTS else []
    return [f"{indent}{fault}" for fault in faults[:MOST_FAULTS]] + more


def check(images_dir, json_path):
    """What is in a dataset and what is wrong with it: (text, whether training on it would stop).

    Reads every image; the figures are of those that can be used. Raises DataError if there are none.
    """
    coco = read_json(json_path)
    if wrong := list(faults(coco)):
        return "\n".join([f"{json_path}: faults, {len(wrong):,}", *first_of(wrong)]), True
    numbered = [str(a["id"]) for a in coco["annotations"] if a.get("id") is not None]
    data = load_coco(images_dir, json_path, transform=None, skip_bad=True)
    sizes = collections.Counter((image["width"], image["height"]) for image in data.images)
    objects = np.array([len(labels) for labels in data.labels])
    lines = [f"{json_path}", f"  images   {len(data):,}, {np.sum(objects == 0):,} of them without objects"
             + (f"; {len(data.bad):,} more cannot be used" if data.bad else ""),
             "  sizes    " + ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes.most_common(5))
             + (f" and {len(sizes) - 5} more" if len(sizes) > 5 else ""),
             f"  objects  {objects.sum():,}; per image: median {np.median(objects):.0f}, 95 % up to "
             f"{np.percentile(objects, 95):.0f}, most {objects.max()}", "",
             f"  {'id':>4}  {'class':20} {'boxes':>8} {'images':>8} {'smallest':>9} {'median':>7} {'largest':>8}  (side, px)"]
    labels = torch.cat(data.labels).numpy()
    sides = torch.cat(data.boxes)[:, 2:].prod(1).sqrt().numpy()
    image_of = np.repeat(np.arange(len(data)), objects)
    for label, category in enumerate(data.categories):
        mine = labels == label
        side = "{:9.0f} {:7.0f} {:8.0f}".format(*np.percentile(sides[mine], [0, 50, 100])) if mine.any() else f"{'n/a':>9}"
        lines.append(f"  {category['id']:>4}  {category['name']:20} {mine.sum():8,} {len(set(image_of[mine])):8,} {side}")
    lines += ["", f"  boxes without area, removed       {data.removed:,}",
              f"  boxes reaching outside, clipped   {data.clipped:,}",
              f"  crowd regions, not trained on     {sum(a['iscrowd'] for a in data.annotations):,}",
              f"  annotation ids used again         {len(numbered) - len(set(numbered)):,}",
              f"  images that cannot be used        {len(data.bad):,}", *first_of(data.bad, "    ")]
    lines += [f"  images with more objects than {name}'s {n} queries  {(objects > n).sum():,} ({(objects > n).mean():.1%})"
              for name, n in QUERIES.items()]
    return "\n".join(lines), bool(data.bad)


def print_checks(datasets):
    """Print the check of each dataset; the exit status, 1 if any of them would stop a training."""
    status, classes = 0, set()
    for files in datasets:
        try:
            text, stops = check(*files)
            if not stops:
                classes.add(class_names(sorted(read_json(files[1])["categories"], key=lambda category: category["id"])))
        except DataError as error:
            text, stops = f"error: {error}", True
        print(text + "\n")
        status |= stops
    if len(classes) > 1:
        print("the splits have different classes: " + " | ".join(sorted(classes)))
        status = 1
    return int(status)


def write_scenes(out, counts, size, seed):
    """Synthetic scenes as a dataset on disk, in the patches layout; counts: {"train": n, "val": n}."""
    partial = Path(f"{out}.partial")  # a folder that is there is whole
    shutil.rmtree(partial, ignore_errors=True)
    for split, n in counts.items():
        images_dir, json_path = split_files(partial, split)
        data = synthetic(split, n, size, transform=None, seed=seed)
        images_dir.mkdir(parents=True)
        for i, image in enumerate(data.images):
            data.read(i)[0].save(images_dir / image["file_name"])
        coco = {"images": data.images, "categories": data.categories, "annotations": data.annotations}
        json_path.write_text(json.dumps(coco))
    partial.rename(out)


def prepare(args):
    """The command: prepare the splits, print what was done and what is wrong; the exit status."""
    import patches
    if args.overlap >= args.patch:
        raise DataError(f"--overlap {args.overlap} must be smaller than --patch {args.patch}")
    there = [split for split in ("train", "val", "test") if (Path(args.raw) / split / "images").is_dir()]
    splits = list(dict.fromkeys(args.splits or there))
    if not splits:
        raise DataError(f"{args.raw}: has none of the folders train/images, val/images and test/images")
    if args.annotations and len(splits) > 1:
        raise DataError(f"--annotations {args.annotations} is of one split; name it with --splits")
    settings, status = {"patch": args.patch, "overlap": args.overlap, "devkit": args.devkit}, 0
    for split in splits:
        text, bad = patches.prepare_split(args.raw, args.out, split, settings, args.workers, args.limit, args.skip_bad, args.annotations)
        print(text)
        for problem in bad:
            print(f"  {problem}", file=sys.stderr)
        if bad:
            print(f"error: {len(bad)} images of {split} are bad" + (", left out" if args.skip_bad else
                  "; mend them and call again, what is finished is kept, or leave them out with --skip_bad"), file=sys.stderr)
            status |= not (args.skip_bad and split_files(args.out, split)[1].exists())
    return int(status)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    count, natural = number(int), number(int, zero=True)
    sub = commands.add_parser("prepare", help="cut iSAID's raw release into patches with COCO annotations")
    sub.add_argument("raw", help="a folder with {train,val,test}/images, the masks beside the images")
    sub.add_argument("out", help="folder to write; what an interrupted call has left there is continued")
    sub.add_argument("--splits", nargs="+", choices=("train", "val", "test"), help="(default: those in RAW)")
    sub.add_argument("--patch", type=count, default=800, metavar="N", help="pixels a side (default %(default)s)")
    sub.add_argument("--overlap", type=natural, default=200, metavar="N", help="of neighbouring patches (default %(default)s)")
    sub.add_argument("--workers", type=count, default=min(8, os.cpu_count() or 1), metavar="N",
                     help="processes, up to 2 GB each for the largest images (default here: %(default)s)")
    sub.add_argument("--limit", type=count, metavar="N", help="only the first N images of each split")
    sub.add_argument("--annotations", metavar="FILE", help="objects from the official file of whole images instead of from masks")
    sub.add_argument("--devkit", action="store_true", help="keep the devkit's oddities: long images whole, objects with a stray pixel "
                     "and P1527, P1530 left out")
    sub.add_argument("--skip_bad", action="store_true", help="leave images out that cannot be used")
    sub = commands.add_parser("check", help="print what is in a dataset and what is wrong with it")
    sub.add_argument("data", nargs="?", help="a folder with {train,val}/images and {split}/instancesonly_filtered_{split}.json")
    sub.add_argument("--images", metavar="DIR", help="instead: a folder of images …")
    sub.add_argument("--json", metavar="FILE", help="… and its COCO annotation file")
    sub = commands.add_parser("scenes", help="write synthetic scenes as a dataset")
    sub.add_argument("out", help="folder to write")
    sub.add_argument("--train", type=count, default=100, metavar="N", help="number of training scenes (default %(default)s)")
    sub.add_argument("--val", type=count, default=20, metavar="N", help="number of held-out scenes (default %(default)s)")
    sub.add_argument("--image_size", type=count, default=SCENE_SIZE, metavar="N", help="pixels a side (default %(default)s)")
    sub.add_argument("--seed", type=natural, default=0, metavar="N", help="(default %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.command == "prepare":
            sys.exit(prepare(args))
        elif args.command == "scenes":
            if Path(args.out).exists():
                sys.exit(f"error: {args.out} exists already; name a new folder")
            write_scenes(args.out, {"train": args.train, "val": args.val}, args.image_size, args.seed)
            print(f"{args.train} + {args.val} scenes in {args.out}")
        elif args.images or args.json:
            if not (args.images and args.json):
                parser.error("--images and --json go together")
            sys.exit(print_checks([(args.images, args.json)]))
        elif not args.data:
            parser.error("name a dataset folder, or --images and --json")
        else:
            splits = [split for split in ("train", "val") if (Path(args.data) / split).is_dir()]
            if not splits:
                raise DataError(f"{args.data}: has no folder train or val; expected is {split_files(args.data, 'train')[1]}")
            status = print_checks([split_files(args.data, split) for split in splits])
            if len(splits) < 2:
                print(f"there is no {'train' if splits == ['val'] else 'val'}; to train with --data both are needed")
            sys.exit(status or len(splits) < 2)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    import isaid  # the same module that others import, so that its errors are theirs
    try:
        isaid.main()
    except KeyboardInterrupt:
        sys.exit(130)
