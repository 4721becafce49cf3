"""Figures: detections, attention, self-supervised tasks and learning curves."""

import collections
import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.mask import iou
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from util.files import replace_file

GREEN = (0, 200, 0)
RED = (230, 0, 0)
TITLE_HEIGHT = 18  # pixels above each row of a figure
GAP = 4  # pixels between the images of a row


def best_effort(draw):
    """Decorate a function draw(path, ...) so that its failure is printed and training goes on."""

    @functools.wraps(draw)
    def attempt(path, *arguments, **options):
        try:
            draw(path, *arguments, **options)
        except Exception as error:  # a full disk, too large an image, a missing font …
            message = f"{type(error).__name__}: {error}"
            print(f"could not write figure {path} ({message})", file=sys.stderr)

    return attempt


# ---------------------------------------------------------------- detections
def class_color(label, num_classes):
    """Return a color (red, green, blue) of its own for each class; neighbors differ most."""
    if num_classes <= 20:
        # tab20 has pairs of a dark and a light color: first the dark ones, then the light ones
        color = colormaps["tab20"]((2 * label + label // 10) % 20)
    else:
        color = colormaps["hsv"](0.618 * label % 1)  # the golden ratio spreads them over the circle
    red, green, blue, _ = color
    return (round(255 * red), round(255 * green), round(255 * blue))


def class_text(category):
    """Return the name of a COCO category, or its id if the font may lack letters of the name."""
    if category["name"].isascii():
        return category["name"].replace("_", " ")
    return f"class {category['id']}"


def draw_boxes(image, entries, categories, side, colors=None):
    """Return an image with boxes and class names.

    image:      a PIL image, which is resized to fit into side x side pixels
    entries:    COCO annotations or results
    categories: those of the dataset
    colors:     (red, green, blue) of each box; None: the color of its class
    """
    scale = side / max(image.size)
    image = ImageOps.contain(image, (side, side))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    label_of_id = {category["id"]: label for label, category in enumerate(categories)}
    labels = []  # (text, color, box) of each entry
    for i, entry in enumerate(entries):
        label = label_of_id[entry["category_id"]]
        if colors is None:
            color = class_color(label, len(categories))
        else:
            color = colors[i]
        x, y, width, height = np.multiply(entry["bbox"], scale).tolist()
        draw.rectangle((x, y, x + width, y + height), outline=color, width=2)
        text = class_text(categories[label])
        if "score" in entry:
            text += f" {entry['score']:.2f}"
        labels.append((text, color, (x, y, x + width, y + height)))
    occupied = []  # by labels; the first ones choose first
    for text, color, box in labels:
        text_box = place_label(draw, text, font, box, image.size, occupied)
        occupied.append(text_box)
        draw_label(draw, text_box, text, font, color)
    return image


def place_label(draw, text, font, box, image_size, occupied):
    """Choose where the label of a box covers no other label, if there is such a place at the box.

    box:        (left, top, right, bottom)
    image_size: (width, height); labels stay inside
    occupied:   [(left, top, right, bottom)] of other labels
    Returns (left, top, right, bottom) of the text.
    """
    width = draw.textlength(text, font=font) + 2  # with the colored ground around it
    height = line_height_of(font) + 2
    left, top, right, bottom = box
    candidates = []
    for y in (top - height, bottom, top + 1, bottom - height - 1):  # above, below, inside
        for x in (left, right - width, (left + right - width) / 2):
            candidates.append((x, y))
    places = []
    for x, y in candidates:
        x = max(0, min(x, image_size[0] - width))
        y = max(0, min(y, image_size[1] - height))
        places.append((x + 1, y + 1, x + width - 1, y + height - 1))
    for place in places:
        if not any(boxes_overlap(place, other) for other in occupied):
            return place
    return places[0]


def line_height_of(font):
    """Return the height in pixels of a line of text, the same for all letters."""
    ascent, descent = font.getmetrics()
    return ascent + descent


def boxes_overlap(box, other):
    """Return True if two boxes (left, top, right, bottom) overlap, or are closer than 2 pixels."""
    lower_corner = np.minimum(box[2:], other[2:])
    upper_corner = np.maximum(box[:2], other[:2])
    return bool((lower_corner > upper_corner - 2).all())


def draw_label(draw, text_box, text, font, color):
    """Write a line of text on a colored ground; text_box: its (left, top, right, bottom)."""
    left, top, right, bottom = text_box
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=color)
    red, green, blue = color
    text_color = "white"
    if 0.3 * red + 0.59 * green + 0.11 * blue > 110:  # a bright ground
        text_color = "black"
    draw.text((left, bottom), text, fill=text_color, font=font, anchor="ld")


def save_rows(path, rows, width, height):
    """Save rows {title: [PIL images of at most width x height pixels]} as one image."""
    columns = max(len(images) for images in rows.values())
    column_width = width + GAP
    row_height = TITLE_HEIGHT + height + 2
    sheet = Image.new("RGB", (columns * column_width, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for row, (title, images) in enumerate(rows.items()):
        top = row * row_height
        plain_title = title.encode("ascii", "replace").decode()  # the font lacks other letters
        draw.text((4, top + 1), plain_title, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image, (column * column_width, top + TITLE_HEIGHT))
    save_image(path, sheet)


def save_image(path, image, **options):
    """Write a PIL image; its format is that of `image_format`."""
    with replace_file(path) as temporary:
        image.save(temporary, format=image_format(path), **options)


def image_format(path):
    """Return the format that a path's suffix names; without one, PNG.

    Raises ValueError if Pillow writes no such format.
    """
    formats = {"": "PNG", **Image.registered_extensions()}
    suffix = Path(path).suffix.lower()
    if suffix not in formats or formats[suffix] not in Image.SAVE:
        raise ValueError(f"{path}: unknown file extension: {suffix}; try .png")
    return formats[suffix]


def greedy_match(detections, objects):
    """Match detections with objects of their class at an IoU of at least 0.5, each object once.

    detections: COCO results of an image, best first
    objects:    its COCO annotations
    Returns two lists of bool: which detections are correct, which objects are found.
    """
    correct = [False] * len(detections)
    found = [False] * len(objects)
    if not detections or not objects:
        return correct, found
    detected_boxes = [detection["bbox"] for detection in detections]
    true_boxes = [obj["bbox"] for obj in objects]
    overlaps = iou(detected_boxes, true_boxes, [0] * len(objects))  # (detections, objects)
    for i, detection in enumerate(detections):
        candidates = []
        for j, obj in enumerate(objects):
            if obj["category_id"] == detection["category_id"] and not found[j]:
                candidates.append(j)
        best = max(candidates, key=lambda j: overlaps[i, j], default=None)
        if best is not None and overlaps[i, best] >= 0.5:
            correct[i] = True
            found[best] = True
    return correct, found


def best_f1_score(data, results, lowest=0.05):
    """Return the score at which the detections of a dataset have the best F1 at an IoU of 0.5.

    data:    a DetectionDataset
    results: its COCO results
    lowest:  detections with a lower score are not considered
    F1 is the harmonic mean of precision and recall, over all classes together. Returns `lowest` if
    no detection is correct.
    """
    objects_of = collections.defaultdict(list)
    for annotation in data.annotations:
        if not annotation["iscrowd"]:
            objects_of[annotation["image_id"]].append(annotation)
    detections_of = collections.defaultdict(list)
    for result in sorted(results, key=lambda result: -result["score"]):
        if result["score"] >= lowest:
            detections_of[result["image_id"]].append(result)
    scores = []
    correct = []
    for image_id, detections in detections_of.items():
        scores += [detection["score"] for detection in detections]
        correct += greedy_match(detections, objects_of[image_id])[0]
    num_objects = sum(len(objects) for objects in objects_of.values())
    if not any(correct):
        return lowest
    order = np.argsort(scores)[::-1]
    scores = np.array(scores)[order]
    num_correct = np.cumsum(np.array(correct)[order])
    num_detections = np.arange(1, len(scores) + 1)
    f1 = 2 * num_correct / (num_detections + num_objects)
    return float(scores[f1.argmax()])


@best_effort
def draw_detections(path, data, results, n=4, score=None, side=320):
    """Draw the ground truth of the first n images with objects and, below it, the detections.

    data:    a DetectionDataset
    results: its COCO results; of an image those of at least `score` are drawn, or the three best
             if there are none
    score:   None: that with the best F1 on the dataset
    Found objects and correct detections are green; the others red.
    """
    choice = ""
    if score is None:
        score = best_f1_score(data, results)
        choice = ", which has the best F1"
    score = math.floor(100 * score) / 100  # as it is printed
    shown_images = [i for i, labels in enumerate(data.labels) if len(labels) > 0]
    if not shown_images:
        shown_images = list(range(len(data)))
    truth_row = []
    detection_row = []
    for i in shown_images[:n]:
        image_id = data.images[i]["id"]
        objects = []
        for annotation in data.annotations:
            if annotation["image_id"] == image_id and not annotation["iscrowd"]:
                objects.append(annotation)
        detections = [result for result in results if result["image_id"] == image_id]
        detections.sort(key=lambda result: -result["score"])
        confident = [result for result in detections if result["score"] >= score]
        _, found = greedy_match(confident, objects)
        shown = confident
        if not confident:
            shown = detections[:3]
        correct, _ = greedy_match(shown, objects)

        image = data.load_image(i)
        truth_row.append(draw_boxes(image, objects, data.categories, side, green_or_red(found)))
        detection_row.append(draw_boxes(image, shown, data.categories, side, green_or_red(correct)))
    rows = {
        "ground truth; red: missed at an IoU of 0.5": truth_row,
        f"detections (score >= {score:.2f}{choice}; else the three best); "
        "red: false positive or duplicate": detection_row,
    }
    save_rows(path, rows, side, side)


def green_or_red(flags):
    """Return a color for each flag: green for True, red for False."""
    return [GREEN if flag else RED for flag in flags]


@best_effort
def draw_objects(path, image, found, categories, smallest=800, largest=4000):
    """Draw the detections of a whole image, and a legend of their classes beside it.

    image: a PIL image, drawn with `smallest` to `largest` pixels on its longer side
    found: {"boxes" (n, 4) xyxy in pixels, "labels" (n,), "scores" (n,)}, best first
    """
    scale = min(max(1, smallest / max(image.size)), largest / max(image.size))
    width = max(1, round(image.width * scale))
    height = max(1, round(image.height * scale))
    line_height = max(16, max(width, height) // 60)
    counts = np.bincount(found["labels"], minlength=len(categories))
    legend_height = line_height * (np.count_nonzero(counts) + 1)
    sheet = Image.new("RGB", (width + 12 * line_height, max(height, legend_height)), "white")
    sheet.paste(image.resize((width, height)))
    draw = ImageDraw.Draw(sheet)
    draw_scored_boxes(draw, width, found["boxes"] * scale, found, categories, line_height)
    draw_legend(draw, width, counts, categories, line_height)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path, sheet, quality=90)


def draw_scored_boxes(draw, image_width, boxes, found, categories, line_height):
    """Draw all boxes, and, best first, class and score where that hides no box and no other text.

    boxes: (n, 4) xyxy in pixels of the figure
    found: the labels and scores, as in `draw_objects`
    """
    font = ImageFont.load_default(0.6 * line_height)
    for box, label in zip(boxes, found["labels"]):
        color = class_color(label, len(categories))
        draw.rectangle(tuple(box), outline=color, width=max(2, line_height // 12))
    occupied = boxes  # (boxes and texts, 4)
    for box, label, score in zip(boxes, found["labels"], found["scores"]):
        text = f"{class_text(categories[label])} {score:.2f}"
        left, top, _, _ = box
        right = left + draw.textlength(text, font=font)
        text_box = (left, top - 2 - line_height_of(font), right, top - 2)
        lower_corner = np.minimum(text_box[2:], occupied[:, 2:])
        upper_corner = np.maximum(text_box[:2], occupied[:, :2])
        overlaps = (lower_corner > upper_corner).all(1)
        inside = text_box[1] >= 0 and text_box[2] <= image_width
        if inside and not overlaps.any():
            occupied = np.concatenate([occupied, [text_box]])
            draw_label(draw, text_box, text, font, class_color(label, len(categories)))


def draw_legend(draw, left, counts, categories, line_height):
    """List the classes found and their numbers of objects; counts: (number of classes,)."""
    font = ImageFont.load_default(0.7 * line_height)
    x = left + line_height / 2
    classes = np.flatnonzero(counts)
    for row, label in enumerate(classes):
        y = line_height * (row + 0.5)
        square = (x, y, x + line_height * 0.7, y + line_height * 0.7)
        draw.rectangle(square, fill=class_color(label, len(categories)))
        text = f"{class_text(categories[label])}  {counts[label]}"
        draw.text((x + line_height, y - line_height * 0.1), text, fill="black", font=font)
    if len(classes) == 0:
        draw.text((x, line_height / 2), "nothing found", fill="black", font=font)


# ---------------------------------------------------------------- attention
def draw_attention_overlay(image, points, weights, mark):
    """Return a paler image with what is attended to: red where the weights are largest.

    image:   a PIL image
    points:  (n, 2) x, y in pixels, yellow where the weights are small; None for a map
    weights: (n,) of the points, or the map (h, w), which covers the image
    mark:    x, y of a cross
    """
    gray = ImageOps.grayscale(image).convert("RGB")
    image = Image.blend(gray, image, 0.4)
    draw = ImageDraw.Draw(image)
    unit = max(image.size) / 100
    relative = weights / weights.max()
    if points is None:
        opacity = Image.fromarray((170 * relative).astype(np.uint8))
        image.paste("red", mask=opacity.resize(image.size, Image.Resampling.NEAREST))
    else:
        for k in relative.argsort():  # the largest on top
            radius = unit * (0.6 + relative[k])
            x, y = points[k]
            circle = (x - radius, y - radius, x + radius, y + radius)
            color = (255, round(230 * (1 - relative[k])), 0)
            draw.ellipse(circle, fill=color, outline="black")
    draw_cross(draw, mark, arm=2 * unit, width=1.6 * unit, color="black")
    draw_cross(draw, mark, arm=2 * unit, width=0.8 * unit, color="white")
    return image


def draw_cross(draw, center, arm, width, color):
    """Draw two diagonal lines through a point."""
    x, y = center
    draw.line((x - arm, y + arm, x + arm, y - arm), color, round(width))
    draw.line((x - arm, y - arm, x + arm, y + arm), color, round(width))


def draw_attention(path, image, rows, categories, side=320):
    """Draw a row per query: its box, then what attends to what in the image.

    image: a PIL image
    rows:  {title: (COCO result, [(points, weights, mark)])}, the latter as for
           `draw_attention_overlay`, but with coordinates in 0..1
    """
    scale = 2 * side / max(image.size)  # twice as large as it is saved: smooth edges
    large_size = (round(image.width * scale), round(image.height * scale))
    large = image.resize(large_size, Image.Resampling.BICUBIC)
    drawn_rows = {}
    all_drawn = []
    for title, (result, overlays) in rows.items():
        scaled_box = [value * scale for value in result["bbox"]]
        drawn = [draw_boxes(large, [dict(result, bbox=scaled_box)], categories, side)]
        for points, weights, mark in overlays:
            if points is not None:
                points = points * large_size
            overlay = draw_attention_overlay(large, points, weights, mark * large_size)
            drawn.append(overlay.reduce(2))
        drawn_rows[title] = drawn
        all_drawn += drawn
    width = max(drawn.width for drawn in all_drawn)
    height = max(drawn.height for drawn in all_drawn)
    save_rows(path, drawn_rows, width, height)


# ---------------------------------------------------------------- self-supervised tasks
@dataclass
class Panel:
    """A row of the figure of a self-supervised task: the same step for several images."""

    title: str
    images: Tensor  # (B, 3, H, W)
    framed: Tensor | None = None  # (B, P) bool: patches with a frame
    correct: Tensor | None = None  # (B, P) bool: green frame, else red; None: all are white


def ssl_panels(task, images, prediction, target, corruption):
    """Return the panels that show what a self-supervised task does and what it predicts.

    images:     (B, 3, H, W)
    prediction: (B, 3, H, W) pixels or (B, K, h, w) class logits
    target:     (B, 3, H, W) pixels or (B, h, w) classes
    """
    panels = [Panel("original", images)]
    if task.corrupts:
        panels.append(corruption_panel(task, images, corruption))
    if task.picture == "pixels":
        if target is not images:
            panels.append(Panel("target", target, task.counted_patches(corruption)))
        panels.append(pixel_panel(task, prediction, target, corruption))
    elif task.picture == "classes":
        panels.append(class_panel(task, images, prediction, target, corruption))
    elif task.picture == "tokens":
        panels += token_panels(task, images, prediction, target, corruption)
    elif task.picture == "positions":
        panels.append(position_panel(task, images, prediction, corruption))
    return panels


def corruption_panel(task, images, corruption):
    """Show the corrupted images, with frames around patches that moved."""
    title = "corrupted"
    if task.on == "features":
        title = "corruption shown on the image (applied to the features)"
    moved = corruption.changed() & ~corruption.masked
    if moved.any():
        title += "; white: moved or turned"
    return Panel(title, task.corrupt_images(images, corruption), moved)


def pixel_panel(task, prediction, target, corruption):
    """Show the predicted pixels in the frames of the counted patches, the target elsewhere."""
    counted = task.counted_patches(corruption)
    in_frame = counted.unflatten(1, corruption.grid)  # (B, h, w)
    in_frame = patches_to_pixels(in_frame, task.patch, target.shape[-2:])[:, None]
    shown = torch.where(in_frame, prediction, target)
    return Panel("predicted (inside the frames)", shown, counted)


def class_panel(task, images, prediction, target, corruption):
    """Show on the corrupted images for which patches the predicted class is correct."""
    corrupted = task.corrupt_images(images, corruption)
    _, correct = task.patch_losses(prediction, target)
    return Panel("predicted", corrupted, task.counted_patches(corruption), correct)


def token_panels(task, images, prediction, target, corruption):
    """Show what the correct tokens look like, then the predicted ones of the counted patches."""
    size = images.shape[-2:]
    counted = task.counted_patches(corruption)
    in_frame = counted.unflatten(1, corruption.grid)  # (B, h, w)
    predicted_tokens = torch.where(in_frame, prediction.argmax(1), target)
    _, correct = task.patch_losses(prediction, target)
    return [
        Panel("visual tokens", task.tokenizer.decode(target, size), counted),
        Panel("predicted", task.tokenizer.decode(predicted_tokens, size), counted, correct),
    ]


def position_panel(task, images, prediction, corruption):
    """Show the jigsaw put together as predicted.

    Each counted patch goes to another place: the assignment with the largest sum of logits.
    """
    counted = task.counted_patches(corruption)
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
    return Panel("reassembled (one-to-one assignment)", reassembled, counted, correct)


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
    longest = 256
    if max(H, W) > 16 * patch:  # many small patches
        longest = 512
    scale = longest / max(H, W)
    width = round(W * scale)
    height = round(H * scale)
    rows = {}
    for panel in panels:
        title = panel.title
        if panel.correct is not None:
            title += "; green: correct, red: wrong"
        if panel is panels[-1]:
            title += f"; all held-out images: {text}"
        rows[title] = []
        arrays = (panel.images[:n] * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for b, array in enumerate(arrays):
            image = Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST)
            draw_frames(image, panel, b, patch * scale, columns=math.ceil(W / patch))
            rows[title].append(image)
    save_rows(path, rows, width, height)


def draw_frames(image, panel, b, side, columns):
    """Draw frames into a PIL image: white, or green for correct and red for wrong predictions.

    b:       number of the image in the panel
    side:    pixels per side of a patch in the PIL image
    columns: patches per row
    """
    if panel.framed is None:
        return
    draw = ImageDraw.Draw(image)
    for i in panel.framed[b].nonzero()[:, 0].tolist():
        if panel.correct is None:
            color = "white"
        elif panel.correct[b, i]:
            color = "lime"
        else:
            color = "red"
        row, column = divmod(i, columns)
        x = column * side
        y = row * side
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=color)


# ---------------------------------------------------------------- curves
@best_effort
def draw_curves(path, log):
    """Draw losses, AP and the self-supervised task per epoch; log: the lines of log.jsonl."""
    loss_names = ["ssl_loss"]
    accuracy_names = ["ssl_acc"]
    baselines = ["ssl_baseline", "ssl_chance"]
    if points_of(log, "ssl_acc"):  # the task predicts classes: the baselines are accuracies
        accuracy_names += baselines
    else:
        loss_names += baselines
    panels = {
        "loss (sum of its weighted terms)": curves_of(log, ["train_loss", "val_loss"], "train_"),
        "AP on held-out images": curves_of(log, ["ap", "ap50", "ap75"]),
        "task's loss on held-out images": curves_of(log, loss_names),
        "task's accuracy on held-out images": curves_of(log, accuracy_names),
    }
    term_names = set()
    for line in log:
        term_names.update(name for name in line if name.startswith("train_loss_"))
    draw_panels(path, panels, terms=curves_of(log, sorted(term_names), "train_loss_"))


def curves_of(log, names, prefix=""):
    """Return {name without prefix: [(epoch, value)]} of those names that the log contains."""
    curves = {}
    for name in names:
        points = points_of(log, name)
        if points:
            curves[name.removeprefix(prefix)] = points
    return curves


def points_of(log, name):
    """Return the values of a metric in the log: [(epoch, value)]."""
    return [(line["epoch"], line[name]) for line in log if line.get(name) is not None]


def draw_panels(path, panels, terms=None):
    """Draw curves per epoch, side by side.

    panels: {label of the y axis: {name: [(epoch, value)]}}; those without a point are left out
    terms:  {name: [(epoch, value)]}, whose sum is the first panel's curve: bars below it
    """
    panels = {label: curves for label, curves in panels.items() if any(curves.values())}
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    if terms:
        draw_stacked_bars(row[0], terms)
    for axes, (label, curves) in zip(row, panels.items()):
        for name, points in curves.items():
            epochs, values = np.reshape(points, (-1, 2)).T
            axes.plot(epochs, values, marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend()
        finish_axes(axes)
    save_figure(path, figure)


def save_figure(path, figure):
    """Write a figure of matplotlib; without a suffix, as PNG. Raises ValueError."""
    picture_format = "png"
    if path.suffix:
        picture_format = path.suffix[1:]
    with replace_file(path) as temporary:
        figure.savefig(temporary, format=picture_format, dpi=110)


def draw_stacked_bars(axes, terms):
    """Draw the terms {name: [(epoch, value)]} of a sum above each other."""
    bottom = 0
    for name, points in terms.items():
        epochs, values = np.reshape(points, (-1, 2)).T
        axes.bar(epochs, values, bottom=bottom, label=name, alpha=0.4)
        bottom = bottom + values


def finish_axes(axes):
    """Let the x axis show whole epochs, and the y axis begin at zero."""
    highest = axes.dataLim.y1
    if highest == 0:  # all values are zero
        axes.set_ylim(0, 1)
    else:
        axes.set_ylim(0, 1.08 * highest)
    axes.set_xlim(axes.dataLim.x0 - 0.5, axes.dataLim.x1 + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
