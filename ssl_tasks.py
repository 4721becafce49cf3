"""Self-supervised tasks on the feature maps of a detector (arXiv 2205.05543).

The image is divided into a grid of square patches. A task corrupts some of them, either in the
image, as the authors do, or in the feature maps between CNN and encoder. From the encoder's output,
the memory, it predicts what was there:

    reconstruct         nothing is corrupted; predict the pixels
    mim-continuous      mask a share of the patches; predict their pixels (SimMIM, 2111.09886)
    mim-discrete        mask a share; predict their visual tokens (BEiT, 2106.08254)
    jigsaw-continuous   permute a share among themselves; predict the pixels that belong there
    jigsaw-discrete     permute a share; predict where the content came from (1603.09246)

B images, C channels, H x W pixels or cells, h x w patches, P = h * w, K classes, s stride. A patch
that the border of its image cuts off is never corrupted, predicted or counted.

Bugs of the authors' code that are fixed here: its loss counts patches that did not move, its mask
color is normalized twice, its tokens in pretraining are those of a different crop, and its decoder
runs in pretraining although no loss needs it.
"""

import abc
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.tokenizers import Dalle, KMeans, pad_to_patches


# ---------------------------------------------------------------- what happens to the patches
@dataclass(frozen=True)
class Corruption:
    """What is done to the patches of a batch, which are numbered row by row."""

    grid: tuple  # (h, w)
    inside: Tensor  # (B, P) bool: lies wholly inside its image; all other patches are left alone
    masked: Tensor  # (B, P) bool: its content is hidden
    permutation: Tensor  # (B, P) int64: the number of the patch whose content stands here now
    quarter_turns: Tensor | None = None  # (B, P) int64 in 0..3, counterclockwise; None: all 0

    def changed(self):
        """Return which patches are masked, moved or turned: (B, P) bool.

        A patch that the permutation sends to its own place has not changed.
        """
        P = self.permutation.shape[1]
        own_place = torch.arange(P, device=self.permutation.device)
        changed = self.masked | (self.permutation != own_place)
        if self.quarter_turns is not None:
            changed = changed | (self.quarter_turns > 0)
        return changed

    def inverse(self):
        """Return the corruption that puts moved patches back."""
        return replace(self, permutation=self.permutation.argsort(1))

    def to(self, device):
        """Return the same corruption with its tensors on `device`."""
        moved = replace(
            self,
            inside=self.inside.to(device),
            masked=self.masked.to(device),
            permutation=self.permutation.to(device),
        )
        if self.quarter_turns is not None:
            moved = replace(moved, quarter_turns=self.quarter_turns.to(device))
        return moved


def patches_inside_image(padding, patch):
    """Return which patches lie wholly inside their image.

    padding: (B, H, W) bool, True = padding
    patch:   pixels per side
    Returns (B, h, w) bool.
    """
    outside = pad_to_patches(padding[:, None].float(), patch, value=1.0)
    return F.max_pool2d(outside, patch)[:, 0] == 0


def corrupt_map(x, corruption, cells, fill):
    """Permute, turn and mask the patches of a feature map or an image.

    x:     (B, C, H, W)
    cells: cells (pixels of an image) per side of a patch
    fill:  (C,) what a masked cell contains
    Returns (B, C, H, W).
    """
    H, W = x.shape[-2:]
    # (B, C, H, W) -> (B, C * cells**2, P): a patch is a column now
    patches = F.pixel_unshuffle(pad_to_patches(x, cells), cells).flatten(2)

    source = corruption.permutation[:, None].expand_as(patches)
    patches = patches.gather(2, source)

    if corruption.quarter_turns is not None:
        squares = patches.unflatten(1, (-1, cells, cells))  # (B, C, cells, cells, P)
        for k in (1, 2, 3):
            turned = squares.rot90(k, (2, 3)).flatten(1, 3)
            patches = torch.where(corruption.quarter_turns[:, None] == k, turned, patches)

    fill_column = fill.repeat_interleave(cells * cells)[:, None]  # (C * cells**2, 1)
    patches = torch.where(corruption.masked[:, None], fill_column, patches)

    corrupted = F.pixel_shuffle(patches.unflatten(2, corruption.grid), cells)
    return corrupted[..., :H, :W]


def choose_patches(rng, patches, ratio):
    """Return a random share of the patches, in random order."""
    return rng.permutation(patches)[: round(ratio * len(patches))]


# ---------------------------------------------------------------- what all tasks share
class Task(nn.Module, abc.ABC):
    """Corrupt patches, and predict something about each from the finest level of the memory.

    A task of your own is a subclass of PixelTask or ClassTask that overrides what it does
    differently, mostly `mask` or `permute` and `target`, and has a name in TASKS.

    num_outputs:  output channels of the head: 3 * s * s colors per cell, or K classes
    dim:          channels of the detector's feature maps
    strides:      pixels per cell of each feature map, finest first
    patch:        pixels per side of a patch
    ratio:        share of an image's patches that is corrupted (by chance a patch that is permuted
                  may stay in its place)
    on:           what is corrupted, "features" or "image"
    loss_patches: which patches the loss counts, "corrupted" or "all"
    image_size:   pixels per side if all images are squares of one size, else None
    hidden_layer: the head has a hidden layer, as the authors' has in multi-task learning
    Raises ValueError if these do not fit together.
    """

    corrupts = True  # False: the task reads the clean images, and every patch counts
    rotates = False  # True: patches are turned as `turn` says
    picture = None  # how util/plots.py draws it: "pixels", "classes", "tokens" or "positions"

    def __init__(
        self,
        *,
        num_outputs,
        dim,
        strides,
        patch,
        ratio=0.5,
        on="features",
        loss_patches="corrupted",
        image_size=None,
        hidden_layer=False,
    ):
        super().__init__()
        self.num_outputs = num_outputs
        self.dim = dim
        self.strides = strides
        self.patch = patch
        self.ratio = ratio
        self.on = on
        self.count_all_patches = loss_patches == "all" or not self.corrupts
        self.check_sizes(image_size)
        if self.corrupts and on == "features":  # what a masked cell of each level contains
            self.mask_token = nn.Parameter(torch.randn(len(strides), dim) * 0.02)
        output_layer = nn.Conv2d(dim, num_outputs, 1)
        nn.init.normal_(output_layer.weight, std=0.02)  # at first: gray, or all classes alike
        nn.init.zeros_(output_layer.bias)
        if hidden_layer:
            self.head = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), output_layer)
        else:
            self.head = output_layer

    def check_sizes(self, image_size):
        """Raise ValueError if the patches do not fit the feature maps or the images."""
        aligned = self.patch % self.strides[0] == 0
        for stride in self.strides:
            if self.patch % stride != 0 and stride % self.patch != 0:
                aligned = False
        if not aligned:
            raise ValueError(
                f"patch size {self.patch} is not aligned with the feature strides; "
                f"use one of {self.strides} or a multiple of {self.strides[-1]}"
            )
        if image_size is None:
            return
        if image_size < self.patch:
            raise ValueError(
                f"images of {image_size} pixels are smaller than a patch of {self.patch}; "
                f"use larger images or smaller patches"
            )
        corrupted = round(self.ratio * (image_size // self.patch) ** 2)
        if corrupted < 2 and not self.count_all_patches:
            raise ValueError(
                f"only {corrupted} patches of {self.patch} pixels would be corrupted in a "
                f"{image_size}-pixel image (need at least 2); "
                f"use larger images, smaller patches or a larger ratio"
            )

    # ------------------------------------------------ the corruption
    def mask(self, rng, patches, grid):
        """Return the numbers of the patches to mask: (k,) integers, some of `patches`.

        rng:     random generator of this image (numpy)
        patches: (n,) the numbers of the patches inside this image, row by row
        grid:    (h, w), rows and columns of patches in the padded batch; patch number i is in row
                 i // w and column i % w. An image that is smaller than its batch has only some
        """
        return []

    def permute(self, rng, patches, grid):
        """Return (places, sources): which patches get another content, and from which patches.

        The sources are the places in another order.
        """
        return [], []

    def turn(self, rng, patches, grid):
        """Return (places, turns): which patches are turned, and each by how many quarter turns."""
        return [], []

    def sample_corruption(self, padding, seeds):
        """Sample the corruption of a batch; that of an image depends on its seed alone.

        padding: (B, H, W) bool, True = padding
        seeds:   B integers
        Returns a Corruption on the CPU.
        """
        inside = patches_inside_image(padding.cpu(), self.patch)  # (B, h, w)
        B, h, w = inside.shape
        masked = np.zeros((B, h * w), dtype=bool)
        permutation = np.tile(np.arange(h * w, dtype=np.int64), (B, 1))  # every patch in its place
        quarter_turns = np.zeros((B, h * w), dtype=np.int64)
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            patches = np.flatnonzero(inside[i].numpy())
            masked[i, self.mask(rng, patches, (h, w))] = True
            places, sources = self.permute(rng, patches, (h, w))
            permutation[i, places] = sources
            turned, turns = self.turn(rng, patches, (h, w))
            quarter_turns[i, turned] = turns

        corruption = Corruption(
            grid=(h, w),
            inside=inside.flatten(1),
            masked=torch.from_numpy(masked),
            permutation=torch.from_numpy(permutation),
        )
        if self.rotates:
            corruption = replace(corruption, quarter_turns=torch.from_numpy(quarter_turns))
        return corruption

    def corrupt_images(self, images, corruption):
        """Return the corrupted images; masked patches get the mean color."""
        mean_color = images.new_zeros(3)  # images are normalized
        return corrupt_map(images, corruption, self.patch, fill=mean_color)

    def corrupt_levels(self, levels, corruption):
        """Return the levels with corrupted features; masked cells get the level's mask token.

        A cell that is larger than a patch is masked if any patch under it changed, so that nothing
        is left of that patch in the maps, except what the CNN has carried into neighboring cells
        (on="image" avoids that). With half of the patches of 16 pixels corrupted, that masks 94 %
        of the cells of stride 32.
        """
        corrupted = []
        for level, stride, token in zip(levels, self.strides, self.mask_token):
            token = token.to(level.features.dtype)  # (C,)
            if stride <= self.patch:
                cells = self.patch // stride
                features = corrupt_map(level.features, corruption, cells, fill=token)
            else:
                changed = corruption.changed().unflatten(1, corruption.grid)[:, None].float()
                touched = F.max_pool2d(changed, stride // self.patch, ceil_mode=True) > 0
                features = torch.where(touched, token[:, None, None], level.features)
            corrupted.append(level.with_features(features))
        return corrupted

    def encode(self, model, images, padding, corruption, levels=None):
        """Run the detector's CNN and encoder on corrupted images or features.

        levels: model.features(images, padding), if they are computed already
        Returns the memory that the task predicts from: a list of levels, finest first.
        """
        if self.corrupts and self.on == "image":
            corrupted_images = self.corrupt_images(images, corruption)
            return model.encode(model.features(corrupted_images, padding))
        if levels is None:
            levels = model.features(images, padding)
        if self.corrupts:
            levels = self.corrupt_levels(levels, corruption)
        return model.encode(levels)

    # ------------------------------------------------ the prediction
    @abc.abstractmethod
    def predict(self, features, size):
        """Return what the head predicts: (B, 3, H, W) pixels or (B, K, h, w) class logits.

        features: (B, C, H / s, W / s) finest level of the memory
        size:     (H, W) of the images
        """

    @abc.abstractmethod
    def target(self, images, corruption):
        """Return what is correct: (B, 3, H, W) pixels or (B, h, w) int64 classes."""

    @abc.abstractmethod
    def patch_losses(self, prediction, target):
        """Return (losses, correct), both (B, P); `correct` is bool, or None for pixels."""

    def predict_and_target(self, memory, images, corruption):
        """Return the prediction from the memory and the target, as `predict` and `target` do."""
        prediction = self.predict(memory[0].features, images.shape[-2:])
        return prediction, self.target(images, corruption)

    def counted_patches(self, corruption):
        """Return which patches the loss counts: (B, P) bool."""
        if self.count_all_patches:
            return corruption.inside
        return corruption.inside & corruption.changed()

    def loss(self, memory, images, corruption, num_patches=None):
        """Return the mean loss of the counted patches.

        num_patches: divide the sum by this instead of their number (the mean of all processes)
        """
        prediction, target = self.predict_and_target(memory, images, corruption)
        losses, _ = self.patch_losses(prediction, target)
        counted = self.counted_patches(corruption)
        if num_patches is None:
            num_patches = counted.sum()
        return (losses * counted).sum() / max(num_patches, 1)

    # ------------------------------------------------ the baseline: a constant prediction
    @abc.abstractmethod
    def counted_targets(self, target, counted):
        """Return the targets of the n patches that are counted, for `baseline`: (n, ...)."""

    @abc.abstractmethod
    def baseline(self, targets):
        """Return {"ssl_baseline": score of the constant prediction, "ssl_chance": or None}.

        The score is the loss of pixels, the accuracy of classes.
        targets: (n, ...) from `counted_targets`, n > 0
        """

    def check(self, images, padding):
        """Try the task on a batch before training.

        Raises ValueError if the result of a method does not fit, which it names, or if no patch
        of these images counts.
        """
        B, _, H, W = images.shape
        corruption = self.sample_corruption(padding, range(B))
        h, w = corruption.grid
        name = type(self).__name__

        places = torch.arange(h * w).expand(B, -1)
        if not torch.equal(corruption.permutation.sort(1).values, places):
            raise ValueError(f"{name}.permute: sources must be a permutation of the places")
        if not self.counted_patches(corruption).any():
            raise ValueError(
                f"{name}.mask: ratio {self.ratio} leaves no {self.patch}-pixel patch to predict; "
                f"use smaller patches or a larger ratio"
            )

        target = self.target(images, corruption)
        if isinstance(self, ClassTask):
            expected_shape = (B, h, w)
        else:
            expected_shape = (B, 3, H, W)
        if target.shape != expected_shape:
            raise ValueError(
                f"{name}.target: expected shape {expected_shape}, got {tuple(target.shape)}"
            )
        if isinstance(self, ClassTask) and not 0 <= target.min() <= target.max() < self.num_outputs:
            raise ValueError(f"{name}.target: class index out of range [0, {self.num_outputs})")

        s = self.strides[0]
        features = torch.zeros(B, self.dim, math.ceil(H / s), math.ceil(W / s))
        losses, correct = self.patch_losses(self.predict(features, (H, W)), target)
        for values in (losses, correct):
            if values is not None and values.shape != (B, h * w):
                raise ValueError(
                    f"{name}.patch_losses: expected shape {(B, h * w)}, got {tuple(values.shape)}"
                )


class PixelTask(Task):
    """Predict pixels; each cell of the finest level predicts the s x s pixels under it. L1 loss."""

    picture = "pixels"

    def __init__(self, *, strides, **config):
        super().__init__(num_outputs=3 * strides[0] ** 2, strides=strides, **config)

    def predict(self, features, size):
        """Predict pixels: (B, C, H / s, W / s) -> (B, 3, H, W)."""
        H, W = size
        return F.pixel_shuffle(self.head(features), self.strides[0])[..., :H, :W]

    def target(self, images, corruption):
        return images

    def patch_losses(self, prediction, target):
        pixel_losses = (prediction - target).abs().mean(1, keepdim=True)  # (B, 1, H, W)
        losses = F.avg_pool2d(pixel_losses, self.patch, ceil_mode=True)  # (B, 1, h, w)
        return losses.flatten(1), None

    def counted_targets(self, target, counted):
        """Cut out the counted patches: (B, 3, H, W), (B, P) -> (n, 3, patch, patch)."""
        padded = pad_to_patches(target, self.patch)
        rows = padded.unfold(2, self.patch, self.patch)  # (B, 3, h, w * patch, patch)
        patches = rows.unfold(3, self.patch, self.patch)  # (B, 3, h, w, patch, patch)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[counted]

    def baseline(self, targets):
        """Score the mean patch as the prediction of every patch; pixels have no chance level."""
        loss = (targets - targets.mean(0)).abs().mean().item()
        return {"ssl_baseline": loss, "ssl_chance": None}


class ClassTask(Task):
    """Predict one of K classes for each patch, from the mean of its cells; cross-entropy."""

    picture = "classes"

    def predict(self, features, size):
        """Predict logits: (B, C, H / s, W / s) -> (B, K, h, w)."""
        cells = self.patch // self.strides[0]
        return self.head(F.avg_pool2d(features, cells, ceil_mode=True))

    def patch_losses(self, prediction, target):
        losses = F.cross_entropy(prediction, target, reduction="none")  # (B, h, w)
        correct = prediction.argmax(1) == target
        return losses.flatten(1), correct.flatten(1)

    def counted_targets(self, target, counted):
        """Return the classes of the counted patches: (B, h, w), (B, P) -> (n,)."""
        return target.flatten(1)[counted]

    def baseline(self, targets):
        """Score the most frequent class as the prediction of every patch; chance is 1 in K."""
        accuracy = targets.bincount().max().item() / len(targets)
        return {"ssl_baseline": accuracy, "ssl_chance": 1 / self.num_outputs}


# ---------------------------------------------------------------- the five tasks
class Reconstruct(PixelTask):
    """Predict the pixels of images that are not corrupted."""

    corrupts = False


class MaskedPixels(PixelTask):
    """Mask a share of the patches; predict their pixels."""

    def mask(self, rng, patches, grid):
        return choose_patches(rng, patches, self.ratio)


class MaskedTokens(ClassTask):
    """Mask a share of the patches; predict their visual tokens.

    vocab_size:        number of tokens, found by k-means
    tokenizer_weights: file of DALL-E's encoder, whose tokens are predicted instead
    """

    picture = "tokens"

    def __init__(self, *, patch, vocab_size=64, tokenizer_weights=None, **config):
        if tokenizer_weights:
            tokenizer = Dalle(patch, tokenizer_weights)
        else:
            tokenizer = KMeans(patch, vocab_size)
        super().__init__(num_outputs=len(tokenizer.codebook), patch=patch, **config)
        self.tokenizer = tokenizer

    def mask(self, rng, patches, grid):
        return choose_patches(rng, patches, self.ratio)

    def target(self, images, corruption):
        return self.tokenizer(images)  # (B, h, w)


class JigsawPixels(PixelTask):
    """Permute a share of the patches among themselves; predict the pixels that belong there."""

    def permute(self, rng, patches, grid):
        places = choose_patches(rng, patches, self.ratio)
        return places, rng.permutation(places)


class JigsawPositions(ClassTask):
    """Permute a share of the patches among themselves; predict where the content came from."""

    picture = "positions"

    def __init__(self, *, patch, image_size=None, **config):
        if image_size is None:  # the number of positions is the number of classes
            raise ValueError("jigsaw-discrete requires images of equal size; set --image_size")
        num_positions = math.ceil(image_size / patch) ** 2
        super().__init__(num_outputs=num_positions, patch=patch, image_size=image_size, **config)

    def permute(self, rng, patches, grid):
        places = choose_patches(rng, patches, self.ratio)
        return places, rng.permutation(places)

    def target(self, images, corruption):
        return corruption.permutation.unflatten(1, corruption.grid)  # (B, h, w)


TASKS = {
    "reconstruct": Reconstruct,
    "mim-continuous": MaskedPixels,
    "mim-discrete": MaskedTokens,
    "jigsaw-continuous": JigsawPixels,
    "jigsaw-discrete": JigsawPositions,
}


def build_task(name, **config):
    """Return the task of that name; config: the arguments of its class."""
    return TASKS[name](**config)
