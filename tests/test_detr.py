"""Both detectors against transformers' with the same weights; losses by brute force; weights."""

import argparse
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from golden import fill

import detr
from util.weights import PARTS, init_from_checkpoint, load_checkpoint

SMALL = {
    "backbone": "resnet18",
    "hidden_dim": 64,
    "nheads": 4,
    "enc_layers": 2,
    "dec_layers": 2,
    "dim_feedforward": 96,
    "num_queries": 11,
}
REFINED = {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True, "hidden_dim": 256}  # transformers' width
POINTS = {"num_feature_levels": 5, "enc_n_points": 2, "dec_n_points": 3}
MODELS = [
    ("detr", {}),
    ("deformable_detr", {}),
    ("deformable_detr", REFINED),
    ("deformable_detr", TWO_STAGE),
    ("deformable_detr", {"num_feature_levels": 1}),
    ("deformable_detr", POINTS),
]


def small_detector(name, num_classes, options):
    """Build a small detector; options override those of SMALL."""
    return detr.build_detector(name, num_classes, **{**SMALL, **options})


def some_targets(counts, num_classes=5):
    """Return random targets with counts[i] objects in image i."""
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.rand(n, 4, generator=generator) * 0.3 + 0.2 for n in counts]
    labels = [torch.randint(num_classes, (n,), generator=generator) for n in counts]
    return [{"labels": labels[i], "boxes": boxes[i]} for i in range(len(counts))]


def randomize(model):
    """Add noise to all weights, so that no term is hidden by a zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            outside = tensor.is_floating_point() and "backbone" not in name
            if outside or "running_mean" in name or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model.eval()


# ---------------------------------------------------------------- the backbone
def test_frozen_bn():
    """Statistics stay as they are while training, and the first layers are not trained."""
    torch.manual_seed(0)
    frozen = detr.build_backbone("resnet50", 3, True, True, None)
    plain = detr.build_backbone("resnet50", 3, True, False, None)
    state = frozen.state_dict()
    for name, tensor in state.items():
        if tensor.dim() == 1:
            state[name] = torch.rand_like(tensor) + 0.5
    frozen.load_state_dict(state)
    plain.load_state_dict(state, strict=False)
    images = torch.randn(1, 3, 64, 96)
    maps = frozen.train()(images)
    for actual, expected in zip(maps, plain.eval()(images)):
        tolerance = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance)
    after = frozen.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    for name, parameter in frozen.named_parameters():
        assert parameter.requires_grad != name.startswith(("body.conv1.", "body.layer1."))


# ---------------------------------------------------------------- transformers as an oracle
STAGES = "model.backbone.model.encoder.stages"
RENAMED = [  # (regular expression in our names, its replacement), applied in this order
    (r"^backbone\.0\.body\.conv1\.", "model.backbone.model.embedder.embedder.convolution."),
    (r"^backbone\.0\.body\.bn1\.", "model.backbone.model.embedder.embedder.normalization."),
    (r"^backbone\.0\.body\.layer1\.", f"{STAGES}.0.layers."),
    (r"^backbone\.0\.body\.layer2\.", f"{STAGES}.1.layers."),
    (r"^backbone\.0\.body\.layer3\.", f"{STAGES}.2.layers."),
    (r"^backbone\.0\.body\.layer4\.", f"{STAGES}.3.layers."),
    (r"\.conv1\.", ".layer.0.convolution."),
    (r"\.conv2\.", ".layer.1.convolution."),
    (r"\.bn1\.", ".layer.0.normalization."),
    (r"\.bn2\.", ".layer.1.normalization."),
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
RENAMED_DETR = [
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed", "bbox_predictor"),
    (r"^input_proj\.", "model.input_projection."),
    (r"(decoder\.layers\.\d+\.)norm1\.", r"\1self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+\.)norm2\.", r"\1encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+\.)norm3\.", r"\1final_layer_norm."),
]
RENAMED_DEFORMABLE = [
    (r"^input_proj", "model.input_proj"),
    (r"(decoder\.layers\.\d+\.)norm1\.", r"\1encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+\.)norm2\.", r"\1self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+\.)norm3\.", r"\1final_layer_norm."),
]


def transformers_state(state, deformable):
    """Return our state dict under the names of transformers' models."""
    replacements = RENAMED + (RENAMED_DEFORMABLE if deformable else RENAMED_DETR)
    renamed = {}
    for name, tensor in state.items():
        if re.match(r"transformer\.decoder\.(bbox|class)_embed", name):
            continue  # the same tensors as bbox_embed and class_embed
        for pattern, replacement in replacements:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:  # projections of queries, keys and values in one tensor
            for letter, projection in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = projection
        else:
            renamed[name] = tensor
    return renamed


def transformers_model(options, deformable):
    """Build transformers' model of the same architecture."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    one_level = not deformable or options.get("num_feature_levels") == 1
    resnet = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage4"] if one_level else ["stage2", "stage3", "stage4"],
    )
    config = {
        "d_model": options.get("hidden_dim", SMALL["hidden_dim"]),
        "num_labels": 5,
        "num_queries": 11,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "dropout": 0.0,
        "backbone": None,
        "backbone_config": resnet,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "auxiliary_loss": deformable,  # in transformers' DETR this changes the forward pass
    }
    if not deformable:
        return transformers.DetrForObjectDetection(transformers.DetrConfig(**config))
    config["class_cost"] = 2
    config["two_stage_num_proposals"] = 11
    names = {"enc_n_points": "encoder_n_points", "dec_n_points": "decoder_n_points"}
    for name, value in options.items():
        if name != "hidden_dim":
            config[names.get(name, name)] = value
    config = transformers.DeformableDetrConfig(**config)
    return transformers.DeformableDetrForObjectDetection(config)


@pytest.mark.parametrize("name, options", MODELS)
def test_equals_transformers(name, options):
    deformable = name == "deformable_detr"
    model = randomize(small_detector(name, 5, options))
    if deformable:  # transformers ties the class heads of all layers; test_golden.py does not
        for head in model.class_embed:
            head.load_state_dict(model.class_embed[-1].state_dict())
    oracle = transformers_model(options, deformable).eval()
    state = transformers_state(model.state_dict(), deformable)
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected
    for key in missing:
        assert re.search("num_batches_tracked|decoder.(bbox|class)_embed", key)

    images, padding = fill.images()
    targets = some_targets((4, 0, 2))
    labels = []
    for target in targets:
        labels.append({"class_labels": target["labels"], "boxes": target["boxes"]})
    with torch.no_grad():
        outputs = model(images, padding)
        expected = oracle(pixel_values=images, pixel_mask=(~padding).long(), labels=labels)
    torch.testing.assert_close(outputs["logits"][-1], expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs["boxes"][-1], expected.pred_boxes, rtol=1e-4, atol=1e-4)

    losses = {}
    for loss_name, values in model.criterion(outputs, targets).items():
        for i, value in enumerate(values[:-1].tolist()):
            losses[f"{loss_name}_{i}"] = value
        losses[loss_name] = values[-1].item()  # transformers gives the last layer no number
    checked = 0
    for loss_name, value in expected.loss_dict.items():
        if loss_name.startswith("loss_"):
            assert losses[loss_name] == pytest.approx(value.item(), rel=1e-4), loss_name
            checked += 1
    assert checked >= (6 if deformable else 3)


# ---------------------------------------------------------------- the three steps
STRIDES = {1: [32], 2: [16, 32], 3: [8, 16, 32], 4: [8, 16, 32, 64], 5: [8, 16, 32, 64, 128]}
OTHERS = [
    ("detr", {"dilation": True}),
    ("detr", {"backbone": "resnet34", "enc_layers": 0}),
    ("deformable_detr", {"backbone": "resnet101", "num_feature_levels": 1, "dilation": True}),
    ("deformable_detr", {"num_feature_levels": 2, "enc_layers": 0}),
]


@pytest.mark.parametrize("name, options", MODELS + OTHERS)
def test_shapes(name, options):
    """On the meta device, where tensors have no values, a forward pass that reads one fails."""
    model = small_detector(name, 7, {"frozen_bn": False, **options})
    images, padding = fill.images()
    levels = model.features(images, padding)
    memory = model.encode(levels)
    for level, encoded in zip(levels, memory, strict=True):
        assert encoded.features.shape == level.features.shape
        assert encoded.padding is level.padding
        assert encoded.position is level.position
    num_levels = 1
    if name == "deformable_detr":
        num_levels = options.get("num_feature_levels", 4)
    expected_strides = STRIDES[num_levels]
    if options.get("dilation"):
        expected_strides = [16]
    assert model.strides == expected_strides
    assert [128 / level.features.shape[-1] for level in levels] == expected_strides
    outputs = model.decode(memory)
    num_logits = 8 if name == "detr" else 7
    assert outputs["logits"].shape == (2, 3, 11, num_logits)
    assert outputs["boxes"].shape == (2, 3, 11, 4)
    on_meta = model.to("meta")(images.to("meta"), padding.to("meta"))
    assert on_meta["boxes"].shape == (2, 3, 11, 4)


@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0, 0)])
@pytest.mark.parametrize("name, options", MODELS + OTHERS)
def test_every_trained_parameter_gets_a_gradient(name, options, counts):
    """Also without objects: then boxes cost nothing, but no branch of the loss is skipped."""
    model = small_detector(name, 7, {"frozen_bn": False, **options})
    images, padding = fill.images()
    losses = model.criterion(model(images, padding), some_targets(counts))
    for loss_name, values in losses.items():
        boxes_without_objects = "_ce" not in loss_name and not any(counts)
        assert (values == 0).all() == boxes_without_objects, loss_name
    total = sum(model.criterion.weights[key] * values.sum() for key, values in losses.items())
    total.backward()
    not_trained = []
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), parameter_name
        else:
            assert parameter.grad is None, parameter_name
            not_trained.append(parameter_name)
    if name == "deformable_detr" and options.get("enc_layers") == 0:
        assert not_trained == ["transformer.level_embed"]
    else:
        assert not_trained == []


@pytest.mark.parametrize("name, options", [MODELS[0], MODELS[1], MODELS[4]])
@torch.no_grad()
def test_neither_padding_nor_other_images_matter(name, options):
    """An image's memory does not depend on the others in its batch, nor on pixels of padding."""
    model = randomize(small_detector(name, 5, options))
    images, padding = fill.images()
    levels = model.features(images, padding)
    doubled = []
    for level in levels:
        features = torch.cat([level.features, level.features.flip(0)])
        level_padding = torch.cat([level.padding, level.padding.flip(0)])
        position = torch.cat([level.position, level.position.flip(0)])
        doubled.append(detr.FeatureLevel(features, level_padding, position))
    for single, double in zip(model.encode(levels), model.encode(doubled)):
        expected = torch.cat([single.features, single.features.flip(0)])
        torch.testing.assert_close(double.features, expected, rtol=1e-4, atol=1e-5)
    changed = images.masked_fill(padding[:, None], 1e3)
    before = model(images, padding)
    after = model(changed, padding)
    assert all(torch.equal(before[key], after[key]) for key in before)


WRONG = [
    ("yolo", {}, "yolo"),
    ("detr", {"num_queries": 0}, "num_queries"),
    ("deformable_detr", {"backbone": "vgg"}, "backbone"),
    ("deformable_detr", {"hidden_dim": 100}, "hidden_dim"),
    ("deformable_detr", {"two_stage": True}, "two_stage"),
]


@pytest.mark.parametrize("name, options, named", WRONG)
def test_wrong_arguments_are_named(name, options, named):
    with pytest.raises(ValueError, match=named):
        small_detector(name, 5, options)


# ---------------------------------------------------------------- matching and losses
@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 0, 0), (7, 4, 2)])
def test_match_is_optimal(focal, counts):
    """Against every possible assignment, also with more objects (7) than queries (4)."""
    torch.manual_seed(0)
    N, B, Q, K = 2, 3, 4, 5
    logits = torch.randn(N, B, Q, K)
    boxes = torch.rand(N, B, Q, 4) * 0.4 + 0.2
    labels, target_boxes = detr.pad_targets(some_targets(counts, K - 1), "cpu")
    criterion = detr.Criterion(focal)
    layer, image, query, obj = criterion.match(logits, boxes, labels, target_boxes, counts)
    costs = criterion.matching_costs(logits, boxes, labels, target_boxes)
    assert layer.tolist() == sorted(layer.tolist())
    for n, b in itertools.product(range(N), range(B)):
        pairs = (layer == n) & (image == b)
        num_pairs = min(Q, counts[b])
        assert len(set(query[pairs].tolist())) == num_pairs
        assert len(set(obj[pairs].tolist())) == num_pairs
        assert pairs.sum() == num_pairs
        cost = costs[n, b, :, : counts[b]]  # (Q, T)
        found = cost[query[pairs], obj[pairs]].sum().item()
        assert found == pytest.approx(lowest_cost(cost), abs=1e-5)


def lowest_cost(cost):
    """Return the lowest sum of costs (rows, columns) over all assignments, by trying them all."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    rows, columns = cost.shape
    sums = []
    for assigned in itertools.permutations(range(rows), columns):  # a row for each column
        sums.append(float(sum(cost[row, column] for column, row in enumerate(assigned))))
    return min(sums)


def test_matching_copies_to_the_cpu_once(monkeypatch):
    copies = []
    cpu = torch.Tensor.cpu

    def counted_cpu(tensor):
        copies.append(tensor.shape)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted_cpu)
    for forbidden in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, forbidden, None)
    logits = torch.randn(3, 2, 4, 5)
    boxes = torch.rand(3, 2, 4, 4)
    detr.Criterion(focal=True).layer_losses(logits, boxes, some_targets((2, 3)))
    assert copies == [(3, 2, 4, 3)]


def test_num_boxes_divides_the_losses():
    logits = torch.randn(2, 2, 4, 5)
    boxes = torch.rand(2, 2, 4, 4)
    targets = some_targets((1, 2))
    criterion = detr.Criterion(focal=True)
    by_three = criterion.layer_losses(logits, boxes, targets)
    by_six = criterion.layer_losses(logits, boxes, targets, num_boxes=6)
    expected = {name: loss / 2 for name, loss in by_three.items()}
    torch.testing.assert_close(by_six, expected)


def test_nan_is_reported():
    logits = torch.randn(2, 2, 4, 5)
    boxes = torch.full((2, 2, 4, 4), float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        detr.Criterion(focal=True).layer_losses(logits, boxes, some_targets((1, 2)))


@pytest.mark.parametrize("focal", [False, True])
def test_without_auxiliary_losses_the_last_layer_counts(focal):
    outputs = {"logits": torch.randn(3, 2, 4, 5), "boxes": torch.rand(3, 2, 4, 4)}
    targets = some_targets((1, 2))
    all_layers = detr.Criterion(focal, aux_loss=True)(outputs, targets)
    last_layer = detr.Criterion(focal, aux_loss=False)(outputs, targets)
    expected = {name: loss[-1:] for name, loss in all_layers.items()}
    torch.testing.assert_close(last_layer, expected)


def test_perfect_predictions_cost_nothing():
    targets = some_targets((3,))
    no_object = torch.tensor([5])
    labels = torch.cat([no_object, targets[0]["labels"].flip(0)])
    logits = torch.eye(6)[labels] * 40 - 20
    boxes = torch.cat([torch.rand(1, 4), targets[0]["boxes"].flip(0)])
    criterion = detr.Criterion(focal=False)
    losses = criterion.layer_losses(logits[None, None], boxes[None, None], targets)
    for loss in losses.values():
        assert loss.tolist() == pytest.approx([0], abs=1e-5)


# ---------------------------------------------------------------- weights from elsewhere
@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint as the official repositories write them, of a model with 91 classes."""
    path = tmp_path_factory.mktemp("init") / "official.pth"
    model = randomize(small_detector("deformable_detr", 91, REFINED))
    args = argparse.Namespace(lr=1e-4)
    torch.save({"model": model.state_dict(), "args": args, "epoch": 49}, path)
    return path


def test_init_reinitializes_class_heads_and_nothing_else(official):
    model = small_detector("deformable_detr", 15, REFINED)
    initial_weight = model.class_embed[0].weight.clone()
    _, reinitialized = init_from_checkpoint(model, official)
    expected = []
    for i in range(2):
        expected += [f"class_embed.{i}.weight", f"class_embed.{i}.bias"]
    assert reinitialized == expected
    assert torch.equal(model.class_embed[0].weight, initial_weight)
    official_state = torch.load(official, weights_only=False)["model"]
    for name, tensor in model.state_dict().items():
        if name not in reinitialized:
            assert torch.equal(tensor, official_state[name]), name


def test_init_from_a_url_with_as_many_classes(official, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = small_detector("deformable_detr", 91, REFINED)
    parts, reinitialized = init_from_checkpoint(model, f"file://{official}")
    assert list(parts) == list(PARTS)
    assert reinitialized == []
    official_state = torch.load(official, weights_only=False)["model"]
    assert torch.equal(model.class_embed[1].weight, official_state["class_embed.1.weight"])


MISFITS = [
    ({"num_queries": 12}, "query_embed.weight is"),
    ({"hidden_dim": 96}, "and .* more"),
    ({"num_feature_levels": 3}, "unexpected input_proj.3"),
    ({"enc_layers": 3}, "missing"),
    ({"with_box_refine": False}, "unexpected transformer.decoder.bbox_embed"),
]


@pytest.mark.parametrize("options, message", MISFITS)
def test_init_refuses_what_does_not_fit(official, options, message):
    model = small_detector("deformable_detr", 15, {**REFINED, **options})
    with pytest.raises(ValueError, match=message):
        init_from_checkpoint(model, official)


class Evil:
    """Its pickle runs code when it is loaded."""

    def __reduce__(self):
        return print, ("executed",)


def test_init_of_bad_files(tmp_path, official, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes(official.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(np.zeros(3)))
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("evil.pt", "cut.pt", "text.pt", "pickle.pt", "list.pt", "absent.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="download failed"):
        load_checkpoint(f"file://{tmp_path}/absent.pth")
    assert "executed" not in capsys.readouterr().out
