"""Visual tokens: a number for each patch, from k-means or from the encoder published with DALL-E.

Letters as in ssl_tasks.py: B images of H x W pixels, normalized, with h x w patches; K tokens.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import nn

from util.files import wrap_read_errors
from util.images import unnormalize

# the classes of the published encoder.pkl, a pickled module
DALLE_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
)


def pad_to_patches(x, patch, value=0.0):
    """Extend maps (..., H, W) to the right and downward until they consist of whole patches."""
    H, W = x.shape[-2:]
    missing_rows = -H % patch
    missing_columns = -W % patch
    return F.pad(x, (0, missing_columns, 0, missing_rows), value=value)


def patch_thumbnails(images, patch):
    """Reduce each patch to 4 x 4 pixels: (B, 3, H, W) -> (B, h, w, 48)."""
    small = F.avg_pool2d(pad_to_patches(images, patch), patch // 4)  # (B, 3, 4h, 4w)
    return F.pixel_unshuffle(small, 4).movedim(1, -1)


class Tokenizer(nn.Module):
    """Give every patch a visual token: (B, 3, H, W) -> (B, h, w) int64.

    `codebook` (K, 48) contains a thumbnail of 4 x 4 pixels for each token: what it looks like.
    """

    def __init__(self, patch, vocab_size):
        super().__init__()
        self.patch = patch
        self.register_buffer("codebook", torch.zeros(vocab_size, 48))

    def decode(self, tokens, size):
        """Return an image of what tokens look like: (B, h, w) -> (B, 3, H, W); size: (H, W)."""
        H, W = size
        small = F.pixel_shuffle(self.codebook[tokens].movedim(-1, 1), 4)  # (B, 3, 4h, 4w)
        return F.interpolate(small, scale_factor=self.patch / 4)[..., :H, :W]


class KMeans(Tokenizer):
    """The token of a patch is the nearest of K typical patches."""

    def fit(self, batches, seed):
        """Find the typical patches with k-means on thumbnails of training images.

        batches: pairs of images (B, 3, H, W) and the patches to use (B, h, w) bool
        Raises ValueError if these are fewer than K patches.
        """
        samples = []
        for images, used in batches:
            samples.append(patch_thumbnails(images, self.patch)[used])
        thumbnails = torch.cat(samples).numpy()  # (n, 48)
        K = len(self.codebook)
        n = len(thumbnails)
        if n < K:
            raise ValueError(
                f"k-means needs at least {K} patches for {K} tokens, but only {n} were sampled; "
                f"lower --vocab_size or use more images"
            )
        start = "++"
        if K > 256:
            start = "points"  # k-means++ would take minutes
        rng = np.random.default_rng(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a center without patches stays where it is
            centers, _ = kmeans2(thumbnails, K, iter=20, minit=start, seed=rng)
        self.codebook.copy_(torch.from_numpy(centers))

    def forward(self, images):
        distances = torch.cdist(patch_thumbnails(images, self.patch), self.codebook)
        return distances.argmin(-1)  # (B, h, w)


class Dalle(Tokenizer):
    """The tokens of DALL-E's discrete VAE (arXiv 2102.12092), as BEiT uses them.

    Its encoder has one token per 8 x 8 pixels, so images are reduced until a patch has 8 x 8.
    The weights stay in the file that OpenAI published and are not part of a checkpoint.
    """

    def __init__(self, patch, weights):
        self.state = load_dalle(weights)
        super().__init__(patch, vocab_size=len(self.state["blocks.output.conv.b"]))

    def fit(self, batches, seed):
        """Let each token look like the mean of its patches, or gray; only figures need it.

        batches: as for KMeans.fit
        """
        token_samples = []
        thumbnail_samples = []
        for images, used in batches:
            token_samples.append(self(images)[used])
            thumbnail_samples.append(patch_thumbnails(images, self.patch)[used])
        tokens = torch.cat(token_samples)  # (n,)
        thumbnails = torch.cat(thumbnail_samples)  # (n, 48)
        counts = tokens.bincount(minlength=len(self.codebook)).clamp(min=1)
        self.codebook.index_add_(0, tokens, thumbnails).div_(counts[:, None])

    @torch.no_grad()
    def forward(self, images):
        pixels = pad_to_patches(unnormalize(images), self.patch)
        pixels = F.avg_pool2d(pixels, self.patch // 8)
        pixels = pixels * 0.8 + 0.1  # the range that DALL-E was trained with
        self.state = {name: tensor.to(images.device) for name, tensor in self.state.items()}
        return dalle_logits(self.state, pixels).argmax(1)


def load_dalle(path):
    """Return the state dict of DALL-E's encoder.

    path: the published file, which is a pickled module, or a state dict. Plain modules stand in
          for the classes of the former, so that none of its code is run.
    Raises DataError, which names the file.
    """
    safe_classes = [(nn.Module, name) for name in DALLE_CLASSES]
    with wrap_read_errors(path, "OpenAI's encoder.pkl of DALL-E"):
        with torch.serialization.safe_globals(safe_classes):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            content = content.state_dict()
        state = {name: tensor.detach().float() for name, tensor in content.items()}
        with torch.no_grad():
            dalle_logits(state, torch.zeros(1, 3, 8, 8))  # raises if the weights do not fit
    return state


def dalle_logits(state, pixels):
    """Run DALL-E's encoder: (B, 3, 8h, 8w) -> (B, K, h, w); state: its weights."""

    def conv(name, x):
        weight = state[f"blocks.{name}.w"]
        bias = state[f"blocks.{name}.b"]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    x = conv("input", pixels)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"group_{group}.block_{block}"
            if group > 1 and block == 1:  # half the resolution, other channels
                x = F.max_pool2d(x, 2)
                shortcut = conv(f"{name}.id_path", x)
            else:
                shortcut = x
            update = x
            for n in (1, 2, 3, 4):
                update = conv(f"{name}.res_path.conv_{n}", F.relu(update))
            x = shortcut + update / 64
    return conv("output.conv", F.relu(x))
