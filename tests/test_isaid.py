"""Synthetic scenes, datasets in four layouts, broken files, augmentation and batches."""

import argparse
import json
import multiprocessing
import pickle
import re
import runpy
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, masks_to_boxes

import isaid
import train
from util import coco, distributed, isaid_prepare, synthetic
from util.dataset_check import class_counts, num_subpixel_boxes, summary
from util.files import DataError, read_json
from util.images import unnormalize

SIZE = 64
EVAL_TRANSFORM = isaid.make_transforms(False, SIZE)


def assert_same(data, expected_data):
    """Two datasets have the same items and classes."""
    assert len(data) == len(expected_data)
    assert data.categories == expected_data.categories
    for (image, target), (expected_image, expected_target) in zip(data, expected_data):
        assert torch.equal(image, expected_image)
        torch.testing.assert_close(target.pop("boxes"), expected_target.pop("boxes"))
        assert str(target) == str(expected_target)  # names, sizes, labels, seeds


# ---------------------------------------------------------------- synthetic scenes
def test_scenes_depend_on_seed_and_number_alone():
    def scenes(split, n, seed=1):
        data = isaid.synthetic_dataset(split, n, SIZE, None, seed)
        return [data.load_image(i).tobytes() for i in reversed(range(n))]

    assert scenes("train", 3) == scenes("train", 9)[-3:]
    all_scenes = scenes("train", 9) + scenes("val", 3) + scenes("train", 3, seed=2)
    assert len(set(all_scenes)) == 15


def test_scenes_may_have_another_seed_than_the_run():
    """--scene_seed chooses the scenes, --seed still their augmentation."""

    def training_set(flags):
        args, _ = train.parse(f"--image_size {SIZE} --limit_train 8 {flags}".split())
        return isaid.load_train_and_val(args)[0]

    by_seed = training_set("--seed 5")
    by_scene_seed = training_set("--seed 6 --scene_seed 5")
    assert by_scene_seed.annotations == by_seed.annotations
    for i in range(8):
        assert by_scene_seed.load_image(i).tobytes() == by_seed.load_image(i).tobytes()
    seeds = [target["seed"] for _, target in by_seed]
    assert seeds != [target["seed"] for _, target in by_scene_seed]
    assert training_set("--seed 5 --scene_seed 6").annotations != by_seed.annotations


def test_scenes_have_isaids_classes():
    assert synthetic.CATEGORIES == isaid_prepare.CATEGORIES


def test_scenes_hold_all_classes_and_some_are_empty():
    data = isaid.synthetic_dataset("train", 600, 128, None)
    counts = np.array(class_counts(data))
    assert len(counts) == 15
    assert [category["name"] for category in data.categories] == list(synthetic.CLASSES)
    assert counts.min() > 0.5 * counts.mean()
    assert counts.max() < 2 * counts.mean()
    is_empty = [len(labels) == 0 for labels in data.labels]
    assert 0.05 < np.mean(is_empty) < 0.2
    boxes = torch.cat(data.boxes)
    assert boxes.min() >= 0
    assert boxes[:, 2:].min() > 5
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 128


def test_scene_boxes_are_tight(monkeypatch):
    """The box is where the picture changes when the object is not drawn."""
    draw_object = synthetic.draw_object

    def picture_without(n, hidden):
        """Draw scene n without shadows and without the object number `hidden`."""
        num_drawn = 0

        def draw_or_not(rng, pen, scene_object, sun, scale):
            nonlocal num_drawn
            if scene_object.name in synthetic.CLASSES:
                if num_drawn == hidden:  # draw it far away, with the same random numbers
                    scene_object = synthetic.SceneObject(
                        scene_object.name, scene_object.axis, -1e6, scene_object.box
                    )
                num_drawn += 1
            draw_object(rng, pen, scene_object, 0 * sun, scale)

        monkeypatch.setattr(synthetic, "draw_object", draw_or_not)
        return np.asarray(synthetic.draw_scene(0, n, 128), float)

    for n in range(12):
        whole = picture_without(n, None)
        for i, annotation in enumerate(synthetic.scene_annotations(0, n, 128)):
            changed = np.abs(picture_without(n, i) - whole).max(-1) > 12
            visible_box = masks_to_boxes(torch.from_numpy(changed)[None])[0] + torch.tensor(
                [0, 0, 1, 1]
            )
            box = box_convert(torch.tensor(annotation["bbox"]), "xywh", "xyxy")
            assert (visible_box - box).abs().max() <= 2.0, (n, annotation, visible_box)


def test_scenes_are_cached_up_to_a_limit(monkeypatch):
    """Of six scenes the first four are drawn only once; all look as if all were cached."""
    drawn = []
    draw_scene = synthetic.draw_scene

    def recorded_draw(seed, n, size):
        drawn.append(n)
        return draw_scene(seed, n, size)

    monkeypatch.setattr(synthetic, "draw_scene", recorded_draw)
    all_cached = isaid.synthetic_dataset("train", 6, SIZE, EVAL_TRANSFORM)
    monkeypatch.setattr(synthetic, "CACHE_BYTES", 4 * 3 * SIZE * SIZE + 100)
    four_cached = isaid.synthetic_dataset("train", 6, SIZE, EVAL_TRANSFORM)
    assert len(four_cached.renderer.pixels) == 4
    assert_same(four_cached, all_cached)
    assert_same(four_cached, all_cached)
    assert sorted(drawn) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5]

    other = isaid.synthetic_dataset("train", 4, SIZE, EVAL_TRANSFORM, seed=1)
    batches = [images for images, _, _ in isaid.data_loader(other, 1, batch_size=2)]
    drawn.clear()
    assert torch.equal(torch.cat(batches), torch.stack([image for image, _ in other]))
    if multiprocessing.get_start_method() == "fork":
        assert drawn == []  # the worker process has drawn them
    drawn.clear()
    assert_same(pickle.loads(pickle.dumps(other)), other)
    assert drawn == [0, 1, 2, 3]  # as by a process that is not forked


def test_scenes_delete_no_folder(tmp_path, monkeypatch, capsys):
    """Neither one that is named like something temporary, nor is anything left after an error."""
    (tmp_path / "new/data.partial").mkdir(parents=True)
    (tmp_path / "new/data.partial/labels.txt").write_text("precious")
    flags = ["scenes", f"{tmp_path}/new/data", "--train", "1", "--val", "1"]
    monkeypatch.setattr(isaid, "write_text", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(SystemExit, match="No space left"):
        isaid.main(flags)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data.partial"]
    monkeypatch.undo()
    isaid.main(flags)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"data", "data.partial"}
    assert (tmp_path / "new/data.partial/labels.txt").read_text() == "precious"
    assert (tmp_path / "new/data").stat().st_mode == (tmp_path / "new").stat().st_mode


# ---------------------------------------------------------------- datasets on disk
@pytest.fixture
def folder(tmp_path):
    """A small dataset on disk."""
    isaid.main(f"scenes {tmp_path}/data --train 6 --val 3 --image_size {SIZE}".split())
    return tmp_path / "data"


def edit(folder, change):
    """Change the training annotations by a function of the file's content."""
    _, path = coco.split_files(folder, "train")
    content = read_json(path)
    change(content)
    path.write_text(json.dumps(content))


def load(folder, split="train", setting="detect", limit_train=None):
    args = argparse.Namespace(
        data=folder,
        setting=setting,
        limit_train=limit_train,
        image_size=SIZE,
        augment="none",
        overfit=None,
        seed=0,
    )
    return isaid.load_split(split, args, train=False)


def check(folder, capsys):
    """Run the command `check`; return its exit status and what it prints."""
    with pytest.raises(SystemExit) as stop:
        isaid.main(["check", str(folder)])
    return stop.value.code, capsys.readouterr().out


LAYOUTS = [  # folder and file, name of the split for validation, name of the layout
    ("SPLIT/images SPLIT/instancesonly_filtered_SPLIT.json", "val", "iSAID patches"),
    ("SPLIT2017 annotations/instances_SPLIT2017.json", "val", "COCO"),
    ("images/SPLIT annotations/instances_SPLIT.json", "val", "COCO"),
    ("SPLIT SPLIT/_annotations.coco.json", "valid", "Roboflow"),
    ("SPLIT SPLIT.json", "valid", "a file beside each folder"),
    ("SPLIT SPLIT.json", "val", "a file beside each folder"),
]


def copy_split(folder, source, root, images_name, json_name):
    """Copy a split of a dataset to another place, given by names in a folder `root`."""
    source_images, source_json = coco.split_files(folder, source)
    shutil.copytree(source_images, root / images_name)
    (root / json_name).parent.mkdir(exist_ok=True)
    shutil.copy(source_json, root / json_name)


@pytest.mark.parametrize("layout, val_name, layout_name", LAYOUTS)
def test_layouts(folder, tmp_path, layout, val_name, layout_name, capsys):
    """A dataset is the same in memory and on disk, in every layout; also without annotations."""
    root = tmp_path / "other"
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        name = split
        if split == "val":
            name = val_name
        text = layout.replace("SPLIT", name)
        if split == "test":
            text = text.replace("instances_", "image_info_")
        images_name, json_name = text.split()
        copy_split(folder, source, root, images_name, json_name)
        captions = (root / json_name).with_name(f"captions_{split}2017.json")
        captions.write_text("{}")  # not of objects
        assert coco.find_split(root, split) == (root / images_name, root / json_name)

    for split, n in (("train", 6), ("val", 3)):
        in_memory = isaid.synthetic_dataset(split, n, SIZE, EVAL_TRANSFORM)
        assert_same(load(root, split), in_memory)
        bare = load(root, split, "pretrain")
        assert len(bare) == n
        assert bare.annotations == []
        for (image, _), (expected_image, _) in zip(bare, in_memory):
            assert torch.equal(image, expected_image)
    assert_same(load(root, "test"), load(root, "val"))
    assert len(load(root, "test", "pretrain")) == 3
    assert len(load(root, limit_train=2)) == 2
    status, out = check(root, capsys)
    assert status == 0
    assert "images   6," in out
    images_name, json_name = layout.replace("SPLIT", "train").split()
    assert f"  layout   {layout_name} ({json_name} with {images_name}/)\n" in out


def test_several_splits_of_a_name_are_an_error(folder, tmp_path, capsys):
    """Which one is meant is not guessed; trainval is no train; a link is not another split."""
    root = tmp_path / "coco"
    copy_split(folder, "train", root, "trainval2017", "annotations/instances_trainval2017.json")
    copy_split(folder, "train", root, "train2017", "annotations/instances_train2017.json")
    copy_split(folder, "val", root, "valid", "valid.json")
    (root / "images").mkdir()
    (root / "images/train2017").symlink_to(root / "train2017")
    (root / "val").symlink_to("valid")
    (root / "val.json").symlink_to("valid.json")
    assert check(root, capsys)[0] == 0

    copy_split(folder, "train", root, "train2014", "annotations/instances_train2014.json")
    message = r"coco: contains several 'train' splits \(annotations/instances_train2014.json with "
    message += "train2014/; annotations/instances_train2017.json with train2017/"
    for setting in ("detect", "pretrain"):
        with pytest.raises(DataError, match=message):
            load(root, "train", setting)
    status, out = check(root, capsys)
    assert status == 1
    assert re.search(message, out)


def test_the_folder_that_is_meant_is_named(folder, tmp_path):
    """Of a dataset: one above or below, or the part that is missing."""
    json_name = "data/val/instancesonly_filtered_val.json"
    for name in ("data/train", "data/train/images", json_name, ""):
        with pytest.raises(DataError, match=f"split found; there is one in {folder}"):
            load(tmp_path / name)
    (folder / "train/images").rename(tmp_path / "images")
    with pytest.raises(DataError, match=f"_train.json is there, but not .*{folder}/train/images"):
        load(folder)
    with pytest.raises(DataError, match="none: folder not found"):
        load(tmp_path / "none")


def test_any_folder_of_images(tmp_path):
    """Every twentieth image is held out; iSAID's masks and other files are not images."""
    root = tmp_path / "any"
    names = []
    for part in ("a", "b"):
        for i in range(0, 20, 2):
            names += [f"{part}/images/{i:02}.png", f"{part}/images/{i + 1:02}.JPEG"]
        names.append(f"{part}/images/20.png")
    masks = ["a/images/00_instance_id_RGB.png", "a/images/00_instance_color_RGB.png"]
    for name in names + masks + ["../one/0.PNG"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 60)).save(path)
    (root / "a/notes.txt").write_text("not an image")

    _, train_paths = coco.find_images(root, "train")
    _, val_paths = coco.find_images(root, "val")
    assert val_paths == [root / names[i] for i in (0, 20, 40)]
    assert set(train_paths) == {root / name for name in names} - set(val_paths)
    assert len(load(root, "train", "pretrain")) == 39
    with pytest.raises(DataError, match="contains only one image"):
        coco.find_images(tmp_path / "one", "val")

    with pytest.raises(DataError, match="any: no test images found"):
        coco.find_images(root, "test")
    (root / "a").rename(root / "train")  # as ImageNet and iSAID's patches have them
    (root / "b").rename(root / "val")
    for name in ("val", "valid"):
        for split in ("train", "val"):
            _, paths = coco.find_images(root, split)
            assert len(paths) == 21
        if name == "val":
            (root / "val").rename(root / "valid")


def test_an_unknown_layout_is_answered_with_the_layouts(folder, capsys):
    (folder / "val/images").rename(folder / "val/pictures")
    status, out = check(folder, capsys)
    assert status == 1
    message = rf"(?m)^error: {folder}: no annotated 'val' split .*iSAID.*/instances_val\*\.json .*"
    message += r"\(COCO\); val.json beside val/ or valid.json beside valid/; "
    message += r".*valid/_annotations.coco.json \(Roboflow\)$"
    assert re.search(message, out)
    assert "images   6," in out  # of the other split


def test_boxes_are_clipped_and_labels_follow_ids(folder):
    """Category ids with gaps, in any order, become labels 0 to K - 1 in the order of the ids."""
    cases = [  # category, box, iscrowd
        (70, [-10, 10, 20, 20], 0),
        (5, [50, 50, 30, 30], 0),
        (70, [10, 10, 20, 20], 0),
        (5, [1, 1, 60, 60], 1),
        (5, [10, 10, 0, 5], 0),
        (5, [80, 80, 5, 5], 0),
        (5, [0, 0, float("inf"), 3], 0),
        (5, [0, 0, float("nan"), 3], 0),
    ]
    annotations = []
    for category, box, iscrowd in cases:
        annotations.append(
            {"image_id": 0, "category_id": category, "bbox": box, "iscrowd": iscrowd}
        )

    def change(content):
        content["annotations"] = annotations
        content["categories"] = [{"id": 70, "name": "late"}, {"id": 5, "name": "early"}]
        del content["images"][0]["width"]  # then it is read from the image

    edit(folder, change)
    data = load(folder)
    assert data.images[0]["width"] == SIZE
    assert [category["name"] for category in data.categories] == ["early", "late"]
    assert data.boxes[0].tolist() == [[0, 10, 10, 20], [50, 50, 14, 14], [10, 10, 20, 20]]
    assert data[0][1]["labels"].tolist() == [1, 0, 1]
    assert data[1][1]["boxes"].shape == (0, 4)
    assert [a["area"] for a in data.annotations[:3]] == [200, 196, 400]  # of the clipped boxes
    assert [a["iscrowd"] for a in data.annotations] == [0, 0, 0, 1]
    assert data.cleaning_counts == {"clipped to their image": 2, "without area, removed": 4}
    assert class_counts(data) == [1, 2]
    assert [num_subpixel_boxes(data, size) for size in (64, 6, 4, 2)] == [0, 1, 2, 3]
    text = summary(data, num_queries=2, image_size=4)
    assert "6 images, 3 boxes" in text
    assert "2 boxes clipped to their image" in text
    assert "4 boxes without area, removed" in text
    assert "2 boxes under a pixel after resizing" in text
    assert "1 images (16.7%) contain more objects than there are queries (2)" in text


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
    """Loading names the first one, the command `check` all of them."""
    paths = [folder / f"train/images/scene_00000{i}.png" for i in range(5)]
    paths[0].write_bytes(b"text")
    paths[1].write_bytes(paths[1].read_bytes()[:900])
    Image.fromarray(np.full((SIZE, SIZE), 4000, np.uint16)).save(paths[2])
    Image.new("RGB", (30, 20)).save(paths[3])
    paths[4].unlink()
    messages = [
        "not a readable image",
        "not a readable image",
        "has more than 8 bits per channel",
        "annotations say 64 x 64 pixels, but the image is 30 x 20",
        "file not found",
    ]
    status, out = check(folder, capsys)
    assert status == 1
    assert "errors   5\n" in out
    assert "64 x 64 (1)" in out  # of the image that is left
    for path, message in zip(paths, messages):
        assert f"{path}: {message}" in out

    with pytest.raises(DataError, match="1 of 6 images not found"):
        load(folder)
    Image.new("RGB", (SIZE, SIZE)).save(paths[4])
    data = load(folder)
    for i in range(4):
        with pytest.raises(DataError, match=f"{paths[i].name}: {messages[i]}"):
            data[i]


def test_check_reports_contents(folder, capsys):
    """The report counts crowded images, corrected boxes and ids that occur again."""
    dense = {"image_id": 3, "category_id": 2, "bbox": [1, 1, 4, 4]}
    annotations = [{**dense, "id": 1000 + i} for i in range(101)]
    annotations.append({**dense, "id": 1000, "bbox": [5, 5, -3, 4]})
    annotations.append({**dense, "id": 1000})
    edit(folder, lambda content: content["annotations"].extend(annotations))
    status, out = check(folder, capsys)
    assert status == 0
    assert "images   6," in out
    assert "100 queries  1 (16.7%)" in out
    assert re.search(r"boxes with negative sides, corrected +1\n", out)
    assert re.search(r"duplicate annotation ids +2\n", out)


def test_different_classes_of_the_splits_are_an_error(folder, capsys):
    edit(folder, lambda content: content["categories"][0].update(name="boat"))
    status, out = check(folder, capsys)
    assert status == 1
    assert "the splits have different classes: 1 boat" in out
    with pytest.raises(SystemExit, match="class mismatch: .* has 1 boat.* 1 ship"):
        train.main(["--data", str(folder)])


def test_check_lists_every_error(folder, capsys):
    """Everything that a training would stop on is reported at once."""
    messages = [
        "category_id 99 does not exist",
        "image_id 77 does not exist",
        "duplicate id 1 in 'images'",
        "width must be a non-negative number, got '64'",
        "name must be a string, got None",
    ]

    def change(content):
        for message in messages:
            BROKEN[message](content)

    edit(folder, change)
    _, val_json = coco.split_files(folder, "val")
    val_json.write_text('{"images": [')
    status, out = check(folder, capsys)
    assert status == 1
    assert "errors   5\n" in out
    for message in messages:
        assert message in out
    assert "_val.json: not valid JSON" in out


# ---------------------------------------------------------------- augmentation
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
    """The box is where the white is, and every flip and rotation that is meant occurs."""
    if augment == "crop" and not image_size:
        image_size = 80
    transform = isaid.make_transforms(True, image_size, augment)
    data = white_box(tmp_path / "a.png", size, [8, 30, 40, 20], transform)
    num_epochs = 40 if image_size else 6
    positions = set()
    for epoch in range(num_epochs):
        data.epoch = epoch
        image, target = data[0]
        is_white = unnormalize(image).amin(0) > 0.66
        H, W = is_white.shape
        if image_size:
            assert (H, W) == (image_size, image_size)
        else:
            assert max(H, W) <= 1333
            assert min(H, W) <= 800
        if len(target["boxes"]) == 0:  # cropped away
            assert is_white.float().mean() < 0.01
            continue
        white = masks_to_boxes(is_white[None])[0] + torch.tensor([0, 0, 1, 1])
        box = box_convert(target["boxes"][0], "cxcywh", "xyxy") * torch.tensor([W, H, W, H])
        assert (white - box).abs().max() <= max(W / size[0], H / size[1], 1) + 1.5
        positions.add(tuple(target["boxes"][0].mul(100).round().tolist()))

    num_ways = {"none": 1, "flip": 2, "aerial": 8}
    if augment == "crop":
        assert len(positions) > 1
    elif image_size:
        assert len(positions) == num_ways[augment]
    else:
        assert len(positions) > 0


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    data = isaid.synthetic_dataset("train", 3, SIZE, isaid.make_transforms(True, SIZE, "aerial"))

    def item(seed, epoch, index):
        data.seed = seed
        data.epoch = epoch
        state = torch.get_rng_state()
        image, target = data[index]
        assert torch.equal(torch.get_rng_state(), state)  # the model's random numbers are untouched
        assert target["image_id"] == index % 3
        return image.numpy().tobytes(), target["seed"]

    assert item(0, 1, 2) == item(0, 1, 2)
    for variants in (
        [item(k, 0, 2) for k in range(8)],
        [item(0, k, 2) for k in range(8)],
        [item(0, 0, 2 + 3 * k) for k in range(8)],  # image 2 again and again
    ):
        assert len({image for image, _ in variants}) > 2
        assert len({seed for _, seed in variants}) == 8

    data.transform = isaid.make_transforms(False, SIZE, "aerial")  # for evaluation: none
    first_image, _ = item(0, 0, 2)
    other_image, _ = item(0, 5, 2)
    assert first_image == other_image


@pytest.mark.parametrize("suffix, decoded_size", [("jpg", 256), ("png", 1024)])
def test_large_jpegs_are_decoded_small(tmp_path, suffix, decoded_size):
    """A JPEG of four times the size gives nearly the same item from a quarter of the pixels."""
    path = tmp_path / f"a.{suffix}"
    synthetic.draw_scene(0, 3, 256).resize((1024, 1024)).save(path, quality=95)
    content = one_box((1024, 1024), [256, 512, 128, 64])
    data = isaid.DetectionDataset("", content, [path], isaid.make_transforms(False, 256))
    whole, _ = data[0]
    data.min_size = 256
    small, target = data[0]
    assert (small - whole).abs().mean() < 0.05
    assert target["size"] == (1024, 1024)
    assert target["boxes"].tolist() == [[0.3125, 0.53125, 0.125, 0.0625]]
    assert data.load_image(0, min_size=256).size == (decoded_size, decoded_size)
    assert data.load_image(0).size == (1024, 1024)


# ---------------------------------------------------------------- batches
def test_collate_pads_right_and_below():
    images, padding, targets = isaid.collate([(torch.ones(3, 1, 2), 0), (torch.ones(3, 2, 1), 1)])
    assert padding.tolist() == [[[False, False], [True, True]], [[False, True], [False, True]]]
    assert torch.equal(images[:, 2], 1 - padding.float())
    assert targets == [0, 1]


def test_batches_of_an_epoch(monkeypatch):
    """Two processes share whole steps of the shuffled images, which differ between epochs."""
    data = isaid.synthetic_dataset("train", 30, SIZE, None)
    args = argparse.Namespace(batch_size=3, grad_accum_steps=2, overfit=None, seed=0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def batches_of(rank, epoch):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        return isaid.epoch_batch_indices(data, args, epoch)

    batches = batches_of(0, 1) + batches_of(1, 1)
    assert [len(batch) for batch in batches] == [3] * 8  # two steps of 12 images; 6 are left out
    assert len(set(sum(batches, []))) == 24
    assert batches_of(0, 1) == batches[:4]
    assert batches_of(0, 2) != batches[:4]


def test_few_images(folder):
    """A batch has at most as many images as there are; to overfit, the same ones come again."""
    args = train.parse(["--data", str(folder), "--image_size", "64", "--overfit", "2"])[0]
    before = vars(args).copy()
    train_set, val_set = isaid.load_train_and_val(args)
    assert vars(args) == before
    assert_same(train_set, val_set)
    assert len(train_set) == isaid.actual_batch_size(train_set, args) == 2
    batches = isaid.epoch_batch_indices(train_set, args, epoch=0)
    assert len(batches) == 50
    assert sorted({i % 2 for i in batches[0] + batches[1]}) == [0, 1]


# ---------------------------------------------------------------- results/tiles
def test_quarters_of_odd_sides(tmp_path):
    """Boxes are where the white is, in the quarter of their center, down to the last row.

    Images of the same base name have quarters of their own.
    """
    split_dir = tmp_path / "data/val"
    (split_dir / "images/sub").mkdir(parents=True)
    picture = Image.new("RGB", (71, 51))
    annotations = []
    for i, (x, y, w, h) in enumerate([(2, 3, 20, 10), (30, 30, 41, 21)]):
        picture.paste("white", (x, y, x + w, y + h))
        annotations.append({"id": i, "image_id": 7, "category_id": 1, "bbox": [x, y, w, h]})
    picture.save(split_dir / "images/a.png")
    Image.new("RGB", (71, 51)).save(split_dir / "images/sub/a.png")
    annotations.append({"id": 2, "image_id": 8, "category_id": 1, "bbox": [2, 3, 20, 10]})
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 71, "height": 51},
            {"id": 8, "file_name": "sub/a.png", "width": 71, "height": 51},
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "box"}],
    }
    (split_dir / "instancesonly_filtered_val.json").write_text(json.dumps(content))

    script = runpy.run_path(Path(isaid.__file__).parent / "results/tiles/quarters.py")
    script["quarters"]("val", tmp_path / "data", tmp_path / "out")
    content = read_json(tmp_path / "out/val/instancesonly_filtered_val.json")
    sizes = [(image["width"], image["height"]) for image in content["images"]]
    assert sizes == [(35, 25), (36, 26), (35, 25)]
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        if image["id"] == 2:  # of the black one
            break
        assert annotation["image_id"] == image["id"]
        quarter = Image.open(tmp_path / "out/val/images" / image["file_name"]).convert("L")
        left, top, right, bottom = quarter.point(lambda v: 255 * (v > 127)).getbbox()
        assert annotation["bbox"] == [left, top, right - left, bottom - top]
