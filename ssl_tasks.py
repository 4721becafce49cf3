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
import hashlib
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from isaid import MEAN, STD

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


def apply(x, corruption, cells, fill):
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
    """One pass of backbone and encoder: (memory of the corrupted images, memory of the clean ones, or None if not wanted).

    model: anything with features(images, padding) -> levels and encode(levels) -> memory. When the corruption is in the
    feature maps the backbone sees each image once; the encoder always takes corrupted and clean maps as one batch.
    """
    if not task.corrupts:
        memory = model.encode(model.features(images, padding))
        return memory, memory
    B = len(images)
    if task.on == "image":
        corrupted = task.corrupt_images(images, corruption)
        both = (torch.cat([corrupted, images]), torch.cat([padding, padding])) if clean else (corrupted, padding)
        levels = model.features(*both)
    else:
        levels = model.features(images, padding)
        corrupted = task.corrupt_levels(levels, corruption)
        levels = [type(a)(*map(torch.cat, zip(a, b))) for a, b in zip(corrupted, levels)] if clean else corrupted
    memory = model.encode(levels)
    if not clean:
        return memory, None
    return [type(x)(*(t[:B] for t in x)) for x in memory], [type(x)(*(t[B:] for t in x)) for x in memory]


# ---------------------------------------------------------------- what all tasks share

class Task(nn.Module):
    """Corrupts patches and predicts something of each from the finest level of the memory.

    dim, strides: of the detector's maps, finest first. patch: pixels a side, None for a cell of the coarsest level.
    ratio: share of an image's patches that is corrupted. on: "features" or "image". loss_on: "corrupted" or "all"
    patches count. image_size: pixels a side if all images have one size, else None. tokenizer: see below.
    Raises ValueError for values that do not go together.
    """

    corrupts = True  # else the clean images will do, and every patch counts
    tokens = False   # whether it needs a tokenizer

    def __init__(self, dim, strides, patch=None, ratio=0.5, on="features", loss_on="corrupted", image_size=None,
                 tokenizer=None):
        super().__init__()
        self.strides, self.patch, self.ratio, self.on = strides, patch or max(strides), ratio, on
        self.count_all = loss_on == "all" or not self.corrupts
        self.image_size, self.tokenizer = image_size, tokenizer
        if self.patch % strides[0] or any(self.patch % s and s % self.patch for s in strides):
            raise ValueError(f"a patch of {self.patch} pixels does not cover whole cells of the maps (strides "
                             f"{', '.join(map(str, strides))}); take --ssl_patch {strides[0]} times a power of 2")
        if image_size and image_size < 2 * self.patch:
            raise ValueError(f"images of {image_size} pixels hold too few patches of {self.patch}; take a larger "
                             "--image_size or a smaller --ssl_patch")
        if on == "features":
            self.mask_vectors = nn.Parameter(torch.randn(len(strides), dim) * 0.02)  # what stands in a masked cell
        self.head = nn.Conv2d(dim, self.outputs(), 1)

    def corrupt(self, rng, patches, grid, masked, source):
        """Mark in masked (P,) and source (P,) what happens to one image; patches: the numbers of its whole ones."""
        raise NotImplementedError

    def corruption(self, padding, seeds):
        """The corruption of a batch, drawn for each image from its own seed alone: padding (B, H, W), B integers."""
        whole = whole_patches(padding.cpu(), self.patch).numpy()  # (B, h, w)
        grid, whole = whole.shape[1:], whole.reshape(len(whole), -1)
        masked, source = np.zeros_like(whole), np.arange(whole.shape[1])[None].repeat(len(whole), 0)
        for i, seed in enumerate(seeds):
            self.corrupt(np.random.default_rng(seed), whole[i].nonzero()[0], grid, masked[i], source[i])
        return Corruption(grid, *map(torch.from_numpy, (whole, masked, source)))

    def corrupt_images(self, images, corruption):
        return apply(images, corruption, self.patch, images.new_zeros(3))  # 0: the mean colour

    def corrupt_levels(self, levels, corruption):
        """The same for feature maps; a cell larger than a patch is masked if any patch under it changed, so nothing leaks."""
        out = []
        for level, stride, fill in zip(levels, self.strides, self.mask_vectors):
            x, fill = level.features, fill.to(level.features.dtype)
            if self.patch % stride == 0:
                x = apply(x, corruption, self.patch // stride, fill)
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
        prediction = self.predict(memory[0].features + memory[0].position, images.shape[-2:])
        target = self.target(images, corruption)
        return prediction, target, *self.errors(prediction, target)

    def loss(self, memory, images, corruption):
        """The mean error of the counted patches; 0 if there are none."""
        _, _, error, _ = self.compare(memory, images, corruption)
        counted = self.counted(corruption)
        return (error * counted).sum() / counted.sum().clamp(min=1)


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
        """Rows of the picture: {title: (images (B, 3, H, W), patches to frame (B, P), right or not or None)}."""
        counted = self.counted(corruption)
        here = spread(counted.unflatten(1, corruption.grid), self.patch, images.shape[-2:])[:, None]
        target = torch.where(spread(corruption.whole.unflatten(1, corruption.grid), self.patch, images.shape[-2:])[:, None],
                             target, images)
        return {"original": (images, None, None), "corrupted": (self.corrupt_images(images, corruption), None, None),
                "predicted": (torch.where(here, prediction, target), counted, None)}


class ClassTask(Task):
    """Predicts one of K classes for each patch from the mean of its cells; cross-entropy."""

    def predict(self, x, size):  # (B, C, H/s, W/s) -> (B, K, h, w)
        return self.head(F.avg_pool2d(x, self.patch // self.strides[0], ceil_mode=True))

    def errors(self, prediction, target):
        error = F.cross_entropy(prediction, target, reduction="none")
        return error.flatten(1), (prediction.argmax(1) == target).flatten(1)


# ---------------------------------------------------------------- the five tasks

class Reconstruct(PixelTask):
    corrupts = False

    def corrupt(self, rng, patches, grid, masked, source):
        pass


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
        return {"original": (images, None, None), "corrupted": (self.corrupt_images(images, corruption), None, None),
                "its visual tokens": (self.tokenizer.paint(target, images.shape[-2:]), counted, None),
                "predicted tokens": (self.tokenizer.paint(tokens, images.shape[-2:]), counted,
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
        """The patches are put back where all predictions together, as one assignment, want them."""
        guess = corruption.source.clone()
        for scores, source, whole in zip(prediction.flatten(2).log_softmax(1), guess, corruption.whole):
            patches = whole.nonzero()[:, 0]
            place, origin = linear_sum_assignment(-scores[patches][:, patches].T.cpu().numpy())  # both over `patches`
            source[patches[place]] = patches[origin]
        shuffled, put_back = self.corrupt_images(images, corruption), corruption._replace(source=guess).undone()
        right = put_back.source == corruption.undone().source
        return {"original": (images, None, None), "shuffled": (shuffled, self.counted(corruption), None),
                "put back where the model thinks": (apply(shuffled, put_back, self.patch, images.new_zeros(3)),
                                                    put_back.changed() | ~right, right)}


TASKS = {"reconstruct": Reconstruct, "mim-continuous": MaskedPixels, "mim-discrete": MaskedTokens,
         "jigsaw-continuous": JigsawPixels, "jigsaw-discrete": JigsawPositions}


# ---------------------------------------------------------------- visual tokens

def thumbnails(images, patch):
    """Each patch reduced to 4 x 4 pixels: (B, 3, H, W) -> (B, h, w, 48)."""
    H, W = images.shape[-2:]
    small = F.avg_pool2d(F.pad(images, (0, -W % patch, 0, -H % patch)), patch // 4)  # (B, 3, 4h, 4w)
    return small.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)


class Tokenizer(nn.Module):
    """Gives every patch a visual token; `codes` (K, 48) holds what a token looks like, as a thumbnail of 4 x 4 pixels."""

    def __init__(self, patch, vocabulary):
        super().__init__()
        self.patch = patch
        self.register_buffer("codes", torch.zeros(vocabulary, 48))

    def paint(self, tokens, size):
        """A picture of tokens: (B, h, w) -> (B, 3, *size)."""
        B, h, w = tokens.shape
        small = self.codes[tokens].view(B, h, w, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, 4 * h, 4 * w)
        return F.interpolate(small, scale_factor=self.patch / 4)[..., :size[0], :size[1]]


class KMeans(Tokenizer):
    """The nearest of K typical patches, found by k-means on the thumbnails of training images."""

    def fit(self, batches, seed, rounds=20):
        """batches: (images, padding) of a sample of training images. Raises ValueError if they hold too few patches."""
        sample = torch.cat([thumbnails(images, self.patch)[whole_patches(padding, self.patch)]
                            for images, padding in batches]).numpy()  # (n, 48)
        if len(sample) < len(self.codes):
            raise ValueError(f"the sample of the tokenizer has {len(sample)} patches, fewer than --vocabulary "
                             f"{len(self.codes)}; lower it or raise --tokenizer_images")
        codes, start = len(self.codes), "++"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a code without patches stays where it is
            for _ in tqdm(range(rounds), "k-means", leave=False, disable=None):
                codes, _ = kmeans2(sample, codes, iter=1, minit=start, seed=np.random.default_rng(seed))
                start = "matrix"
        self.codes.copy_(torch.from_numpy(codes))

    def forward(self, images):
        """(B, 3, H, W) -> (B, h, w) int64."""
        return torch.cdist(thumbnails(images, self.patch), self.codes).argmin(-1)


class Dalle(Tokenizer):
    """The tokens of DALL-E's discrete VAE (arXiv 2102.12092), whose encoder OpenAI has published, as in BEiT.

    It gives a token for 8 x 8 pixels, so images are reduced until a patch has 8 x 8. Its weights stay in their file and
    are not part of a checkpoint. The tokens of an image, as cropped and flipped, are computed once and kept.
    """

    def __init__(self, patch, weights, capacity=100_000):
        state = load_dalle(weights)
        super().__init__(patch, len(state["blocks.output.conv.b"]))
        self.state, self.cache, self.capacity = state, {}, capacity

    def fit(self, batches, seed):
        """For pictures only: a token looks like the mean of the patches in a sample that have it (grey if none has)."""
        count = torch.zeros(len(self.codes), 1)
        for images, padding in batches:
            whole = whole_patches(padding, self.patch)
            tokens = self(images)[whole]
            self.codes.index_add_(0, tokens, thumbnails(images, self.patch)[whole])
            count.index_add_(0, tokens, torch.ones(len(tokens), 1))
        self.codes /= count.clamp(min=1)

    @torch.no_grad()
    def forward(self, images):
        """(B, 3, H, W) -> (B, h, w) int64."""
        H, W = images.shape[-2:]
        mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
        pixels = F.pad(images * std + mean, (0, -W % self.patch, 0, -H % self.patch))
        pixels = F.avg_pool2d(pixels, self.patch // 8).clamp(0, 1) * 0.8 + 0.1  # the range DALL-E was trained on
        keys = [hashlib.blake2b(image.numpy().tobytes()).digest() for image in pixels.cpu()]
        new = [i for i, key in enumerate(keys) if key not in self.cache]
        if new:
            if len(self.cache) + len(new) > self.capacity:
                self.cache = {key: self.cache[key] for key in keys if key in self.cache}
            self.state = {name: tensor.to(images.device) for name, tensor in self.state.items()}
            tokens = dalle_logits(self.state, pixels[new]).argmax(1).to("cpu", torch.int16)  # (new, h, w)
            self.cache.update(zip((keys[i] for i in new), tokens))
        return torch.stack([self.cache[key] for key in keys]).to(images.device, torch.int64)


class _Pickled:
    """Stands for every class of the published file, so that its weights can be read without running its code."""


def load_dalle(path):
    """The weights of DALL-E's encoder, as published (a pickled module) or as a state dict; nothing is executed.

    Raises ValueError naming the file.
    """
    classes = [f"dall_e.{name}" for name in ("encoder.Encoder", "encoder.EncoderBlock", "utils.Conv2d")]
    classes += [f"torch.nn.modules.{name}" for name in ("container.Sequential", "activation.ReLU", "linear.Identity",
                                                        "pooling.MaxPool2d")]
    try:
        with torch.serialization.safe_globals([(_Pickled, name) for name in classes]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(content if isinstance(content, dict) else _weights(content))
        state = {name: tensor.detach().float() for name, tensor in state.items()}
        with torch.no_grad():
            dalle_logits(state, torch.zeros(1, 3, 8, 8))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; --tokenizer_weights wants the encoder.pkl that OpenAI published") from None
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path}: is not the published encoder of DALL-E, or damaged ({type(error).__name__})") from None
    return state


def _weights(module, prefix=""):
    for name, tensor in module._parameters.items():
        yield prefix + name, tensor
    for name, child in module._modules.items():
        yield from _weights(child, f"{prefix}{name}.")


def dalle_logits(state, x):
    """DALL-E's encoder as a function of its weights: (B, 3, 8h, 8w) in 0.1..0.9 -> (B, K, h, w)."""
    def conv(name, x):
        weight = state[f"blocks.{name}.w"]
        return F.conv2d(x, weight, state[f"blocks.{name}.b"], padding=weight.shape[-1] // 2)

    blocks = sorted({name.split(".res_path")[0].removeprefix("blocks.") for name in state if ".res_path" in name})
    x = conv("input", x)
    for i, block in enumerate(blocks):
        if i and block.endswith("block_1"):  # between the four groups
            x = F.max_pool2d(x, 2)
        update = x
        for n in (1, 2, 3, 4):
            update = conv(f"{block}.res_path.conv_{n}", F.relu(update))
        x = (conv(f"{block}.id_path", x) if f"blocks.{block}.id_path.w" in state else x) + update / len(blocks) ** 2
    return conv("output.conv", F.relu(x))


def build_task(name, dim, strides, patch=None, tokenizer="kmeans", vocabulary=64, tokenizer_weights=None, **options):
    """The task of that name; the other arguments are those of Task. vocabulary: number of k-means tokens.

    Its `config` holds the arguments, as plain values. Raises ValueError for values that do not go together.
    """
    config = {"name": name, "dim": dim, "strides": strides, "patch": patch or max(strides), **options}
    if TASKS[name].tokens:
        config.update(tokenizer=tokenizer, vocabulary=vocabulary, tokenizer_weights=tokenizer_weights)
        options["tokenizer"] = (Dalle(config["patch"], tokenizer_weights) if tokenizer == "dalle" else
                                KMeans(config["patch"], vocabulary))
    task = TASKS[name](dim, strides, config["patch"], **options)
    task.config = config
    return task
