"""DETR (arXiv 2005.12872) and Deformable DETR (arXiv 2010.04159): two detectors, one criterion.

Both detectors are used in the same three steps and share everything except their attention:

    images, padding --features--> levels --encode--> memory --decode--> {"logits", "boxes"}

Shapes: B images, Q queries, C channels (hidden_dim), N decoder layers, L levels, T objects in an
image, S = sum of H*W over the levels, K classes. DETR has K + 1 logits, the last for "no object".
Padding masks are True at padding. Boxes are cxcywh in 0..1 of the image without its padding;
detections leave as xyxy in pixels.

Given the same weights, outputs, matches, losses and gradient norms agree with those of the official
code to rounding. It differs from the official code in three ways:
- pixels under the padding are set to zero, so that they never matter (official loaders do that);
- matching costs are computed for all decoder layers at once, and only between the queries of an
  image and its own objects;
- only the losses that are trained on are computed (no class error, no cardinality error).
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d, box_convert, sigmoid_focal_loss

from deformable_attn import MSDeformAttn


# ---------------------------------------------------------------- backbone
class Backbone(nn.Module):
    """A ResNet that returns the feature maps of its last stages.

    name:       "resnet18", "resnet34", "resnet50" or "resnet101"
    num_stages: number of maps, 1 to 4: 1 returns stride 32; 3 return strides 8, 16 and 32
    dilation:   keep the resolution of the last stage, stride 16 instead of 32 (DC5)
    frozen_bn:  freeze batch normalization and the first layers, for pretrained weights
    weights:    pretrained weights by torchvision's name, "IMAGENET1K_V1", or None

    Attributes: channels and strides of the maps, finest first.
    """

    def __init__(self, name, num_stages, dilation, frozen_bn, weights):
        super().__init__()
        norm_layer = FrozenBatchNorm2d if frozen_bn else nn.BatchNorm2d
        resnet = torchvision.models.get_model(name, weights=weights, norm_layer=norm_layer)
        expansion = resnet.layer1[0].expansion  # 4 for ResNet-50 and ResNet-101, else 1
        channels = [64 * expansion, 128 * expansion, 256 * expansion, 512 * expansion]
        strides = [4, 8, 16, 32]
        if dilation:
            dilate_last_stage(resnet)
            strides[-1] = 16
        self.channels = channels[-num_stages:]
        self.strides = strides[-num_stages:]
        stages = ["layer1", "layer2", "layer3", "layer4"][-num_stages:]
        self.body = IntermediateLayerGetter(resnet, {stage: stage for stage in stages})
        if frozen_bn:  # the first layers of a pretrained network are generic: they are kept
            self.body.conv1.requires_grad_(False)
            self.body.layer1.requires_grad_(False)

    def forward(self, images):
        """Return the maps [(B, channels, H / stride, W / stride)] of images (B, 3, H, W)."""
        return list(self.body(images).values())


def dilate_last_stage(resnet):
    """Let the last stage of a ResNet keep its resolution and reach twice as far instead."""
    for name, module in resnet.layer4.named_modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            in_first_block = name.startswith("0.")  # its input has the usual resolution
            if module.kernel_size == (3, 3) and not in_first_block:
                module.dilation = (2, 2)
                module.padding = (2, 2)


BACKBONES = {
    "resnet18": Backbone,
    "resnet34": Backbone,
    "resnet50": Backbone,
    "resnet101": Backbone,
}


def build_backbone(name, num_stages, dilation, frozen_bn, weights):
    """Build a backbone by its name in BACKBONES; the arguments are those of Backbone.

    Raises ValueError for an unknown name.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is not one of {', '.join(BACKBONES)}")
    return BACKBONES[name](name, num_stages, dilation, frozen_bn, weights)


# ---------------------------------------------------------------- levels and positions
class FeatureLevel(NamedTuple):
    """A feature map and what the transformer needs to know about its cells."""

    features: Tensor  # (B, C, H, W)
    padding: Tensor  # (B, H, W), True = padding
    position: Tensor  # (B, C, H, W), encoding of each cell's position

    def with_features(self, features):
        """Return this level with other features (B, C, H, W) of the same cells."""
        return FeatureLevel(features, self.padding, self.position)


class FlatLevels(NamedTuple):
    """The cells of all levels as one sequence."""

    features: Tensor  # (B, S, C)
    padding: Tensor  # (B, S), True = padding
    position: Tensor  # (B, S, C)
    shapes: tuple  # (H, W) of each level


def sine_embedding(x, channels):
    """Encode numbers in 0..1 by interleaved sines and cosines: (...) -> (..., channels)."""
    wavelength = 10000 ** (torch.arange(channels // 2, device=x.device) / (channels // 2))
    angle = x[..., None] * (2 * math.pi) / wavelength
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def sine_position(padding, channels, offset):
    """Encode the position of each cell in its image without the padding (DETR, section A.4).

    padding: (B, H, W)
    offset:  0: cells are numbered from 1 (DETR); 0.5: a position is a center (Deformable DETR)
    Returns (B, channels, H, W): half of the channels for y, then half for x.
    """
    parts = []
    for dim in (1, 2):  # y, then x
        number = (~padding).cumsum(dim, dtype=torch.float32)  # (B, H, W): 1, 2, 3 …
        fraction = (number - offset) / (number.amax(dim, keepdim=True) + 1e-6)
        parts.append(sine_embedding(fraction, channels // 2))
    return torch.cat(parts, -1).permute(0, 3, 1, 2)


def make_level(features, padding, offset):
    """Build a FeatureLevel from a map.

    features: (B, C, h, w)
    padding:  (B, H, W), of the images
    offset:   see sine_position
    """
    size = features.shape[-2:]
    level_padding = F.interpolate(padding[:, None].float(), size=size)[:, 0].bool()  # (B, h, w)
    position = sine_position(level_padding, features.shape[1], offset)
    return FeatureLevel(features, level_padding, position)


def flatten_levels(levels):
    """Join the cells of all levels: [FeatureLevel] -> FlatLevels."""
    features = torch.cat([level.features.flatten(2) for level in levels], 2).transpose(1, 2)
    padding = torch.cat([level.padding.flatten(1) for level in levels], 1)
    position = torch.cat([level.position.flatten(2) for level in levels], 2).transpose(1, 2)
    shapes = tuple(tuple(level.features.shape[-2:]) for level in levels)
    return FlatLevels(features, padding, position, shapes)


def unflatten_levels(features, levels):
    """Return `levels` with new features, given as one sequence (B, S, C)."""
    sizes = [level.padding[0].numel() for level in levels]
    parts = features.transpose(1, 2).split(sizes, 2)  # (B, C, H*W) of each level
    new_levels = []
    for level, part in zip(levels, parts):
        new_levels.append(level.with_features(part.view_as(level.features)))
    return new_levels


def to_float32(levels):
    """Convert features from mixed precision to float32, for the decoder, the tasks and the losses.

    Their matrices are so small that converting them to bf16 costs more time than it saves.
    """
    return [level.with_features(level.features.float()) for level in levels]


# ---------------------------------------------------------------- what both detectors share
class TransformerLayer(nn.Module):
    """Base class of all encoder and decoder layers: feed-forward network and residual updates."""

    def __init__(self, dim, dim_feedforward, dropout):
        super().__init__()
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def ffn(self, x):
        """Apply the feed-forward network."""
        return self.linear2(self.dropout(F.relu(self.linear1(x))))

    def add_norm(self, x, update, norm):
        """Add an update to x, after dropout, and normalize the sum."""
        return norm(x + self.dropout(update))


class MLP(nn.Module):
    """The box head: three linear layers with ReLU between them."""

    def __init__(self, dim):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def forward(self, x):
        """Predict boxes (..., 4), before their sigmoid, from queries or cells x (..., dim)."""
        x = F.relu(self.layers[0](x))
        x = F.relu(self.layers[1](x))
        return self.layers[2](x)


def layer_stack(layers):
    """Put layers under the name "layers", as in the official checkpoints."""
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


def init_weights(transformer):
    """Initialize matrices after Xavier, and deformable attention in its own way."""
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in transformer.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()


class Detector(nn.Module):
    """Base class of both detectors, which define `features`, `encode` and `decode`.

    Both take these arguments, with their official names:
    num_classes:      K; labels are 0..K-1
    backbone:         a name in BACKBONES
    hidden_dim:       C, channels of the transformer
    nheads:           attention heads
    enc_layers, dec_layers: numbers of transformer layers
    dim_feedforward:  hidden channels of the feed-forward networks
    dropout:          in the transformer, 0..1
    num_queries:      Q, the largest number of objects that can be found in an image
    dilation, frozen_bn, backbone_weights: see Backbone
    aux_loss:         train all decoder layers, not only the last one

    Attributes:
    focal:     True: scores are sigmoids, trained with the focal loss; False: a softmax
    strides:   pixels between the cells of each level, finest first
    criterion: the losses
    """

    def __init__(self, hidden_dim, nheads, divisor, aux_loss):
        super().__init__()
        if hidden_dim % nheads or hidden_dim % divisor:
            message = f"must be divisible by nheads ({nheads}) and by {divisor}"
            raise ValueError(f"hidden_dim ({hidden_dim}) {message}")
        self.hidden_dim = hidden_dim
        self.criterion = Criterion(self.focal, aux_loss)

    def forward(self, images, padding):
        """Detect objects in images (B, 3, H, W) with padding (B, H, W); see `decode`."""
        return self.decode(self.encode(self.features(images, padding)))

    @torch.no_grad()
    def postprocess(self, outputs, sizes, max_dets=100):
        """Turn the outputs of the last decoder layer into detections.

        outputs:  what `decode` returns
        sizes:    (height, width) of each image in pixels
        max_dets: detections per image with sigmoid scores, where any pair of a query and a class
                  may be one; with a softmax each query is one detection
        Returns for each image a dict of scores (n,), labels (n,), boxes (n, 4), which are xyxy in
        pixels, and queries (n,), the index of each detection's query. Sigmoid scores are sorted,
        best first.
        """
        logits = outputs["logits"][-1].float()  # (B, Q, K), or (B, Q, K + 1) with a softmax
        boxes = outputs["boxes"][-1].float()  # (B, Q, 4)
        B, Q, K = logits.shape
        if self.focal:
            n = min(max_dets, Q * K)
            scores, pairs = logits.sigmoid().flatten(1).topk(n)  # (B, n)
            labels = pairs % K
            queries = pairs // K
            boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))  # (B, n, 4)
        else:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # without "no object": (B, Q)
            queries = torch.arange(Q, device=logits.device).expand(B, Q)
        scale = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32)
        boxes = box_convert(boxes, "cxcywh", "xyxy") * scale.to(boxes.device)[:, None]
        detections = []
        for i in range(B):
            detection = {
                "scores": scores[i],
                "labels": labels[i],
                "boxes": boxes[i],
                "queries": queries[i],
            }
            detections.append(detection)
        return detections


# ---------------------------------------------------------------- DETR
class DETREncoderLayer(TransformerLayer):
    """Self-attention of all cells, then the feed-forward network (DETR, section A.3)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout):
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)

    def forward(self, x, position, padding):
        """Update the cells x (B, S, C); position (B, S, C), padding (B, S)."""
        q = x + position
        attended, _ = self.self_attn(q, q, x, key_padding_mask=padding, need_weights=False)
        x = self.add_norm(x, attended, self.norm1)
        return self.add_norm(x, self.ffn(x), self.norm2)


class DETRDecoderLayer(TransformerLayer):
    """Self-attention of the queries, attention to all cells, feed-forward (DETR, section A.3)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout):
        super().__init__(dim, dim_feedforward, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)

    def forward(self, x, query_position, memory, position, padding):
        """Update the queries x (B, Q, C) from the memory (B, S, C).

        query_position: (B, Q, C)
        position:       (B, S, C), of the memory
        padding:        (B, S), of the memory
        """
        q = x + query_position
        attended, _ = self.self_attn(q, q, x, need_weights=False)
        x = self.add_norm(x, attended, self.norm1)
        q = x + query_position
        k = memory + position
        attended, _ = self.multihead_attn(
            q, k, memory, key_padding_mask=padding, need_weights=False
        )
        x = self.add_norm(x, attended, self.norm2)
        return self.add_norm(x, self.ffn(x), self.norm3)


class DETR(Detector):
    """DETR: one level of stride 32, or 16 with dilation (DC5); a softmax over K + 1 logits."""

    focal = False

    def __init__(
        self,
        num_classes,
        *,
        backbone="resnet50",
        hidden_dim=256,
        nheads=8,
        enc_layers=6,
        dec_layers=6,
        dim_feedforward=2048,
        dropout=0.1,
        num_queries=100,
        dilation=False,
        frozen_bn=True,
        backbone_weights=None,
        aux_loss=True,
    ):
        divisor = 4  # positions are sines and cosines of y and x
        super().__init__(hidden_dim, nheads, divisor, aux_loss)
        cnn = build_backbone(backbone, 1, dilation, frozen_bn, backbone_weights)
        self.strides = cnn.strides
        self.backbone = nn.Sequential(cnn)
        self.input_proj = nn.Conv2d(cnn.channels[0], hidden_dim, 1)
        self.transformer = nn.Module()
        self.transformer.encoder = layer_stack(
            DETREncoderLayer(hidden_dim, nheads, dim_feedforward, dropout)
            for _ in range(enc_layers)
        )
        self.transformer.decoder = layer_stack(
            DETRDecoderLayer(hidden_dim, nheads, dim_feedforward, dropout)
            for _ in range(dec_layers)
        )
        self.transformer.decoder.norm = nn.LayerNorm(hidden_dim)
        init_weights(self.transformer)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)  # the last one is "no object"
        self.bbox_embed = MLP(hidden_dim)

    def features(self, images, padding):
        """Compute the projected feature map of a batch.

        images:  (B, 3, H, W), normalized
        padding: (B, H, W)
        Returns [FeatureLevel], a single one.
        """
        maps = self.backbone(images.masked_fill(padding[:, None], 0))
        return [make_level(self.input_proj(maps[0]), padding, offset=0)]

    def encode(self, levels):
        """Return the memory: the same levels, after attention between their cells."""
        cells = flatten_levels(levels)
        x = cells.features  # (B, S, C)
        for layer in self.transformer.encoder.layers:
            x = layer(x, cells.position, cells.padding)
        return unflatten_levels(x, levels)

    def decode(self, memory):
        """Find objects in the memory [FeatureLevel].

        Returns {"logits": (N, B, Q, K + 1), "boxes": (N, B, Q, 4)}; boxes are cxcywh in 0..1.
        """
        cells = flatten_levels(memory)
        B = len(cells.features)
        query_position = self.query_embed.weight.expand(B, -1, -1)  # (B, Q, C)
        x = torch.zeros_like(query_position)
        layer_states = []
        for layer in self.transformer.decoder.layers:
            x = layer(x, query_position, cells.features, cells.position, cells.padding)
            layer_states.append(self.transformer.decoder.norm(x))
        states = torch.stack(layer_states)  # (N, B, Q, C)
        logits = self.class_embed(states)
        boxes = self.bbox_embed(states).float().sigmoid()
        return {"logits": logits, "boxes": boxes}


# ---------------------------------------------------------------- Deformable DETR
class DeformableEncoderLayer(TransformerLayer):
    """Every cell attends to a few points of each level (Deformable DETR, section 4.1)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout, n_levels, n_points):
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = MSDeformAttn(dim, n_levels, nheads, n_points)

    def forward(self, x, position, reference, shapes, padding):
        """Update the cells x (B, S, C).

        position:  (B, S, C)
        reference: (B, S, L, 2), each cell's own center, x and y in 0..1 of each padded level
        shapes:    (H, W) of each level
        padding:   (B, S)
        """
        attended = self.self_attn(x + position, reference, x, shapes, padding)
        x = self.add_norm(x, attended, self.norm1)
        return self.add_norm(x, self.ffn(x), self.norm2)


class DeformableDecoderLayer(TransformerLayer):
    """Self-attention of the queries, attention to a few points around each one's reference."""

    def __init__(self, dim, nheads, dim_feedforward, dropout, n_levels, n_points):
        super().__init__(dim, dim_feedforward, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.cross_attn = MSDeformAttn(dim, n_levels, nheads, n_points)

    def forward(self, x, query_position, reference, memory, shapes, padding):
        """Update the queries x (B, Q, C) from the memory (B, S, C).

        query_position: (B, Q, C)
        reference:      (B, Q, L, 2) points or (B, Q, L, 4) boxes, in 0..1 of each padded level
        shapes:         (H, W) of each level
        padding:        (B, S), of the memory
        """
        q = x + query_position
        attended, _ = self.self_attn(q, q, x, need_weights=False)
        x = self.add_norm(x, attended, self.norm2)  # official numbers: norm2, norm1, norm3
        attended = self.cross_attn(x + query_position, reference, memory, shapes, padding)
        x = self.add_norm(x, attended, self.norm1)
        return self.add_norm(x, self.ffn(x), self.norm3)


class Queries(NamedTuple):
    """The initial queries of Deformable DETR's decoder."""

    content: Tensor  # (B, Q, C)
    position: Tensor  # (B, Q, C)
    reference: Tensor  # (B, Q, 2) points, or (B, Q, 4) boxes cxcywh, in 0..1


class DeformableDETR(Detector):
    """Deformable DETR: several levels; sigmoid scores of K classes.

    Takes these arguments in addition to those of both detectors:
    num_feature_levels: L; one level has stride 32 (16 with dilation), two have strides 16 and 32,
                        three 8 to 32, four 8 to 64, …
    enc_n_points, dec_n_points: sampling points per head and level
    with_box_refine:    each layer has its own heads and corrects the boxes of the layer before it
                        (section A.4)
    two_stage:          the best cells of the encoder propose the queries and their first boxes
                        (section A.4)
    """

    focal = True

    def __init__(
        self,
        num_classes,
        *,
        backbone="resnet50",
        hidden_dim=256,
        nheads=8,
        enc_layers=6,
        dec_layers=6,
        dim_feedforward=1024,
        dropout=0.1,
        num_queries=300,
        dilation=False,
        frozen_bn=True,
        backbone_weights=None,
        num_feature_levels=4,
        enc_n_points=4,
        dec_n_points=4,
        with_box_refine=False,
        two_stage=False,
        aux_loss=True,
    ):
        divisor = 32  # the groups of the normalization in make_input_proj
        super().__init__(hidden_dim, nheads, divisor, aux_loss)
        if two_stage and not with_box_refine:
            raise ValueError("two_stage requires with_box_refine")
        self.num_queries = num_queries
        self.with_box_refine = with_box_refine
        self.two_stage = two_stage

        num_stages = min(num_feature_levels, 3)
        cnn = build_backbone(backbone, num_stages, dilation, frozen_bn, backbone_weights)
        self.backbone = nn.Sequential(cnn)
        self.strides = list(cnn.strides)
        self.input_proj = nn.ModuleList()
        for channels in cnn.channels:
            self.input_proj.append(make_input_proj(channels, hidden_dim, kernel=1, stride=1))
        channels = cnn.channels[-1]
        for _ in range(num_stages, num_feature_levels):  # coarser levels, see `features`
            self.input_proj.append(make_input_proj(channels, hidden_dim, kernel=3, stride=2))
            self.strides.append(self.strides[-1] * 2)
            channels = hidden_dim

        self.transformer = nn.Module()
        self.transformer.level_embed = nn.Parameter(torch.empty(num_feature_levels, hidden_dim))
        self.transformer.encoder = layer_stack(
            DeformableEncoderLayer(
                hidden_dim, nheads, dim_feedforward, dropout, num_feature_levels, enc_n_points
            )
            for _ in range(enc_layers)
        )
        self.transformer.decoder = layer_stack(
            DeformableDecoderLayer(
                hidden_dim, nheads, dim_feedforward, dropout, num_feature_levels, dec_n_points
            )
            for _ in range(dec_layers)
        )
        if two_stage:  # turn the proposals of the encoder into queries
            self.transformer.enc_output = nn.Linear(hidden_dim, hidden_dim)
            self.transformer.enc_output_norm = nn.LayerNorm(hidden_dim)
            self.transformer.pos_trans = nn.Linear(hidden_dim * 2, hidden_dim * 2)
            self.transformer.pos_trans_norm = nn.LayerNorm(hidden_dim * 2)
        else:  # learned queries: position and content, and a reference point from the position
            self.query_embed = nn.Embedding(num_queries, hidden_dim * 2)
            self.transformer.reference_points = nn.Linear(hidden_dim, 2)
            nn.init.zeros_(self.transformer.reference_points.bias)
        init_weights(self.transformer)
        nn.init.normal_(self.transformer.level_embed)
        self.transformer.level_embed.requires_grad_(enc_layers > 0)  # only the encoder uses it
        self._add_heads(num_classes, dec_layers)

    def _add_heads(self, num_classes, dec_layers):
        """Add the class and box heads of the decoder layers and, two-stage, of the proposals."""
        class_head = nn.Linear(self.hidden_dim, num_classes)
        box_head = MLP(self.hidden_dim)
        nn.init.constant_(class_head.bias, -math.log(99))  # scores start at 0.01, for focal loss
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)
        num_heads = dec_layers + 1 if self.two_stage else dec_layers
        self.class_embed = nn.ModuleList()
        self.bbox_embed = nn.ModuleList()
        for _ in range(num_heads):
            if self.with_box_refine:  # every layer has its own heads
                self.class_embed.append(copy.deepcopy(class_head))
                self.bbox_embed.append(copy.deepcopy(box_head))
            else:  # all layers share one pair
                self.class_embed.append(class_head)
                self.bbox_embed.append(box_head)
        if self.with_box_refine:  # official checkpoints hold them under both names
            self.transformer.decoder.bbox_embed = self.bbox_embed
        if self.two_stage:
            self.transformer.decoder.class_embed = self.class_embed
        else:  # the first boxes have about a tenth of the image's sides
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)

    def features(self, images, padding):
        """Compute the projected feature maps of a batch.

        images:  (B, 3, H, W), normalized
        padding: (B, H, W)
        Returns [FeatureLevel], finest first.
        """
        maps = self.backbone(images.masked_fill(padding[:, None], 0))
        projected = []
        for i, projection in enumerate(self.input_proj):
            if i < len(maps):  # a map of the backbone
                source = maps[i]
            elif i == len(maps):  # the first coarser level: the backbone's last map, halved
                source = maps[-1]
            else:  # a further one: the level before it, halved again
                source = projected[-1]
            projected.append(projection(source))
        levels = []
        for i, projected_map in enumerate(projected):
            level = make_level(projected_map, padding, offset=0.5)
            position = level.position + self.transformer.level_embed[i][:, None, None]
            levels.append(FeatureLevel(level.features, level.padding, position))
        return levels

    def encode(self, levels):
        """Return the memory: the same levels, after attention between their cells."""
        cells = flatten_levels(levels)
        centers = torch.cat(cell_centers(levels), 1)  # (B, S, 2)
        reference = centers[:, :, None] * valid_ratios(levels)[:, None]  # (B, S, L, 2)
        x = cells.features  # (B, S, C)
        for layer in self.transformer.encoder.layers:
            x = layer(x, cells.position, reference, cells.shapes, cells.padding)
        return unflatten_levels(x, levels)

    def decode(self, memory):
        """Find objects in the memory [FeatureLevel].

        Returns {"logits": (N, B, Q, K), "boxes": (N, B, Q, 4)}; boxes are cxcywh in 0..1.
        Two-stage adds "proposal_logits" (B, S, K) and "proposal_boxes" (B, S, 4).
        """
        cells = flatten_levels(memory)
        if self.two_stage:
            proposal_logits, raw_boxes = self._propose(cells, memory)  # boxes before the sigmoid
            queries = self._proposed_queries(proposal_logits, raw_boxes)
        else:
            queries = self._learned_queries(len(cells.features))
        ratios = valid_ratios(memory).repeat(1, 1, 2)[:, None]  # (B, 1, L, 4): x, y, w, h
        x = queries.content
        reference = queries.reference
        logits = []
        boxes = []
        for i, layer in enumerate(self.transformer.decoder.layers):
            n = reference.shape[-1]  # 4 for boxes, 2 for points, which have no width and height
            # from 0..1 of the image to 0..1 of each padded level
            level_reference = reference[:, :, None] * ratios[..., :n]  # (B, Q, L, n)
            x = layer(
                x, queries.position, level_reference, cells.features, cells.shapes, cells.padding
            )
            logits.append(self.class_embed[i](x))
            # the head corrects the reference, before the sigmoid; a point has no width and height:
            # theirs start at the bias of the head, -2.0 (see _add_heads)
            start = F.pad(inverse_sigmoid(reference), (0, 4 - n))  # (B, Q, 4)
            boxes.append((start + self.bbox_embed[i](x)).sigmoid())
            if self.with_box_refine:  # gradients do not flow back into the layer before
                reference = boxes[-1].detach()
        outputs = {"logits": torch.stack(logits), "boxes": torch.stack(boxes)}
        if self.two_stage:
            outputs["proposal_logits"] = proposal_logits
            outputs["proposal_boxes"] = raw_boxes.sigmoid()
        return outputs

    def _learned_queries(self, batch_size):
        """Return the learned queries, the same for every image."""
        embedding = self.query_embed.weight.expand(batch_size, -1, -1)  # (B, Q, 2C)
        position, content = embedding.chunk(2, -1)
        reference = self.transformer.reference_points(position).float().sigmoid()  # (B, Q, 2)
        return Queries(content, position, reference)

    def _propose(self, cells, memory):
        """Let every cell propose a box around itself (section A.4).

        cells:  FlatLevels, the same cells as in memory, [FeatureLevel]
        Returns (B, S, K) logits, whose class 0 stands for "object" here, and (B, S, 4) boxes cxcywh
        before their sigmoid.
        """
        anchors_per_level = []
        for i, centers in enumerate(cell_centers(memory)):  # (B, H*W, 2)
            size = torch.full_like(centers, 0.05 * 2**i)  # boxes of 0.05, 0.1, 0.2 … of the image
            anchors_per_level.append(torch.cat([centers, size], -1))
        anchors = torch.cat(anchors_per_level, 1)  # (B, S, 4)
        near_border = ((anchors <= 0.01) | (anchors >= 0.99)).any(-1)
        unusable = (cells.padding | near_border)[..., None]  # (B, S, 1)
        x = self.transformer.enc_output(cells.features.masked_fill(unusable, 0))
        x = self.transformer.enc_output_norm(x)
        logits = self.class_embed[-1](x)
        # an unusable anchor is a box of the whole image after the sigmoid: 1, 1, 1, 1
        boxes = self.bbox_embed[-1](x) + anchors.logit().masked_fill(unusable, math.inf)
        return logits, boxes

    def _proposed_queries(self, logits, boxes):
        """Turn the best proposals into queries; logits and boxes as `_propose` returns them."""
        num_queries = min(self.num_queries, boxes.shape[1])
        best = logits[..., 0].topk(num_queries, dim=1).indices  # (B, Q)
        best_boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))  # (B, Q, 4)
        reference = best_boxes.detach().sigmoid()
        embedding = sine_embedding(reference, self.hidden_dim // 2).flatten(2)  # (B, Q, 2C)
        queries = self.transformer.pos_trans_norm(self.transformer.pos_trans(embedding))
        position, content = queries.chunk(2, -1)
        return Queries(content, position, reference)


def make_input_proj(channels, dim, kernel, stride):
    """Build the projection of a map with `channels` channels to `dim` channels."""
    conv = nn.Conv2d(channels, dim, kernel, stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    groups = min(32, dim // 2)  # officially 32; at least two channels each: a map may be one cell
    return nn.Sequential(conv, nn.GroupNorm(groups, dim))


def valid_ratios(levels):
    """Return the fraction of each level's width and height that is image: (B, L, 2) in 0..1."""
    ratios = []
    for level in levels:
        inside = (~level.padding).float()  # (B, H, W)
        width = inside[:, 0].mean(1)  # of the first row
        height = inside[:, :, 0].mean(1)  # of the first column
        ratios.append(torch.stack([width, height], -1))
    return torch.stack(ratios, 1)


def cell_centers(levels):
    """Return the centers of all cells per level, x and y in 0..1 of the image: [(B, H*W, 2)]."""
    centers = []
    for level, ratio in zip(levels, valid_ratios(levels).unbind(1)):
        H, W = level.padding.shape[1:]
        y = (torch.arange(H, device=ratio.device) + 0.5) / H
        x = (torch.arange(W, device=ratio.device) + 0.5) / W
        grid = torch.cartesian_prod(y, x).flip(-1)  # (H*W, 2)
        centers.append(grid / ratio[:, None])
    return centers


def inverse_sigmoid(x, eps=1e-5):
    """Compute the logit as the official code does.

    torch.logit rounds differently, which would change the published results.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


DETECTORS = {"detr": DETR, "deformable_detr": DeformableDETR}
MUST_BE_POSITIVE = (
    "num_classes",
    "num_queries",
    "dec_layers",
    "num_feature_levels",
    "enc_n_points",
    "dec_n_points",
)


def build_detector(name, num_classes, **options):
    """Build a detector.

    name:        "detr" or "deformable_detr"
    num_classes: labels are below it (91 in the official COCO models: the largest category id + 1)
    options:     the other arguments of DETR or DeformableDETR
    Raises ValueError for a value that no model can be built with.
    """
    if name not in DETECTORS:
        raise ValueError(f"model {name!r} is not one of {', '.join(DETECTORS)}")
    for key, value in {"num_classes": num_classes, **options}.items():
        if key in MUST_BE_POSITIVE and value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")
    return DETECTORS[name](num_classes, **options)


# ---------------------------------------------------------------- matching and losses
# Weights of the costs in the matching
COST_CLASS = 1.0
COST_CLASS_FOCAL = 2.0  # with the focal cost of Deformable DETR
COST_BBOX = 5.0
COST_GIOU = 2.0
# Weights of the losses
LOSS_CLASS = 1.0
LOSS_CLASS_FOCAL = 2.0  # with the focal loss of Deformable DETR
LOSS_BBOX = 5.0
LOSS_GIOU = 2.0
# Weight of "no object" in the cross-entropy (official: eos_coef), as nearly all queries have it
NO_OBJECT_WEIGHT = 0.1
# Focal loss (arXiv 1708.02002)
ALPHA = 0.25
GAMMA = 2.0


class Criterion:
    """Bipartite matching, and the losses of the matched pairs (DETR, section 3.1).

    focal:    True: sigmoid scores with focal loss (Deformable DETR); False: softmax with a class
              "no object" (DETR)
    aux_loss: True: losses of all N decoder layers; False: only of the last one (N is 1 below)

    It has no parameters, so it is not an nn.Module.

    `weights` holds the weight of each loss in the sum that is trained on. Targets are a dict for
    each image: "labels" (T,) and "boxes" (T, 4), cxcywh in 0..1; they may stay on the CPU.
    """

    def __init__(self, focal, aux_loss=True):
        self.focal = focal
        self.aux_loss = aux_loss
        loss_class = LOSS_CLASS_FOCAL if focal else LOSS_CLASS
        self.weights = {"loss_ce": loss_class, "loss_bbox": LOSS_BBOX, "loss_giou": LOSS_GIOU}
        for name in list(self.weights):  # the losses of two-stage proposals weigh the same
            self.weights[f"{name}_enc"] = self.weights[name]

    def __call__(self, outputs, targets, num_boxes=None):
        """Compute the unweighted losses of a decoder's outputs.

        outputs:   what `decode` returns
        targets:   [{"labels", "boxes"}] of the images
        num_boxes: number that box losses and focal loss are divided by; default: all objects
        Returns {"loss_ce", "loss_bbox", "loss_giou": (N,)}; two-stage adds those of the proposals,
        {"loss_…_enc": (1,)}.
        """
        logits = outputs["logits"]
        boxes = outputs["boxes"]
        if not self.aux_loss:
            logits = logits[-1:]
            boxes = boxes[-1:]
        losses = self.layer_losses(logits, boxes, targets, num_boxes)
        if "proposal_logits" in outputs:
            proposal_logits = outputs["proposal_logits"][None]  # like those of a single layer
            proposal_boxes = outputs["proposal_boxes"][None]
            objects = []  # proposals separate objects from background: every object has label 0
            for target in targets:
                labels = torch.zeros_like(target["labels"])
                objects.append({"labels": labels, "boxes": target["boxes"]})
            proposal_losses = self.layer_losses(proposal_logits, proposal_boxes, objects, num_boxes)
            for name, loss in proposal_losses.items():
                losses[f"{name}_enc"] = loss
        return losses

    def layer_losses(self, logits, boxes, targets, num_boxes=None):
        """Compute the losses of all layers against the same targets (DETR, equation 2).

        logits: (N, B, Q, K), or (N, B, Q, K + 1) with a softmax
        boxes:  (N, B, Q, 4)
        targets, num_boxes: see `__call__`
        Returns {"loss_ce", "loss_bbox", "loss_giou": (N,)}. The class loss covers all queries, the
        box losses cover matched queries.
        """
        N = len(logits)
        counts = [len(target["labels"]) for target in targets]
        if num_boxes is None:
            num_boxes = sum(counts)
        num_boxes = max(num_boxes, 1)
        # (B, T) and (B, T, 4), padded to the T of the image with the most objects
        labels, target_boxes = pad_targets(targets, logits.device)
        # index tensors (pairs,): query q of layer n and image b is matched to object t, …
        layer, image, query, obj = self.match(logits, boxes, labels, target_boxes, counts)

        matched_labels = labels[image, obj]  # (pairs,)
        if self.focal:
            target_scores = torch.zeros_like(logits)  # all zeros for a query without an object
            target_scores[layer, image, query, matched_labels] = 1
            focal_loss = sigmoid_focal_loss(logits, target_scores, ALPHA, GAMMA)  # (N, B, Q, K)
            loss_ce = focal_loss.sum((1, 2, 3)) / num_boxes
        else:
            no_object = logits.shape[-1] - 1
            target_classes = torch.full(logits.shape[:-1], no_object, device=logits.device)
            target_classes[layer, image, query] = matched_labels
            class_weights = logits.new_ones(no_object + 1)
            class_weights[no_object] = NO_OBJECT_WEIGHT
            # F.cross_entropy wants the classes in second place: (N, K + 1, B, Q)
            cross_entropy = F.cross_entropy(
                logits.movedim(-1, 1), target_classes, class_weights, reduction="none"
            )  # (N, B, Q)
            loss_ce = cross_entropy.sum((1, 2)) / class_weights[target_classes].sum((1, 2))

        pred_boxes = boxes[layer, image, query]  # (pairs, 4), sorted by layer
        true_boxes = target_boxes[image, obj]  # (pairs, 4)
        # every layer has the same number of pairs: view(N, -1) gives it a row of its own
        loss_bbox = (pred_boxes - true_boxes).abs().view(N, -1).sum(1) / num_boxes
        loss_giou = (1 - generalized_iou(pred_boxes, true_boxes)).view(N, -1).sum(1) / num_boxes
        return {"loss_ce": loss_ce, "loss_bbox": loss_bbox, "loss_giou": loss_giou}

    def match(self, logits, boxes, labels, target_boxes, counts):
        """Match queries to objects with the Hungarian algorithm (DETR, equation 1).

        logits, boxes, labels, target_boxes: see `matching_costs`
        counts: number of objects in each image, without the padding to T
        Returns four index tensors (pairs,): layer, image, query, object. They are sorted by layer,
        and every layer has the same number of pairs.
        Raises FloatingPointError if the predictions are not finite.
        """
        costs = self.matching_costs(logits.float(), boxes.float(), labels, target_boxes)
        costs = costs.cpu().numpy()  # the only copy to the CPU: a GPU is waited for once
        layers = []
        images = []
        queries = []
        objects = []
        for layer in range(costs.shape[0]):
            for image in range(costs.shape[1]):
                cost = costs[layer, image, :, : counts[image]]  # without padded objects
                if not np.isfinite(cost).all():
                    raise FloatingPointError("predicted boxes or scores contain NaN or Inf")
                query, obj = linear_sum_assignment(cost)  # the Hungarian algorithm
                layers += [layer] * len(query)
                images += [image] * len(query)
                queries += query.tolist()
                objects += obj.tolist()
        pairs = torch.tensor([layers, images, queries, objects], dtype=torch.int64)
        return pairs.to(logits.device).unbind(0)

    @torch.no_grad()
    def matching_costs(self, logits, boxes, labels, target_boxes):
        """Compute the cost of matching each query to each object, for all layers and images.

        logits:       (N, B, Q, K), or (N, B, Q, K + 1) with a softmax
        boxes:        (N, B, Q, 4)
        labels:       (B, T), padded to the largest number of objects
        target_boxes: (B, T, 4), padded likewise
        Returns (N, B, Q, T).
        """
        N, B, Q, _ = logits.shape
        index = labels[None, :, None].expand(N, -1, Q, -1)  # (N, B, Q, T): each object's class
        if self.focal:
            p = logits.sigmoid().gather(-1, index)  # (N, B, Q, T)
            positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
            negative = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
            cost_class = COST_CLASS_FOCAL * (positive - negative)
        else:
            cost_class = COST_CLASS * -logits.softmax(-1).gather(-1, index)
        cost_bbox = torch.cdist(boxes, target_boxes.expand(N, -1, -1, -1), p=1)
        # (N, B, Q, 1, 4) against (B, 1, T, 4)
        cost_giou = -generalized_iou(boxes[..., None, :], target_boxes[:, None])
        return cost_class + COST_BBOX * cost_bbox + COST_GIOU * cost_giou


def pad_targets(targets, device):
    """Return labels (B, T) and boxes (B, T, 4) of all images, padded with zeros to the same T."""
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True)
    return labels.to(device), boxes.to(device)


def generalized_iou(a, b):
    """Compute the generalized IoU (arXiv 1902.09630) of boxes cxcywh: (..., 4) -> (...).

    Elementwise with broadcasting.
    """
    a_min, a_max = box_convert(a, "cxcywh", "xyxy").split(2, -1)  # corners (..., 2)
    b_min, b_max = box_convert(b, "cxcywh", "xyxy").split(2, -1)
    area_sum = (a_max - a_min).prod(-1) + (b_max - b_min).prod(-1)
    intersection = (torch.min(a_max, b_max) - torch.max(a_min, b_min)).clamp(min=0).prod(-1)
    union = area_sum - intersection
    enclosing = (torch.max(a_max, b_max) - torch.min(a_min, b_min)).prod(-1)
    return intersection / union - (enclosing - union) / enclosing
