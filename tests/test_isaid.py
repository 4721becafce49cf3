"""Scenes, datasets good and broken in three layouts, boxes that follow their objects."""

import argparse
import itertools
import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, masks_to_boxes

import isaid
import train
from util import coco, synthetic
from util.dataset_check import class_counts, num_subpixel_boxes, summary
from util.files import DataError, read_json
from util.images import unnormalize

SIZE = 64
PLAIN = isaid.make_transforms(False, SIZE)


def same(a, b):
    """Whether two datasets have the same items."""
    for i in range(len(b)):
        (image, target), (other, expected) = a[i], b[i]
        torch.testing.assert_close(target.pop("boxes"), expected.pop("boxes"))
        assert torch.equal(image, other) and str(target) == str(expected)  # names, labels, sizes
    return len(a) == len(b) and a.categories == b.categories


def test_scenes_depend_on_seed_and_number_alone():
    def drawn(split, n, seed=1):
        data = isaid.synthetic_dataset(split, n, SIZE, None, seed)
        return [data.load_image(i).tobytes() for i in reversed(range(n))]

    assert drawn("train", 3) == drawn("train", 9)[-3:]
    assert len({*drawn("train", 9), *drawn("val", 3), *drawn("train", 3, seed=2)}) == 15


def test_scenes_hold_all_classes_and_some_are_empty():
    data = isaid.synthetic_dataset("train", 600, 128, None)
    counts, boxes = np.array(class_counts(data)), torch.cat(data.boxes)
    assert [c["name"] for c in data.categories] == list(synthetic.CLASSES) and len(counts) == 15
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 2 * counts.mean()
    assert 0.05 < np.mean([len(labels) == 0 for labels in data.labels]) < 0.2
    assert boxes.min() >= 0 and boxes[:, 2:].min() > 5
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 128


def test_scene_boxes_are_tight(monkeypatch):
    """The box is where the picture changes when the object is not drawn."""
    draw = synthetic.draw_thing

    def picture(n, hidden):
        numbers = itertools.count()

        def draw_or_not(rng, pen, thing, sun, fine):  # without shadows
            if thing.name in synthetic.CLASSES and next(numbers) == hidden:
                thing = thing._replace(centre=-1e6)  # far away, with the same random numbers
            draw(rng, pen, thing, 0 * sun, fine)

        monkeypatch.setattr(synthetic, "draw_thing", draw_or_not)
        return np.asarray(synthetic.draw_scene(0, n, 128), float)

    for n in range(12):
        labels, boxes, _ = synthetic.scene_objects(0, n, 128)
        for i, box in enumerate(boxes):
            changed = np.abs(picture(n, i) - picture(n, None)).max(-1) > 12
            found = masks_to_boxes(torch.from_numpy(changed)[None])[0].numpy() + [0, 0, 1, 1]
            assert np.abs(found - box).max() <= 2.0, (n, synthetic.CLASSES[labels[i]], found, box)


def test_scenes_are_kept_by_bytes(monkeypatch):
    """Of six scenes the first four are drawn once only, and all look as if all were kept."""
    drawn, draw = [], synthetic.draw_scene
    monkeypatch.setattr(
        synthetic, "draw_scene", lambda *which: drawn.append(which[1]) or draw(*which)
    )
    every = isaid.synthetic_dataset("train", 6, SIZE, PLAIN)
    monkeypatch.setattr(synthetic, "CACHE_BYTES", 4 * 3 * SIZE * SIZE + 100)
    few = isaid.synthetic_dataset("train", 6, SIZE, PLAIN)
    assert same(few, every) and same(few, every) and len(few.renderer.pixels) == 4
    assert sorted(drawn) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5]
    other = isaid.synthetic_dataset("train", 4, SIZE, PLAIN, seed=1)
    loaded = torch.cat([images for images, _, _ in isaid.data_loader(other, 1, batch_size=2)])
    del drawn[:]  # what another process has drawn is there
    assert torch.equal(loaded, torch.stack([other[i][0] for i in range(4)])) and not drawn


@pytest.fixture
def folder(tmp_path):
    """A small dataset on disk."""
    isaid.main(f"scenes {tmp_path}/data --train 6 --val 3 --image_size {SIZE}".split())
    return tmp_path / "data"


def edit(folder, change):
    """Change the annotations to train on."""
    path = coco.split_files(folder, "train")[1]
    content = read_json(path)
    change(content)
    path.write_text(json.dumps(content))


def load(folder, split="train", setting="detect", **flags):
    flags.update(data=folder, augment="none", setting=setting, image_size=SIZE, seed=0)
    flags.setdefault("overfit", None)
    return isaid.load_split(split, argparse.Namespace(**flags), train=False)


def check(folder, capsys):
    """The exit status of the command and what it prints."""
    with pytest.raises(SystemExit) as stop:
        isaid.main(["check", str(folder)])
    return stop.value.code, capsys.readouterr().out


LAYOUTS = [
    "SPLIT/images SPLIT/instancesonly_filtered_SPLIT.json",  # iSAID's
    "SPLIT2017 annotations/instances_SPLIT2017.json",  # COCO's, in two ways
    "images/SPLIT annotations/instances_SPLIT.json",
    "SPLIT SPLIT/_annotations.coco.json",  # Roboflow's
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folder, tmp_path, layout, capsys):
    """The same dataset in memory and on disk, in every layout; also without its annotations."""
    root, names = tmp_path / "other", {"val": "valid"} if "_annotations" in layout else {}
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        text = layout.replace("SPLIT", names.get(split, split))
        text = text.replace("instances_", "image_info_") if split == "test" else text
        images, file = (root / part for part in text.split())
        theirs = coco.split_files(folder, source)
        shutil.copytree(theirs[0], images)
        file.parent.mkdir(exist_ok=True)
        shutil.copy(theirs[1], file)
        (file.parent / f"captions_{split}2017.json").write_text("{}")  # not of objects
        assert coco.find_split(root, split) == (images, file)
    for split, n in (("train", 6), ("val", 3)):
        memory, bare = isaid.synthetic_dataset(split, n, SIZE, PLAIN), load(root, split, "pretrain")
        assert same(load(root, split), memory) and len(bare) == n and not bare.annotations
        assert all(torch.equal(bare[i][0], memory[i][0]) for i in range(n))
    assert len(load(root, limit_train=2)) == 2 and same(load(root, "test"), load(root, "val"))
    status, out = check(root, capsys)
    assert status == 0 and "images   6," in out


def test_any_folder_of_images(tmp_path):
    """Every twentieth is held out; neither iSAID's masks nor other files are images."""
    root, kinds = tmp_path / "any", ("png", "JPEG")
    names = [f"{part}/images/{i:02}.{kinds[i % 2]}" for part in "ab" for i in range(21)]
    masks = [f"a/images/00_instance_{kind}_RGB.png" for kind in ("id", "color")]
    for path in (root / name for name in (*names, *masks, "../one/0.PNG")):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 60)).save(path)
    (root / "a/notes.txt").write_text("not an image")
    eval_loader, others = (coco.find_images(root, x)[1] for x in ("val", "train"))
    assert eval_loader == [root / names[i] for i in (0, 20, 40)]
    assert len(load(root, "train", "pretrain")) == 39 and not {*eval_loader} & {*others}
    with pytest.raises(DataError, match="contains only one image"):
        coco.find_images(tmp_path / "one", "val")
    for part, name in (("a", "train"), ("b", "val")):  # as ImageNet and iSAID's patches have them
        (root / part).rename(root / name)
    assert [len(coco.find_images(root, x)[1]) for x in ("train", "val")] == [21, 21]


def test_what_is_not_recognised_gets_the_three_layouts(folder, capsys):
    (folder / "val/images").rename(folder / "val/pictures")
    said = rf"(?m)^error: {folder}: no annotated 'val' split .*iSAID.*/instances_val\*\.json .*"
    said += r"\(COCO\).*valid/_annotations.coco.json \(Roboflow\)$"
    status, out = check(folder, capsys)
    assert status == 1 and re.search(said, out) and "images   6," in out  # of the other split


def test_boxes_are_clipped_and_labels_follow_ids(folder):
    """Ids with gaps and in any order become 0..K-1, in the order of the ids."""
    boxes = [[-10, 10, 20, 20], [50, 50, 30, 30], [10, 10, 20, 20], [1, 1, 60, 60]]
    boxes += [[10, 10, 0, 5], [80, 80, 5, 5], [0, 0, float("inf"), 3], [0, 0, float("nan"), 3]]
    found = [{"image_id": 0, "category_id": 5, "bbox": box} for box in boxes]
    found[3]["iscrowd"], found[0]["category_id"], found[2]["category_id"] = 1, 70, 70
    categories = [{"id": 70, "name": "late"}, {"id": 5, "name": "early"}]
    edit(folder, lambda content: content.update(annotations=found, categories=categories))
    edit(folder, lambda content: content["images"][0].pop("width"))  # it is the image's
    data = load(folder)
    cleaned = {"clipped to their image": 2, "without area, removed": 4}
    assert data.cleaning_counts == cleaned and data.images[0]["width"] == SIZE
    assert data.boxes[0].tolist() == [[0, 10, 10, 20], [50, 50, 14, 14], [10, 10, 20, 20]]
    assert [c["name"] for c in data.categories] == ["early", "late"] and class_counts(data) == [
        1,
        2,
    ]
    assert data[0][1]["labels"].tolist() == [1, 0, 1] and data[1][1]["boxes"].shape == (0, 4)
    assert [a["area"] for a in data.annotations[:3]] == [200, 196, 400]  # of what is left of them
    assert [a["iscrowd"] for a in data.annotations] == [0, 0, 0, 1]  # the evaluation ignores it
    assert [num_subpixel_boxes(data, size) for size in (64, 6, 4, 2)] == [0, 1, 2, 3]
    said = summary(data, num_queries=2, image_size=4)
    for text in ("6 images, 3 boxes", "2 boxes clipped to their image",
                 "4 boxes without area, removed", "2 boxes under a pixel after resizing",
                 "1 images (16.7%) contain more objects than there are queries (2)"):  # fmt: skip
        assert text in said


BROKEN = {
    "list 'annotations'": lambda c: c.pop("annotations"),
    "contains no images": lambda c: c.update(images=[], annotations=[]),
    "no categories": lambda c: c.update(categories=[], annotations=[]),
    "entry 1 of 'images': missing 'file_name'": lambda c: c["images"][1].pop("file_name"),
    "4 numbers": lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 10**400]),
    "category_id 99 does not exist": lambda c: c["annotations"][0].update(category_id=99),
    "image_id 77 does not exist": lambda c: c["annotations"][1].update(image_id=77),
    "id must be an integer, got 'im0'": lambda c: c["images"][0].update(id="im0"),
    "duplicate id 1 in 'images'": lambda c: c["images"][0].update(id=1),
    "width must be a non-negative number, got '64'": lambda c: c["images"][0].update(width="64"),
    "height must be a non-negative number, got -64": lambda c: c["images"][0].update(height=-64),
    "name must be a string, got None": lambda c: c["categories"][0].update(name=None),
    "name must be .*printable text": lambda c: c["categories"][0].update(name="a\nb"),
    "in pixels; multiply": lambda c: [a.update(bbox=[0.2, 0, 1, 1]) for a in c["annotations"]],
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_are_named(folder, message):
    edit(folder, BROKEN[message])
    with pytest.raises(DataError, match=f"_train.json: .*{message}") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_unusable_images_are_named(folder, capsys):
    """The first one by what reads it, all at once by the check."""
    paths = [folder / f"train/images/scene_00000{i}.png" for i in range(5)]
    paths[0].write_bytes(b"text")
    paths[1].write_bytes(paths[1].read_bytes()[:900])
    Image.fromarray(np.full((SIZE, SIZE), 4000, np.uint16)).save(paths[2])
    Image.new("RGB", (30, 20)).save(paths[3])
    paths[4].unlink()
    said = [
        ": not a readable image",
        ": not a readable image",
        ": has more than 8 bits per channel",
    ]
    said += [": annotations say 64 x 64 pixels, but the image is 30 x 20", ": file not found"]
    status, out = check(folder, capsys)
    assert status == 1 and "errors   5\n" in out and "64 x 64 (1)" in out
    assert all(f"{path}{text}" in out for path, text in zip(paths, said))
    with pytest.raises(DataError, match="1 of 6 images not found"):
        load(folder)
    Image.new("RGB", (SIZE, SIZE)).save(paths[4])
    for i, text in enumerate(said[:4]):
        with pytest.raises(DataError, match=f"{paths[i].name}{text}"):
            load(folder)[i]


def test_check_lists_every_fault(folder, capsys):
    """All that a training would stop on is listed at once; the rest is counted."""
    dense = {"image_id": 3, "category_id": 2, "bbox": [1, 1, 4, 4], "id": 1000}
    more = [{**dense, "id": 1000 + i} for i in range(101)] + [{**dense, "bbox": [5, 5, -3, 4]}]
    edit(folder, lambda content: content["annotations"].extend([*more, dense]))
    status, out = check(folder, capsys)
    assert status == 0 and "images   6," in out and "100 queries  1 (16.7%)" in out
    assert re.search(
        r"boxes with negative sides, corrected +1\n(.*\n)+.*duplicate annotation ids +2\n", out
    )
    edit(folder, lambda content: content["categories"][0].update(name="boat"))
    status, out = check(folder, capsys)
    assert status == 1 and "the splits have different classes: 1 boat" in out
    with pytest.raises(SystemExit, match="class mismatch: .* has 1 boat.* 1 ship"):
        train.main(["--data", str(folder)])
    chosen = "category_id|image_id|duplicate|width|name must be a string"
    chosen = [text for text in BROKEN if re.match(chosen, text)]
    edit(folder, lambda content: [BROKEN[text](content) for text in chosen])
    coco.split_files(folder, "val")[1].write_text('{"images": [')
    status, out = check(folder, capsys)
    assert status == 1 and "errors   5\n" in out and all(text in out for text in chosen)
    assert "_val.json: not valid JSON" in out


def one_box(size, box):
    """The content of a COCO file of one image with one box."""
    width, height = size
    return {
        "images": [{"id": 0, "file_name": "", "width": width, "height": height}],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": box}],
        "categories": [{"id": 1, "name": "box"}],
    }


def white_box(path, size, box, transform):
    """A black picture with one white rectangle, as a dataset of one image."""
    x, y, w, h = box
    picture = Image.new("RGB", size)
    picture.paste("white", (x, y, x + w, y + h))
    picture.save(path)
    return isaid.DetectionDataset("a box", one_box(size, box), [path], transform)


@pytest.mark.parametrize("size", [(90, 60), (64, 64), (700, 500)], ids=str)
@pytest.mark.parametrize("image_size", [64, 96, None])
@pytest.mark.parametrize("augment", isaid.AUGMENT)
def test_boxes_follow_their_object(tmp_path, size, image_size, augment):
    """The box is where the white is; of the eight ways to lie those are met that are meant."""
    image_size, places = image_size or (80 if augment == "crop" else None), set()
    transform = isaid.make_transforms(True, image_size, augment)
    data = white_box(tmp_path / "a.png", size, [8, 30, 40, 20], transform)
    for data.epoch in range(40 if image_size else 6):
        picture, target = data[0]
        bright = unnormalize(picture).amin(0) > 0.66
        H, W = bright.shape
        assert H == W == image_size if image_size else max(H, W) <= 1333 and min(H, W) <= 800
        if len(target["boxes"]) == 0:  # cropped away
            assert bright.float().mean() < 0.01
            continue
        found = masks_to_boxes(bright[None])[0] + torch.tensor([0, 0, 1, 1])
        box = box_convert(target["boxes"][0], "cxcywh", "xyxy") * torch.tensor([W, H, W, H])
        assert (found - box).abs().max() <= max(W / size[0], H / size[1], 1) + 1.5
        places.add(tuple(target["boxes"][0].mul(100).round().tolist()))
    ways = {"none": 1, "flip": 2, "aerial": 8}.get(augment)
    assert len(places) == ways if ways and image_size else len(places) > (augment == "crop")


def test_quarters_of_odd_sides(tmp_path):
    """Boxes are where the white is, in the quarter of their centre, down to the last row."""
    data, picture = tmp_path / "data/val", Image.new("RGB", (71, 51))
    boxes = [2, 3, 20, 10], [30, 30, 41, 21]
    (data / "images").mkdir(parents=True)
    for x, y, w, h in boxes:
        picture.paste("white", (x, y, x + w, y + h))
    picture.save(data / "images/a.png")
    content = {"images": [{"id": 7, "file_name": "a.png", "width": 71, "height": 51}]}
    content["annotations"] = [{"id": i, "image_id": 7, "category_id": 1, "bbox": box}
                              for i, box in enumerate(boxes)]  # fmt: skip
    content["categories"] = [{"id": 1, "name": "box"}]
    (data / "instancesonly_filtered_val.json").write_text(json.dumps(content))
    script = runpy.run_path(Path(isaid.__file__).parent / "results/tiles/quarters.py")
    script["quarters"]("val", data.parent, tmp_path / "out")
    content = read_json(tmp_path / "out/val/instancesonly_filtered_val.json")
    sizes = [(image["width"], image["height"]) for image in content["images"]]
    assert sizes == [(35, 25), (36, 26)]
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert annotation["image_id"] == image["id"]
        quarter = Image.open(tmp_path / "out/val/images" / image["file_name"]).convert("L")
        left, top, right, bottom = quarter.point(lambda v: 255 * (v > 127)).getbbox()
        assert annotation["bbox"] == [left, top, right - left, bottom - top]


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    data = isaid.synthetic_dataset("train", 3, SIZE, isaid.make_transforms(True, SIZE, "aerial"))

    def item(seed, epoch, i):
        data.seed, data.epoch, state = seed, epoch, torch.get_rng_state()
        image, target = data[i]
        assert torch.equal(torch.get_rng_state(), state)  # the model's randomness is left alone
        assert target["image_id"] == i % 3
        return image.numpy().tobytes(), target["seed"]

    assert item(0, 1, 2) == item(0, 1, 2)
    for step in ((1, 0, 0), (0, 1, 0), (0, 0, 3)):  # seeds, epochs, the same image once more
        images, seeds = zip(*(item(*(k * np.array(step) + (0, 0, 2))) for k in range(8)))
        assert len(set(images)) > 2 and len(set(seeds)) == 8
    data.transform = isaid.make_transforms(
        False, SIZE, "aerial"
    )  # what is held out is not augmented
    assert item(0, 0, 2)[0] == item(0, 5, 2)[0]


def test_collate_pads_right_and_below():
    images, padding, targets = isaid.collate([(torch.ones(3, 1, 2), 0), (torch.ones(3, 2, 1), 1)])
    assert padding.tolist() == [[[False, False], [True, True]], [[False, True], [False, True]]]
    assert torch.equal(images[:, 2], 1 - padding.float()) and targets == [0, 1]


@pytest.mark.parametrize("suffix, read", [("jpg", 256), ("png", 1024)])
def test_large_jpegs_are_decoded_small(tmp_path, suffix, read):
    """A JPEG of four times the size gives nearly the same item from a quarter of the pixels."""
    path = tmp_path / f"a.{suffix}"
    synthetic.draw_scene(0, 3, 256).resize((1024, 1024)).save(path, quality=95)
    content = one_box((1024, 1024), [256, 512, 128, 64])
    data = isaid.DetectionDataset("", content, [path], isaid.make_transforms(False, 256))
    whole, data.min_size = data[0][0], 256
    small, target = data[0]
    assert data.load_image(0, 256).size == (read, read)
    assert data.load_image(0).size == (1024, 1024)
    assert target["size"] == (1024, 1024)
    assert target["boxes"].tolist() == [[0.3125, 0.53125, 0.125, 0.0625]]
    assert (small - whole).abs().mean() < 0.05
