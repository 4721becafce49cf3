"""Deterministic weights and inputs behind the files beside this one.

They hold what the official DETR and Deformable DETR code computes (evaluation mode, float32, CPU)
when its parameters are filled by `fill` and it is given `images()` and `targets()`. Weights are not
stored: any model whose state dict has the same names and shapes is filled the same way. Each holds
  config                   JSON: the model's arguments under the official names
  state                    JSON: parameter and buffer names -> shapes
  pred_logits, pred_boxes  (B, Q, K), (B, Q, 4) of the last decoder layer; aux_logits, aux_boxes:
                           (layers-1, ...); enc_* for two-stage
  match_src_i, match_tgt_i per image i, from the official matcher on the last layer
  losses                   JSON: every unweighted loss; total: their weighted sum
  grad_norms               JSON: L2 norm of the gradient of `total` for each parameter with one
  post_scores, post_labels, post_boxes: the official post-processing, for image sizes `SIZES`
"""

import json
import zlib

import numpy as np
import torch

SIZES = [(96, 128), (80, 112), (96, 96)]  # height, width; the batch is padded to 96 x 128
ORIGINAL_SIZES = [(480, 640), (400, 560), (960, 960)]
RESIDUAL = ("out_proj.weight", "output_proj.weight", "linear2.weight")
RANGES = {"running_var": (0.5, 1.5), "query_embed.weight": (-2, 2), "bn3.weight": (0.1, 0.3)}
RANGES |= {"weight": (0.8, 1.2), "sampling_offsets.bias": (-3, 3), "": (-0.1, 0.1)}


def fill(state_dict):
    """Overwrite every floating tensor of a state dict in place, from its name and shape alone."""
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            continue
        rng, shape = np.random.RandomState(zlib.crc32(name.encode())), tuple(tensor.shape)
        if len(shape) > 1 and not name.endswith("query_embed.weight"):
            gain = 6 if len(shape) == 4 else 12 if "attn" in name or "bbox_embed" in name else 3
            if name.endswith(RESIDUAL):  # small updates: queries stay apart
                gain = 0.3
            values = rng.uniform(-1, 1, shape) * np.sqrt(gain / np.prod(shape[1:]))
        else:
            fitting = next(ending for ending in RANGES if name.endswith(ending))
            values = rng.uniform(*RANGES[fitting], shape)
        tensor.copy_(torch.from_numpy(values).to(tensor.dtype))


def images():
    """Three images (3, 3, 96, 128) float32 and their padding (3, 96, 128), True = padding."""
    batch, padding = torch.zeros(3, 3, 96, 128), torch.ones(3, 96, 128, dtype=torch.bool)
    for i, (h, w) in enumerate(SIZES):
        rng = np.random.RandomState(i)
        coarse = rng.uniform(-2, 2, (3, h // 16, w // 16))  # structure, so that places differ
        blocks = np.kron(coarse, np.ones((16, 16)))
        batch[i, :, :h, :w] = torch.from_numpy(blocks + rng.uniform(-0.3, 0.3, (3, h, w))).float()
        padding[i, :h, :w] = False
    return batch, padding


def targets(num_classes):
    """Five, three and no objects: labels below num_classes, boxes cxcywh in 0..1."""
    out = []
    for i, n in enumerate((5, 3, 0)):
        rng = np.random.RandomState(100 + i)
        centre, size = rng.uniform(0.2, 0.8, (n, 2)), rng.uniform(0.05, 0.35, (n, 2))
        boxes = torch.from_numpy(np.concatenate([centre, size], 1)).float().reshape(n, 4)
        out.append({"labels": torch.from_numpy(rng.randint(0, num_classes, n)), "boxes": boxes})
    return out


def load(path):
    """A golden file as a dict: JSON entries decoded, arrays as tensors."""
    with np.load(path) as data:
        return {
            k: json.loads(str(data[k])) if data[k].dtype.kind == "U" else torch.from_numpy(data[k])
            for k in data.files
        }
