"""DETR (arXiv 2005.12872) and Deformable DETR (arXiv 2010.04159): both detectors, one criterion.

Both are used the same way, in three steps, and share everything that is not their attention:

    images, padding --features--> levels --encode--> memory --decode--> {"logits", "boxes"}

B images, Q queries, C channels (hidden_dim), K classes, N decoder layers, L levels, T objects of
an image, S = sum of H*W over the levels. Masks: True = padding. Boxes: cxcywh in 0..1 of the
unpadded image; detections leave as xyxy in pixels.

Given the same weights, outputs, matches, losses and norms of gradients equal the official code's
to rounding. Departures from it:
- pixels under the padding are zeroed, so that they never matter (the official loaders do that);
- costs are computed between an image's queries and its own objects only, for all layers at once;
- only the losses that are trained on are computed (no class error, no cardinality error).
"""

import copy
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d, box_convert

from deformable_attn import MSDeformAttn

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BACKBONES = RESNETS + tuple(f"{name}-{how}" for how in ("circular", "patches") for name in RESNETS)


# ---------------------------------------------------------------- features: CNN and positions
class FeatureLevel(NamedTuple):
    """A feature map with what the transformer needs to know of its cells."""

    features: Tensor  # (B, C, H, W)
    padding: Tensor  # (B, H, W), True = padding
    position: Tensor  # (B, C, H, W)


def convolve_and_normalise(conv, norm, x):
    """A convolution and the frozen batch normalisation behind it, in one pass over the map."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class Backbone(nn.Module):
    """ResNet; returns the maps of its last `stages` stages, finest first: strides 8, 16, 32.
    Two variants show what it carries into a map beside the content of a cell. "…-circular": what is
    beyond a border is the opposite side instead of zeros, which tell where a cell is. "…-patches":
    each square that becomes a cell of the last map goes through it alone. They are for DETR."""

    def __init__(self, name, stages, dilation, frozen_bn, weights):
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"backbone {name!r} is not one of {', '.join(BACKBONES)}")
        name, _, self.variant = name.partition("-")
        norm = FrozenBatchNorm2d if frozen_bn else nn.BatchNorm2d
        resnet = torchvision.models.get_model(name, weights=weights, norm_layer=norm)
        if dilation:  # DC5: the last stage is not halved, its later blocks reach twice as far
            for place, module in resnet.layer4.named_modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = 1, 1
                    if module.kernel_size == (3, 3) and not place.startswith("0."):
                        module.dilation = module.padding = 2, 2
        names = ["layer1", "layer2", "layer3", "layer4"][-stages:]
        self.channels = [64 * 2**i * resnet.layer1[0].expansion for i in range(4)][-stages:]
        self.strides = [4, 8, 16, 16 if dilation else 32][-stages:]
        self.body = IntermediateLayerGetter(resnet, {name: name for name in names})
        if frozen_bn:  # a pretrained network: its first, generic layers stay as they are
            for layer in (self.body.conv1, self.body.layer1):
                layer.requires_grad_(False)
            # every convolution does the normalisation behind it
            convs = (x for x in self.body.modules() if isinstance(x, nn.Conv2d))
            norms = (x for x in self.body.modules() if isinstance(x, FrozenBatchNorm2d))
            for conv, norm in zip(convs, norms, strict=True):
                conv.forward = functools.partial(convolve_and_normalise, conv, norm)
                norm.forward = nn.Identity().forward
        for module in self.body.modules() if self.variant == "circular" else ():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
                p = module.padding if isinstance(module.padding, int) else module.padding[0]
                module.padding = (0, 0)
                module.register_forward_pre_hook(functools.partial(wrap, 4 * (p,)))

    def forward(self, images):  # (B, 3, H, W)
        if self.variant != "patches":
            return list(self.body(images).values())
        s, (B, _, H, W) = self.strides[-1], images.shape
        images = F.pad(images, (0, -W % s, 0, -H % s))
        h, w = (n // s for n in images.shape[2:])
        x = images.unflatten(3, (w, s)).unflatten(2, (h, s))  # (B, 3, h, s, w, s)
        maps = self.body(x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)).values()  # (B h w, C, s/k, s/k)
        maps = (x.unflatten(0, (B, h, w)).permute(0, 3, 1, 4, 2, 5) for x in maps)
        maps = (x.flatten(4, 5).flatten(2, 3) for x in maps)
        return [x[..., : -(-H // k), : -(-W // k)] for x, k in zip(maps, self.strides)]


def wrap(sides, module, inputs):
    """A hook before a layer: pads its input with the opposite sides."""
    return F.pad(inputs[0], sides, mode="circular")


def sine_embedding(x, channels):
    """Sine encoding of numbers in 0..1, sine and cosine by turns: (...) -> (..., channels)."""
    frequency = 10000 ** (torch.arange(channels // 2, device=x.device) / (channels // 2))
    angle = x[..., None] * (2 * math.pi) / frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def sine_position(padding, channels, centre):
    """Each cell's place in the unpadded image (DETR, A.4): (B, H, W) -> (B, channels, H, W).
    centre: 0 counts cells from 1, as DETR does; 0.5 takes centres, as Deformable DETR does."""
    parts = []
    for dim in (1, 2):  # y, then x
        count = (~padding).cumsum(dim, dtype=torch.float32)  # (B, H, W)
        share = (count - centre) / (count.amax(dim, keepdim=True) + 1e-6)
        parts.append(sine_embedding(share, channels // 2))
    return torch.cat(parts, -1).permute(0, 3, 1, 2)


def make_level(features, padding, centre):
    """A map (B, C, h, w) with the images' padding (B, H, W) at its resolution and its positions."""
    padding = F.interpolate(padding[:, None].float(), size=features.shape[-2:])[:, 0].bool()
    return FeatureLevel(features, padding, sine_position(padding, features.shape[1], centre))


def flatten_levels(levels):
    """Levels as one sequence: features (B, S, C), padding (B, S), position (B, S, C), sizes."""
    features = torch.cat([level.features.flatten(2) for level in levels], 2).transpose(1, 2)
    padding = torch.cat([level.padding.flatten(1) for level in levels], 1)
    position = torch.cat([level.position.flatten(2) for level in levels], 2).transpose(1, 2)
    return features, padding, position, tuple(tuple(x.features.shape[-2:]) for x in levels)


def unflatten_levels(features, levels):
    """The sequence (B, S, C) as maps again, with the padding and positions of `levels`."""
    parts = features.transpose(1, 2).split([level.padding[0].numel() for level in levels], 2)
    return [x._replace(features=part.view_as(x.features)) for x, part in zip(levels, parts)]


def to_float32(levels):
    """Levels behind mixed precision in fp32, for the decoder, the tasks and the losses: there, the
    matrices are so small that converting them costs more than it saves."""
    return [level._replace(features=level.features.float()) for level in levels]


# ---------------------------------------------------------------- parts that both share
class Dropout(nn.Dropout):
    """Dropout from 16 random bits an element, on a CPU. Drawing nn.Dropout's takes a single thread
    there, and took a seventh of a training step of Deformable DETR."""

    def forward(self, x):
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),))
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # four of an int64
        keep = bits >= round(self.p * 2**16) - 2**15
        return x * keep.to(x.dtype).div_(1 - self.p)


class Layer(nn.Module):
    """What all transformer layers have in common: feed-forward network and residual updates."""

    def __init__(self, dim, dim_feedforward, dropout, norms):
        super().__init__()
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.dropout = Dropout(dropout)
        for i in range(norms):
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim))

    def feed_forward(self, x):
        return self.linear2(self.dropout(F.relu(self.linear1(x))))

    def add(self, x, update, norm):
        return norm(x + self.dropout(update))


class MLP(nn.Module):
    """The box head: three linear layers with ReLU between them."""

    def __init__(self, dim):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, out) for out in (dim, dim, 4))

    def forward(self, x):
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


def layer_stack(layers):
    """Layers under the name `layers`, as the official checkpoints have them."""
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


class Detector(nn.Module):
    """Both detectors define features, encode, decode, and focal: whether scores are sigmoids.
    strides: pixels between the cells of each level, finest first; criterion: the losses."""

    def __init__(self, hidden_dim, nheads, factor, aux_loss):
        super().__init__()
        if hidden_dim % nheads or hidden_dim % factor:
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of {nheads} and {factor}")
        self.criterion = Criterion(self.focal, aux_loss)

    def forward(self, images, padding):
        return self.decode(self.encode(self.features(images, padding)))

    @torch.no_grad()
    def postprocess(self, outputs, sizes, top=100):
        """Detections of the last layer, per image {"scores" (n,), "labels" (n,), "boxes" (n, 4),
        "queries" (n,): which one found it}. Boxes are xyxy in pixels of `sizes`, the (height,
        width) of each image. Softmax gives one detection a query; sigmoids the best `top` pairs of
        query and class, best first."""
        logits, boxes = outputs["logits"][-1].float(), outputs["boxes"][-1].float()
        if self.focal:
            scores, index = logits.sigmoid().flatten(1).topk(min(top, logits[0].numel()))
            labels, query = index % logits.shape[-1], index // logits.shape[-1]
            boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        else:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            query = torch.arange(logits.shape[1], device=logits.device).expand_as(labels)
        scale = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32).to(boxes.device)
        boxes = box_convert(boxes, "cxcywh", "xyxy") * scale[:, None]
        names = "scores", "labels", "boxes", "queries"
        return [dict(zip(names, found)) for found in zip(scores, labels, boxes, query)]


def init_weights(transformer):
    """Xavier's weights, but deformable attention has its own."""
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in transformer.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()


# ---------------------------------------------------------------- DETR
class DETREncoderLayer(Layer):
    """Self-attention of all cells, then the feed-forward network (DETR, section A.3)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout):
        super().__init__(dim, dim_feedforward, dropout, norms=2)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)

    def forward(self, x, position, padding):
        q = x + position
        attended = self.self_attn(q, q, x, key_padding_mask=padding, need_weights=False)[0]
        x = self.add(x, attended, self.norm1)
        return self.add(x, self.feed_forward(x), self.norm2)


class DETRDecoderLayer(Layer):
    """Self-attention of the queries, attention to all cells, feed-forward (DETR, section A.3)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout):
        super().__init__(dim, dim_feedforward, dropout, norms=3)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)

    def forward(self, x, query_position, memory, position, padding):
        q = x + query_position
        x = self.add(x, self.self_attn(q, q, x, need_weights=False)[0], self.norm1)
        q, k = x + query_position, memory + position
        attended = self.multihead_attn(q, k, memory, key_padding_mask=padding, need_weights=False)
        x = self.add(x, attended[0], self.norm2)
        return self.add(x, self.feed_forward(x), self.norm3)


class DETR(Detector):
    """DETR: one level of stride 32, or 16 with dilation (DC5); softmax over K and "no object"."""

    focal = False

    def __init__(self, num_classes, *, backbone="resnet50", hidden_dim=256, nheads=8, enc_layers=6,
                 dec_layers=6, dim_feedforward=2048, dropout=0.1, num_queries=100, dilation=False,
                 frozen_bn=True, backbone_weights=None, aux_loss=True):  # fmt: skip
        super().__init__(hidden_dim, nheads, 4, aux_loss)
        cnn = Backbone(backbone, 1, dilation, frozen_bn, backbone_weights)
        self.backbone, self.strides = nn.Sequential(cnn), cnn.strides
        self.input_proj = nn.Conv2d(cnn.channels[0], hidden_dim, 1)
        layer = hidden_dim, nheads, dim_feedforward, dropout
        self.transformer = nn.Module()
        self.transformer.encoder = layer_stack(DETREncoderLayer(*layer) for _ in range(enc_layers))
        self.transformer.decoder = layer_stack(DETRDecoderLayer(*layer) for _ in range(dec_layers))
        self.transformer.decoder.norm = nn.LayerNorm(hidden_dim)
        init_weights(self.transformer)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)  # the last one is "no object"
        self.bbox_embed = MLP(hidden_dim)

    def features(self, images, padding):
        """images (B, 3, H, W) normalised, padding (B, H, W) -> [FeatureLevel]."""
        (x,) = self.backbone(images.masked_fill(padding[:, None], 0))
        return [make_level(self.input_proj(x), padding, centre=0)]

    def encode(self, levels):
        """[FeatureLevel] -> memory: the same levels, each cell now with the context of all others."""
        x, padding, position, _ = flatten_levels(levels)  # (B, S, C)
        for layer in self.transformer.encoder.layers:
            x = layer(x, position, padding)
        return unflatten_levels(x, levels)

    def decode(self, memory):
        """Memory -> {"logits" (N, B, Q, K + 1), "boxes" (N, B, Q, 4) cxcywh in 0..1}."""
        memory, padding, position, _ = flatten_levels(memory)  # (B, S, C)
        query_position = self.query_embed.weight.expand(len(memory), -1, -1)  # (B, Q, C)
        x, states = torch.zeros_like(query_position), []
        for layer in self.transformer.decoder.layers:
            x = layer(x, query_position, memory, position, padding)
            states.append(self.transformer.decoder.norm(x))
        states = torch.stack(states)  # (N, B, Q, C)
        boxes = self.bbox_embed(states).float().sigmoid()
        return {"logits": self.class_embed(states), "boxes": boxes}


# ---------------------------------------------------------------- Deformable DETR
class DeformableEncoderLayer(Layer):
    """Every cell attends to a few points of each level (Deformable DETR, section 4.1)."""

    def __init__(self, dim, nheads, dim_feedforward, dropout, n_levels, n_points):
        super().__init__(dim, dim_feedforward, dropout, norms=2)
        self.self_attn = MSDeformAttn(dim, n_levels, nheads, n_points)

    def forward(self, x, position, reference, shapes, padding):
        attended = self.self_attn(x + position, reference, x, shapes, padding)
        x = self.add(x, attended, self.norm1)
        return self.add(x, self.feed_forward(x), self.norm2)


class DeformableDecoderLayer(Layer):
    """Self-attention of the queries, attention to a few points around each one's reference."""

    def __init__(self, dim, nheads, dim_feedforward, dropout, n_levels, n_points):
        super().__init__(dim, dim_feedforward, dropout, norms=3)
        self.self_attn = nn.MultiheadAttention(dim, nheads, dropout, batch_first=True)
        self.cross_attn = MSDeformAttn(dim, n_levels, nheads, n_points)

    def forward(self, x, query_position, reference, memory, shapes, padding):
        q = x + query_position
        attended = self.self_attn(q, q, x, need_weights=False)[0]
        x = self.add(x, attended, self.norm2)  # norm1 is the next one's, officially
        attended = self.cross_attn(x + query_position, reference, memory, shapes, padding)
        x = self.add(x, attended, self.norm1)
        return self.add(x, self.feed_forward(x), self.norm3)


class DeformableDETR(Detector):
    """Deformable DETR: several levels; sigmoid scores of K classes. Arguments as officially.
    num_feature_levels: 1: stride 32 (16 with dilation); 2: 16, 32; 3: 8, 16, 32; 4: 8 to 64 …
    with_box_refine: each layer has heads of its own and corrects the boxes before it (section A.4).
    two_stage: the encoder's best cells propose the queries and their first boxes (section A.4)."""

    focal = True

    def __init__(self, num_classes, *, backbone="resnet50", hidden_dim=256, nheads=8, enc_layers=6,
                 dec_layers=6, dim_feedforward=1024, dropout=0.1, num_queries=300, dilation=False,
                 frozen_bn=True, backbone_weights=None, num_feature_levels=4, enc_n_points=4,
                 dec_n_points=4, with_box_refine=False, two_stage=False,
                 aux_loss=True):  # fmt: skip
        super().__init__(hidden_dim, nheads, 32, aux_loss)
        if two_stage and not with_box_refine:
            raise ValueError("two_stage needs with_box_refine")
        if backbone not in RESNETS and backbone in BACKBONES:
            mixed = "the group normalisation behind the CNN mixes all cells"
            raise ValueError(f"backbone {backbone!r} tells nothing of Deformable DETR: {mixed}")
        self.with_box_refine, self.two_stage = with_box_refine, two_stage
        self.num_queries = num_queries
        cnn = Backbone(backbone, min(num_feature_levels, 3), dilation, frozen_bn, backbone_weights)
        self.backbone, self.strides = nn.Sequential(cnn), list(cnn.strides)
        self.input_proj = nn.ModuleList(make_input_proj(c, hidden_dim, 1, 1) for c in cnn.channels)
        for i in range(3, num_feature_levels):  # the CNN's last map, halved again and again
            channels = cnn.channels[-1] if i == 3 else hidden_dim
            self.input_proj.append(make_input_proj(channels, hidden_dim, 3, 2))
            self.strides.append(self.strides[-1] * 2)
        self.transformer = nn.Module()
        self.transformer.level_embed = nn.Parameter(torch.empty(num_feature_levels, hidden_dim))
        layer = hidden_dim, nheads, dim_feedforward, dropout, num_feature_levels
        encoder = (DeformableEncoderLayer(*layer, enc_n_points) for _ in range(enc_layers))
        decoder = (DeformableDecoderLayer(*layer, dec_n_points) for _ in range(dec_layers))
        self.transformer.encoder, self.transformer.decoder = (
            layer_stack(encoder),
            layer_stack(decoder),
        )
        if two_stage:  # the proposals' own queries
            self.transformer.enc_output = nn.Linear(hidden_dim, hidden_dim)
            self.transformer.enc_output_norm = nn.LayerNorm(hidden_dim)
            self.transformer.pos_trans = nn.Linear(hidden_dim * 2, hidden_dim * 2)
            self.transformer.pos_trans_norm = nn.LayerNorm(hidden_dim * 2)
        else:  # learnt ones, position and content, with a learnt reference point each
            self.query_embed = nn.Embedding(num_queries, hidden_dim * 2)
            self.transformer.reference_points = nn.Linear(hidden_dim, 2)
            nn.init.zeros_(self.transformer.reference_points.bias)
        init_weights(self.transformer)
        nn.init.normal_(self.transformer.level_embed)
        self.transformer.level_embed.requires_grad_(enc_layers > 0)  # for the encoder alone
        class_head, box_head = nn.Linear(hidden_dim, num_classes), MLP(hidden_dim)
        nn.init.constant_(class_head.bias, -math.log(99))  # scores start at 0.01 for focal loss
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)
        heads = [(class_head, box_head)] * (dec_layers + two_stage)  # the same for all layers …
        if with_box_refine:  # … or one pair each, and one for the proposals
            heads = [copy.deepcopy(pair) for pair in heads]
        self.class_embed, self.bbox_embed = map(nn.ModuleList, zip(*heads))
        if with_box_refine:  # officially under both names
            self.transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            self.transformer.decoder.class_embed = self.class_embed
        else:  # first boxes of about a tenth of the image
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)

    def features(self, images, padding):
        """images (B, 3, H, W) normalised, padding (B, H, W) -> [FeatureLevel], finest first."""
        maps, levels, x = self.backbone(images.masked_fill(padding[:, None], 0)), [], None
        for i, projection in enumerate(self.input_proj):  # one level more: of the CNN's last map,
            x = projection(maps[min(i, len(maps) - 1)] if i <= len(maps) else x)  # then of that
            level = make_level(x, padding, centre=0.5)
            position = level.position + self.transformer.level_embed[i][:, None, None]
            levels.append(level._replace(position=position))
        return levels

    def encode(self, levels):
        """[FeatureLevel] -> memory: the same levels, each cell now with the context of others."""
        x, padding, position, shapes = flatten_levels(levels)  # (B, S, C)
        centres = torch.cat(cell_centers(levels), 1)
        reference = centres[:, :, None] * valid_ratios(levels)[:, None]  # (B, S, L, 2)
        for layer in self.transformer.encoder.layers:
            x = layer(x, position, reference, shapes, padding)
        return unflatten_levels(x, levels)

    def decode(self, memory):
        """Memory -> {"logits" (N, B, Q, K), "boxes" (N, B, Q, 4) cxcywh in 0..1}.
        Two-stage adds "proposal_logits" (B, S, K) and "proposal_boxes" (B, S, 4)."""
        levels, ratios = memory, valid_ratios(memory).repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        memory, padding, _, shapes = flatten_levels(levels)  # (B, S, C)
        outputs = {}
        if self.two_stage:
            x, query_position, reference, outputs = self._propose(memory, padding, levels)
        else:
            queries = self.query_embed.weight.expand(len(memory), -1, -1)  # (B, Q, 2C)
            query_position, x = queries.chunk(2, -1)
            reference = self.transformer.reference_points(query_position).float().sigmoid()
        logits, boxes = [], []
        layers = self.transformer.decoder.layers
        for layer, class_embed, bbox_embed in zip(layers, self.class_embed, self.bbox_embed):
            n = reference.shape[-1]  # 2 for points, which have no width and height yet, 4 for boxes
            scaled = reference[:, :, None] * ratios[..., :n]  # (B, Q, L, n)
            x = layer(x, query_position, scaled, memory, shapes, padding)
            start = F.pad(inverse_sigmoid(reference), (0, 4 - n))
            logits.append(class_embed(x))
            boxes.append((bbox_embed(x) + start).sigmoid())
            if self.with_box_refine:
                reference = boxes[-1].detach()
        return {"logits": torch.stack(logits), "boxes": torch.stack(boxes), **outputs}

    def _propose(self, memory, padding, levels):
        """Two-stage: every cell proposes a box around itself; the best become the queries.
        Returns (content, position (B, Q, C), reference boxes (B, Q, 4), all proposals)."""
        centres = enumerate(cell_centers(levels))
        anchors = [torch.cat([xy, torch.full_like(xy, 0.05 * 2**i)], -1) for i, xy in centres]
        anchors = torch.cat(anchors, 1)  # (B, S, 4)
        unusable = (padding | ((anchors <= 0.01) | (anchors >= 0.99)).any(-1))[..., None]
        anchors = anchors.logit().masked_fill(unusable, math.inf)
        x = self.transformer.enc_output(memory.masked_fill(unusable, 0))
        x = self.transformer.enc_output_norm(x)
        logits = self.class_embed[-1](x)  # (B, S, K); class 0 stands for "object" here
        boxes = self.bbox_embed[-1](x) + anchors
        best = logits[..., 0].topk(min(self.num_queries, boxes.shape[1]), dim=1).indices  # (B, Q)
        reference = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()
        query = self.transformer.pos_trans(
            sine_embedding(reference, memory.shape[-1] // 2).flatten(2)
        )
        position, content = self.transformer.pos_trans_norm(query).chunk(2, -1)
        proposals = {"proposal_logits": logits, "proposal_boxes": boxes.sigmoid()}
        return content, position, reference, proposals


def make_input_proj(channels, dim, kernel, stride):
    """The layer between a map of the CNN, or the level before, and the transformer."""
    conv = nn.Conv2d(channels, dim, kernel, stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    groups = min(32, dim // 2)  # 32 as officially; two channels at least: a map may have one cell
    return nn.Sequential(conv, nn.GroupNorm(groups, dim))


def valid_ratios(levels):
    """Share of each level's width and height that is image, not padding: (B, L, 2)."""
    inside = [(~level.padding).float() for level in levels]
    shares = [torch.stack([x[:, 0].mean(1), x[:, :, 0].mean(1)], -1) for x in inside]
    return torch.stack(shares, 1)


def cell_centers(levels):
    """Centre of every cell, x and y in 0..1 of the unpadded image: (B, H*W, 2) of each level."""
    centres = []
    for level, ratio in zip(levels, valid_ratios(levels).unbind(1)):
        y, x = ((torch.arange(n, device=ratio.device) + 0.5) / n for n in level.padding.shape[1:])
        grid = torch.cartesian_prod(y, x).flip(-1)  # (H*W, 2)
        centres.append(grid / ratio[:, None])
    return centres


def inverse_sigmoid(x, eps=1e-5):
    """The official code's; torch.logit rounds otherwise, and published runs would change."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


DETECTORS = {"detr": DETR, "deformable_detr": DeformableDETR}
COUNTS = "num_classes num_queries dec_layers num_feature_levels enc_n_points dec_n_points".split()


def build_detector(name, num_classes, **options):
    """The detector "detr" or "deformable_detr"; options are the arguments of the two classes.
    num_classes: labels are below it (91 in the official COCO models: the largest category id + 1).
    Raises ValueError for a value that no model can be built with."""
    if name not in DETECTORS:
        raise ValueError(f"model {name!r} is not one of {', '.join(DETECTORS)}")
    for key, value in {"num_classes": num_classes, **options}.items():
        if key in COUNTS and value < 1:
            raise ValueError(f"{key} must be at least 1, not {value}")
    return DETECTORS[name](num_classes, **options)


# ---------------------------------------------------------------- matching and losses
COST_CLASS, COST_BBOX, COST_GIOU = 1.0, 5.0, 2.0  # of the matching; class: twice with focal loss
NO_OBJECT = 0.1  # weight of the "no object" class, which nearly all queries have
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


class Criterion:
    """Bipartite matching and the losses of matched pairs (DETR, section 3.1).
    focal: sigmoid scores with focal loss (Deformable DETR), else softmax with "no object" (DETR).
    aux_loss: the losses of all N decoder layers count, else those of the last one (N = 1).
    Targets are per image {"labels" (T,), "boxes" (T, 4) cxcywh in 0..1}, best left on the host."""

    def __init__(self, focal, aux_loss=True):
        self.focal, self.aux_loss = focal, aux_loss
        weights = {"loss_ce": 2.0 if focal else 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
        self.weights = {**weights, **{f"{name}_enc": w for name, w in weights.items()}}

    def __call__(self, outputs, targets, num_boxes=None):
        """Unweighted losses of a decoder's outputs: {"loss_…": (N,)}; "loss_…_enc": (1,).
        num_boxes: what box losses (and focal loss) are divided by, else the number of objects."""
        logits, boxes = outputs["logits"], outputs["boxes"]
        if not self.aux_loss:
            logits, boxes = logits[-1:], boxes[-1:]
        losses = self.layer_losses(logits, boxes, targets, num_boxes)
        if "proposal_logits" in outputs:  # objects against background: every object has label 0
            objects = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            proposals = outputs["proposal_logits"][None], outputs["proposal_boxes"][None]
            found = self.layer_losses(*proposals, objects, num_boxes)
            losses.update({f"{name}_enc": loss for name, loss in found.items()})
        return losses

    def layer_losses(self, logits, boxes, targets, num_boxes=None):
        """Losses of all layers against the same targets, each (N,).
        logits (N, B, Q, K), boxes (N, B, Q, 4). Class term: all queries; others: matched pairs."""
        N, B, Q, K = logits.shape
        counts = [len(target["labels"]) for target in targets]
        num_boxes = max(num_boxes or sum(counts), 1)
        labels, target_boxes = pad_targets(targets, logits.device)  # (B, T), (B, T, 4)
        layer, image, query, target = self.match(logits, boxes, labels, target_boxes, counts)
        if self.focal:
            wanted = torch.zeros_like(logits)
            wanted[layer, image, query, labels[image, target]] = 1
            ce = torchvision.ops.sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA)
            ce = ce.sum((1, 2, 3)) / num_boxes
        else:
            wanted = torch.full((N, B, Q), K - 1, device=logits.device)
            wanted[layer, image, query] = labels[image, target]
            weight = logits.new_ones(K)
            weight[-1] = NO_OBJECT
            ce = F.cross_entropy(logits.movedim(-1, 1), wanted, weight, reduction="none")
            ce = ce.sum((1, 2)) / weight[wanted].sum((1, 2))
        ours, theirs = boxes[layer, image, query], target_boxes[image, target]  # (pairs, 4)
        bbox = (ours - theirs).abs().view(N, -1).sum(1) / num_boxes
        giou = (1 - generalized_iou(ours, theirs)).view(N, -1).sum(1) / num_boxes
        return {"loss_ce": ce, "loss_bbox": bbox, "loss_giou": giou}

    def match(self, logits, boxes, labels, target_boxes, counts):
        """Optimal assignment of queries to objects in every layer and image (equation 1).
        Shapes as in `costs`; counts: objects of each image. Returns layer, image, query and object
        of all pairs, as many in each layer. FloatingPointError if the predictions are not finite.
        The costs are all that is copied to the host."""
        costs = self.costs(logits.float(), boxes.float(), labels, target_boxes).cpu().numpy()
        pairs = []
        for layer, image in np.ndindex(costs.shape[:2]):
            cost = costs[layer, image, :, : counts[image]]
            if not np.isfinite(cost).all():
                raise FloatingPointError("the model's boxes or scores are NaN or infinite")
            pairs.append(np.broadcast_arrays(layer, image, *linear_sum_assignment(cost)))
        pairs = torch.from_numpy(np.concatenate(pairs, 1))
        return pairs.to(logits.device, non_blocking=True).unbind(0)

    @torch.no_grad()
    def costs(self, logits, boxes, labels, target_boxes):
        """Cost of giving object t to query q, for all layers and images: (N, B, Q, T).
        logits (N, B, Q, K), boxes (N, B, Q, 4), labels (B, T), target_boxes (B, T, 4), padded."""
        index = labels[None, :, None].expand(len(logits), -1, logits.shape[2], -1)  # (N, B, Q, T)
        if self.focal:
            p = logits.sigmoid().gather(-1, index)
            positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
            negative = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
            cost_class = 2 * (positive - negative)
        else:
            cost_class = -logits.softmax(-1).gather(-1, index)
        cost_bbox = torch.cdist(boxes, target_boxes[None].expand(len(boxes), -1, -1, -1), p=1)
        cost_giou = -generalized_iou(boxes[..., None, :], target_boxes[:, None])
        return COST_CLASS * cost_class + COST_BBOX * cost_bbox + COST_GIOU * cost_giou


def pad_targets(targets, device):
    """Labels (B, T) and boxes (B, T, 4) of all images, filled up to the same T."""
    labels, boxes = ([target[key] for target in targets] for key in ("labels", "boxes"))
    return (nn.utils.rnn.pad_sequence(x, batch_first=True).to(device) for x in (labels, boxes))


def generalized_iou(a, b):
    """Generalised IoU of boxes cxcywh, elementwise with broadcasting: (..., 4) -> (...)."""
    a0, a1 = box_convert(a, "cxcywh", "xyxy").split(2, -1)  # corners
    b0, b1 = box_convert(b, "cxcywh", "xyxy").split(2, -1)
    areas = (a1 - a0).prod(-1) + (b1 - b0).prod(-1)
    inter = (torch.min(a1, b1) - torch.max(a0, b0)).clamp(min=0).prod(-1)
    union = areas - inter
    hull = (torch.max(a1, b1) - torch.min(a0, b0)).prod(-1)
    return inter / union - (hull - union) / hull


# ---------------------------------------------------------------- weights from elsewhere
