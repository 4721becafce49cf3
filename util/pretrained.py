"""Detectors trained on COCO that are known by name, and the classes they detect.

DETR is the official file. Deformable DETR is published by its authors at the Hugging Face Hub, in
transformers' names (see transformers_names.py).
"""

import dataclasses
import difflib
from pathlib import Path

import torchvision
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from util.download import cache_folder, cached_file, download


@dataclasses.dataclass
class PublishedModel:
    """A published detector.

    files:  {URL: SHA-256, or None if it is not known}, the preferred file first
    config: arguments of detr.build_detector, without num_classes
    """

    files: dict
    config: dict


def hub_model(repository, revision, sha256, config):
    """Return a PublishedModel of the Hub.

    revision: of the repository, so that the files never change
    sha256:   of model.safetensors
    """
    folder = f"https://huggingface.co/SenseTime/{repository}/resolve/{revision}"
    files = {f"{folder}/model.safetensors": sha256, f"{folder}/pytorch_model.bin": None}
    return PublishedModel(files, {"name": "deformable_detr", **config})


MODELS = {
    "detr-r50": PublishedModel(
        {
            "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth": (
                "e632da11ec76ae67bac2f8579fbed3724e08dead7d200ca13e019b197784eadc"
            )
        },
        {"name": "detr"},
    ),
    "deformable-detr": hub_model(
        "deformable-detr",
        "83ecd26945199939cb82806f988debdb71e6f43e",
        "caf1e3e61283c6ce35cd2d9adaa7033cf40997d4dfe434003bcdb9085cc8cf9b",
        {},
    ),
    "deformable-detr-single-scale": hub_model(
        "deformable-detr-single-scale",
        "e880a4ca7bbe47b33d37ed90e2948efbbdad0d44",
        "82eeb57bbcdd02408afc53d5f5c874e3a7f27b5034194ae2c4475d06fceaa59b",
        {"num_feature_levels": 1},
    ),
    "deformable-detr-single-scale-dc5": hub_model(
        "deformable-detr-single-scale-dc5",
        "c23332913d0ae1a8c98725e308eccba65a5933cc",
        "e71afa5f5900e2e769275156494195508efcadaab4275b0cd4c80f10369dc090",
        {"num_feature_levels": 1, "dilation": True},
    ),
    "deformable-detr-box-refine": hub_model(
        "deformable-detr-with-box-refine",
        "2e9e461623a8fdc296e19666c46c8a4389a3a6fe",
        "4113700fe8aade398808424b7c5c1304cfbf886adc6450a6ca5d50a702be3373",
        {"with_box_refine": True},
    ),
    "deformable-detr-two-stage": hub_model(
        "deformable-detr-with-box-refine-two-stage",
        "e74bff70d69f3e825f6cefaf179bfba707f92054",
        "411bb4238a834d40fff651b1b5b7d6dd80c2dd28be1747eec7b6918674e85de6",
        {"with_box_refine": True, "two_stage": True},
    ),
}


# ---------------------------------------------------------------- files
def is_model_name(run):
    """Return True for a name in MODELS; a file or a folder of this name comes first."""
    return str(run) in MODELS and not Path(run).exists()


def similar_names(run):
    """Return a remark that lists the names if `run` looks like a misspelled one, else ""."""
    last_part = Path(run).name.lower()  # as of facebook/detr-r50, a name in the Hub
    if not difflib.get_close_matches(last_part, MODELS):
        return ""
    return f"; COCO models known by name: {', '.join(MODELS)}"


def model_file(name):
    """Return the path of a published model's file, downloaded if needed. Raises ValueError.

    A file that is there already is taken, else the preferred one that can be read here.
    """
    readable = []  # (URL, path in the cache, SHA-256)
    for url, sha256 in MODELS[name].files.items():
        suffix = Path(url).suffix
        if suffix != ".safetensors" or safetensors_works():
            readable.append((url, cache_folder() / f"{name}{suffix}", sha256))
    for url, path, sha256 in readable:
        if path.exists():
            return cached_file(url, path, sha256)
    url, path, sha256 = readable[0]
    return cached_file(url, path, sha256)


def safetensors_works():
    """Return True if the package safetensors, which is optional, can be imported."""
    try:
        import safetensors.torch  # noqa: F401
    except Exception:  # a broken installation raises anything
        return False
    return True


def fetch_imagenet_weights(backbone):
    """Download the ImageNet weights of a backbone to where torchvision looks for them.

    Its own download cannot be resumed, and a damaged file would end in a traceback.
    Raises ValueError.
    """
    if backbone not in torchvision.models.list_models():
        return
    url = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"].url
    target = cache_folder() / Path(url).name
    if not target.exists():
        sha256 = Path(url).stem.split("-")[-1]  # its first digits are part of the name
        download(url, target, sha256)
    cached_file(url, target)


# ---------------------------------------------------------------- classes
def coco_categories():
    """Return the 80 classes of COCO: [{"id", "name"}] in the order of their ids."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # of the ids 0 to 90
    categories = []
    for category_id, name in enumerate(names):
        if name not in ("__background__", "N/A"):
            categories.append({"id": category_id, "name": name})
    return categories


def keep_coco_classes(state, config):
    """Reduce the class heads of a published model from the ids 0 to 90 to the 80 classes of COCO.

    The ids that COCO does not use would otherwise be detected as classes without a name.

    state:  {official name: tensor}
    config: the model's arguments
    Returns the state dict of the detector with 80 classes. Raises ValueError.
    """
    ids = [category["id"] for category in coco_categories()]
    heads = [name for name in state if "class_embed." in name]
    proposal_head = None
    if config.get("two_stage"):  # the last one
        proposal_head = max(int(name.split(".")[-2]) for name in heads)
    reduced = dict(state)
    for name in heads:
        rows = list(ids)
        num_rows = 91
        if config["name"] == "detr":
            rows.append(91)  # "no object"
            num_rows = 92
        elif proposal_head is not None and int(name.split(".")[-2]) == proposal_head:
            rows[0] = 0  # its class 0 stands for "object"
        if len(state[name]) != num_rows:
            raise ValueError(f"{name} has {len(state[name])} rows, expected {num_rows}")
        reduced[name] = state[name][rows]
    return reduced
