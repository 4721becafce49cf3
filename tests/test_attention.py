"""Where detectors look is what their layers compute with; the share of objects; the command."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_checkpoint import TINY
from test_detr import SMALL, randomize
from torchvision.ops import box_convert

import detr
import isaid
import train
from eval import main as eval_main
from tools import attention
from util import plots
from util.files import read_json


@pytest.mark.parametrize("part", ["decoder", "encoder"])
@pytest.mark.parametrize("name", detr.DETECTORS)
def test_what_the_points_hold_by_weight_is_the_layers_output(name, part):
    """torch's own sampling of the module's values at the points, of two images, one padded: the
    conventions of the points and all weights are right. The model's results stay as they are."""
    model, said = randomize(detr.build_detector(name, 3, **SMALL)), {}
    layer = getattr(model.transformer, part).layers[-1]
    name_of = {"detr": "multihead_attn", "deformable_detr": "cross_attn"}
    module = layer.self_attn if part == "encoder" else getattr(layer, name_of[name])
    images, padding = torch.randn(2, 3, 256, 384), torch.zeros(2, 256, 384, dtype=torch.bool)
    padding[1, 192:], padding[1, :, 256:] = True, True  # whole cells on all levels
    valid = torch.tensor([[1, 1], [2 / 3, 3 / 4]])[:, None, None, None]  # (B, 1, 1, 1, 2)

    def listen(module, arguments, options, output):
        said.setdefault("call", (arguments, output[0] if name == "detr" else output))

    expected = model(images, padding)
    module.register_forward_hook(listen, with_kwargs=True)
    outputs, seen = attention.attention_of(model, images, padding, part)
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones_like(seen.weights[..., 0]))
    (_, _, source, *_), output = said["call"]  # (B, S, C), (B, Q, C)
    with torch.no_grad():
        if name == "detr":
            C, project = source.shape[-1], module.out_proj
            values = F.linear(source, module.in_proj_weight[2 * C :], module.in_proj_bias[2 * C :])
        else:
            values, project = module.value_proj(source), module.output_proj
        inside = torch.cat([~F.interpolate(padding[:, None].float(), size=shape).bool().flatten(1)
                            for shape in seen.shapes], 1)  # fmt: skip
        values = (values * inside[..., None]).unflatten(-1, (4, -1))  # (B, S, M, D)
        B, Q, M, n = seen.weights.shape
        points = (seen.points * valid * 2 - 1).expand(B, Q, M, n, 2).transpose(1, 2).flatten(0, 1)
        weights, total = seen.weights.transpose(1, 2).flatten(0, 1), 0  # (B * M, Q, n)
        maps = values.split([h * w for h, w in seen.shapes], 1)
        chunks = (x.chunk(len(maps), -2 + (x is weights)) for x in (points, weights))
        for (h, w), x, place, weight in zip(seen.shapes, maps, *chunks):
            x = x.permute(0, 2, 3, 1).reshape(B * M, -1, h, w)
            found = F.grid_sample(x, place, align_corners=False)  # (B * M, D, Q, n)
            total = total + (found * weight[:, None]).sum(-1)
        total = project(total.unflatten(0, (B, M)).permute(0, 3, 1, 2).flatten(2))
    torch.testing.assert_close(total, output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", detr.DETECTORS)
def test_detections_name_their_queries(name):
    model = detr.build_detector(name, 3, **SMALL)
    outputs = {"logits": torch.randn(1, 2, 11, 4), "boxes": torch.rand(1, 2, 11, 4)}
    for boxes, found in zip(outputs["boxes"][0], model.postprocess(outputs, [(1, 1)] * 2)):
        own = box_convert(boxes[found["queries"]], "cxcywh", "xyxy")
        torch.testing.assert_close(own, found["boxes"])


def test_the_share_is_of_matched_queries_and_seen_points(monkeypatch):
    """A detector that knows the objects, one query each, in any order. In every second image its
    queries look beside the object; in the others at its middle, and with more weight at a point
    outside the image, where nothing is. A query of its own for no object looks at the first one."""
    data = isaid.synthetic_dataset("val", 6, 128, isaid.make_transforms(False, 64))
    truth, rng = iter(data), np.random.default_rng(0)

    def look(model, images, padding):
        logits, boxes = torch.full((1, len(images), 9, 15), -9.0), torch.rand(1, len(images), 9, 4)
        points = torch.rand(len(images), 9, 1, 2, 2)
        for b, (_, target) in zip(range(len(images)), truth):
            queries = rng.permutation(9)[: len(target["labels"])]
            boxes[0, b, queries], logits[0, b, queries, target["labels"]] = target["boxes"], 9
            x, y, w, h = target["boxes"].unbind(-1)
            beside = target["image_id"] % 2 * 0.6 * w * (1 - 2 * (x > 0.5))
            points[b, queries, 0, 0] = torch.stack([x + beside, y], -1)
            points[b, queries, 0, 1] = 1.01
        weights = torch.tensor([0.2, 0.8]).expand(len(images), 9, 1, 2)
        return {"logits": logits, "boxes": boxes}, attention.AttentionMap(points, weights, [])

    monkeypatch.setattr(attention, "look", look)
    model = detr.build_detector("deformable_detr", 15, **SMALL)
    share = attention.pointing_game(model, data, 4, "cpu")
    objects, boxes = [len(labels) for labels in data.labels], torch.cat(data.boxes)[:, 2:] / 128
    by_chance = pytest.approx(boxes.prod(1).mean().item())
    expected = {"in_box": sum(objects[::2]) / sum(objects), "by_chance": by_chance}
    assert share == {**expected, "objects": sum(objects)}


def test_maps_and_points_are_drawn_where_they_are():
    """A map of two cells reddens the half that weighs more; of two points the heavier is red."""
    image, mark = Image.new("RGB", (200, 100), (90, 90, 90)), np.array([100.0, 50.0])
    pixel = plots.draw_attention_overlay(image, None, np.array([[0.0, 0.5]]), mark).getpixel
    assert pixel((20, 80)) == (90, 90, 90) and pixel((180, 20)) == (200, 30, 30)
    assert pixel((100, 50)) == (255, 255, 255)
    points, weights = np.array([[30.0, 70.0], [160.0, 10.0]]), np.array([0.9, 0.09])
    pixel = plots.draw_attention_overlay(image, points, weights, mark).getpixel
    assert pixel((30, 70)) == (255, 0, 0) and pixel((160, 10)) == (255, 207, 0)


@pytest.fixture(scope="module", params=detr.DETECTORS)
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    train.main([*TINY, "--model", request.param, "--epochs", "1", "--out", str(out)])
    return out


def test_the_command(run, tmp_path, capsys):
    """A row a query, in the shape of the image; metrics.json gets the share and keeps the rest."""
    eval_main([str(run)])
    before = read_json(run / "metrics.json")
    attention.main([str(run), "--queries", "1"])
    metrics = read_json(run / "metrics.json")
    share = metrics.pop("attention")
    assert metrics == before and 0 <= share["in_box"] <= 1 and 0 < share["by_chance"] < 0.5
    assert share["objects"] == sum(row["boxes"] for row in before["per_class"])
    assert f"of {share['objects']} held-out objects {share['in_box']:.1%} are looked at" in (
        capsys.readouterr().out)  # fmt: skip
    assert Image.open(run / "attention.png").size == (3 * 324, 340)
    Image.new("RGB", (300, 150), "navy").save(tmp_path / "wide.png")
    attention.main([str(run), f"{tmp_path}/wide.png", "--queries", "2"])
    assert "wide.png: 300 x 150 pixels, more than the 64 of the" in capsys.readouterr().out
    picture = Image.open(run / "attention-wide.png")
    assert picture.width == 3 * 324 and picture.height in (180, 360)
    assert read_json(run / "metrics.json") == {**before, "attention": share}


def test_mistakes_get_one_line(run, tmp_path):
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save({**state, "args": {**state["args"], "setting": "pretrain"}}, tmp_path / "a.pt")
    (tmp_path / "b.png").write_text("no image")
    for flags, message in (
        ("{tmp}/a.pt", "a.pt: is of a pretraining, it detects nothing"),
        ("{run} {tmp}/b.png", "b.png: not a readable image"),
        ("{run} --out {tmp}/none/x.png", "none/x.png: cannot write"),
    ):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
            attention.main(flags.format(run=run, tmp=tmp_path).split())
    Image.new("RGB", (64, 64)).save(tmp_path / "c.png")
    with pytest.raises(SystemExit, match="unknown file extension: .y"):
        attention.main([str(run), f"{tmp_path}/c.png", "--out", f"{tmp_path}/x.y"])
    assert not (tmp_path / "x.y").exists()


@pytest.mark.parametrize("image_size", [64, None])
def test_an_image_is_shown_as_in_the_evaluation(image_size):
    data = isaid.synthetic_dataset("val", 1, 96, isaid.make_transforms(False, image_size))
    images, padding = attention.batch(data.load_image(0), image_size)
    assert torch.equal(images[0], data[0][0]) and not padding.any()
