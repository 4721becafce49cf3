"""Read image files of any mode and orientation as RGB; undo the normalization of image tensors."""

import re

import torch
from PIL import Image, ImageOps, PngImagePlugin

from util.files import DataError, wrap_read_errors

Image.MAX_IMAGE_PIXELS = 2**30  # Pillow's limit of 89 million is too low for satellite images
PngImagePlugin.MAX_TEXT_CHUNK = 2**28  # bytes; image editors store megabytes of metadata
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

# The backbones expect images normalized by the mean and standard deviation of ImageNet's colors
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

EXIF_ORIENTATION = 0x0112
TIFF_WIDTH = 256
TIFF_HEIGHT = 257
TIFF_BITS_PER_CHANNEL = 258


# ---------------------------------------------------------------- read
def read_image(path, min_size=None):
    """Read an image file as it is displayed, in RGB.

    Transparent pixels show the color that is stored for them; a fourth band of a TIFF is left out.

    min_size: pixels per side that are enough for the caller. A JPEG is then decoded at a half, a
              quarter or an eighth of its size where that leaves as many (None: at its full size).
    Returns (image, (width, height) of the file as it is displayed). Raises DataError.
    """
    with wrap_read_errors(path, "a readable image"), Image.open(path) as image:
        if has_high_bit_depth(path, image):
            problem = f"has more than 8 bits per channel (mode {image.mode})"
            raise DataError(f"{path}: {problem}; convert it to 8-bit first")
        size = displayed_size(image)
        is_turned = orientation(image) > 1
        if min_size:
            image.draft("RGB", (min_size, min_size))
        image.load()
        if is_turned:
            image = ImageOps.exif_transpose(image)
        if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
            image = image.convert("RGBA")  # Pillow converts RGBA to RGB without a warning
        return image.convert("RGB"), size


def read_size(path):
    """Return (width, height) of an image file as it is displayed. Raises DataError."""
    with wrap_read_errors(path, "a readable image"), Image.open(path) as image:
        return displayed_size(image)


def orientation(image):
    """Return the EXIF orientation of an opened image, 1 to 8; 1 is upright or unknown."""
    if image.format == "PNG":  # getexif would load it, and damaged pixels must not pass unnoticed
        image.load()
    try:
        value = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # the pixels may be readable all the same
        return 1
    if value in range(1, 9):
        return value
    return 1


def displayed_size(image):
    """Return (width, height) of an opened image after it is turned upright."""
    width, height = image.size
    tags = getattr(image, "tag_v2", {})  # of TIFF, for which some versions of Pillow turn the size
    if TIFF_WIDTH in tags and TIFF_HEIGHT in tags:
        width = tags[TIFF_WIDTH]
        height = tags[TIFF_HEIGHT]
    if orientation(image) > 4:  # turned by 90 degrees
        return height, width
    return width, height


def has_high_bit_depth(path, image):
    """Return True if an opened image has more than 8 bits per channel.

    Pillow would convert it to a white or a nearly black image without a warning.
    """
    if image.mode.startswith(("I", "F")):  # integers of 16 or 32 bits, floating point
        return True
    for tile in image.tile:  # (decoder, ...), with the mode of the stored pixels, e.g. "RGB;16B"
        if tile[0] == "SGI16" or re.search(r"\w;(16|32)[BLN]", str(tile[3:])):
            return True
    if image.format == "TIFF":
        return max(image.tag_v2.get(TIFF_BITS_PER_CHANNEL, (8,))) > 8
    if image.format == "PPM":
        options = image.tile[0][3]  # a mode, or (mode, the largest value of a pixel)
        return isinstance(options, tuple) and options[-1] > 255
    if image.format == "JPEG2000":
        with open(path, "rb") as file:
            start = file.read(2**16)
        header = start.partition(b"\xff\x4f\xff\x51")[2]  # after the code stream's markers
        return len(header) > 38 and header[38] % 128 + 1 > 8  # bits of the first channel
    return False


def check_size(record, name, size):
    """Raise DataError if an image has a different size than its annotations say.

    record: the image's entry in a COCO file; "width" and "height" may be absent or 0
    name:   of the image, for the message
    size:   (width, height) of the file
    """
    width, height = size
    annotated_width = record.get("width")
    annotated_height = record.get("height")
    if not annotated_width:
        annotated_width = width
    if not annotated_height:
        annotated_height = height
    if (annotated_width, annotated_height) != (width, height):
        raise DataError(
            f"{name}: annotations say {annotated_width} x {annotated_height} pixels, "
            f"but the image is {width} x {height}"
        )


# ---------------------------------------------------------------- tensors
def unnormalize(images):
    """Return normalized images (..., 3, H, W) as colors in 0..1."""
    mean = torch.tensor(MEAN, device=images.device)[:, None, None]
    std = torch.tensor(STD, device=images.device)[:, None, None]
    return (images * std + mean).clamp(0, 1)
