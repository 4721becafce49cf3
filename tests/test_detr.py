"""Both detectors against transformers' with the same weights; losses by brute force; weights."""

import argparse
import copy
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from golden import fill

import detr
from util.weights import PARTS, init_from_checkpoint, load_checkpoint

SMALL = dict(backbone="resnet18", hidden_dim=64, nheads=4, enc_layers=2, dec_layers=2)
SMALL.update(dim_feedforward=96, num_queries=11)
TWO_STAGE = {"with_box_refine": True, "two_stage": True, "hidden_dim": 256}  # transformers' width
POINTS = {"num_feature_levels": 5, "enc_n_points": 2, "dec_n_points": 3}
DEFORMABLE = [{}, {"with_box_refine": True}, TWO_STAGE, {"num_feature_levels": 1}, POINTS]
MODELS = [("detr", {}), *(("deformable_detr", options) for options in DEFORMABLE)]


def some_targets(counts, num_classes=5):
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.rand(n, 4, generator=generator) * 0.3 + 0.2 for n in counts]
    labels = [torch.randint(num_classes, (n,), generator=generator) for n in counts]
    return [{"labels": mine, "boxes": box} for mine, box in zip(labels, boxes)]


def randomise(model):
    """Random weights everywhere, so that no term is hidden behind a zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            head = tensor.is_floating_point() and "backbone" not in name
            if head or "running_mean" in name or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model.eval()


def test_frozen_normalisation():
    torch.manual_seed(0)
    frozen = detr.Backbone("resnet50", 3, True, True, None)
    plain = detr.Backbone("resnet50", 3, True, False, None)
    state = {
        k: torch.rand_like(x) + 0.5 if x.dim() == 1 else x for k, x in frozen.state_dict().items()
    }
    frozen.load_state_dict(state)
    plain.load_state_dict(state, strict=False)
    x = torch.randn(1, 3, 64, 96)
    copied = copy.deepcopy(frozen)
    for a, b in zip(frozen(x), plain.eval()(x)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    with torch.no_grad():
        frozen.body.conv1.weight.zero_()
    assert not torch.equal(frozen(x)[0], copied(x)[0])
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], copied(x)[0])


def test_dropout_is_torchs():
    ours, theirs, x = detr.Dropout(0.3), torch.nn.Dropout(0.3), torch.full((1001, 999), 2.0)
    x.requires_grad_()
    torch.manual_seed(0)
    y = ours(x)
    kept = y != 0
    assert abs(kept.double().mean() - 0.7) < 0.002  # four standard deviations
    columns = kept.flatten()[: 999 * 1000].view(-1, 4).double().mean(0)  # of each 64 drawn bits
    assert (columns - 0.7).abs().max() < 0.004
    torch.testing.assert_close(y, kept * (2 / 0.7))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], kept / 0.7)
    torch.manual_seed(0)
    assert torch.equal(ours(x), y) and not torch.equal(ours(x), y)
    for p in (0.0, 1.0):
        assert torch.equal(detr.Dropout(p)(x), torch.nn.Dropout(p)(x))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    assert abs((compiled != 0).double().mean() - 0.7) < 0.002
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


# ---------------------------------------------------------------- transformers as an oracle
STAGES = "model.backbone.model.encoder.stages"
RENAMED = [  # applied in this order
    (r"^backbone\.0\.body\.conv1\.", "model.backbone.model.embedder.embedder.convolution."),
    (r"^backbone\.0\.body\.bn1\.", "model.backbone.model.embedder.embedder.normalization."),
    *((rf"^backbone\.0\.body\.layer{i + 1}\.", f"{STAGES}.{i}.layers.") for i in range(4)),
    *((rf"\.conv{i + 1}\.", f".layer.{i}.convolution.") for i in range(2)),
    *((rf"\.bn{i + 1}\.", f".layer.{i}.normalization.") for i in range(2)),
    (r"downsample\.0", "shortcut.convolution"),
    (r"downsample\.1", "shortcut.normalization"),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"linear([12])\.", r"mlp.fc\1."),
    (r"(cross_attn|multihead_attn)\.", "encoder_attn."),
    (r"(encoder\.layers\.\d+\.)norm1\.", r"\1self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+\.)norm2\.", r"\1final_layer_norm."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"((?:self|encoder)_attn\.)out_proj", r"\1o_proj"),
]
DETR_NAMES = [(r"^class_embed\.", "class_labels_classifier."), (r"^bbox_embed", "bbox_predictor")]
DETR_NAMES += [(r"^input_proj\.", "model.input_projection.")]


def transformers_names(state, deformable):
    """Our state dict under the names of transformers' models."""
    renamed = {}
    order = ("encoder_attn", "self_attn") if deformable else ("self_attn", "encoder_attn")
    names = RENAMED + ([(r"^input_proj", "model.input_proj")] if deformable else DETR_NAMES)
    for i, norm in enumerate((*order, "final"), 1):
        names += [(rf"(decoder\.layers\.\d+\.)norm{i}\.", rf"\1{norm}_layer_norm.")]
    for name, tensor in state.items():
        if re.match(r"transformer\.decoder\.(bbox|class)_embed", name):
            continue  # the same tensors as bbox_embed and class_embed
        for old, new in names:
            name = re.sub(old, new, name)
        for part, chunk in zip("qkv", tensor.chunk(3) if "in_proj_" in name else [tensor]):
            renamed[name.replace("in_proj_", f"{part}_proj.")] = chunk
    return renamed


def transformers_model(options, deformable):
    """transformers' model of the same architecture."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    levels = options.get("num_feature_levels", 4) if deformable else 1
    stages = ["stage4"] if levels == 1 else ["stage2", "stage3", "stage4"]
    shape = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    resnet = transformers.ResNetConfig(**shape, layer_type="basic", out_features=stages)
    sizes = dict(encoder_layers=2, decoder_layers=2, num_labels=5, num_queries=11, dropout=0.0)
    sizes.update(encoder_attention_heads=4, decoder_attention_heads=4, backbone_config=resnet)
    sizes.update(encoder_ffn_dim=96, decoder_ffn_dim=96, d_model=options.get("hidden_dim", 64))
    sizes.update(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None)
    sizes["auxiliary_loss"] = deformable  # in its DETR this changes the forward pass
    if not deformable:
        return transformers.DetrForObjectDetection(transformers.DetrConfig(**sizes))
    names = {"enc_n_points": "encoder_n_points", "dec_n_points": "decoder_n_points"}
    sizes.update({names.get(key, key): x for key, x in options.items() if key != "hidden_dim"})
    config = transformers.DeformableDetrConfig(**sizes, two_stage_num_proposals=11, class_cost=2)
    return transformers.DeformableDetrForObjectDetection(config)


@pytest.mark.parametrize("name, options", MODELS)
def test_equals_transformers(name, options):
    deformable = name == "deformable_detr"
    ours = randomise(detr.build_detector(name, 5, **{**SMALL, **options}))
    if deformable:  # transformers ties the class heads of all layers; test_golden.py has them apart
        for head in ours.class_embed:
            head.load_state_dict(ours.class_embed[-1].state_dict())
    theirs = transformers_model(options, deformable).eval()
    state = transformers_names(ours.state_dict(), deformable)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    known = "num_batches_tracked|decoder.(bbox|class)_embed"
    assert not unexpected and all(re.search(known, key) for key in missing)
    (images, padding), targets = fill.images(), some_targets((4, 0, 2))
    with torch.no_grad():
        mine = ours(images, padding)
        labels = [{**target, "class_labels": target["labels"]} for target in targets]
        other = theirs(pixel_values=images, pixel_mask=(~padding).long(), labels=labels)
    torch.testing.assert_close(mine["logits"][-1], other.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine["boxes"][-1], other.pred_boxes, rtol=1e-4, atol=1e-4)
    wanted = {name: x.item() for name, x in other.loss_dict.items() if name.startswith("loss_")}
    found = {}
    for name, values in ours.criterion(mine, targets).items():
        names = [f"{name}_{i}" for i in range(len(values) - 1)] + [name]  # the last: no number
        found.update(zip(names, values.tolist()))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert len(wanted) >= (6 if deformable else 3)


# ---------------------------------------------------------------- the three steps
STRIDES = {1: [32], 2: [16, 32], 3: [8, 16, 32], 4: [8, 16, 32, 64], 5: [8, 16, 32, 64, 128]}
OTHERS = [("detr", {"dilation": True}), ("detr", {"backbone": "resnet34", "enc_layers": 0})]
DC5 = {"backbone": "resnet101", "num_feature_levels": 1, "dilation": True}
OTHERS += [("deformable_detr", x) for x in (DC5, {"num_feature_levels": 2, "enc_layers": 0})]


@pytest.mark.parametrize("name, options", [*MODELS, *OTHERS])
def test_shapes_and_gradients(name, options):
    """Shapes of the three steps, strides; every parameter that asks for a gradient gets one.
    That holds without objects too: no branch of the loss is skipped, and boxes cost nothing. On
    the meta device, where tensors have no values, a forward pass that waits for one fails."""
    options = {**SMALL, "frozen_bn": False, **options}
    model, (images, padding) = detr.build_detector(name, 7, **options), fill.images()
    levels = model.features(images, padding)
    memory = model.encode(levels)
    assert [m.features.shape for m in memory] == [level.features.shape for level in levels]
    assert all(m.padding is x.padding and m.position is x.position for m, x in zip(memory, levels))
    strides = [128 / level.features.shape[-1] for level in levels]
    count = options.get("num_feature_levels", 4) if name == "deformable_detr" else 1
    assert strides == model.strides == ([16] if options.get("dilation") else STRIDES[count])
    outputs = model.decode(memory)
    assert outputs["logits"].shape == (2, 3, 11, 8 if name == "detr" else 7)
    assert outputs["boxes"].shape == (2, 3, 11, 4)
    for counts in ((2, 0, 3), (0, 0, 0)):
        losses = model.criterion(outputs, some_targets(counts))
        free = [name for name, loss in losses.items() if (loss == 0).all()]
        assert free == [name for name in losses if "_ce" not in name and not any(counts)]
        model.zero_grad()
        total = sum(model.criterion.weights[name] * x.sum() for name, x in losses.items())
        total.backward(retain_graph=True)
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    idle = [name for name, p in model.named_parameters() if not p.requires_grad]
    unused = name == "deformable_detr" and not options["enc_layers"]
    assert idle == (["transformer.level_embed"] if unused else [])
    assert model.to("meta")(images.to("meta"), padding.to("meta"))["boxes"].shape == (2, 3, 11, 4)


def test_matching_copies_to_the_host_once(monkeypatch):
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    for forbidden in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, forbidden, None)
    outputs = torch.randn(3, 2, 4, 5), torch.rand(3, 2, 4, 4)
    detr.Criterion(focal=True).layer_losses(*outputs, some_targets((2, 3)))
    assert copies == [(3, 2, 4, 3)]


@pytest.mark.parametrize("name, options", [MODELS[0], MODELS[1], MODELS[3]])
@torch.no_grad()
def test_neither_padding_nor_other_images_matter(name, options):
    """Clean and corrupted maps go through encode as one batch."""
    model = randomise(detr.build_detector(name, 5, **{**SMALL, **options}))
    images, padding = fill.images()
    levels = model.features(images, padding)
    doubled = [detr.FeatureLevel(*(torch.cat([x, x.flip(0)]) for x in level)) for level in levels]
    for one, two in zip(model.encode(levels), model.encode(doubled)):
        expected = torch.cat([one.features, one.features.flip(0)])
        torch.testing.assert_close(two.features, expected, rtol=1e-4, atol=1e-5)
    changed = images.masked_fill(padding[:, None], 1e3)
    before, after = model(images, padding), model(changed, padding)
    assert all(torch.equal(before[key], after[key]) for key in before)


WRONG = [("yolo", {}), ("detr", {"num_queries": 0}), ("deformable_detr", {"backbone": "vgg"})]
WRONG += [("deformable_detr", {"hidden_dim": 100}), ("deformable_detr", {"two_stage": True})]


@pytest.mark.parametrize("name, options", WRONG)
def test_wrong_arguments_are_named(name, options):
    with pytest.raises(ValueError, match=next(iter(options), name)):
        detr.build_detector(name, 5, **{**SMALL, **options})


# ---------------------------------------------------------------- matching and losses
@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 0, 0), (7, 4, 2)])
def test_match_is_optimal(focal, counts):
    """Against every possible assignment, also with more objects (7) than queries (4)."""
    torch.manual_seed(0)
    N, B, Q, K = 2, 3, 4, 5
    criterion, targets = detr.Criterion(focal), detr.pad_targets(some_targets(counts, K - 1), "cpu")
    padded = torch.randn(N, B, Q, K), torch.rand(N, B, Q, 4) * 0.4 + 0.2, *targets
    layer, image, query, target = criterion.match(*padded, counts)
    costs = criterion.costs(*padded)
    for n, b in itertools.product(range(N), range(B)):
        mine = (layer == n) & (image == b)
        cost, count = costs[n, b, :, : counts[b]], min(Q, counts[b])
        pairs = query[mine].tolist(), target[mine].tolist()
        assert mine.sum() == count == len(set(pairs[0])) == len(set(pairs[1]))
        few = cost if counts[b] <= Q else cost.T  # (the more, the fewer)
        places = itertools.permutations(range(len(few)), count)
        best = min(sum(few[place, i] for i, place in enumerate(p)) for p in places)
        assert cost[pairs].sum().item() == pytest.approx(float(best), abs=1e-5)


def test_the_number_given_divides_and_nan_is_reported():
    logits, boxes, targets = torch.randn(2, 2, 4, 5), torch.rand(2, 2, 4, 4), some_targets((1, 2))
    criterion = detr.Criterion(focal=True)
    usual, other = (criterion.layer_losses(logits, boxes, targets, n) for n in (None, 6))
    torch.testing.assert_close(other, {name: loss / 2 for name, loss in usual.items()})
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        criterion.layer_losses(logits, boxes * float("nan"), targets)


@pytest.mark.parametrize("focal", [False, True])
def test_without_auxiliary_losses_the_last_layer_counts(focal):
    outputs = {"logits": torch.randn(3, 2, 4, 5), "boxes": torch.rand(3, 2, 4, 4)}
    last, every = (detr.Criterion(focal, aux_loss)(outputs, some_targets((1, 2)))
                   for aux_loss in (False, True))  # fmt: skip
    torch.testing.assert_close(last, {name: loss[-1:] for name, loss in every.items()})


def test_perfect_predictions_cost_nothing():
    (target,) = some_targets((3,))
    labels = torch.tensor([5, *target["labels"].flip(0)])  # 5: no object
    logits = torch.eye(6)[labels] * 40 - 20
    boxes = torch.cat([torch.rand(1, 4), target["boxes"].flip(0)])
    losses = detr.Criterion(focal=False).layer_losses(
        logits[None, None], boxes[None, None], [target]
    )
    assert torch.cat(list(losses.values())).tolist() == pytest.approx([0, 0, 0], abs=1e-5)


# ---------------------------------------------------------------- weights from elsewhere
REFINED = {**SMALL, "with_box_refine": True}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint as the official repositories write them, of a model with 91 classes."""
    path = tmp_path_factory.mktemp("init") / "official.pth"
    model = randomise(detr.build_detector("deformable_detr", 91, **REFINED))
    content = {"model": model.state_dict(), "args": argparse.Namespace(lr=1e-4), "epoch": 49}
    torch.save(content, path)
    return path


def test_init_drops_class_heads_and_nothing_else(official, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = detr.build_detector("deformable_detr", 15, **REFINED)
    own = model.class_embed[0].weight.clone()
    _, dropped = init_from_checkpoint(model, official)
    heads = [f"class_embed.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")]
    assert dropped == heads and torch.equal(model.class_embed[0].weight, own)
    state = torch.load(official, weights_only=False)["model"]
    found = {name: x for name, x in model.state_dict().items() if name not in dropped}
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    same = detr.build_detector("deformable_detr", 91, **REFINED)
    assert init_from_checkpoint(same, f"file://{official}") == (list(PARTS), [])
    assert torch.equal(same.class_embed[1].weight, state["class_embed.1.weight"])


MISFITS = [({"num_queries": 12}, "query_embed.weight is"), ({"hidden_dim": 96}, "and .* more")]
MISFITS += [({"num_feature_levels": 3}, "unexpected input_proj.3"), ({"enc_layers": 3}, "missing")]
MISFITS += [({"with_box_refine": False}, "unexpected transformer.decoder.bbox_embed")]


@pytest.mark.parametrize("options, message", MISFITS)
def test_init_refuses_what_does_not_fit(official, options, message):
    model = detr.build_detector("deformable_detr", 15, **{**REFINED, **options})
    with pytest.raises(ValueError, match=message):
        init_from_checkpoint(model, official)


def test_init_of_bad_files(tmp_path, official, capsys):
    evil = type("Evil", (), {"__reduce__": lambda self: (print, ("executed",))})
    torch.save({"model": evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes(official.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(np.zeros(3)))
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("evil.pt", "cut.pt", "text.pt", "pickle.pt", "list.pt", "none.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_checkpoint(f"file://{tmp_path}/absent.pth")
    assert "executed" not in capsys.readouterr().out


@torch.no_grad()
def test_backbones_without_a_cue_of_place():
    """With circular padding a map moves as the image does; patch by patch, patches are apart."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    moved = images.roll((32, 64), (2, 3))
    for name, same in (("resnet18-circular", True), ("resnet18", False)):
        cnn = detr.Backbone(name, 3, False, False, None).eval()
        for x, y, s in zip(cnn(images), cnn(moved), cnn.strides):
            assert torch.allclose(x.roll((32 // s, 64 // s), (2, 3)), y, atol=1e-5) == same
    cnn = detr.Backbone("resnet18-patches", 3, False, False, None).eval()
    other = cnn(torch.cat([images[..., :32], torch.randn(2, 3, 64, 64)], 3))
    for x, y, alone, s in zip(cnn(images), other, cnn(images[..., 32:64, :32]), cnn.strides):
        assert x.shape == (2, *alone.shape[1:2], 64 // s, 96 // s)
        assert torch.allclose(x[..., : 32 // s], y[..., : 32 // s], atol=1e-5)
        assert torch.allclose(x[..., 32 // s :, : 32 // s], alone, atol=1e-5)
        assert not torch.allclose(x[..., 32 // s :], y[..., 32 // s :], atol=1e-2)
    assert [x.shape[2:] for x in cnn(images[..., :50, :70])] == [(7, 9), (4, 5), (2, 3)]
    with pytest.raises(ValueError, match="resnet18-patches.* tells nothing of Deformable DETR"):
        detr.build_detector("deformable_detr", 3, backbone="resnet18-patches", frozen_bn=False)
