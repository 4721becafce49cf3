"""The attention that is shown is what the layers compute with; the pointing game; the command."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_checkpoint import TINY
from test_detr import SMALL, randomize
from test_weights import publish
from torchvision.ops import box_convert

import detr
import isaid
import train
from eval import main as eval_main
from tools import attention
from util import plots
from util.files import DataError, read_json


def sampled_output(attended, values, ratio):
    """Sum the values at the points, times their weights, with torch's own bilinear sampling.

    values: (B, S, M, D) of all cells
    ratio:  (B, 2) part of each image's width and height that is not padding
    Returns (B, Q, M * D).
    """
    B, Q, M, n = attended.weights.shape
    points = attended.points * ratio[:, None, None, None] * 2 - 1  # as grid_sample expects them
    points = points.expand(B, Q, M, n, 2).transpose(1, 2).flatten(0, 1)  # (B * M, Q, n, 2)
    weights = attended.weights.transpose(1, 2).flatten(0, 1)  # (B * M, Q, n)
    maps = values.split([h * w for h, w in attended.shapes], 1)
    points_by_level = points.chunk(len(maps), 2)
    weights_by_level = weights.chunk(len(maps), 2)
    output = 0
    for i, (h, w) in enumerate(attended.shapes):
        level = maps[i].permute(0, 2, 3, 1).reshape(B * M, -1, h, w)
        samples = F.grid_sample(level, points_by_level[i], align_corners=False)  # (B * M, D, Q, n)
        output = output + (samples * weights_by_level[i][:, None]).sum(-1)
    return output.unflatten(0, (B, M)).permute(0, 3, 1, 2).flatten(2)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
@pytest.mark.parametrize("name", detr.DETECTORS)
def test_the_values_at_the_points_by_weight_are_the_layers_output(name, part):
    """The points' conventions and all weights are right, of two images, one with padding. The
    model's outputs stay as they are."""
    model = randomize(detr.build_detector(name, 3, **SMALL))
    module = attention.attention_module(model, part)
    images = torch.randn(2, 3, 256, 384)
    padding = torch.zeros(2, 256, 384, dtype=torch.bool)
    padding[1, 192:] = True  # whole cells on all levels
    padding[1, :, 256:] = True
    ratio = torch.tensor([[1, 1], [2 / 3, 3 / 4]])
    calls = []

    def record(module, args, kwargs, output):
        if name == "detr":
            output, _ = output
        calls.append((args, output))

    expected = model(images, padding)
    module.register_forward_hook(record, with_kwargs=True)
    outputs, attended = attention.attention_of(model, images, padding, part)
    for key in expected:
        assert torch.equal(outputs[key], expected[key])
    weights = attended.weights
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))

    (_, _, source, *_), output = calls[0]  # (B, S, C), (B, Q, C)
    with torch.no_grad():
        if name == "detr":
            C = source.shape[-1]
            values = F.linear(source, module.in_proj_weight[2 * C :], module.in_proj_bias[2 * C :])
            project = module.out_proj
        else:
            values = module.value_proj(source)
            project = module.output_proj
        inside = []
        for shape in attended.shapes:
            inside.append(~F.interpolate(padding[:, None].float(), size=shape).bool().flatten(1))
        values = (values * torch.cat(inside, 1)[..., None]).unflatten(-1, (4, -1))  # (B, S, M, D)
        total = project(sampled_output(attended, values, ratio))
    torch.testing.assert_close(total, output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", detr.DETECTORS)
def test_detections_name_their_queries(name):
    model = detr.build_detector(name, 3, **SMALL)
    outputs = {"logits": torch.randn(1, 2, 11, 4), "boxes": torch.rand(1, 2, 11, 4)}
    detections = model.postprocess(outputs, [(1, 1)] * 2)
    for boxes, detection in zip(outputs["boxes"][0], detections):
        query_boxes = box_convert(boxes[detection["queries"]], "cxcywh", "xyxy")
        torch.testing.assert_close(query_boxes, detection["boxes"])


def test_the_pointing_game_is_of_matched_queries_and_points_inside_the_image(monkeypatch):
    """A detector that knows the objects, one query each, in any order. In every second image its
    queries attend to a place next to the object; in the others to its center, and with more weight
    to a point outside the image, where nothing is. Queries without an object attend anywhere."""
    data = isaid.synthetic_dataset("val", 6, 128, isaid.make_transforms(False, 64))
    items = iter(data)
    rng = np.random.default_rng(0)

    def attention_of(model, images, padding):
        B = len(images)
        logits = torch.full((1, B, 9, 15), -9.0)
        boxes = torch.rand(1, B, 9, 4)
        points = torch.rand(B, 9, 1, 2, 2)
        for b in range(B):
            _, target = next(items)
            queries = rng.permutation(9)[: len(target["labels"])]
            boxes[0, b, queries] = target["boxes"]
            logits[0, b, queries, target["labels"]] = 9
            x, y, w, _ = target["boxes"].unbind(-1)
            if target["image_id"] % 2 == 1:
                toward_center = 1 - 2 * (x > 0.5).float()
                x = x + 0.6 * w * toward_center
            points[b, queries, 0, 0] = torch.stack([x, y], -1)
            points[b, queries, 0, 1] = 1.01
        weights = torch.tensor([0.2, 0.8]).expand(B, 9, 1, 2)
        outputs = {"logits": logits, "boxes": boxes}
        return outputs, attention.AttentionMap(points, weights, [])

    monkeypatch.setattr(attention, "attention_of", attention_of)
    model = detr.build_detector("deformable_detr", 15, **SMALL)
    game = attention.pointing_game(model, data, 4, "cpu")
    counts = [len(labels) for labels in data.labels]
    sizes = torch.cat(list(data.boxes))[:, 2:] / 128
    assert game == {
        "accuracy": sum(counts[::2]) / sum(counts),
        "chance": pytest.approx(sizes.prod(1).mean().item()),
        "objects": sum(counts),
    }


def test_maps_and_points_are_drawn_where_they_are():
    """A map of two cells reddens the half that weighs more; of two points the heavier is red."""
    image = Image.new("RGB", (200, 100), (90, 90, 90))
    mark = np.array([100.0, 50.0])
    drawn = plots.draw_attention_overlay(image, None, np.array([[0.0, 0.5]]), mark)
    assert drawn.getpixel((20, 80)) == (90, 90, 90)
    assert drawn.getpixel((180, 20)) == (200, 30, 30)
    assert drawn.getpixel((100, 50)) == (255, 255, 255)
    points = np.array([[30.0, 70.0], [160.0, 10.0]])
    drawn = plots.draw_attention_overlay(image, points, np.array([0.9, 0.09]), mark)
    assert drawn.getpixel((30, 70)) == (255, 0, 0)
    assert drawn.getpixel((160, 10)) == (255, 207, 0)


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module", params=detr.DETECTORS)
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    train.main([*TINY, "--model", request.param, "--epochs", "1", "--out", str(out)])
    return out


def test_the_command(run, tmp_path, capsys):
    """One row per query, in the shape of the image; metrics.json gets the pointing game and keeps
    the rest."""
    eval_main([str(run)])
    before = read_json(run / "metrics.json")
    attention.main([str(run), "--queries", "1"])
    metrics = read_json(run / "metrics.json")
    game = metrics.pop("attention")
    assert metrics == before
    assert 0 <= game["accuracy"] <= 1
    assert 0 < game["chance"] < 0.5
    assert game["objects"] == sum(row["boxes"] for row in before["per_class"])
    printed = f"accuracy: {game['accuracy']:.1%} of {game['objects']} held-out objects"
    assert printed in capsys.readouterr().out
    assert Image.open(run / "attention.png").size == (3 * 324, 340)

    Image.new("RGB", (300, 150), "navy").save(tmp_path / "wide.png")
    attention.main([str(run), f"{tmp_path}/wide.png", "--queries", "2"])
    assert "wide.png: 300 x 150 pixels, more than the 64 of the" in capsys.readouterr().out
    picture = Image.open(run / "attention-wide.png")
    assert picture.width == 3 * 324
    assert picture.height in (180, 360)
    assert read_json(run / "metrics.json") == {**before, "attention": game}


def test_errors_have_one_line(run, tmp_path):
    state = torch.load(run / "best.pt", weights_only=True)
    torch.save({**state, "args": {**state["args"], "setting": "pretrain"}}, tmp_path / "a.pt")
    (tmp_path / "b.png").write_text("no image")
    Image.new("RGB", (64, 64)).save(tmp_path / "c.png")
    for flags, message in (
        ("{tmp}/a.pt", "a.pt: is a self-supervised pretraining checkpoint"),
        ("{run} {tmp}/b.png", "b.png: not a readable image"),
        ("{run} --out {tmp}/none/x.png", "none/x.png: cannot write"),
        ("{run} {tmp}/c.png --out {tmp}/x.fits", "extension: .fits"),  # which Pillow only reads
        ("{run} {tmp}/c.png --out {tmp}/x.y", "extension: .y"),
    ):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
            attention.main(flags.format(run=run, tmp=tmp_path).split())
    assert not (tmp_path / "x.y").exists()


def test_the_data_of_a_run_has_moved(run, tmp_path, capsys):
    """The error names --data, and images found there change no metrics of the run."""
    isaid.main(f"scenes {tmp_path}/new --train 2 --val 2 --image_size 64".split())
    state = torch.load(run / "best.pt", weights_only=True)
    state["args"]["data"] = f"{tmp_path}/old"
    torch.save(state, tmp_path / "best.pt")
    for main in (attention.main, eval_main):
        with pytest.raises(SystemExit, match=f"error: {tmp_path}/old: .*not found; .*--data$"):
            main([str(tmp_path)])
    attention.main([str(tmp_path), "--data", f"{tmp_path}/new"])
    assert "held-out objects" in capsys.readouterr().out
    assert (tmp_path / "attention.png").exists()
    assert not (tmp_path / "metrics.json").exists()


def test_metrics_that_cannot_be_written_are_no_reason_to_stop(run, tmp_path, monkeypatch, capsys):
    """The picture goes elsewhere; it says what was not written."""

    def refuse(path, text):
        raise DataError(f"{path}: cannot write file (Permission denied)")

    monkeypatch.setattr(attention, "write_text", refuse)
    attention.main([str(run), "--out", f"{tmp_path}/mine.png"])
    assert f"not written: {run}/metrics.json: cannot write" in capsys.readouterr().out
    assert (tmp_path / "mine.png").exists()


@pytest.mark.parametrize("name", detr.DETECTORS)
def test_a_published_model(name, tmp_path, monkeypatch, capsys):
    """A photo is drawn into runs/NAME; without one, data with the classes of COCO is required."""
    publish(tmp_path, monkeypatch, name)
    monkeypatch.chdir(tmp_path)
    resize = isaid.resize
    monkeypatch.setattr(isaid, "resize", lambda image_size: resize(96))  # not 800: faster
    Image.effect_noise((120, 60), 99).save("photo.png")
    attention.main("tiny photo.png --queries 1".split())
    assert capsys.readouterr().out == "written: runs/tiny/attention-photo.png\n"
    assert Image.open("runs/tiny/attention-photo.png").width == 3 * 324
    with pytest.raises(SystemExit, match="error: tiny: requires --data DIR, a dataset with the"):
        attention.main(["tiny"])


@pytest.mark.parametrize("image_size", [64, None])
def test_an_image_is_shown_as_in_the_evaluation(image_size):
    data = isaid.synthetic_dataset("val", 1, 96, isaid.make_transforms(False, image_size))
    images, padding = attention.batch_of_one(data.load_image(0), image_size)
    expected, _ = data[0]
    assert torch.equal(images[0], expected)
    assert not padding.any()
