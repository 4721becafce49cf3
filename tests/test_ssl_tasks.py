"""Self-supervised tasks: nothing leaks, masks and tokens are as they should be, all are learnt."""

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
SMALL = dict(backbone="resnet18", hidden_dim=32, nheads=2, enc_layers=2, dec_layers=1)
SMALL.update(dim_feedforward=32, dropout=0.0, num_queries=5, frozen_bn=False)
IMAGES = [(192, 256), (200, 130), (128, 256)]  # sizes of three in a canvas of 200 x 256
MODELS = ("detr", "deformable_detr")


def batch():
    images, padding = torch.zeros(3, 3, 200, 256), torch.ones(3, 200, 256, dtype=torch.bool)
    for i, (h, w) in enumerate(IMAGES):
        images[i, :, :h, :w], padding[i, :h, :w] = torch.randn(3, h, w), False
    return images, padding


def a_model(name, **options):
    torch.manual_seed(1)
    return detr.build_detector(name, 4, **{**SMALL, **options}).eval()


def a_task(name, model, patch=None, image_size=256, **options):
    torch.manual_seed(2)
    patch, tokens = patch or max(model.strides), name == "mim-discrete"
    options.update(image_size=image_size, patch=patch, **({"vocab_size": 8} if tokens else {}))
    task = ssl_tasks.build_task(name, dim=32, strides=model.strides, **options)
    if tokens:
        task.tokenizer.codebook.normal_()
    return task


def given(model, task, options=(), **flags):
    """(images, their padding, a model, a task for it, a corruption of the images)."""
    (images, padding), model = batch(), a_model(model, **dict(options))
    task = a_task(task, model, **flags)
    return images, padding, model, task, task.sample_corruption(padding, [1, 2, 3])


def results(task, model, images, padding, corruption):
    """(memory, loss) of a task, as evaluation makes them."""
    memory = task.encode(model, images, padding, corruption)
    return memory, task.loss(memory, images, corruption)


# ---------------------------------------------------------------- patches
@pytest.mark.parametrize("patch", [8, 16, 64])
@pytest.mark.parametrize("name", ["mim-continuous", "jigsaw-discrete"])
def test_corrupting_an_image_by_hand(name, patch):
    """Only patches that lie wholly inside their image; the jigsaw's target puts them back."""
    images, _, _, task, corruption = given("deformable_detr", name, patch=patch)
    corrupted, columns = task.corrupt_images(images, corruption), corruption.grid[1]
    for b, (height, width) in enumerate(IMAGES):
        share = round(corruption.inside[b].sum().item() / 2)
        chosen = corruption.changed()[b].sum().item()
        assert chosen == share if name == "mim-continuous" else 1 < chosen <= share
        assert not corruption.changed()[b][~corruption.inside[b]].any()
        for p in range(corruption.inside.shape[1]):
            y, x = p // columns * patch, p % columns * patch
            assert corruption.inside[b, p] == (y + patch <= height and x + patch <= width)
            here = corrupted[b, :, y : y + patch, x : x + patch]
            y, x = (k * patch for k in divmod(corruption.permutation[b, p].item(), columns))
            there = images[b, :, y : y + patch, x : x + patch]
            expected = torch.zeros_like(here) if corruption.masked[b, p] else there
            assert torch.equal(here, expected)
    if name == "jigsaw-discrete":
        target = task.target(images, corruption).flatten(1)
        inverse = dataclasses.replace(corruption, permutation=target).inverse()
        assert torch.equal(task.corrupt_images(corrupted, inverse), images)


def test_an_image_is_corrupted_by_its_seed_alone():
    task, (_, padding) = a_task("mim-continuous", a_model("detr")), batch()
    together, alone = (
        task.sample_corruption(padding, [3, 4, 5]),
        task.sample_corruption(padding[1:2], [4]),
    )
    assert torch.equal(together.masked[1], alone.masked[0])
    assert not torch.equal(together.masked[0], task.sample_corruption(padding, [8, 4, 5]).masked[0])
    several = [task.sample_corruption(padding[:1], [seed]).masked[0] for seed in range(200)]
    share = torch.stack(several).float().mean(0)  # no favourites
    assert (share[:48] > 0.35).all() and (share[:48] < 0.65).all() and (share[48:] == 0).all()


# ---------------------------------------------------------------- no leak
LEAKS = [("detr", {}, None), ("detr", {"dilation": True}, None)]
LEAKS += [("deformable_detr", {}, patch) for patch in (None, 8, 16)]
LEAKS += [("deformable_detr", {"num_feature_levels": 1}, None)]


@pytest.mark.parametrize("name, options, patch", LEAKS)
def test_no_leak_through_feature_maps(name, options, patch):
    """No gradient reaches a cell of any level under a masked patch, some every other cell."""
    images, padding, model, task, corruption = given(name, "mim-continuous", options, patch=patch)
    levels = [x.with_features(x.features.detach().requires_grad_())
              for x in model.features(images, padding)]  # fmt: skip
    memory = model.encode(task.corrupt_levels(levels, corruption))
    shown = (x.features.masked_fill(x.padding[:, None], 0) for x in memory)
    sum((x**3).sum() for x in shown).backward()
    masked = corruption.masked.unflatten(1, corruption.grid)
    pixels = F.pad(plots.patches_to_pixels(masked, task.patch, (200, 256)).float(), (0, 0, 0, 56))
    for level, stride in zip(levels, model.strides):
        H, W = level.padding.shape[-2:]
        under = F.max_pool2d(pixels[:, None], stride)[:, 0, :H, :W] > 0
        gradient = level.features.grad.abs().sum(1)
        assert (gradient[under] == 0).all()
        if stride <= task.patch:
            assert (gradient[~under & ~level.padding] > 0).all()


@pytest.mark.parametrize("name, options, patch", LEAKS)
def test_no_leak_through_the_image(name, options, patch):
    """Pixels under a mask do not matter, and those under the padding neither."""
    setting = given(name, "mim-continuous", options, on="image", patch=patch)
    images, padding, model, task, corruption = setting
    changed = corruption.changed().unflatten(1, corruption.grid)
    where = plots.patches_to_pixels(changed, task.patch, (200, 256))[:, None]
    inputs = images, images.masked_fill(where, 3.0), images.masked_fill(padding[:, None], 9.0)
    memories = [results(task, model, x, padding, corruption)[0] for x in inputs]
    for level, other, padded in zip(*memories):
        assert level.features.equal(other.features) and level.features.equal(padded.features)


def test_a_fine_jigsaw_does_not_leak_through_coarse_cells():
    """Where a patch moved, larger cells hold its old content: they are masked."""
    setting = given("deformable_detr", "jigsaw-continuous", patch=16, ratio=0.1)
    images, padding, model, task, corruption = setting
    levels = model.features(images, padding)
    moved = corruption.changed().unflatten(1, corruption.grid).float()[:, None]
    for i, stride in enumerate(model.strides[2:], 2):
        touched = F.max_pool2d(F.pad(moved, (0, 0, 0, 3)), stride // 16)[:, 0] > 0
        touched = touched[:, : levels[i].padding.shape[1]]
        features = task.corrupt_levels(levels, corruption)[i].features.movedim(1, -1)
        assert torch.equal(features[touched], task.mask_token[i].expand(touched.sum(), -1))
        assert torch.equal(features[~touched], levels[i].features.movedim(1, -1)[~touched])
        assert touched.any() and not touched.all()


# ---------------------------------------------------------------- what is predicted and counted
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ssl_tasks.TASKS)
@pytest.mark.parametrize("loss_patches", ["corrupted", "all"])
def test_the_loss_by_hand(name, kind, loss_patches):
    images, padding, model, task, corruption = given(name, kind, loss_patches=loss_patches)
    memory, loss = results(task, model, images, padding, corruption)
    prediction, errors, n = task.predict_and_target(memory, images, corruption)[0], [], task.patch
    every = loss_patches == "all" or kind == "reconstruct"
    for b, (height, width) in enumerate(IMAGES):
        for p in range(corruption.inside.shape[1]):
            row, column = divmod(p, corruption.grid[1])
            y, x = row * n, column * n
            changed = corruption.masked[b, p] or corruption.permutation[b, p] != p
            if y + n > height or x + n > width or not (every or changed):
                continue
            here = b, slice(None), slice(y, y + n), slice(x, x + n)
            if kind.endswith("discrete"):
                small = F.adaptive_avg_pool2d(images[here], 4).flatten()
                wanted = corruption.permutation[b, p]
                if kind == "mim-discrete":
                    wanted = (task.tokenizer.codebook - small).square().sum(1).argmin()
                errors.append(-prediction[b, :, row, column].log_softmax(0)[wanted])
            else:
                errors.append((prediction[here] - images[here]).abs().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    half = task.loss(memory, images, corruption, num_patches=2 * len(errors))
    torch.testing.assert_close(half * 2, loss)
    padded = images.masked_fill(padding[:, None], 5.0)  # never counts
    assert torch.equal(results(task, model, padded, padding, corruption)[1], loss)


def test_masking_nothing():
    """It costs nothing, or if all patches count it is reconstruction."""
    setting = given("deformable_detr", "mim-continuous", ratio=0.0, loss_patches="all")
    images, padding, model, masked, corruption = setting
    plain = a_task("reconstruct", model)
    plain.head.load_state_dict(masked.head.state_dict())
    task = a_task("mim-continuous", model, ratio=0.0, image_size=None)
    losses = (results(x, model, images, padding, corruption)[1] for x in (masked, plain, task))
    masked_loss, plain_loss, loss = losses
    assert torch.equal(masked_loss, plain_loss)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in task.parameters())


# ---------------------------------------------------------------- visual tokens
def test_kmeans_tokens():
    """Patches of a few colours get as many codes, each patch its own; too few are refused."""
    colours = torch.randn(5, 3) * 2
    images = colours[torch.randint(5, (6, 4, 4))].permute(0, 3, 1, 2)
    images = images.repeat_interleave(32, 2).repeat_interleave(32, 3)
    images, taken = images + torch.randn(images.shape) * 0.05, torch.ones(6, 4, 4) > 0
    tokenizer = tokenizers.KMeans(32, 5)
    tokenizer.fit([(images[:4], taken[:4]), (images[4:], taken[4:])], seed=0)
    means = tokenizer.codebook.view(5, 3, 16).mean(2)
    assert (torch.cdist(colours, means).min(1).values < 0.05).all()
    painted = tokenizer.decode(tokenizer(images), (128, 128))
    assert (painted - images).abs().mean() < 0.1
    with pytest.raises(ValueError, match="at least 97 patches.* only 96 were sampled; lower --vocab_size"):
        tokenizers.KMeans(32, 97).fit([(images, taken)], seed=0)


@pytest.fixture(scope="module")
def dalle_file(tmp_path_factory):
    """Weights of the published layout, small and random."""
    shapes = {"input": (4, 3, 7), "output.conv": (16, 32, 1)}
    for group, block in np.ndindex(4, 2):
        n, name = 4 * 2**group, f"group_{group + 1}.block_{block + 1}"
        n_in, m = n // 2 if group and not block else n, n // 4
        if n_in != n:
            shapes[f"{name}.id_path"] = n, n_in, 1
        convs = (m, n_in, 3), (m, m, 3), (m, m, 3), (n, m, 1)
        shapes.update({f"{name}.res_path.conv_{i}": x for i, x in enumerate(convs, 1)})
    torch.manual_seed(0)
    state = {f"blocks.{name}.b": torch.randn(n) * 0.1 for name, (n, _, _) in shapes.items()}
    for name, (n, n_in, size) in shapes.items():
        weight = torch.randn(n, n_in, size, size) / (n_in * size * size) ** 0.5
        state[f"blocks.{name}.w"] = weight
    path = tmp_path_factory.mktemp("dalle") / "encoder.pkl"
    torch.save(state, path)
    return path


def test_dalle_tokens(dalle_file):
    """One token a patch, of the crop that the model sees, in the range of colours DALL-E knows."""
    images = batch()[0]
    images += F.interpolate(torch.randn(3, 3, 7, 8) * 3, scale_factor=32)[..., :200, :]
    tokenizer = tokenizers.Dalle(32, dalle_file)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    pixels = F.pad((images * std + mean).clamp(0, 1), (0, 0, 0, 24))
    logits = tokenizers.dalle_logits(tokenizer.state, 0.8 * F.avg_pool2d(pixels, 4) + 0.1)
    tokens = tokenizer(images)
    assert torch.equal(tokens, logits.argmax(1)) and len(tokens.unique()) > 1


def test_dalle_equals_the_published_package(tmp_path):
    published = pytest.importorskip("dall_e.encoder", reason="the package DALL-E is not installed")
    torch.manual_seed(0)
    encoder, pixels = published.Encoder(n_hid=64, vocab_size=512), torch.rand(2, 3, 32, 48)
    torch.save(encoder, tmp_path / "encoder.pkl")
    state = tokenizers.load_dalle(tmp_path / "encoder.pkl")
    torch.testing.assert_close(tokenizers.dalle_logits(state, pixels), encoder(pixels))


def test_dalle_files_execute_nothing(tmp_path, dalle_file, capsys):
    evil = type("Evil", (), {"__reduce__": lambda self: (print, ("executed",))})
    torch.save(evil(), tmp_path / "evil.pkl")
    torch.save({"blocks.input.w": torch.zeros(3)}, tmp_path / "other.pkl")
    (tmp_path / "cut.pkl").write_bytes(dalle_file.read_bytes()[:2000])
    for name in ("evil", "other", "cut", "none"):
        message = "file not found" if name == "none" else "not OpenAI's encoder"
        with pytest.raises(ValueError, match=rf"{name}.pkl: {message}"):
            tokenizers.load_dalle(tmp_path / f"{name}.pkl")
    assert "executed" not in capsys.readouterr().out


# ---------------------------------------------------------------- the real commands
def trained(out, flags):
    """The last line of the log of a run, of one epoch by default."""
    train.main(f"{SIZES} --setting pretrain --epochs 1 {flags} --out {out}".split())
    return json.loads((out / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def evaluated(run):
    eval_main([str(run)])
    return read_json(run / "metrics.json")


@pytest.fixture(scope="module")
def blues(tmp_path_factory):
    """Images that are learnt in seconds: red and green tell the place, blue is all or nothing."""
    folder = tmp_path_factory.mktemp("blues") / "data"
    isaid.main(["scenes", str(folder), *"--train 112 --val 24 --image_size 64".split()])
    ramp, rng = np.tile(np.linspace(100, 160, 64), (64, 1)), np.random.default_rng(0)
    for path in sorted(folder.rglob("*.png")):
        blue = np.full((64, 64), rng.choice([0, 255]))
        Image.fromarray(np.stack([ramp, ramp.T, blue], 2).astype(np.uint8)).save(path)
    return folder


class Rotation(ssl_tasks.ClassTask):
    """Turn a share of the patches; predict by how many quarters."""

    rotates = True

    def __init__(self, **config):
        super().__init__(num_outputs=4, **config)

    def turn(self, rng, patches, grid):
        places = ssl_tasks.choose(rng, patches, self.ratio)
        return places, rng.integers(1, 4, len(places))

    def target(self, images, corruption):  # (B, h, w)
        return corruption.quarter_turns.unflatten(1, corruption.grid)


def test_a_task_that_turns_patches(monkeypatch, tmp_path):
    """Each patch is turned as numpy turns it, in images and in maps; it is trained as any task."""
    monkeypatch.setitem(ssl_tasks.TASKS, "rotation", Rotation)
    for on in ("image", "features"):
        images, padding, model, task, corruption = given("deformable_detr", "rotation", on=on)
        stack = [(images, task.corrupt_images(images, corruption), task.patch)]
        if on == "features":
            levels = model.features(images, padding)
            pairs = zip(levels, task.corrupt_levels(levels, corruption), task.strides)
            stack = [(a.features, b.features, task.patch // s) for a, b, s in pairs]
        assert 0 < (corruption.quarter_turns > 0).sum() < corruption.inside.sum()
        assert torch.equal(task.counted_patches(corruption), corruption.quarter_turns > 0)
        for before, after, p in stack:
            for b, i in np.ndindex(*corruption.quarter_turns.shape):
                y, x = (n * p for n in divmod(i, corruption.grid[1]))
                here = (b, slice(None), slice(y, y + p), slice(x, x + p))
                if corruption.inside[b, i]:
                    turned = np.rot90(before[here].detach(), corruption.quarter_turns[b, i], (1, 2))
                    np.testing.assert_array_equal(after[here].detach(), turned)
                else:
                    assert torch.equal(before[here], after[here])
    line = trained(tmp_path / "run", f"{TINY} --setting multitask --ssl_task rotation --epochs 1")
    assert line["ssl_chance"] == 0.25 and 0 <= line["ssl_acc"] <= 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("setting", ["pretrain", "multitask"])
@pytest.mark.parametrize("task", ssl_tasks.TASKS)
def test_every_task_is_learnt(model, setting, task, blues, tmp_path):
    """Held out, it beats the mean patch by more than knowing the place would (0.8), or 0.6 right.
    All twenty take a step; to save time ten learn: each task with both models, in both settings."""
    learns = (list(ssl_tasks.TASKS).index(task) + MODELS.index(model) + len(setting)) % 2 == 0
    flags = f"--model {model} --setting {setting} --ssl_task {task} --data {blues}"
    flags += " --image_size 64 --ssl_patch 32 --batch_size 4 --augment none --ssl_weight 30"
    flags += " --lr 1e-2 --lr_backbone 1e-3 --clip_max_norm 1 --vocabulary 4 --num_queries 8"
    flags += " --ssl_ratio 1" * ("jigsaw" in task) + " --limit_train 4 --limit_val 6" * (not learns)
    flags += " --ssl_on image" * (setting == "multitask")
    flags += " --epochs 4 --eval_every 4" * (learns and model == "detr")  # which takes longer
    run = tmp_path / "run"
    line = trained(run, flags)
    assert ("ap" in line) == ("train_loss_giou" in line) == (setting == "multitask")
    weights = torch.load(run / "best.pt", weights_only=True)["model"]
    assert Image.open(run / "ssl.png").size[0] == 4 * 260
    parts = {"backbone", "encoder", *(["decoder"] if setting == "multitask" else [])}
    assert {part_of(name) for name in weights} == parts
    if learns:
        if task.endswith("discrete"):
            assert line["ssl_acc"] > max(0.75, 1.2 * line["ssl_baseline"])
        else:
            assert line["ssl_loss"] < 0.6 * line["ssl_baseline"]
        metrics = evaluated(run)
        assert metrics["ssl_loss"] == pytest.approx(line["ssl_loss"], rel=1e-5)
        assert metrics.get("ap") == line.get("ap")


def test_the_same_seed_gives_the_same_corruption(tmp_path):
    one, same, other = (
        trained(tmp_path / f"{n}{seed}", f"{TINY} --workers {n} --seed {seed}")
        for n, seed in ((0, 0), (2, 0), (0, 1))
    )
    assert one["train_loss_ssl"] == same["train_loss_ssl"] != other["train_loss_ssl"]
    assert one["ssl_loss"] == same["ssl_loss"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    trained(out, f"{TINY} --ssl_task jigsaw-discrete")
    return out


TAKEN = {"": ("backbone", "encoder"), "--init_parts backbone": ("backbone",)}
TAKEN["--init_parts encoder --dec_layers 3 --num_queries 5"] = ("encoder",)


@pytest.mark.parametrize("flags, taken", TAKEN.items())
def test_pretrain_then_detect(pretrained, flags, taken, tmp_path):
    """What was pretrained is transferred, and the command says so."""
    args, _ = train.parse(f"{SIZES} --num_queries 8 --init {pretrained} {flags}".split())
    model, note = train.build_model(train.detector_config(args, 15), args)
    assert note == f"{' and '.join(taken)} from {pretrained}"
    after = model.state_dict()
    for name, tensor in torch.load(pretrained / "best.pt", weights_only=True)["model"].items():
        if tensor.dim() > 1:  # norms start at the same values anyway
            assert torch.equal(tensor, after[name]) == (part_of(name) in taken), name


def test_official_augmentation_and_dalle(blues, tmp_path, dalle_file, capsys):
    """A folder of images; several sizes, padded; DALL-E's file, which evaluation finds again."""
    flags = f"--data {blues}/train/images --ssl_task mim-discrete --tokenizer_weights {dalle_file}"
    line = trained(tmp_path / "run", f"{flags} --batch_size 2 --limit_train 2 --limit_val 1")
    printed = capsys.readouterr().out
    assert "images (train): 2 images" in printed and "images (val): 1 images" in printed
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)["task_state"]
    assert not any("blocks" in name for name in state)  # its weights stay in their file
    assert evaluated(tmp_path / "run")["ssl_loss"] == pytest.approx(line["ssl_loss"], rel=1e-5)


def test_what_cannot_be_is_refused(blues, pretrained, tmp_path):
    with pytest.raises(SystemExit, match="images of equal size; set --image_size"):
        trained(tmp_path / "run", f"--data {blues} --ssl_task jigsaw-discrete")
    with pytest.raises(SystemExit, match="it detects nothing"):
        eval_main([str(pretrained), "--export", str(tmp_path / "x.json")])
