"""Scenes, COCO files good and broken, and boxes that follow their objects through every augmentation."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import isaid
import scenes
import train

# ---------------------------------------------------------------- synthetic scenes

def test_scenes_depend_on_seed_and_number_alone():
    first = scenes.draw_scene(3, 7, 96)
    scenes.draw_scene(3, 8, 96)
    assert np.array_equal(scenes.draw_scene(3, 7, 96), first)
    for other in ((4, 7, 96), (3, 8, 96)):
        assert not np.array_equal(scenes.draw_scene(*other), first)
    small = isaid.synthetic("train", 3, 64, isaid.transforms(False, 64), seed=1)
    large = isaid.synthetic("train", 9, 64, isaid.transforms(False, 64), seed=1)
    held_out = isaid.synthetic("val", 3, 64, isaid.transforms(False, 64), seed=1)
    assert all(torch.equal(small[i][0], large[i][0]) for i in range(3))
    assert not any(torch.equal(small[i][0], held_out[i][0]) for i in range(3))


def test_scenes_hold_all_classes_and_some_are_empty():
    data = isaid.synthetic("train", 600, 128, None)
    counts = np.array(data.counts())
    assert [c["name"] for c in data.categories] == list(scenes.CLASSES) and len(counts) == 15
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 2 * counts.mean()
    assert 0.05 < np.mean([len(labels) == 0 for labels in data.labels]) < 0.2
    boxes = torch.cat(data.boxes)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 128).all() and boxes[:, 2:].min() > 5


def draw_without(n, hidden, monkeypatch):
    """Scene n without shadows and without its labelled object number `hidden`, as an array."""
    draw, seen, nowhere = scenes.draw_thing, [], ImageDraw.Draw(Image.new("RGB", (1, 1)), "RGBA")

    def draw_or_not(rng, pen, thing, sun, fine):
        seen.extend([thing] * (thing.name in scenes.CLASSES))
        skip = thing.name in scenes.CLASSES and len(seen) - 1 == hidden
        draw(rng, nowhere if skip else pen, thing, 0 * sun, fine)  # the random numbers are used up either way

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "draw_thing", draw_or_not)
        return np.asarray(scenes.draw_scene(0, n, 128), float)


def test_scene_boxes_are_tight(monkeypatch):
    """The box is where the picture changes when the object is not drawn."""
    for n in range(12):
        labels, boxes, _ = scenes.scene_objects(0, n, 128)
        whole = draw_without(n, None, monkeypatch)
        for i, box in enumerate(boxes):
            y, x = np.nonzero(np.abs(whole - draw_without(n, i, monkeypatch)).max(-1) > 12)
            changed = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert np.abs(changed - box).max() <= 2.0, (n, scenes.CLASSES[labels[i]], changed, box)


# ---------------------------------------------------------------- files

@pytest.fixture
def folder(tmp_path):
    """A small dataset on disk."""
    isaid.main(["scenes", str(tmp_path / "data"), "--train", "6", "--val", "3", "--image_size", "64"])
    return tmp_path / "data"


def edit(folder, change, split="train"):
    path = isaid.split_files(folder, split)[1]
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def load(folder, **options):
    return isaid.load_coco(*isaid.split_files(folder, "train"), isaid.transforms(False, 64), **options)


def test_scenes_on_disk_are_the_same_dataset(folder):
    disk, memory = load(folder), isaid.synthetic("train", 6, 64, isaid.transforms(False, 64))
    assert len(disk) == 6 and disk.categories == memory.categories
    for i in range(6):
        (image, target), (other, expected) = disk[i], memory[i]
        assert torch.equal(image, other) and torch.equal(target["labels"], expected["labels"])
        torch.testing.assert_close(target["boxes"], expected["boxes"])
    assert len(load(folder, limit=2)) == 2


def test_labels_follow_category_ids(folder):
    """Ids with gaps and in any order become 0..K-1, in the order of the ids."""
    def change(coco):
        coco["categories"] = [{"id": 70, "name": "late"}, {"id": 5, "name": "early"}]
        coco["annotations"] = [{"id": 9, "image_id": 0, "category_id": c, "bbox": [4, 4, 8, 8]} for c in (70, 5, 70)]
    edit(folder, change)
    data = load(folder)
    assert [c["name"] for c in data.categories] == ["early", "late"]
    assert data[0][1]["labels"].tolist() == [1, 0, 1] and data.counts() == [1, 2]
    assert data[1][1]["boxes"].shape == (0, 4)


def test_boxes_are_clipped_and_counted(folder):
    def change(coco):
        box = {"image_id": 0, "category_id": 1}
        coco["annotations"] = [{**box, "id": i, "bbox": b} for i, b in enumerate((
            [-10, 10, 20, 20], [50, 50, 30, 30], [10, 10, 0, 5], [80, 80, 5, 5], [5, 5, -3, 4], [0, 0, float("nan"), 3],
            [10, 10, 20, 20]))] + [{**box, "id": 8, "bbox": [1, 1, 60, 60], "iscrowd": 1}]
    edit(folder, change)
    data = load(folder)
    assert (data.clipped, data.removed) == (2, 4)
    assert data.boxes[0].tolist() == [[0, 10, 10, 20], [50, 50, 14, 14], [10, 10, 20, 20]]
    assert [a["area"] for a in data.annotations[:3]] == [200, 196, 400]  # of what is left of them
    assert [data.tiny(size) for size in (64, 6, 4, 2)] == [0, 1, 2, 3]
    assert [a["iscrowd"] for a in data.annotations] == [0, 0, 0, 1]  # the crowd region is left to the evaluation
    text, stops = isaid.check(*isaid.split_files(folder, "train"))
    assert re.search(r"without area, removed +4\n.*outside, clipped +2\n.*crowd.* 1\n", text) and not stops


def test_sizes_missing_in_the_file_come_from_the_images(folder):
    edit(folder, lambda coco: [image.pop("width") for image in coco["images"]])
    assert load(folder).images[0]["width"] == 64


BROKEN = {
    "not valid JSON": lambda f: isaid.split_files(f, "train")[1].write_text('{"images": ['),
    "no list 'annotations'": lambda f: edit(f, lambda c: c.pop("annotations")),
    "has no 'file_name'": lambda f: edit(f, lambda c: c["images"][1].pop("file_name")),
    "has no 'bbox'": lambda f: edit(f, lambda c: c["annotations"][0].pop("bbox")),
    "it must be 4 numbers": lambda f: edit(f, lambda c: c["annotations"][0].update(bbox=[1, 2, 3])),
    "must be 4 numbers, x": lambda f: edit(f, lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 10 ** 400])),
    "id 'im0', which is not a whole number": lambda f: edit(f, lambda c: c["images"][0].update(id="im0")),
    "name None, which is not text": lambda f: edit(f, lambda c: c["categories"][0].update(name=None)),
    "width '64', which is not a number": lambda f: edit(f, lambda c: c["images"][0].update(width="64")),
    "height -64, which is not a number": lambda f: edit(f, lambda c: c["images"][0].update(height=-64)),
    "iscrowd 'x', which is not a number": lambda f: edit(f, lambda c: c["annotations"][0].update(iscrowd="x")),
    "category_id 99": lambda f: edit(f, lambda c: c["annotations"][0].update(category_id=99)),
    "image_id 77": lambda f: edit(f, lambda c: c["annotations"][0].update(image_id=77)),
    "id 1 occurs twice": lambda f: edit(f, lambda c: c["images"][0].update(id=1)),
    "name 'a.nb', which is not printable": lambda f: edit(f, lambda c: c["categories"][0].update(name="a\nb")),
    "has boxes within 0..1 only": lambda f: edit(f, lambda c: [a.update(bbox=[0.2, 0.1, 0.3, 1]) for a in c["annotations"]]),
    "has no images": lambda f: edit(f, lambda c: c.update(images=[], annotations=[])),
    "has no categories": lambda f: edit(f, lambda c: c.update(categories=[], annotations=[])),
    "1 of 6 images are missing": lambda f: (f / "train/images/scene_000002.png").unlink(),
    "no such folder": lambda f: shutil.rmtree(f / "train/images"),
    "cannot be read": lambda f: isaid.split_files(f, "train")[1].unlink(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_are_named(folder, message):
    BROKEN[message](folder)
    with pytest.raises(isaid.DataError, match=message) as error:
        load(folder)
    assert "train" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["empty", "not an image", "truncated", "16 bits"])
def test_unreadable_images_are_named(folder, content):
    path = folder / "train/images/scene_000000.png"
    if content == "16 bits":
        Image.fromarray(np.full((64, 64), 4000, np.uint16)).save(path)
    else:
        path.write_bytes({"empty": b"", "not an image": b"hello", "truncated": path.read_bytes()[:2000]}[content])
    with pytest.raises(isaid.DataError, match="scene_000000.png"):
        load(folder)[0]


def test_images_of_another_size_are_refused(folder):
    Image.new("RGB", (30, 20)).save(folder / "train/images/scene_000001.png")
    with pytest.raises(isaid.DataError, match="scene_000001.png should have 64 x 64 pixels, the file has 30 x 20"):
        load(folder)[1]


def test_check_command(folder, capsys):
    edit(folder, lambda c: c["annotations"].extend(
        {"id": 1000 + i, "image_id": 3, "category_id": 2, "bbox": [1, 1, 4, 4]} for i in range(101)))
    Image.new("RGB", (30, 20)).save(folder / "train/images/scene_000001.png")
    (folder / "train/images/scene_000002.png").write_bytes((folder / "train/images/scene_000004.png").read_bytes()[:900])
    with pytest.raises(SystemExit) as stop:
        isaid.main(["check", str(folder)])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "; 2 more cannot be used" in out and "images   3," in out and "64 x 64 (4)" in out
    assert re.search("cannot be used +2\n    .*scene_000001.png should have 64 x 64 .*\n    .*scene_000002.png: is damaged", out)
    assert "DETR's 100 queries  1 (25.0%)" in out and "300 queries  0 (0.0%)" in out
    with pytest.raises(SystemExit) as stop:
        isaid.main(["check", "--images", str(folder / "val/images"), "--json", str(isaid.split_files(folder, "val")[1])])
    assert stop.value.code == 0 and "images   3," in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no folder train or val"):
        isaid.main(["check", str(folder / "train")])


def test_check_names_every_fault(folder, capsys):
    """A deliberately broken dataset: all that a training would stop on is listed at once, the rest counted once that is mended."""
    def spoil(coco):
        boxes = coco["annotations"]
        boxes[0].update(category_id=99)
        boxes[1].update(image_id=77)
        coco["images"][0].update(id=1)
        coco["categories"][3].update(id=2)
    edit(folder, spoil)

    def check():
        with pytest.raises(SystemExit) as stop:
            isaid.main(["check", str(folder)])
        return stop.value.code, capsys.readouterr().out
    status, out = check()
    assert status == 1 and "faults, 4" in out
    for text in ("category_id 99, which is not among the categories", "image_id 77, which is not among the images",
                 "id 1 occurs twice among the images", "id 2 occurs twice among the categories"):
        assert text in out

    def mend(coco):
        boxes = coco["annotations"]
        coco["images"][0].update(id=0)
        coco["categories"][3].update(id=4)
        for box, change in zip(boxes, ({"category_id": 1, "bbox": [5, 5, -3, 4]}, {"image_id": 0, "bbox": [0, 0, float("nan"), 3]},
                                       {"bbox": [50, 50, 30, 30], "id": boxes[1]["id"]})):
            box.update(change)
    edit(folder, mend)
    status, out = check()
    assert status == 0
    assert re.search(r"without area, removed +2\n.*outside, clipped +1\n.*\n.*ids used again +1\n", out)
    edit(folder, lambda coco: coco["categories"][0].update(name="boat"))
    status, out = check()
    assert status == 1 and "the splits have different classes: 1 boat" in out
    edit(folder, lambda coco: coco["annotations"][0].update(bbox="x", category_id=99))
    assert "bbox 'x', which is not a list" in (out := check()[1]) and "category_id 99" in out  # one fault hides no other
    edit(folder, mend)
    for n in (2, 5):
        (folder / f"train/images/scene_00000{n}.png").unlink()
    edit(folder, lambda coco: coco["images"][5].pop("width"))
    status, out = check()
    assert status == 1 and all(f"scene_00000{n}.png: is missing" in out for n in (2, 5))
    shutil.rmtree(folder / "val")
    assert "there is no val; to train with --data both are needed" in check()[1]


# ---------------------------------------------------------------- augmentation

def white_box(size, box):
    """A black picture with one white rectangle, as a dataset of one image."""
    (w, h), (x, y, bw, bh) = size, box
    image = Image.new("RGB", size)
    image.paste("white", (x, y, x + bw, y + bh))
    return {"images": [{"id": 0, "file_name": "", "width": w, "height": h}], "categories": [{"id": 1, "name": "box"}],
            "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [x, y, bw, bh]}]}, image


@pytest.mark.parametrize("size", [(90, 60), (64, 64), (700, 500)])
@pytest.mark.parametrize("options", [
    {"image_size": 64, "hflip": False}, {"image_size": 64, "vflip": True}, {"image_size": 96, "quarter_turns": True},
    {"vflip": True, "quarter_turns": True}, {}], ids=lambda o: "-".join(o) or "official")
def test_boxes_follow_their_object(size, options):
    coco, image = white_box(size, (12, 30, 40, 20))
    data = isaid.Detection("white box", coco, lambda i, at_least: (image, image.size), isaid.transforms(True, **options))
    whites, places = torch.tensor([(1 - m) / s for m, s in zip(isaid.MEAN, isaid.STD)]), set()
    for data.epoch in range(12):
        picture, target = data[0]
        bright = (picture - whites[:, None, None]).abs().amax(0) < 1.5
        if len(target["boxes"]) == 0:  # cropped away
            assert bright.float().mean() < 0.01
            continue
        H, W = bright.shape
        if options.get("image_size"):
            assert H == W == options["image_size"]
        else:
            assert max(H, W) <= 1333 and min(H, W) <= 800
        y, x = (v.float() for v in bright.nonzero(as_tuple=True))
        found = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
        cx, cy, w, h = (target["boxes"][0] * torch.tensor([W, H, W, H])).tolist()
        expected = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        assert (found - expected).abs().max() <= max(W / size[0], H / size[1], 1) + 1.5
        places.add(tuple(target["boxes"][0].mul(100).round().tolist()))
    moves = 1 if options.get("hflip") is False else 2
    assert len(places) >= moves and (moves > 1 or len(places) == 1)


def test_evaluation_is_not_augmented():
    data = isaid.synthetic("val", 2, 64, isaid.transforms(False, 64, vflip=True, quarter_turns=True))
    first = data[1][0]
    data.epoch = 5
    assert torch.equal(data[1][0], first)


def test_augmentation_depends_on_seed_epoch_and_index():
    def item(seed, epoch, i):
        data = isaid.synthetic("train", 3, 64, isaid.transforms(True, 64, vflip=True, quarter_turns=True))
        data.seed, data.epoch = seed, epoch
        state = torch.get_rng_state()
        image = data[i][0]
        assert torch.equal(torch.get_rng_state(), state)  # the model's randomness is left alone
        return image
    assert torch.equal(item(0, 1, 2), item(0, 1, 2))
    variants = [item(0, epoch, 2) for epoch in range(8)]
    assert any(not torch.equal(variants[0], other) for other in variants[1:])


def test_collate_pads_right_and_below():
    images, padding, targets = isaid.collate([(torch.ones(3, 4, 6), {"n": 0}), (torch.ones(3, 5, 2), {"n": 1})])
    assert images.shape == (2, 3, 5, 6) and targets == [{"n": 0}, {"n": 1}]
    assert torch.equal(images[:, 0] == 0, padding)
    assert (~padding).sum((1, 2)).tolist() == [24, 10] and not padding[0, :4].any() and not padding[1, :, :2].any()


# ---------------------------------------------------------------- loading

def test_large_jpegs_are_decoded_small(tmp_path):
    """A JPEG of four times the wanted size gives nearly the same item, from a quarter of the pixels; other files are read whole."""
    picture = scenes.draw_scene(0, 3, 256).resize((1024, 1024))
    coco = isaid.synthetic("train", 4, 256, None)
    boxes = [{**a, "image_id": 0, "bbox": [4 * v for v in a["bbox"]]} for a in coco.annotations if a["image_id"] == 3]
    assert boxes
    for suffix, read in (("jpg", 256), ("png", 1024)):
        picture.save(tmp_path / f"a.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
        content = {"images": [{"id": 0, "file_name": f"a.{suffix}"}], "annotations": boxes, "categories": coco.categories}
        (tmp_path / "a.json").write_text(json.dumps(content))
        data = isaid.load_coco(tmp_path, tmp_path / "a.json", isaid.transforms(False, 256))
        whole, target = data[0]
        data.at_least = 256
        assert data.read(0, 256)[0].size == (read, read) and data.read(0, 256)[1] == (1024, 1024)
        small, other = data[0]
        assert other["size"] == target["size"] == (1024, 1024)
        torch.testing.assert_close(other["boxes"], target["boxes"])
        assert (small - whole).abs().mean() < 0.05


def test_repeat_factors():
    """A class in one of 100 images, with a threshold of 0.04: shown twice as often; every epoch has as many items."""
    images = [{"id": i, "width": 10, "height": 10, "file_name": ""} for i in range(100)]
    annotations = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 5, 5]} for i in range(50)]
    annotations += [{"image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5]}]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)]}
    data = isaid.Detection("rare", coco, None, None)
    factors = isaid.repeat_factors(data, 0.04)
    assert factors[7] == pytest.approx(2) and factors.sum() == pytest.approx(101)
    counts = np.zeros(100)
    uneven = torch.linspace(1, 2.5, 100)
    for epoch in range(200):
        items = train.repeated(uneven, torch.tensor((epoch + 0.5) / 200))
        assert len(items) == round(float(uneven.sum())) and len(set(items.tolist())) == len(items)
        counts += np.bincount(items.numpy() % 100, minlength=100)
    assert np.abs(counts / 200 - uneven.numpy()).max() < 0.02
    assert sorted(train.repeated(factors, torch.tensor(0.3)).tolist()) == [*range(100), 107]


def test_repeated_images_are_augmented_anew():
    data = isaid.synthetic("train", 3, 64, isaid.transforms(True, 64, vflip=True, quarter_turns=True))
    variants = [data[2 + 3 * k] for k in range(8)]
    assert {target["image_id"] for _, target in variants} == {2}
    assert any(not torch.equal(variants[0][0], image) for image, _ in variants[1:])
