"""The dataset: images with boxes, their augmentation, and batches of them.

    python isaid.py prepare RAW OUT                cut iSAID into patches, or arrange NWPU VHR-10
    python isaid.py check DATA                     report what a dataset contains, and its errors
    python isaid.py scenes OUT --train 20 --val 5  write synthetic scenes as a dataset

DATA is a folder in the layout of iSAID's patches, of COCO, of Roboflow, or with train.json and
val.json or valid.json next to folders of the same names (see coco.find_split_files).
iSAID: Waqas Zamir et al., "iSAID: A Large-scale Dataset for Instance Segmentation in Aerial
Images" (arXiv 1905.12886).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from util import coco, distributed, isaid_prepare, isaid_raw, loader_processes, synthetic, vhr10
from util.cli import (
    IMAGE_SIDE,
    NON_NEGATIVE_INT,
    POSITIVE_INT,
    Parser,
    cli_main,
    int_range,
    usable_cores,
)
from util.dataset_check import check_dataset
from util.files import DataError, write_text
from util.images import MEAN, STD, check_size, read_image, read_size

SCENE_SIZE = 128  # pixels per side of the synthetic scenes
NUM_SCENES = {"train": 1000, "val": 200}


# ---------------------------------------------------------------- the dataset
class DetectionDataset(torch.utils.data.Dataset):
    """Images with boxes.

    An item is a pair (image, target). The image is a normalized float tensor (3, H, W); the target
    is a dict with
        image_id   int
        file_name  str
        size       (height, width) of the image before it is resized
        labels     (T,) int64, 0 to K - 1 in the order of the category ids
        boxes      (T, 4) float, cxcywh in 0..1
        seed       int, from which the self-supervised task samples its corruption

    Item i + k * len(self) is image i again, augmented differently. Augmentation depends on (seed,
    epoch, index) alone, not on worker processes or on the order of loading.

    Attributes to set:
        epoch            before each pass
        min_size         for load_image; by default images are loaded in full
    Attributes to read:
        images, annotations, categories   as in a COCO file, after coco.clean_boxes
        boxes            [(T, 4) xywh in pixels] of the images
        labels           [(T,)] of the images
        cleaning_counts  {what coco.clean_boxes did: number of boxes}
        warnings         lines of text about the annotations
    """

    def __init__(self, name, content, paths, transform, seed=0):
        """Sort the annotations by image.

        name:      the dataset's name, for messages
        content:   a dict with images, annotations and categories, as in a COCO file
        paths:     the file of each image
        transform: as make_transforms returns it
        """
        self.name = name
        self.images = content["images"]
        self.paths = paths
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.min_size = None
        self.warnings = coco.dataset_warnings(content)
        categories = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
        self.categories = sorted(categories, key=lambda category: category["id"])
        self.annotations, self.cleaning_counts = coco.clean_boxes(
            self.images, content["annotations"]
        )

        index_of = {image["id"]: i for i, image in enumerate(self.images)}
        label_of = {category["id"]: i for i, category in enumerate(self.categories)}
        boxes = [[] for _ in self.images]
        labels = [[] for _ in self.images]
        for annotation in self.annotations:
            if not annotation["iscrowd"]:  # crowd regions matter to the evaluation only
                i = index_of[annotation["image_id"]]
                boxes[i].append(annotation["bbox"])
                labels[i].append(label_of[annotation["category_id"]])
        self.boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes]
        self.labels = [torch.tensor(x, dtype=torch.int64) for x in labels]

    def __len__(self):
        return len(self.images)

    def __iter__(self):  # without this, a loop would not end: there is an item for every index
        for i in range(len(self)):
            yield self[i]

    def __getitem__(self, index):
        i = index % len(self)
        record = self.images[i]
        image = self.load_image(i, self.min_size)
        width = record.get("width", image.width)  # a folder without annotations records no sizes
        height = record.get("height", image.height)

        # The boxes are in pixels of the file; a JPEG may have been loaded at a reduced size.
        recorded_size = torch.tensor([width, height, width, height])
        decoded_size = torch.tensor([image.width, image.height, image.width, image.height])
        boxes = tv_tensors.BoundingBoxes(
            self.boxes[i] * (decoded_size / recorded_size),
            format="XYWH",
            canvas_size=(image.height, image.width),
        )
        sample = {"image": image, "boxes": boxes, "labels": self.labels[i]}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(item_seed(self.seed, self.epoch, index))
            sample = self.transform(sample)
            task_seed = int(torch.randint(2**62, ()))

        H, W = sample["image"].shape[-2:]
        target = {
            "image_id": record["id"],
            "file_name": record["file_name"],
            "size": (height, width),
            "labels": sample["labels"],
            "boxes": sample["boxes"].as_subclass(torch.Tensor) / torch.tensor([W, H, W, H]),
            "seed": task_seed,
        }
        return sample["image"].as_subclass(torch.Tensor), target

    def load_image(self, i, min_size=None):
        """Return image i as a PIL image, RGB, in the orientation in which it is displayed.

        min_size: N loads a large JPEG faster, at a reduced size of at least N pixels per side
        Raises DataError if the file is unusable or its size differs from the annotations.
        """
        record = self.images[i]
        image, file_size = read_image(self.paths[i], min_size)
        check_size(record, f"{self.name}: {record['file_name']}", file_size)
        return image


def item_seed(seed, epoch, index):
    """Return the seed of one item in one epoch."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])


class SyntheticDataset(DetectionDataset):
    """Synthetic scenes, drawn when they are loaded."""

    def __init__(self, name, content, renderer, transform, seed=0):
        super().__init__(name, content, None, transform, seed)
        self.renderer = renderer

    def load_image(self, i, min_size=None):
        return self.renderer.render(i)


# ---------------------------------------------------------------- loading datasets
def synthetic_dataset(split, n, size, transform, seed=0, scene_seed=None):
    """Return a dataset of the first n scenes of a split, each of size x size pixels.

    seed:       of the augmentation
    scene_seed: of the scenes; None: `seed`
    """
    if scene_seed is None:
        scene_seed = seed
    first = synthetic.FIRST_SCENE[split]
    content = synthetic.coco_content(scene_seed, first, n, size)
    renderer = synthetic.SceneRenderer(scene_seed, first, n, size)
    return SyntheticDataset(f"synthetic scenes ({split})", content, renderer, transform, seed)


def load_coco(images_dir, json_path, transform, limit=None, seed=0, require_annotations=True):
    """Return the dataset of a folder of images and a COCO file.

    limit:               use only this many images, the first ones
    require_annotations: False for test images, whose file may lack annotations and categories
    Raises DataError.
    """
    content = coco.load_json(json_path, require_annotations)
    images = content["images"][:limit]
    if not images:
        raise DataError(f"{json_path}: contains no images")
    images_dir = Path(images_dir)
    paths = [coco.find_image(images_dir, image["file_name"]) for image in images]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        share = f"{len(missing)} of {len(paths)}"
        raise DataError(f"{json_path}: {share} images not found (first: {missing[0]})")
    warnings = coco.file_warnings(images_dir, images, paths)
    for image, path in zip(images, paths):
        if not image.get("width") or not image.get("height"):  # as in some of iSAID's own files
            image["width"], image["height"] = read_size(path)
    content["images"] = images
    data = DetectionDataset(str(json_path), content, paths, transform, seed)
    data.warnings += warnings
    return data


def load_folder(root, split, transform, limit=None, seed=0):
    """Return the images of a split without annotations, for pretraining. Raises DataError."""
    name, paths = coco.find_images(root, split)
    paths = paths[:limit]
    images = [{"id": i, "file_name": str(path)} for i, path in enumerate(paths)]
    content = {"images": images, "annotations": [], "categories": []}
    return DetectionDataset(str(name), content, paths, transform, seed)


def load_split(split, args, train):
    """Return the images of a split, "train", "val" or "test", that a run's flags select.

    args:  the flags data (None: synthetic scenes), image_size, augment, limit_SPLIT, overfit, seed,
           scene_seed, and setting: for pretraining the images are read without annotations
    train: whether to augment
    Raises DataError.
    """
    limit = getattr(args, f"limit_{split}", None)  # train.py has no --limit_test
    if args.overfit and split == "train":
        limit = args.overfit
    transform = make_transforms(train, args.image_size, args.augment)
    if not args.data:
        if limit is None:
            limit = NUM_SCENES[split]
        scene_seed = getattr(args, "scene_seed", None)  # older runs do not have this flag
        return synthetic_dataset(split, limit, args.image_size, transform, args.seed, scene_seed)
    if args.setting == "pretrain":
        data = load_folder(args.data, split, transform, limit, args.seed)
    else:
        images_dir, json_path = coco.find_split(args.data, split)
        has_annotations = split != "test"
        data = load_coco(images_dir, json_path, transform, limit, args.seed, has_annotations)
    if args.image_size:
        data.min_size = round(1.2 * args.image_size)  # what --augment crop takes its crop from
    return data


def load_train_and_val(args):
    """Return (the training images, the held-out images) that a run's flags select.

    Raises DataError.
    """
    if args.overfit:  # train and evaluate on the same few images, without augmentation
        train_set = load_split("train", args, train=False)
        val_set = load_split("train", args, train=False)
    else:
        train_set = load_split("train", args, train=True)
        val_set = load_split("val", args, train=False)
    if train_set.categories != val_set.categories:
        raise DataError(
            f"class mismatch: {train_set.name} has {coco.class_names(train_set.categories)}, "
            f"{val_set.name} has {coco.class_names(val_set.categories)}"
        )
    if args.setting != "pretrain" and sum(len(labels) for labels in train_set.labels) == 0:
        message = f"{train_set.name}: contains no boxes to train on"
        for what, count in train_set.cleaning_counts.items():
            message += f"; {count:,} boxes {what}"
        raise DataError(message)
    return train_set, val_set


# ---------------------------------------------------------------- batches
def collate(batch):
    """Pad images to a common size at their right and bottom.

    batch: [(image (3, h, w), target)]
    Returns images (B, 3, H, W), padding (B, H, W), which is True where there is no image, [target].
    """
    images = [image for image, _ in batch]
    targets = [target for _, target in batch]
    H = max(image.shape[1] for image in images)
    W = max(image.shape[2] for image in images)
    padded = images[0].new_zeros(len(images), 3, H, W)
    padding = torch.ones(len(images), H, W, dtype=torch.bool)
    for i, image in enumerate(images):
        _, h, w = image.shape
        padded[i, :, :h, :w] = image
        padding[i, :h, :w] = False
    return padded, padding, targets


def data_loader(data, workers, **options):
    """Return a DataLoader of a dataset with `workers` processes (0: none); options are its own."""
    if workers > 0:
        distributed.wait_for_threads()
    return torch.utils.data.DataLoader(
        data,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=loader_processes.start,
        generator=torch.Generator(),  # by default it would use the model's random numbers
        **options,
    )


def actual_batch_size(data, args):
    """Return the number of images per batch: --batch_size, or all images if there are fewer."""
    return min(args.batch_size, len(data))


def epoch_batch_indices(data, args, epoch):
    """Return the shuffled batches of an epoch for this process, as lists of indices.

    They depend on (seed, epoch) alone. The last images, too few for an optimizer step, are left
    out.
    """
    size = actual_batch_size(data, args)
    num_processes = distributed.world_size()
    step_size = size * args.grad_accum_steps * num_processes
    num_items = len(data)
    if args.overfit:
        num_items = 50 * step_size  # each of the few images many times
    generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)
    order = torch.randperm(num_items, generator=generator).tolist()
    num_used = num_items // step_size * step_size
    batches = [order[start : start + size] for start in range(0, num_used, size)]
    return batches[distributed.rank() :: num_processes]


def epoch_loader(data, args, epoch, done=0):
    """Return a loader of an epoch's batches; the first `done` ones are left out."""
    data.epoch = epoch
    batches = epoch_batch_indices(data, args, epoch)[done:]
    on_gpu = args.device.startswith("cuda")
    return data_loader(data, args.workers, batch_sampler=batches, pin_memory=on_gpu)


# ---------------------------------------------------------------- augmentation
AUGMENT = ("none", "flip", "crop", "aerial")
to_tensor = v2.Compose(
    [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
)


def make_transforms(train, image_size=None, augment="flip"):
    """Return the transform from a PIL image with boxes to a normalized tensor with boxes.

    The boxes become cxcywh in pixels; those under a pixel are removed.

    train:      False for evaluation, which is not augmented
    image_size: N resizes every image to N x N, as the SSL paper does; None resizes as the official
                DETR does: in training to several scales, some of them cropped
    augment:    "none"
                "flip"    horizontally
                "crop"    flip, and a random N x N crop of 1.2 N x 1.2 N pixels, as the authors'
                          pretraining does
                "aerial"  flips both ways and quarter turns, for images without a canonical
                          orientation
    """
    if not train:
        augment = "none"
    steps = []
    if augment != "none":
        steps.append(v2.RandomHorizontalFlip())
    if augment == "aerial":
        steps.append(v2.RandomVerticalFlip())
        turns = [v2.RandomRotation((angle, angle), expand=True) for angle in (0, 90, 180, 270)]
        steps.append(v2.RandomChoice(turns))

    if augment == "crop":
        side = round(1.2 * image_size)
        steps.append(v2.Resize((side, side)))
        steps.append(v2.RandomCrop(image_size))
    elif train and not image_size:
        steps.append(random_resize())
    else:
        steps.append(resize(image_size))

    steps.append(v2.ClampBoundingBoxes())
    steps.append(v2.SanitizeBoundingBoxes(min_size=1))
    steps.append(v2.ConvertBoundingBoxFormat("CXCYWH"))
    steps.append(to_tensor)
    return v2.Compose(steps)


def resize(image_size=None):
    """Return the resizing of evaluation: to image_size x image_size pixels.

    None: the shorter side to 800 pixels, the longer one to at most 1333.
    """
    if image_size:
        return v2.Resize((image_size, image_size))
    return v2.RandomShortestSize([800], max_size=1333)


def random_resize():
    """Return the official DETR's resizing in training.

    Images are resized to a random scale; half of them are cropped first.
    """
    scale = v2.RandomShortestSize(list(range(480, 801, 32)), max_size=1333)
    crop_and_scale = v2.Compose([v2.RandomShortestSize([400, 500, 600]), random_size_crop, scale])
    return v2.RandomChoice([scale, crop_and_scale])


def random_size_crop(sample):
    """Crop an image and its boxes to sides of 384 to 600 pixels, as the official DETR does."""
    H, W = v2.functional.get_size(sample["image"])
    h = random_int(min(384, H), min(600, H))
    w = random_int(min(384, W), min(600, W))
    top = random_int(0, H - h)
    left = random_int(0, W - w)
    cropped = dict(sample)
    for key in ("image", "boxes"):
        cropped[key] = v2.functional.crop(sample[key], top, left, h, w)
    return cropped


def random_int(low, high):
    """Draw a whole number from low to high, both included, from torch's random numbers."""
    return int(torch.randint(low, high + 1, ()))


# ---------------------------------------------------------------- commands
def prepare(args):
    """Prepare the dataset that args.raw contains; return the exit status. Raises DataError."""
    raw = Path(args.raw)
    if list(raw.glob(f"*/{isaid_prepare.NOTE_NAME}")):
        raise DataError(f"{raw}: is prepared already; use it as train.py --data {raw}")
    has_isaid = len(isaid_raw.find_splits(raw)) > 0
    has_vhr10 = vhr10.has_images(raw) or (not has_isaid and vhr10.has_annotations(raw))
    if has_isaid and has_vhr10:
        problem = "contains both iSAID and NWPU VHR-10"
        raise DataError(f"{raw}: {problem}; move one of them into a folder of its own")
    if has_vhr10:
        vhr10.prepare(args)
        return 0
    if not has_isaid and not args.splits:
        raise DataError(
            f"{raw}: expected at least one of train/images, val/images, test/images of iSAID, or a "
            "download: iSAID (13.7 GB, from https://hf.co/datasets/isaaccorley/dota and "
            "https://hf.co/datasets/isaaccorley/isaid) or NWPU VHR-10 (78 MB, from "
            "https://hf.co/datasets/isaaccorley/vhr10); README.md has the commands"
        )
    return isaid_prepare.prepare(args)


def write_scenes(out, counts, size, seed):
    """Write synthetic scenes as a dataset in the layout of iSAID's patches.

    counts: {"train": number of scenes, "val": number of scenes}
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scenes-", dir=out.parent) as temporary:
        partial = Path(temporary, "data")
        for split, n in counts.items():
            images_dir, json_path = coco.split_files(partial, split)
            images_dir.mkdir(parents=True)
            data = synthetic_dataset(split, n, size, transform=None, seed=seed)
            for i, image in enumerate(data.images):
                data.load_image(i).save(images_dir / image["file_name"])
            content = {
                "images": data.images,
                "categories": data.categories,
                "annotations": data.annotations,
            }
            write_text(json_path, json.dumps(content))
        partial.rename(out)  # at the end: the folder `out` is complete or not there


def build_parser():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare_help = "turn iSAID or NWPU VHR-10, as downloaded, into a dataset"
    prepare_parser = commands.add_parser("prepare", help=prepare_help)
    add = prepare_parser.add_argument
    add("raw", help="folder of what was downloaded; see util/isaid_raw.py and util/vhr10.py")
    add("out", help="folder to write; an interrupted call is continued")
    add(
        "--splits",
        nargs="+",
        choices=("train", "val", "test"),
        help="splits to prepare; default: those in RAW",
    )
    add("--limit", type=POSITIVE_INT, metavar="N", help="only the first N images of each split")
    add = prepare_parser.add_argument_group("for iSAID only").add_argument
    patch_help = "pixels per side of a patch"
    add("--patch", type=POSITIVE_INT, default=isaid_prepare.PATCH, help=patch_help)
    add(
        "--overlap",
        type=NON_NEGATIVE_INT,
        default=isaid_prepare.OVERLAP,
        help="pixels that neighboring patches share",
    )
    workers = min(8, usable_cores())
    workers_help = "processes; each needs up to 2 GB of memory for large images"
    add("--workers", type=int_range(1, 256), default=workers, help=workers_help)
    devkit_help = "exactly the patches of iSAID's devkit, see util/isaid_prepare.py"
    add("--devkit", action="store_true", help=devkit_help)

    add = commands.add_parser("check", help="report contents and errors of a dataset").add_argument
    add("data", help="folder of the dataset")

    add = commands.add_parser("scenes", help="write synthetic scenes as a dataset").add_argument
    add("out", help="folder to write")
    num_scenes = int_range(1, synthetic.MAX_SCENES)
    add("--train", type=num_scenes, default=100, help="number of training scenes")
    add("--val", type=num_scenes, default=20, help="number of held-out scenes")
    add("--image_size", type=IMAGE_SIDE, default=SCENE_SIZE, help="pixels per side")
    add("--seed", type=NON_NEGATIVE_INT, default=0, help="seed of the scenes")
    return parser


@cli_main
def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.command == "prepare":
        sys.exit(prepare(args))
    if args.command == "check":
        sys.exit(check_dataset(args.data))
    if Path(args.out).exists():
        raise DataError(f"{args.out} already exists; choose a new folder")
    write_scenes(args.out, {"train": args.train, "val": args.val}, args.image_size, args.seed)
    print(f"{args.train} training and {args.val} held-out scenes written to {args.out}")


if __name__ == "__main__":
    main()
