"""Weights by name, URL and file: downloads, transformers' files, the classes of COCO."""

import collections
import http.server
import pathlib
import re
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from golden import fill
from test_detr import REFINED, SMALL, TWO_STAGE, randomize, small_detector, transformers_model

import detr
from eval import checkpoint_file, load_published_model
from util import pretrained
from util.download import file_sha256
from util.pretrained import MODELS, PublishedModel, coco_categories, model_file
from util.weights import PARTS, init_from_checkpoint, load_checkpoint, load_parts

DC5 = {"num_feature_levels": 1, "dilation": True}
VARIANTS = {
    "detr": ("detr", {}),
    "four scales": ("deformable_detr", {}),
    "single scale": ("deformable_detr", {"num_feature_levels": 1}),
    "single scale DC5": ("deformable_detr", DC5),
    "refinement": ("deformable_detr", REFINED),
    "two-stage": ("deformable_detr", TWO_STAGE),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder in which downloaded files are kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "torch/hub/checkpoints"


# ---------------------------------------------------------------- files of transformers
def dilated_oracle(options, deformable):
    """Build transformers' model; it has no DC5 without timm, so its last stage is changed."""
    dilation = options.get("dilation")
    options = {name: value for name, value in options.items() if name != "dilation"}
    oracle = transformers_model(options, deformable)
    if dilation:
        stage = oracle.model.backbone.model.encoder.stages[3]
        for i, block in enumerate(stage.layers):
            for module in block.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.stride = (1, 1)
                    if i > 0 and module.kernel_size == (3, 3):
                        module.dilation = (2, 2)
                        module.padding = (2, 2)
    return oracle


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_of_transformers_give_the_outputs_of_its_model(variant, tmp_path):
    """Of save_pretrained; the same tensors by torch.save; the names in memory, wrapped by a tool;
    and with timm's ResNet, which has the official names, and counters, as in the Hub."""
    name, options = VARIANTS[variant]
    torch.manual_seed(2)
    oracle = dilated_oracle(options, name == "deformable_detr").eval()
    with torch.no_grad():
        for tensor in oracle.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.02)
        images, padding = fill.images()
        expected = oracle(pixel_values=images, pixel_mask=(~padding).long())
    oracle.save_pretrained(tmp_path)
    files = [tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin", tmp_path / "other.pt"]
    saved = load_checkpoint(files[0])
    counter = "model.backbone.conv_encoder.model.bn1.num_batches_tracked"
    torch.save({**with_timm_names(saved), counter: torch.tensor(3)}, files[1])
    wrapped = {f"module.detector.{key}": x for key, x in oracle.state_dict().items()}
    torch.save({"state_dict": {**wrapped, "loss.weight": torch.ones(2)}}, files[2])
    for file in files:
        model = small_detector(name, 5, options).eval()
        parts, reinitialized = init_from_checkpoint(model, file)
        assert list(parts) == list(PARTS)
        assert reinitialized == []
        with torch.no_grad():
            outputs = model(images, padding)
        torch.testing.assert_close(outputs["logits"][-1], expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs["boxes"][-1], expected.pred_boxes, rtol=1e-5, atol=1e-5)


def with_timm_names(state):
    """Return transformers' {name: tensor} with the names of timm's ResNet."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("embedder.embedder.convolution", "conv1")
        name = name.replace("embedder.embedder.normalization", "bn1")
        name = name.replace("shortcut.convolution", "downsample.0")
        name = name.replace("shortcut.normalization", "downsample.1")
        for i in range(4):
            name = name.replace(f"encoder.stages.{i}.layers", f"layer{i + 1}")
            name = name.replace(f"layer.{i}.convolution", f"conv{i + 1}")
            name = name.replace(f"layer.{i}.normalization", f"bn{i + 1}")
        renamed[name] = tensor
    return renamed


def test_a_folder_of_transformers_for_other_classes(tmp_path):
    """Its class heads are reinitialized and nothing else is; what does not fit is refused."""
    dilated_oracle(REFINED, True).save_pretrained(tmp_path)
    file = checkpoint_file(tmp_path)
    _, reinitialized = init_from_checkpoint(small_detector("deformable_detr", 7, REFINED), file)
    assert reinitialized == [
        f"class_embed.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    ]
    with pytest.raises(ValueError, match="missing|unexpected|differs"):
        init_from_checkpoint(small_detector("deformable_detr", 5, {}), file)
    state = load_checkpoint(file)
    del state["model.encoder.layers.1.fc1.bias"]
    torch.save(state, tmp_path / "incomplete.bin")
    with pytest.raises(ValueError, match="missing transformer.encoder.layers.1.linear1.bias"):
        init_from_checkpoint(
            small_detector("deformable_detr", 5, REFINED), tmp_path / "incomplete.bin"
        )
    with pytest.raises(ValueError, match="is a deformable_detr checkpoint; detr can load only"):
        init_from_checkpoint(small_detector("detr", 5, {}), file)


def test_heads_that_differ_do_not_fit_a_model_that_shares_them():
    """Without the check the last one would be taken for all layers."""
    state = small_detector("deformable_detr", 5, REFINED).state_dict()
    state = {name: x for name, x in state.items() if "decoder.bbox_embed" not in name}
    state["bbox_embed.1.layers.0.bias"] = state["bbox_embed.0.layers.0.bias"] + 1
    model = small_detector("deformable_detr", 5, {})
    with pytest.raises(ValueError, match="bbox_embed.1.layers.0.bias differs from bbox_embed.0"):
        load_parts(model, state, "file", PARTS)


def test_without_the_package_safetensors(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # the format counts, not the name
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="a.bin: .* pip install safetensors, or use pytorch_model"):
        load_checkpoint(tmp_path / "a.bin")


# ---------------------------------------------------------------- other contents
def test_a_page_that_was_saved_instead_of_the_file(tmp_path):
    (tmp_path / "model.pth").write_text("<!doctype html><title>Google Drive")
    with pytest.raises(
        ValueError, match="model.pth: is a web page, not weights; download the file"
    ):
        load_checkpoint(tmp_path / "model.pth")


def by_other_numpy(path, new_path):
    """Copy a file of torch.save as numpy 1 would have written it, or numpy 2 if this is numpy 1."""
    old = b"numpy.core.multiarray"
    new = b"numpy._core.multiarray"
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        old, new = new, old
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(new_path, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, source.read(name).replace(old + b"\n", new + b"\n"))


def test_scalars_of_numpy_are_read_and_other_objects_are_named(tmp_path):
    weights = {"a": torch.ones(2)}
    scalars = [np.float64(0.5), np.float32(2), np.int64(7), np.bool_(True)]
    torch.save({"model": weights, "best": scalars}, tmp_path / "scalars.pth")
    assert load_checkpoint(tmp_path / "scalars.pth")["best"] == scalars
    by_other_numpy(tmp_path / "scalars.pth", tmp_path / "other.pth")
    assert load_checkpoint(tmp_path / "other.pth")["best"] == scalars

    for content, name in (
        (pathlib.PurePosixPath("data"), r"pathlib[\w.]*\.PurePosixPath"),
        (np.zeros(3), r"numpy[\w.]*\._reconstruct, numpy.ndarray"),
        (collections.deque([1]), "collections.deque"),
    ):
        torch.save({"model": weights, "other": content}, tmp_path / "other.pth")
        message = rf"other.pth: contains more than .* \(.*{name}.*\).*; save the weights alone with"
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "other.pth")


# ---------------------------------------------------------------- downloads
class Server:
    """Serves `content` at any address of 127.0.0.1 and notes the headers of all requests."""

    def __init__(self):
        self.content = b""
        self.sent = None  # bytes of each answer after which the connection breaks
        self.knows_ranges = True  # False: it sends the whole file, with this status
        self.status_of_whole = 200
        self.kind = "application/octet-stream"
        self.ranges = []  # of the requests; None without one
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                server.answer(self)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/model.pth"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.ranges.append(wanted)
        content = self.content
        content_range = None
        status = 200
        if wanted and not self.knows_ranges:
            status = self.status_of_whole
            content_range = f"bytes 0-{len(content) - 1}/{len(content)}"
        if wanted and self.knows_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
            status = 206
            if not content:
                status = 416
        request.send_response(status)
        request.send_header("Content-Type", self.kind)
        request.send_header("Content-Length", str(len(content)))
        if status == 206:
            request.send_header("Content-Range", content_range)
        request.end_headers()
        request.wfile.write(content[: self.sent])


@pytest.fixture
def server(tmp_path):
    server = Server()
    torch.save({"model": {"a": torch.arange(5000)}}, tmp_path / "served.pth")
    server.content = (tmp_path / "served.pth").read_bytes()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.parametrize("knows_ranges, status", [(True, 200), (False, 200), (False, 206)])
def test_an_interrupted_download_is_continued(knows_ranges, status, server, cache):
    server.knows_ranges = knows_ranges
    server.status_of_whole = status
    server.sent = 9000
    size = len(server.content)
    message = f"download failed .it ended after 9,000 of {size:,} bytes.; .* as {cache}/.*model.pth"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(server.url)
    (partial,) = cache.iterdir()
    assert partial.suffix == ".partial"
    server.sent = None
    for _ in range(2):
        assert load_checkpoint(server.url)["model"]["a"][-1] == 4999
    assert server.ranges == [None, "bytes=9000-"]  # and none when it is in the cache
    (file,) = cache.iterdir()
    assert file.read_bytes() == server.content


def test_a_remainder_of_another_file_is_discarded(server, cache):
    """It is noticed by its checksum; the next call starts again."""
    server.sent = 9000
    with pytest.raises(ValueError, match="ended after"):
        load_checkpoint(server.url)
    server.sent = None
    server.content = server.content[::-1]
    server.content = b"PK" + server.content[2:]
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_checkpoint(server.url)
    assert list(cache.iterdir()) == []


def test_a_sign_in_page_is_not_kept(server, cache):
    server.content = b"\n<!DOCTYPE html><title>Sign in"
    for server.kind in ("text/html", "application/octet-stream"):
        with pytest.raises(ValueError, match="web page, such as a network's sign-in page"):
            load_checkpoint(server.url)
        assert list(cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_to_be_deleted(server, cache):
    load_checkpoint(server.url)
    (file,) = cache.iterdir()
    for content in (b"<html>", server.content[:9000], b"text"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file}: .*; delete this file to download it again"):
            load_checkpoint(server.url)


def test_one_of_several_processes_downloads(server, cache):
    """Threads stand for them: each opens the lock itself."""
    contents = []

    def load():
        contents.append(load_checkpoint(server.url))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(contents) == 4
    assert server.ranges == [None]


# ---------------------------------------------------------------- models by name
def publish(folder, monkeypatch, name, options=None):
    """Publish a small detector of COCO's 91 ids as "tiny"; return it.

    Its file is folder/served.pth, and downloaded files are kept in folder/torch/hub/checkpoints.
    """
    config = {**SMALL, "name": name, **(options if options else {})}
    model = randomize(detr.build_detector(num_classes=91, **config))
    file = folder / "served.pth"
    torch.save({"model": model.state_dict()}, file)
    published = PublishedModel({file.as_uri(): file_sha256(file)}, config)
    monkeypatch.setitem(MODELS, "tiny", published)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    return model


@pytest.mark.parametrize("variant", ["detr", "four scales", "two-stage"])
def test_a_published_model_detects_the_classes_of_coco(variant, monkeypatch, tmp_path):
    """Its logits are those of the 80 ids that COCO uses; all else stays."""
    name, options = VARIANTS[variant]
    model = publish(tmp_path, monkeypatch, name, options)
    run = load_published_model("tiny", "cpu")
    ids = [category["id"] for category in run.categories]
    assert len(ids) == 80
    assert run.categories[79] == {"id": 90, "name": "toothbrush"}
    if name == "detr":
        ids.append(91)  # "no object"
    images, padding = fill.images()
    with torch.no_grad():
        expected = model(images, padding)
        outputs = run.model.eval()(images, padding)
    torch.testing.assert_close(outputs["logits"], expected["logits"][..., ids])
    torch.testing.assert_close(outputs["boxes"], expected["boxes"])


def test_the_hash_is_compared(cache, monkeypatch, tmp_path):
    """When it is downloaded, and at each use, since it may be copied by hand."""
    publish(tmp_path, monkeypatch, "detr")
    file = cache / "tiny.pth"
    whole = (tmp_path / "served.pth").read_bytes()
    other = whole[:-1] + b"x"
    (tmp_path / "served.pth").write_bytes(other)
    with pytest.raises(
        ValueError, match=f"SHA-256 differs.*; .* save this file yourself as {file}"
    ):
        model_file("tiny")
    file.write_bytes(other)
    with pytest.raises(
        ValueError, match=f"{file}: is damaged or another file .*; delete this file"
    ):
        model_file("tiny")
    file.write_bytes(whole)
    assert model_file("tiny") == file


def test_names(cache, monkeypatch, tmp_path):
    """A misspelled name lists them; a file of the same name comes first; offline one line says
    which file to put where, that of the format that can be read."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="deformable_detr: no such run .* known by name: detr-r50, "
    ):
        load_checkpoint("deformable_detr")
    with pytest.raises(ValueError, match="checkpoint file$"):
        load_checkpoint("runs/mine")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens
    address = "https://huggingface.co/SenseTime/deformable-detr/resolve/83ecd26.*/"
    message = f"{address}model.safetensors: .* this file yourself as {cache}/deformable-detr.safe"
    with pytest.raises(ValueError, match=message):
        load_checkpoint("deformable-detr")
    monkeypatch.setattr(pretrained, "safetensors_works", lambda: False)
    message = f"{address}pytorch_model.bin: .* this file yourself as {cache}/deformable-detr.bin"
    with pytest.raises(ValueError, match=message):
        load_checkpoint("deformable-detr")
    torch.save({"a": torch.ones(1)}, cache / "deformable-detr.bin")
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert load_checkpoint("deformable-detr").keys() == {"a"}
    monkeypatch.chdir(tmp_path)
    torch.save({"b": torch.ones(1)}, "deformable-detr")
    assert load_checkpoint("deformable-detr").keys() == {"b"}


@pytest.mark.parametrize("name", MODELS)
def test_published_models_can_be_built(name):
    """The classes of their heads are those of COCO, of which there are 80."""
    with torch.device("meta"):
        detr.build_detector(num_classes=91, **MODELS[name].config)
    for url, sha256 in MODELS[name].files.items():
        assert url.startswith("https://")
        assert sha256 is None or re.fullmatch("[0-9a-f]{64}", sha256)
    assert len(coco_categories()) == 80
