"""Images as users have them: any mode, any orientation, decoded to RGB."""

import re

import torch
from PIL import Image, ImageOps, PngImagePlugin

from util.files import DataError, wrap_read_errors

Image.MAX_IMAGE_PIXELS = 2**30  # Pillow warns of more than a tenth of it, but satellites see far


PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # editors leave megabytes


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbones expect


def read_image(path, at_least=None):
    """(a picture as it is displayed, as RGB; its (width, height) so). Raises DataError.
    A JPEG is decoded at a half, a quarter or an eighth of its size if that leaves `at_least`
    pixels a side. What lies under transparency is shown; a fourth band of TIFF is left out."""
    with wrap_read_errors(path, "an image that can be read"), Image.open(path) as image:
        reject_high_bit_depth(path, image)
        turn, size = orientation(image), displayed_size(image)
        if at_least:
            image.draft("RGB", (at_least, at_least))
        image.load()
        image = ImageOps.exif_transpose(image) if turn > 1 else image
        if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
            image = image.convert("RGBA")  # which Pillow turns into RGB without a warning
        return image.convert("RGB"), size


def read_size(path):
    """(width, height) of an image as it is displayed. Raises DataError."""
    with wrap_read_errors(path, "an image that can be read"), Image.open(path) as image:
        return displayed_size(image)


def orientation(image):
    """How a camera was held, 1 to 8, as EXIF says it; 1 is upright."""
    try:
        turn = image.getexif().get(0x0112)
    except Exception:  # the picture itself may be whole
        turn = None
    return turn if turn in range(1, 9) else 1


def displayed_size(image):
    """(width, height) of an opened image after turning it."""
    tags = getattr(image, "tag_v2", {})  # of TIFF, whose size Pillow turns in some versions
    size = (tags[256], tags[257]) if {256, 257} <= tags.keys() else image.size
    return size[::-1] if orientation(image) > 4 else size


def reject_high_bit_depth(path, image):
    """DataError for more than 8 bits a channel: converting would make it white, or nearly black."""
    codec = " ".join(str(part) for tile in image.tile for part in tile)
    deep = image.mode.startswith(("I", "F")) or re.search(r"\w;(16|32)[BLN]|SGI16", codec)
    if image.format == "TIFF":
        deep = deep or max(image.tag_v2.get(258, (8,))) > 8
    if image.format == "PPM":  # the largest value stands last
        deep = deep or int((re.findall(r"\d+", codec) or [255])[-1]) > 255
    if image.format == "JPEG2000":  # the depth is in the header of its code stream
        with open(path, "rb") as file:
            header = file.read(2**16).partition(b"\xff\x4f\xff\x51")[2]
        deep = deep or len(header) > 38 and header[38] % 128 > 7
    if deep:
        message = f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 first"
        raise DataError(f"{path}: {message}")


def check_size(image, name, size):
    """DataError if an image has another size than its annotations say: boxes would be off."""
    said = image.get("width") or size[0], image.get("height") or size[1]
    if said != size:
        raise DataError(
            f"{name} should have {said[0]} x {said[1]} pixels, the file has {size[0]} x {size[1]}"
        )


def unnormalize(images):
    """Images (..., 3, H, W) as the models see them, in 0..1 again."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)
