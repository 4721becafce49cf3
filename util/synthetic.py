"""Synthetic aerial scenes: objects of fifteen classes on textured ground, by their seed alone.
A point is a complex number x + iy: to turn and scale a shape is one multiplication, to move it is
one addition. To add a class, add a row to SHAPES, above "tree"."""

from collections import namedtuple

import numpy as np
import torch
from PIL import Image, ImageDraw

CIRCLE = np.exp(2j * np.pi * np.arange(-24, 25) / 24)  # two turns by 15 degrees: arcs are slices


def rect(w, h):
    """Rectangle about 0, closed so that it can be stroked as well as filled."""
    return np.array((-w - 1j * h, w - 1j * h, w + 1j * h, -w + 1j * h, -w - 1j * h)) / 2


def arc(r, start=-180, stop=180):
    """Arc about 0 between two angles, multiples of 15 degrees; the whole circle by default."""
    return CIRCLE[start // 15 + 24 : stop // 15 + 25] * r


def mirror(*half):
    """Polygon symmetric about the x axis, from its points with y >= 0, front to back."""
    return np.append(half, np.conj(half[::-1]))


def both(*polygons):
    """The polygons, and the same again at the other end of the object."""
    return (*polygons, *(-np.asarray(p) for p in polygons))


# fmt: off
SHIP = mirror(.5, .36 + .1j, .18 + .17j, -.42 + .17j, -.5 + .13j)
TRUCK = mirror(.5 + .1j, .47 + .14j, .3 + .14j, .28 + .07j, .22 + .07j, .22 + .16j, -.5 + .16j)
CAR = mirror(.5 + .12j, .44 + .22j, .2 + .25j, -.38 + .25j, -.48 + .2j, -.5 + .1j)
PLANE = mirror(.5, .47 + .03j, .4 + .05j, .14 + .05j, -.1 + .46j, -.19 + .46j, -.07 + .05j,
               -.32 + .04j, -.44 + .18j, -.5 + .18j, -.45 + .02j)
BLADES = [.15 + .36 * CIRCLE[24 + k] * (1 + s) for k in (3, 9) for s in (-.06j, .06j)]  # rotor
HELICOPTER = mirror(.42, .38 + .06j, .28 + .08j, *BLADES[:2], .15 + .09j, *BLADES[2:], .02 + .08j,
                    -.08 + .04j, -.4 + .03j, -.41 + .1j, -.5 + .1j, -.48 + .02j)
PIER = mirror(*np.add.outer((.42, .19, -.04, -.27, -.5), (.08 + .08j, .08 + .31j, .31j, .08j)).flat)
POOL = CIRCLE[:24] * (.38 + .12 * (CIRCLE[:24] ** 2).real - .09 * CIRCLE[:24].imag)  # a kidney
TRACK, OVAL = (np.concatenate(both(arc(r, -90, 90) + .22)) for r in (.28, .185))
CROSSING = np.outer((1, 1j, -1, -1j), np.append((.5 - .09j, .5 + .09j), arc(.37, 15, 75))).ravel()
BASES = np.array([-.28, -.04 + .24j, .2, -.04 - .24j])
FOUL = CIRCLE[[21, 24, 27]] * (.68, 0, .68) - .34
WHITE = (238, 238, 232)
FIXED = {"W": WHITE, "K": (44, 48, 54), "B": (58, 98, 116), "S": (0, 0, 0, 48)}  # S: shadow
PAINT = (WHITE, (170, 176, 182), (70, 76, 86), (168, 48, 42), (48, 84, 142), (206, 172, 66))
PALE = (WHITE, (216, 214, 204), (186, 192, 194), (206, 184, 158))
CLAY = ((176, 128, 84), (190, 146, 104), (166, 104, 72), (172, 84, 64))
COURT = ((58, 98, 150), (64, 122, 88), (172, 92, 66), (104, 116, 128))
STONE = ((136, 136, 134), (166, 162, 154), (116, 116, 120))
LAWN = (88, 140, 68), (102, 150, 82), (76, 124, 62)
AQUA = ((70, 190, 214), (92, 206, 222), (58, 164, 206))

# Shortest and longest length and height (for the shadow) in pixels; colours to choose "a" and "b"
# from; then the parts, bottom first: (colour, line width or 0 for filled, polygons ...), in units
# of the length, which lies along the x axis. "+" and "-" after a colour make it lighter or darker.
# The first polygon is the outline, gives box and area, and holds all others.
Shape = namedtuple("Shape", "low high height a b parts")
SHAPES = {name: Shape(*row, parts) for name, *row, parts in (
    ("ship", 20, 44, 2, PAINT, CLAY + PALE, (("a", 0, SHIP), ("b", 0, SHIP * .84),
     ("W", 0, rect(.1, .24) - .35), ("K", 0, rect(.03, .1) - .38),
     ("b-", .03, *(rect(.13, .17) + x for x in (.2, .02, -.16))))),
    ("storage_tank", 12, 30, 3, PALE, PALE, (("a-", 0, arc(.5)), ("a", 0, arc(.45)),
     ("a-", 0, np.append(arc(.42, -180, -90), 0)), ("a-", .02, arc(.28)), ("K", 0, arc(.05)))),
    ("baseball_diamond", 24, 42, 0, CLAY, LAWN, (("a", 0, np.append(arc(.72, -45, 45), 0) - .36),
     ("b", 0, BASES), ("a", 0, arc(.06) - .04), ("W", .025, FOUL),
     ("W", 0, *(arc(.04) + b for b in BASES)))),
    ("tennis_court", 22, 36, 0, COURT, COURT, (("b", 0, rect(1, .54)), ("a+", 0, rect(.76, .36)),
     ("W", .02, rect(.76, .36), rect(.76, .24), rect(.4, .24), (-.2, .2)),
     ("K", .035, (-.2j, .2j)))),
    ("basketball_court", 20, 34, 0, CLAY + COURT, COURT, (("a-", 0, rect(1, .6)),
     ("a", 0, rect(.92, .52)), ("b", 0, *both(rect(.18, .18) + .37)),
     ("W", .02, rect(.92, .52), (-.26j, .26j), arc(.1)),
     ("W", .02, *both(rect(.18, .18) + .37, arc(.22, 90, 270) + .42, arc(.09, 90, 270) + .28)))),
    ("Ground_Track_Field", 36, 48, 0, CLAY[2:], LAWN, (("a", 0, TRACK),
     ("a+", .012, TRACK * .93, TRACK * .85), ("b", 0, OVAL),
     ("W", .012, rect(.46, .26), (-.13j, .13j), arc(.06)))),
    ("Bridge", 32, 48, 3, STONE, STONE, (("a-", 0, rect(1, .22)), ("a", 0, rect(1, .17)),
     ("a+", .02, *both((-.49 + .09j, .49 + .09j))),
     ("W", .025, *((x, x + .06) for x in np.arange(-.47, .45, .125))))),
    ("Large_Vehicle", 20, 34, 2, PAINT, PAINT, (("K", 0, TRUCK), ("a", 0, rect(.7, .3) - .14),
     ("a-", .02, rect(.24, .3) - .14), ("b", 0, rect(.17, .27) + .38),
     ("K", 0, rect(.05, .22) + .455))),
    ("Small_Vehicle", 12, 16, 1.5, PAINT, PAINT, (("a", 0, CAR), ("K", 0, rect(.56, .4) - .06),
     ("a+", 0, rect(.28, .38) - .08))),
    ("Helicopter", 22, 34, 4, PAINT, PAINT, (("a", 0, HELICOPTER), ("K", 0, rect(.1, .11) + .32),
     ("K", .065, *(np.outer(CIRCLE[[27, 33]], (-.34, .34)) + .15)), ("a+", 0, arc(.045) + .15))),
    ("Swimming_pool", 14, 30, 0, AQUA, PALE, (("b", 0, POOL), ("a-", 0, POOL * .84),
     ("a", 0, POOL * .74), ("a+", .03, *((x - .16j, x + .06 - .04j) for x in (-.2, 0, .18))))),
    ("Roundabout", 26, 44, 0, PAINT[1:3], LAWN, (("a", 0, CROSSING),
     ("W", .02, *both((.4, .48), (.4j, .48j))), ("W", .012, arc(.29)), ("W", 0, arc(.2)),
     ("b", 0, arc(.17)), ("b-", 0, arc(.08) + .03 + .03j))),
    ("Soccer_ball_field", 30, 41, 0, LAWN, LAWN, (("a", 0, rect(1, .66)),
     ("a+", 0, *both(rect(.115, .58) + .345, rect(.115, .58) + .115)),
     ("W", .016, *both(rect(.14, .32) + .39)),
     ("W", .016, rect(.92, .58), (-.29j, .29j), arc(.1), *both(rect(.05, .15) + .435)))),
    ("plane", 22, 46, 3, PALE, PAINT[3:], (("a-", 0, PLANE),
     ("K", 0, *(rect(.13, .05) + .07 + y for y in (-.2j, .2j))), ("a+", .09, (-.42, .43)),
     ("b", .045, (-.48, -.3)), ("K", 0, rect(.03, .05) + .445))),
    ("Harbor", 30, 42, 2, STONE, CLAY, (("a", 0, PIER), ("a+", .08, (-.48, .48)),
     ("a-", .02, *both(*((x - .1j, x - .29j) for x in (.46, .23, 0, -.23, -.46)))))),
    ("tree", 6, 12, 2, LAWN, LAWN, (("a-", 0, arc(.5)), ("a", 0, arc(.25) - .1 - .1j))),
    ("roof", 12, 20, 2.5, CLAY + STONE, PALE, (("a-", 0, rect(1, .7)),
     ("a", 0, rect(1, .35) - .175j))),
    ("pond", 0, 0, 0, CLAY, LAWN, (("a", 0, POOL * 1.6j), ("b-", 0, POOL * 1.56j),
     ("B", 0, POOL * 1.48j))))}
CLASSES = tuple(SHAPES)[:-3]  # the last three have no label

# dark, light, patch colour; waves: spacing in pixels, strength, bend; things per 128 x 128 pixels
GROUNDS = {
    "water": ((34, 66, 88), (66, 108, 124), (84, 134, 138), 6, 4, 3, []),
    "grass": ((74, 100, 54), (122, 146, 84), (150, 146, 98), 9, 4, .3, ["tree"] * 12),
    "soil": ((128, 104, 76), (178, 154, 118), (120, 122, 78), 7, 5, .6, ["tree"] * 4),
    "paved": ((118, 118, 116), (152, 150, 146), (98, 98, 100), 24, 3, 0, []),
    "town": ((104, 108, 84), (142, 138, 116), (92, 112, 68), 3, 1, 0, ["roof"] * 8 + ["tree"] * 10)}
# fmt: on
# With 0.17 of the scenes at sea, and bridges at sea and on land, all classes are about as common.
AT_SEA = ["ship", "Harbor"] * 2 + ["Bridge"]
ON_LAND = [name for name in CLASSES if name not in ("ship", "Harbor")]
# turn: length in pixels times the direction of the x axis; box: xyxy in pixels, not clipped
Thing = namedtuple("Thing", "name turn centre box")


def place(rng, name, things, size, last=None):
    """One more Thing where there is room, next to `last` if that is given; None without room."""
    low, high, *_, parts = SHAPES[name]
    if last:
        turn = last.turn
    else:
        turn = complex((low + (high - low) * rng.random()) * np.exp(2j * np.pi * rng.random()))
    outline = parts[0][2] * turn
    w, h = extent = np.array((np.ptp(outline.real), np.ptp(outline.imag)))
    # the border of the image cuts off at most a fifth of width and height: 0.64 of the box stays
    spots = [*(rng.random((10, 2)) * (size - 0.6 * extent) - 0.2 * extent)]
    if last:  # one step to the left or right, as wide as keeps the boxes apart
        side = 1j * turn / abs(turn) + 1e-9 + 1e-9j
        side *= 3 + min(w / abs(side.real), h / abs(side.imag))
        spots[:0] = [(last.box[0] + s * side.real, last.box[1] + s * side.imag) for s in (1, -1)]
    for x, y in spots:
        inside = -0.2 * w <= x <= size - 0.8 * w and -0.2 * h <= y <= size - 0.8 * h
        gaps = (max(x - x1, x0 - x - w, y - y1, y0 - y - h) for *_, (x0, y0, x1, y1) in things)
        if inside and all(gap > 2 for gap in gaps):
            centre = complex(x - outline.real.min(), y - outline.imag.min())
            return Thing(name, turn, centre, (x, y, x + w, y + h))


def layout(rng, size):
    """Kind of ground, and the labelled Things on it: none, or 1 to 7 per 128 x 128 pixels."""
    kind = "water" if rng.random() < 0.17 else list(GROUNDS)[1 + int(4 * rng.random())]
    classes, things = AT_SEA if kind == "water" else ON_LAND, []
    for _ in range(0 if rng.random() < 0.1 else rng.integers(1, 2 + int(6 * (size / 128) ** 2))):
        last = things[-1] if things and rng.random() < 0.35 else None  # alike things, side by side
        name = last.name if last else classes[int(rng.random() * len(classes))]
        things += filter(None, [place(rng, name, things, size, last)])
    return kind, things


def scene_objects(seed, n, size):
    """labels (k,) int64, boxes (k, 4) float32 xyxy in pixels, areas (k,); draws nothing."""
    _, things = layout(np.random.default_rng([seed, n]), size)
    whole = np.array([t.box for t in things], np.float32).reshape(-1, 4)
    boxes = whole.clip(0, size)
    outlines = [SHAPES[t.name].parts[0][2] * t.turn for t in things]
    areas = np.array([abs(np.vdot(p, np.roll(p, -1)).imag) / 2 for p in outlines])  # shoelace
    seen = (boxes[:, 2:] - boxes[:, :2]).prod(1) / (whole[:, 2:] - whole[:, :2]).prod(1)
    return np.array([CLASSES.index(t.name) for t in things], np.int64), boxes, areas * seen


def noise(rng, size, cells):
    """(size, size) float32 smooth random field: one octave per cell size, each half as strong."""
    field = 0
    for k, cell in enumerate(cells):
        octave = Image.fromarray(rng.random((size // cell + 2,) * 2, np.float32) - 0.5)
        field += np.asarray(octave.resize((size, size), Image.Resampling.BICUBIC)) / 2**k
    return field


def bare_ground(rng, kind, size):
    """PIL image of the ground alone."""
    *colours, spacing, strength, bend, _ = GROUNDS[kind]
    dark, light, patch = np.float32(colours)
    fine = noise(rng, size, (32, 16, 8, 4, 2))[..., None]
    broad = noise(rng, size, (64, 32, 16))[..., None]
    image = dark + (light - dark) * (0.5 + 0.8 * fine)
    image += (patch - image) * np.clip(4 * broad - 0.6, 0, 0.8)
    slope, steps = np.float32(2 * np.pi * rng.random()), np.arange(size, dtype=np.float32)
    ramp = np.cos(slope) * steps[:, None] + np.sin(slope) * steps
    if kind == "town":
        image[ramp % 64 < 10] = 112, 112, 114  # streets
    image += strength * np.sin(2 * np.pi * (ramp[..., None] / spacing + bend * broad))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def draw_thing(rng, pen, thing, sun, fine):
    """Draw a Thing and its shadow, which falls along `sun`; fine: canvas pixels per image pixel."""
    shape, tint = SHAPES[thing.name], 0.88 + 0.2 * rng.random()
    a, b = (choice[int(rng.random() * len(choice))] for choice in (shape.a, shape.b))
    colours = {**FIXED, "a": a, "b": b}
    shifts = [k * shape.height * sun / thing.turn for k in (0.5, 1, 1.3)]
    shadow = "S", 0, *(shape.parts[0][2] + s for s in shifts)  # faint copies: a soft edge
    for name, width, *polygons in (shadow, *shape.parts):
        gain = tint * {"+": 1.16, "-": 0.76}.get(name[-1], 1)
        colour = tuple(min(255, int(c * gain)) for c in colours[name[0]])
        for points in polygons:
            points = ((np.multiply(points, thing.turn) + thing.centre) * fine).view(float).tolist()
            if width:
                pen.line(points, colour, max(1, round(width * abs(thing.turn) * fine)))
            else:
                pen.polygon(points, colour)


def draw_scene(seed, n, size, fine=2):
    """PIL RGB image of size x size pixels, drawn `fine` times as large and then reduced."""
    rng = np.random.default_rng([seed, n])
    kind, things = layout(rng, size)
    loose = GROUNDS[kind][-1] * max(1, size * size // 128**2)
    loose = [place(rng, name, things, size) for name in loose]
    ponds = [t._replace(name="pond") for t in things if t.name == "Bridge" and kind != "water"]
    image = bare_ground(rng, kind, size).resize((size * fine,) * 2, Image.Resampling.NEAREST)
    pen, sun = ImageDraw.Draw(image, "RGBA"), np.exp(2j * np.pi * rng.random())
    for thing in ponds + [t for t in loose if t] + things:
        draw_thing(rng, pen, thing, sun, fine)
    light = (0.85 + 0.3 * rng.random()) * np.asarray(image.reduce(fine), np.float32)
    light += 5 * rng.standard_normal((size, size, 1), np.float32)  # grain of the camera
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------- scenes as a dataset
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
MAX_SCENES = 1_000_000  # of a split
FIRST_SCENE = {"train": 0, "val": MAX_SCENES}
CACHE_BYTES = 2**28  # of scenes that are drawn only once


def coco_content(seed, first, n, size):
    """Return images, annotations and categories of n scenes as in a COCO file."""
    images = []
    annotations = []
    for i in range(n):
        images.append({"id": i, "file_name": f"scene_{i:06d}.png", "width": size, "height": size})
        labels, boxes, areas = scene_objects(seed, first + i, size)
        for label, box, area in zip(labels, boxes, areas):
            x0, y0, x1, y1 = box
            annotation = {
                "image_id": i,
                "category_id": int(label) + 1,
                "area": float(area),
                "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            }
            annotations.append(annotation)
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


class SceneRenderer:
    """Draws scenes, and keeps the first ones in memory that worker processes share."""

    def __init__(self, seed, first, n, size):
        self.seed = seed
        self.first = first
        self.size = size
        num_cached = min(n, CACHE_BYTES // (3 * size * size))
        self.pixels = torch.empty(num_cached, size, size, 3, dtype=torch.uint8).share_memory_()
        self.is_drawn = torch.zeros(num_cached, dtype=torch.bool).share_memory_()

    def render(self, i):
        """Return scene `first` + i as a PIL image."""
        cached = i < len(self.is_drawn)
        if cached and self.is_drawn[i]:
            return Image.fromarray(self.pixels[i].numpy())
        scene = draw_scene(self.seed, self.first + i, self.size)
        if cached:
            self.pixels[i] = torch.from_numpy(np.array(scene))
            self.is_drawn[i] = True
        return scene
