"""Self-supervised tasks: nothing leaks, corruption and targets are right, every task is learned."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import detr
import isaid
import ssl_tasks
import train
from eval import main as eval_main
from util import plots, tokenizers
from util.files import read_json
from util.images import MEAN, STD
from util.weights import part_of

SIZES = "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 2 --dim_feedforward 32"
TINY = "--image_size 128 --num_queries 8 --limit_train 12 --limit_val 5 --batch_size 4"
SMALL = {
    "backbone": "resnet18",
    "hidden_dim": 32,
    "nheads": 2,
    "enc_layers": 2,
    "dec_layers": 1,
    "dim_feedforward": 32,
    "dropout": 0.0,
    "num_queries": 5,
    "frozen_bn": False,
}
CANVAS = (200, 256)
SIZES_IN_CANVAS = [(192, 256), (200, 130), (128, 256)]  # (height, width) of three images
MODELS = ("detr", "deformable_detr")


def make_batch():
    """Return three images of different sizes and their padding."""
    images = torch.zeros(3, 3, *CANVAS)
    padding = torch.ones(3, *CANVAS, dtype=torch.bool)
    for i, (height, width) in enumerate(SIZES_IN_CANVAS):
        images[i, :, :height, :width] = torch.randn(3, height, width)
        padding[i, :height, :width] = False
    return images, padding


def make_model(name, **options):
    torch.manual_seed(1)
    return detr.build_detector(name, 4, **{**SMALL, **options}).eval()


def make_task(name, model, patch=None, image_size=256, **config):
    """Return a task for the model, by default with patches as large as a coarsest cell."""
    torch.manual_seed(2)
    if patch is None:
        patch = max(model.strides)
    config.update(dim=32, strides=model.strides, patch=patch, image_size=image_size)
    if name == "mim-discrete":
        config["vocab_size"] = 8
    task = ssl_tasks.build_task(name, **config)
    if name == "mim-discrete":
        task.tokenizer.codebook.normal_()
    return task


def make_setting(model_name, task_name, model_options=None, **config):
    """Return (images, padding, a model, a task for it, a corruption of the images)."""
    images, padding = make_batch()
    if model_options is None:
        model_options = {}
    model = make_model(model_name, **model_options)
    task = make_task(task_name, model, **config)
    corruption = task.sample_corruption(padding, [1, 2, 3])
    return images, padding, model, task, corruption


def loss_of(task, model, images, padding, corruption):
    memory = task.encode(model, images, padding, corruption)
    return task.loss(memory, images, corruption)


def patch_at(image, place, patch, columns):
    """Return patch number `place` of an image (C, H, W), smaller at the lower and right border."""
    row, column = divmod(int(place), columns)
    y = row * patch
    x = column * patch
    return image[:, y : y + patch, x : x + patch]


def is_inside(place, patch, columns, size):
    """Return True if patch number `place` lies wholly inside an image of this size."""
    row, column = divmod(place, columns)
    height, width = size
    return (row + 1) * patch <= height and (column + 1) * patch <= width


# ---------------------------------------------------------------- patches
@pytest.mark.parametrize("patch", [8, 16, 64])
@pytest.mark.parametrize("name", ["mim-continuous", "jigsaw-discrete"])
def test_corrupting_an_image_by_hand(name, patch):
    """Only patches that lie wholly inside their image; the jigsaw's target puts them back."""
    images, _, _, task, corruption = make_setting("deformable_detr", name, patch=patch)
    corrupted = task.corrupt_images(images, corruption)
    columns = corruption.grid[1]
    for b, size in enumerate(SIZES_IN_CANVAS):
        inside = corruption.inside[b]
        changed = corruption.changed()[b]
        share = round(inside.sum().item() / 2)
        if name == "mim-continuous":
            assert changed.sum() == share
        else:  # a few patches are permuted to their own places
            assert 1 < changed.sum() <= share
        assert not changed[~inside].any()
        for place in range(len(inside)):
            assert inside[place] == is_inside(place, patch, columns, size)
            if corruption.masked[b, place]:
                expected = torch.zeros_like(patch_at(images[b], place, patch, columns))
            else:
                source = corruption.permutation[b, place]
                expected = patch_at(images[b], source, patch, columns)
            assert torch.equal(patch_at(corrupted[b], place, patch, columns), expected)
    if name == "jigsaw-discrete":
        target = task.target(images, corruption).flatten(1)
        inverse = dataclasses.replace(corruption, permutation=target).inverse()
        assert torch.equal(task.corrupt_images(corrupted, inverse), images)


def test_an_image_is_corrupted_by_its_seed_alone():
    task = make_task("mim-continuous", make_model("detr"))
    _, padding = make_batch()
    together = task.sample_corruption(padding, [3, 4, 5])
    alone = task.sample_corruption(padding[1:2], [4])
    assert torch.equal(together.masked[1], alone.masked[0])
    other = task.sample_corruption(padding, [8, 4, 5])
    assert not torch.equal(together.masked[0], other.masked[0])
    masked = []
    for seed in range(200):
        masked.append(task.sample_corruption(padding[:1], [seed]).masked[0])
    frequency = torch.stack(masked).float().mean(0)  # (P,): no patch is preferred
    assert (frequency[:48] > 0.35).all()
    assert (frequency[:48] < 0.65).all()
    assert (frequency[48:] == 0).all()  # below the image


# ---------------------------------------------------------------- no leak
LEAKS = [
    ("detr", {}, None),
    ("detr", {"dilation": True}, None),
    ("deformable_detr", {}, None),
    ("deformable_detr", {}, 8),
    ("deformable_detr", {}, 16),
    ("deformable_detr", {"num_feature_levels": 1}, None),
]


@pytest.mark.parametrize("name, options, patch", LEAKS)
def test_no_leak_through_feature_maps(name, options, patch):
    """No gradient reaches a cell of any level under a masked patch; every other cell gets one."""
    setting = make_setting(name, "mim-continuous", options, patch=patch)
    images, padding, model, task, corruption = setting
    levels = []
    for level in model.features(images, padding):
        levels.append(level.with_features(level.features.detach().requires_grad_()))
    total = 0
    for level in model.encode(task.corrupt_levels(levels, corruption)):
        visible = level.features.masked_fill(level.padding[:, None], 0)
        total = total + (visible**3).sum()
    total.backward()

    masked = corruption.masked.unflatten(1, corruption.grid)
    masked_pixels = plots.patches_to_pixels(masked, task.patch, CANVAS).float()
    masked_pixels = F.pad(masked_pixels, (0, 0, 0, 56))  # to whole cells of every level
    for level, stride in zip(levels, model.strides):
        H, W = level.padding.shape[-2:]
        under_mask = F.max_pool2d(masked_pixels[:, None], stride)[:, 0, :H, :W] > 0
        gradient = level.features.grad.abs().sum(1)
        assert (gradient[under_mask] == 0).all()
        if stride <= task.patch:
            assert (gradient[~under_mask & ~level.padding] > 0).all()


@pytest.mark.parametrize("name, options, patch", LEAKS)
def test_no_leak_through_the_image(name, options, patch):
    """Pixels under a mask do not matter, and neither do those under the padding."""
    setting = make_setting(name, "mim-continuous", options, on="image", patch=patch)
    images, padding, model, task, corruption = setting
    changed = corruption.changed().unflatten(1, corruption.grid)
    changed_pixels = plots.patches_to_pixels(changed, task.patch, CANVAS)[:, None]
    other_content = images.masked_fill(changed_pixels, 3.0)
    other_padding = images.masked_fill(padding[:, None], 9.0)
    memory = task.encode(model, images, padding, corruption)
    for other_images in (other_content, other_padding):
        other_memory = task.encode(model, other_images, padding, corruption)
        for level, other_level in zip(memory, other_memory):
            assert torch.equal(level.features, other_level.features)


def test_a_fine_jigsaw_does_not_leak_through_coarse_cells():
    """Where a patch moved, larger cells contain its old content: they are masked."""
    setting = make_setting("deformable_detr", "jigsaw-continuous", patch=16, ratio=0.1)
    images, padding, model, task, corruption = setting
    levels = model.features(images, padding)
    corrupted = task.corrupt_levels(levels, corruption)
    moved = corruption.changed().unflatten(1, corruption.grid).float()
    moved = F.pad(moved[:, None], (0, 0, 0, 3))  # to whole cells of every level
    for i in range(2, len(levels)):
        stride = model.strides[i]
        touched = F.max_pool2d(moved, stride // 16)[:, 0] > 0
        touched = touched[:, : levels[i].padding.shape[1]]
        before = levels[i].features.movedim(1, -1)
        after = corrupted[i].features.movedim(1, -1)
        assert torch.equal(after[touched], task.mask_token[i].expand(touched.sum(), -1))
        assert torch.equal(after[~touched], before[~touched])
        assert touched.any()
        assert not touched.all()


# ---------------------------------------------------------------- what is predicted and counted
def patch_loss_by_hand(task_name, task, image, prediction, corruption, b, place):
    """Return the loss of one patch: L1 of its pixels, or the cross-entropy of its class."""
    columns = corruption.grid[1]
    pixels = patch_at(image, place, task.patch, columns)
    if not task_name.endswith("discrete"):
        return (patch_at(prediction, place, task.patch, columns) - pixels).abs().mean()
    if task_name == "mim-discrete":
        thumbnail = F.adaptive_avg_pool2d(pixels, 4).flatten()
        target = (task.tokenizer.codebook - thumbnail).square().sum(1).argmin()
    else:
        target = corruption.permutation[b, place]
    return -prediction.flatten(1)[:, place].log_softmax(0)[target]


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("task_name", ssl_tasks.TASKS)
@pytest.mark.parametrize("loss_patches", ["corrupted", "all"])
def test_the_loss_by_hand(model_name, task_name, loss_patches):
    setting = make_setting(model_name, task_name, loss_patches=loss_patches)
    images, padding, model, task, corruption = setting
    memory = task.encode(model, images, padding, corruption)
    loss = task.loss(memory, images, corruption)
    prediction, _ = task.predict_and_target(memory, images, corruption)
    counts_all = loss_patches == "all" or task_name == "reconstruct"
    losses = []
    for b, size in enumerate(SIZES_IN_CANVAS):
        for place in range(corruption.inside.shape[1]):
            changed = corruption.masked[b, place] or corruption.permutation[b, place] != place
            if is_inside(place, task.patch, corruption.grid[1], size) and (counts_all or changed):
                losses.append(
                    patch_loss_by_hand(
                        task_name, task, images[b], prediction[b], corruption, b, place
                    )
                )
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    half = task.loss(memory, images, corruption, num_patches=2 * len(losses))
    torch.testing.assert_close(half * 2, loss)
    other_padding = images.masked_fill(padding[:, None], 5.0)  # never counts
    assert torch.equal(loss_of(task, model, other_padding, padding, corruption), loss)


def test_masking_nothing():
    """It costs nothing, or, if all patches count, it is reconstruction."""
    setting = make_setting("deformable_detr", "mim-continuous", ratio=0.0, loss_patches="all")
    images, padding, model, masked_task, corruption = setting
    reconstruct = make_task("reconstruct", model)
    reconstruct.head.load_state_dict(masked_task.head.state_dict())
    masked_loss = loss_of(masked_task, model, images, padding, corruption)
    assert torch.equal(masked_loss, loss_of(reconstruct, model, images, padding, corruption))

    task = make_task("mim-continuous", model, ratio=0.0, image_size=None)
    loss = loss_of(task, model, images, padding, corruption)
    loss.backward()
    assert loss == 0
    for parameter in task.parameters():
        assert (parameter.grad == 0).all()


# ---------------------------------------------------------------- visual tokens
def test_kmeans_tokens():
    """Patches of a few colors get as many tokens, each patch that of its color; too few: error."""
    colors = torch.randn(5, 3) * 2
    images = colors[torch.randint(5, (6, 4, 4))].permute(0, 3, 1, 2)
    images = images.repeat_interleave(32, 2).repeat_interleave(32, 3)
    images = images + torch.randn(images.shape) * 0.05
    used = torch.ones(6, 4, 4, dtype=torch.bool)
    tokenizer = tokenizers.KMeans(32, 5)
    tokenizer.fit([(images[:4], used[:4]), (images[4:], used[4:])], seed=0)
    mean_colors = tokenizer.codebook.view(5, 3, 16).mean(2)
    assert (torch.cdist(colors, mean_colors).min(1).values < 0.05).all()
    decoded = tokenizer.decode(tokenizer(images), (128, 128))
    assert (decoded - images).abs().mean() < 0.1
    with pytest.raises(ValueError, match="at least 97 patches.* only 96 .* lower --vocab_size"):
        tokenizers.KMeans(32, 97).fit([(images, used)], seed=0)


def dalle_shapes():
    """Return {name: (out channels, in channels, side)} of small convolutions in DALL-E's layout."""
    shapes = {"input": (4, 3, 7), "output.conv": (16, 32, 1)}
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"group_{group}.block_{block}"
            channels = 2 ** (group + 1)
            in_channels = channels
            if group > 1 and block == 1:
                in_channels = channels // 2
                shapes[f"{name}.id_path"] = (channels, in_channels, 1)
            hidden = channels // 4
            shapes[f"{name}.res_path.conv_1"] = (hidden, in_channels, 3)
            shapes[f"{name}.res_path.conv_2"] = (hidden, hidden, 3)
            shapes[f"{name}.res_path.conv_3"] = (hidden, hidden, 3)
            shapes[f"{name}.res_path.conv_4"] = (channels, hidden, 1)
    return shapes


@pytest.fixture(scope="module")
def dalle_file(tmp_path_factory):
    """Weights of the published layout, small and random."""
    torch.manual_seed(0)
    state = {}
    for name, (out_channels, in_channels, side) in dalle_shapes().items():
        weight = torch.randn(out_channels, in_channels, side, side)
        state[f"blocks.{name}.w"] = weight / (in_channels * side * side) ** 0.5
        state[f"blocks.{name}.b"] = torch.randn(out_channels) * 0.1
    path = tmp_path_factory.mktemp("dalle") / "encoder.pkl"
    torch.save(state, path)
    return path


def test_dalle_tokens(dalle_file):
    """One token per patch, of the crop that the model sees, in the range of colors DALL-E knows."""
    images, _ = make_batch()
    images += F.interpolate(torch.randn(3, 3, 7, 8) * 3, scale_factor=32)[..., :200, :]
    tokenizer = tokenizers.Dalle(32, dalle_file)
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    pixels = F.pad((images * std + mean).clamp(0, 1), (0, 0, 0, 24))
    logits = tokenizers.dalle_logits(tokenizer.state, 0.8 * F.avg_pool2d(pixels, 4) + 0.1)
    tokens = tokenizer(images)
    assert torch.equal(tokens, logits.argmax(1))
    assert len(tokens.unique()) > 1


def test_dalle_equals_the_published_package(tmp_path):
    published = pytest.importorskip("dall_e.encoder", reason="the package DALL-E is not installed")
    torch.manual_seed(0)
    encoder = published.Encoder(n_hid=64, vocab_size=512)
    pixels = torch.rand(2, 3, 32, 48)
    torch.save(encoder, tmp_path / "encoder.pkl")
    state = tokenizers.load_dalle(tmp_path / "encoder.pkl")
    torch.testing.assert_close(tokenizers.dalle_logits(state, pixels), encoder(pixels))


class Evil:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return print, ("executed",)


def test_dalle_files_execute_nothing(tmp_path, dalle_file, capsys):
    torch.save(Evil(), tmp_path / "evil.pkl")
    torch.save({"blocks.input.w": torch.zeros(3)}, tmp_path / "other.pkl")
    (tmp_path / "cut.pkl").write_bytes(dalle_file.read_bytes()[:2000])
    for name in ("evil", "other", "cut"):
        with pytest.raises(ValueError, match=rf"{name}.pkl: not OpenAI's encoder"):
            tokenizers.load_dalle(tmp_path / f"{name}.pkl")
    with pytest.raises(ValueError, match="none.pkl: file not found"):
        tokenizers.load_dalle(tmp_path / "none.pkl")
    assert "executed" not in capsys.readouterr().out


# ---------------------------------------------------------------- the real commands
def train_run(out, flags):
    """Train, one epoch by default; return the last line of the log."""
    train.main(f"{SIZES} --setting pretrain --epochs 1 {flags} --out {out}".split())
    return json.loads((out / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def evaluate_run(run):
    eval_main([str(run)])
    return read_json(run / "metrics.json")


@pytest.fixture(scope="module")
def blues(tmp_path_factory):
    """Images that are learned in seconds: red and green show the place, blue is all or nothing."""
    folder = tmp_path_factory.mktemp("blues") / "data"
    isaid.main(["scenes", str(folder), *"--train 112 --val 24 --image_size 64".split()])
    ramp = np.tile(np.linspace(100, 160, 64), (64, 1))
    rng = np.random.default_rng(0)
    for path in sorted(folder.rglob("*.png")):
        blue = np.full((64, 64), rng.choice([0, 255]))
        pixels = np.stack([ramp, ramp.T, blue], 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


class Rotation(ssl_tasks.ClassTask):
    """Turn a share of the patches; predict by how many quarters."""

    rotates = True

    def __init__(self, **config):
        super().__init__(num_outputs=4, **config)

    def turn(self, rng, patches, grid):
        places = ssl_tasks.choose_patches(rng, patches, self.ratio)
        return places, rng.integers(1, 4, len(places))

    def target(self, images, corruption):
        return corruption.quarter_turns.unflatten(1, corruption.grid)  # (B, h, w)


def assert_turned(before, after, patch, corruption):
    """Check each patch of maps or images (B, C, H, W) against numpy.rot90."""
    columns = corruption.grid[1]
    B, P = corruption.quarter_turns.shape
    for b in range(B):
        for place in range(P):
            expected = patch_at(before[b], place, patch, columns)
            if corruption.inside[b, place]:
                expected = np.rot90(expected, corruption.quarter_turns[b, place], (1, 2))
            np.testing.assert_array_equal(patch_at(after[b], place, patch, columns), expected)


@torch.no_grad()
@pytest.mark.parametrize("on", ["image", "features"])
def test_patches_are_turned_as_numpy_turns_them(on, monkeypatch):
    monkeypatch.setitem(ssl_tasks.TASKS, "rotation", Rotation)
    images, padding, model, task, corruption = make_setting("deformable_detr", "rotation", on=on)
    turned = corruption.quarter_turns > 0
    assert 0 < turned.sum() < corruption.inside.sum()
    assert torch.equal(task.counted_patches(corruption), turned)
    assert_turned(images, task.corrupt_images(images, corruption), task.patch, corruption)
    if on == "features":
        levels = model.features(images, padding)
        corrupted = task.corrupt_levels(levels, corruption)
        for before, after, stride in zip(levels, corrupted, task.strides):
            assert_turned(before.features, after.features, task.patch // stride, corruption)


def test_a_task_that_turns_patches_is_trained_as_any_other(monkeypatch, tmp_path):
    monkeypatch.setitem(ssl_tasks.TASKS, "rotation", Rotation)
    line = train_run(tmp_path / "run", f"{TINY} --setting multitask --ssl_task rotation")
    assert line["ssl_chance"] == 0.25
    assert 0 <= line["ssl_acc"] <= 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("setting", ["pretrain", "multitask"])
@pytest.mark.parametrize("task", ssl_tasks.TASKS)
def test_every_task_is_learned(model, setting, task, blues, tmp_path):
    """On held-out images the loss is under 0.6 of the mean patch's (0.8 by knowing the place).

    All twenty combinations take a step; to save time ten of them learn: each task with both
    models and in both settings.
    """
    learns = (list(ssl_tasks.TASKS).index(task) + MODELS.index(model) + len(setting)) % 2 == 0
    flags = f"--model {model} --setting {setting} --ssl_task {task} --data {blues}"
    flags += " --image_size 64 --ssl_patch 32 --batch_size 4 --augment none --ssl_weight 30"
    flags += " --lr 1e-2 --lr_backbone 1e-3 --clip_max_norm 1 --vocab_size 4 --num_queries 8"
    if "jigsaw" in task:
        flags += " --ssl_ratio 1"
    if setting == "multitask":
        flags += " --ssl_on image"
    if not learns:
        flags += " --limit_train 4 --limit_val 6"
    elif model == "detr":  # which takes longer
        flags += " --epochs 4 --eval_every 4"
    run = tmp_path / "run"
    line = train_run(run, flags)

    detects = setting == "multitask"
    assert ("ap" in line) == detects
    assert ("train_loss_giou" in line) == detects
    assert Image.open(run / "ssl.png").size[0] == 4 * 260
    parts = {"backbone", "encoder"}
    if detects:
        parts.add("decoder")
    weights = torch.load(run / "best.pt", weights_only=True)["model"]
    assert {part_of(name) for name in weights} == parts
    if learns:
        if task.endswith("discrete"):
            assert line["ssl_acc"] > max(0.75, 1.2 * line["ssl_baseline"])
        else:
            assert line["ssl_loss"] < 0.6 * line["ssl_baseline"]
        metrics = evaluate_run(run)
        assert metrics["ssl_loss"] == pytest.approx(line["ssl_loss"], rel=1e-5)
        assert metrics.get("ap") == line.get("ap")


def test_the_same_seed_gives_the_same_corruption(tmp_path):
    first = train_run(tmp_path / "first", f"{TINY} --workers 0 --seed 0")
    same = train_run(tmp_path / "same", f"{TINY} --workers 2 --seed 0")
    other = train_run(tmp_path / "other", f"{TINY} --workers 0 --seed 1")
    assert first["train_loss_ssl"] == same["train_loss_ssl"]
    assert first["ssl_loss"] == same["ssl_loss"]
    assert first["train_loss_ssl"] != other["train_loss_ssl"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    train_run(out, f"{TINY} --ssl_task jigsaw-discrete")
    return out


@pytest.mark.parametrize("flags, parts", [
    ("", ("backbone", "encoder")),
    ("--init_parts backbone", ("backbone",)),
    ("--init_parts encoder --dec_layers 3 --num_queries 5", ("encoder",)),
])  # fmt: skip
def test_pretrain_then_detect(pretrained, flags, parts, tmp_path):
    """The pretrained parts are transferred, and the command names them."""
    args, _ = train.parse(f"{SIZES} --num_queries 8 --init {pretrained} {flags}".split())
    model, note = train.build_model(train.detector_config(args, 15), args)
    assert note == f"{' and '.join(parts)} from {pretrained}"
    weights = model.state_dict()
    pretrained_weights = torch.load(pretrained / "best.pt", weights_only=True)["model"]
    for name, tensor in pretrained_weights.items():
        if tensor.dim() > 1:  # norms have the same initial values anyway
            assert torch.equal(tensor, weights[name]) == (part_of(name) in parts), name


def test_official_augmentation_and_dalle(blues, tmp_path, dalle_file, capsys):
    """A folder of images; several sizes, padded; DALL-E's file, which evaluation finds again."""
    flags = f"--data {blues}/train/images --ssl_task mim-discrete --tokenizer_weights {dalle_file}"
    line = train_run(tmp_path / "run", f"{flags} --batch_size 2 --limit_train 2 --limit_val 1")
    printed = capsys.readouterr().out
    assert "images (train): 2 images" in printed
    assert "images (val): 1 images" in printed
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)["task_state"]
    assert not any("blocks" in name for name in state)  # its weights stay in their file
    metrics = evaluate_run(tmp_path / "run")
    assert metrics["ssl_loss"] == pytest.approx(line["ssl_loss"], rel=1e-5)


def test_impossible_combinations_are_refused(blues, pretrained, tmp_path):
    with pytest.raises(SystemExit, match="images of equal size; set --image_size"):
        train_run(tmp_path / "run", f"--data {blues} --ssl_task jigsaw-discrete")
    with pytest.raises(SystemExit, match="fine-tune it with train.py --init"):
        eval_main([str(pretrained), "--export", str(tmp_path / "x.json")])
