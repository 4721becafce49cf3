"""Deterministic weights and inputs for the golden files in this folder.

The files hold what the official DETR and Deformable DETR code computes (evaluation mode, float32,
CPU) when its parameters are filled by `fill` and its inputs are `images()` and `targets()`. Weights
are not stored: any model whose state dict has the same names and shapes is filled the same way.
Each file contains
  config                   JSON: the model's arguments under the official names
  state                    JSON: names of parameters and buffers -> shapes
  pred_logits, pred_boxes  (B, Q, K), (B, Q, 4) of the last decoder layer; aux_logits, aux_boxes:
                           (layers - 1, ...); enc_* for two-stage
  match_src_i, match_tgt_i per image i, from the official matcher on the last layer
  losses                   JSON: every unweighted loss; total: their weighted sum
  grad_norms               JSON: L2 norm of the gradient of `total` for each parameter with one
  post_scores, post_labels, post_boxes: the official postprocessing, for `ORIGINAL_SIZES`
"""

import json
import zlib

import numpy as np
import torch

SIZES = [(96, 128), (80, 112), (96, 96)]  # height, width; the batch is padded to 96 x 128
ORIGINAL_SIZES = [(480, 640), (400, 560), (960, 960)]
RESIDUAL = ("out_proj.weight", "output_proj.weight", "linear2.weight")
RANGES = {  # of vectors and query embeddings, by the end of their name; the first that fits
    "running_var": (0.5, 1.5),
    "query_embed.weight": (-2, 2),
    "bn3.weight": (0.1, 0.3),
    "weight": (0.8, 1.2),
    "sampling_offsets.bias": (-3, 3),
    "": (-0.1, 0.1),
}


def fill(state_dict):
    """Overwrite every floating-point tensor of a state dict in place, by its name and shape."""
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            continue
        shape = tuple(tensor.shape)
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        if len(shape) > 1 and not name.endswith("query_embed.weight"):
            values = rng.uniform(-1, 1, shape) * np.sqrt(gain(name, shape) / np.prod(shape[1:]))
        else:
            low, high = value_range(name)
            values = rng.uniform(low, high, shape)
        tensor.copy_(torch.from_numpy(values).to(tensor.dtype))


def gain(name, shape):
    """Return the gain of a weight matrix or convolution."""
    if name.endswith(RESIDUAL):  # small updates keep the queries apart
        return 0.3
    if len(shape) == 4:
        return 6
    if "attn" in name or "bbox_embed" in name:
        return 12
    return 3


def value_range(name):
    """Return the smallest and largest value of a tensor in RANGES."""
    for ending, low_and_high in RANGES.items():
        if name.endswith(ending):
            return low_and_high


def images():
    """Return three images (3, 3, 96, 128) float32 and their padding (3, 96, 128)."""
    batch = torch.zeros(3, 3, 96, 128)
    padding = torch.ones(3, 96, 128, dtype=torch.bool)
    for i, (h, w) in enumerate(SIZES):
        rng = np.random.RandomState(i)
        coarse = rng.uniform(-2, 2, (3, h // 16, w // 16))  # structure: positions differ
        blocks = np.kron(coarse, np.ones((16, 16)))
        batch[i, :, :h, :w] = torch.from_numpy(blocks + rng.uniform(-0.3, 0.3, (3, h, w))).float()
        padding[i, :h, :w] = False
    return batch, padding


def targets(num_classes):
    """Return targets with five, three and no objects: labels and boxes cxcywh in 0..1."""
    targets = []
    for i, n in enumerate((5, 3, 0)):
        rng = np.random.RandomState(100 + i)
        center = rng.uniform(0.2, 0.8, (n, 2))
        size = rng.uniform(0.05, 0.35, (n, 2))
        boxes = torch.from_numpy(np.concatenate([center, size], 1)).float().reshape(n, 4)
        labels = torch.from_numpy(rng.randint(0, num_classes, n))
        targets.append({"labels": labels, "boxes": boxes})
    return targets


def load(path):
    """Load a golden file as a dict: JSON entries decoded, arrays as tensors."""
    golden = {}
    with np.load(path) as data:
        for name in data.files:
            value = data[name]
            if value.dtype.kind == "U":
                golden[name] = json.loads(str(value))
            else:
                golden[name] = torch.from_numpy(value)
    return golden
