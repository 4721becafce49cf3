"""Backbones without the cues by which tasks on feature maps can be solved; for DETR.

A feature map holds more than the content of its cells. The zeros around an image mark the position
of a cell, and convolutions mix each patch into its neighbors. Importing this module registers two
variants of every ResNet in detr.BACKBONES, without one cue or the other:

    resnet18-circular, …    maps are padded with their opposite sides
    resnet18-patches, …     each patch is seen on its own
"""

import math

import torch.nn.functional as F
from torch import nn

import detr


class CircularBackbone(detr.Backbone):
    """A ResNet that pads its maps with their opposite sides instead of zeros."""

    def __init__(self, name, num_stages, dilation, frozen_bn, weights):
        resnet = name.removesuffix("-circular")
        super().__init__(resnet, num_stages, dilation, frozen_bn, weights)
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                pad_circularly(module, module.padding[0])
            elif isinstance(module, nn.MaxPool2d):
                pad_circularly(module, module.padding)


def pad_circularly(layer, padding):
    """Let a layer pad each side of its input with `padding` pixels of the opposite side."""
    sides = (padding, padding, padding, padding)

    def pad_input(module, inputs):
        return F.pad(inputs[0], sides, mode="circular")

    layer.padding = (0, 0)
    layer.register_forward_pre_hook(pad_input)


class PatchesBackbone(detr.Backbone):
    """A ResNet that sees each patch, a cell of its coarsest map, on its own."""

    def __init__(self, name, num_stages, dilation, frozen_bn, weights):
        resnet = name.removesuffix("-patches")
        super().__init__(resnet, num_stages, dilation, frozen_bn, weights)

    def forward(self, images):
        """Return the maps [(B, channels, H / stride, W / stride)] of images (B, 3, H, W)."""
        s = self.strides[-1]
        B, _, H, W = images.shape
        h = math.ceil(H / s)
        w = math.ceil(W / s)
        padded = F.pad(images, (0, w * s - W, 0, h * s - H))
        patches = padded.unflatten(3, (w, s)).unflatten(2, (h, s))  # (B, 3, h, s, w, s)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B*h*w, 3, s, s)
        maps = []
        for x, stride in zip(self.body(patches).values(), self.strides):
            # x: (B*h*w, C, n, n) with n = s / stride
            x = x.unflatten(0, (B, h, w)).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, n, w, n)
            x = x.flatten(4, 5).flatten(2, 3)  # (B, C, h*n, w*n)
            maps.append(x[:, :, : math.ceil(H / stride), : math.ceil(W / stride)])
        return maps


VARIANTS = {}
for resnet in ("resnet18", "resnet34", "resnet50", "resnet101"):
    VARIANTS[f"{resnet}-circular"] = CircularBackbone
    VARIANTS[f"{resnet}-patches"] = PatchesBackbone
detr.BACKBONES.update(VARIANTS)
