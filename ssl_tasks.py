"""Self-supervised tasks on the feature maps of a detector (arXiv 2205.05543).

The image is cut into a grid of square patches. A task corrupts some of them, either in the image
as the authors do or in the feature maps between CNN and encoder, and predicts from the encoder's
memory what was there:

    reconstruct         nothing is corrupted; predict the pixels
    mim-continuous      mask a share of the patches; predict their pixels (SimMIM, 2111.09886)
    mim-discrete        mask a share; predict their visual tokens (BEiT, 2106.08254)
    jigsaw-continuous   permute a share among themselves; predict the pixels that belong there
    jigsaw-discrete     permute a share; predict where the content came from (1603.09246)

B images, C channels, H x W pixels or cells, h x w patches, P = h*w, K classes, s stride. A patch
that is cut off by the border of its image is never corrupted, predicted or counted.
Faults of the authors' code, put right here: its loss counts patches that did not move, its mask
colour is normalised twice, its tokens in pretraining are of another crop, its decoder runs idly."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from util import tokenizers


# ---------------------------------------------------------------- what happens to the patches
class Corruption(NamedTuple):
    """What is done to the patches of a batch, numbered row by row."""

    grid: tuple  # (h, w)
    inside: Tensor  # (B, P) bool, lies wholly inside its image; all others are left alone
    masked: Tensor  # (B, P) bool, its content is hidden
    permutation: Tensor  # (B, P) int64, a permutation: the patch whose content stands here
    quarter_turns: (
        Tensor | None
    )  # (B, P) int64, left quarter turns of what stands here; None: no task's

    def changed(self):
        """(B, P) bool: masked, moved or turned; a patch permuted to its own place is not."""
        own_places = torch.arange(self.permutation.shape[1]).to(self.permutation)
        changed = self.masked | (self.permutation != own_places)
        return changed if self.quarter_turns is None else changed | (self.quarter_turns > 0)

    def inverse(self):
        """The corruption that puts moved patches back."""
        return self._replace(permutation=self.permutation.argsort(1))

    def to(self, device):
        there = (x if x is None else x.to(device, non_blocking=True) for x in self[1:])
        return Corruption(self.grid, *there)


def patches_inside_image(padding, patch):
    """Which patches lie wholly inside their image: padding (B, H, W) -> (B, h, w) bool."""
    H, W = padding.shape[-2:]
    outside = F.pad(padding, (0, -W % patch, 0, -H % patch), value=True)
    return F.max_pool2d(outside[:, None].float(), patch)[:, 0] == 0


def patches_to_pixels(values, cells, size):
    """Values of patches at each of their cells, `cells` a side: (B, h, w) -> (B, *size)."""
    cellwise = values.repeat_interleave(cells, 1).repeat_interleave(cells, 2)
    return cellwise[:, : size[0], : size[1]]


def corrupt_map(x, corruption, cells, fill):
    """Corrupt a map or image x (B, C, H, W) with patches of cells x cells; fill (C,) masks."""
    H, W = x.shape[2:]
    patches = F.pixel_unshuffle(F.pad(x, (0, -W % cells, 0, -H % cells)), cells).flatten(2)
    patches = patches.gather(2, corruption.permutation[:, None].expand_as(patches))  # (B, C', P)
    for k in () if corruption.quarter_turns is None else (1, 2, 3):
        turned = patches.unflatten(1, (-1, cells, cells)).rot90(k, (2, 3)).flatten(1, 3)
        patches = torch.where(corruption.quarter_turns[:, None] == k, turned, patches)
    fill = fill.repeat_interleave(cells * cells)[:, None]  # (C', 1), C' = C * cells * cells
    patches = torch.where(corruption.masked[:, None], fill, patches)
    return F.pixel_shuffle(patches.unflatten(2, corruption.grid), cells)[..., :H, :W]


# ---------------------------------------------------------------- what all tasks share
class Task(nn.Module):
    """Corrupts patches and predicts something of each from the finest level of the memory.
    dim, strides: of the detector's maps, finest first. patch: pixels a side. ratio: share of an
    image's patches that is corrupted. on: "features" or "image". loss_on: "corrupted" or "all"
    patches count. image_size: pixels a side if all images have one size. hidden: the head has a
    hidden layer, as the authors' has in multi-task learning. Values that do not go together raise
    ValueError. A task overrides what it does differently, and has its name in TASKS:

        mask(rng, patches, grid)     -> the patches that are hidden, of `patches`, the whole ones
        permute(rng, patches, grid)  -> (places, the patches whose content comes there)
        turn(rng, patches, grid)     -> (places, by how many quarter turns each is turned)
        outputs()                    -> how many numbers the head predicts at each cell
        predict(x (B, C, H/s, W/s), (H, W)) -> the prediction, from the memory through self.head
        target(images, corruption)   -> (B, 3, H, W) pixels, or (B, h, w) int64 classes
        errors(prediction, target)   -> error of each patch (B, P), right or not (B, P) or None
        taken(target, counted)       -> what is right at the n counted patches (B, P): (n, ...)
        guess(what taken returns)    -> (what is reached without looking, by chance), or None each
        answers(images, prediction, target, corruption) -> {title: (picture, right or not)}"""

    corrupts = True  # else the clean images will do, and every patch counts

    def __init__(self, dim, strides, patch, ratio=0.5, on="features", loss_on="corrupted",
                 image_size=None, hidden=False):  # fmt: skip
        super().__init__()
        self.dim, self.strides, self.patch, self.ratio, self.on = dim, strides, patch, ratio, on
        self.count_all, self.image_size = loss_on == "all" or not self.corrupts, image_size
        if patch % strides[0] or any(patch % s and s % patch for s in strides):
            fault = f"a patch of {patch} pixels does not cover whole cells of the maps"
            raise ValueError(f"{fault}; take one of {strides} or a multiple of {strides[-1]}")
        number = round(ratio * (image_size // patch) ** 2) if image_size else 2
        if number < 2 and not self.count_all or image_size and image_size < patch:
            fault = f"images of {image_size} pixels: {number} patches of {patch} would be corrupted"
            raise ValueError(f"{fault}; take larger images, smaller patches or a larger ratio")
        if on == "features" and self.corrupts:  # what stands in a masked cell of each level
            self.mask_token = nn.Parameter(torch.randn(len(strides), dim) * 0.02)
        head = nn.Conv2d(dim, self.outputs(), 1)
        nn.init.normal_(head.weight, std=0.02)  # at first: the mean colour, all classes alike
        nn.init.zeros_(head.bias)
        self.head = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), head) if hidden else head

    def mask(self, rng, patches, grid):
        return []

    def permute(self, rng, patches, grid):
        return [], []

    def turn(self, rng, patches, grid):
        return [], []

    def sample_corruption(self, padding, seeds):
        """The corruption of a batch, of each image from its own seed alone: padding (B, H, W)."""
        whole = patches_inside_image(padding.cpu(), self.patch).numpy()  # (B, h, w)
        grid, whole = whole.shape[1:], whole.reshape(len(whole), -1)
        masked, source = np.zeros_like(whole), np.indices(whole.shape, np.int64)[1]
        turns = np.zeros_like(source)
        for i, seed in enumerate(seeds):
            rng, patches = np.random.default_rng(seed), whole[i].nonzero()[0]
            masked[i, self.mask(rng, patches, grid)] = True
            places, sources = self.permute(rng, patches, grid)
            source[i, places] = sources
            places, quarters = self.turn(rng, patches, grid)
            turns[i, places] = quarters
        whole, masked, source, turns = map(torch.from_numpy, (whole, masked, source, turns))
        turns = None if type(self).turn is Task.turn else turns
        return Corruption(grid, whole, masked, source, turns)

    def corrupt_images(self, images, corruption):
        return corrupt_map(images, corruption, self.patch, images.new_zeros(3))  # the mean colour

    def corrupt_levels(self, levels, corruption):
        """A cell larger than a patch is masked if any patch under it changed: nothing is left of it
        in the maps. (What the CNN carried into other cells remains; on="image" avoids it.)"""
        out = []
        for level, stride, token in zip(levels, self.strides, self.mask_token):
            x, token = level.features, token.to(level.features.dtype)
            if self.patch % stride == 0:
                x = corrupt_map(x, corruption, self.patch // stride, token)
            else:
                changed = corruption.changed().unflatten(1, corruption.grid)[:, None].float()
                touched = F.max_pool2d(changed, stride // self.patch, ceil_mode=True) > 0
                x = torch.where(touched, token[:, None, None], x)
            out.append(level._replace(features=x))
        return out

    def counted_patches(self, corruption):
        """Patches that the loss counts: (B, P) bool."""
        return corruption.inside & (corruption.changed() | self.count_all)

    def counted_targets(self, target, counted):
        return target[:0]

    def predict_and_target(self, memory, images, corruption):
        """(prediction, target): what is predicted from the memory and what is right."""
        prediction = self.predict(memory[0].features, images.shape[-2:])
        return prediction, self.target(images, corruption)

    def loss(self, memory, images, corruption, num_patches=None):
        """The mean error of the counted patches; num_patches: divide by this instead."""
        error, _ = self.patch_losses(*self.predict_and_target(memory, images, corruption))
        counted = self.counted_patches(corruption)
        return (error * counted).sum() / max(num_patches or counted.sum(), 1)

    def check(self, images, padding):
        """Try a batch before training. ValueError that names the method whose result does not fit,
        or says that no patch of these images would count."""
        (B, _, H, W), corruption = images.shape, self.sample_corruption(padding, range(len(images)))
        (h, w), s = corruption.grid, self.strides[0]

        def expect(method, what, is_so):
            if not is_so:
                raise ValueError(f"{type(self).__name__}.{method}: {what}; see ssl_tasks.Task")

        places = torch.arange(h * w).expand(B, -1)
        same = corruption.permutation.sort(1)[0].equal(places)
        expect("permute", "sources are not the places in another order", same)
        target, classes = self.target(images, corruption), isinstance(self, ClassTask)
        wanted = (B, h, w) if classes else (B, 3, H, W)
        expect("target", f"{tuple(target.shape)} instead of {wanted}", target.shape == wanted)
        inside = not classes or 0 <= target.min() and target.max() < self.outputs()
        expect("target", f"classes beyond the {self.outputs()} of outputs", inside)
        memory = torch.zeros(B, self.dim, -(-H // s), -(-W // s))
        for result in self.patch_losses(self.predict(memory, (H, W)), target):
            fits = result is None or result.shape == (B, h * w)
            expect("errors", f"not the shape {(B, h * w)} of the patches", fits)
        counts = self.counted_patches(corruption).any()
        share = f"a share of {self.ratio} leaves no patch of {self.patch} pixels to predict"
        expect("mask", f"{share}; take smaller patches or a larger share", counts)

    def panels(self, images, prediction, target, corruption):
        """Rows of the picture: {title: (images (B, 3, H, W), patches to frame, right or not)}.
        The last two are (B, P) bool or None."""
        rows, moved = {"original": (images, None, None)}, corruption.changed() & ~corruption.masked
        if self.corrupts:
            title = "corrupted" if self.on == "image" else "corrupted, if it were the image"
            title += "; white: moved or turned" * bool(moved.any())
            rows[title] = self.corrupt_images(images, corruption), moved, None
        for title, (picture, right) in self.answers(images, prediction, target, corruption).items():
            title += "; green: right, red: wrong" * (right is not None)
            rows[title] = picture, self.counted_patches(corruption), right
        return rows


class PixelTask(Task):
    """Predicts pixels, each cell of the finest level its own s x s of them; L1 loss."""

    def outputs(self):
        return 3 * self.strides[0] ** 2

    def predict(self, x, size):  # (B, C, H/s, W/s) -> (B, 3, H, W)
        return F.pixel_shuffle(self.head(x), self.strides[0])[..., : size[0], : size[1]]

    def target(self, images, corruption):
        return images

    def patch_losses(self, prediction, target):
        error = (prediction - target).abs().mean(1, keepdim=True)  # (B, 1, H, W)
        return F.avg_pool2d(error, self.patch, ceil_mode=True).flatten(1), None

    def counted_targets(self, target, counted):  # (B, 3, H, W), (B, P) -> (n, 3, p, p)
        p, (H, W) = self.patch, target.shape[-2:]
        patches = F.pad(target, (0, -W % p, 0, -H % p)).unfold(2, p, p).unfold(3, p, p)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)[counted]

    def baseline(self, patches):
        """The error of predicting the mean patch everywhere, without looking; no chance level."""
        return (patches - patches.mean(0)).abs().mean().item(), None

    def answers(self, images, prediction, target, corruption):
        counted = self.counted_patches(corruption).unflatten(1, corruption.grid)
        here = patches_to_pixels(counted, self.patch, images.shape[-2:])[:, None]
        rows = {} if target is images else {"target": (target, None)}
        return {**rows, "predicted in frames": (torch.where(here, prediction, target), None)}


class ClassTask(Task):
    """Predicts one of K classes for each patch from the mean of its cells; cross-entropy."""

    def predict(self, x, size):  # (B, C, H/s, W/s) -> (B, K, h, w)
        return self.head(F.avg_pool2d(x, self.patch // self.strides[0], ceil_mode=True))

    def patch_losses(self, prediction, target):
        error = F.cross_entropy(prediction, target, reduction="none")
        return error.flatten(1), (prediction.argmax(1) == target).flatten(1)

    def counted_targets(self, target, counted):  # (B, h, w), (B, P) -> (n,)
        return target.flatten(1)[counted]

    def baseline(self, classes):
        """The share of the most frequent answer, and that of any: one in K."""
        return classes.bincount().max().item() / len(classes), 1 / self.outputs()

    def answers(self, images, prediction, target, corruption):
        right = self.patch_losses(prediction, target)[1]
        return {"answered": (self.corrupt_images(images, corruption), right)}


# ---------------------------------------------------------------- the five tasks
class Reconstruct(PixelTask):
    corrupts = False


class MaskedPixels(PixelTask):
    def mask(self, rng, patches, grid):
        return rng.permutation(patches)[: round(self.ratio * len(patches))]


class JigsawPixels(PixelTask):
    def permute(self, rng, patches, grid):
        places = rng.permutation(patches)[: round(self.ratio * len(patches))]
        return places, rng.permutation(places)


class MaskedTokens(ClassTask):
    """vocabulary: number of tokens from k-means; tokenizer_weights: DALL-E's file instead."""

    mask = MaskedPixels.mask

    def __init__(self, dim, strides, patch, vocabulary=64, tokenizer_weights=None, **options):
        dalle = tokenizer_weights and tokenizers.Dalle(patch, tokenizer_weights)
        tokenizer = dalle or tokenizers.KMeans(patch, vocabulary)
        self.vocabulary = len(tokenizer.codes)
        super().__init__(dim, strides, patch, **options)
        self.tokenizer = tokenizer

    def outputs(self):
        return self.vocabulary

    def target(self, images, corruption):  # (B, h, w)
        return self.tokenizer(images)

    def answers(self, images, prediction, target, corruption):
        counted = self.counted_patches(corruption).unflatten(1, corruption.grid)
        shown = torch.where(counted, prediction.argmax(1), target)
        tokens, shown = (self.tokenizer.paint(x, images.shape[-2:]) for x in (target, shown))
        right = self.patch_losses(prediction, target)[1]
        return {"its visual tokens": (tokens, None), "predicted": (shown, right)}


class JigsawPositions(ClassTask):
    permute = JigsawPixels.permute

    def outputs(self):
        if not self.image_size:
            raise ValueError("for this jigsaw all images must have one size: give image_size")
        return (-(-self.image_size // self.patch)) ** 2

    def target(self, images, corruption):  # (B, h, w)
        return corruption.permutation.unflatten(1, corruption.grid)

    def answers(self, images, prediction, target, corruption):
        """The counted patches are put back where all predictions, as one assignment, want them."""
        guess, counted = corruption.permutation.clone(), self.counted_patches(corruption)
        for source, scores, chosen in zip(guess, prediction.flatten(2), counted):
            patches = chosen.nonzero()[:, 0]  # they change places among themselves
            scores = scores[patches][:, patches].T.cpu().numpy()  # (places, origins)
            source[patches] = patches[linear_sum_assignment(scores, maximize=True)[1]]
        put_back = corruption._replace(permutation=guess).inverse()
        right = put_back.permutation == corruption.inverse().permutation
        solved = self.corrupt_images(self.corrupt_images(images, corruption), put_back)
        return {"put back, one to each place": (solved, right)}


TASKS = {
    "reconstruct": Reconstruct,
    "mim-continuous": MaskedPixels,
    "mim-discrete": MaskedTokens,
    "jigsaw-continuous": JigsawPixels,
    "jigsaw-discrete": JigsawPositions,
}


def build_task(name, **arguments):
    """The task of that name, with the arguments of its class. ValueError if it lacks a method."""
    lacking = [x for x in ("outputs", "predict", "target", "errors") if not hasattr(TASKS[name], x)]
    if lacking:
        raise ValueError(f"{TASKS[name].__name__} lacks {', '.join(lacking)}: see ssl_tasks.Task")
    return TASKS[name](**arguments)
