"""Synthetic aerial scenes: objects of iSAID's fifteen classes on textured ground.

A scene depends on its seed and number alone. Points are complex numbers x + iy, with y pointing
down: one multiplication rotates and scales a shape, one addition moves it. To add a class, add an
entry to CLASS_SHAPES.
"""

import dataclasses
import math
import mmap

import numpy as np
from PIL import Image, ImageDraw


# ---------------------------------------------------------------- outlines
# In units of the object's length, which lies along the x axis.
def rect(width, height):
    """Return a rectangle about 0, closed, so that it can be an outline as well as filled."""
    corner = width + 1j * height
    return np.array([-corner, corner.conjugate(), corner, -corner.conjugate(), -corner]) / 2


def arc(radius, start=-180, stop=180):
    """Return an arc about 0 between two angles, multiples of 15 degrees; by default a circle."""
    steps = np.arange(start // 15, stop // 15 + 1)
    return radius * np.exp(2j * np.pi * steps / 24)


def polar(radius, angle):
    """Return a point by its distance from 0 and its angle, a multiple of 15 degrees."""
    return arc(radius, angle, angle)[0]


def symmetric(half):
    """Return a polygon symmetric about the x axis, from its points with y >= 0, front to back."""
    return np.append(half, np.conj(half[::-1]))


def mirrored(polygons):
    """Return the polygons, and their copies at the other end of the object."""
    return polygons + [-np.asarray(polygon) for polygon in polygons]


def ends_of_blade(angle):
    """Return the two corners at the end of a helicopter's rotor blade."""
    end = polar(0.36, angle)
    return [0.15 + end * (1 - 0.06j), 0.15 + end * (1 + 0.06j)]


def pier():
    """Return a jetty along the x axis with five piers on either side."""
    half = []
    for x in (0.42, 0.19, -0.04, -0.27, -0.5):
        half += [x + (0.08 + 0.08j), x + (0.08 + 0.31j), x + 0.31j, x + 0.08j]
    return symmetric(half)


def kidney():
    """Return the outline of a pool."""
    circle = arc(1, -360, -15)
    return circle * (0.38 + 0.12 * (circle**2).real - 0.09 * circle.imag)


def stadium(radius):
    """Return two half circles joined by straight lines."""
    return np.concatenate(mirrored([arc(radius, -90, 90) + 0.22]))


def crossing():
    """Return a circle with four roads that leave it."""
    quarter = np.append([0.5 - 0.09j, 0.5 + 0.09j], arc(0.37, 15, 75))
    return np.concatenate([quarter, 1j * quarter, -quarter, -1j * quarter])


SHIP = symmetric([0.5, 0.36 + 0.1j, 0.18 + 0.17j, -0.42 + 0.17j, -0.5 + 0.13j])
TRUCK = symmetric(
    [0.5 + 0.1j, 0.47 + 0.14j, 0.3 + 0.14j, 0.28 + 0.07j, 0.22 + 0.07j, 0.22 + 0.16j, -0.5 + 0.16j]
)
CAR = symmetric([0.5 + 0.12j, 0.44 + 0.22j, 0.2 + 0.25j, -0.38 + 0.25j, -0.48 + 0.2j, -0.5 + 0.1j])
PLANE = symmetric(
    [
        0.5,
        0.47 + 0.03j,
        0.4 + 0.05j,
        0.14 + 0.05j,
        -0.1 + 0.46j,
        -0.19 + 0.46j,
        -0.07 + 0.05j,
        -0.32 + 0.04j,
        -0.44 + 0.18j,
        -0.5 + 0.18j,
        -0.45 + 0.02j,
    ]
)
HELICOPTER = symmetric(
    [0.42, 0.38 + 0.06j, 0.28 + 0.08j]
    + ends_of_blade(45)
    + [0.15 + 0.09j]
    + ends_of_blade(135)
    + [0.02 + 0.08j, -0.08 + 0.04j, -0.4 + 0.03j, -0.41 + 0.1j, -0.5 + 0.1j, -0.48 + 0.02j]
)
POOL = kidney()
TRACK = stadium(0.28)
BASES = np.array([-0.28, -0.04 + 0.24j, 0.2, -0.04 - 0.24j])
FOUL_LINES = np.array([polar(0.68, -45), 0, polar(0.68, 45)]) - 0.34

# ---------------------------------------------------------------- colors
WHITE = (238, 238, 232)
FIXED_COLORS = {
    "white": WHITE,
    "dark": (44, 48, 54),
    "water": (58, 98, 116),
    "shadow": (0, 0, 0, 48),
}
PAINT = (WHITE, (170, 176, 182), (70, 76, 86), (168, 48, 42), (48, 84, 142), (206, 172, 66))
PALE = (WHITE, (216, 214, 204), (186, 192, 194), (206, 184, 158))
CLAY = ((176, 128, 84), (190, 146, 104), (166, 104, 72), (172, 84, 64))
COURT = ((58, 98, 150), (64, 122, 88), (172, 92, 66), (104, 116, 128))
STONE = ((136, 136, 134), (166, 162, 154), (116, 116, 120))
LAWN = ((88, 140, 68), (102, 150, 82), (76, 124, 62))
AQUA = ((70, 190, 214), (92, 206, 222), (58, 164, 206))


# ---------------------------------------------------------------- shapes
@dataclasses.dataclass(frozen=True)
class Part:
    """Polygons of one color, filled or drawn as lines."""

    color: str  # "main", "accent" or one of FIXED_COLORS; then "+" for lighter, "-" for darker
    width: float  # of the lines, in units of the object's length; 0: filled
    polygons: list


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the objects of a class look like."""

    length: tuple  # the shortest and the longest, in pixels
    height: float  # for the shadow, in pixels
    main: tuple  # colors to choose from
    accent: tuple
    parts: list  # from bottom to top

    @property
    def outline(self):
        """The first polygon of the first part: it contains all others, and gives box and area."""
        return self.parts[0].polygons[0]


def fill(color, polygons):
    """Return a part of filled polygons."""
    return Part(color, 0, polygons)


def line(color, width, polygons):
    """Return a part of lines; their width is in units of the object's length."""
    return Part(color, width, polygons)


CLASS_SHAPES = {
    "ship": Shape(
        length=(20, 44),
        height=2,
        main=PAINT,
        accent=CLAY + PALE,
        parts=[
            fill("main", [SHIP]),
            fill("accent", [0.84 * SHIP]),
            fill("white", [rect(0.1, 0.24) - 0.35]),
            fill("dark", [rect(0.03, 0.1) - 0.38]),
            line("accent-", 0.03, [rect(0.13, 0.17) + x for x in (0.2, 0.02, -0.16)]),
        ],
    ),
    "storage_tank": Shape(
        length=(12, 30),
        height=3,
        main=PALE,
        accent=PALE,
        parts=[
            fill("main-", [arc(0.5)]),
            fill("main", [arc(0.45)]),
            fill("main-", [np.append(arc(0.42, -180, -90), 0)]),
            line("main-", 0.02, [arc(0.28)]),
            fill("dark", [arc(0.05)]),
        ],
    ),
    "baseball_diamond": Shape(
        length=(24, 42),
        height=0,
        main=CLAY,
        accent=LAWN,
        parts=[
            fill("main", [np.append(arc(0.72, -45, 45), 0) - 0.36]),
            fill("accent", [BASES]),
            fill("main", [arc(0.06) - 0.04]),
            line("white", 0.025, [FOUL_LINES]),
            fill("white", [arc(0.04) + base for base in BASES]),
        ],
    ),
    "tennis_court": Shape(
        length=(22, 36),
        height=0,
        main=COURT,
        accent=COURT,
        parts=[
            fill("accent", [rect(1, 0.54)]),
            fill("main+", [rect(0.76, 0.36)]),
            line("white", 0.02, [rect(0.76, 0.36), rect(0.76, 0.24), rect(0.4, 0.24)]),
            line("white", 0.02, [(-0.2, 0.2)]),
            line("dark", 0.035, [(-0.2j, 0.2j)]),
        ],
    ),
    "basketball_court": Shape(
        length=(20, 34),
        height=0,
        main=CLAY + COURT,
        accent=COURT,
        parts=[
            fill("main-", [rect(1, 0.6)]),
            fill("main", [rect(0.92, 0.52)]),
            fill("accent", mirrored([rect(0.18, 0.18) + 0.37])),
            line("white", 0.02, [rect(0.92, 0.52), (-0.26j, 0.26j), arc(0.1)]),
            line("white", 0.02, mirrored([rect(0.18, 0.18) + 0.37, arc(0.22, 90, 270) + 0.42])),
            line("white", 0.02, mirrored([arc(0.09, 90, 270) + 0.28])),
        ],
    ),
    "Ground_Track_Field": Shape(
        length=(36, 48),
        height=0,
        main=CLAY[2:],
        accent=LAWN,
        parts=[
            fill("main", [TRACK]),
            line("main+", 0.012, [0.93 * TRACK, 0.85 * TRACK]),
            fill("accent", [stadium(0.185)]),
            line("white", 0.012, [rect(0.46, 0.26), (-0.13j, 0.13j), arc(0.06)]),
        ],
    ),
    "Bridge": Shape(
        length=(32, 48),
        height=3,
        main=STONE,
        accent=STONE,
        parts=[
            fill("main-", [rect(1, 0.22)]),
            fill("main", [rect(1, 0.17)]),
            line("main+", 0.02, mirrored([(-0.49 + 0.09j, 0.49 + 0.09j)])),
            line("white", 0.025, [(x, x + 0.06) for x in np.arange(-0.47, 0.45, 0.125)]),
        ],
    ),
    "Large_Vehicle": Shape(
        length=(20, 34),
        height=2,
        main=PAINT,
        accent=PAINT,
        parts=[
            fill("dark", [TRUCK]),
            fill("main", [rect(0.7, 0.3) - 0.14]),
            line("main-", 0.02, [rect(0.24, 0.3) - 0.14]),
            fill("accent", [rect(0.17, 0.27) + 0.38]),
            fill("dark", [rect(0.05, 0.22) + 0.455]),
        ],
    ),
    "Small_Vehicle": Shape(
        length=(12, 16),
        height=1.5,
        main=PAINT,
        accent=PAINT,
        parts=[
            fill("main", [CAR]),
            fill("dark", [rect(0.56, 0.4) - 0.06]),
            fill("main+", [rect(0.28, 0.38) - 0.08]),
        ],
    ),
    "Helicopter": Shape(
        length=(22, 34),
        height=4,
        main=PAINT,
        accent=PAINT,
        parts=[
            fill("main", [HELICOPTER]),
            fill("dark", [rect(0.1, 0.11) + 0.32]),
            line(
                "dark", 0.065, [(0.15 - polar(0.34, a), 0.15 + polar(0.34, a)) for a in (45, 135)]
            ),
            fill("main+", [arc(0.045) + 0.15]),
        ],
    ),
    "Swimming_pool": Shape(
        length=(14, 30),
        height=0,
        main=AQUA,
        accent=PALE,
        parts=[
            fill("accent", [POOL]),
            fill("main-", [0.84 * POOL]),
            fill("main", [0.74 * POOL]),
            line("main+", 0.03, [(x - 0.16j, x + 0.06 - 0.04j) for x in (-0.2, 0, 0.18)]),
        ],
    ),
    "Roundabout": Shape(
        length=(26, 44),
        height=0,
        main=PAINT[1:3],
        accent=LAWN,
        parts=[
            fill("main", [crossing()]),
            line("white", 0.02, mirrored([(0.4, 0.48), (0.4j, 0.48j)])),
            line("white", 0.012, [arc(0.29)]),
            fill("white", [arc(0.2)]),
            fill("accent", [arc(0.17)]),
            fill("accent-", [arc(0.08) + 0.03 + 0.03j]),
        ],
    ),
    "Soccer_ball_field": Shape(
        length=(30, 41),
        height=0,
        main=LAWN,
        accent=LAWN,
        parts=[
            fill("main", [rect(1, 0.66)]),
            fill("main+", mirrored([rect(0.115, 0.58) + 0.345, rect(0.115, 0.58) + 0.115])),
            line("white", 0.016, mirrored([rect(0.14, 0.32) + 0.39])),
            line("white", 0.016, [rect(0.92, 0.58), (-0.29j, 0.29j), arc(0.1)]),
            line("white", 0.016, mirrored([rect(0.05, 0.15) + 0.435])),
        ],
    ),
    "plane": Shape(
        length=(22, 46),
        height=3,
        main=PALE,
        accent=PAINT[3:],
        parts=[
            fill("main-", [PLANE]),
            fill("dark", [rect(0.13, 0.05) + 0.07 - 0.2j, rect(0.13, 0.05) + 0.07 + 0.2j]),
            line("main+", 0.09, [(-0.42, 0.43)]),
            line("accent", 0.045, [(-0.48, -0.3)]),
            fill("dark", [rect(0.03, 0.05) + 0.445]),
        ],
    ),
    "Harbor": Shape(
        length=(30, 42),
        height=2,
        main=STONE,
        accent=CLAY,
        parts=[
            fill("main", [pier()]),
            line("main+", 0.08, [(-0.48, 0.48)]),
            line(
                "main-",
                0.02,
                mirrored([(x - 0.1j, x - 0.29j) for x in (0.46, 0.23, 0, -0.23, -0.46)]),
            ),
        ],
    ),
}
SCENERY_SHAPES = {  # without a label
    "tree": Shape(
        length=(6, 12),
        height=2,
        main=LAWN,
        accent=LAWN,
        parts=[fill("main-", [arc(0.5)]), fill("main", [arc(0.25) - 0.1 - 0.1j])],
    ),
    "roof": Shape(
        length=(12, 20),
        height=2.5,
        main=CLAY + STONE,
        accent=PALE,
        parts=[fill("main-", [rect(1, 0.7)]), fill("main", [rect(1, 0.35) - 0.175j])],
    ),
    "pond": Shape(  # under a bridge, and as long
        length=(0, 0),
        height=0,
        main=CLAY,
        accent=LAWN,
        parts=[
            fill("main", [1.6j * POOL]),
            fill("accent-", [1.56j * POOL]),
            fill("water", [1.48j * POOL]),
        ],
    ),
}
SHAPES = CLASS_SHAPES | SCENERY_SHAPES
CLASSES = tuple(CLASS_SHAPES)
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]


# ---------------------------------------------------------------- grounds
@dataclasses.dataclass(frozen=True)
class Ground:
    """What the ground of a scene looks like."""

    dark: tuple  # its colors lie between dark and light
    light: tuple
    patches: tuple  # color of its larger patches
    wave_length: float  # of the stripes, in pixels
    wave_strength: float  # of the stripes, in values of the color
    wave_bend: float  # 0: straight stripes
    scenery: list  # names of SCENERY_SHAPES, per 128 x 128 pixels


GROUNDS = {
    "water": Ground(
        dark=(34, 66, 88),
        light=(66, 108, 124),
        patches=(84, 134, 138),
        wave_length=6,
        wave_strength=4,
        wave_bend=3,
        scenery=[],
    ),
    "grass": Ground(
        dark=(74, 100, 54),
        light=(122, 146, 84),
        patches=(150, 146, 98),
        wave_length=9,
        wave_strength=4,
        wave_bend=0.3,
        scenery=["tree"] * 12,
    ),
    "soil": Ground(
        dark=(128, 104, 76),
        light=(178, 154, 118),
        patches=(120, 122, 78),
        wave_length=7,
        wave_strength=5,
        wave_bend=0.6,
        scenery=["tree"] * 4,
    ),
    "paved": Ground(
        dark=(118, 118, 116),
        light=(152, 150, 146),
        patches=(98, 98, 100),
        wave_length=24,
        wave_strength=3,
        wave_bend=0,
        scenery=[],
    ),
    "town": Ground(
        dark=(104, 108, 84),
        light=(142, 138, 116),
        patches=(92, 112, 68),
        wave_length=3,
        wave_strength=1,
        wave_bend=0,
        scenery=["roof"] * 8 + ["tree"] * 10,
    ),
}
# With these shares of scenes at sea and of bridges, all classes are about as common.
SHARE_AT_SEA = 0.17
CLASSES_AT_SEA = ["ship", "Harbor", "ship", "Harbor", "Bridge"]
CLASSES_ON_LAND = [name for name in CLASSES if name not in ("ship", "Harbor")]
GROUNDS_ON_LAND = ["grass", "soil", "paved", "town"]
STREET = (112, 112, 114)


# ---------------------------------------------------------------- placing objects
@dataclasses.dataclass(frozen=True)
class SceneObject:
    """An object or a piece of scenery at its place."""

    name: str
    axis: complex  # from its back to its front: the length in pixels times the direction
    center: complex
    box: tuple  # (x0, y0, x1, y1) in pixels; not clipped to the image

    @property
    def outline(self):
        """The outline in pixels about 0."""
        return SHAPES[self.name].outline * self.axis


def place_objects(rng, size):
    """Return (the name of a scene's ground, its objects).

    A tenth of the scenes have no objects; the others 1 to 7 of them per 128 x 128 pixels.
    """
    if rng.random() < SHARE_AT_SEA:
        ground = "water"
        classes = CLASSES_AT_SEA
    else:
        ground = choose(rng, GROUNDS_ON_LAND)
        classes = CLASSES_ON_LAND
    num_objects = 0
    if rng.random() >= 0.1:
        num_objects = rng.integers(1, 2 + int(6 * (size / 128) ** 2))
    objects = []
    for _ in range(num_objects):
        neighbor = None  # some objects stand side by side with another of their class
        if objects and rng.random() < 0.35:
            neighbor = objects[-1]
            name = neighbor.name
        else:
            name = choose(rng, classes)
        placed = try_place(rng, name, objects, size, neighbor)
        if placed:
            objects.append(placed)
    return ground, objects


def choose(rng, values):
    """Return one of the values, drawn at random."""
    return values[int(rng.random() * len(values))]


def try_place(rng, name, objects, size, neighbor=None):
    """Return one more object, at a place where it touches no other one; None if there is no room.

    objects:  those that are already placed
    size:     of the image in pixels
    neighbor: an object of the same class; the new one is put next to it if there is room
    """
    if neighbor:
        axis = neighbor.axis
    else:
        shortest, longest = SHAPES[name].length
        length = shortest + (longest - shortest) * rng.random()
        axis = complex(length * np.exp(2j * np.pi * rng.random()))
    outline = SHAPES[name].outline * axis
    extent = np.array([np.ptp(outline.real), np.ptp(outline.imag)])
    width, height = extent
    # The border of the image cuts off at most a fifth of width and height: 0.64 of the box stays.
    corners = list(rng.random((10, 2)) * (size - 0.6 * extent) - 0.2 * extent)
    if neighbor:
        corners = corners_beside(neighbor, width, height) + corners
    for x, y in corners:
        inside_x = -0.2 * width <= x <= size - 0.8 * width
        inside_y = -0.2 * height <= y <= size - 0.8 * height
        is_free = all(gap(x, y, width, height, other.box) > 2 for other in objects)
        if inside_x and inside_y and is_free:
            center = complex(x - outline.real.min(), y - outline.imag.min())
            return SceneObject(name, axis, center, (x, y, x + width, y + height))
    return None


def corners_beside(neighbor, width, height):
    """Return the top left corners of two boxes, close to an object's left and right side."""
    direction = 1j * neighbor.axis / abs(neighbor.axis)  # at a right angle to its axis
    direction += 1e-9 + 1e-9j  # neither part may be zero: the next line divides by them
    step = direction * (3 + min(width / abs(direction.real), height / abs(direction.imag)))
    x, y, _, _ = neighbor.box
    return [(x + step.real, y + step.imag), (x - step.real, y - step.imag)]


def gap(x, y, width, height, box):
    """Return the gap between two boxes in pixels, along x or y; negative if they overlap.

    x, y, width, height: of the first box
    box: (x0, y0, x1, y1) of the second
    """
    x0, y0, x1, y1 = box
    return max(x - x1, x0 - x - width, y - y1, y0 - y - height)


def scene_annotations(seed, n, size):
    """Return the objects of scene n as annotations of a COCO file; nothing is drawn."""
    _, objects = place_objects(np.random.default_rng([seed, n]), size)
    annotations = []
    for scene_object in objects:
        whole_box = np.array(scene_object.box, np.float32)
        box = whole_box.clip(0, size)
        width, height = box[2:] - box[:2]
        whole_width, whole_height = whole_box[2:] - whole_box[:2]
        visible = (width * height) / (whole_width * whole_height)
        annotation = {
            "category_id": CLASSES.index(scene_object.name) + 1,
            "area": float(polygon_area(scene_object.outline) * visible),
            "bbox": [float(box[0]), float(box[1]), float(width), float(height)],
        }
        annotations.append(annotation)
    return annotations


def polygon_area(points):
    """Return the area of a polygon by the shoelace formula."""
    return abs(np.vdot(points, np.roll(points, -1)).imag) / 2


# ---------------------------------------------------------------- drawing
def draw_scene(seed, n, size, scale=2):
    """Draw scene n as a PIL image, RGB, of size x size pixels.

    scale: it is drawn this many times as large and then reduced, for smooth edges
    """
    rng = np.random.default_rng([seed, n])
    ground, objects = place_objects(rng, size)
    scenery = []
    num_tiles = max(1, size * size // 128**2)
    for name in GROUNDS[ground].scenery * num_tiles:
        placed = try_place(rng, name, objects, size)
        if placed:
            scenery.append(placed)
    ponds = []
    for scene_object in objects:
        if scene_object.name == "Bridge" and ground != "water":
            ponds.append(dataclasses.replace(scene_object, name="pond"))

    image = render_background(rng, ground, size)
    image = image.resize((size * scale, size * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image, "RGBA")
    sun = np.exp(2j * np.pi * rng.random())
    for scene_object in ponds + scenery + objects:
        draw_object(rng, pen, scene_object, sun, scale)

    brightness = 0.85 + 0.3 * rng.random()
    pixels = brightness * np.asarray(image.reduce(scale), np.float32)
    pixels += 5 * rng.standard_normal((size, size, 1), np.float32)  # the camera's noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_object(rng, pen, scene_object, sun, scale):
    """Draw an object and its shadow.

    sun:   direction of the shadow, a complex number
    scale: canvas pixels per image pixel
    """
    shape = SHAPES[scene_object.name]
    tint = 0.88 + 0.2 * rng.random()
    colors = dict(FIXED_COLORS)
    colors["main"] = choose(rng, shape.main)
    colors["accent"] = choose(rng, shape.accent)
    shadow = []
    for length in (0.5, 1, 1.3):  # several faint copies, so that the edge is soft
        shadow.append(shape.outline + length * shape.height * sun / scene_object.axis)
    for part in [fill("shadow", shadow)] + shape.parts:
        gain = tint
        if part.color.endswith("+"):
            gain *= 1.16
        elif part.color.endswith("-"):
            gain *= 0.76
        color = tuple(min(255, int(c * gain)) for c in colors[part.color.rstrip("+-")])
        for polygon in part.polygons:
            pixels = (np.multiply(polygon, scene_object.axis) + scene_object.center) * scale
            points = np.column_stack([pixels.real, pixels.imag]).ravel().tolist()
            if part.width:
                width = max(1, round(part.width * abs(scene_object.axis) * scale))
                pen.line(points, color, width)
            else:
                pen.polygon(points, color)


def render_background(rng, name, size):
    """Draw the ground of a scene as a PIL image of size x size pixels."""
    ground = GROUNDS[name]
    dark, light, patches = np.float32([ground.dark, ground.light, ground.patches])
    fine = noise(rng, size, (32, 16, 8, 4, 2))[..., None]
    broad = noise(rng, size, (64, 32, 16))[..., None]
    image = dark + (light - dark) * (0.5 + 0.8 * fine)
    image += (patches - image) * np.clip(4 * broad - 0.6, 0, 0.8)
    angle = np.float32(2 * np.pi * rng.random())
    steps = np.arange(size, dtype=np.float32)
    ramp = np.cos(angle) * steps[:, None] + np.sin(angle) * steps
    if name == "town":
        image[ramp % 64 < 10] = STREET
    phase = ramp[..., None] / ground.wave_length + ground.wave_bend * broad
    image += ground.wave_strength * np.sin(2 * np.pi * phase)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def noise(rng, size, cells):
    """Return a smooth random field (size, size), float32.

    cells: the cell size of each octave in pixels; each octave is half as strong as the one before
    """
    field = np.zeros((size, size), np.float32)
    for k, cell in enumerate(cells):
        side = size // cell + 2
        octave = Image.fromarray(rng.random((side, side), np.float32) - 0.5)
        octave = octave.resize((size, size), Image.Resampling.BICUBIC)
        field += np.asarray(octave) / 2**k
    return field


# ---------------------------------------------------------------- scenes as a dataset
MAX_SCENES = 1_000_000  # per split
FIRST_SCENE = {"train": 0, "val": MAX_SCENES}  # the number of each split's first scene
CACHE_BYTES = 2**28  # scenes of up to so many bytes in all are kept after they are drawn


def coco_content(seed, first, n, size):
    """Return n scenes, from number `first` on, as the content of a COCO file."""
    images = []
    annotations = []
    for i in range(n):
        images.append({"id": i, "file_name": f"scene_{i:06d}.png", "width": size, "height": size})
        for annotation in scene_annotations(seed, first + i, size):
            annotations.append({"image_id": i, **annotation})
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


class SceneRenderer:
    """Draws scenes, and keeps the first ones in memory that forked worker processes share."""

    def __init__(self, seed, first, n, size):
        self.seed = seed
        self.first = first
        self.n = n
        self.size = size
        num_cached = min(n, CACHE_BYTES // (3 * size * size))
        self.pixels = shared_array(num_cached, size, size, 3)
        self.is_drawn = shared_array(num_cached)

    def __reduce__(self):
        """Let a process that is not forked keep scenes of its own."""
        return SceneRenderer, (self.seed, self.first, self.n, self.size)

    def render(self, i):
        """Return scene `first` + i as a PIL image."""
        cached = i < len(self.is_drawn)
        if cached and self.is_drawn[i]:
            return Image.fromarray(self.pixels[i])
        scene = draw_scene(self.seed, self.first + i, self.size)
        if cached:
            self.pixels[i] = np.array(scene)
            self.is_drawn[i] = True
        return scene


def shared_array(*shape):
    """Return an array of zeros, uint8, that later forks of this process share.

    Unlike torch's shared memory it is not limited to the size of /dev/shm, 64 MB in a container.
    """
    num_bytes = max(1, math.prod(shape))
    return np.ndarray(shape, np.uint8, buffer=mmap.mmap(-1, num_bytes))
