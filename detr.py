"""DETR (arXiv 2005.12872) and Deformable DETR (arXiv 2010.04159): both detectors, their matcher, losses and weights.

Both are used the same way, in three steps, and share everything that is not their attention:

    images, padding --features--> levels --encode--> memory --decode--> {"logits", "boxes"}

Letters: B images, Q queries, C channels (hidden_dim), K classes, N decoder layers, L levels, S = sum of H*W over the
levels, T objects of an image. Masks: True = padding. Boxes inside: cxcywh in 0..1 of the unpadded image.

Given the same weights, outputs, matches and losses equal the official code's to float rounding. Departures from it:
- pixels under the padding are zeroed, so that they never matter (the official loaders put zeros there);
- costs are computed between an image's queries and its own objects only, for all layers at once;
- only the losses that are trained on are computed (no class error, no cardinality error).
"""
import argparse
import copy
import hashlib
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import box_convert

from deformable_attn import MSDeformAttn

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")


# ---------------------------------------------------------------- features: a CNN and a position for each of its cells

class Level(NamedTuple):
    """A feature map with what the transformer needs to know of its cells."""
    features: Tensor  # (B, C, H, W)
    padding: Tensor   # (B, H, W), True = padding
    position: Tensor  # (B, C, H, W)


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """Batch normalisation with constant statistics and scale, in one pass over the data instead of two."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Backbone(nn.Module):
    """ResNet; returns the maps of its last `stages` stages, finest first: strides 8, 16, 32 for three."""

    def __init__(self, name, stages, dilation, frozen_bn, weights):
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"backbone {name!r} is not one of {', '.join(BACKBONES)}")
        resnet = torchvision.models.get_model(name, weights=weights,
                                              norm_layer=FrozenBatchNorm2d if frozen_bn else nn.BatchNorm2d)
        if dilation:
            dilate(resnet.layer4)
        names = ["layer1", "layer2", "layer3", "layer4"][-stages:]
        self.channels = [64 * 2 ** i * resnet.layer1[0].expansion for i in range(4)][-stages:]
        self.strides = [4, 8, 16, 16 if dilation else 32][-stages:]
        self.body = IntermediateLayerGetter(resnet, {name: name for name in names})
        if frozen_bn:  # a pretrained network: its first, generic layers stay as they are
            for layer in (self.body.conv1, self.body.layer1):
                layer.requires_grad_(False)

    def forward(self, images):
        return list(self.body(images).values())


def dilate(stage):
    """DC5: the stage keeps its resolution; its convolutions after the first block reach twice as far instead."""
    for i, block in enumerate(stage):
        for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
            conv.stride = 1, 1
            if i > 0 and conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = 2, 2


def resize_padding(padding, features):
    """The mask of the image at the resolution of a map: (B, H, W) bool."""
    return F.interpolate(padding[:, None].float(), size=features.shape[-2:])[:, 0].bool()


def sine_position(padding, channels, centre):
    """Sine encoding of each cell's place in the unpadded image (DETR, section A.4): (B, channels, H, W).

    centre: 0 counts cells from 1 as DETR does, 0.5 takes their centres as Deformable DETR does.
    """
    frequency = 10000 ** (torch.arange(channels // 4, device=padding.device) / (channels // 4))
    parts = []
    for dim in (1, 2):  # y, then x
        count = (~padding).cumsum(dim, dtype=torch.float32)  # (B, H, W)
        last = count.narrow(dim, count.shape[dim] - 1, 1)
        angle = ((count - centre) / (last + 1e-6) * (2 * math.pi))[..., None] / frequency  # (B, H, W, channels / 4)
        parts.append(torch.stack([angle.sin(), angle.cos()], -1).flatten(3))  # sine and cosine alternate
    return torch.cat(parts, -1).permute(0, 3, 1, 2)


def flatten(levels):
    """Levels as one sequence: features (B, S, C), padding (B, S), position (B, S, C), shapes L x (H, W)."""
    features = torch.cat([level.features.flatten(2) for level in levels], 2).transpose(1, 2)
    padding = torch.cat([level.padding.flatten(1) for level in levels], 1)
    position = torch.cat([level.position.flatten(2) for level in levels], 2).transpose(1, 2)
    return features, padding, position, tuple(tuple(level.features.shape[-2:]) for level in levels)


def unflatten(features, levels):
    """The sequence (B, S, C) as maps again, with the padding and positions of `levels`."""
    parts = features.transpose(1, 2).split([level.padding[0].numel() for level in levels], 2)
    return [level._replace(features=part.view_as(level.features)) for level, part in zip(levels, parts)]


# ---------------------------------------------------------------- parts that both detectors share

class Layer(nn.Module):
    """What the four kinds of transformer layer have in common: the feed-forward network and residual updates."""

    def __init__(self, dim, dim_feedforward, dropout, norms):
        super().__init__()
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.dropout = nn.Dropout(dropout)
        for i in range(norms):
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim))

    def feed_forward(self, x):
        return self.linear2(self.dropout(F.relu(self.linear1(x))))

    def add(self, x, update, norm):
        return norm(x + self.dropout(update))


class MLP(nn.Module):
    """The box head: linear layers with ReLU between them."""

    def __init__(self, dim, out, n_layers=3):
        super().__init__()
        sizes = [dim] * n_layers + [out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Stack(nn.Module):
    """Layers under the name `layers`, as the official checkpoints have them."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def xavier_(module):
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def check_sizes(hidden_dim, nheads, multiple, **counts):
    if hidden_dim % nheads or hidden_dim % multiple:
        raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of nheads ({nheads}) and of {multiple}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


# ---------------------------------------------------------------- DETR

class DETREncoderLayer(Layer):
    """Self-attention of all cells, then the feed-forward network (DETR, section A.3)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout):
        super().__init__(dim, dim_feedforward, dropout, norms=2)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)

    def forward(self, x, position, padding):
        q = x + position
        x = self.add(x, self.self_attn(q, q, x, key_padding_mask=padding, need_weights=False)[0], self.norm1)
        return self.add(x, self.feed_forward(x), self.norm2)


class DETRDecoderLayer(Layer):
    """Self-attention of the queries, attention to all cells, feed-forward network (DETR, section A.3)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout):
        super().__init__(dim, dim_feedforward, dropout, norms=3)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)

    def forward(self, x, query_position, memory, position, padding):
        q = x + query_position
        x = self.add(x, self.self_attn(q, q, x, need_weights=False)[0], self.norm1)
        attended = self.multihead_attn(x + query_position, memory + position, memory,
                                       key_padding_mask=padding, need_weights=False)[0]
        x = self.add(x, attended, self.norm2)
        return self.add(x, self.feed_forward(x), self.norm3)


class DETR(nn.Module):
    """DETR: one level of stride 32, or 16 with dilation (DC5); softmax over K classes and "no object"."""

    focal = False  # strides: pixels between the cells of each level, finest first

    def __init__(self, num_classes, *, backbone="resnet50", dilation=False, hidden_dim=256, nheads=8, enc_layers=6,
                 dec_layers=6, dim_feedforward=2048, dropout=0.1, num_queries=100, frozen_bn=True, backbone_weights=None):
        super().__init__()
        check_sizes(hidden_dim, nheads, 4, num_classes=num_classes, num_queries=num_queries, dec_layers=dec_layers)
        self.num_queries = num_queries
        layer = hidden_dim, nheads, dim_feedforward, dropout
        self.transformer = nn.Module()
        self.transformer.encoder = Stack(DETREncoderLayer(*layer) for _ in range(enc_layers))
        self.transformer.decoder = Stack(DETRDecoderLayer(*layer) for _ in range(dec_layers))
        self.transformer.decoder.norm = nn.LayerNorm(hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)  # the last one is "no object"
        self.bbox_embed = MLP(hidden_dim, 4)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        cnn = Backbone(backbone, 1, dilation, frozen_bn, backbone_weights)
        self.strides = cnn.strides
        self.input_proj = nn.Conv2d(cnn.channels[0], hidden_dim, 1)
        self.backbone = nn.Sequential(cnn)
        xavier_(self.transformer)

    def forward(self, images, padding):
        return self.decode(self.encode(self.features(images, padding)))

    def features(self, images, padding):
        """images (B, 3, H, W) normalised, padding (B, H, W) -> [Level]."""
        x, = self.backbone(images.masked_fill(padding[:, None], 0))
        x, padding = self.input_proj(x), resize_padding(padding, x)
        return [Level(x, padding, sine_position(padding, x.shape[1], centre=0))]

    def encode(self, levels):
        """[Level] -> memory: the same levels, each cell now with the context of all others."""
        x, padding, position, _ = flatten(levels)  # (B, S, C)
        for layer in self.transformer.encoder.layers:
            x = layer(x, position, padding)
        return unflatten(x, levels)

    def decode(self, memory):
        """Memory -> {"logits": (N, B, Q, K + 1), "boxes": (N, B, Q, 4) cxcywh in 0..1}."""
        memory, padding, position, _ = flatten(memory)  # (B, S, C)
        query_position = self.query_embed.weight.expand(len(memory), -1, -1)  # (B, Q, C)
        x, states = torch.zeros_like(query_position), []
        for layer in self.transformer.decoder.layers:
            x = layer(x, query_position, memory, position, padding)
            states.append(self.transformer.decoder.norm(x))
        states = torch.stack(states)  # (N, B, Q, C)
        return {"logits": self.class_embed(states), "boxes": self.bbox_embed(states).float().sigmoid()}


# ---------------------------------------------------------------- Deformable DETR

class DeformableEncoderLayer(Layer):
    """Every cell attends to a few points of each level around itself (Deformable DETR, section 4.1)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout, n_levels, n_points):
        super().__init__(dim, dim_feedforward, dropout, norms=2)
        self.self_attn = MSDeformAttn(dim, n_levels, nheads, n_points)

    def forward(self, x, position, reference, shapes, padding):
        x = self.add(x, self.self_attn(x + position, reference, x, shapes, padding), self.norm1)
        return self.add(x, self.feed_forward(x), self.norm2)


class DeformableDecoderLayer(Layer):
    """Self-attention of the queries, attention to a few points around each one's reference, feed-forward network."""

    def __init__(self, dim, nheads, dim_feedforward, dropout, n_levels, n_points):
        super().__init__(dim, dim_feedforward, dropout, norms=3)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.cross_attn = MSDeformAttn(dim, n_levels, nheads, n_points)

    def forward(self, x, query_position, reference, memory, shapes, padding):
        q = x + query_position
        x = self.add(x, self.self_attn(q, q, x, need_weights=False)[0], self.norm2)  # norm1 is the next one's, officially
        x = self.add(x, self.cross_attn(x + query_position, reference, memory, shapes, padding), self.norm1)
        return self.add(x, self.feed_forward(x), self.norm3)


class DeformableDETR(nn.Module):
    """Deformable DETR: `num_feature_levels` levels of stride 8, 16, 32, 64 … (one: 32, or 16 with dilation); sigmoid scores.

    with_box_refine: each decoder layer has heads of its own and corrects the boxes of the layer before (section A.4).
    two_stage: the encoder's best cells propose the queries and their first boxes (section A.4).
    """

    focal = True

    def __init__(self, num_classes, *, backbone="resnet50", dilation=False, hidden_dim=256, nheads=8, enc_layers=6,
                 dec_layers=6, dim_feedforward=1024, dropout=0.1, num_queries=300, frozen_bn=True, backbone_weights=None,
                 num_feature_levels=4, enc_n_points=4, dec_n_points=4, with_box_refine=False, two_stage=False):
        super().__init__()
        check_sizes(hidden_dim, nheads, 32, num_classes=num_classes, num_queries=num_queries, dec_layers=dec_layers,
                    num_feature_levels=num_feature_levels, enc_n_points=enc_n_points, dec_n_points=dec_n_points)
        if two_stage and not with_box_refine:
            raise ValueError("two_stage needs with_box_refine")
        self.with_box_refine, self.two_stage, self.num_queries = with_box_refine, two_stage, num_queries
        layer = hidden_dim, nheads, dim_feedforward, dropout, num_feature_levels
        self.transformer = transformer = nn.Module()
        transformer.level_embed = nn.Parameter(torch.empty(num_feature_levels, hidden_dim))
        transformer.encoder = Stack(DeformableEncoderLayer(*layer, enc_n_points) for _ in range(enc_layers))
        transformer.decoder = Stack(DeformableDecoderLayer(*layer, dec_n_points) for _ in range(dec_layers))
        if two_stage:
            transformer.enc_output = nn.Linear(hidden_dim, hidden_dim)
            transformer.enc_output_norm = nn.LayerNorm(hidden_dim)
            transformer.pos_trans = nn.Linear(hidden_dim * 2, hidden_dim * 2)
            transformer.pos_trans_norm = nn.LayerNorm(hidden_dim * 2)
        else:
            transformer.reference_points = nn.Linear(hidden_dim, 2)
            nn.init.zeros_(transformer.reference_points.bias)
        xavier_(transformer)
        for module in transformer.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(transformer.level_embed)
        self._make_heads(nn.Linear(hidden_dim, num_classes), MLP(hidden_dim, 4), dec_layers)
        if not two_stage:
            self.query_embed = nn.Embedding(num_queries, hidden_dim * 2)  # position and content
        cnn = Backbone(backbone, min(num_feature_levels, 3), dilation, frozen_bn, backbone_weights)
        channels = [*cnn.channels, cnn.channels[-1], *[hidden_dim] * num_feature_levels][:num_feature_levels]
        extra = num_feature_levels - len(cnn.channels)
        self.strides = cnn.strides + [cnn.strides[-1] * 2 ** (i + 1) for i in range(extra)]
        self.input_proj = nn.ModuleList()
        for i, c in enumerate(channels):  # levels beyond the CNN's: its last one, halved again and again
            conv = nn.Conv2d(c, hidden_dim, 1) if i < len(cnn.channels) else nn.Conv2d(c, hidden_dim, 3, 2, 1)
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
            groups = min(32, hidden_dim // 2)  # 32 as officially; of two channels at least, for a map may have one cell
            self.input_proj.append(nn.Sequential(conv, nn.GroupNorm(groups, hidden_dim)))
        self.backbone = nn.Sequential(cnn)

    def _make_heads(self, class_head, box_head, dec_layers):
        """One pair of heads for all layers, or with refinement one for each (and one for the proposals)."""
        nn.init.constant_(class_head.bias, -math.log(99))  # every score starts at 0.01, as focal loss wants it
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)
        n = dec_layers + self.two_stage
        if not self.with_box_refine:
            self.class_embed, self.bbox_embed = nn.ModuleList([class_head] * n), nn.ModuleList([box_head] * n)
        else:
            self.class_embed = nn.ModuleList(copy.deepcopy(class_head) for _ in range(n))
            self.bbox_embed = nn.ModuleList(copy.deepcopy(box_head) for _ in range(n))
            self.transformer.decoder.bbox_embed = self.bbox_embed  # the official checkpoints have them under both names
        if self.two_stage:
            self.transformer.decoder.class_embed = self.class_embed
        else:
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)  # first boxes of about a tenth of the image

    def forward(self, images, padding):
        return self.decode(self.encode(self.features(images, padding)))

    def features(self, images, padding):
        """images (B, 3, H, W) normalised, padding (B, H, W) -> [Level], finest first."""
        maps, levels = self.backbone(images.masked_fill(padding[:, None], 0)), []
        for i, project in enumerate(self.input_proj):
            source = maps[i] if i < len(maps) else maps[-1] if i == len(maps) else levels[-1].features
            x = project(source)
            mask = resize_padding(padding, x)
            position = sine_position(mask, x.shape[1], centre=0.5) + self.transformer.level_embed[i][:, None, None]
            levels.append(Level(x, mask, position))
        return levels

    def encode(self, levels):
        """[Level] -> memory: the same levels, each cell now with the context of others."""
        x, padding, position, shapes = flatten(levels)  # (B, S, C)
        reference = cell_centres(levels)[:, :, None] * valid_ratios(levels)[:, None]  # (B, S, L, 2)
        for layer in self.transformer.encoder.layers:
            x = layer(x, position, reference, shapes, padding)
        return unflatten(x, levels)

    def decode(self, memory):
        """Memory -> {"logits": (N, B, Q, K), "boxes": (N, B, Q, 4) cxcywh in 0..1}, and the proposals if two-stage.

        Two-stage adds "proposal_logits" (B, S, K) and "proposal_boxes" (B, S, 4).
        """
        levels, ratios = memory, valid_ratios(memory).repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        memory, padding, _, shapes = flatten(levels)  # (B, S, C)
        outputs = {}
        if self.two_stage:
            x, query_position, reference, outputs = self._propose(memory, padding, levels)
        else:
            query_position, x = self.query_embed.weight.expand(len(memory), -1, -1).chunk(2, -1)  # (B, Q, C) each
            reference = self.transformer.reference_points(query_position).float().sigmoid()  # (B, Q, 2)
        logits, boxes = [], []
        for layer, class_embed, bbox_embed in zip(self.transformer.decoder.layers, self.class_embed, self.bbox_embed):
            scaled = reference[:, :, None] * ratios[..., :reference.shape[-1]]  # (B, Q, L, 2 or 4)
            x = layer(x, query_position, scaled, memory, shapes, padding)
            start = F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))  # points have no size to start from
            logits.append(class_embed(x))
            boxes.append((bbox_embed(x) + start).sigmoid())
            if self.with_box_refine:
                reference = boxes[-1].detach()
        return {"logits": torch.stack(logits), "boxes": torch.stack(boxes), **outputs}

    def _propose(self, memory, padding, levels):
        """Two-stage: every cell proposes a box around itself; the best become the queries (section A.4)."""
        centres = cell_centres(levels)  # (B, S, 2)
        size = torch.cat([torch.full_like(level.padding[0].flatten(), 0.05 * 2 ** i, dtype=torch.float32)
                          for i, level in enumerate(levels)])  # (S,)
        anchors = torch.cat([centres, size[:, None].expand_as(centres)], -1)  # (B, S, 4)
        unusable = (padding | ((anchors <= 0.01) | (anchors >= 0.99)).any(-1))[..., None]  # (B, S, 1)
        anchors = torch.log(anchors / (1 - anchors)).masked_fill(unusable, math.inf)
        x = self.transformer.enc_output_norm(self.transformer.enc_output(memory.masked_fill(unusable, 0)))
        logits = self.class_embed[-1](x)  # (B, S, K); class 0 stands for "object" here
        boxes = self.bbox_embed[-1](x) + anchors
        best = logits[..., 0].topk(min(self.num_queries, boxes.shape[1]), dim=1).indices[..., None]  # (B, Q, 1)
        chosen = boxes.gather(1, best.expand(-1, -1, 4)).detach()  # (B, Q, 4), before the sigmoid
        reference = chosen.sigmoid()
        query = self.transformer.pos_trans_norm(self.transformer.pos_trans(sine_boxes(reference, memory.shape[-1] // 2)))
        query_position, content = query.chunk(2, -1)
        return content, query_position, reference, {"proposal_logits": logits, "proposal_boxes": boxes.sigmoid()}


def valid_ratios(levels):
    """Share of each level's width and height that is image, not padding: (B, L, 2)."""
    return torch.stack([torch.stack([(~level.padding[:, 0]).float().mean(1), (~level.padding[:, :, 0]).float().mean(1)], -1)
                        for level in levels], 1)


def cell_centres(levels):
    """Centre of every cell, x and y in 0..1 of the unpadded image: (B, S, 2)."""
    centres = []
    for level, ratio in zip(levels, valid_ratios(levels).unbind(1)):
        (H, W), device = level.padding.shape[-2:], level.padding.device
        y, x = torch.meshgrid((torch.arange(H, device=device) + 0.5) / H, (torch.arange(W, device=device) + 0.5) / W,
                              indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1) / ratio[:, None])  # (B, H*W, 2)
    return torch.cat(centres, 1)


def sine_boxes(boxes, channels):
    """Sine encoding of boxes in 0..1, `channels` for each coordinate: (B, Q, 4) -> (B, Q, 4 * channels)."""
    frequency = 10000 ** (torch.arange(channels // 2, device=boxes.device) / (channels // 2))
    angle = boxes[..., None] * (2 * math.pi) / frequency  # (B, Q, 4, channels / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(2)


def inverse_sigmoid(x, eps=1e-5):
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


DETECTORS = {"detr": DETR, "deformable_detr": DeformableDETR}


def build_detector(name, num_classes, **options):
    """The detector "detr" or "deformable_detr"; options are the official argument names, see the two classes.

    num_classes counts the labels 0..num_classes-1 (the official COCO models have 91: the largest category id + 1).
    Raises ValueError for a value that no model can be built with.
    """
    if name not in DETECTORS:
        raise ValueError(f"model {name!r} is not one of {', '.join(DETECTORS)}")
    return DETECTORS[name](num_classes, **options)


# ---------------------------------------------------------------- matching and losses (DETR, section 3.1)

COSTS = {"class": 1.0, "bbox": 5.0, "giou": 2.0}  # of the matching; the class term counts double with focal loss
NO_OBJECT = 0.1  # weight of the "no object" class, which nearly all queries have
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


def generalized_iou(a, b):
    """Generalised IoU of boxes cxcywh, elementwise with broadcasting: (..., 4), (..., 4) -> (...)."""
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    inter = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).prod(-1)
    union = area_a + area_b - inter
    return inter / union - (hull - union) / hull


@torch.no_grad()
def matching_costs(logits, boxes, labels, target_boxes, focal):
    """Cost of giving object t to query q, for all layers and images: (N, B, Q, T).

    logits (N, B, Q, K), boxes (N, B, Q, 4), labels (B, T), target_boxes (B, T, 4), padded to the same T.
    """
    index = labels[None, :, None].expand(len(logits), -1, logits.shape[2], -1)  # (N, B, Q, T)
    if focal:
        p = logits.sigmoid().gather(-1, index)
        cost_class = 2 * (ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log() - (1 - ALPHA) * p ** GAMMA * -(1 - p + 1e-8).log())
    else:
        cost_class = -logits.softmax(-1).gather(-1, index)
    cost_bbox = torch.cdist(boxes, target_boxes[None].expand(len(boxes), -1, -1, -1), p=1)
    cost_giou = -generalized_iou(boxes[..., None, :], target_boxes[:, None])
    return COSTS["class"] * cost_class + COSTS["bbox"] * cost_bbox + COSTS["giou"] * cost_giou


def match(logits, boxes, labels, target_boxes, counts, focal):
    """Optimal assignment of queries to objects in every layer and image.

    Shapes as in `matching_costs`; counts: the number of objects of each image. Returns four index tensors over all
    pairs, layer, image, query, object; every layer has the same number of pairs. Raises FloatingPointError if the
    predictions are not finite.
    """
    costs = matching_costs(logits.float(), boxes.float(), labels, target_boxes, focal).cpu().numpy()  # the one copy to the host
    pairs = []
    for layer, per_image in enumerate(costs):
        for image, count in enumerate(counts):
            cost = per_image[image, :, :count]
            if not np.isfinite(cost).all():
                raise FloatingPointError("the model's boxes or scores are NaN or infinite")
            query, target = linear_sum_assignment(cost)
            pairs.append(np.stack([np.full_like(query, layer), np.full_like(query, image), query, target]))
    return torch.from_numpy(np.concatenate(pairs, 1)).to(logits.device, non_blocking=True).unbind(0)


def loss_counts(targets, num_queries, focal):
    """What the losses of a batch are divided by: {"objects", "queries": their weights, summed}. Counts of parts of a batch add up."""
    objects = sum(len(target["labels"]) for target in targets)
    matched = sum(min(len(target["labels"]), num_queries) for target in targets)
    return {"objects": objects, "queries": objects if focal else matched + NO_OBJECT * (num_queries * len(targets) - matched)}


def set_losses(logits, boxes, targets, focal, totals=None):
    """Losses of all layers against the same targets: {"loss_ce", "loss_bbox", "loss_giou"}, each (N,).

    logits (N, B, Q, K), boxes (N, B, Q, 4); targets: per image {"labels": (T,), "boxes": (T, 4) cxcywh in 0..1}, best
    left on the host. Class term: cross-entropy with "no object", or focal loss; the others over matched pairs only.
    totals: the `loss_counts` of a larger batch that this one is a part of, greater than 0.
    """
    N, B, Q, K = logits.shape
    counts = [len(target["labels"]) for target in targets]
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True).to(logits.device)  # (B, T)
    target_boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True).to(logits.device)  # (B, T, 4)
    layer, image, query, target = match(logits, boxes, labels, target_boxes, counts, focal)
    totals = totals or {name: max(count, 1) for name, count in loss_counts(targets, Q, focal).items()}
    num_boxes, num_queries = totals["objects"], totals["queries"]
    if focal:
        wanted = torch.zeros_like(logits)
        wanted[layer, image, query, labels[image, target]] = 1
        ce = torchvision.ops.sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA).sum((1, 2, 3)) / num_queries
    else:
        wanted = torch.full((N, B, Q), K - 1, device=logits.device)
        wanted[layer, image, query] = labels[image, target]
        weight = logits.new_ones(K)
        weight[-1] = NO_OBJECT
        ce = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none").view(N, -1).sum(1)
        ce = ce / num_queries
    ours, theirs = boxes[layer, image, query], target_boxes[image, target]  # (pairs, 4)
    bbox = (ours - theirs).abs().view(N, -1).sum(1) / num_boxes
    giou = (1 - generalized_iou(ours, theirs)).view(N, -1).sum(1) / num_boxes
    return {"loss_ce": ce, "loss_bbox": bbox, "loss_giou": giou}


def detection_losses(outputs, targets, focal, totals=None):
    """Every loss of a decoder's outputs, unweighted, by name: {"loss_…": (N,)}; "loss_…_enc": (1,) for proposals.

    totals: as for `set_losses`.
    """
    losses = set_losses(outputs["logits"], outputs["boxes"], targets, focal, totals)
    if "proposal_logits" in outputs:  # proposals tell objects from background only: every object has label 0
        objects = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        proposals = set_losses(outputs["proposal_logits"][None], outputs["proposal_boxes"][None], objects, focal, totals)
        losses.update({f"{name}_enc": loss for name, loss in proposals.items()})
    return losses


def loss_weights(focal):
    """The official weights of the losses, by name."""
    return {"loss_ce": 2.0 if focal else 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def total_loss(losses, weights):
    """The weighted sum over losses and layers that is minimised; a proposal's loss has the weight of its kind."""
    return sum(weights[name.removesuffix("_enc")] * loss.sum() for name, loss in losses.items())


@torch.no_grad()
def detections(outputs, sizes, focal, top=100):
    """The last layer's outputs as detections: per image {"scores": (n,), "labels": (n,), "boxes": (n, 4) xyxy pixels}.

    sizes: (height, width) of each image in the pixels wanted. DETR: one detection a query; focal: the best `top`
    pairs of query and class, best first.
    """
    logits, boxes = outputs["logits"][-1].float(), outputs["boxes"][-1].float()
    if focal:
        scores, index = logits.sigmoid().flatten(1).topk(min(top, logits[0].numel()))
        labels, query = index % logits.shape[-1], index // logits.shape[-1]
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    else:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    scale = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32).to(boxes.device)
    boxes = box_convert(boxes, "cxcywh", "xyxy") * scale[:, None]
    return [{"scores": s, "labels": l, "boxes": b} for s, l, b in zip(scores, labels, boxes)]


# ---------------------------------------------------------------- weights from elsewhere

def load_checkpoint(path):
    """A checkpoint as a dict, by path or URL; only tensors and plain values are loaded, nothing is executed.

    Raises ValueError naming the file if there is none or it is not a checkpoint.
    """
    if "://" in str(path):
        key = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # many files are called checkpoint.pth
        target = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{Path(str(path)).name}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(str(path), str(target))
            except OSError as error:
                raise ValueError(f"{path}: cannot be downloaded ({error})") from None
        path = target
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # torch does not compare the checksums
            raise ValueError(f"checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official files keep their arguments in one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path}: not a checkpoint of tensors and plain values, or damaged "
                         f"({error if isinstance(error, ValueError) else type(error).__name__})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


COUNTER = "num_batches_tracked"  # batch norm has it, frozen batch norm has not
PARTS = {"backbone": ("backbone.",), "encoder": ("input_proj.", "transformer.level_embed", "transformer.encoder."),
         "decoder": ("",)}  # of a detector, by the beginnings of names: whatever is left belongs to the decoder


def part_of(name):
    """The part of a detector that a parameter or buffer belongs to: "backbone", "encoder" or "decoder"."""
    return next(part for part, beginnings in PARTS.items() if name.startswith(beginnings))


def load_weights(model, path, parts=None):
    """Start `model`, or parts of it, from a checkpoint of the same architecture, trained on any number of classes.

    Accepts the official checkpoints ({"model": state}), those of train.py, and bare state dicts. parts: of PARTS, by
    default those that are in the file. Returns (parts taken, parts not taken, names that were dropped: class heads of
    another number of classes). Raises ValueError if anything else does not fit, or a part is not in the file.
    """
    checkpoint = load_checkpoint(path)
    state, own = checkpoint.get("ema") or checkpoint.get("model", checkpoint), model.state_dict()  # averages, as eval.py takes them
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no weights under \"model\"")
    there = {part_of(name) for name in state if name in own or not parts}
    parts = parts or [part for part in PARTS if part in there]
    lacking = [part for part in parts if part not in there]
    if lacking or not parts:
        raise ValueError(f"{path}: has no weights of the {' and '.join(lacking) or 'model'}")

    def relevant(names):
        return [name for name in names if part_of(name) in parts and not name.endswith(COUNTER)]
    dropped = [name for name in relevant(state) if "class_embed" in name and name in own
               and state[name].shape != own[name].shape and state[name].shape[1:] == own[name].shape[1:]]
    problems = [f"missing {name}" for name in relevant(own) if name not in state]
    problems += [f"unexpected {name}" for name in relevant(state) if name not in own]
    problems += [f"{name} is {tuple(state[name].shape)}, the model's {tuple(own[name].shape)}" for name in relevant(own)
                 if name in state and name not in dropped and state[name].shape != own[name].shape]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        made = checkpoint.get("detector")
        kind = f", a {made['name']} with {made.get('backbone')}" if isinstance(made, dict) and "name" in made else ""
        raise ValueError(f"{path}{kind}, does not fit this model: {'; '.join(problems[:4])}{more}. Build the model with the flags it was "
                         "trained with, or take the parts that fit: --init_parts.")
    model.load_state_dict({name: tensor for name, tensor in state.items() if part_of(name) in parts and name not in dropped},
                          strict=False)
    return parts, [part for part in PARTS if part not in parts], dropped
