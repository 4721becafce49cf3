"""Every picture: detections, self-supervised tasks, curves of a run, objects of a whole image."""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont


# ---------------------------------------------------------------- detections
def colour(label, n):
    """A colour of its own for each of n classes."""
    ink = Image.new("HSV", (1, 1), (label * 255 // n, 200 if label % 2 else 255, 255))
    return ink.convert("RGB").getpixel((0, 0))


def draw_boxes(image, boxes, labels, names, scores=None, scale=1.0):
    """A copy of a PIL image, enlarged, with boxes xyxy in pixels of the original and names."""
    size = [round(side * scale) for side in image.size]
    image, font = image.resize(size, Image.Resampling.BICUBIC), ImageFont.load_default(11)
    pen = ImageDraw.Draw(image)
    for i, (box, label) in enumerate(zip(boxes, labels)):
        ink = colour(label, len(names))
        x0, y0, x1, y1 = (v * scale for v in box)
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=ink, width=2)
        text = names[label] + (f" {scores[i]:.2f}" if scores is not None else "")
        room = image.width - pen.textlength(text, font=font) - 2
        corner = max(0, min(x0 + 1, room)), max(y0 - 13, 0)  # inside the picture
        left, top, right, bottom = pen.textbbox(corner, text, font=font)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=ink)
        bright = 0.3 * ink[0] + 0.59 * ink[1] + 0.11 * ink[2] > 90
        pen.text(corner, text, fill="black" if bright else "white", font=font)
    return image


def draw_detections(path, data, results, n=6, score=0.3, side=320):
    """The first n images that hold objects: the truth above, COCO results of `score` below."""
    index = {category["id"]: i for i, category in enumerate(data.categories)}
    names = [category["name"] for category in data.categories]
    chosen = ([i for i, labels in enumerate(data.labels) if len(labels)] or range(len(data)))[:n]
    sheet = Image.new("RGB", (len(chosen) * (side + 4), 2 * (side + 20)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, text in enumerate(("ground truth", f"found, score at least {score}")):
        pen.text((4, row * (side + 20) + 1), text, fill="black", font=font)
    for column, i in enumerate(chosen):
        image, _ = data.read(i)
        scale, number = side / max(image.size), data.images[i]["id"]
        mine = [r for r in results if r["image_id"] == number and r["score"] >= score]
        labels, scores = [index[r["category_id"]] for r in mine], [r["score"] for r in mine]
        truth, found = data.boxes[i], torch.tensor([r["bbox"] for r in mine]).view(-1, 4)
        truth, found = (
            torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], 1).tolist() for x in (truth, found)
        )
        pictures = (
            draw_boxes(image, truth, data.labels[i].tolist(), names, scale=scale),
            draw_boxes(image, found, labels, names, scores, scale),
        )
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (column * (side + 4), row * (side + 20) + 18))
    sheet.save(path)


def draw_objects(path, image, found, names, smallest=800, largest=4000):
    """A whole image of a side between the two, with boxes and a legend of the classes found.
    found: {"boxes" (n, 4) xyxy in pixels, "labels" (n,)}."""
    scale = min(max(1, smallest / max(image.size)), largest / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    line, counts = max(16, max(width, height) // 60), np.bincount(found["labels"])
    shown, font = np.flatnonzero(counts), ImageFont.load_default(line * 0.7)
    sheet = Image.new("RGB", (width + 12 * line, max(height, line * (len(shown) + 1))), "white")
    sheet.paste(image.resize((width, height)))
    pen = ImageDraw.Draw(sheet)
    for box, label in zip(found["boxes"] * scale, found["labels"]):
        ink = colour(label, len(names))
        pen.rectangle(tuple(box), outline=ink, width=max(2, line // 12))
    for row, label in enumerate(shown):
        x, y, ink = width + line / 2, line * (row + 0.5), colour(label, len(names))
        pen.rectangle((x, y, x + line * 0.7, y + line * 0.7), fill=ink)
        text = f"{names[label]}  {counts[label]}"
        pen.text((x + line, y - line * 0.1), text, fill="black", font=font)
    if not len(shown):
        pen.text((width + line / 2, line / 2), "nothing found", fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


# ---------------------------------------------------------------- self-supervised tasks
def draw_ssl(path, panels, patch, n=6):
    """What a self-supervised task does to the first n images, a row for each panel.
    panels: {title: (images (B, 3, H, W) in 0..1, patches to frame (B, P) or None, right or not
    (B, P) or None)}; frames are white, or green where right and red where wrong."""
    n = min(n, *(len(images) for images, _, _ in panels.values()))
    H, W = next(iter(panels.values()))[0].shape[-2:]
    columns, rows = -(-W // patch), -(-H // patch)
    scale = (256 if max(columns, rows) <= 16 else 512) / max(H, W)
    w, h = round(W * scale), round(H * scale)
    sheet = Image.new("RGB", (n * (w + 4), len(panels) * (h + 20)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (title, (images, framed, right)) in enumerate(panels.items()):
        pen.text((4, row * (h + 20) + 1), title, fill="black", font=font)
        images = (images[:n] * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for column, image in enumerate(images):
            x, y = column * (w + 4), row * (h + 20) + 18
            image = Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y))
            for i in [] if framed is None else framed[column].nonzero()[:, 0].tolist():
                top, left = (k * patch * scale for k in divmod(i, columns))
                ink = "white" if right is None else "lime" if right[column, i] else "red"
                end = left + patch * scale - 1, top + patch * scale - 1
                pen.rectangle((x + left, y + top, x + end[0], y + end[1]), outline=ink)
    sheet.save(path)


# ---------------------------------------------------------------- curves
def draw_curves(path, log):
    """Losses, AP and the self-supervised task by epoch, from the lines of log.jsonl as dicts."""
    losses = sorted({key for line in log for key in line if key.startswith("train_")})
    curves = {
        "training loss (terms: last layer)": losses,
        "on held-out images: AP": ("ap", "ap50", "ap75"),
        "on held-out images: task": ("ssl_loss", "ssl_acc"),
    }
    points = {
        name: [(line["epoch"], line[name]) for line in log if line.get(name) is not None]
        for names in curves.values()
        for name in names
    }
    curves = {label: [x for x in names if points[x]] for label, names in curves.items()}
    curves = {label: names for label, names in curves.items() if names}
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (label, names) in zip(panels, curves.items()):
        for name in names:  # the total is drawn broad: it may be the same as its only term
            style = {"linewidth": 5, "alpha": 0.4} if name == "train_loss" else {}
            title = name.removeprefix("train_")
            axes.plot(*zip(*points[name]), marker=".", label=title, **style)
        axes.set(xlabel="epoch", ylabel=label)
        finish_axes(axes)
    figure.savefig(path, dpi=110)


def finish_axes(axes, **legend):
    """Whole epochs below, and values from zero to a little more than the largest."""
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
    axes.set_xlim(axes.dataLim.x0 - 0.5, axes.dataLim.x1 + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend(**legend)
