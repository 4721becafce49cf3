"""Both detectors against transformers' with the same random weights; matcher and losses by brute force; padding; weights."""
import argparse
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision

import detr

SMALL = {"backbone": "resnet18", "hidden_dim": 64, "nheads": 4, "enc_layers": 2, "dec_layers": 2, "dim_feedforward": 96,
         "num_queries": 11}
TWO_STAGE = {"with_box_refine": True, "two_stage": True, "hidden_dim": 256}  # transformers' proposals need a width of 256
DEFORMABLE = [{}, {"with_box_refine": True}, TWO_STAGE, {"num_feature_levels": 1},
              {"num_feature_levels": 5, "enc_n_points": 2, "dec_n_points": 3}]


def batch(sizes=((96, 128), (64, 100), (90, 70)), seed=0):
    """Images of different sizes and their padding."""
    generator = torch.Generator().manual_seed(seed)
    H, W = (max(s[i] for s in sizes) for i in (0, 1))
    images, padding = torch.zeros(len(sizes), 3, H, W), torch.ones(len(sizes), H, W, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        padding[i, :h, :w] = False
    return images, padding


def some_targets(counts, num_classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(num_classes, (n,), generator=generator),
             "boxes": torch.rand(n, 4, generator=generator) * 0.3 + 0.2} for n in counts]


def randomise(model):
    """Random weights everywhere, so that no term is hidden behind a zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "backbone" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.05)
            elif "running_mean" in name or name.endswith("bias"):
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model.eval()


# ---------------------------------------------------------------- transformers as an oracle

def transformers_names(state, deformable):
    """Our state dict under the names of transformers' models."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("transformer.decoder.bbox_embed") or name.startswith("transformer.decoder.class_embed"):
            continue  # the same tensors as class_embed and bbox_embed
        name = re.sub(r"^backbone\.0\.body\.conv1\.", "model.backbone.model.embedder.embedder.convolution.", name)
        name = re.sub(r"^backbone\.0\.body\.bn1\.", "model.backbone.model.embedder.embedder.normalization.", name)
        stage = re.match(r"backbone\.0\.body\.layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.(\d))\.(.*)", name)
        if stage:
            layer, block, kind, number, shortcut, rest = stage.groups()
            part = "convolution" if kind == "conv" or shortcut == "0" else "normalization"
            where = "shortcut" if shortcut else f"layer.{int(number) - 1}"
            name = f"model.backbone.model.encoder.stages.{int(layer) - 1}.layers.{block}.{where}.{part}.{rest}"
        name = name.replace("transformer.decoder.norm.", "model.decoder.layernorm.")
        name = re.sub(r"^transformer\.", "model.", name)
        name = re.sub(r"linear([12])\.", r"mlp.fc\1.", name)
        cross, own = ("norm1", "norm2") if deformable else ("norm2", "norm1")
        if "decoder.layers" in name:
            name = name.replace(f"{cross}.", "encoder_attn_layer_norm.").replace(f"{own}.", "self_attn_layer_norm.")
            name = name.replace("norm3.", "final_layer_norm.")
            name = name.replace("cross_attn.", "encoder_attn.").replace("multihead_attn.", "encoder_attn.")
        else:
            name = re.sub(r"(layers\.\d+\.)norm1\.", r"\1self_attn_layer_norm.", name)
            name = re.sub(r"(layers\.\d+\.)norm2\.", r"\1final_layer_norm.", name)
        name = re.sub(r"^query_embed\.", "model.query_position_embeddings.", name)
        name = re.sub(r"^input_proj\.", "model.input_proj." if deformable else "model.input_projection.", name)
        if not deformable:
            name = name.replace("class_embed.", "class_labels_classifier.").replace("bbox_embed.", "bbox_predictor.")
        if "in_proj_" in name:
            kind = name.rsplit("_", 1)[1]
            for part, chunk in zip("qkv", tensor.chunk(3)):
                renamed[name.replace(f"in_proj_{kind}", f"{part}_proj.{kind}")] = chunk
        else:
            renamed[re.sub(r"((?:self|encoder)_attn\.)out_proj", r"\1o_proj", name)] = tensor
    return renamed


def transformers_model(options, deformable):
    """transformers' model of the same architecture."""
    import transformers
    levels = options.get("num_feature_levels", 4) if deformable else 1
    resnet = transformers.ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
                                       layer_type="basic", out_features=["stage4"] if levels == 1 else
                                       ["stage2", "stage3", "stage4"])
    sizes = {"d_model": options.get("hidden_dim", 64), "encoder_layers": 2, "decoder_layers": 2, "num_labels": 5,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4,
             "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_queries": 11, "dropout": 0.0,
             "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": resnet,
             "auxiliary_loss": deformable}  # in its DETR this changes the forward pass: layers get normalised inputs
    if not deformable:
        return transformers.DetrForObjectDetection(transformers.DetrConfig(**sizes))
    names = {"enc_n_points": "encoder_n_points", "dec_n_points": "decoder_n_points"}
    options = {names.get(key, key): value for key, value in options.items() if key != "hidden_dim"}
    config = transformers.DeformableDetrConfig(**sizes, **options, two_stage_num_proposals=11, class_cost=2)
    return transformers.DeformableDetrForObjectDetection(config)


@pytest.mark.parametrize("name, options", [("detr", {})] + [("deformable_detr", o) for o in DEFORMABLE],
                         ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)) or "plain")
def test_equals_transformers(name, options):
    deformable = name == "deformable_detr"
    ours = randomise(detr.build_detector(name, 5, **{**SMALL, **options}))
    if deformable:  # transformers ties the class heads of all layers; test_golden.py has them apart
        for head in ours.class_embed:
            head.load_state_dict(ours.class_embed[-1].state_dict())
    theirs = transformers_model(options, deformable).eval()
    missing, unexpected = theirs.load_state_dict(transformers_names(ours.state_dict(), deformable), strict=False)
    assert not unexpected and all(re.search("num_batches_tracked|decoder.(bbox|class)_embed", key) for key in missing)
    images, padding = batch()
    targets = some_targets((4, 0, 2))
    with torch.no_grad():
        mine = ours(images, padding)
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        other = theirs(pixel_values=images, pixel_mask=(~padding).long(), labels=labels)
    torch.testing.assert_close(mine["logits"][-1], other.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine["boxes"][-1], other.pred_boxes, rtol=1e-4, atol=1e-4)
    compared = 0
    for name, values in detr.detection_losses(mine, targets, ours.focal).items():
        for layer, value in enumerate(values):  # theirs counts from 0 too, and leaves the last one without a number
            official = name if layer == len(values) - 1 else f"{name}_{layer}"
            if official in other.loss_dict:
                assert value.item() == pytest.approx(other.loss_dict[official].item(), rel=1e-4), official
                compared += 1
    assert compared == sum(name.startswith("loss_") for name in other.loss_dict) >= (6 if deformable else 3)


# ---------------------------------------------------------------- the three steps

@pytest.mark.parametrize("name, options", [("detr", {}), ("detr", {"dilation": True}),
                                           ("detr", {"backbone": "resnet34", "enc_layers": 0}), *[
    ("deformable_detr", o) for o in (*DEFORMABLE, {"num_feature_levels": 2}, {"num_feature_levels": 3, "enc_layers": 0},
                                     {"backbone": "resnet101", "num_feature_levels": 1, "dilation": True, "dec_layers": 1})]])
def test_shapes_and_gradients(name, options):
    """Every combination of flags: shapes of the three steps, and every parameter that should learns."""
    options = {**SMALL, "frozen_bn": False, **options}
    model = detr.build_detector(name, 7, **options)
    images, padding = batch()
    levels = model.features(images, padding)
    memory = model.encode(levels)
    assert [m.features.shape for m in memory] == [level.features.shape for level in levels]
    assert all(m.padding is level.padding and m.position is level.position for m, level in zip(memory, levels))
    strides = [128 / level.features.shape[-1] for level in levels]
    assert strides == model.strides
    expected = {1: [32], 2: [16, 32], 3: [8, 16, 32], 4: [8, 16, 32, 64], 5: [8, 16, 32, 64, 128]}
    count = options.get("num_feature_levels", 4) if name == "deformable_detr" else 1
    assert strides == ([16] if options.get("dilation") else expected[count])
    outputs = model.decode(memory)
    layers, classes = options["dec_layers"], 8 if name == "detr" else 7
    assert outputs["logits"].shape == (layers, 3, 11, classes) and outputs["boxes"].shape == (layers, 3, 11, 4)
    detr.total_loss(detr.detection_losses(outputs, some_targets((2, 0, 3)), model.focal),
                    detr.loss_weights(model.focal)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == (["transformer.level_embed"] if name == "deformable_detr" and not options["enc_layers"] else [])


def test_encode_works_on_several_batches_at_once():
    """Clean and corrupted maps may go through encode together: images do not influence each other."""
    for name in detr.DETECTORS:
        model = randomise(detr.build_detector(name, 5, **SMALL))
        levels = model.features(*batch())
        doubled = [detr.Level(*(torch.cat([x, x.flip(0)]) for x in level)) for level in levels]
        for one, two in zip(model.encode(levels), model.encode(doubled)):
            torch.testing.assert_close(two.features, torch.cat([one.features, one.features.flip(0)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, options", [("detr", {}), ("deformable_detr", TWO_STAGE)])
def test_forward_never_waits_for_the_device(name, options):
    """On the meta device, where tensors have no values, anything that looks at a value fails."""
    model = detr.build_detector(name, 5, **{**SMALL, **options}).to("meta")
    images, padding = batch()
    outputs = model(images.to("meta"), padding.to("meta"))
    assert outputs["boxes"].shape == (2, 3, 11, 4)


def test_matching_copies_to_the_host_once(monkeypatch):
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    for forbidden in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, forbidden, None)
    detr.set_losses(torch.randn(3, 2, 4, 5), torch.rand(3, 2, 4, 4), some_targets((2, 3)), focal=True)
    assert copies == [(3, 2, 4, 3)]


@pytest.mark.parametrize("name, options", [("detr", {}), ("deformable_detr", {}),
                                           ("deformable_detr", TWO_STAGE)])
def test_padding_never_matters(name, options):
    model = randomise(detr.build_detector(name, 5, **{**SMALL, **options}))
    images, padding = batch()
    changed = torch.where(padding[:, None], torch.full_like(images, 1e3), images)
    with torch.no_grad():
        before, after = model(images, padding), model(changed, padding)
    for key in before:
        assert torch.equal(before[key], after[key])


def test_wrong_arguments_have_a_message():
    for options, message in [({"backbone": "vgg"}, "vgg"), ({"hidden_dim": 100}, "hidden_dim 100"),
                             ({"two_stage": True}, "with_box_refine"),
                             ({"num_queries": 0}, "num_queries")]:
        with pytest.raises(ValueError, match=message):
            detr.build_detector("deformable_detr", 5, **{**SMALL, **options})
    with pytest.raises(ValueError, match="yolo"):
        detr.build_detector("yolo", 5)


# ---------------------------------------------------------------- matching and losses

def test_giou_equals_torchvision():
    a, b = torch.rand(6, 4) * 0.5 + 0.2, torch.rand(5, 4) * 0.5 + 0.2
    convert = torchvision.ops.box_convert
    expected = torchvision.ops.generalized_box_iou(convert(a, "cxcywh", "xyxy"), convert(b, "cxcywh", "xyxy"))
    torch.testing.assert_close(detr.generalized_iou(a[:, None], b), expected)


@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 0, 0), (7, 4, 2)])
def test_match_is_optimal(focal, counts):
    """Against every possible assignment, also with more objects (7) than queries (4)."""
    torch.manual_seed(0)
    N, B, Q, K = 2, 3, 4, 5
    logits, boxes, targets = torch.randn(N, B, Q, K), torch.rand(N, B, Q, 4) * 0.4 + 0.2, some_targets(counts, K - 1)
    labels, target_boxes = (torch.nn.utils.rnn.pad_sequence([t[k] for t in targets], batch_first=True)
                            for k in ("labels", "boxes"))
    layer, image, query, target = detr.match(logits, boxes, labels, target_boxes, counts, focal)
    costs = detr.matching_costs(logits, boxes, labels, target_boxes, focal)
    for n, b in itertools.product(range(N), range(B)):
        mine = (layer == n) & (image == b)
        cost, count = costs[n, b, :, :counts[b]], min(Q, counts[b])
        assert mine.sum() == count == len(set(query[mine].tolist())) == len(set(target[mine].tolist()))
        if counts[b] <= Q:
            best = min(sum(cost[q, t] for t, q in enumerate(p)) for p in itertools.permutations(range(Q), counts[b]))
        else:
            best = min(sum(cost[q, t] for q, t in enumerate(p)) for p in itertools.permutations(range(counts[b]), Q))
        assert cost[query[mine], target[mine]].sum().item() == pytest.approx(float(best), abs=1e-5)


@pytest.mark.parametrize("name", detr.DETECTORS)
def test_images_without_objects(name):
    """No branch of the loss is skipped: all gradients exist, boxes cost nothing."""
    model = detr.build_detector(name, 5, **SMALL, frozen_bn=False)
    losses = detr.detection_losses(model(*batch()), some_targets((0, 0, 0)), model.focal)
    assert losses["loss_bbox"].tolist() == losses["loss_giou"].tolist() == [0, 0]
    assert (losses["loss_ce"] > 0).all()
    detr.total_loss(losses, detr.loss_weights(model.focal)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_predictions_that_are_not_finite_are_reported():
    logits, boxes = torch.zeros(1, 1, 3, 5), torch.full((1, 1, 3, 4), float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        detr.set_losses(logits, boxes, some_targets((2,)), focal=True)


def test_perfect_predictions_cost_nothing():
    targets = some_targets((3, 1))
    logits, boxes = torch.full((1, 2, 4, 6), -20.0), torch.rand(1, 2, 4, 4)
    logits[..., -1] = 20.0
    for i, target in enumerate(targets):
        for j, (label, box) in enumerate(zip(target["labels"], target["boxes"])):
            logits[0, i, 3 - j], boxes[0, i, 3 - j] = -20.0, box
            logits[0, i, 3 - j, label] = 20.0
    for loss in detr.set_losses(logits, boxes, targets, focal=False).values():
        assert loss.item() == pytest.approx(0, abs=1e-5)


def test_detections():
    logits = torch.full((1, 1, 2, 3), -9.0)
    logits[0, 0, 0, 1], logits[0, 0, 1, 0], logits[0, 0, 1, 1] = 2.0, 1.0, 3.0
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]]])
    focal, = detr.detections({"logits": logits, "boxes": boxes}, [(100, 200)], focal=True, top=3)
    assert focal["labels"].tolist() == [1, 1, 0]
    torch.testing.assert_close(focal["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    torch.testing.assert_close(focal["boxes"][:2], torch.tensor([[0.0, 0, 100, 100], [80, 30, 120, 70]]))
    softmax, = detr.detections({"logits": logits, "boxes": boxes}, [(100, 200)], focal=False)
    assert softmax["labels"].tolist() == [1, 1]  # the third class is "no object"
    torch.testing.assert_close(softmax["boxes"], torch.tensor([[80.0, 30, 120, 70], [0, 0, 100, 100]]))


# ---------------------------------------------------------------- weights from elsewhere

@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint as the official repositories write them, of a model with 91 classes."""
    path = tmp_path_factory.mktemp("init") / "official.pth"
    model = randomise(detr.build_detector("deformable_detr", 91, **SMALL, with_box_refine=True))
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-4), "epoch": 49}, path)
    return path


def test_init_drops_class_heads_and_nothing_else(official, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = detr.build_detector("deformable_detr", 15, **SMALL, with_box_refine=True)
    own = model.class_embed[0].weight.clone()
    _, _, dropped = detr.load_weights(model, official)
    assert dropped == [f"class_embed.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")]
    state = torch.load(official, weights_only=False)["model"]
    assert torch.equal(model.class_embed[0].weight, own)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name not in dropped)
    same = detr.build_detector("deformable_detr", 91, **SMALL, with_box_refine=True)
    assert detr.load_weights(same, f"file://{official}") == (list(detr.PARTS), [], [])  # by URL, and with every head
    assert torch.equal(same.class_embed[1].weight, state["class_embed.1.weight"])


@pytest.mark.parametrize("options, message", [
    ({"num_queries": 12}, "query_embed.weight is"), ({"with_box_refine": False}, "unexpected transformer.decoder.bbox_embed"),
    ({"hidden_dim": 96}, "and .* more"), ({"num_feature_levels": 3}, "unexpected input_proj.3"),
    ({"enc_layers": 3}, "missing transformer")])
def test_init_refuses_what_does_not_fit(official, options, message):
    model = detr.build_detector("deformable_detr", 15, **{**SMALL, "with_box_refine": True, **options})
    with pytest.raises(ValueError, match=message):
        detr.load_weights(model, official)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_init_of_bad_files(tmp_path, official, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes(official.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(np.zeros(3)))
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("evil.pt", "cut.pt", "text.pt", "pickle.pt", "list.pt", "none.pt"):
        with pytest.raises(ValueError, match=name):
            detr.load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        detr.load_checkpoint(f"file://{tmp_path}/absent.pth")
    assert "executed" not in capsys.readouterr().out
