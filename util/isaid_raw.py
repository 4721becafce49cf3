"""Find the images and masks of iSAID's raw release, in folders or in the archives of its mirror.

RAW holds, for "train" and "val" and in any mixture:
- images in train/images, or in dotav1.0_images_train.tar.gz, or in images, where that archive
  unpacks the images of both splits
- masks next to the images, as in the official release, or in other folders of train, or in
  isaid_annotations_train.tar.gz
and for "test" only images, in test/images.

An archive is read from its beginning to its end, once. Its images are on the disk only while they
are cut.
"""

import contextlib
import os
import re
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from util import coco
from util.cli import one_line
from util.files import DataError

SPLITS = ("train", "val", "test")
DEVKIT_LEAVES_OUT = ("P1527", "P1530")
MASK_NAME = re.compile(r"(.+)_instance_(id|color)_RGB\.png")


@dataclass
class Download:
    """A file that can be downloaded: its folder's address, its name, its size and checksum."""

    address: str
    name: str
    details: str

    def __str__(self):
        return f"{self.address}/{self.name} ({self.details})"


DOTA = "https://hf.co/datasets/isaaccorley/dota/resolve/672e63236622f7da6ee37fca44c50ac368b77cab"
MASKS = "https://hf.co/datasets/isaaccorley/isaid/resolve/main"
IMAGE_ARCHIVES = {
    "train": Download(
        DOTA,
        "dotav1.0_images_train.tar.gz",
        "10,183,034,823 bytes, MD5 363b472dc3c71e7fa2f4a60223b437ea",
    ),
    "val": Download(
        DOTA,
        "dotav1.0_images_val.tar.gz",
        "3,331,270,337 bytes, MD5 42293219ba61d61c417ae558bbe1f2ba",
    ),
}
MASK_ARCHIVES = {
    "train": Download(MASKS, "isaid_annotations_train.tar.gz", "159 MB"),
    "val": Download(MASKS, "isaid_annotations_val.tar.gz", "53 MB"),
}


# ---------------------------------------------------------------- files
def natural_sort_key(name):
    """Return a key that sorts P2 before P10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def find_file(folder, pattern):
    """Return the path of a file in a folder or one of its subfolders; None if there is none."""
    for path in [*sorted(folder.glob(pattern)), *sorted(folder.glob(f"*/{pattern}"))]:
        if path.is_file():
            return path
    return None


def find_archive(raw, downloads, split):
    """Return the path of the archive of a split in RAW; None if there is none.

    downloads: IMAGE_ARCHIVES or MASK_ARCHIVES
    """
    if split not in downloads:
        return None
    return find_file(raw, downloads[split].name)


def is_png(name):
    """Return True for the names of PNG files that the operating system has not left behind."""
    return name.lower().endswith(".png") and coco.is_user_file(name)


def png_files(folder):
    """Return the PNG files in a folder and its subfolders, {name: path}."""
    files = {}
    for root, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if coco.is_user_file(name))
        for name in names:
            path = Path(root, name)
            if is_png(name) and path.is_file():
                files[name] = path
    return files


@contextlib.contextmanager
def report_damage(path, download):
    """Turn the errors of a damaged archive into a DataError.

    path:     of the archive, or of a file in it
    download: where the archive comes from
    """
    try:
        yield
    except PermissionError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        problem = f"incomplete or corrupted ({one_line(error)})"
        raise DataError(f"{path}: {problem}; download {download} again") from None


def read_archive(path, download, split):
    """Yield (name, content) of the PNG files of a split in an archive, in the archive's order.

    path:     of the archive
    download: where it comes from
    Raises DataError if the archive is damaged.
    """
    other_splits = set(SPLITS) - {split}
    with report_damage(path, download), tarfile.open(path, "r:gz") as tar:
        for member in tar:
            parts = re.split(r"[/\\]", member.name)
            name = parts[-1]
            is_of_split = not other_splits.intersection(parts)
            if is_of_split and is_png(name) and member.isfile():
                yield name, tar.extractfile(member).read()
        tar.fileobj.read()  # the checksum is at the end


def write_temporary(path, content):
    """Write a file of an archive, and the folder it is in; returns its path."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------- a split
@dataclass
class Source:
    """The files of an image to cut.

    image:     path
    masks:     paths of the masks of instances and of classes; test images have none
    temporary: those of these files that come from an archive; to be deleted after use
    """

    image: Path
    masks: list[Path]
    temporary: list[Path]


def find_splits(raw):
    """Return the names of the splits of which RAW has images or masks."""
    splits = []
    for split in SPLITS:
        folders = [raw / split / "images"]
        if split != "test":
            folders += [raw / split / "Instance_masks", raw / split / "Semantic_masks"]
        archives = [find_archive(raw, IMAGE_ARCHIVES, split)]
        archives.append(find_archive(raw, MASK_ARCHIVES, split))
        if any(folder.is_dir() for folder in folders) or any(archives):
            splits.append(split)
    return splits


def mask_names(stem):
    """Return the file names of an image's masks: of instances, of classes."""
    return f"{stem}_instance_id_RGB.png", f"{stem}_instance_color_RGB.png"


def stems_of_masks(names):
    """Return the names, without suffix, of the images that at least one mask belongs to."""
    return {MASK_NAME.fullmatch(name)[1] for name in names}


class RawSplit:
    """The images of a split of RAW, with their masks.

    Attributes to read:
        stems  names of the images without their suffix, in natural order
    """

    def __init__(self, raw, split, devkit, limit):
        """Find the images, and read the masks if they are in an archive (159 MB) into memory.

        raw:    the folder RAW
        devkit: True leaves out two images, as the devkit does
        limit:  only this many images, the first ones; None for all
        Raises DataError if there are no images, or if each of them lacks a mask.
        """
        self.raw = raw
        self.split = split
        self.has_masks = split != "test"
        self.is_limited = limit is not None
        self.folder = raw / split / "images"
        self.archive = find_archive(raw, IMAGE_ARCHIVES, split)
        self.masks = {}
        if self.has_masks:
            self.masks = self.find_masks()
        self.images = self.find_images()

        stems = set(self.images)
        if self.archive:
            stems |= stems_of_masks(self.masks)
        if devkit:
            stems -= set(DEVKIT_LEAVES_OUT)
        self.stems = sorted(stems, key=natural_sort_key)[:limit]
        self.check_images()
        if self.has_masks:
            self.check_masks()

    def find_masks(self):
        """Return the masks: {name: path, or content of the file if it is in an archive}."""
        files = {}
        archive = find_archive(self.raw, MASK_ARCHIVES, self.split)
        if archive:
            files = dict(read_archive(archive, MASK_ARCHIVES[self.split], self.split))
        files.update(png_files(self.raw / self.split))
        files.update(png_files(self.folder))  # next to the images: the official layout
        return {name: file for name, file in files.items() if MASK_NAME.fullmatch(name)}

    def find_images(self):
        """Return the images that are not in an archive: {name without suffix: path}."""
        files = png_files(self.folder)
        images = {path.stem: path for path in files.values() if not coco.is_mask(path)}
        if images:
            return images
        files = png_files(self.raw / "images")  # of both splits
        stems = stems_of_masks(self.masks)
        return {path.stem: path for path in files.values() if path.stem in stems}

    def check_images(self):
        """Raise DataError if there are no images."""
        if self.stems:
            return
        if self.archive:  # its images are those with masks
            remedy = f"download {MASK_ARCHIVES[self.split]} into {self.raw}"
            raise DataError(f"{self.archive}: masks of its images not found; {remedy}")
        remedy = "expected iSAID files such as P0000.png"
        if self.split in IMAGE_ARCHIVES:
            remedy += f"; download {IMAGE_ARCHIVES[self.split]} into {self.raw}"
        raise DataError(f"{self.folder}: contains no images; {remedy}")

    def check_masks(self):
        """Raise DataError if each image lacks a mask. If only some do, cutting names them."""
        first_missing = None
        for stem in self.stems:
            absent = [name for name in mask_names(stem) if name not in self.masks]
            if not absent:
                return
            if not first_missing:
                first_missing = absent[0]
        count = f"{len(self.stems):,} of {len(self.stems):,}"
        problem = f"masks of {count} images not found (first: {first_missing})"
        places = f"expected next to the images or in other folders of {self.raw / self.split}"
        remedy = f"download {MASK_ARCHIVES[self.split]} into {self.raw}"
        raise DataError(f"{self.folder}: {problem}, {places}; {remedy}")

    def sources(self, stems, spool):
        """Yield a Source for each of some images: those in folders, then those in the archive.

        stems: names of the images
        spool: existing folder in which the files of archives are for as long as they are used
        Raises DataError if the archive is damaged or lacks some of the images.
        """
        in_archive = set()
        for stem in stems:
            if stem in self.images:
                yield self.source(self.images[stem], spool)
            else:
                in_archive.add(stem)
        if not in_archive:
            return
        known = stems_of_masks(self.masks) | set(self.images)
        num_unknown = 0
        download = IMAGE_ARCHIVES[self.split]
        for name, content in read_archive(self.archive, download, self.split):
            stem = Path(name).stem
            if stem in in_archive:
                in_archive.remove(stem)
                path = write_temporary(spool / download.name / name, content)
                yield self.source(path, spool)
                if self.is_limited and not in_archive:
                    return
            elif stem not in known:
                num_unknown += 1
        if num_unknown:
            print(f"{self.archive}: {num_unknown:,} images without masks left out", file=sys.stderr)
        if in_archive:
            first = min(in_archive, key=natural_sort_key)
            problem = f"{len(in_archive):,} images that have masks not found (first: {first}.png)"
            raise DataError(f"{self.archive}: {problem}; download {download} again")

    def source(self, image, spool):
        """Return the Source of an image, given its path; see `sources`."""
        masks = []
        if self.has_masks:
            for name in mask_names(image.stem):
                mask = self.masks.get(name, self.folder / name)  # cutting names an absent one
                if isinstance(mask, bytes):
                    mask = write_temporary(spool / MASK_ARCHIVES[self.split].name / name, mask)
                masks.append(mask)
        temporary = [path for path in [image, *masks] if spool in path.parents]
        return Source(image, masks, temporary)
