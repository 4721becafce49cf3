"""Pictures of detections, self-supervised tasks, runs and attention."""

import functools
import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.mask import iou
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_effort(draw):
    """Decorates what draws a file: if that fails, it is said, and the command goes on. Returns
    whether there is a picture now."""

    @functools.wraps(draw)
    def attempt(path, *arguments, **options):
        try:
            draw(path, *arguments, **options)
            return True
        except Exception as error:  # a full disk, too large a picture, a missing font …
            print(f"{path}: is not drawn ({type(error).__name__}: {error})", file=sys.stderr)
            return False

    return attempt


@functools.cache
def fonts():
    """Files of matplotlib's font and of the system's, with their letters: [(path, {letter})]."""
    found = []
    for path in [font_manager.findfont("DejaVu Sans"), *font_manager.findSystemFonts()]:
        try:
            found.append((path, {*map(chr, font_manager.get_font(path).get_charmap())}))
        except (OSError, RuntimeError):  # bitmaps, damaged fonts
            continue
    return found


def legible(text, otherwise, size):
    """(a font, the text); `otherwise`, of plain letters, if no font here has all it needs."""
    if not text.isascii():
        for path, letters in fonts():
            if letters >= {*text}:
                return ImageFont.truetype(path, size), text
        text = otherwise
    return ImageFont.load_default(size), text


# ---------------------------------------------------------------- detections
def class_color(label, n):
    """A colour of its own for each of n classes, RGB: neighbours in the list differ most."""
    table, place = (
        ("tab20", (2 * label + label // 10) % 20) if n <= 20 else ("hsv", 0.618 * label % 1)
    )
    return tuple(round(255 * share) for share in colormaps[table](place)[:3])


def draw_boxes(image, entries, categories, side, inks=None):
    """A PIL image, resized to `side`, with boxes and names of COCO annotations or results.
    inks: RGB of each of them, else the colour of its class."""
    scale = side / max(image.size)
    image = ImageOps.contain(image, (side, side))
    pen, ids = ImageDraw.Draw(image), [category["id"] for category in categories]
    for i, entry in enumerate(entries):
        label = ids.index(entry["category_id"])
        ink = inks[i] if inks else class_color(label, len(ids))
        font, text = legible(categories[label]["name"], f"class {ids[label]}", 11)
        text += f" {entry['score']:.2f}" if "score" in entry else ""
        x, y, w, h = (v * scale for v in entry["bbox"])
        pen.rectangle((x, y, x + w, y + h), outline=ink, width=2)
        room = image.width - pen.textlength(text, font=font) - 2
        corner = max(0, min(x + 1, room)), max(y - 13, 0)  # inside the picture
        write(pen, pen.textbbox(corner, text, font=font), text, font, ink)
    return image


def write(pen, place, text, font, ink):
    """Text in the rectangle that it fills, on a ground of the colour `ink`."""
    left, top, right, bottom = place
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=ink)
    bright = 0.3 * ink[0] + 0.59 * ink[1] + 0.11 * ink[2] > 110
    pen.text((left, bottom), text, fill="black" if bright else "white", font=font, anchor="ld")


def save_rows(path, rows, w, h):
    """Save rows {title: [PIL images of at most w x h pixels]} as one picture."""
    columns = max(len(images) for images in rows.values())
    sheet = Image.new("RGB", (columns * (w + 4), len(rows) * (h + 20)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, images) in enumerate(rows.items()):
        font, title = legible(title, title.encode("ascii", "replace").decode(), 14)
        pen.text((4, row * (h + 20) + 1), title, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image, (column * (w + 4), row * (h + 20) + 18))
    sheet.save(path)


def greedy_match(found, truth):
    """Which COCO results hit an object of their class (IoU 0.5, best first, each object once) and
    which objects are hit: two lists of bool."""
    right, hit = [], [False] * len(truth)
    boxes = ([entry["bbox"] for entry in entries] for entries in (found, truth))
    overlaps = iou(*boxes, [0] * len(truth)) if found and truth else [()] * len(found)
    for result, overlap in zip(found, overlaps):  # overlap: with each object
        free = [j for j, object in enumerate(truth)
                if not hit[j] and object["category_id"] == result["category_id"]]  # fmt: skip
        best = max(free, key=lambda j: overlap[j], default=None)
        right.append(best is not None and overlap[best] >= 0.5)
        if right[-1]:
            hit[best] = True
    return right, hit


GREEN, RED = (0, 200, 0), (230, 0, 0)


@best_effort
def draw_detections(path, data, results, n=6, score=0.3, side=320):
    """The first n images that hold objects: the truth above, below it the COCO results of at least
    `score`, or the three best where there is none; green what is found, red what is not."""
    chosen = ([i for i, labels in enumerate(data.labels) if len(labels)] or range(len(data)))[:n]
    truth = [a for a in data.annotations if not a["iscrowd"]]
    least = f"with a score of {score}"
    rows = {f"ground truth; red: not found {least} at an IoU of 0.5": [],
            f"found {least}, else the best three; red: wrong or once more": []}  # fmt: skip
    for i in chosen:
        image = data.load_image(i)
        there, mine = ([e for e in x if e["image_id"] == data.images[i]["id"]]
                       for x in (truth, results))  # fmt: skip
        mine.sort(key=lambda result: -result["score"])
        good = [result for result in mine if result["score"] >= score]
        right, _ = greedy_match(mine := good or mine[:3], there)
        _, hit = greedy_match(good, there)
        for row, entries, so in zip(rows.values(), (there, mine), (hit, right)):
            inks = [GREEN if yes else RED for yes in so]
            row.append(draw_boxes(image, entries, data.categories, side, inks))
    save_rows(path, rows, side, side)


@best_effort
def draw_objects(path, image, found, categories, smallest=800, largest=4000):
    """A whole image of a side between the two, with boxes, names and scores where there is room
    for them, best first, and a legend of the classes found.
    found: {"boxes" (n, 4) xyxy in pixels, "labels" (n,), "scores" (n,)}."""
    scale = min(max(1, smallest / max(image.size)), largest / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    line, counts = max(16, max(width, height) // 60), np.bincount(found["labels"])
    shown, number = np.flatnonzero(counts), len(categories)
    sheet = Image.new("RGB", (width + 12 * line, max(height, line * (len(shown) + 1))), "white")
    sheet.paste(image.resize((width, height)))
    pen = ImageDraw.Draw(sheet)
    boxes = found["boxes"] * scale
    for box, label in zip(boxes, found["labels"]):
        pen.rectangle(tuple(box), outline=class_color(label, number), width=max(2, line // 12))
    names = {k: legible(categories[k]["name"], f"class {categories[k]['id']}", 0.6 * line)
             for k in shown}  # fmt: skip
    for box, label, score in zip(boxes, found["labels"], found["scores"]):
        font, name = names[label]
        text, (x, y) = f"{name} {score:.2f}", box[:2]
        place = pen.textbbox((x, y - 2), text, font=font, anchor="ld")
        overlap = np.minimum(place[2:], boxes[:, 2:]) > np.maximum(place[:2], boxes[:, :2])
        if place[1] >= 0 and place[2] <= width and not overlap.all(1).any():
            boxes = np.concatenate([boxes, [place]])
            write(pen, place, text, font, class_color(label, number))
    for row, label in enumerate(shown):
        x, y, ink = width + line / 2, line * (row + 0.5), class_color(label, number)
        pen.rectangle((x, y, x + line * 0.7, y + line * 0.7), fill=ink)
        name, category = categories[label]["name"], categories[label]["id"]
        font, name = legible(name, f"class {category}", line * 0.7)
        text = f"{name}  {counts[label]}"
        pen.text((x + line, y - line * 0.1), text, fill="black", font=font)
    if not len(shown):
        font = ImageFont.load_default(line * 0.7)
        pen.text((width + line / 2, line / 2), "nothing found", fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


# ---------------------------------------------------------------- attention
def draw_attention_overlay(image, points, weights, mark):
    """A PIL image, paler, under what is looked at, red where the weights are largest.
    Either a map of weights (h, w) over the image, points None; or points (n, 2) x, y in pixels
    with weights (n,), yellow where they are small. mark: x, y of a cross."""
    grey, share = ImageOps.grayscale(image).convert("RGB"), weights / weights.max()
    image = Image.blend(grey, image, 0.4)
    pen, unit = ImageDraw.Draw(image), max(image.size) / 100
    if points is None:
        mask = Image.fromarray((170 * share).astype(np.uint8))
        image.paste("red", mask=mask.resize(image.size, Image.Resampling.NEAREST))
    else:
        for k in share.argsort():  # the largest on top
            size = unit * (0.6 + share[k])
            x, y = points[k]
            ink = 255, round(230 * (1 - share[k])), 0
            pen.ellipse((x - size, y - size, x + size, y + size), fill=ink, outline="black")
    x, y = mark
    for ink, width in (("black", 1.6 * unit), ("white", 0.8 * unit)):
        for slope in (-1, 1):
            arm = 2 * unit
            pen.line((x - arm, y - slope * arm, x + arm, y + slope * arm), ink, round(width))
    return image


@best_effort
def draw_attention(path, image, rows, categories, side=320):
    """A row for each query: its box in the PIL image, then what attends to what in it.
    rows: {title: (COCO result, [(points, weights, mark) as draw_attention_overlay takes them, in 0..1])}."""
    scale = 2 * side / max(image.size)  # twice as large as it is saved: smooth edges
    large = image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)
    drawn = {}
    for title, (found, looks) in rows.items():
        found = {**found, "bbox": [v * scale for v in found["bbox"]]}
        drawn[title] = [draw_boxes(large, [found], categories, side)]
        for points, weights, mark in looks:
            points, mark = (None if x is None else x * large.size for x in (points, mark))
            drawn[title].append(draw_attention_overlay(large, points, weights, mark).reduce(2))
    w, h = (max(image.size[i] for image in sum(drawn.values(), [])) for i in (0, 1))
    save_rows(path, drawn, w, h)


# ---------------------------------------------------------------- self-supervised tasks
@dataclass
class Panel:
    """A row of the figure of a self-supervised task: the same step for several images."""

    title: str
    images: Tensor  # (B, 3, H, W)
    framed: Tensor | None = None  # (B, P) bool: patches with a frame, white if nothing is `correct`
    correct: Tensor | None = None  # (B, P) bool: whether a frame is green or red


def ssl_panels(task, images, prediction, target, corruption):
    """Return the panels that show what a self-supervised task does and what it predicts.

    images:     (B, 3, H, W)
    prediction: (B, 3, H, W) pixels or (B, K, h, w) class logits
    target:     (B, 3, H, W) pixels or (B, h, w) classes
    """
    panels = [Panel("original", images)]
    if task.corrupts:
        title = "corrupted"
        if task.on == "features":
            title = "corruption shown on the image (applied to the features)"
        moved = corruption.changed() & ~corruption.masked
        if moved.any():
            title += "; white: moved or turned"
        panels.append(Panel(title, task.corrupt_images(images, corruption), moved))

    draw_answer = {"pixels": pixel_panels, "tokens": token_panels,
                   "positions": position_panels, "classes": class_panels}[task.picture]  # fmt: skip
    counted = task.counted_patches(corruption)
    for panel in draw_answer(task, images, prediction, target, corruption, counted):
        panel.framed = counted
        if panel.correct is not None:
            panel.title += "; green: correct, red: wrong"
        panels.append(panel)
    return panels


def pixel_panels(task, images, prediction, target, corruption, counted):
    """Show the predicted pixels of the counted patches, the correct ones elsewhere."""
    size = images.shape[-2:]
    in_frame = patches_to_pixels(counted.unflatten(1, corruption.grid), task.patch, size)
    predicted = Panel("predicted in frames", torch.where(in_frame[:, None], prediction, target))
    if target is images:
        return [predicted]
    return [Panel("target", target), predicted]


def class_panels(task, images, prediction, target, corruption, counted):
    """Show the corrupted images, and in which patches the predicted class is correct."""
    _, correct = task.patch_losses(prediction, target)
    return [Panel("predicted", task.corrupt_images(images, corruption), correct=correct)]


def token_panels(task, images, prediction, target, corruption, counted):
    """Show what the tokens look like: the correct ones, and the predicted ones where they count."""
    size = images.shape[-2:]
    _, correct = task.patch_losses(prediction, target)
    counted = counted.unflatten(1, corruption.grid)
    predicted_tokens = torch.where(counted, prediction.argmax(1), target)
    return [
        Panel("visual tokens", task.tokenizer.decode(target, size)),
        Panel("predicted", task.tokenizer.decode(predicted_tokens, size), correct=correct),
    ]


def position_panels(task, images, prediction, target, corruption, counted):
    """Show the puzzle put together as predicted.

    Each counted patch goes to another place: the assignment with the largest sum of logits.
    """
    predicted_permutation = corruption.permutation.clone()
    logits = prediction.flatten(2)  # (B, sources, places)
    for b in range(len(images)):
        patches = counted[b].nonzero()[:, 0]  # they change places among themselves
        scores = logits[b, patches][:, patches].T.cpu().numpy()  # (places, sources)
        _, sources = linear_sum_assignment(scores, maximize=True)
        predicted_permutation[b, patches] = patches[sources]
    reassembly = replace(corruption, permutation=predicted_permutation).inverse()
    correct = reassembly.permutation == corruption.inverse().permutation
    corrupted = task.corrupt_images(images, corruption)
    reassembled = task.corrupt_images(corrupted, reassembly)
    return [Panel("reassembled (one-to-one assignment)", reassembled, correct=correct)]


def patches_to_pixels(values, patch, size):
    """Repeat the value of each patch at all its pixels: (B, h, w) -> (B, H, W), size = (H, W)."""
    H, W = size
    pixels = values.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return pixels[:, :H, :W]


@best_effort
def draw_ssl(path, panels, patch, text, n=6):
    """Draw what a self-supervised task does to the first n images, a row per panel.

    panels: from `ssl_panels`, with images in 0..1
    patch:  pixels per side of a patch
    text:   the metrics on all held-out images, for the title of the last row
    """
    H, W = panels[0].images.shape[-2:]
    longest = 256 if max(H, W) <= 16 * patch else 512
    scale = longest / max(H, W)
    width = round(W * scale)
    height = round(H * scale)
    rows = {}
    for panel in panels:
        row = []
        arrays = (panel.images[:n] * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for b, array in enumerate(arrays):
            image = Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST)
            draw_frames(image, panel, b, patch * scale, columns=math.ceil(W / patch))
            row.append(image)
        rows[panel.title] = row
    last_title = panels[-1].title
    rows[f"{last_title}; all held-out images: {text}"] = rows.pop(last_title)
    save_rows(path, rows, width, height)


def draw_frames(image, panel, b, side, columns):
    """Draw the frames of image b of a panel: white, or green if correct and red if wrong.

    side:    pixels per side of a patch in this PIL image
    columns: patches per row
    """
    if panel.framed is None:
        return
    for i in panel.framed[b].nonzero()[:, 0].tolist():
        color = "white"
        if panel.correct is not None:
            color = "lime" if panel.correct[b, i] else "red"
        row, column = divmod(i, columns)
        x = column * side
        y = row * side
        frame = (x, y, x + side - 1, y + side - 1)
        ImageDraw.Draw(image).rectangle(frame, outline=color)


# ---------------------------------------------------------------- curves
def draw_curves(path, log):
    """Losses, AP and the self-supervised task by epoch, from the lines of log.jsonl as dicts."""
    there = {key for line in log for key, value in line.items() if value is not None}
    guessed = ("ssl_baseline", "ssl_chance")  # a loss of pixels, a share of classes
    names = {
        "loss, by its weighted terms": ("train_loss", "val_loss"),
        "on held-out images: AP": ("ap", "ap50", "ap75"),
        "on held-out images: task's loss": ("ssl_loss", *guessed * ("ssl_acc" not in there)),
        "on held-out images: accuracy": ("ssl_acc", *guessed) if "ssl_acc" in there else (),
    }
    panels = {
        label: {x.removeprefix("train_"): points_of(log, x) for x in mine if x in there}
        for label, mine in names.items()
    }
    terms = sorted(x for x in there if x.startswith("train_loss_"))
    draw_panels(path, panels, {x.removeprefix("train_loss_"): points_of(log, x) for x in terms})


def points_of(log, name):
    """(epoch, value) of what a log has of a figure."""
    return [(line["epoch"], line[name]) for line in log if line.get(name) is not None]


@best_effort
def draw_panels(path, panels, terms=()):
    """Curves by epoch, a panel for each label: {label: {name: [(epoch, value)]}}; in the first one
    on bars of the terms {name: [(epoch, value)]} that add up to it."""
    panels = {label: curves for label, curves in panels.items() if any(curves.values())}
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    row, bottom = figure.subplots(1, len(panels), squeeze=False)[0], 0
    for name, points in dict(terms).items():
        epochs, values = np.reshape(points, (-1, 2)).T
        row[0].bar(epochs, values, bottom=bottom, label=name, alpha=0.4)
        bottom = bottom + values
    for axes, (label, curves) in zip(row, panels.items()):
        for name, points in curves.items():
            axes.plot(*np.reshape(points, (-1, 2)).T, marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend()
        finish_axes(axes)
    figure.savefig(path, dpi=110)


def finish_axes(axes):
    """Whole epochs below, and values from zero to a little more than the largest."""
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
    axes.set_xlim(axes.dataLim.x0 - 0.5, axes.dataLim.x1 + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
