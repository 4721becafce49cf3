"""Visual tokens: a number for each patch of an image, from k-means or from the encoder published with DALL-E.

Letters as in ssl_tasks.py: B images of H x W pixels, normalised, with h x w patches; K tokens.
"""
import hashlib
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import nn
from tqdm import tqdm

import parallel
from isaid import unnormalise


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
        """batches: (images, which patches to take (B, h, w) bool). Raises ValueError if those are too few."""
        sample = torch.cat([thumbnails(images, self.patch)[taken] for images, taken in batches]).numpy()  # (n, 48)
        if len(sample) < len(self.codes):
            raise ValueError(f"the sample of the tokenizer has {len(sample)} patches, fewer than --vocabulary "
                             f"{len(self.codes)}; lower it, raise --tokenizer_images or take more images")
        codes, start = len(self.codes), "++" if len(self.codes) <= 256 else "points"  # k-means++ takes minutes beyond
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a code without patches stays where it is
            for _ in tqdm(range(rounds), "k-means", leave=False, disable=parallel.hidden()):
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
        for images, taken in batches:
            tokens = self(images)[taken]
            self.codes.index_add_(0, tokens, thumbnails(images, self.patch)[taken])
            count.index_add_(0, tokens, torch.ones(len(tokens), 1))
        self.codes /= count.clamp(min=1)

    @torch.no_grad()
    def forward(self, images):
        """(B, 3, H, W) -> (B, h, w) int64."""
        H, W = images.shape[-2:]
        pixels = F.pad(unnormalise(images), (0, -W % self.patch, 0, -H % self.patch))
        pixels = F.avg_pool2d(pixels, self.patch // 8) * 0.8 + 0.1  # the range DALL-E was trained on
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
