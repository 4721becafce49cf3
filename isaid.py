"""The dataset: COCO-format files such as iSAID's patches, augmentation, synthetic aerial scenes.

iSAID: Waqas Zamir et al., "iSAID: A Large-scale Dataset for Instance Segmentation in Aerial
Images" (arXiv 1905.12886).

    python isaid.py prepare RAW OUT                patches from iSAID's raw release
    python isaid.py check DATA                     what is in a dataset and what is wrong with it
    python isaid.py scenes OUT --train 20 --val 5  synthetic scenes as a dataset on disk

DATA is a folder in the layout of iSAID's patches, of COCO or of Roboflow; see coco.find_split.
"""

import atexit
import collections
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from util import coco, distributed, isaid_prepare
from util.cli import Parser, command, number
from util.files import DataError, read_json, write_text
from util.images import MEAN, STD, check_size, read_image, read_size
from util.synthetic import draw_scene, scene_objects

SCENE_SIZE, SCENES = 128, {"train": 1000, "val": 200}  # of the synthetic dataset


class DetectionDataset(torch.utils.data.Dataset):
    """Images with boxes. Item i: (image (3, H, W) float normalised, target), a target being
    {"image_id": int, "file_name": str, "size": (height, width) before resizing, "labels": (T,)
    int64, "boxes": (T, 4) cxcywh in 0..1, "seed": int, for whatever else is random about it}.
    Item i + k * len(self) is image i once more, augmented in another way: augmentation depends on
    (seed, epoch, i) alone, not on workers or order. Set `epoch` before each pass.
    content: as in a COCO file. read(i, at_least) returns the PIL image, which may be smaller than
    its file if that leaves at_least pixels a side, and the file's (width, height). `cleaned` counts
    what coco.clean_boxes did. Crowd regions are for the evaluation alone, which ignores them."""

    def __init__(self, name, content, read, transform, seed=0):
        self.name, self.read, self.transform, self.seed = name, read, transform, seed
        self.epoch, self.min_size, self.images = 0, None, content["images"]
        categories = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
        self.categories = sorted(categories, key=lambda category: category["id"])
        self.annotations, self.cleaning_counts = coco.clean_boxes(
            self.images, content["annotations"]
        )
        self.warnings = list(coco.dataset_warnings(content))
        label = {category["id"]: i for i, category in enumerate(self.categories)}
        objects, found = collections.defaultdict(list), {}
        for a in self.annotations:
            if not a["iscrowd"]:
                objects[a["image_id"]].append((a["bbox"], label[a["category_id"]]))
        for i, mine in objects.items():
            boxes, labels = zip(*mine)
            found[i] = torch.tensor(boxes), torch.tensor(labels)
        none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)  # one for all the empty images
        self.boxes, self.labels = zip(*(found.get(image["id"], none) for image in self.images))

    def __len__(self):
        return len(self.images)

    def __iter__(self):  # an index beyond the last image is valid
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        i = index % len(self)
        image, (picture, (w, h)) = self.images[i], self.read(i, self.min_size)
        check_size(image, f"{self.name}: {image['file_name']}", (w, h))
        shrink = torch.tensor(picture.size * 2) / torch.tensor([w, h, w, h])
        how = {"format": "XYWH", "canvas_size": picture.size[::-1]}
        boxes = tv_tensors.BoundingBoxes(self.boxes[i] * shrink, **how)
        sample = {"image": picture, "boxes": boxes, "labels": self.labels[i]}
        place = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(place[0]))
            sample, seed = self.transform(sample), int(torch.randint(2**62, ()))
        H, W = sample["image"].shape[-2:]
        boxes = sample["boxes"].as_subclass(torch.Tensor) / torch.tensor([W, H, W, H])
        target = {"image_id": image["id"], "file_name": image["file_name"], "size": (h, w)}
        target.update(seed=seed, labels=sample["labels"], boxes=boxes)
        return sample["image"].as_subclass(torch.Tensor), target

    def counts(self):
        """Number of boxes of each class, in the order of the labels."""
        return torch.cat(self.labels).bincount(minlength=len(self.categories)).tolist()

    def summary(self, num_queries, image_size):
        """What a user should know before training on it, in lines of text."""
        lines = [f"{self.name}: {len(self):,} images, {sum(self.counts()):,} boxes"]
        lines += [f"{n:,} boxes {what}" for what, n in self.cleaning_counts.items()]
        if image_size and (n := self.tiny(image_size)):
            lines.append(f"{n:,} boxes under a pixel after resizing, not trained on")
        if n := sum(len(labels) > num_queries for labels in self.labels):
            share = f"{n:,} images ({n / len(self):.1%})"
            lines.append(f"{share} hold more objects than there are queries: {num_queries}")
        return f"\n{'':12}".join([*lines, *self.warnings])

    def side(self):
        """Pixels a side that its images usually have; None if it does not say."""
        sides = [max(image["width"], image["height"]) for image in self.images if "width" in image]
        return int(np.median(sides)) if sides else None

    def tiny(self, image_size):
        """Number of boxes that are under a pixel, and dropped, in images of image_size a side."""
        some = ((image, boxes) for image, boxes in zip(self.images, self.boxes) if len(boxes))
        sides = (b[:, 2:] * image_size / torch.tensor([i["width"], i["height"]]) for i, b in some)
        return sum(int((x < 1).any(1).sum()) for x in sides)


def load_coco(images_dir, json_path, transform, limit=None, seed=0, truth=True):
    """The dataset of a folder of images and a COCO file; the first `limit` images of it.
    Without `truth` the file needs no annotations and no categories. Raises DataError."""
    content = coco.load_json(json_path, truth)
    images = content["images"] = content["images"][:limit]
    if not images:
        raise DataError(f"{json_path}: has no images")
    paths = [coco.find_image(Path(images_dir), image["file_name"]) for image in images]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        share = f"{len(missing)} of {len(paths)}"
        raise DataError(f"{json_path}: {share} images are missing, the first is {missing[0]}")
    for image, path in zip(images, paths):
        if not image.get("width") or not image.get("height"):  # as in some of iSAID's own files
            image["width"], image["height"] = read_size(path)
    return DetectionDataset(
        str(json_path), content, functools.partial(_read, paths), transform, seed
    )


def _read(paths, i, at_least=None):
    return read_image(paths[i], at_least)


def load_split(split, args, train):
    """The images of a split, "train", "val" or "test", that a run's flags name.
    args: data (a folder, else synthetic scenes), image_size, limit_{split}, seed, augment and
    setting; a pretraining takes the images without annotations. Raises DataError."""
    limit = getattr(args, f"limit_{split}", None)
    transform = make_transforms(train, args.image_size, args.augment)
    if not args.data:
        return synthetic_dataset(
            split, limit or SCENES[split], args.image_size, transform, args.seed
        )
    if args.setting == "pretrain":
        name, paths = coco.find_images(args.data, split)
        images = [{"id": i, "file_name": str(path)} for i, path in enumerate(paths[:limit])]
        content = {"images": images, "annotations": [], "categories": []}
        data = DetectionDataset(
            str(name), content, functools.partial(_read, paths), transform, args.seed
        )
    else:
        files = coco.find_split(args.data, split)
        data = load_coco(*files, transform, limit, args.seed, truth=split != "test")
    data.min_size = args.image_size and round(1.2 * args.image_size)
    return data


def load_train_and_val(args):
    """(images to train on, images held out) as a run's flags say. Raises DataError."""
    if args.overfit:  # on the same few images
        args.limit_train = args.overfit
    train_set = load_split("train", args, train=not args.overfit)
    val_set = load_split("train" if args.overfit else "val", args, train=False)
    theirs, ours = (coco.class_names(data.categories) for data in (val_set, train_set))
    if ours != theirs:
        raise DataError(f"{train_set.name} has the classes {ours}, {val_set.name} {theirs}")
    if args.setting != "pretrain" and not any(map(len, train_set.labels)):
        cleaned = "".join(f"; {n:,} boxes {what}" for what, n in train_set.cleaning_counts.items())
        raise DataError(f"{train_set.name}: has no box to train on{cleaned}")
    return train_set, val_set


# ---------------------------------------------------------------- batches
def collate(batch):
    """[(image, target)] -> images (B, 3, H, W), padding (B, H, W), [target]; padded at the end."""
    images, targets = zip(*batch)
    H, W = (max(image.shape[d] for image in images) for d in (1, 2))
    batch = images[0].new_zeros(len(images), 3, H, W)
    padding = torch.ones(len(images), H, W, dtype=torch.bool)
    for i, image in enumerate(images):
        _, h, w = image.shape
        batch[i, :, :h, :w], padding[i, :h, :w] = image, False
    return batch, padding, list(targets)


def data_loader(data, workers, **options):
    """Batches of a dataset, in loader processes if workers > 0.
    The model's random numbers are left alone."""
    options.update(collate_fn=collate, generator=torch.Generator(), worker_init_fn=_leave_signals)
    return torch.utils.data.DataLoader(data, num_workers=workers, **options)


def epoch_batch_indices(data, args, epoch):
    """The shuffled batches of an epoch for this process, as lists of items.
    They depend on (seed, epoch) alone. What does not fill a step of all processes is left out."""
    size, world = args.batch_size, distributed.world_size()
    step = size * args.accumulate * world
    n = 50 * step if args.overfit else len(data)  # the same few images again and again
    generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
    order = torch.randperm(n, generator=generator).tolist()
    starts = range(distributed.rank() * size, n // step * step, world * size)
    return [order[i : i + size] for i in starts]


def epoch_loader(data, args, epoch, done=0):
    """Loads the batches of an epoch after the first `done`."""
    data.epoch = epoch
    batches = epoch_batch_indices(data, args, epoch)[done:]
    cuda = args.device.startswith("cuda")
    return data_loader(data, args.workers, batch_sampler=batches, pin_memory=cuda)


def _leave_signals(_):
    """In a loader process: signals that go to all processes are the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_loaders():
    """Loader processes ignore SIGTERM, with which multiprocessing would end those that are left."""
    left = multiprocessing.active_children()
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for an error
    for process in left:
        process.kill()


# ---------------------------------------------------------------- augmentation
floats = v2.ToDtype(torch.float32, scale=True)  # in 0..1
to_tensor = v2.Compose([v2.ToImage(), floats, v2.Normalize(MEAN, STD)])
AUGMENT = ("none", "flip", "crop", "aerial")


def random_size_crop(sample):
    """A crop with sides drawn between 384 and 600 pixels, as in the official DETR."""
    H, W = v2.functional.get_size(sample["image"])
    h, w = (int(torch.randint(min(384, n), min(n, 600) + 1, ())) for n in (H, W))
    top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
    return sample | {x: v2.functional.crop(sample[x], top, left, h, w) for x in ("image", "boxes")}


def make_transforms(train, image_size=None, augment="flip"):
    """From a PIL image and its boxes to a normalised tensor and boxes cxcywh in pixels.
    image_size N: every image becomes N x N, as in the paper. None: the official multi-scale
    recipe, in training the shorter side 480 to 800 with or without a random crop, else 800; the
    longer side at most 1333. augment, in training only: "none"; "flip": horizontally; "crop":
    flip, and a random N x N of 1.2 N x 1.2 N pixels, as the authors pretrain; "aerial": flips
    both ways and quarter turns, for images that have no up. Boxes under a pixel are dropped."""
    augment = augment if train else "none"
    steps = [] if augment == "none" else [v2.RandomHorizontalFlip()]
    if augment == "aerial":
        turns = [v2.RandomRotation((angle, angle), expand=True) for angle in (0, 90, 180, 270)]
        steps += [v2.RandomVerticalFlip(), v2.RandomChoice(turns)]
    if augment == "crop":
        steps += [v2.Resize((round(1.2 * image_size),) * 2), v2.RandomCrop(image_size)]
    elif image_size:
        steps.append(v2.Resize((image_size, image_size)))
    else:
        sides = list(range(480, 801, 32)) if train else [800]
        scale = v2.RandomShortestSize(sides, max_size=1333)
        cropped = v2.Compose([v2.RandomShortestSize([400, 500, 600]), random_size_crop, scale])
        steps.append(v2.RandomChoice([scale, cropped]) if train else scale)
    boxes = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    return v2.Compose([*steps, *boxes, v2.ConvertBoundingBoxFormat("CXCYWH"), to_tensor])


# ---------------------------------------------------------------- synthetic scenes
VAL_START = 1_000_000  # scenes from here on are held out
KEPT = 2**28  # bytes of scenes that are drawn once only


def synthetic_dataset(split, n, size, transform, seed=0):
    """A dataset of n synthetic scenes of size x size pixels of a split; drawn when asked for."""
    start = VAL_START if split == "val" else 0
    images, annotations = [], []
    for i in range(n):
        images.append({"id": i, "file_name": f"scene_{i:06d}.png", "width": size, "height": size})
        for label, (x0, y0, x1, y1), area in zip(*scene_objects(seed, start + i, size)):
            box = [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]
            found = {"image_id": i, "category_id": int(label) + 1}
            annotations.append({**found, "area": float(area), "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": isaid_prepare.CATEGORIES}
    read = SceneRenderer(seed, start, n, size)
    return DetectionDataset(f"synthetic scenes ({split})", content, read, transform, seed)


class SceneRenderer:
    """Draws scenes; keeps the first of them in memory that loader processes share."""

    def __init__(self, seed, start, n, size):
        self.seed, self.start, self.size = seed, start, size
        kept = min(n, KEPT // (3 * size * size))
        self.pixels = torch.empty(kept, size, size, 3, dtype=torch.uint8).share_memory_()
        self.drawn = torch.zeros(kept, dtype=torch.bool).share_memory_()

    def __call__(self, i, at_least=None):
        if i < len(self.drawn) and self.drawn[i]:
            return Image.fromarray(self.pixels[i].numpy()), (self.size, self.size)
        scene = draw_scene(self.seed, self.start + i, self.size)
        if i < len(self.drawn):
            self.pixels[i] = torch.from_numpy(np.array(scene))
            self.drawn[i] = True
        return scene, scene.size


def write_scenes(out, counts, size, seed):
    """Synthetic scenes as a dataset in the patches layout; counts: {"train": n, "val": n}."""
    partial = Path(f"{Path(out)}.partial")  # a folder that is there is whole
    shutil.rmtree(partial, ignore_errors=True)
    for split, n in counts.items():
        images_dir, json_path = coco.split_files(partial, split)
        data = synthetic_dataset(split, n, size, transform=None, seed=seed)
        images_dir.mkdir(parents=True)
        for i, image in enumerate(data.images):
            data.read(i)[0].save(images_dir / image["file_name"])
        keys = "images", "categories", "annotations"
        write_text(json_path, json.dumps({key: getattr(data, key) for key in keys}))
    partial.rename(out)


# ---------------------------------------------------------------- commands
MOST_FAULTS = 20  # that are printed
QUERIES = {"DETR": 100, "Deformable DETR": 300}


def check(images_dir, json_path, train=False):
    """What is in a dataset and what is wrong with it: (text, its classes or None if unusable).
    Reads every image. To train on, it must have boxes."""
    content = read_json(json_path)
    wrong, images = list(coco.validation_errors(content)), []
    for image in [] if wrong else content["images"]:
        path = coco.find_image(images_dir, image["file_name"])
        try:
            _, (w, h) = read_image(path)
            check_size(image, path, (w, h))
            images.append({**image, "width": w, "height": h})
        except DataError as error:
            wrong.append(str(error))
    data = DetectionDataset("", {**content, "images": images}, None, None) if images else None
    if not wrong and not images:
        wrong.append("has no images")
    if not wrong and train and not any(map(len, data.labels)):
        wrong.append("has no box to train on")
    text = [str(json_path), f"  faults   {len(wrong):,}"]
    text += [f"    {fault}" for fault in wrong[:MOST_FAULTS]]
    if len(wrong) > MOST_FAULTS:
        text.append(f"    … and {len(wrong) - MOST_FAULTS:,} more")
    if data:
        ids = [str(a["id"]) for a in content["annotations"] if a.get("id") is not None]
        text += statistics(data, len(ids) - len(set(ids)))
        text += [f"  look at this: {suspicion}" for suspicion in data.warnings]
    return "\n".join(text), None if wrong or not images else coco.class_names(data.categories)


def statistics(data, ids_again):
    """Lines about the images, boxes and classes of a dataset."""
    sizes = collections.Counter((image["width"], image["height"]) for image in data.images)
    common = ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes.most_common(5))
    objects = np.array([len(labels) for labels in data.labels])
    median, high, most = np.percentile(objects, [50, 95, 100])
    per_image = f"median {median:.0f}, 95 % up to {high:.0f}, most {most:.0f}"
    yield f"  images   {len(data):,}, {np.sum(objects == 0):,} of them without objects"
    yield f"  sizes    {len(sizes):,}, most often {common}"
    yield f"  objects  {objects.sum():,}; per image: {per_image}"
    yield f"  {'id':>4}  {'class':20} {'boxes':>8} {'smallest':>9} {'median':>7} {'largest':>8} px"
    labels, sides = torch.cat(data.labels), torch.cat(data.boxes)[:, 2:].prod(1).sqrt()
    for label, category in enumerate(data.categories):
        mine = sides[labels == label].numpy()
        row = f"  {category['id']:>4}  {category['name']:20} {len(mine):8,}"
        if len(mine):
            row += " {:9.0f} {:7.0f} {:8.0f}".format(*np.percentile(mine, [0, 50, 100]))
        yield row
    counts = {f"boxes {what}": n for what, n in data.cleaning_counts.items()}
    counts["crowd regions, not trained on"] = sum(a["iscrowd"] for a in data.annotations)
    counts["images under 2 pixels"] = sum(n for size, n in sizes.items() if min(size) < 2)
    counts["annotation ids used again"] = ids_again
    for what, n in counts.items():
        yield f"  {what:32}  {n:,}"
    empty = [c["name"] for c, n in zip(data.categories, data.counts()) if not n]
    if empty:
        more = f" and {len(empty) - 9:,} more" if len(empty) > 9 else ""
        yield f"  classes without boxes             {', '.join(empty[:9])}{more}"
    for name, n in QUERIES.items():
        share = f"{(objects > n).sum():,} ({(objects > n).mean():.1%})"
        yield f"  images with more objects than {name}'s {n} queries  {share}"


def check_dataset(root):
    """Print the check of a dataset; the exit status, 1 if training on it would stop."""
    found = []
    for split in ("train", "val"):
        try:
            text, classes = check(*coco.find_split(root, split), train=split == "train")
        except DataError as error:
            text, classes = f"error: {error}", None
        print(f"{text}\n")
        found.append(classes)
    if None not in found and found[0] != found[1]:
        print(f"the splits have different classes: {' | '.join(found)}")
    return int(None in found or found[0] != found[1])


@command
def main(argv=None):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    count, natural = number(int), number(int, zero=True)
    images, few = number(int, most=VAL_START), number(int, most=256)
    add = commands.add_parser("prepare", help="cut iSAID's raw release into patches").add_argument
    add("raw", help="a folder with {train,val,test}/images, the masks beside the images")
    add("out", help="folder to write; what an interrupted call has left there is continued")
    add("--splits", nargs="+", choices=("train", "val", "test"), help="default: those in RAW")
    add("--patch", type=count, default=800, help="pixels a side")
    add("--overlap", type=natural, default=200, help="of neighbours")
    cores = min(8, os.cpu_count() or 1)
    add("--workers", type=few, default=cores, help="processes, up to 2 GB each for large images")
    add("--limit", type=count, help="only the first images of each split")
    add(
        "--devkit",
        action="store_true",
        help="keep the devkit's oddities, see util/isaid_prepare.py",
    )

    add = commands.add_parser("check", help="what a dataset holds and what is wrong").add_argument
    add("data", help="its folder")

    add = commands.add_parser("scenes", help="write synthetic scenes as a dataset").add_argument
    add("out", help="folder to write")
    add("--train", type=images, default=100, help="training scenes")
    add("--val", type=images, default=20, help="held-out scenes")
    add("--image_size", type=number(int, most=10_000), default=SCENE_SIZE, help="pixels")
    add("--seed", type=natural, default=0, help="of the scenes")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        sys.exit(isaid_prepare.prepare(args))
    if args.command == "check":
        sys.exit(check_dataset(args.data))
    if Path(args.out).exists():
        raise DataError(f"{args.out} exists already; name a new folder")
    write_scenes(args.out, {"train": args.train, "val": args.val}, args.image_size, args.seed)
    print(f"{args.train} + {args.val} scenes in {args.out}")


if __name__ == "__main__":
    main()
