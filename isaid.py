"""Data: COCO-format datasets such as iSAID's patches, augmentation, synthetic aerial scenes, a check of a dataset.

iSAID: Waqas Zamir et al., "iSAID: A Large-scale Dataset for Instance Segmentation in Aerial Images" (arXiv 1905.12886).
Boxes in files are xywh pixels; an item's boxes are cxcywh in 0..1; masks of padding are True where there is no image.

    python isaid.py check DATA                     what is in a dataset and what is wrong with it
    python isaid.py scenes OUT --train 20 --val 5  synthetic scenes as a dataset on disk
"""
import argparse
import collections
import functools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torchvision import tv_tensors
from torchvision.transforms import v2

CLASSES = ("ship", "storage_tank", "baseball_diamond", "tennis_court", "basketball_court", "Ground_Track_Field", "Bridge",
           "Large_Vehicle", "Small_Vehicle", "Helicopter", "Swimming_pool", "Roundabout", "Soccer_ball_field", "plane", "Harbor")
SCENE_SIZE, SCENES = 128, {"train": 1000, "val": 200}  # of the synthetic dataset
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbones expect


class DataError(ValueError):
    """Something is wrong with the data; the message names the file, the value and what to do."""


# ---------------------------------------------------------------- COCO format

class Detection(torch.utils.data.Dataset):
    """Images with boxes. Item i: (image (3, H, W) float normalised, target), a target being

    {"image_id": int, "size": (height, width) before resizing, "labels": (T,) int64, "boxes": (T, 4) cxcywh in 0..1}.

    coco: {"images", "annotations", "categories"} as in a COCO file, every image with its size. read(i) returns the PIL
    image. Boxes are clipped to their image; those left without area are removed. `clipped` and `removed` count them.
    Crowd regions (iscrowd 1) are kept for the evaluation, which ignores them, and are no training targets.
    Augmentation depends on (seed, epoch, i) alone, not on workers or order; set `epoch` before each pass.
    """

    def __init__(self, name, coco, read, transform, seed=0):
        self.name, self.read, self.transform, self.seed, self.epoch = name, read, transform, seed, 0
        self.images = coco["images"]
        self.categories = sorted(({"id": c["id"], "name": str(c["name"])} for c in coco["categories"]), key=lambda c: c["id"])
        self.annotations, self.clipped, self.removed = clean_boxes(name, self.images, coco["annotations"], self.categories)
        label = {category["id"]: i for i, category in enumerate(self.categories)}
        per_image = collections.defaultdict(list)
        for annotation in self.annotations:
            if not annotation["iscrowd"]:
                per_image[annotation["image_id"]].append(annotation)
        self.boxes = [torch.tensor([a["bbox"] for a in per_image[image["id"]]]).view(-1, 4) for image in self.images]  # xywh
        self.labels = [torch.tensor([label[a["category_id"]] for a in per_image[image["id"]]], dtype=torch.int64)
                       for image in self.images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, size = self.images[i], (self.images[i]["height"], self.images[i]["width"])
        boxes = tv_tensors.BoundingBoxes(self.boxes[i], format="XYWH", canvas_size=size)
        sample = {"image": self.read(i), "boxes": boxes, "labels": self.labels[i]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, self.epoch, i]).generate_state(1)[0]))
            sample = self.transform(sample)
        h, w = sample["image"].shape[-2:]
        boxes = sample["boxes"].as_subclass(torch.Tensor) / torch.tensor([w, h, w, h])
        return sample["image"].as_subclass(torch.Tensor), {"image_id": image["id"], "size": size, "labels": sample["labels"],
                                                           "boxes": boxes}

    def counts(self):
        """Number of boxes of each class, in the order of the labels."""
        return np.bincount(torch.cat(self.labels).numpy(), minlength=len(self.categories)).tolist()


def clean_boxes(name, images, annotations, categories):
    """Annotations with boxes clipped to their images and complete in area and iscrowd; how many were clipped, removed."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    known, kept, clipped, removed = {c["id"] for c in categories}, [], 0, 0
    for annotation in annotations:
        if annotation["image_id"] not in sizes:  # of an image beyond the limit
            continue
        if annotation["category_id"] not in known:
            raise DataError(f"{name}: annotation {annotation.get('id')} has category_id {annotation['category_id']}, "
                            f"which is not among the categories {sorted(known)}")
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
        area = annotation.get("area", bw * bh)
        kept.append({**annotation, "bbox": inside if outside else box, "area": area,
                     "iscrowd": int(annotation.get("iscrowd", 0)), "id": len(kept) + 1})  # pycocotools takes id 0 for "none"
    return kept, clipped, removed


def load_json(path):
    """A COCO file as a dict with images, annotations, categories; DataError if it is anything else."""
    try:
        coco = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); the annotations are expected there") from None
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON ({error}); was it copied completely?") from None
    for key, fields in (("images", ("id", "file_name")), ("categories", ("id", "name")),
                        ("annotations", ("image_id", "category_id", "bbox"))):
        entries = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: has no list {key!r}; a COCO file has images, annotations and categories")
        for i, entry in enumerate(entries):
            missing = [field for field in fields if field not in entry]
            if missing:
                raise DataError(f"{path}: entry {i} of {key!r} has no {missing[0]!r}")
        if key != "annotations":
            twice = [k for k, n in collections.Counter(entry["id"] for entry in entries).items() if n > 1]
            if twice:
                raise DataError(f"{path}: id {twice[0]} occurs twice among the {key}")
    for annotation in coco["annotations"]:
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)):
            raise DataError(f"{path}: annotation {annotation.get('id')} has bbox {box!r}; it must be 4 numbers x, y, width, height")
    return coco


def load_coco(images_dir, json_path, transform, limit=None, seed=0):
    """The dataset of a folder of images and a COCO file; `limit` takes the first images only. Raises DataError."""
    images_dir, coco = Path(images_dir), load_json(json_path)
    if not images_dir.is_dir():
        raise DataError(f"{images_dir}: no such folder; the images of {json_path} are expected there")
    if not coco["categories"]:
        raise DataError(f"{json_path}: has no categories")
    ids = {image["id"] for image in coco["images"]}
    astray = [a for a in coco["annotations"] if a["image_id"] not in ids]
    if astray:
        raise DataError(f"{json_path}: {len(astray)} annotations belong to images that are not listed, the first to image_id "
                        f"{astray[0]['image_id']}")
    images = coco["images"][:limit]
    if not images:
        raise DataError(f"{json_path}: has no images")
    paths = [images_dir / image["file_name"] for image in images]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{json_path}: {len(missing)} of {len(paths)} images are missing, the first is {missing[0]}")
    for image, path in zip(images, paths):
        if not image.get("width") or not image.get("height"):  # as in some of iSAID's own files
            with open_image(path) as opened:
                image["width"], image["height"] = opened.size
    return Detection(str(json_path), {**coco, "images": images}, functools.partial(_read, paths), transform, seed)


def split_files(root, split):
    """Where the patches layout keeps a split: (folder of images, annotation file)."""
    return Path(root) / split / "images", Path(root) / split / f"instancesonly_filtered_{split}.json"


def has_files(args):
    """Whether a run's flags name a dataset on disk; without one it uses synthetic scenes."""
    return bool(args.data or args.train_json)


def class_names(categories):
    return ", ".join(f"{c['id']} {c['name']}" for c in categories)


def open_split(split, args, train):
    """The split that a run's flags name: a folder (data), COCO files ({split}_images, {split}_json), or synthetic scenes.

    args also holds image_size, limit_{split}, seed, hflip, vflip, quarter_turns. Raises DataError.
    """
    limit, size = getattr(args, f"limit_{split}"), args.image_size or (None if has_files(args) else SCENE_SIZE)
    augmentation = transforms(train, size, args.hflip, args.vflip, args.quarter_turns)
    if not has_files(args):
        return synthetic(split, limit or SCENES[split], size, augmentation, args.seed)
    files = split_files(args.data, split) if args.data else (getattr(args, f"{split}_images"), getattr(args, f"{split}_json"))
    return load_coco(*files, augmentation, limit, args.seed)


def open_image(path):
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: is not an image that can be read ({error})") from None


def _read(paths, i):
    with open_image(paths[i]) as image:
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
            raise DataError(f"{paths[i]}: is damaged ({error}); copy it again or remove it") from None


def collate(batch):
    """[(image, target)] -> images (B, 3, H, W) padded right and below, padding (B, H, W), [target]."""
    images, targets = zip(*batch)
    H, W = (max(image.shape[d] for image in images) for d in (1, 2))
    batch, padding = images[0].new_zeros(len(images), 3, H, W), torch.ones(len(images), H, W, dtype=torch.bool)
    for i, image in enumerate(images):
        _, h, w = image.shape
        batch[i, :, :h, :w], padding[i, :h, :w] = image, False
    return batch, padding, list(targets)


# ---------------------------------------------------------------- augmentation

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
                       v2.ConvertBoundingBoxFormat("CXCYWH"), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(MEAN, STD)])


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
def _cached_scene(seed, n, size):
    return draw_scene(seed, n, size)


def _read_scene(seed, start, size, i):
    return _cached_scene(seed, start + i, size)


CIRCLE = np.exp(2j * np.pi * np.arange(-24, 25) / 24)  # two turns in steps of 15 degrees: any arc is a slice of it


def rect(x, y, w, h):
    """Rectangle of w x h centred on (x, y), closed so that it can be stroked as well as filled."""
    return x + 1j * y + np.array([-w - 1j * h, w - 1j * h, w + 1j * h, -w + 1j * h, -w - 1j * h]) / 2


def arc(x, y, r, start=-180, stop=180):
    """Arc about (x, y) between two angles, multiples of 15 degrees; the whole circle by default."""
    return CIRCLE[start // 15 + 24:stop // 15 + 25] * r + x + 1j * y


def capsule(x, r):
    """Two half circles of radius r about (x, 0) and (-x, 0), joined by straight sides."""
    return np.concatenate([arc(x, 0, r, -90, 90), -arc(x, 0, r, -90, 90), arc(x, 0, r, -90, -90)])


def mirror(*half):
    """Polygon symmetric about the x axis, from its points with y >= 0, front to back."""
    return np.append(half, np.conj(half[::-1]))


def both(*polygons):
    """The polygons, and the same again at the other end of the object."""
    return (*polygons, *(-np.asarray(p) for p in polygons))


BLADES = [.15 + .36 * CIRCLE[24 + k] * (1 + s) for k in (3, 9) for s in (-.06j, .06j)]  # rotor, at 45 and 135 degrees
HELICOPTER = mirror(.42, .38 + .06j, .28 + .08j, *BLADES[:2], .15 + .09j, *BLADES[2:], .02 + .08j, -.08 + .04j,
                    -.4 + .03j, -.41 + .1j, -.5 + .1j, -.48 + .02j)
PLANE = mirror(.5, .47 + .03j, .4 + .05j, .14 + .05j, -.1 + .46j, -.19 + .46j, -.07 + .05j, -.32 + .04j, -.44 + .18j,
               -.5 + .18j, -.45 + .02j)
SHIP = mirror(.5, .36 + .1j, .18 + .17j, -.42 + .17j, -.5 + .13j)
TRUCK = mirror(.5 + .1j, .47 + .14j, .3 + .14j, .28 + .07j, .22 + .07j, .22 + .16j, -.5 + .16j)
CAR = mirror(.5 + .12j, .44 + .22j, .2 + .25j, -.38 + .25j, -.48 + .2j, -.5 + .1j)
PIER = mirror(*(x + p for x in (.42, .19, -.04, -.27, -.5) for p in (.08 + .08j, .08 + .31j, .31j, .08j)))
KIDNEY = (np.abs(CIRCLE[:24] - .25j) ** 1.5 * .3 + .12) * CIRCLE[:24]
QUARTERS = (1, 1j, -1, -1j)  # the four directions
CROSSING = np.concatenate([q * np.append([.5 - .09j, .5 + .09j], arc(0, 0, .37, 15, 75)) for q in QUARTERS])
BASES = (-.28, -.04 + .24j, .2, -.04 - .24j)

FIXED = {"W": (238, 238, 232), "K": (44, 48, 54), "B": (58, 98, 116)}  # white, nearly black, water
PAINT = ((238, 238, 232), (170, 176, 182), (70, 76, 86), (168, 48, 42), (48, 84, 142), (206, 172, 66))
PALE = ((238, 238, 232), (216, 214, 204), (186, 192, 194), (206, 184, 158))
CLAY = ((176, 128, 84), (190, 146, 104), (166, 104, 72), (172, 84, 64))
COURT = ((58, 98, 150), (64, 122, 88), (172, 92, 66), (104, 116, 128))
STONE = ((136, 136, 134), (166, 162, 154), (116, 116, 120))
LAWN = ((88, 140, 68), (102, 150, 82), (76, 124, 62))
AQUA = ((70, 190, 214), (92, 206, 222), (58, 164, 206))


class Shape(NamedTuple):
    lengths: tuple  # shortest and longest, in pixels
    slim: float     # smallest width, as a share of the drawn one
    height: float   # of the shadow, in pixels
    a: tuple        # colours to choose from, for the parts named "a" ("a+" a little lighter, "a-" darker) ...
    b: tuple        # ... and for those named "b"
    parts: tuple    # (colour, line width or 0 for filled, polygons ...), bottom first; the first holds all the others


SHAPES = {
    "ship": Shape((20, 44), .85, 2, PAINT, CLAY + PALE, (
        ("a", 0, SHIP), ("b", 0, SHIP * .84), ("b-", .03, *(rect(x, 0, .13, .17) for x in (.2, .02, -.16))),
        ("W", 0, rect(-.35, 0, .1, .24)), ("K", 0, rect(-.38, 0, .03, .1)))),
    "storage_tank": Shape((12, 30), 1, 3, PALE, PALE, (
        ("a-", 0, arc(0, 0, .5)), ("a", 0, arc(0, 0, .45)), ("a+", 0, np.append(arc(0, 0, .42, 0, 90), 0)),
        ("a-", 0, np.append(arc(0, 0, .42, -180, -90), 0)), ("a-", .02, arc(0, 0, .28)), ("K", 0, arc(0, 0, .05)))),
    "baseball_diamond": Shape((24, 42), 1, 0, CLAY, LAWN, (
        ("a", 0, np.append(arc(-.36, 0, .72, -45, 45), -.36)), ("b", 0, BASES), ("a", 0, arc(-.04, 0, .06)),
        ("W", .025, CIRCLE[[21, 24, 27]] * [.68, 0, .68] - .34), ("W", 0, *(arc(b, 0, .04) for b in BASES)))),
    "tennis_court": Shape((22, 36), 1, 0, COURT, COURT, (
        ("b", 0, rect(0, 0, 1, .54)), ("a+", 0, rect(0, 0, .76, .36)), ("K", .035, (-.23j, .23j)),
        ("W", .02, rect(0, 0, .76, .36), *both((-.38 + .12j, .38 + .12j), (.2 - .12j, .2 + .12j)), (-.2, .2)))),
    "basketball_court": Shape((20, 34), 1, 0, CLAY + COURT, COURT, (
        ("a-", 0, rect(0, 0, 1, .6)), ("a", 0, rect(0, 0, .92, .52)),
        ("b", 0, *both(rect(.37, 0, .18, .18)), arc(0, 0, .1)),
        ("W", .02, *both(rect(.37, 0, .18, .18), arc(.42, 0, .22, 90, 270), arc(.28, 0, .09, 90, 270)),
         arc(0, 0, .1), (-.26j, .26j), rect(0, 0, .92, .52)))),
    "Ground_Track_Field": Shape((36, 48), 1, 0, CLAY[2:], LAWN, (
        ("a", 0, capsule(.22, .28)), ("a+", .012, capsule(.22, .25), capsule(.22, .215)), ("b", 0, capsule(.22, .185)),
        ("b+", 0, rect(0, 0, .46, .26)), ("W", .012, rect(0, 0, .46, .26), (-.13j, .13j), arc(0, 0, .06)))),
    "Bridge": Shape((32, 48), .9, 3, STONE, STONE, (
        ("a-", 0, rect(0, 0, 1, .22)), ("a", 0, rect(0, 0, 1, .17)), ("a+", .03, *both((-.5 + .095j, .5 + .095j))),
        ("W", .025, *((x, x + .06) for x in np.arange(-.47, .45, .125))))),
    "Large_Vehicle": Shape((20, 34), .9, 2, PAINT, PAINT, (
        ("K", 0, TRUCK), ("a", 0, rect(-.14, 0, .7, .3)), ("b", 0, rect(.38, 0, .17, .27)),
        ("a-", .02, *(rect(x, 0, 0, .3) for x in (-.36, -.22, -.08, .08))), ("K", 0, rect(.455, 0, .05, .22)))),
    "Small_Vehicle": Shape((12, 16), 1, 1.5, PAINT, PAINT, (
        ("a", 0, CAR), ("K", 0, rect(-.06, 0, .56, .4)), ("a+", 0, rect(-.08, 0, .28, .38)))),
    "Helicopter": Shape((22, 34), 1, 4, PAINT, PAINT, (
        ("a", 0, HELICOPTER), ("K", 0, rect(.32, 0, .1, .11)), ("a+", 0, arc(.15, 0, .045)),
        ("K", .05, *((.15 - .35 * q, .15 + .35 * q) for q in CIRCLE[[27, 33]])))),
    "Swimming_pool": Shape((14, 28), .8, 0, AQUA, PALE, (
        ("b", 0, KIDNEY), ("a-", 0, KIDNEY * .84), ("a", 0, KIDNEY * .74),
        ("a+", .03, *((x - .2j, x + .06 - .02j) for x in (-.2, 0, .18))))),
    "Roundabout": Shape((26, 44), 1, 0, STONE, LAWN, (
        ("a", 0, CROSSING), ("W", .012, arc(0, 0, .29)), ("W", .02, *((.4 * q, .48 * q) for q in QUARTERS)),
        ("W", 0, arc(0, 0, .2)), ("b", 0, arc(0, 0, .17)), ("b-", 0, arc(-.05, .05, .06), arc(.06, -.04, .07)))),
    "Soccer_ball_field": Shape((32, 44), .9, 0, LAWN, LAWN, (
        ("a", 0, rect(0, 0, 1, .66)), ("a+", 0, *both(rect(.345, 0, .115, .58), rect(.115, 0, .115, .58))),
        ("W", .016, rect(0, 0, .92, .58), (-.29j, .29j), arc(0, 0, .1)),
        ("W", .016, *both(rect(.39, 0, .14, .32), rect(.435, 0, .05, .15))))),
    "plane": Shape((22, 46), .9, 3, PALE, PAINT[3:], (
        ("a-", 0, PLANE), ("K", 0, *(rect(.07, y, .13, .05) for y in (-.2, .2))), ("a+", .09, (-.42, .43)),
        ("b", .045, (-.48, -.3)), ("K", 0, rect(.445, 0, .03, .05)))),
    "Harbor": Shape((32, 46), .9, 2, STONE, CLAY, (
        ("a", 0, PIER), ("a+", .08, (-.48, .48)), ("a-", .02, *both(*((x + .1j, x + .29j) for x in PIER.real[1:20:4] - .04))))),
    # from here on: things without a label
    "tree": Shape((6, 12), 1, 2, LAWN, LAWN, (("a-", 0, arc(0, 0, .5)), ("a", 0, arc(-.1, -.1, .25)))),
    "roof": Shape((12, 20), .8, 2.5, CLAY + STONE, PALE, (("a-", 0, rect(0, 0, 1, .7)), ("a", 0, rect(0, -.175, 1, .35)))),
    "pond": Shape((60, 80), .8, 0, LAWN, LAWN, (("b-", 0, KIDNEY * 1.4j), ("B", 0, KIDNEY * 1.32j))),
}

# --- layout ----------------------------------------------------------------------------------------------------------
GROUNDS = {  # dark, light, patch colour; waves or furrows: spacing in pixels, strength, bend; loose things, per 128 x 128
    "water": ((34, 66, 88), (66, 108, 124), (84, 134, 138), 6, 4, 3, ()),
    "grass": ((74, 100, 54), (122, 146, 84), (150, 146, 98), 9, 4, .3, ("tree",) * 12),
    "soil": ((128, 104, 76), (178, 154, 118), (120, 122, 78), 7, 5, .6, ("tree",) * 4),
    "paved": ((118, 118, 116), (152, 150, 146), (98, 98, 100), 24, 3, 0, ()),
    "town": ((104, 108, 84), (142, 138, 116), (92, 112, 68), 3, 1, 0, ("roof",) * 8 + ("tree",) * 10)}
LAND = ("grass", "soil", "paved", "town")
# Bridges come both at sea and on land, half as often each: with 0.17 of scenes at sea, all classes are about as common.
AT_SEA = ("ship", "ship", "Harbor", "Harbor", "Bridge")
ON_LAND = tuple(name for name in CLASSES if name not in ("ship", "Harbor"))


class Thing(NamedTuple):
    name: str
    turn: complex    # length in pixels, times the direction of the drawing's x axis
    width: float     # as a share of the drawn one
    centre: complex  # in pixels
    box: tuple       # x0, y0, x1, y1 of the outline in pixels, before clipping to the image


def moved(points, turn, width, centre=0):
    """Points of a drawing, moved to their place in the image."""
    points = np.asarray(points)
    return (points.real + 1j * width * points.imag) * turn + centre


def visible(box, size):
    """Share of a box that lies in the image."""
    w, h = min(box[2], size) - max(box[0], 0), min(box[3], size) - max(box[1], 0)
    return max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def place(rng, name, things, size, last=None):
    """One more Thing where there is room, next to the last one if that is given; None if there is no room."""
    (low, high), slim = SHAPES[name][:2]
    turn = last.turn if last else complex((low + (high - low) * rng.random()) * np.exp(2j * np.pi * rng.random()))
    width = last.width if last else slim + (1 - slim) * rng.random()
    outline = moved(SHAPES[name].parts[0][2], turn, width)
    x0, y0, x1, y1 = (float(v) for c in (outline.real, outline.imag) for v in (c.min(), c.max()))
    x0, y0, x1, y1 = x0, x1, y0, y1
    spots = (rng.random((10, 2)) * size).tolist()
    if last:  # one step to the left or right, as wide as keeps the two boxes apart
        side = 1j * turn / abs(turn)
        step = side * (3 + min((x1 - x0) / (abs(side.real) + 1e-9), (y1 - y0) / (abs(side.imag) + 1e-9)))
        spots = [[c.real, c.imag] for c in (last.centre + step, last.centre - step)] + spots
    for x, y in spots:
        if visible((x + x0, y + y0, x + x1, y + y1), size) < .6:  # too little would be seen: move it inside
            x, y = min(max(x, -x0), size - x1), min(max(y, -y0), size - y1)
        box = (x + x0, y + y0, x + x1, y + y1)
        if all(box[0] > b[2] + 2 or box[2] < b[0] - 2 or box[1] > b[3] + 2 or box[3] < b[1] - 2
               for *_, b in things):
            return Thing(name, turn, width, complex(x, y), box)
    return None


def layout(rng, size):
    """Kind of ground, and the labelled Things on it: none in a tenth of scenes, else 1 to 7 per 128 x 128 pixels."""
    kind = "water" if rng.random() < .17 else LAND[int(rng.random() * len(LAND))]
    classes, things = AT_SEA if kind == "water" else ON_LAND, []
    for _ in range(0 if rng.random() < .1 else rng.integers(1, 8 * (size / 128) ** 2)):
        last = things[-1] if things and rng.random() < .35 else None  # alike things often stand side by side
        name = last.name if last else classes[int(rng.random() * len(classes))]
        thing = place(rng, name, things, size, last)
        things += [thing] if thing else []
    return kind, things


def scene_objects(seed, n, size):
    """labels (k,) int64, boxes (k, 4) float32 x0 y0 x1 y1 in pixels, areas (k,) in square pixels; draws nothing."""
    _, things = layout(np.random.default_rng([seed, n]), size)
    labels = np.array([CLASSES.index(t.name) for t in things], np.int64)
    boxes = np.array([t.box for t in things], np.float32).reshape(-1, 4)
    outlines = [moved(SHAPES[t.name].parts[0][2], t.turn, t.width) for t in things]
    areas = [abs(np.vdot(p, np.roll(p, -1)).imag) / 2 * visible(t.box, size) for p, t in zip(outlines, things)]
    return labels, boxes.clip(0, size), np.array(areas)


# --- drawing ---------------------------------------------------------------------------------------------------------
def noise(rng, size, cells):
    """(size, size) float32 smooth random field: one octave per cell size in pixels, each half as strong as the last."""
    total = np.zeros((size, size), np.float32)
    for octave, cell in enumerate(cells):
        coarse = Image.fromarray(rng.random((size // cell + 2,) * 2, np.float32) - .5)
        total += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 2 ** octave
    return total


def bare_ground(rng, kind, size):
    """PIL image of the ground alone."""
    *colours, spacing, strength, bend, _ = GROUNDS[kind]
    dark, light, patch = np.float32(colours)
    fine, broad = noise(rng, size, (32, 16, 8, 4, 2)), noise(rng, size, (64, 32, 16))
    image = dark + (light - dark) * (.5 + .8 * fine[..., None])
    image += (patch - image) * np.clip(4 * broad - .6, 0, .8)[..., None]
    direction = np.exp(2j * np.pi * rng.random())
    ramp = np.float32(direction.real) * np.arange(size, dtype=np.float32)[:, None]
    ramp = ramp + np.float32(direction.imag) * np.arange(size, dtype=np.float32)
    if kind == "town":
        image[ramp % 64 < 10] = 112, 112, 114  # streets
    image += strength * np.sin(2 * np.pi * (ramp / spacing + bend * broad))[..., None]
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def draw_thing(rng, pen, thing, sun, fine):
    """Draw a Thing and its shadow, which falls along `sun`; `fine` is the number of canvas pixels per image pixel."""
    shape, tint = SHAPES[thing.name], .88 + .2 * rng.random() + .06 * rng.random(3)
    colours = FIXED | {"a": shape.a[int(rng.random() * len(shape.a))], "b": shape.b[int(rng.random() * len(shape.b))]}

    def pixels(points, shift=0):
        place = moved(points, thing.turn, thing.width, thing.centre + shift) * fine - .5 - .5j
        return place.view(float).tolist()

    for k in (.5, 1, 1.3) if shape.height else ():  # several faint copies make a soft edge
        pen.polygon(pixels(shape.parts[0][2], k * shape.height * sun), (0, 0, 0, 45))
    for name, width, *polygons in shape.parts:
        gain = tint * {"+": 1.16, "-": .76}.get(name[-1], 1)
        colour = tuple((np.array(colours[name[0]]) * gain).clip(0, 255).astype(int).tolist())
        for points in polygons:
            if width:
                pen.line(pixels(points), colour, max(1, round(width * abs(thing.turn) * fine)))
            else:
                pen.polygon(pixels(points), colour)


def draw_scene(seed, n, size, fine=2):
    """PIL RGB image of size x size pixels, drawn `fine` times as large and then reduced, for smooth edges."""
    rng = np.random.default_rng([seed, n])
    kind, things = layout(rng, size)
    loose = [place(rng, name, things, size) for name in GROUNDS[kind][-1] * max(1, size * size // 128 ** 2)]
    ponds = [t._replace(name="pond") for t in things if t.name == "Bridge" and kind != "water"]
    image = bare_ground(rng, kind, size).resize((size * fine,) * 2, Image.Resampling.NEAREST)
    pen, sun = ImageDraw.Draw(image, "RGBA"), np.exp(2j * np.pi * rng.random())
    for thing in ponds + [t for t in loose if t] + things:
        draw_thing(rng, pen, thing, sun, fine)
    light = (.85 + .3 * rng.random()) * np.asarray(image.reduce(fine), np.float32)
    light += 5 * rng.standard_normal((size, size, 1), np.float32)  # grain of the camera
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------- commands

QUERIES = {"DETR": 100, "Deformable DETR": 300}


def check(images_dir, json_path):
    """What is in a dataset and what is wrong with it, as text. Raises DataError if it cannot be opened at all."""
    data = load_coco(images_dir, json_path, transform=None)
    sizes, unlike = collections.Counter(), []
    for image in data.images:
        with open_image(Path(images_dir) / image["file_name"]) as opened:
            sizes[opened.size] += 1
            if opened.size != (image["width"], image["height"]):
                unlike.append(image["file_name"])
    objects = np.array([len(labels) for labels in data.labels])
    lines = [f"{json_path}", f"  images   {len(data):,}, {np.sum(objects == 0):,} of them without objects",
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
    lines += ["", f"  degenerate boxes (removed)   {data.removed:,}", f"  boxes reaching outside (clipped)  {data.clipped:,}",
              f"  images of another size than listed  {len(unlike):,}" + (f", the first {unlike[0]}" if unlike else "")]
    lines += [f"  images with more objects than {name}'s {n} queries  {(objects > n).sum():,} ({(objects > n).mean():.1%})"
              for name, n in QUERIES.items()]
    return "\n".join(lines)


def write_scenes(out, counts, size, seed):
    """Synthetic scenes as a dataset on disk, in the patches layout; counts: {"train": n, "val": n}."""
    for split, n in counts.items():
        images_dir, json_path = split_files(out, split)
        data = synthetic(split, n, size, transform=None, seed=seed)
        images_dir.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(data.images):
            data.read(i).save(images_dir / image["file_name"])
        json_path.write_text(json.dumps({"images": data.images, "categories": data.categories, "annotations": data.annotations}))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = commands.add_parser("check", help="print what is in a dataset and what is wrong with it")
    sub.add_argument("data", nargs="?", help="a folder with {train,val}/images and {split}/instancesonly_filtered_{split}.json")
    sub.add_argument("--images", help="instead: a folder of images …")
    sub.add_argument("--json", help="… and its COCO annotation file")
    sub = commands.add_parser("scenes", help="write synthetic scenes as a dataset")
    sub.add_argument("out", help="folder to write")
    sub.add_argument("--train", type=int, default=100, metavar="N", help="number of training scenes (default %(default)s)")
    sub.add_argument("--val", type=int, default=20, metavar="N", help="number of held-out scenes (default %(default)s)")
    sub.add_argument("--image_size", type=int, default=128, help="pixels a side (default %(default)s)")
    sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if args.command == "scenes":
            if Path(args.out).exists():
                sys.exit(f"error: {args.out} exists already; name a new folder")
            write_scenes(args.out, {"train": args.train, "val": args.val}, args.image_size, args.seed)
            print(f"{args.train} + {args.val} scenes in {args.out}")
        elif args.images or args.json:
            if not (args.images and args.json):
                parser.error("--images and --json go together")
            print(check(args.images, args.json))
        elif not args.data:
            parser.error("name a dataset folder, or --images and --json")
        else:
            splits = [split for split in ("train", "val") if (Path(args.data) / split).is_dir()]
            if not splits:
                raise DataError(f"{args.data}: has no folder train or val; expected is {split_files(args.data, 'train')[1]}")
            print("\n\n".join(check(*split_files(args.data, split)) for split in splits))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
