"""Visual tokens: a number for each patch, from k-means or from the encoder published with DALL-E.
Letters as in ssl_tasks.py: B images of H x W pixels, normalised, with h x w patches; K tokens."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import nn

from util.files import wrap_read_errors
from util.images import unnormalize


def pad_to_patches(x, patch, value=0.0):
    """Extend maps (..., H, W) at the right and the bottom until they consist of whole patches."""
    H, W = x.shape[-2:]
    missing_columns = -W % patch
    missing_rows = -H % patch
    return F.pad(x, (0, missing_columns, 0, missing_rows), value=value)


def patch_thumbnails(images, patch):
    """Reduce each patch to 4 x 4 pixels: (B, 3, H, W) -> (B, h, w, 48)."""
    small = F.avg_pool2d(pad_to_patches(images, patch), patch // 4)
    return F.pixel_unshuffle(small, 4).movedim(1, -1)


class Tokenizer(nn.Module):
    """Gives every patch a visual token: (B, 3, H, W) -> (B, h, w) int64.
    `codebook` (K, 48) holds what a token looks like, as a thumbnail of 4 x 4 pixels."""

    def __init__(self, patch, vocab_size):
        super().__init__()
        self.patch = patch
        self.register_buffer("codebook", torch.zeros(vocab_size, 48))

    def decode(self, tokens, size):
        """A picture of tokens: (B, h, w) -> (B, 3, *size)."""
        small = F.pixel_shuffle(self.codebook[tokens].movedim(-1, 1), 4)
        return F.interpolate(small, scale_factor=self.patch / 4)[..., : size[0], : size[1]]


class KMeans(Tokenizer):
    """The nearest of K typical patches, found by k-means on thumbnails of training images."""

    def fit(self, batches, seed):
        """batches: (images, which patches to take (B, h, w) bool). ValueError if too few."""
        sample = torch.cat([patch_thumbnails(x, self.patch)[taken] for x, taken in batches]).numpy()
        K, n = len(self.codebook), len(sample)
        if n < K:
            message = f"a vocabulary of {K} needs as many patches, the tokenizer's sample has {n}"
            raise ValueError(f"{message}; lower it or take more images")
        start = "++" if K <= 256 else "points"  # k-means++ takes minutes beyond
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a code without patches stays where it is
            codes, _ = kmeans2(sample, K, iter=20, minit=start, seed=np.random.default_rng(seed))
        self.codebook.copy_(torch.from_numpy(codes))

    def forward(self, images):
        return torch.cdist(patch_thumbnails(images, self.patch), self.codebook).argmin(-1)


class Dalle(Tokenizer):
    """The tokens of DALL-E's discrete VAE (arXiv 2102.12092), published by OpenAI, as in BEiT.
    It gives a token for 8 x 8 pixels, so images are reduced until a patch has 8 x 8. Its weights
    stay in their file and are not part of a checkpoint."""

    def __init__(self, patch, weights):
        self.state = load_dalle(weights)
        super().__init__(patch, len(self.state["blocks.output.conv.b"]))

    def fit(self, batches, seed):
        """For pictures only: a token looks like the mean of the patches that have it, or grey."""
        sample = [(self(x)[taken], patch_thumbnails(x, self.patch)[taken]) for x, taken in batches]
        tokens, looks = map(torch.cat, zip(*sample))
        count = tokens.bincount(minlength=len(self.codebook)).clamp(min=1)
        self.codebook.index_add_(0, tokens, looks).div_(count[:, None])

    @torch.no_grad()
    def forward(self, images):
        pixels = pad_to_patches(unnormalize(images), self.patch)
        pixels = F.avg_pool2d(pixels, self.patch // 8) * 0.8 + 0.1  # the range DALL-E knows
        self.state = {name: tensor.to(images.device) for name, tensor in self.state.items()}
        return dalle_logits(self.state, pixels).argmax(1)


def load_dalle(path):
    """The weights of DALL-E's encoder, as published (a pickled module) or as a state dict.
    Plain modules stand for its classes, so none of its code is run. ValueError names the file."""
    classes = [f"dall_e.{x}" for x in ("encoder.Encoder", "encoder.EncoderBlock", "utils.Conv2d")]
    names = "container.Sequential", "activation.ReLU", "linear.Identity", "pooling.MaxPool2d"
    classes += [f"torch.nn.modules.{name}" for name in names]
    with wrap_read_errors(path, "OpenAI's encoder.pkl of DALL-E"):
        with torch.serialization.safe_globals([(nn.Module, name) for name in classes]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        state = content if isinstance(content, dict) else content.state_dict()
        state = {name: tensor.detach().float() for name, tensor in state.items()}
        with torch.no_grad():
            dalle_logits(state, torch.zeros(1, 3, 8, 8))
    return state


def dalle_logits(state, x):
    """DALL-E's encoder as a function of its weights: (B, 3, 8h, 8w) -> (B, K, h, w)."""

    def conv(name, x):
        weight = state[f"blocks.{name}.w"]
        return F.conv2d(x, weight, state[f"blocks.{name}.b"], padding=weight.shape[-1] // 2)

    x = conv("input", x)
    for group, block in np.ndindex(4, 2):
        name = f"group_{group + 1}.block_{block + 1}"
        shortcut = update = x
        if group and not block:
            update = F.max_pool2d(x, 2)
            shortcut = conv(f"{name}.id_path", update)
        for n in (1, 2, 3, 4):
            update = conv(f"{name}.res_path.conv_{n}", F.relu(update))
        x = shortcut + update / 64
    return conv("output.conv", F.relu(x))
