"""Scenes, datasets good and broken in three layouts, boxes that follow their objects."""

import argparse
import functools
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, masks_to_boxes

import coco
import isaid
import scenes
import train

SIZE = 64
PLAIN = isaid.transforms(False, SIZE)
TINY = (
    "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 1 --dim_feedforward 32 --num_queries 5 "
    "--batch_size 3 --epochs 1 --image_size 64"
).split()


def same(a, b):
    """Whether two datasets have the same items."""
    for i in range(len(b)):
        (image, target), (other, expected) = a[i], b[i]
        torch.testing.assert_close(target.pop("boxes"), expected.pop("boxes"))
        assert torch.equal(image, other) and str(target) == str(expected)  # names, labels, sizes
    return len(a) == len(b) and a.categories == b.categories


# ---------------------------------------------------------------- synthetic scenes


def test_scenes_depend_on_seed_and_number_alone():
    first = scenes.draw_scene(3, 7, 96)
    scenes.draw_scene(3, 8, 96)
    assert np.array_equal(scenes.draw_scene(3, 7, 96), first)
    assert not np.array_equal(scenes.draw_scene(4, 7, 96), first)
    small, large = (isaid.synthetic("train", n, SIZE, PLAIN, seed=1) for n in (3, 9))
    held_out = isaid.synthetic("val", 3, SIZE, PLAIN, seed=1)
    for i in range(3):
        assert torch.equal(small[i][0], large[i][0])
        assert not any(torch.equal(small[i][0], held_out[k][0]) for k in range(3))


def test_scenes_hold_all_classes_and_some_are_empty():
    data = isaid.synthetic("train", 600, 128, None)
    counts, boxes = np.array(data.counts()), torch.cat(data.boxes)
    assert [c["name"] for c in data.categories] == list(scenes.CLASSES) and len(counts) == 15
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 2 * counts.mean()
    assert 0.05 < np.mean([len(labels) == 0 for labels in data.labels]) < 0.2
    assert (
        boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 128 and boxes[:, 2:].min() > 5
    )


def test_scene_boxes_are_tight(monkeypatch):
    """The box is where the picture changes when the object is not drawn."""
    draw, numbers, hidden = scenes.draw_thing, iter(()), None

    def draw_or_not(rng, pen, thing, sun, fine):  # without shadows
        if thing.name in scenes.CLASSES and next(numbers) == hidden:
            thing = thing._replace(centre=-1e6)  # far away; as many random numbers are drawn
        draw(rng, pen, thing, 0 * sun, fine)

    monkeypatch.setattr(scenes, "draw_thing", draw_or_not)
    for n in range(12):
        labels, boxes, _ = scenes.scene_objects(0, n, 128)
        pictures = []
        for hidden in range(-1, len(boxes)):
            numbers = itertools.count()
            pictures.append(np.asarray(scenes.draw_scene(0, n, 128), float))
        for label, box, picture in zip(labels, boxes, pictures[1:]):
            changed = torch.from_numpy(np.abs(picture - pictures[0]).max(-1) > 12)
            found = masks_to_boxes(changed[None])[0].numpy() + [0, 0, 1, 1]
            assert np.abs(found - box).max() <= 2.0, (n, scenes.CLASSES[label], found, box)


def test_scenes_are_kept_by_bytes(monkeypatch):
    """Of six scenes the first four are drawn once only, and all look as if all were kept."""
    drawn, draw = [], isaid.draw_scene
    monkeypatch.setattr(isaid, "draw_scene", lambda *which: drawn.append(which[1]) or draw(*which))
    every = isaid.synthetic("train", 6, SIZE, PLAIN)
    monkeypatch.setattr(isaid, "KEPT", 4 * 3 * SIZE * SIZE + 100)
    few = isaid.synthetic("train", 6, SIZE, PLAIN)
    assert same(few, every) and same(few, every) and len(few.read.pixels) == 4
    assert sorted(drawn) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5]
    other = isaid.synthetic("train", 4, SIZE, PLAIN, seed=1)
    loaded = torch.cat([images for images, _, _ in isaid.loader(other, 1, batch_size=2)])
    del drawn[:]  # what another process has drawn is there
    assert torch.equal(loaded, torch.stack([other[i][0] for i in range(4)])) and not drawn


# ---------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path):
    """A small dataset on disk."""
    out = tmp_path / "data"
    isaid.main(["scenes", str(out), *f"--train 6 --val 3 --image_size {SIZE}".split()])
    return out


def edit(folder, change, split="train"):
    path = coco.split_files(folder, split)[1]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def load(folder, **options):
    return isaid.load_coco(*coco.split_files(folder, "train"), PLAIN, **options)


def split_of(folder, split, setting="detect", **flags):
    flags.update(augment="none", setting=setting, image_size=SIZE, seed=0)
    return isaid.open_split(split, argparse.Namespace(data=str(folder), **flags), train=False)


def place(root, split, layout):
    """Where a layout has (the images, the annotations) of a split."""
    kind = "image_info" if split == "test" else "instances"
    beside = root / {"val": "valid"}.get(split, split)
    return {
        "isaid": coco.split_files(root, split),
        "coco": (root / f"{split}2017", root / f"annotations/{kind}_{split}2017.json"),
        "coco, images": (root / f"images/{split}", root / f"annotations/{kind}_{split}.json"),
        "roboflow": (beside, beside / "_annotations.coco.json"),
    }[layout]


@pytest.mark.parametrize("layout", ["isaid", "coco", "coco, images", "roboflow"])
def test_layouts(folder, tmp_path, layout, capsys):
    """The same dataset in memory and on disk, in every layout; also without its annotations."""
    root, out = tmp_path / "other", tmp_path / "run"
    for split in ("train", "val", "test"):
        theirs = coco.split_files(folder, split.replace("test", "val"))
        images, file = place(root, split, layout)
        shutil.copytree(theirs[0], images)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(theirs[1], file)
        (file.parent / f"captions_{split}2017.json").write_text("{}")  # no annotations of objects
        assert coco.find_split(root, split) == (images, file)
    for split, n in (("train", 6), ("val", 3)):
        memory, bare = isaid.synthetic(split, n, SIZE, PLAIN), split_of(root, split, "pretrain")
        assert same(split_of(root, split), memory)
        assert all(torch.equal(bare[i][0], memory[i][0]) for i in range(n)) and len(bare) == n
        assert not bare.annotations and not bare.categories
    assert len(split_of(root, "train", limit_train=2)) == 2
    assert same(split_of(root, "test"), split_of(root, "val"))
    with pytest.raises(SystemExit) as stop:
        isaid.main(["check", str(root)])
    assert not stop.value.code and "images   6," in capsys.readouterr().out
    if layout == "coco":
        train.main([*TINY, "--data", str(root), "--out", str(out)])
        printed, state = capsys.readouterr().out, torch.load(out / "best.pt", weights_only=True)
        assert "instances_train2017.json: 6 images" in printed and state["window"] == SIZE
        assert [c["name"] for c in state["categories"]] == list(scenes.CLASSES)
        assert 0 <= json.loads((out / "log.jsonl").read_text())["ap"] <= 1


def test_any_folder_of_images(tmp_path):
    """Every twentieth is held out; masks, as iSAID keeps them beside its images, are not images."""
    names = [f"{part}/{i:02}.png" for part in "ab" for i in range(21)]
    for name in (*names, "a/00_instance_color_RGB.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (70, 60)).save(tmp_path / name)
    held_out, others = (coco.find_images(tmp_path, split)[1] for split in ("val", "train"))
    assert held_out == [tmp_path / names[i] for i in (0, 20, 40)]
    assert len(split_of(tmp_path, "train", "pretrain")) == 39 and not {*held_out} & {*others}
    (tmp_path / "few").mkdir()
    with pytest.raises(coco.DataError, match="holds no images"):
        coco.find_images(tmp_path / "few", "train")
    (tmp_path / "a/20.png").rename(tmp_path / "few/0.PNG")
    with pytest.raises(coco.DataError, match="holds one image"):
        coco.find_images(tmp_path / "few", "val")
    (tmp_path / "a").rename(tmp_path / "train")  # as ImageNet has them
    (tmp_path / "b").rename(tmp_path / "val")
    assert [len(coco.find_images(tmp_path, split)[1]) for split in ("train", "val")] == [20, 21]


def test_what_is_not_recognised_gets_the_three_layouts(folder, capsys):
    (folder / "val/images").rename(folder / "val/pictures")
    expected = (
        rf"error: {folder}: no annotated split 'val' is recognised there; .*val/images and "
        r"val/instancesonly_filtered_val.json \(iSAID's patches\).*annotations/instances_val\*.json"
        r" .*\(COCO\).*valid/_annotations.coco.json beside the images \(Roboflow\)"
    )
    with pytest.raises(SystemExit, match=f"^{expected}$"):
        train.main([*TINY, "--data", str(folder)])
    with pytest.raises(SystemExit) as stop:
        isaid.main(["check", str(folder)])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and re.search(f"(?m)^{expected}$", out) and "images   6," in out


def test_labels_follow_category_ids(folder):
    """Ids with gaps and in any order become 0..K-1, in the order of the ids."""

    def change(content):
        content["categories"] = [{"id": 70, "name": "late"}, {"id": 5, "name": "early"}]
        box = {"image_id": 0, "bbox": [4, 4, 8, 8]}
        content["annotations"] = [{**box, "id": 9, "category_id": i} for i in (70, 5, 70)]
        del content["images"][0]["width"]  # it is the image's

    edit(folder, change)
    data = load(folder)
    assert [c["name"] for c in data.categories] == ["early", "late"] and data.side() == SIZE
    assert data[0][1]["labels"].tolist() == [1, 0, 1] and data.counts() == [1, 2]
    assert data[1][1]["boxes"].shape == (0, 4) and data.images[0]["width"] == SIZE


def test_boxes_are_clipped_and_counted(folder):
    inside = [[-10, 10, 20, 20], [50, 50, 30, 30], [10, 10, 20, 20]]
    removed = [[10, 10, 0, 5], [80, 80, 5, 5], [5, 5, -3, 4], [0, 0, float("nan"), 3]]

    def change(content):
        box = {"image_id": 0, "category_id": 1}
        content["annotations"] = [{**box, "bbox": b} for b in inside + removed]
        content["annotations"] += [{**box, "bbox": [1, 1, 60, 60], "iscrowd": 1}]

    edit(folder, change)
    data = load(folder)
    assert (data.clipped, data.removed) == (2, 4)
    assert data.boxes[0].tolist() == [[0, 10, 10, 20], [50, 50, 14, 14], [10, 10, 20, 20]]
    assert [a["area"] for a in data.annotations[:3]] == [200, 196, 400]  # of what is left of them
    assert [data.tiny(size) for size in (64, 6, 4, 2)] == [0, 1, 2, 3]
    assert [a["iscrowd"] for a in data.annotations] == [0, 0, 0, 1]  # the evaluation ignores it
    said = data.summary(num_queries=2, image_size=4)
    assert "6 images, 3 boxes, 2 clipped to their image, 4 without area removed, 2 under a" in said
    assert "1 (16.7%) of them hold more objects than there are queries: 2" in said
    text, classes = isaid.check(*coco.split_files(folder, "train"))
    assert re.search(r"removed +4\n.*outside, clipped +2\n.*crowd.* 1\n", text) and classes


BROKEN = {
    "no list 'annotations'": lambda c: c.pop("annotations"),
    "has no images": lambda c: c.update(images=[], annotations=[]),
    "has no categories": lambda c: c.update(categories=[], annotations=[]),
    "entry 1 of 'images' has no 'file_name'": lambda c: c["images"][1].pop("file_name"),
    "entry 0 of 'annotations' has no 'bbox'": lambda c: c["annotations"][0].pop("bbox"),
    "it must be 4 numbers": lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
    "must be 4 numbers, x": lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 10**400]),
    "bbox 'x', which is not a list": lambda c: c["annotations"][0].update(bbox="x"),
    "iscrowd 'x', which is not a number": lambda c: c["annotations"][0].update(iscrowd="x"),
    "category_id 99, which is not among": lambda c: c["annotations"][0].update(category_id=99),
    "image_id 77, which is not among": lambda c: c["annotations"][1].update(image_id=77),
    "id 'im0', which is not a whole": lambda c: c["images"][0].update(id="im0"),
    "id 1 occurs twice among the images": lambda c: c["images"][0].update(id=1),
    "width '64', which is not a number": lambda c: c["images"][0].update(width="64"),
    "height -64, which is not a number": lambda c: c["images"][0].update(height=-64),
    "name None, which is not text": lambda c: c["categories"][0].update(name=None),
    "name 'a.nb', which is not printable": lambda c: c["categories"][0].update(name="a\nb"),
    "has boxes within 0..1": lambda c: [a.update(bbox=[0.2, 0, 1, 1]) for a in c["annotations"]],
    "6 of 6 images are missing": lambda c: [i.update(file_name="x.png") for i in c["images"]],
}


@pytest.mark.parametrize("message", [*BROKEN, "is not valid JSON"])
def test_broken_files_are_named(folder, message):
    if message in BROKEN:
        edit(folder, BROKEN[message])
    else:
        coco.split_files(folder, "train")[1].write_text('{"images": [')
    with pytest.raises(coco.DataError, match=message) as error:
        load(folder)
    assert "_train.json: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "16 bits", "other size"])
def test_unusable_images_are_named(folder, content):
    path, said = folder / "train/images/scene_000000.png", "scene_000000.png: "
    if content == "16 bits":
        Image.fromarray(np.full((SIZE, SIZE), 4000, np.uint16)).save(path)
    elif content == "other size":
        Image.new("RGB", (30, 20)).save(path)
        said = "scene_000000.png should have 64 x 64 pixels, the file has 30 x 20"
    else:
        parts = {"empty": b"", "text": b"hello", "truncated": path.read_bytes()[:2000]}
        path.write_bytes(parts[content])
    with pytest.raises(coco.DataError, match=said):
        load(folder)[0]


def test_check_names_every_fault(folder, capsys):
    """All that a training would stop on is listed at once; the rest is counted."""

    def check(change):
        edit(folder, change)
        with pytest.raises(SystemExit) as stop:
            isaid.main(["check", str(folder)])
        return stop.value.code, capsys.readouterr().out

    path, images = coco.split_files(folder, "train")[1], folder / "train/images"
    whole = path.read_text()
    spoilt = ["category_id 99", "image_id 77", "id 1 occurs twice", "width '64'", "name None"]
    chosen = [text for text in BROKEN if text.startswith(tuple(spoilt))]
    status, out = check(lambda content: [BROKEN[text](content) for text in chosen])
    assert status == 1 and "faults   5\n" in out and all(text in out for text in chosen)

    def harmless(content):
        dense = {"image_id": 3, "category_id": 2, "bbox": [1, 1, 4, 4]}
        content["annotations"] += [{**dense, "id": 1000 + i} for i in range(101)]
        content["annotations"] += [{**dense, "bbox": [5, 5, -3, 4]}, {**dense, "id": 1000}]

    path.write_text(whole)
    status, out = check(harmless)
    assert status == 0 and "images   6," in out and "64 x 64 (6)" in out
    assert re.search(r"removed +1\n(.*\n)+.*ids used again +1\n", out)
    assert "DETR's 100 queries  1 (16.7%)" in out and "300 queries  0 (0.0%)" in out
    status, out = check(lambda content: content["categories"][0].update(name="boat"))
    assert status == 1 and "the splits have different classes: 1 boat" in out
    with pytest.raises(SystemExit, match="has the classes 1 boat.* 1 ship"):
        train.main([*TINY, "--data", str(folder)])
    Image.new("RGB", (30, 20)).save(images / "scene_000001.png")
    (images / "scene_000002.png").write_bytes((images / "scene_000002.png").read_bytes()[:900])
    for n in (4, 5):
        (images / f"scene_00000{n}.png").unlink()
    status, out = check(lambda content: None)
    assert status == 1 and "faults   4\n" in out and "images   2," in out and "64 x 64 (2)" in out
    assert all(f"scene_00000{n}.png: is missing" in out for n in (4, 5))
    assert "scene_000001.png should have 64 x 64" in out and "scene_000002.png: is damaged" in out


# ---------------------------------------------------------------- augmentation


def white_box(size, box, transform):
    """A black picture with one white rectangle, as a dataset of one image."""
    (w, h), (x, y, bw, bh), image = size, box, Image.new("RGB", size)
    image.paste("white", (x, y, x + bw, y + bh))
    content = {"categories": [{"id": 1, "name": "box"}]}
    content["images"] = [{"id": 0, "file_name": "", "width": w, "height": h}]
    content["annotations"] = [{"image_id": 0, "category_id": 1, "bbox": box}]
    return isaid.Detection("white box", content, lambda i, at_least: (image, size), transform)


@pytest.mark.parametrize("size", [(90, 60), (64, 64), (700, 500)], ids=str)
@pytest.mark.parametrize("image_size", [64, 96, None])
@pytest.mark.parametrize("augment", isaid.AUGMENT)
def test_boxes_follow_their_object(size, image_size, augment):
    """The box is where the white is; of the eight ways to lie those are met that are meant."""
    image_size = image_size or (80 if augment == "crop" else None)
    data = white_box(size, [8, 30, 40, 20], isaid.transforms(True, image_size, augment))
    places = set()
    for data.epoch in range(40 if image_size else 6):
        picture, target = data[0]
        bright = coco.unnormalise(picture).amin(0) > 0.66
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
    assert len(places) == ways if ways and image_size else len(places) > 1


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    data = isaid.synthetic("train", 3, SIZE, isaid.transforms(True, SIZE, "aerial"))

    def item(seed, epoch, i):
        data.seed, data.epoch, state = seed, epoch, torch.get_rng_state()
        image, target = data[i]
        assert torch.equal(torch.get_rng_state(), state)  # the model's randomness is left alone
        assert target["image_id"] == i % 3
        return str(image), target["seed"]

    assert item(0, 1, 2) == item(0, 1, 2)
    for step in ((1, 0, 0), (0, 1, 0), (0, 0, 3)):  # seeds, epochs, the same image once more
        images, seeds = zip(*(item(*(k * np.array(step) + (0, 0, 2))) for k in range(8)))
        assert len(set(images)) > 2 and len(set(seeds)) == 8
    data.transform = isaid.transforms(False, SIZE, "aerial")  # what is held out is not augmented
    assert item(0, 0, 2)[0] == item(0, 5, 2)[0]


def test_collate_pads_right_and_below():
    images, padding, targets = isaid.collate([(torch.ones(3, 4, 6), 0), (torch.ones(3, 5, 2), 1)])
    assert images.shape == (2, 3, 5, 6) and targets == [0, 1]
    assert torch.equal(images[:, 0] == 0, padding) and (~padding).sum((1, 2)).tolist() == [24, 10]
    assert not padding[0, :4].any() and not padding[1, :, :2].any()


@pytest.mark.parametrize("suffix, read", [("jpg", 256), ("png", 1024)])
def test_large_jpegs_are_decoded_small(tmp_path, suffix, read):
    """A JPEG of four times the size gives nearly the same item from a quarter of the pixels."""
    data, path = white_box((1024, 1024), [256, 512, 128, 64], PLAIN), tmp_path / f"a.{suffix}"
    data.read, data.transform = functools.partial(isaid._read, [path]), isaid.transforms(False, 256)
    scenes.draw_scene(0, 3, 256).resize((1024, 1024)).save(path, quality=95)
    whole, _ = data[0]
    data.at_least = 256
    small, target = data[0]
    assert data.read(0, 256)[0].size == (read, read) and target["size"] == (1024, 1024)
    assert target["boxes"].tolist() == [[0.3125, 0.53125, 0.125, 0.0625]]
    assert (small - whole).abs().mean() < 0.05
