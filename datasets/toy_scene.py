"""Draw toy street scenes: an image and its Cityscapes annotation, from a seed.

A scene is a list of `Thing`s, back to front. A thing has a label, an outline and strokes inside
the outline, so that image and label agree.

Shapes are polygons in the coordinates (u, v) of a plane, usually in metres: x to the right of the
camera, y above the ground, z ahead. A `Plane` projects them to image coordinates, in heights of a
2:1 image: x in 0..2, y in 0..1 from the top.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image, ImageDraw

from lednet.data.labels import CITYSCAPES_LABELS

Point = tuple[float, float]
Polygon = list[Point]
Color = tuple[int, ...]
Plane = Callable[[float, float], Point]
Row = tuple[Any, ...]
"""A colour and the polygons painted with it. The colour is RGB or RGBA, a float that scales the
thing's own colour, or, in a `Figure`, a tuple of colours to choose from."""

LABELS = {label.name: label for label in CITYSCAPES_LABELS}
SUPERSAMPLING = 2
ROAD, FAR = 4.0, 70.0  # metres to the kerb, and to the end of the street

MOODS = {  # top of the sky, its lower edge, light on everything (RGB factors)
    "noon": ((72, 142, 226), (196, 226, 246), (1.0, 1.0, 0.98)),
    "overcast": ((150, 166, 184), (214, 220, 224), (0.88, 0.9, 0.94)),
    "dusk": ((86, 92, 166), (252, 186, 140), (0.92, 0.78, 0.74)),
}
HOUSES = ((244, 214, 140), (250, 236, 208), (238, 178, 178), (176, 208, 226), (190, 222, 190))
ROOFS = ((112, 58, 48), (84, 76, 82), (134, 74, 44), (70, 82, 98))
CARS = ((206, 40, 44), (40, 88, 176), (236, 236, 236), (36, 38, 44), (54, 140, 130))
COATS = ((96, 44, 120), (30, 60, 116), (128, 28, 52), (60, 52, 48), (186, 60, 110))
VESTS = ((202, 240, 40), (255, 140, 20), (250, 90, 30))
HATS = ((70, 46, 30), (214, 170, 90), (30, 28, 30), (200, 40, 50))
SKINS = ((246, 206, 172), (222, 170, 124), (140, 92, 62), (94, 60, 42))
GLASS, PANE, TYRE, CHROME = (58, 78, 98), (140, 180, 204), (28, 28, 32), (194, 194, 200)
WHITE, CREAM, LAMP, RED = (255, 255, 255), (250, 248, 240), (255, 246, 190), (214, 26, 40)


class Annotation(NamedTuple):
    """One annotation of an image."""

    label_ids: np.ndarray  # (H, W) uint8, ids of the Cityscapes table
    instance_ids: np.ndarray  # (H, W) uint16: id, or 1000 * id + k for object k of its class
    objects: list[dict]  # as in polygons.json, back to front, polygons in whole pixels


class Scene(NamedTuple):
    """An image (H, W, 3) uint8 with its fine and its coarse annotation."""

    image: np.ndarray
    fine: Annotation
    coarse: Annotation


# shapes and planes


def box(u0: float, v0: float, u1: float, v1: float) -> Polygon:
    return [(u0, v0), (u1, v0), (u1, v1), (u0, v1)]


def arc(u: float, v: float, ru: float, rv: float, start: float, end: float, n: int = 14) -> Polygon:
    """n + 1 points on an ellipse, from `start` to `end` degrees."""
    angles = [math.radians(start + (end - start) * i / n) for i in range(n + 1)]
    return [(u + ru * math.cos(a), v + rv * math.sin(a)) for a in angles]


def disc(u: float, v: float, ru: float, rv: float | None = None) -> Polygon:
    return arc(u, v, ru, rv or ru, 0, 345, 23)


def mirrored(*half: Point) -> Polygon:
    """A polygon symmetric in u, from its right half listed top to bottom."""
    return [*half, *((-u, v) for u, v in reversed(half))]


def convex_hull(points: Polygon) -> Polygon:
    """Andrew's monotone chain."""
    hull: Polygon = []
    for ordered in (sorted(points), sorted(points, reverse=True)):
        half: Polygon = []
        for x, y in ordered:
            while len(half) > 1:
                (ax, ay), (bx, by) = half[-2:]
                if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                    break
                half.pop()
            half.append((x, y))
        hull += half[:-1]
    return hull


def shade(color: Color, factor: float) -> Color:
    return tuple(min(255, round(value * factor)) for value in color)


def IMAGE(u: float, v: float) -> Point:
    return u, v


class Street:
    """A random mood of light, and a pinhole camera on a car that looks along the street."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.x, self.horizon = 1.0 + rng.uniform(-0.12, 0.12), rng.uniform(0.4, 0.46)
        self.mood = rng.choice(("noon", "noon", "overcast", "dusk"))

    def __call__(self, x: float, y: float, z: float) -> Point:
        """Project a point in metres; the focal length is 1.2, the camera 1.6 m high."""
        scale = 1.2 / z
        return self.x + scale * x, self.horizon + scale * (1.6 - y)

    def floor(self, u: float, v: float) -> Point:
        """The plane of the ground: metres right, metres ahead."""
        return self(u, 0.0, v)

    def side(self, x: float) -> Plane:
        """The plane along the street at x: metres ahead, metres up."""
        return lambda u, v: self(x, v, u)

    def front(
        self, x: float, z: float, size: float = 1.0, flip: bool = False, up: float = 0.0
    ) -> Plane:
        """The plane across the street at z: metres right of x, metres above `up`."""
        right = -size if flip else size
        return lambda u, v: self(x + right * u, size * (up + v), z)

    def block(self, x0: float, x1: float, z0: float, z1: float, y0: float, y1: float) -> Polygon:
        """The eight corners of a box."""
        return [self(x, y, z) for x in (x0, x1) for z in (z0, z1) for y in (y0, y1)]


class Thing:
    """One labelled object in the image: its outline, and (polygon, colour) strokes inside it."""

    def __init__(self, label: str, at: Plane, outline: Polygon, color: Color, *rows: Row):
        self.label, self.color = label, color
        self.outline = [at(u, v) for u, v in outline]
        self.strokes: list[tuple[Polygon, Color]] = [(self.outline, color)]
        self.paint(at, *rows)

    def paint(self, at: Plane, *rows: Row) -> Self:
        for color, *polygons in rows:
            rgb = shade(self.color, color) if isinstance(color, float) else color
            self.strokes += [([at(u, v) for u, v in polygon], rgb) for polygon in polygons]
        return self

    def shadow(self, street: Street, x0: float, x1: float, z0: float, z1: float) -> Self:
        """Darken the ground below; the ground keeps its own label there."""
        ground = [street.floor(u, v) for u, v in box(x0 - 0.2, z0 - 0.25, x1 + 0.2, z1)]
        self.strokes.insert(0, (ground, (0, 0, 0, 90)))
        return self


class Figure:
    """A flat object as a table of shapes; where there are several colours, one is chosen."""

    def __init__(self, label: str, color: Any, outline: Polygon, *rows: Row):
        self.label, self.color, self.outline, self.rows = label, color, outline, rows

    def draw(self, rng: random.Random, at: Plane) -> Thing:
        def choose(color: Any) -> Any:
            several = isinstance(color, tuple) and isinstance(color[0], tuple)
            return rng.choice(color) if several else color

        thing = Thing(self.label, at, self.outline, choose(self.color))
        return thing.paint(at, *((choose(color), *shapes) for color, *shapes in self.rows))


# sky and ground


def sky(street: Street) -> Thing:
    rng, horizon, (top, bottom, _) = street.rng, street.horizon, MOODS[street.mood]
    thing = Thing("sky", IMAGE, box(-0.1, -0.1, 2.1, horizon), bottom)
    for i in range(32):
        color = tuple(round(a + (b - a) * i / 31) for a, b in zip(top, bottom, strict=True))
        thing.paint(IMAGE, (color, box(-0.1, horizon * i / 32, 2.1, horizon)))
    if street.mood != "overcast":  # a sun with a smile
        x, y = rng.uniform(0.5, 1.5), rng.uniform(0.07, 0.16)
        eyes = disc(x - 0.02, y - 0.01, 0.007), disc(x + 0.02, y - 0.01, 0.007)
        smile = arc(x, y + 0.008, 0.028, 0.026, 10, 170)
        glow, sun = ((255, 244, 200, 120), disc(x, y, 0.075)), ((255, 226, 110), disc(x, y, 0.055))
        thing.paint(IMAGE, glow, sun, ((120, 84, 30), *eyes, smile))
    for _ in range(rng.randint(2, 5)):
        x, y = rng.uniform(0.2, 1.8), rng.uniform(0.02, 0.26)
        puffs = [disc(x + 0.05 * k, y - 0.015 * (k in (1, 2)), 0.05, 0.026) for k in range(4)]
        thing.paint(IMAGE, ((250, 246, 242), *puffs))
    return thing


def meadow(street: Street) -> Thing:
    """The ground below everything, visible as verges and lawns."""
    rng, area = street.rng, box(-0.1, street.horizon, 2.1, 1.1)
    thing = Thing("terrain", IMAGE, area, (170, 206, 96))
    for _ in range(260):
        z, x = 1.9 / rng.uniform(0.04, 0.6), rng.uniform(4.4, 30) * rng.choice((-1, 1))
        color = rng.choice(((140, 182, 70), (196, 224, 122), (196, 224, 122), (250, 236, 120)))
        thing.paint(street.front(x, z), (color, [(-0.12, 0), (0, 0.25), (0.12, 0)]))
    return thing


def road(street: Street) -> Thing:
    rng, floor, area = street.rng, street.floor, box(-ROAD, 1.5, ROAD, FAR)
    grey = rng.randint(88, 112)
    thing = Thing("road", floor, area, (grey, grey, grey + 5))
    thing.paint(floor, ((232, 232, 224), *(box(-0.1, z, 0.1, z + 2) for z in range(2, 44, 4))))
    edges = (box(x, 1.5, x + 0.14, FAR) for x in (-ROAD, ROAD - 0.14))
    thing.paint(floor, ((214, 212, 206), *edges))
    if rng.random() < 0.5:  # a crossing
        z = rng.uniform(5.2, 8.0)
        stripes = (box(i - 3.8, z, i - 3.8 + 0.55, z + 1.8) for i in range(8))
        thing.paint(floor, ((236, 236, 230), *stripes))
    manholes = [disc(rng.uniform(-3, 3), rng.uniform(3, 14), 0.35) for _ in range(3)]
    return thing.paint(floor, ((72, 72, 74), *manholes))


def sidewalk(street: Street, x0: float, x1: float) -> Thing:
    """Paving slabs from the kerb at x0 to x1."""
    color = street.rng.choice(((208, 190, 164), (214, 184, 168), (200, 186, 172)))
    middle, edge = (x0 + x1) / 2, x0 + math.copysign(0.2, x0)
    joints = (box(x0, z, x1, z + 0.05) for z in range(2, 40))
    rows = (0.85, *joints, box(middle, 1.5, middle + 0.06, FAR)), (0.72, box(x0, 1.5, edge, FAR))
    return Thing("sidewalk", street.floor, box(x0, 1.5, x1, FAR), color, *rows)


def rail_track(street: Street, x: float) -> Thing:
    sleepers = (box(x - 1.3, z, x + 1.3, z + 0.4) for z in range(2, 60))
    rails = (box(x + u, 1.5, x + u + 0.16, FAR) for u in (-0.9, 0.7))
    rows = ((84, 64, 50), *sleepers), ((206, 206, 212), *rails)
    bed = box(x - 1.65, 1.5, x + 1.65, FAR)
    return Thing("rail track", street.floor, bed, (128, 112, 100), *rows)


# along the street


def house(street: Street, x: float, z0: float, z1: float) -> Thing:
    """A house whose front is at `x` (either sign), from z0 to z1."""
    rng, out, mid = street.rng, math.copysign(1.0, x), x + math.copysign(3.0, x)
    height, rise, color = rng.uniform(5.2, 8.2), rng.uniform(2.0, 3.2), rng.choice(HOUSES)
    back, top = x + 6.5 * out, height + rise
    corners = [(x, 0, z1), (x, height, z1), (mid, top, z1), (mid, top, z0)]
    corners += [(back, height, z0), (back, 0, z0), (x, 0, z0)]
    roof = [street(*corner) for corner in corners]
    thing = Thing("building", IMAGE, roof, rng.choice(ROOFS))
    side, gable = street.side(x), street.front(x, z0, flip=x < 0)
    thing.paint(side, (color, box(z0, 0, z1, height)))
    shape = [(0, 0), (0, height), (3.0, top), (6.5, height), (6.5, 0)]
    thing.paint(gable, (shade(color, 0.86), shape))
    thing.paint(side, (shade(color, 0.7), box(z0, 0, z1, 0.5)))
    pane = (255, 220, 120) if street.mood == "dusk" else (104, 140, 168)
    columns, sills = max(2, round((z1 - z0) / 2.6)), [0.9, 3.5, 6.1][: int(height // 2.6)]
    pitch, door = (z1 - z0) / columns, rng.randrange(columns)
    for column in range(columns):
        u0, u1 = z0 + (column + 0.25) * pitch, z0 + (column + 0.75) * pitch
        if column == door:
            thing.paint(side, (rng.choice(CARS), box(u0, 0, u1, 2.3)))
        for v in sills[column == door :]:
            flowers = rng.choice(((206, 60, 80), (90, 140, 60), (236, 160, 60)))
            thing.paint(side, (CREAM, box(u0 - 0.12, v - 0.12, u1 + 0.12, v + 1.55)))
            thing.paint(side, (pane, box(u0, v, u1, v + 1.42)))
            thing.paint(side, (flowers, box(u0 - 0.12, v - 0.32, u1 + 0.12, v - 0.1)))
    windows = (box(u, v, u + 1.3, v + 1.5) for v in sills for u in (1.2, 3.8))
    return thing.paint(gable, (pane, *windows))


def town_hall(street: Street) -> Thing:
    """The building with a clock tower at the end of the street."""
    rng = street.rng
    at, top, roof = street.front(rng.uniform(-4, 4), FAR), rng.uniform(13, 19), rng.choice(ROOFS)
    outline = mirrored((0, top + 5), (2.2, top), (2.2, 9), (9, 9), (9, 0))
    spire = [(0, top + 5), (2.2, top), (-2.2, top)]
    windows = (box(u + 0.5, 2, u + 1.5, 5.5) for u in range(-8, 8, 2))
    rows = (roof, spire, box(-9, 7.6, 9, 9)), (CREAM, disc(0, top - 2.2, 1.6))
    return Thing("building", at, outline, rng.choice(HOUSES), *rows, ((88, 100, 120), *windows))


def wall(street: Street, x: float, z0: float, z1: float) -> Thing:
    rng, side, course = street.rng, street.side(x), 0.3
    height = rng.uniform(2.3, 2.8)
    thing = Thing("wall", side, box(z0, 0, z1, height), (206, 160, 140))
    for row in range(int(height / course)):
        z, v = z0 + 0.35 * (row % 2), row * course
        while z < z1 - 0.65:
            brick = rng.choice(((150, 60, 44), (190, 94, 70), (178, 84, 60)))
            thing.paint(side, (brick, box(z, v + 0.05, z + 0.65, v + course)))
            z += 0.7
    return thing.paint(side, ((126, 60, 48), box(z0, height - 0.18, z1, height)))


def fence(street: Street, x: float, z0: float, z1: float) -> Thing:
    height = street.rng.uniform(1.7, 2.1)
    color = street.rng.choice(((246, 246, 240), (236, 240, 232), (120, 196, 160)))
    starts = (z0 + 0.08 + 0.42 * i for i in range(int((z1 - z0) / 0.42)))
    slats = (box(z, 0.05, z + 0.26, height) for z in starts)
    rails = (box(z0, v, z1, v + 0.14) for v in (0.35, height - 0.5))
    rows = (color, *slats), (shade(color, 0.88), *rails)
    return Thing("fence", street.side(x), box(z0, 0, z1, height), (52, 104, 84), *rows)


def tree(street: Street, x: float, z: float, size: float) -> Thing:
    """A round crown on a trunk, `size` metres high."""
    rng, at = street.rng, street.front(x, z, size)
    radius, green = rng.uniform(0.24, 0.3), rng.choice(((40, 98, 46), (52, 108, 40), (34, 88, 58)))

    def crown(angle: float, r: float) -> Point:
        return r * math.cos(angle), 0.66 + 1.2 * r * math.sin(angle)

    angles = (math.radians(-85 + 10 * i) for i in range(36))
    edge = [crown(a, radius * (1 + 0.1 * math.sin(7 * a + x))) for a in angles]
    trunk = [(0.045, 0.0), (0.03, 0.4), (-0.03, 0.4), (-0.045, 0.0)]
    thing = Thing("vegetation", at, [trunk[0], *edge, trunk[3]], green, ((96, 66, 44), trunk))
    for _ in range(40):
        leaf = crown(rng.uniform(0, 6.3), radius * rng.uniform(0, 0.75))
        tint = rng.choice((0.72, 0.85, 1.2, 1.4))
        thing.paint(at, (tint, arc(*leaf, 0.035, 0.035, 0, 300, 5)))
    return thing


SIGNS = (  # no entry, danger, straight on
    Figure("traffic sign", RED, disc(0, 0, 0.68), (WHITE, box(-0.44, -0.14, 0.44, 0.14))),
    Figure("traffic sign", RED, [(0, 0.72), (0.8, -0.62), (-0.8, -0.62)],
           (WHITE, [(0, 0.34), (0.48, -0.44), (-0.48, -0.44)]), (TYRE, disc(0, -0.2, 0.14))),
    Figure("traffic sign", WHITE, disc(0, 0, 0.68), ((20, 84, 200), disc(0, 0, 0.6)),
           (WHITE, mirrored((0, 0.45), (0.34, 0), (0.12, 0), (0.12, -0.42)))),
)  # fmt: skip


def pole(street: Street, x: float, z: float, load: str) -> list[Thing]:
    """A post at the kerb with its `load`: "light", "sign" or "" for nothing."""
    rng, at = street.rng, street.front(x, z)
    height = 1.6 + rng.uniform(0.27, 0.32) * z  # the top is in the image
    rows = ((94, 98, 106), box(-0.17, 0, -0.05, height)), ((70, 74, 82), box(-0.17, 0, 0.17, 0.7))
    things = [Thing("pole", at, box(-0.17, 0, 0.17, height), (136, 142, 150), *rows)]
    if load == "light":
        case = ((34, 36, 40), box(-0.38, height - 2.2, 0.38, height))
        outline, lit = box(-0.48, height - 2.3, 0.48, height + 0.1), rng.randrange(3)
        things.append(Thing("traffic light", at, outline, (246, 196, 40), case))
        for i, color in enumerate(((255, 50, 40), (255, 190, 30), (50, 240, 110))):
            lamp = disc(0, height - 0.4 - 0.7 * i, 0.29)
            things[-1].paint(at, (color if i == lit else shade(color, 0.4), lamp))
    for v in (height - 0.5, height - 1.95)[: rng.randint(1, 2) if load == "sign" else 0]:
        things.append(rng.choice(SIGNS).draw(rng, street.front(x, z, up=v)))
    return things


# vehicles


def car(street: Street, x: float, z: float) -> Thing:
    """Seen from the rear on the right of the road, from the front on the left."""
    color, x0, x1, end = street.rng.choice(CARS), x - 0.95, x + 0.95, street.front(x, z)
    corners = street.block(x0, x1, z, z + 4, 0.0, 0.95)
    corners += street.block(x0 + 0.22, x1 - 0.22, z + 0.5, z + 3, 0.9, 1.6)
    thing = Thing("car", IMAGE, convex_hull(corners), color)
    if abs(x) > 1.2:
        inner, wheels = (x0 if x > 0 else x1), (z + 0.8, z + 3.2)
        tyres = box(z, 0.0, z + 4, 0.3), *(disc(u, 0.34, 0.34) for u in wheels)
        hubs = (CHROME, *(disc(u, 0.34, 0.16) for u in wheels))
        thing.paint(street.side(inner), (TYRE, *tyres), hubs)
        window = [(z + 0.6, 1.0), (z + 0.8, 1.5), (z + 2.6, 1.5), (z + 3.0, 1.0)]
        thing.paint(street.side(inner + math.copysign(0.16, x)), (GLASS, window))
    thing.paint(end, (0.9, box(-0.95, 0.22, 0.95, 0.95)))
    thing.paint(street.front(x, z + 0.4), (GLASS, mirrored((0.58, 1.5), (0.68, 1.0))))
    bumper = box(-0.95, 0, 0.95, 0.22), box(-0.88, 0, -0.56, 0.3), box(0.56, 0, 0.88, 0.3)
    lights = (LAMP if x < 0 else (236, 30, 30), *(disc(u, 0.7, 0.17, 0.13) for u in (-0.72, 0.72)))
    thing.paint(end, (TYRE, *bumper), lights, (CREAM, box(-0.3, 0.36, 0.3, 0.54)))
    return thing.shadow(street, x0, x1, z, z + 4)


def chassis(length: float, *wheels: float) -> tuple[Row, ...]:
    tyres = (disc(u, 0.14, 0.46 / length, 0.14) for u in wheels)
    hubs = (disc(u, 0.14, 0.2 / length, 0.06) for u in wheels)
    return ((40, 40, 46), box(0, 0, 1, 0.1)), (TYRE, *tyres), (CHROME, *hubs)


def cargo(u1: float, metre: float) -> tuple[Row, ...]:
    """A cargo box from u = 0 to u1 with a large doughnut on it."""
    rings = ((CREAM, 0.8), ((140, 84, 40), 0.6), (CREAM, 0.2))
    doughnut = ((color, disc(u1 / 2, 0.61, r * metre, r * 0.29)) for color, r in rings)
    edges = (0.7, box(0, 0.94, u1, 1), box(0, 0.22, u1, 0.28))
    return ((44, 44, 50), box(0, 0, 1, 1)), (1.0, box(0, 0.22, u1, 1)), edges, *doughnut


def bus_window(u: float, skin: Color) -> tuple[Row, ...]:
    """A window and a passenger."""
    return (PANE, box(u, 0.49, u + 0.11, 0.8)), (skin, disc(u + 0.055, 0.57, 0.025, 0.07))


class LongVehicle(NamedTuple):
    """A box on wheels; `end` and `flank` are painted on planes with u and v in 0..1."""

    label: str
    size: tuple[float, float, float]  # width, length and height in metres
    colors: tuple[Color, ...]
    body: Color | float
    end: tuple[Row, ...]
    flank: tuple[Row, ...]

    def draw(self, street: Street, x: float, z: float, crossing: bool = False) -> Thing:
        """With its end towards the camera or, when `crossing`, its flank."""
        width, length, height = self.size
        across, along = (length, width) if crossing else (width, length)
        x0, x1 = x - across / 2, x + across / 2
        inner = x0 if x > 0 else x1
        hull = convex_hull(street.block(x0, x1, z, z + along, 0.0, height))
        thing = Thing(self.label, IMAGE, hull, street.rng.choice(self.colors), (self.body, hull))
        faces = (self.end, self.flank) if crossing else (self.flank, self.end)
        thing.paint(lambda u, v: street(inner, height * v, z + along * u), *faces[0])
        thing.paint(lambda u, v: street(x0 + across * u, height * v, z), *faces[1])
        return thing.shadow(street, x0, x1, z, z + along)


# fmt: off
BUS = LongVehicle(
    "bus", (2.6, 9.5, 3.2), ((250, 196, 24), (250, 196, 24), (216, 36, 40)), 1.0,
    ((1.0, box(0, 0, 1, 1)),
     (TYRE, box(0.08, 0.42, 0.92, 0.8), box(0.2, 0.85, 0.8, 0.96)),
     (PANE, box(0.12, 0.45, 0.88, 0.77)),
     ((255, 170, 40), *(disc(0.3 + 0.1 * i, 0.905, 0.03) for i in range(5))),
     (WHITE, box(0, 0.28, 1, 0.36)), *chassis(1),
     (LAMP, disc(0.1, 0.2, 0.07, 0.05), disc(0.9, 0.2, 0.07, 0.05))),
    ((0.92, box(0, 0, 1, 1)), (TYRE, box(0.02, 0.46, 0.98, 0.82)),
     *(row for i in range(7) for row in bus_window(0.04 + 0.134 * i, SKINS[i % 4])),
     (WHITE, box(0, 0.3, 1, 0.38)), *chassis(9.5, 0.18, 0.8)),
)
TRUCK = LongVehicle(
    "truck", (2.6, 7.5, 3.6), ((238, 120, 36), (238, 120, 36), (92, 66, 160)), 1.0,
    (*cargo(1.0, 1 / 2.6),
     (TYRE, box(0.04, 0, 0.22, 0.16), box(0.78, 0, 0.96, 0.16)),
     (RED, box(0.04, 0.16, 0.22, 0.21), box(0.78, 0.16, 0.96, 0.21))),
    (*cargo(0.74, 1 / 7.5), ((226, 226, 222), box(0.76, 0.1, 1, 1)),
     (GLASS, box(0.83, 0.5, 0.97, 0.78)), *chassis(7.5, 0.16, 0.86)),
)
TRAIN = LongVehicle(
    "train", (2.7, 32.0, 3.7), ((36, 84, 190), (24, 120, 190)), (242, 245, 250),
    (((242, 245, 250), box(0, 0, 1, 1)), (GLASS, box(0.08, 0.52, 0.92, 0.86)),
     (SKINS[0], disc(0.5, 0.62, 0.09, 0.08)), (1.0, box(0.38, 0.67, 0.62, 0.74)),  # driver, cap
     (1.0, box(0, 0.24, 1, 0.46)), *chassis(1),
     (LAMP, disc(0.16, 0.35, 0.09, 0.06), disc(0.84, 0.35, 0.09, 0.06))),
    ((shade((242, 245, 250), 0.92), box(0, 0, 1, 1)),
     (GLASS, *(box(u / 16 + 0.01, 0.55, u / 16 + 0.055, 0.82) for u in range(16))),
     (1.0, box(0, 0.26, 1, 0.46)), *chassis(1)),
)
BICYCLE = Figure(
    "bicycle", (0, 0, 0, 0),  # the street shows through the frame
    [*arc(-0.56, 0.38, 0.38, 0.38, 290, 70), (-0.42, 1.02), (-0.05, 1.02), (0.0, 0.82), (0.3, 0.86),
     (0.3, 1.16), (0.6, 1.16), (0.62, 0.8), *arc(0.56, 0.38, 0.38, 0.38, 85, -110), (0, 0.2)],
    (TYRE, disc(-0.56, 0.38, 0.38), disc(0.56, 0.38, 0.38)),
    ((206, 210, 216), disc(-0.56, 0.38, 0.28), disc(0.56, 0.38, 0.28)),
    (((20, 170, 180), (230, 60, 120), (240, 150, 30)),
     [(-0.6, 0.36), (-0.02, 0.28), (-0.22, 0.92)], [(-0.26, 0.86), (-0.02, 0.28), (0.44, 0.84)],
     [(0.36, 1.1), (0.48, 1.1), (0.6, 0.38), (0.5, 0.38)]),
    ((60, 40, 30), box(-0.4, 0.9, -0.08, 1.0), box(0.32, 1.04, 0.58, 1.14)),
)
MOTORCYCLE = Figure(
    "motorcycle", (58, 58, 66),
    [*arc(-0.68, 0.4, 0.4, 0.4, 300, 90), (-1.02, 0.92), (-0.3, 0.94), (-0.05, 1.16), (0.3, 1.14),
     (0.34, 1.38), (0.6, 1.36), (0.72, 0.84), *arc(0.74, 0.4, 0.4, 0.4, 80, -110), (0, 0.12)],
    (TYRE, disc(-0.68, 0.4, 0.4), disc(0.74, 0.4, 0.4)),
    (CHROME, disc(-0.68, 0.4, 0.2), disc(0.74, 0.4, 0.2)),
    (((190, 20, 30), (24, 26, 32), (20, 120, 60)),
     [(-1.0, 0.9), (-0.3, 0.9), (-0.05, 1.12), (0.3, 1.1), (0.4, 1.3), (0.58, 1.3), (0.7, 0.86),
      (0.34, 0.52), (-0.3, 0.5)]),
    (TYRE, [(-0.95, 0.9), (-0.3, 0.9), (-0.3, 0.78), (-0.85, 0.78)]),
    (CHROME, box(-0.5, 0.18, 0.1, 0.3)), (LAMP, disc(0.55, 1.02, 0.1)),
)

# people, animals and void

LEG = ((0.3, 0.74), (0.2, 0.34), (0.3, 0.2), (-0.06, 0.2), (0.0, 0.66), (-0.36, 0.86))
RIDER = Figure(  # leaning forward over a bicycle or a motorcycle
    "rider", VESTS,
    [(-0.06, 1.6), (-0.1, 1.86), (0.06, 2.02), (0.26, 2.0), (0.36, 1.82), (0.3, 1.62), (0.56, 1.28),
     (0.5, 1.08), (0.2, 1.2), (0.18, 1.0), *LEG, (-0.44, 1.1), (-0.3, 1.5)],
    (((40, 48, 80), (60, 50, 46)), [(0.18, 1.0), *LEG, (-0.42, 1.04)]),
    ((240, 244, 250), box(-0.34, 1.22, 0.2, 1.31)), (SKINS, disc(0.13, 1.79, 0.19, 0.2)),
    (((236, 240, 250), (250, 60, 50), (40, 130, 240)), arc(0.12, 1.8, 0.2, 0.2, 0, 180)),
)
PERSON = Figure(
    "person", COATS,
    mirrored((0.0, 1.92), (0.15, 1.88), (0.23, 1.7), (0.15, 1.52), (0.34, 1.42), (0.46, 0.84),
             (0.4, 0.62), (0.28, 0.62), (0.28, 0.0), (0.04, 0.0)),
    ((44, 46, 66), box(-0.28, 0, -0.04, 0.64), box(0.04, 0, 0.28, 0.64)),
    (TYRE, box(-0.28, 0, -0.04, 0.12), box(0.04, 0, 0.28, 0.12)),
    (SKINS, disc(0, 1.7, 0.2, 0.19)), (HATS, arc(0, 1.74, 0.2, 0.16, 0, 180)),
    (((240, 200, 60), (230, 240, 244)), box(-0.24, 1.38, 0.24, 1.47)),  # a scarf
    (TYRE, disc(-0.08, 1.68, 0.03), disc(0.08, 1.68, 0.03)),
    ((240, 220, 160), *(disc(0, v, 0.04) for v in (1.2, 1.0, 0.8))),
)
DUSTBIN = Figure(
    "static", ((48, 84, 70), (90, 92, 98)),
    mirrored((0, 1.15), (0.36, 1.05), (0.4, 0.94), (0.32, 0.0)),
    (0.6, box(-0.38, 0.86, 0.38, 0.94)),
)
DUCK, DUCKLING = (  # animals are `dynamic`
    Figure("dynamic", color,
           [(-0.5, 0.5), (-0.3, 0.42), (0.1, 0.44), (0.14, 0.66), (0.3, 0.74), (0.42, 0.66),
            (0.56, 0.58), (0.42, 0.52), (0.36, 0.2), (0.1, 0.06), (-0.2, 0.08)],
           ((240, 130, 30), [(0.41, 0.64), (0.56, 0.58), (0.41, 0.53)]),
           (TYRE, disc(0.3, 0.64, 0.035)))
    for color in (CREAM, (250, 214, 70))
)
BALLOON = Figure(
    "dynamic", (230, 50, 60),
    mirrored((0.0, -1.0), (0.6, -0.8), (1.0, -0.1), (0.7, 0.6), (0.25, 1.15), (0.25, 1.6)),
    ((250, 230, 90), mirrored((0, -1), (0.3, -0.6), (0.4, 0.1), (0.1, 1.0))),
    ((120, 80, 40), box(-0.25, 1.15, 0.25, 1.6)),
)
# fmt: on


def ducks(street: Street, x: float, z: float) -> Iterator[Thing]:
    """A duck leads her ducklings over the road."""
    flip = street.rng.random() < 0.5
    ducklings = ((0.25 + 0.55 * i, 0.55, DUCKLING) for i in (1, 2, 3))
    for lag, size, figure in ((0, 1, DUCK), *ducklings):
        at = street.front(x + (lag if flip else -lag), z, size, flip)
        yield figure.draw(street.rng, at)


def bonnet(rng: random.Random) -> Thing:
    color, top = rng.choice(((36, 44, 60), (120, 26, 34), (190, 194, 200))), rng.uniform(0.92, 0.95)
    curve = [(x / 20, top + 0.045 * (x / 20 - 1) ** 2) for x in range(-1, 42)]
    edge = [(-0.05, 1.1), *curve, (2.05, 1.1)]
    shine = [(-0.05, 1.1), *((x, y + 0.012) for x, y in curve), (2.05, 1.1)]
    badge = (CREAM, disc(1.0, top + 0.03, 0.022)), (RED, disc(1.0, top + 0.03, 0.012))
    return Thing("ego vehicle", IMAGE, edge, color, (1.2, shine), *badge)


# composition


def roadside(street: Street, x: float) -> Iterator[Thing]:
    """The objects at `x` along the street, from its far end to the camera."""
    rng, out = street.rng, math.copysign(1.0, x)
    barriers: list[Callable[..., Thing]] = rng.sample((wall, fence), 2)
    barrier = barriers[0]
    near = (barriers, barriers, [house, barrier], [barrier, house], [tree, barrier])
    cuts = (FAR, 38.0, 22.0, 13.0, 5.0)
    kinds = [rng.choice((house, tree)), house]
    for z1, z0, kind in zip(cuts[:-1], cuts[1:], kinds + rng.choice(near), strict=True):
        if kind is house:
            yield house(street, x + out * rng.uniform(0, 0.6), z0, z1)
            continue
        for i in range(4):
            z = z1 + (z0 - z1) * (i + rng.random()) / 4
            yield tree(street, x + out * rng.uniform(1.8, 3.5), z, rng.uniform(4.5, 7.5))
        if kind is not tree:
            yield kind(street, x, z0, z1)


def traffic(street: Street, walk: int) -> Iterator[tuple[float, Thing]]:
    """Vehicles and their distances; one may have stopped at the kerb on side `walk`."""
    rng = street.rng
    kerb, other = rng.sample((BUS, TRUCK), 2)
    if rng.random() < 0.8:
        z = rng.uniform(9.5, 13)
        yield z, kerb.draw(street, walk * rng.uniform(2.4, 2.6), z)
    if rng.random() < 0.5:
        z = rng.uniform(16, 20)
        yield z, other.draw(street, rng.uniform(-2, 2), z, crossing=True)
    elif rng.random() < 0.7:
        z = rng.uniform(11, 16)
        yield z, other.draw(street, -walk * 1.7, z)
    lane = rng.choice((-1.6, 1.6))
    for x, near, far, chance in ((lane, 8, 12, 1), (-lane, 14, 24, 0.4), (-walk * 3, 8, 14, 0.6)):
        if rng.random() < chance:
            z = rng.uniform(near, far)
            yield z, car(street, x, z)
    for figure, side in zip((BICYCLE, MOTORCYCLE), rng.sample((-1, 1), 2), strict=True):
        if rng.random() < 0.7:  # ridden on the road
            x, z = side * rng.uniform(0.9, 2.6), rng.uniform(5.6, 7.4)
            at = street.front(x, z, 1.1, flip=rng.random() < 0.5)
            yield z, figure.draw(rng, at).shadow(street, x - 0.8, x + 0.8, z, z + 0.4)
            yield z, RIDER.draw(rng, at)
        if rng.random() < 0.4:  # parked on the pavement
            x, z = walk * rng.uniform(5.0, 6.2), rng.uniform(6.8, 9.5)
            yield z, figure.draw(rng, street.front(x, z, 1.1, flip=rng.random() < 0.5))


def pavement(street: Street, walk: int) -> Iterator[tuple[float, Thing]]:
    """Posts at both kerbs, people, a dustbin and ducks, with their distances."""
    rng = street.rng
    near = rng.sample(("light", "sign"), 2)
    for i, load in enumerate([*near, *rng.choices(("light", "sign", "sign", ""), k=2)]):
        z = rng.uniform(6.6, 8.6) if i < 2 else rng.uniform(10, 13)
        yield from ((z, thing) for thing in pole(street, (-1) ** i * (ROAD + 0.4), z, load))
    people = [(walk * 5.1, walk * 6.9, 7, 12)] * rng.randint(2, 4)
    people += [(-walk * 3.0, -walk * 4.2, 7, 9)]  # perhaps one on the way to the other side
    for i, (x0, x1, z0, z1) in enumerate(people):
        if i < len(people) - 1 or rng.random() < 0.5:
            z, x = rng.uniform(z0, z1), rng.uniform(x0, x1)
            person = PERSON.draw(rng, street.front(x, z, rng.uniform(0.95, 1.12)))
            yield z, person.shadow(street, x - 0.4, x + 0.4, z, z + 0.4)
    if rng.random() < 0.5:
        z = rng.uniform(8, 12)
        yield z, DUSTBIN.draw(rng, street.front(walk * 6.9, z))
    if rng.random() < 0.35:
        z = rng.uniform(4.6, 5.4)
        yield from ((z, duck) for duck in ducks(street, rng.uniform(-1.2, 1.2), z))


def compose(rng: random.Random) -> tuple[list[Thing], str]:
    """A street as things from back to front, and its mood."""
    street = Street(rng)
    walk, has_rail = rng.choice((-1, 1)), rng.random() < 0.75  # the rail is opposite `walk`
    things = [sky(street)]
    if rng.random() < 0.3:
        x, y, r = rng.uniform(0.8, 1.2), rng.uniform(0.1, 0.16), rng.uniform(0.05, 0.08)
        things.append(BALLOON.draw(rng, lambda u, v: (x + r * u, y + r * v)))
    things += [meadow(street), town_hall(street)]
    for side in (-walk, walk):
        kerb, lawn = ROAD + rng.choice((0.0, 1.2, 1.8)), rng.choice((0.5, 1.5, 2.5))
        if has_rail and side != walk:
            kerb, lawn = ROAD + 4.2, 0.2
            things.append(rail_track(street, side * (ROAD + 2.55)))
        edge = kerb + rng.uniform(2.0, 2.5)
        things.append(sidewalk(street, side * kerb, side * edge))
        things += roadside(street, side * (edge + lawn))
    things.append(road(street))
    if has_rail:
        things.append(TRAIN.draw(street, -walk * (ROAD + 2.55), rng.uniform(11, 17)))
    placed = [*traffic(street, walk), *pavement(street, walk)]
    things += [thing for _, thing in sorted(placed, key=lambda item: -item[0])]
    return [*things, bonnet(rng)], street.mood


# rendering


def pixels(polygon: Polygon, width: int, height: int) -> list[list[int]]:
    """Whole-pixel coordinates of a polygon, clipped just outside the image."""
    points = [(x * width / 2 - 0.5, y * height - 0.5) for x, y in polygon]
    for axis, bound, sign in ((0, -2, 1), (0, width + 1, -1), (1, -2, 1), (1, height + 1, -1)):
        clipped = []
        for a, b in zip(points, points[1:] + points[:1], strict=True):
            inside_a, inside_b = sign * (a[axis] - bound) >= 0, sign * (b[axis] - bound) >= 0
            if inside_a:
                clipped.append(a)
            if inside_a != inside_b:
                t = (bound - a[axis]) / (b[axis] - a[axis])
                clipped.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
        points = clipped
    return [[round(x), round(y)] for x, y in points]


def annotate(objects: list[dict], width: int, height: int) -> Annotation:
    """Label images of polygons, drawn as the official createLabels scripts draw them."""
    label_ids, instance_ids = Image.new("L", (width, height)), Image.new("I", (width, height))
    counts: Counter[str] = Counter()
    for item in objects:
        label, polygon = LABELS[item["label"]], [tuple(point) for point in item["polygon"]]
        instance = label.id * 1000 + counts[label.name] if label.has_instances else label.id
        counts[label.name] += 1
        ImageDraw.Draw(label_ids).polygon(polygon, fill=label.id)
        ImageDraw.Draw(instance_ids).polygon(polygon, fill=instance)
    return Annotation(np.array(label_ids), np.array(instance_ids).astype(np.uint16), objects)


def coarse_objects(objects: list[dict], rng: random.Random, width: int, height: int) -> list[dict]:
    """Coarse annotation: a simplified core of each larger object, surrounded by void."""
    coarse = []
    for item in objects:
        points = np.array(item["polygon"], dtype=float)
        low, high = points.min(axis=0), points.max(axis=0)
        shrink, spared = rng.uniform(0.78, 0.9), rng.random() < 0.15
        extent, centre = high - low, (high + low) / 2
        coarse.append({"label": "unlabeled", "polygon": item["polygon"]})
        if spared or (extent.prod() > 0.004 * width * height and extent.min() > 0.015 * width):
            core = (centre + (points - centre) * shrink)[:: max(1, len(points) // 9)]
            coarse.append({"label": item["label"], "polygon": core.round().astype(int).tolist()})
    return coarse


def render(
    things: Sequence[Thing], mood: str, rng: random.Random, width: int, height: int
) -> np.ndarray:
    """(H, W, 3) uint8: painted at twice the size, then lit, with grain added."""
    sx, sy = SUPERSAMPLING * width / 2, SUPERSAMPLING * height
    canvas = Image.new("RGB", (SUPERSAMPLING * width, SUPERSAMPLING * height))
    draw = ImageDraw.Draw(canvas, "RGBA")
    for polygon, color in (stroke for thing in things for stroke in thing.strokes):
        draw.polygon([(x * sx - 0.5, y * sy - 0.5) for x, y in polygon], fill=color)
    image = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(64))
    grain = noise.standard_normal((height, width, 1), dtype=np.float32)
    coarse = Image.fromarray(noise.standard_normal((9, 17), dtype=np.float32))
    blotch = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    light = np.array(MOODS[mood][2], dtype=np.float32) * rng.uniform(0.9, 1.05)
    image = image * light * (1 + 0.03 * blotch[..., None]) + 4.0 * grain
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_scene(rng: random.Random, width: int, height: int) -> Scene:
    """One street. The same state of `rng` gives the same street at every size."""
    things, mood = compose(rng)
    outlines = [(thing.label, pixels(thing.outline, width, height)) for thing in things]
    objects = [{"label": label, "polygon": p} for label, p in outlines if len(p) > 2]
    image = render(things, mood, rng, width, height)
    coarse = coarse_objects(objects, rng, width, height)
    return Scene(image, annotate(objects, width, height), annotate(coarse, width, height))
