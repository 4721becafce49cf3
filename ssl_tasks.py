"""Self-supervised tasks on the feature maps of a detector (arXiv 2205.05543): corrupt, encode, predict, compare.

    images --(corrupt)--> features --(corrupt)--> encode --> memory --> prediction for each patch --> loss

The image is cut into a grid of square patches. A task corrupts some of them, either in the image, as the authors do, or in
the feature maps between CNN and encoder, and predicts from the encoder's memory what was there:

    reconstruct         nothing is corrupted; predict the pixels
    mim-continuous      mask a share of the patches; predict their pixels (SimMIM, arXiv 2111.09886)
    mim-discrete        mask a share; predict their visual tokens (BEiT, arXiv 2106.08254)
    jigsaw-continuous   permute a share among themselves; predict the pixels that belong there
    jigsaw-discrete     permute a share; predict where the content came from (arXiv 1603.09246)

Letters: B images, C channels, H x W pixels or cells, h x w patches, P = h*w, K classes, s stride. A patch of an image that is
cut off by its border, or lies in the padding, is never corrupted, predicted or counted.

Departures from the authors' code, which has these faults: the loss counts the patches that moved (not those that did
not); masked pixels get the mean colour, 0 after normalisation (not a mean that is normalised once more); visual tokens
are those of the very crop that the model sees; the decoder does not run for a self-supervised loss.

To add a task: a class with what it does differently, and its name in TASKS.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import visual_tokens

# ---------------------------------------------------------------- what happens to the patches

class Corruption(NamedTuple):
    """What is done to the patches of a batch, numbered row by row."""
    grid: tuple     # (h, w)
    whole: Tensor   # (B, P) bool, lies wholly inside its image; all others are left alone
    masked: Tensor  # (B, P) bool, its content is hidden
    source: Tensor  # (B, P) int64, the patch whose content stands here; its own number where nothing moved

    def changed(self):
        """(B, P) bool: masked, or moved; a patch that was permuted to its own place is neither."""
        return self.masked | (self.source != torch.arange(self.source.shape[1], device=self.source.device))

    def undone(self):
        """The corruption that puts moved patches back."""
        return self._replace(source=self.source.argsort(1))

    def to(self, device):
        return Corruption(self.grid, *(x.to(device, non_blocking=True) for x in self[1:]))


def whole_patches(padding, patch):
    """Which patches lie wholly inside their image: padding (B, H, W) -> (B, h, w) bool."""
    H, W = padding.shape[-2:]
    outside = F.pad(padding, (0, -W % patch, 0, -H % patch), value=True)
    return F.max_pool2d(outside[:, None].float(), patch)[:, 0] == 0


def spread(values, cells, size):
    """Values of patches at each of their cells, `cells` a side: (B, h, w) -> (B, *size)."""
    return values.repeat_interleave(cells, 1).repeat_interleave(cells, 2)[:, :size[0], :size[1]]


def corrupt_map(x, corruption, cells, fill):
    """Corrupt a map or image x (B, C, H, W) with patches of cells x cells; fill (C,) stands in the masked ones."""
    B, C, H, W = x.shape
    source, masked = (t.unflatten(1, corruption.grid) for t in (corruption.source, corruption.masked))  # (B, h, w)
    row = spread(source // corruption.grid[1], cells, (H, W)) * cells + torch.arange(H, device=x.device)[:, None] % cells
    column = spread(source % corruption.grid[1], cells, (H, W)) * cells + torch.arange(W, device=x.device) % cells
    moved = x.flatten(2).gather(2, (row * W + column).view(B, 1, H * W).expand(-1, C, -1)).view_as(x)
    return torch.where(spread(masked, cells, (H, W))[:, None], fill[:, None, None], moved)


def pick(rng, patches, share):
    """A share of the patches, drawn at random, in random order."""
    return rng.permutation(patches)[:round(share * len(patches))]


def encode(model, task, images, padding, corruption, clean=False):
    """Backbone and encoder: (memory of the corrupted images, memory of the clean ones, or None if not wanted).

    model: anything with features(images, padding) -> levels and encode(levels) -> memory. When the corruption is in the
    feature maps the backbone sees each image once. The encoder runs once, over corrupted and clean maps as one batch.
    """
    if not task.corrupts:
        memory = model.encode(model.features(images, padding))
        return memory, memory
    levels = model.features(images, padding) if clean or task.on == "features" else None
    corrupted = (task.corrupt_levels(levels, corruption) if task.on == "features" else
                 model.features(task.corrupt_images(images, corruption), padding))
    if not clean:
        return model.encode(corrupted), None
    # a level is a named tuple of tensors, all with the batch first: .features, .padding, .position
    memory = model.encode([a._make(map(torch.cat, zip(a, b))) for a, b in zip(corrupted, levels)])
    B = len(images)
    return [x._make(t[:B] for t in x) for x in memory], [x._make(t[B:] for t in x) for x in memory]


# ---------------------------------------------------------------- what all tasks share

class Task(nn.Module):
    """Corrupts patches and predicts something of each from the finest level of the memory.

    dim, strides: of the detector's maps, finest first. patch: pixels a side.
    ratio: share of an image's patches that is corrupted. on: "features" or "image". loss_on: "corrupted" or "all"
    patches count. image_size: pixels a side if all images have one size, else None. tokenizer: of visual_tokens.py.
    Raises ValueError for values that do not go together.

    A task defines the following, of which PixelTask has all but `corrupt`, and ClassTask all but that, `outputs` and `target`:

        corrupt(rng, patches, grid, masked, source)    mark what happens to the patches of one image
        outputs()                           -> how many numbers the head predicts at each cell
        predict(x (B, C, H/s, W/s), (H, W)) -> prediction, from the memory by way of self.head
        target(images, corruption)          -> what it is compared with; PixelTask (B, 3, H, W), ClassTask (B, h, w) int64
        errors(prediction, target)          -> the error of each patch (B, P), and whether it is right (B, P) or None
        panels(…)                           -> rows of its picture
    """

    corrupts = True  # else the clean images will do, and every patch counts
    tokens = False   # whether it needs a tokenizer

    def __init__(self, dim, strides, patch, ratio=0.5, on="features", loss_on="corrupted", image_size=None,
                 tokenizer=None):
        super().__init__()
        self.strides, self.patch, self.ratio, self.on = strides, patch, ratio, on
        self.count_all = loss_on == "all" or not self.corrupts
        self.image_size, self.tokenizer = image_size, tokenizer
        if self.patch % strides[0] or any(self.patch % s and s % self.patch for s in strides):
            cells = ", ".join(map(str, strides))
            raise ValueError(f"a patch of {self.patch} pixels does not cover whole cells of the maps (strides {cells}); take --ssl_patch "
                             f"{cells} or a multiple of {strides[-1]}")
        number = round(ratio * (image_size // patch) ** 2) if image_size and self.corrupts else 2
        if number < 2 and not self.count_all or image_size and image_size < patch:
            raise ValueError(f"of images of {image_size} pixels, {number} patches of {patch} would be corrupted; take a larger "
                             "--image_size or --ssl_ratio, or a smaller --ssl_patch")
        if on == "features" and self.corrupts:
            self.mask_vectors = nn.Parameter(torch.randn(len(strides), dim) * 0.02)  # what stands in a masked cell
        self.head = nn.Conv2d(dim, self.outputs(), 1)
        nn.init.normal_(self.head.weight, std=0.02)  # first predictions: nearly the mean colour, or all classes alike
        nn.init.zeros_(self.head.bias)

    def corrupt(self, rng, patches, grid, masked, source):
        """Mark in masked (P,) and source (P,) what happens to one image; patches: the numbers of its whole ones."""

    def corruption(self, padding, seeds):
        """The corruption of a batch, drawn for each image from its own seed alone: padding (B, H, W), B integers."""
        whole = whole_patches(padding.cpu(), self.patch).numpy()  # (B, h, w)
        grid, whole = whole.shape[1:], whole.reshape(len(whole), -1)
        masked, source = np.zeros_like(whole), np.arange(whole.shape[1])[None].repeat(len(whole), 0)
        for i, seed in enumerate(seeds):
            self.corrupt(np.random.default_rng(seed), whole[i].nonzero()[0], grid, masked[i], source[i])
        return Corruption(grid, *map(torch.from_numpy, (whole, masked, source)))

    def corrupt_images(self, images, corruption):
        return corrupt_map(images, corruption, self.patch, images.new_zeros(3))  # 0: the mean colour

    def corrupt_levels(self, levels, corruption):
        """The same for feature maps; a cell larger than a patch is masked if any patch under it changed, so nothing
        is left of it in the maps. (What the CNN has carried from there into other cells remains; corrupting the image
        avoids that.)"""
        out = []
        for level, stride, fill in zip(levels, self.strides, self.mask_vectors):
            x, fill = level.features, fill.to(level.features.dtype)
            if self.patch % stride == 0:
                x = corrupt_map(x, corruption, self.patch // stride, fill)
            else:
                changed = corruption.changed().unflatten(1, corruption.grid)[:, None].float()  # (B, 1, h, w)
                touched = F.max_pool2d(changed, stride // self.patch, ceil_mode=True) > 0
                x = torch.where(touched, fill[:, None, None], x)
            out.append(level._replace(features=x))
        return out

    def counted(self, corruption):
        """Patches that the loss counts: (B, P) bool."""
        return corruption.whole & (corruption.changed() | self.count_all)

    def compare(self, memory, images, corruption):
        """Predict and compare: (prediction, target, error of each patch (B, P), right or not (B, P) or None)."""
        finest = memory[0].features + memory[0].position  # as the detector's own layers see it
        prediction, target = self.predict(finest, images.shape[-2:]), self.target(images, corruption)
        error, right = self.errors(prediction, target)
        return prediction, target, error, right

    def loss(self, memory, images, corruption, total=None):
        """The mean error of the counted patches; 0 if there are none. total: what to divide by instead of their number, greater
        than 0, for a batch that is a part of a larger one."""
        _, _, error, _ = self.compare(memory, images, corruption)
        counted = self.counted(corruption)
        return (error * counted).sum() / (total or max(counted.sum(), 1))

    def panels(self, images, prediction, target, corruption):
        """Rows of the picture: {title: (images (B, 3, H, W), patches to frame (B, P) or None, right or not or None)}."""
        corrupted, moved = self.corrupt_images(images, corruption), corruption.changed() & ~corruption.masked
        title = "corrupted" if self.on == "image" else "corrupted (here the image, for the task its feature maps)"
        title += "; white: moved" if moved.any() else ""
        return {"original": (images, None, None), **({title: (corrupted, moved, None)} if self.corrupts else {})}


class PixelTask(Task):
    """Predicts pixels, each cell of the finest level its own s x s of them; L1 loss."""

    def outputs(self):
        return 3 * self.strides[0] ** 2

    def predict(self, x, size):  # (B, C, H/s, W/s) -> (B, 3, H, W)
        return F.pixel_shuffle(self.head(x), self.strides[0])[..., :size[0], :size[1]]

    def target(self, images, corruption):
        return images

    def errors(self, prediction, target):
        error = (prediction - target).abs().mean(1, keepdim=True)  # (B, 1, H, W)
        return F.avg_pool2d(error, self.patch, ceil_mode=True).flatten(1), None

    def panels(self, images, prediction, target, corruption):
        counted = self.counted(corruption)
        here = spread(counted.unflatten(1, corruption.grid), self.patch, images.shape[-2:])[:, None]
        shown = {} if target is images else {"target": (target, counted, None)}
        return {**super().panels(images, prediction, target, corruption), **shown,
                "predicted in the frames, the rest as it is": (torch.where(here, prediction, target), counted, None)}


class ClassTask(Task):
    """Predicts one of K classes for each patch from the mean of its cells; cross-entropy."""

    def predict(self, x, size):  # (B, C, H/s, W/s) -> (B, K, h, w)
        return self.head(F.avg_pool2d(x, self.patch // self.strides[0], ceil_mode=True))

    def errors(self, prediction, target):
        error = F.cross_entropy(prediction, target, reduction="none")
        return error.flatten(1), (prediction.argmax(1) == target).flatten(1)

    def panels(self, images, prediction, target, corruption):
        right = (prediction.argmax(1) == target).flatten(1)
        return {**super().panels(images, prediction, target, corruption), "answered; green: right, red: wrong": (
            self.corrupt_images(images, corruption), self.counted(corruption), right)}


# ---------------------------------------------------------------- the five tasks

class Reconstruct(PixelTask):
    corrupts = False


class MaskedPixels(PixelTask):
    def corrupt(self, rng, patches, grid, masked, source):
        masked[pick(rng, patches, self.ratio)] = True


class JigsawPixels(PixelTask):
    def corrupt(self, rng, patches, grid, masked, source):
        chosen = pick(rng, patches, self.ratio)
        source[chosen] = rng.permutation(chosen)


class MaskedTokens(ClassTask):
    tokens = True
    corrupt = MaskedPixels.corrupt

    def outputs(self):
        return len(self.tokenizer.codes)

    def target(self, images, corruption):  # (B, h, w)
        return self.tokenizer(images)

    def panels(self, images, prediction, target, corruption):
        counted, predicted = self.counted(corruption), prediction.argmax(1)
        tokens = torch.where(counted.unflatten(1, corruption.grid), predicted, target)
        return {**Task.panels(self, images, prediction, target, corruption),
                "its visual tokens": (self.tokenizer.paint(target, images.shape[-2:]), counted, None),
                "predicted tokens; green: right, red: wrong": (self.tokenizer.paint(tokens, images.shape[-2:]), counted,
                                     (predicted == target).flatten(1))}


class JigsawPositions(ClassTask):
    corrupt = JigsawPixels.corrupt

    def outputs(self):
        if not self.image_size:
            raise ValueError("jigsaw-discrete has one class for each place in the grid, so all images must have one size: "
                             "add --image_size N")
        return (-(-self.image_size // self.patch)) ** 2

    def target(self, images, corruption):  # (B, h, w)
        return corruption.source.unflatten(1, corruption.grid)

    def panels(self, images, prediction, target, corruption):
        """The patches that count are put back where all predictions together, as one assignment, want them."""
        guess = corruption.source.clone()
        for scores, source, counted in zip(prediction.flatten(2).log_softmax(1), guess, self.counted(corruption)):
            patches = counted.nonzero()[:, 0]  # the moved ones or all: in both cases they change places among themselves
            place, origin = linear_sum_assignment(-scores[patches][:, patches].T.cpu().numpy())  # both over `patches`
            source[patches[place]] = patches[origin]
        put_back = corruption._replace(source=guess).undone()
        solved = corrupt_map(self.corrupt_images(images, corruption), put_back, self.patch, images.new_zeros(3))
        right = put_back.source == corruption.undone().source
        title = "put back where the model thinks, one to each place; green: right, red: wrong"
        return {**Task.panels(self, images, prediction, target, corruption), title: (solved, put_back.changed() | ~right, right)}


TASKS = {"reconstruct": Reconstruct, "mim-continuous": MaskedPixels, "mim-discrete": MaskedTokens,
         "jigsaw-continuous": JigsawPixels, "jigsaw-discrete": JigsawPositions}


def build_task(name, dim, strides, patch=None, tokenizer="kmeans", vocabulary=64, tokenizer_weights=None, **options):
    """The task of that name; the other arguments are those of Task. vocabulary: number of k-means tokens.

    Its `config` holds the arguments, as plain values. Raises ValueError for values that do not go together.
    """
    config = {"name": name, "dim": dim, "strides": strides, "patch": patch or max(strides), **options}
    if TASKS[name].tokens:
        config.update(tokenizer=tokenizer, vocabulary=vocabulary, tokenizer_weights=tokenizer_weights)
        options["tokenizer"] = (
            visual_tokens.Dalle(config["patch"], tokenizer_weights) if tokenizer == "dalle" else
            visual_tokens.KMeans(config["patch"], vocabulary))
    task = TASKS[name](dim, strides, config["patch"], **options)
    task.config = config
    return task
