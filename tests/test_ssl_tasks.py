"""Self-supervised tasks: nothing leaks, masks mean what they say, tokens are what they should be, and the tasks are learnt."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import detr
import eval as evaluation
import isaid
import run_state
import ssl_tasks
import train
import visual_tokens

TINY = ["--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "32",
        "--num_queries", "8", "--image_size", "128", "--limit_train", "12", "--limit_val", "5", "--batch_size", "4"]
SMALL = dict(backbone="resnet18", hidden_dim=32, nheads=2, enc_layers=2, dec_layers=1, dim_feedforward=32, dropout=0.0,
             num_queries=5, frozen_bn=False)
SIZES = [(192, 256), (200, 130), (128, 256)]  # of three images in a canvas of 200 x 256


def batch():
    images, padding = torch.zeros(3, 3, 200, 256), torch.ones(3, 200, 256, dtype=torch.bool)
    for i, (h, w) in enumerate(SIZES):
        images[i, :, :h, :w], padding[i, :h, :w] = torch.randn(3, h, w), False
    return images, padding


def a_model(name, **options):
    torch.manual_seed(1)
    return detr.build_detector(name, 4, **{**SMALL, **options}).eval()


def a_task(name, model, **options):
    torch.manual_seed(2)
    task = ssl_tasks.build_task(name, 32, model.strides, image_size=256, vocabulary=8, **options)
    if task.tokens:
        task.tokenizer.codes.normal_()
    return task


# ---------------------------------------------------------------- patches

@pytest.mark.parametrize("patch", [8, 32, 64])
def test_whole_patches(patch):
    _, padding = batch()
    whole = ssl_tasks.whole_patches(padding, patch)
    assert whole.shape == (3, -(-200 // patch), 256 // patch)
    for i, (h, w) in enumerate(SIZES):
        expected = torch.zeros_like(whole[i])
        expected[:h // patch, :w // patch] = True
        assert torch.equal(whole[i], expected)


@pytest.mark.parametrize("patch", [16, 64])
@pytest.mark.parametrize("name", ["mim-continuous", "jigsaw-continuous"])
def test_corrupting_an_image_by_hand(name, patch):
    images, padding = batch()
    task = a_task(name, a_model("deformable_detr"), patch=patch)
    corruption = task.corruption(padding, [5, 6, 7])
    corrupted = task.corrupt_images(images, corruption)
    columns = corruption.grid[1]
    for b in range(3):
        number = corruption.whole[b].sum().item()
        chosen = corruption.changed()[b].sum().item()
        assert chosen == round(number / 2) if name == "mim-continuous" else 1 < chosen <= round(number / 2)
        assert not corruption.changed()[b][~corruption.whole[b]].any()
        for p in range(corruption.whole.shape[1]):
            y, x = p // columns * patch, p % columns * patch
            here = corrupted[b, :, y:y + patch, x:x + patch]
            y, x = (k * patch for k in divmod(corruption.source[b, p].item(), columns))
            there = images[b, :, y:y + patch, x:x + patch]
            assert torch.equal(here, torch.zeros_like(here) if corruption.masked[b, p] else there)


def test_undoing_a_jigsaw_with_its_target_gives_the_input_back():
    images, padding = batch()
    for patch in (8, 64):
        task = a_task("jigsaw-discrete", a_model("deformable_detr"), patch=patch, ratio=1.0)
        corruption = task.corruption(padding, [0, 1, 2])
        corrupted = task.corrupt_images(images, corruption)
        target = task.target(images, corruption).flatten(1)
        undone = corruption._replace(source=target).undone()
        assert not torch.equal(corrupted, images)
        assert torch.equal(task.corrupt_images(corrupted, undone), images)


def test_an_image_is_corrupted_by_its_seed_alone():
    task = a_task("mim-continuous", a_model("detr"))
    _, padding = batch()
    together, alone = task.corruption(padding, [3, 4, 5]), task.corruption(padding[1:2], [4])
    assert torch.equal(together.masked[1], alone.masked[0])
    assert not torch.equal(together.masked[0], task.corruption(padding, [8, 4, 5]).masked[0])
    several = torch.stack([task.corruption(padding[:1], [seed]).masked[0] for seed in range(200)]).float().mean(0)
    assert (several[:48] > 0.35).all() and (several[:48] < 0.65).all() and (several[48:] == 0).all()  # no favourites


# ---------------------------------------------------------------- no leak

LEAKS = [("detr", {}, {}), ("detr", {"dilation": True}, {}), ("deformable_detr", {}, {}), ("deformable_detr", {}, {"patch": 8}),
         ("deformable_detr", {}, {"patch": 16}), ("deformable_detr", {"num_feature_levels": 1}, {})]


@pytest.mark.parametrize("name, options, flags", LEAKS)
def test_no_leak_through_feature_maps(name, options, flags):
    """No gradient reaches a cell of any level under a masked patch, some reaches every other cell."""
    images, padding = batch()
    model = a_model(name, **options)
    task = a_task("mim-continuous", model, on="features", **flags)
    corruption = task.corruption(padding, [1, 2, 3])
    levels = [level._replace(features=level.features.detach().requires_grad_()) for level in model.features(images, padding)]
    memory = model.encode(task.corrupt_levels(levels, corruption))
    sum((level.features.masked_fill(level.padding[:, None], 0) ** 3).sum() for level in memory).backward()
    pixels = ssl_tasks.spread(corruption.masked.unflatten(1, corruption.grid), task.patch, (200, 256))
    pixels = F.pad(pixels.float(), (0, 0, 0, 56))
    for level, stride in zip(levels, model.strides):
        H, W = level.padding.shape[-2:]
        under = F.max_pool2d(pixels[:, None], stride)[:, 0, :H, :W] > 0  # a cell covers stride x stride pixels
        gradient = level.features.grad.abs().sum(1)
        assert (gradient[under] == 0).all()
        if stride <= task.patch:
            assert (gradient[~under & ~level.padding] > 0).all()


@pytest.mark.parametrize("name, options, flags", LEAKS)
def test_no_leak_through_the_image(name, options, flags):
    """Pixels under a mask do not matter, and those under the padding neither."""
    images, padding = batch()
    model = a_model(name, **options)
    task = a_task("mim-continuous", model, on="image", **flags)
    corruption = task.corruption(padding, [1, 2, 3])
    where = ssl_tasks.spread(corruption.changed().unflatten(1, corruption.grid), task.patch, (200, 256))[:, None]
    memory = [ssl_tasks.encode(model, task, x, padding, corruption)[0]
              for x in (images, images.masked_fill(where, 3.0), images.masked_fill(padding[:, None], 9.0))]
    for level, other, padded in zip(*memory):
        assert torch.equal(level.features, other.features) and torch.equal(level.features, padded.features)


def test_a_fine_jigsaw_does_not_leak_through_coarse_cells():
    """Where a patch moved, larger cells hold its old content: they are masked."""
    images, padding = batch()
    model = a_model("deformable_detr")
    task = a_task("jigsaw-continuous", model, patch=16, ratio=0.1)
    corruption = task.corruption(padding, [1, 2, 3])
    levels = model.features(images, padding)
    moved = corruption.changed().unflatten(1, corruption.grid).float()[:, None]
    for i, stride in enumerate(model.strides[2:], 2):
        touched = F.max_pool2d(F.pad(moved, (0, 0, 0, 3)), stride // 16)[:, 0, :levels[i].padding.shape[1]] > 0
        features = task.corrupt_levels(levels, corruption)[i].features
        assert torch.equal(features.movedim(1, -1)[touched], task.mask_vectors[i].expand(touched.sum(), -1))
        assert torch.equal(features.movedim(1, -1)[~touched], levels[i].features.movedim(1, -1)[~touched])
        assert touched.any() and not touched.all()


# ---------------------------------------------------------------- what is predicted and counted

def compare(task, model, images, padding, seeds=(1, 2, 3)):
    corruption = task.corruption(padding, seeds)
    memory, _ = ssl_tasks.encode(model, task, images, padding, corruption)
    return corruption, memory, task.loss(memory, images, corruption)


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
@pytest.mark.parametrize("kind", ssl_tasks.TASKS)
@pytest.mark.parametrize("loss_on", ["corrupted", "all"])
def test_the_loss_by_hand(name, kind, loss_on):
    images, padding = batch()
    model = a_model(name)
    task = a_task(kind, model, loss_on=loss_on)
    corruption, memory, loss = compare(task, model, images, padding)
    prediction, errors, patch = task.compare(memory, images, corruption)[0], [], task.patch
    for b, (height, width) in enumerate(SIZES):
        for p in range(corruption.whole.shape[1]):
            row, column = divmod(p, corruption.grid[1])
            y, x = row * patch, column * patch
            if y + patch > height or x + patch > width:
                continue  # not wholly inside its image
            moved = corruption.source[b, p] != p
            if kind != "reconstruct" and loss_on == "corrupted" and not (moved or corruption.masked[b, p]):
                continue
            if kind in ("reconstruct", "mim-continuous", "jigsaw-continuous"):
                here = (b, slice(None), slice(y, y + patch), slice(x, x + patch))
                errors.append((prediction[here] - images[here]).abs().mean())
            else:
                small = F.adaptive_avg_pool2d(images[b, :, y:y + patch, x:x + patch], 4).flatten()
                wanted = (corruption.source[b, p] if kind == "jigsaw-discrete" else
                          (task.tokenizer.codes - small).square().sum(1).argmin())
                errors.append(-prediction[b, :, row, column].log_softmax(0)[wanted])
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    whole = sum((h // patch) * (w // patch) for h, w in SIZES)
    assert len(errors) == whole if loss_on == "all" or kind == "reconstruct" else len(errors) <= whole / 2 + 1.5


def test_a_permuted_patch_that_stays_is_not_counted():
    task = a_task("jigsaw-continuous", a_model("detr"))
    _, padding = batch()
    corruption = task.corruption(padding, [0, 1, 2])
    still = corruption._replace(source=torch.arange(corruption.source.shape[1]).expand(3, -1))
    assert task.counted(corruption).sum() > 0 and task.counted(still).sum() == 0


def test_nothing_to_count_costs_nothing():
    model, (images, padding) = a_model("detr"), batch()
    task = ssl_tasks.build_task("mim-continuous", 32, model.strides, ratio=0.0)
    _, _, loss = compare(task, model, images, padding)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and (p.grad == 0).all() for p in task.parameters())


def test_masking_nothing_and_counting_all_is_reconstruction():
    model, (images, padding) = a_model("deformable_detr"), batch()
    masked, plain = (a_task("mim-continuous", model, ratio=0.0, loss_on="all"), a_task("reconstruct", model))
    plain.head.load_state_dict(masked.head.state_dict())
    assert torch.equal(compare(masked, model, images, padding)[2], compare(plain, model, images, padding)[2])


def test_padding_is_never_counted():
    model, (images, padding) = a_model("detr"), batch()
    for kind in ssl_tasks.TASKS:
        task = a_task(kind, model, loss_on="all")
        losses = [compare(task, model, x, padding)[2] for x in (images, images.masked_fill(padding[:, None], 5.0))]
        assert torch.equal(*losses)


# ---------------------------------------------------------------- cheap

@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
@pytest.mark.parametrize("on, passes", [("features", 1), ("image", 2)])
def test_multitask_encodes_clean_and_corrupted_as_one_batch(name, on, passes, monkeypatch):
    """As few passes of the backbone as possible, one of the encoder; the clean memory is the usual one."""
    model, (images, padding) = a_model(name), batch()
    task, calls = a_task("mim-continuous", model, on=on), []
    features, encode = model.features, model.encode
    monkeypatch.setattr(model, "features", lambda x, padding: calls.append(("features", len(x))) or features(x, padding))
    monkeypatch.setattr(model, "encode", lambda x: calls.append(("encode", len(x[0].features))) or encode(x))
    corruption = task.corruption(padding, [1, 2, 3])
    corrupted, clean = ssl_tasks.encode(model, task, images, padding, corruption, clean=True)
    assert calls == [("features", 3)] * passes + [("encode", 6)]
    alone, _ = ssl_tasks.encode(model, task, images, padding, corruption)
    usual = model.encode(model.features(images, padding))
    for a, b, c, d in zip(corrupted, clean, alone, usual):
        torch.testing.assert_close(a.features, c.features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(b.features, d.features, atol=1e-5, rtol=1e-5)
    calls.clear()
    ssl_tasks.encode(model, a_task("reconstruct", model, on=on), images, padding, corruption, clean=True)
    assert calls == [("features", 3), ("encode", 3)]  # nothing corrupted: the clean memory will do


# ---------------------------------------------------------------- visual tokens

def test_kmeans_tokens():
    """Patches of a few colours get as many codes, each patch the nearest; too few patches are refused."""
    colours = torch.randn(5, 3) * 2
    images = colours[torch.randint(5, (6, 4, 4))].permute(0, 3, 1, 2).repeat_interleave(32, 2).repeat_interleave(32, 3)
    images, taken = images + torch.randn(images.shape) * 0.05, torch.ones(6, 4, 4, dtype=torch.bool)
    tokenizer = visual_tokens.KMeans(32, 5)
    tokenizer.fit([(images[:4], taken[:4]), (images[4:], taken[4:])], seed=0)
    assert (torch.cdist(colours, tokenizer.codes.view(5, 3, 16).mean(2)).min(1).values < 0.05).all()
    tokens = tokenizer(images)
    for (b, y, x), token in np.ndenumerate(tokens.numpy()):
        small = images[b, :, 32 * y:32 * y + 32, 32 * x:32 * x + 32].unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)).flatten()
        assert token == (tokenizer.codes - small).square().sum(1).argmin()
    picture = tokenizer.paint(tokens, (128, 128))
    assert (picture - images).abs().mean() < 0.1
    with pytest.raises(ValueError, match="has 96 patches, fewer than --vocabulary 97"):
        visual_tokens.KMeans(32, 97).fit([(images, taken)], seed=0)


def dalle_state(vocabulary=16, width=4):
    """Weights of the published layout, small and random."""
    torch.manual_seed(0)
    state = {}

    def conv(name, n_in, n_out, size):
        state[f"blocks.{name}.w"] = torch.randn(n_out, n_in, size, size) / (n_in * size * size) ** 0.5
        state[f"blocks.{name}.b"] = torch.randn(n_out) * 0.1
    conv("input", 3, width, 7)
    for group in range(4):
        for block in range(2):
            n_out = width * 2 ** group
            n_in = n_out // 2 if group and not block else n_out
            name = f"group_{group + 1}.block_{block + 1}"
            if n_in != n_out:
                conv(f"{name}.id_path", n_in, n_out, 1)
            for i, (a, b, size) in enumerate(((n_in, n_out // 4, 3), (n_out // 4, n_out // 4, 3), (n_out // 4, n_out // 4, 3),
                                              (n_out // 4, n_out, 1))):
                conv(f"{name}.res_path.conv_{i + 1}", a, b, size)
    conv("output.conv", 8 * width, vocabulary, 1)
    return state


@pytest.fixture(scope="module")
def dalle_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("dalle") / "encoder.pkl"
    torch.save(dalle_state(), path)
    return path


def test_dalle_tokens(dalle_file, monkeypatch):
    """One token a patch, of the crop that the model sees, computed once for each crop."""
    images, padding = batch()
    images += F.interpolate(torch.randn(3, 3, 7, 8) * 3, scale_factor=32)[..., :200, :]  # patches of many colours
    tokenizer, calls = visual_tokens.Dalle(32, dalle_file), []
    monkeypatch.setattr(visual_tokens, "dalle_logits", lambda state, x, original=visual_tokens.dalle_logits:
                        (calls.append(x), original(state, x))[1])
    tokens = tokenizer(images)
    assert tokens.shape == (3, 7, 8) and calls[0].shape == (3, 3, 56, 64) and len(tokens.unique()) > 1
    assert calls[0].min() > 0.0999 and calls[0].max() < 0.9001
    pixels = (images[0] * torch.tensor(isaid.STD)[:, None, None] + torch.tensor(isaid.MEAN)[:, None, None]).clamp(0, 1)
    small = F.avg_pool2d(F.pad(pixels, (0, 0, 0, 24)), 4)
    torch.testing.assert_close(calls[0][0], 0.8 * small + 0.1)
    assert torch.equal(tokenizer(images[[2, 0]]), tokens[[2, 0]]) and len(calls) == 1
    assert torch.equal(tokenizer(torch.cat([images[1:2], images[1:2].flip(3)]))[0], tokens[1]) and len(calls[1]) == 1
    whole = ssl_tasks.whole_patches(padding, 32)
    tokenizer.fit([(images, whole)], seed=0)
    seen = visual_tokens.thumbnails(images, 32)[whole & (tokens == tokens[0, 0, 0])]
    torch.testing.assert_close(tokenizer.codes[tokens[0, 0, 0]], seen.mean(0))


def test_dalle_equals_the_published_package(tmp_path):
    pytest.importorskip("dall_e", reason="the package DALL-E is not installed")
    from dall_e.encoder import Encoder
    from dall_e.utils import map_pixels
    torch.manual_seed(0)
    encoder = Encoder(n_hid=64, vocab_size=512)
    torch.save(encoder, tmp_path / "encoder.pkl")
    pixels = torch.rand(2, 3, 32, 48)
    state = visual_tokens.load_dalle(tmp_path / "encoder.pkl")
    torch.testing.assert_close(visual_tokens.dalle_logits(state, map_pixels(pixels)), encoder(map_pixels(pixels)))


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_dalle_files_execute_nothing(tmp_path, dalle_file, capsys):
    torch.save(Evil(), tmp_path / "evil.pkl")
    torch.save({"blocks.input.w": torch.zeros(3)}, tmp_path / "other.pkl")
    (tmp_path / "cut.pkl").write_bytes(dalle_file.read_bytes()[:2000])
    for name, message in (("evil", "is not the published encoder"), ("other", "is not the published encoder"),
                          ("cut", "is not the published encoder"), ("none", "no such file")):
        with pytest.raises(ValueError, match=rf"{name}.pkl: {message}"):
            visual_tokens.load_dalle(tmp_path / f"{name}.pkl")
    assert "executed" not in capsys.readouterr().out


# ---------------------------------------------------------------- the real commands

def lines_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
@pytest.mark.parametrize("setting", ["pretrain", "multitask"])
@pytest.mark.parametrize("task", ssl_tasks.TASKS)
def test_every_task_is_learnt(model, setting, task, tmp_path):
    """Its loss falls, in both settings and on both detectors, and the run leaves what it should."""
    on = "image" if (model == "detr") == (setting == "pretrain") else "features"
    out, vocabulary = tmp_path / "run", ["--vocabulary", "8"] if task == "mim-discrete" else []
    train.main([*TINY, "--model", model, "--setting", setting, "--ssl_task", task, "--ssl_on", on, "--epochs", "5",
                "--eval_every", "5", "--lr", "2e-3", "--lr_backbone", "1e-3", *vocabulary, "--out", str(out)])
    lines = lines_of(out)
    assert lines[-1]["train_loss_ssl"] < lines[0]["train_loss_ssl"]
    assert ("ap" in lines[-1]) == ("train_loss_giou" in lines[-1]) == (setting == "multitask")
    assert (lines[-1]["ssl_acc"] is not None) == task.endswith("discrete")
    assert {"ssl.png", "curves.png", "best.pt"} <= {p.name for p in out.iterdir()}
    rows = {"reconstruct": 2, "mim-discrete": 4}.get(task, 3)
    assert Image.open(out / "ssl.png").size == (4 * 260, rows * 276)  # the first batch
    checkpoint = torch.load(out / "best.pt", weights_only=True)
    parts = {detr.part_of(name) for name in checkpoint["model"]}
    assert parts == ({"backbone", "encoder"} if setting == "pretrain" else {"backbone", "encoder", "decoder"})
    evaluation.main([str(out / "last.pt")])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ssl_loss"] == pytest.approx(lines[-1]["ssl_loss"], rel=1e-5)  # same corruption, same tokens
    assert metrics.get("ap") == lines[-1].get("ap")


def test_the_same_seed_gives_the_same_corruption(tmp_path):
    logs = []
    for name, workers, seed in (("a", 0, 0), ("b", 2, 0), ("c", 0, 1)):
        train.main([*TINY, "--setting", "pretrain", "--epochs", "1", "--workers", str(workers), "--seed", str(seed),
                    "--out", str(tmp_path / name)])
        logs.append(lines_of(tmp_path / name)[0])
    assert logs[0]["train_loss_ssl"] == logs[1]["train_loss_ssl"] != logs[2]["train_loss_ssl"]
    assert logs[0]["ssl_loss"] == logs[1]["ssl_loss"]


def test_pretraining_never_runs_the_decoder(tmp_path, monkeypatch):
    for detector in detr.DETECTORS.values():
        monkeypatch.setattr(detector, "decode", None)
    train.main([*TINY, "--setting", "pretrain", "--epochs", "1", "--out", str(tmp_path / "run")])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    train.main([*TINY, "--setting", "pretrain", "--ssl_task", "jigsaw-discrete", "--epochs", "1", "--out", str(out)])
    return out


@pytest.mark.parametrize("flags, taken, left", [
    ([], "backbone and encoder taken; decoder not", ("backbone", "encoder")),
    (["--init_parts", "backbone"], "backbone taken; encoder and decoder not", ("backbone",)),
    (["--init_parts", "encoder", "--dec_layers", "3", "--num_queries", "5"], "encoder taken; backbone and deco", ("encoder",))])
def test_pretrain_then_detect(pretrained, flags, taken, left, tmp_path, capsys, monkeypatch):
    """What was pretrained is transferred, and the command says so."""
    monkeypatch.setattr(train, "fit", lambda args, out, run, *data: run_state.save(out / "last.pt", run.product(run.model)))
    train.main([*TINY, "--init", str(pretrained), *flags, "--out", str(tmp_path / "run")])
    assert taken in capsys.readouterr().out
    before, after = weights_of(pretrained / "best.pt"), weights_of(tmp_path / "run/last.pt")
    for name, tensor in before.items():
        if tensor.dim() > 1:  # norms start at the same values anyway
            assert torch.equal(tensor, after[name]) == (detr.part_of(name) in left), name


@pytest.mark.parametrize("parts, flags", [(["backbone"], []), (["backbone", "encoder"], ["--setting", "multitask"])])
def test_frozen_parts_stay_as_they_are(pretrained, parts, flags, tmp_path, monkeypatch):
    optimizers = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, original=torch.optim.AdamW, **options:
                        optimizers.append(original(groups, **options)) or optimizers[-1])
    train.main([*TINY, "--init", str(pretrained), "--freeze", *parts, "--dropout", "0.1", "--epochs", "1", "--out",
                str(tmp_path / "run"), *flags])
    before, after = weights_of(pretrained / "best.pt"), weights_of(tmp_path / "run/last.pt")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) or detr.part_of(name) not in parts, name  # batch statistics too
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert bool(changed) == (parts == ["backbone"])
    checkpoint = torch.load(tmp_path / "run/last.pt", weights_only=True)
    own, task = detr.build_detector(**checkpoint["detector"]), checkpoint["task"] or {"state": {}}
    expected = sum(p.numel() for name, p in own.named_parameters() if detr.part_of(name) not in parts)
    expected += sum(tensor.numel() for tensor in task["state"].values())
    held = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == expected and set(optimizers[0].state) == set(held)


def test_weights_of_the_losses_are_flags():
    weights = train.loss_weights(train.parse(["--setting", "multitask", "--ssl_weight", "0.1", "--bbox_loss_coef", "7"]))
    assert weights == {"loss_ce": 2.0, "loss_bbox": 7.0, "loss_giou": 2.0, "loss_ssl": 0.1}
    assert train.loss_weights(train.parse(["--model", "detr", "--giou_loss_coef", "0"]))["loss_giou"] == 0.0


def test_images_without_annotations(tmp_path, capsys):
    """A folder of folders of any images; iSAID's patches without their JSON; train and val as ImageNet has them."""
    for i in range(22):
        path = tmp_path / "any" / f"n{i % 3}" / f"{i:02}.{'JPEG' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (150 + 5 * i, 140), (10 * i, 100, 50)).save(path)
    (tmp_path / "any" / "notes.txt").write_text("not an image")
    for kind in ("color", "id"):
        Image.new("RGB", (64, 64)).save(tmp_path / "any" / f"P0002_0_800_0_800_instance_{kind}_RGB.png")
    isaid.main(["scenes", str(tmp_path / "patches"), "--train", "6", "--val", "3"])
    for split in ("train", "val"):
        isaid.split_files(tmp_path / "patches", split)[1].unlink()
    flags = [*TINY[:12], "--setting", "pretrain", "--image_size", "128", "--epochs", "1", "--batch_size", "4"]
    capsys.readouterr()
    for name, source, counts in (("a", ["--data_unlabeled", tmp_path / "any"], (20, 2)),
                                 ("b", ["--data", tmp_path / "patches"], (6, 3)),
                                 ("c", ["--data_unlabeled", tmp_path / "patches"], (6, 3)),
                                 ("d", ["--train_images", tmp_path / "any", "--val_images", tmp_path / "patches"], (22, 9))):
        train.main([*flags, *map(str, source), "--out", str(tmp_path / name)])
        printed = capsys.readouterr().out
        assert f": {counts[0]} images" in printed and f": {counts[1]} images" in printed
    train_set, val_set = (isaid.open_split(split, train.parse([*flags, "--data_unlabeled", str(tmp_path / "any")]), False)
                          for split in ("train", "val"))
    names = [{image["file_name"] for image in data.images} for data in (train_set, val_set)]
    assert not names[0] & names[1]


def test_official_augmentation_and_dalle(tmp_path, dalle_file):
    """Images of several sizes, padded; tokens of DALL-E's encoder; evaluation finds its file again."""
    isaid.main(["scenes", str(tmp_path / "data"), "--train", "2", "--val", "1", "--image_size", "64"])
    flags = [*TINY[:12], "--data", str(tmp_path / "data"), "--setting", "pretrain", "--epochs", "1", "--batch_size", "2"]
    train.main([*flags, "--ssl_task", "mim-discrete", "--tokenizer", "dalle", "--tokenizer_weights", str(dalle_file), "--out",
                str(tmp_path / "run")])
    assert not any("tokenizer.state" in name or name.startswith("blocks")
                   for name in torch.load(tmp_path / "run/last.pt", weights_only=True)["task"]["state"])
    evaluation.main([str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["ssl_loss"] == pytest.approx(
        lines_of(tmp_path / "run")[0]["ssl_loss"], rel=1e-5)


MISTAKES = [
    (["--ssl_task", "jigsaw-discrete"], "--ssl_task belongs to --setting pretrain or multitask"),
    (["--setting", "pretrain", "--ssl_weight", "2"], "--ssl_weight belongs to --setting multitask"),
    (["--data_unlabeled", "x"], "--data_unlabeled belongs to --setting pretrain"),
    (["--setting", "pretrain", "--data_unlabeled", "nowhere"], "nowhere: no such folder of images"),
    (["--setting", "pretrain", "--data_unlabeled", "{folder}"], "holds no images"),
    (["--setting", "pretrain", "--data_unlabeled", "x", "--data", "y"], "name two datasets"),
    (["--setting", "pretrain", "--train_images", "x"], "--train_images and --val_images go together"),
    (["--setting", "pretrain", "--ssl_patch", "24"], "a patch of 24 pixels does not cover whole cells of the maps"),
    (["--setting", "pretrain", "--image_size", "64", "--ssl_patch", "64"], "0 patches of 64 would be corrupted"),
    (["--setting", "pretrain", "--ssl_ratio", "0.05"], "1 patches of 32 would be corrupted"),
    (["--setting", "pretrain", "--giou_loss_coef", "1"], "--giou_loss_coef belongs to --setting detect or multitask"),
    (["--freeze", "backbone"], "--freeze backbone keeps random weights; start it from a run with --init"),
    (["--freeze", "encoder", "--init", "{run}", "--init_parts", "backbone"], "--freeze encoder keeps random weights; not all of them"),
    (["--setting", "multitask", "--freeze", "decoder", "--init", "{run}"], "--freeze decoder keeps random weights; not all of them"),
    (["--setting", "pretrain", "--freeze", "decoder"], "a pretraining has no decoder"),
    (["--setting", "pretrain", "--ssl_task", "reconstruct", "--ssl_ratio", "0.3"], "--ssl_ratio belongs to an --ssl_task that corrupts"),
    (["--frozen_bn", "--init", "{run}", "--init_parts", "encoder"], "add --backbone_weights imagenet or --init"),
    (["--setting", "pretrain", "--ssl_ratio", "1.5"], "1.5 is not at least 0 and at most 1"),
    (["--setting", "pretrain", "--ssl_task", "mim-discrete", "--vocabulary", "4000"], "fewer than --vocabulary 4000"),
    (["--setting", "pretrain", "--ssl_task", "mim-discrete", "--tokenizer", "dalle"], "needs --tokenizer_weights"),
    (["--setting", "pretrain", "--tokenizer_weights", "x"], "--tokenizer_weights belongs to --tokenizer dalle"),
    (["--setting", "pretrain", "--vocabulary", "9"], "--vocabulary belongs to --tokenizer kmeans"),
    (["--setting", "pretrain", "--tokenizer", "kmeans"], "--tokenizer belongs to --ssl_task mim-discrete"),
    (["--setting", "pretrain", "--ssl_task", "mim-discrete", "--tokenizer", "dalle", "--tokenizer_weights", "x.pkl"],
     "x.pkl: no such file"),
    (["--init_parts", "encoder"], "--init_parts belongs to --init"),
    (["--init", "{run}", "--init_parts", "decoder"], "has no weights of the decoder"),
    (["--init", "{run}", "--model", "detr"], "does not fit this model"),
    (["--freeze", "backbone", "encoder", "decoder"], "--freeze leaves nothing to train"),
    (["--setting", "pretrain", "--freeze", "backbone", "encoder"], "--freeze leaves nothing to train"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_mistakes_get_one_line(flags, message, pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    names = {"folder": tmp_path / "empty", "run": pretrained}
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *(flag.format(**names) for flag in flags)])
    said = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_discrete_jigsaw_wants_one_size(tmp_path):
    isaid.main(["scenes", str(tmp_path / "data"), "--train", "2", "--val", "1", "--image_size", "64"])
    with pytest.raises(SystemExit, match="all images must have one size: add --image_size N"):
        train.main([*TINY[:12], "--data", str(tmp_path / "data"), "--setting", "pretrain", "--ssl_task", "jigsaw-discrete"])


def test_evaluating_a_pretraining_detects_nothing(pretrained, tmp_path):
    with pytest.raises(SystemExit, match="it detects nothing"):
        evaluation.main([str(pretrained), "--export", str(tmp_path / "x.json")])
