"""Draws toy street scenes: a picture and its Cityscapes annotation, from a seed.

A scene is a list of `Thing`s, back to front. A thing has a label, one outline and
the strokes that paint it inside that outline, so picture and label agree by
construction, and the official tools redraw the label images from the polygons.

The street is measured in metres: x to the right of the camera, y above the
ground, z ahead. The picture is measured in heights of a 2:1 picture: x in 0..2,
y in 0..1 from the top, whatever its resolution.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from lednet.data.labels import CITYSCAPES_LABELS

Point = tuple[float, float]
Polygon = list[Point]
Paint = tuple[int, ...]
Group = tuple[float, list["Thing"]]  # distance, and what stands there, back to front

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


@dataclass
class Annotation:
    """One annotation of a picture.

    label_ids: (H, W) uint8, ids of the Cityscapes table.
    instance_ids: (H, W) uint16, id, or id * 1000 + k for the k-th object of a class
        with instances.
    objects: as in polygons.json, back to front, polygons in whole pixels.
    """

    label_ids: np.ndarray
    instance_ids: np.ndarray
    objects: list[dict]


@dataclass
class Scene:
    """image: (H, W, 3) uint8, with its fine and its coarse annotation."""

    image: np.ndarray
    fine: Annotation
    coarse: Annotation


@dataclass
class Thing:
    """One labelled object: its silhouette, and paint that stays inside it."""

    label: str
    outline: Polygon
    coat: Paint
    strokes: list[tuple[Polygon, Paint]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.paint(self.coat, self.outline)

    def paint(self, color: Paint, *polygons: Polygon) -> None:
        self.strokes += [(polygon, color) for polygon in polygons]


Maker = Callable[..., Thing]


class Plane:
    """A flat surface with its own coordinates (u, v), seen by the camera."""

    def __init__(self, place: Callable[[float, float], Point]):
        self.place = place

    def points(self, *uv: Point) -> Polygon:
        return [self.place(u, v) for u, v in uv]

    def mirrored(self, *half: Point) -> Polygon:
        """A polygon symmetric in u, from its right half listed top to bottom."""
        return self.points(*half, *((-u, v) for u, v in reversed(half)))

    def box(self, u0: float, v0: float, u1: float, v1: float) -> Polygon:
        return self.points((u0, v0), (u1, v0), (u1, v1), (u0, v1))

    def disc(self, u: float, v: float, ru: float, rv: float | None = None) -> Polygon:
        return self.arc(u, v, ru, rv or ru, 0, 345, 23)

    def arc(
        self, u: float, v: float, ru: float, rv: float, start: float, end: float, n: int = 14
    ) -> Polygon:
        """n + 1 points on an ellipse, from `start` to `end` degrees."""
        angles = [math.radians(start + (end - start) * i / n) for i in range(n + 1)]
        return self.points(*((u + ru * math.cos(a), v + rv * math.sin(a)) for a in angles))


PICTURE = Plane(lambda u, v: (u, v))


class Camera:
    """Pinhole camera on a car, looking along the street."""

    def __init__(self, rng: random.Random):
        self.x, self.horizon = 1.0 + rng.uniform(-0.12, 0.12), rng.uniform(0.4, 0.46)
        self.focal, self.height = 1.2, 1.6
        self.floor = Plane(lambda u, v: self(u, 0.0, v))  # metres right, metres ahead

    def __call__(self, x: float, y: float, z: float) -> Point:
        scale = self.focal / z
        return self.x + scale * x, self.horizon + scale * (self.height - y)

    def side(self, x: float) -> Plane:
        """A surface along the street: (u, v) = metres ahead, metres up."""
        return Plane(lambda u, v: self(x, v, u))

    def front(self, x: float, z: float, size: float = 1.0, flip: bool = False) -> Plane:
        """A surface across the street at (x, z): (u, v) = metres right of x, metres up."""
        right = -size if flip else size
        return Plane(lambda u, v: self(x + right * u, size * v, z))

    def block(self, x0: float, x1: float, z0: float, z1: float, y0: float, y1: float) -> Polygon:
        """The eight corners of a box on the street."""
        return [self(x, y, z) for x in (x0, x1) for z in (z0, z1) for y in (y0, y1)]


def shade(color: Paint, factor: float) -> Paint:
    return tuple(min(255, round(value * factor)) for value in color)


def convex_hull(points: Polygon) -> Polygon:
    """Andrew's monotone chain."""

    def chain(ordered: Polygon) -> Polygon:
        hull: Polygon = []
        for c in ordered:
            while len(hull) > 1 and turn(hull[-2], hull[-1], c) <= 0:
                hull.pop()
            hull.append(c)
        return hull[:-1]

    def turn(a: Point, b: Point, c: Point) -> float:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    ordered = sorted(points)
    return chain(ordered) + chain(ordered[::-1])


# sky and ground


def sky(camera: Camera, rng: random.Random, mood: str) -> Thing:
    top, bottom, _ = MOODS[mood]
    thing = Thing("sky", PICTURE.box(-0.1, -0.1, 2.1, camera.horizon), bottom)
    for i in range(32):
        color = tuple(round(a + (b - a) * i / 31) for a, b in zip(top, bottom, strict=True))
        y = camera.horizon * i / 32
        thing.paint(color, PICTURE.box(-0.1, y, 2.1, camera.horizon))
    if mood != "overcast":  # a sun with a smile
        x, y, brown = rng.uniform(0.5, 1.5), rng.uniform(0.07, 0.16), (120, 84, 30)
        thing.paint((255, 244, 200, 120), PICTURE.disc(x, y, 0.075))
        thing.paint((255, 226, 110), PICTURE.disc(x, y, 0.055))
        thing.paint(brown, PICTURE.disc(x - 0.02, y - 0.01, 0.007))
        thing.paint(brown, PICTURE.disc(x + 0.02, y - 0.01, 0.007))
        thing.paint(brown, PICTURE.arc(x, y + 0.008, 0.028, 0.026, 10, 170))
    for _ in range(rng.randint(2, 5)):
        x, y = rng.uniform(0.2, 1.8), rng.uniform(0.02, 0.26)
        puffs = [(x + 0.05 * k, y - 0.015 * (k in (1, 2)), 0.05, 0.026) for k in range(4)]
        thing.paint((250, 246, 242), *(PICTURE.disc(*puff) for puff in puffs))
    return thing


def meadow(camera: Camera, rng: random.Random) -> Thing:
    """The ground under everything; it shows as verges and lawns."""
    thing = Thing("terrain", PICTURE.box(-0.1, camera.horizon, 2.1, 1.1), (170, 206, 96))
    for _ in range(260):
        z, x = 1.9 / rng.uniform(0.04, 0.6), rng.uniform(4.4, 30) * rng.choice((-1, 1))
        color = rng.choice(((140, 182, 70), (196, 224, 122), (196, 224, 122), (250, 236, 120)))
        thing.paint(color, camera.front(x, z).points((-0.12, 0), (0, 0.25), (0.12, 0)))
    return thing


def road(camera: Camera, rng: random.Random) -> Thing:
    grey, floor = rng.randint(88, 112), camera.floor
    thing = Thing("road", floor.box(-ROAD, 1.5, ROAD, FAR), (grey, grey, grey + 5))
    thing.paint((232, 232, 224), *(floor.box(-0.1, z, 0.1, z + 2) for z in range(2, 44, 4)))
    for x in (-ROAD, ROAD - 0.14):
        thing.paint((214, 212, 206), floor.box(x, 1.5, x + 0.14, FAR))
    if rng.random() < 0.5:
        z = rng.uniform(5.2, 8.0)
        stripes = (floor.box(x, z, x + 0.55, z + 1.8) for x in np.arange(-3.8, 3.4, 1.0).tolist())
        thing.paint((236, 236, 230), *stripes)
    for _ in range(3):  # manholes
        thing.paint((72, 72, 74), floor.disc(rng.uniform(-3, 3), rng.uniform(3, 14), 0.35))
    return thing


def sidewalk(camera: Camera, rng: random.Random, x0: float, x1: float) -> Thing:
    """Paving slabs from the kerb at x0 to x1."""
    color, floor = rng.choice(((208, 190, 164), (214, 184, 168), (200, 186, 172))), camera.floor
    thing, middle = Thing("sidewalk", floor.box(x0, 1.5, x1, FAR), color), (x0 + x1) / 2
    thing.paint(shade(color, 0.85), *(floor.box(x0, z, x1, z + 0.05) for z in range(2, 40)))
    thing.paint(shade(color, 0.85), floor.box(middle, 1.5, middle + 0.06, FAR))
    thing.paint(shade(color, 0.72), floor.box(x0, 1.5, x0 + math.copysign(0.2, x0), FAR))
    return thing


def rail_track(camera: Camera, x: float) -> Thing:
    floor = camera.floor
    thing = Thing("rail track", floor.box(x - 1.65, 1.5, x + 1.65, FAR), (128, 112, 100))
    thing.paint((84, 64, 50), *(floor.box(x - 1.3, z, x + 1.3, z + 0.4) for z in range(2, 60)))
    thing.paint((206, 206, 212), *(floor.box(x + u, 1.5, x + u + 0.16, FAR) for u in (-0.9, 0.7)))
    return thing


# beside the street


def house(camera: Camera, rng: random.Random, x: float, z0: float, z1: float, mood: str) -> Thing:
    """A house whose front stands at `x` (either sign), from z0 to z1."""
    out, height, rise = math.copysign(1.0, x), rng.uniform(5.2, 8.2), rng.uniform(2.0, 3.2)
    color, ridge, back = rng.choice(HOUSES), x + 3.0 * out, x + 6.5 * out
    corners = [(x, 0, z1), (x, height, z1), (ridge, height + rise, z1), (ridge, height + rise, z0)]
    corners += [(back, height, z0), (back, 0, z0), (x, 0, z0)]
    thing = Thing("building", [camera(*corner) for corner in corners], rng.choice(ROOFS))
    side, gable = camera.side(x), camera.front(x, z0, flip=x < 0)
    thing.paint(color, side.box(z0, 0, z1, height))
    shape = ((0, 0), (0, height), (3.0, height + rise), (6.5, height), (6.5, 0))
    thing.paint(shade(color, 0.86), gable.points(*shape))
    thing.paint(shade(color, 0.7), side.box(z0, 0, z1, 0.5))
    pane = (255, 220, 120) if mood == "dusk" else (104, 140, 168)
    columns, storeys = max(2, round((z1 - z0) / 2.6)), range(int(height // 2.6))
    pitch, door = (z1 - z0) / columns, rng.randrange(columns)
    for column in range(columns):
        u0, u1 = z0 + (column + 0.25) * pitch, z0 + (column + 0.75) * pitch
        if column == door:
            thing.paint(rng.choice(CARS), side.box(u0, 0, u1, 2.3))
        for v in (0.9 + 2.6 * storey for storey in storeys if storey or column != door):
            thing.paint(CREAM, side.box(u0 - 0.12, v - 0.12, u1 + 0.12, v + 1.55))
            thing.paint(pane, side.box(u0, v, u1, v + 1.42))
            flowers = rng.choice(((206, 60, 80), (90, 140, 60), (236, 160, 60)))
            thing.paint(flowers, side.box(u0 - 0.12, v - 0.32, u1 + 0.12, v - 0.1))
    for v in (0.9 + 2.6 * storey for storey in storeys):
        thing.paint(pane, gable.box(1.2, v, 2.5, v + 1.5), gable.box(3.8, v, 5.1, v + 1.5))
    return thing


def town_hall(camera: Camera, rng: random.Random) -> Thing:
    """The building with a clock tower that closes the street."""
    at, top, roof = camera.front(rng.uniform(-4, 4), FAR), rng.uniform(13, 19), rng.choice(ROOFS)
    outline = at.mirrored((0, top + 5), (2.2, top), (2.2, 9), (9, 9), (9, 0))
    thing = Thing("building", outline, rng.choice(HOUSES))
    thing.paint(roof, at.points((0, top + 5), (2.2, top), (-2.2, top)), at.box(-9, 7.6, 9, 9))
    thing.paint(CREAM, at.disc(0, top - 2.2, 1.6))
    thing.paint((88, 100, 120), *(at.box(u + 0.5, 2, u + 1.5, 5.5) for u in range(-8, 8, 2)))
    return thing


def wall(camera: Camera, rng: random.Random, x: float, z0: float, z1: float) -> Thing:
    height, side, course = rng.uniform(2.3, 2.8), camera.side(x), 0.3
    thing = Thing("wall", side.box(z0, 0, z1, height), (206, 160, 140))
    for row in range(int(height / course)):
        z, v = z0 + 0.35 * (row % 2), row * course
        while z < z1 - 0.65:
            brick = rng.choice(((150, 60, 44), (190, 94, 70), (178, 84, 60)))
            thing.paint(brick, side.box(z, v + 0.05, z + 0.65, v + course))
            z += 0.7
    thing.paint((126, 60, 48), side.box(z0, height - 0.18, z1, height))
    return thing


def fence(camera: Camera, rng: random.Random, x: float, z0: float, z1: float) -> Thing:
    height, side, count = rng.uniform(1.7, 2.1), camera.side(x), int((z1 - z0) / 0.42)
    slat = rng.choice(((246, 246, 240), (236, 240, 232), (120, 196, 160)))
    thing = Thing("fence", side.box(z0, 0, z1, height), (52, 104, 84))
    starts = (z0 + 0.08 + 0.42 * i for i in range(count))
    thing.paint(slat, *(side.box(z, 0.05, z + 0.26, height) for z in starts))
    for v in (0.35, height - 0.5):
        thing.paint(shade(slat, 0.88), side.box(z0, v, z1, v + 0.14))
    return thing


def tree(camera: Camera, rng: random.Random, x: float, z: float, size: float) -> Thing:
    """A round crown on a trunk, `size` metres high."""
    at, radius = camera.front(x, z, size), rng.uniform(0.24, 0.3)
    green, crown = rng.choice(((40, 98, 46), (52, 108, 40), (34, 88, 58))), []
    for angle in (math.radians(-85 + 10 * i) for i in range(36)):
        r = radius * (1 + 0.1 * math.sin(7 * angle + x))
        crown.append((r * math.cos(angle), 0.66 + 1.2 * r * math.sin(angle)))
    thing = Thing("vegetation", at.points((0.045, 0), *crown, (-0.045, 0)), green)
    thing.paint((96, 66, 44), at.points((0.045, 0), (0.03, 0.4), (-0.03, 0.4), (-0.045, 0)))
    for _ in range(40):
        angle, r = rng.uniform(0, 6.3), radius * rng.uniform(0, 0.75)
        leaf = at.arc(
            r * math.cos(angle), 0.66 + 1.2 * r * math.sin(angle), 0.035, 0.035, 0, 300, 5
        )
        thing.paint(shade(green, rng.choice((0.72, 0.85, 1.2, 1.4))), leaf)
    return thing


def pole(camera: Camera, rng: random.Random, x: float, z: float, load: str) -> list[Thing]:
    """A post at the kerb with its `load`: "light", "sign" or "" for nothing."""
    height = 1.6 + rng.uniform(0.27, 0.32) * z  # the top is in the picture
    at = camera.front(x, z)
    post = Thing("pole", at.box(-0.17, 0, 0.17, height), (136, 142, 150))
    post.paint((94, 98, 106), at.box(-0.17, 0, -0.05, height))
    post.paint((70, 74, 82), at.box(-0.17, 0, 0.17, 0.7))
    if load == "light":
        return [post, traffic_light(at, rng, height)]
    boards = (height - 0.5, height - 1.95)[: rng.randint(1, 2) if load else 0]
    return [post, *(traffic_sign(at, rng, v) for v in boards)]


def traffic_light(at: Plane, rng: random.Random, top: float) -> Thing:
    thing = Thing("traffic light", at.box(-0.48, top - 2.3, 0.48, top + 0.1), (246, 196, 40))
    thing.paint((34, 36, 40), at.box(-0.38, top - 2.2, 0.38, top))
    lit = rng.randrange(3)
    for i, color in enumerate(((255, 50, 40), (255, 190, 30), (50, 240, 110))):
        thing.paint(color if i == lit else shade(color, 0.4), at.disc(0, top - 0.4 - 0.7 * i, 0.29))
    return thing


def traffic_sign(at: Plane, rng: random.Random, v: float) -> Thing:
    """No entry, danger, or straight on, around height `v`."""
    kind = rng.randrange(3)
    if kind == 0:
        thing = Thing("traffic sign", at.disc(0, v, 0.68), RED)
        thing.paint(WHITE, at.box(-0.44, v - 0.14, 0.44, v + 0.14))
    elif kind == 1:
        corners = at.points((0, v + 0.72), (0.8, v - 0.62), (-0.8, v - 0.62))
        thing = Thing("traffic sign", corners, RED)
        thing.paint(WHITE, at.points((0, v + 0.34), (0.48, v - 0.44), (-0.48, v - 0.44)))
        thing.paint(TYRE, at.disc(0, v - 0.2, 0.14))
    else:
        thing = Thing("traffic sign", at.disc(0, v, 0.68), WHITE)
        thing.paint((20, 84, 200), at.disc(0, v, 0.6))
        arrow = at.mirrored((0, v + 0.45), (0.34, v), (0.12, v), (0.12, v - 0.42))
        thing.paint(WHITE, arrow)
    return thing


# vehicles


def shadow(thing: Thing, camera: Camera, x0: float, x1: float, z0: float, z1: float) -> None:
    """Darken the ground under a thing; the ground keeps its own label there."""
    thing.strokes.insert(0, (camera.floor.box(x0 - 0.2, z0 - 0.25, x1 + 0.2, z1), (0, 0, 0, 90)))


def car(camera: Camera, rng: random.Random, x: float, z: float) -> Thing:
    """Seen from behind on the right of the road, from the front on the left."""
    color, x0, x1, end = rng.choice(CARS), x - 0.95, x + 0.95, camera.front(x, z)
    corners = camera.block(x0, x1, z, z + 4, 0.0, 0.95)
    corners += camera.block(x0 + 0.22, x1 - 0.22, z + 0.5, z + 3, 0.9, 1.6)
    thing = Thing("car", convex_hull(corners), color)
    if abs(x) > 1.2:
        inner = x0 if x > 0 else x1
        side, cabin = camera.side(inner), camera.side(inner + math.copysign(0.16, x))
        thing.paint(TYRE, side.box(z, 0.0, z + 4, 0.3))
        thing.paint(TYRE, *(side.disc(z + wheel, 0.34, 0.34) for wheel in (0.8, 3.2)))
        thing.paint(CHROME, *(side.disc(z + wheel, 0.34, 0.16) for wheel in (0.8, 3.2)))
        window = ((z + 0.6, 1.0), (z + 0.8, 1.5), (z + 2.6, 1.5), (z + 3.0, 1.0))
        thing.paint(GLASS, cabin.points(*window))
    thing.paint(shade(color, 0.9), end.box(-0.95, 0.22, 0.95, 0.95))
    thing.paint(GLASS, camera.front(x, z + 0.4).mirrored((0.58, 1.5), (0.68, 1.0)))
    thing.paint(TYRE, end.box(-0.95, 0, 0.95, 0.22), end.box(-0.88, 0, -0.56, 0.3))
    thing.paint(TYRE, end.box(0.56, 0, 0.88, 0.3))
    lamp = LAMP if x < 0 else (236, 30, 30)
    thing.paint(lamp, end.disc(-0.72, 0.7, 0.17, 0.13), end.disc(0.72, 0.7, 0.17, 0.13))
    thing.paint(CREAM, end.box(-0.3, 0.36, 0.3, 0.54))
    shadow(thing, camera, x0, x1, z, z + 4)
    return thing


def long_vehicle(
    camera: Camera,
    label: str,
    color: Paint,
    size: tuple[float, float, float],
    x: float,
    z: float,
    crossing: bool,
    paint_end: Callable[[Thing, Plane], None],
    paint_flank: Callable[[Thing, Plane], None],
) -> Thing:
    """A box on wheels, its end towards the camera or, when `crossing`, its flank.

    size: width, length and height in metres. The painters get (thing, plane), with
    u and v in 0..1 on the plane; they cover it all, as the nearer hides the other.
    """
    width, length, height = size
    across, along = (length, width) if crossing else (width, length)
    x0, x1 = x - across / 2, x + across / 2
    inner = x0 if x > 0 else x1
    thing = Thing(label, convex_hull(camera.block(x0, x1, z, z + along, 0.0, height)), color)
    near = Plane(lambda u, v: camera(x0 + across * u, height * v, z))
    side = Plane(lambda u, v: camera(inner, height * v, z + along * u))
    first, second = (paint_end, paint_flank) if crossing else (paint_flank, paint_end)
    first(thing, side)
    second(thing, near)
    shadow(thing, camera, x0, x1, z, z + along)
    return thing


def undercarriage(thing: Thing, at: Plane, wheels: Sequence[float], length: float) -> None:
    thing.paint((40, 40, 46), at.box(0, 0, 1, 0.1))
    thing.paint(TYRE, *(at.disc(u, 0.14, 0.46 / length, 0.14) for u in wheels))
    thing.paint(CHROME, *(at.disc(u, 0.14, 0.2 / length, 0.06) for u in wheels))


def bus(camera: Camera, rng: random.Random, x: float, z: float, crossing: bool = False) -> Thing:
    color = rng.choice(((250, 196, 24), (250, 196, 24), (216, 36, 40)))

    def end(thing: Thing, at: Plane) -> None:
        thing.paint(color, at.box(0, 0, 1, 1))
        thing.paint(TYRE, at.box(0.08, 0.42, 0.92, 0.8), at.box(0.2, 0.85, 0.8, 0.96))
        thing.paint(PANE, at.box(0.12, 0.45, 0.88, 0.77))
        thing.paint((255, 170, 40), *(at.disc(0.3 + 0.1 * i, 0.905, 0.03) for i in range(5)))
        thing.paint(WHITE, at.box(0, 0.28, 1, 0.36))
        undercarriage(thing, at, (), 1)
        thing.paint(LAMP, at.disc(0.1, 0.2, 0.07, 0.05), at.disc(0.9, 0.2, 0.07, 0.05))

    def flank(thing: Thing, at: Plane) -> None:
        thing.paint(shade(color, 0.92), at.box(0, 0, 1, 1))
        thing.paint(TYRE, at.box(0.02, 0.46, 0.98, 0.82))
        for i, u in enumerate(0.04 + 0.134 * i for i in range(7)):
            thing.paint(PANE, at.box(u, 0.49, u + 0.11, 0.8))
            thing.paint(SKINS[i % 4], at.disc(u + 0.055, 0.57, 0.025, 0.07))  # passengers
        thing.paint(WHITE, at.box(0, 0.3, 1, 0.38))
        undercarriage(thing, at, (0.18, 0.8), 9.5)

    return long_vehicle(camera, "bus", color, (2.6, 9.5, 3.2), x, z, crossing, end, flank)


def truck(camera: Camera, rng: random.Random, x: float, z: float, crossing: bool = False) -> Thing:
    color = rng.choice(((238, 120, 36), (238, 120, 36), (92, 66, 160)))

    def cargo(thing: Thing, at: Plane, u1: float, metre: float) -> None:
        """A cargo box from u = 0 to u1 with a large doughnut on it."""
        thing.paint((44, 44, 50), at.box(0, 0, 1, 1))
        thing.paint(color, at.box(0, 0.22, u1, 1))
        thing.paint(shade(color, 0.7), at.box(0, 0.94, u1, 1), at.box(0, 0.22, u1, 0.28))
        for color_, r in ((CREAM, 0.8), ((140, 84, 40), 0.6), (CREAM, 0.2)):
            thing.paint(color_, at.disc(u1 / 2, 0.61, r * metre, r * 0.29))

    def end(thing: Thing, at: Plane) -> None:
        cargo(thing, at, 1.0, 1 / 2.6)
        thing.paint(TYRE, at.box(0.04, 0, 0.22, 0.16), at.box(0.78, 0, 0.96, 0.16))
        thing.paint(RED, at.box(0.04, 0.16, 0.22, 0.21), at.box(0.78, 0.16, 0.96, 0.21))

    def flank(thing: Thing, at: Plane) -> None:
        cargo(thing, at, 0.74, 1 / 7.5)
        thing.paint((226, 226, 222), at.box(0.76, 0.1, 1, 1))
        thing.paint(GLASS, at.box(0.83, 0.5, 0.97, 0.78))
        undercarriage(thing, at, (0.16, 0.86), 7.5)

    return long_vehicle(camera, "truck", color, (2.6, 7.5, 3.6), x, z, crossing, end, flank)


def train(camera: Camera, rng: random.Random, x: float, z: float) -> Thing:
    body, blue = (242, 245, 250), rng.choice(((36, 84, 190), (24, 120, 190)))

    def end(thing: Thing, at: Plane) -> None:
        thing.paint(body, at.box(0, 0, 1, 1))
        thing.paint(GLASS, at.box(0.08, 0.52, 0.92, 0.86))
        thing.paint(SKINS[0], at.disc(0.5, 0.62, 0.09, 0.08))  # the driver
        thing.paint(blue, at.box(0.38, 0.67, 0.62, 0.74))  # and the driver's cap
        thing.paint(blue, at.box(0, 0.24, 1, 0.46))
        undercarriage(thing, at, (), 1)
        thing.paint(LAMP, at.disc(0.16, 0.35, 0.09, 0.06), at.disc(0.84, 0.35, 0.09, 0.06))

    def flank(thing: Thing, at: Plane) -> None:
        thing.paint(shade(body, 0.92), at.box(0, 0, 1, 1))
        starts = (0.01 + i / 16 for i in range(16))
        thing.paint(GLASS, *(at.box(u, 0.55, u + 0.045, 0.82) for u in starts))
        thing.paint(blue, at.box(0, 0.26, 1, 0.46))
        undercarriage(thing, at, (), 1)

    return long_vehicle(camera, "train", body, (2.7, 32.0, 3.7), x, z, False, end, flank)


def bicycle(at: Plane, rng: random.Random) -> Thing:
    color = rng.choice(((20, 170, 180), (230, 60, 120), (240, 150, 30)))
    top = ((-0.42, 1.02), (-0.05, 1.02), (0.0, 0.82), (0.3, 0.86), (0.3, 1.16), (0.6, 1.16))
    outline = at.arc(-0.56, 0.38, 0.38, 0.38, 290, 70) + at.points(*top, (0.62, 0.8))
    outline += at.arc(0.56, 0.38, 0.38, 0.38, 85, -110) + at.points((0, 0.2))
    thing = Thing("bicycle", outline, (0, 0, 0, 0))  # the street shows through the frame
    for u in (-0.56, 0.56):
        thing.paint(TYRE, at.disc(u, 0.38, 0.38))
        thing.paint((206, 210, 216), at.disc(u, 0.38, 0.28))
    thing.paint(color, at.points((-0.6, 0.36), (-0.02, 0.28), (-0.22, 0.92)))
    thing.paint(color, at.points((-0.26, 0.86), (-0.02, 0.28), (0.44, 0.84)))
    thing.paint(color, at.points((0.36, 1.1), (0.48, 1.1), (0.6, 0.38), (0.5, 0.38)))
    thing.paint((60, 40, 30), at.box(-0.4, 0.9, -0.08, 1.0), at.box(0.32, 1.04, 0.58, 1.14))
    return thing


def motorcycle(at: Plane, rng: random.Random) -> Thing:
    top = ((-1.02, 0.92), (-0.3, 0.94), (-0.05, 1.16), (0.3, 1.14), (0.34, 1.38), (0.6, 1.36))
    outline = at.arc(-0.68, 0.4, 0.4, 0.4, 300, 90) + at.points(*top, (0.72, 0.84))
    outline += at.arc(0.74, 0.4, 0.4, 0.4, 80, -110) + at.points((0, 0.12))
    thing = Thing("motorcycle", outline, (58, 58, 66))
    thing.paint(TYRE, at.disc(-0.68, 0.4, 0.4), at.disc(0.74, 0.4, 0.4))
    thing.paint(CHROME, at.disc(-0.68, 0.4, 0.2), at.disc(0.74, 0.4, 0.2))
    body = ((-1.0, 0.9), (-0.3, 0.9), (-0.05, 1.12), (0.3, 1.1), (0.4, 1.3), (0.58, 1.3))
    color = rng.choice(((190, 20, 30), (24, 26, 32), (20, 120, 60)))
    thing.paint(color, at.points(*body, (0.7, 0.86), (0.34, 0.52), (-0.3, 0.5)))
    thing.paint(TYRE, at.points((-0.95, 0.9), (-0.3, 0.9), (-0.3, 0.78), (-0.85, 0.78)))
    thing.paint(CHROME, at.box(-0.5, 0.18, 0.1, 0.3))
    thing.paint(LAMP, at.disc(0.55, 1.02, 0.1))
    return thing


# people


def rider(at: Plane, rng: random.Random) -> Thing:
    """Someone in a bright vest, leaning forward over a bicycle or a motorcycle."""
    head = ((-0.06, 1.6), (-0.1, 1.86), (0.06, 2.02), (0.26, 2.0), (0.36, 1.82), (0.3, 1.62))
    arm = ((0.56, 1.28), (0.5, 1.08), (0.2, 1.2), (0.18, 1.0))
    leg = ((0.3, 0.74), (0.2, 0.34), (0.3, 0.2), (-0.06, 0.2), (0.0, 0.66), (-0.36, 0.86))
    back = ((-0.44, 1.1), (-0.3, 1.5))
    thing = Thing("rider", at.points(*head, *arm, *leg, *back), rng.choice(VESTS))
    thing.paint(
        rng.choice(((40, 48, 80), (60, 50, 46))), at.points((0.18, 1.0), *leg, (-0.42, 1.04))
    )
    thing.paint((240, 244, 250), at.box(-0.34, 1.22, 0.2, 1.31))
    thing.paint(rng.choice(SKINS), at.disc(0.13, 1.79, 0.19, 0.2))
    helmet = rng.choice(((236, 240, 250), (250, 60, 50), (40, 130, 240)))
    thing.paint(helmet, at.arc(0.12, 1.8, 0.2, 0.2, 0, 180))
    return thing


def person(camera: Camera, rng: random.Random, x: float, z: float) -> Thing:
    at = camera.front(x, z, rng.uniform(0.95, 1.12))
    head = ((0.0, 1.92), (0.15, 1.88), (0.23, 1.7), (0.15, 1.52))
    body = ((0.34, 1.42), (0.46, 0.84), (0.4, 0.62), (0.28, 0.62), (0.28, 0.0), (0.04, 0.0))
    thing = Thing("person", at.mirrored(*head, *body), rng.choice(COATS))
    thing.paint((44, 46, 66), at.box(-0.28, 0, -0.04, 0.64), at.box(0.04, 0, 0.28, 0.64))
    thing.paint(TYRE, at.box(-0.28, 0, -0.04, 0.12), at.box(0.04, 0, 0.28, 0.12))
    thing.paint(rng.choice(SKINS), at.disc(0, 1.7, 0.2, 0.19))
    thing.paint(rng.choice(HATS), at.arc(0, 1.74, 0.2, 0.16, 0, 180))
    thing.paint(rng.choice(((240, 200, 60), (230, 240, 244))), at.box(-0.24, 1.38, 0.24, 1.47))
    thing.paint(TYRE, at.disc(-0.08, 1.68, 0.03), at.disc(0.08, 1.68, 0.03))
    thing.paint((240, 220, 160), *(at.disc(0, v, 0.04) for v in (1.2, 1.0, 0.8)))
    shadow(thing, camera, x - 0.4, x + 0.4, z, z + 0.4)
    return thing


# void, with a wink


def bonnet(rng: random.Random) -> Thing:
    color, top = rng.choice(((36, 44, 60), (120, 26, 34), (190, 194, 200))), rng.uniform(0.92, 0.95)
    edge = [(0.05 * i, top + 0.045 * (0.05 * i - 1) ** 2) for i in range(-1, 42)]
    thing = Thing("ego vehicle", [(-0.05, 1.1), *edge, (2.05, 1.1)], color)
    thing.paint(shade(color, 1.2), [(-0.05, 1.1), *((x, y + 0.012) for x, y in edge), (2.05, 1.1)])
    thing.paint(CREAM, PICTURE.disc(1.0, top + 0.03, 0.022))
    thing.paint(RED, PICTURE.disc(1.0, top + 0.03, 0.012))
    return thing


def dustbin(camera: Camera, rng: random.Random, x: float, z: float) -> Thing:
    at, color = camera.front(x, z), rng.choice(((48, 84, 70), (90, 92, 98)))
    outline = at.mirrored((0, 1.15), (0.36, 1.05), (0.4, 0.94), (0.32, 0.0))
    thing = Thing("static", outline, color)
    thing.paint(shade(color, 0.6), at.box(-0.38, 0.86, 0.38, 0.94))
    return thing


def ducks(camera: Camera, rng: random.Random, x: float, z: float) -> Iterator[Thing]:
    """A duck leads her children over the road; animals are `dynamic`."""
    flip = rng.random() < 0.5
    for i in range(4):
        behind = 0.25 + 0.55 * i if i else 0.0
        at = camera.front(x + (behind if flip else -behind), z, 0.55 if i else 1.0, flip)
        back = ((-0.5, 0.5), (-0.3, 0.42), (0.1, 0.44), (0.14, 0.66), (0.3, 0.74), (0.42, 0.66))
        belly = ((0.42, 0.52), (0.36, 0.2), (0.1, 0.06), (-0.2, 0.08))
        color = (250, 214, 70) if i else CREAM
        thing = Thing("dynamic", at.points(*back, (0.56, 0.58), *belly), color)
        thing.paint((240, 130, 30), at.points((0.41, 0.64), (0.56, 0.58), (0.41, 0.53)))
        thing.paint(TYRE, at.disc(0.3, 0.64, 0.035))
        yield thing


def balloon(rng: random.Random) -> Thing:
    x, y, r = rng.uniform(0.8, 1.2), rng.uniform(0.1, 0.16), rng.uniform(0.05, 0.08)
    at = Plane(lambda u, v: (x + r * u, y + r * v))
    half = ((0.0, -1.0), (0.6, -0.8), (1.0, -0.1), (0.7, 0.6), (0.25, 1.15), (0.25, 1.6))
    thing = Thing("dynamic", at.mirrored(*half), (230, 50, 60))
    thing.paint((250, 230, 90), at.mirrored((0, -1), (0.3, -0.6), (0.4, 0.1), (0.1, 1.0)))
    thing.paint((120, 80, 40), at.box(-0.25, 1.15, 0.25, 1.6))
    return thing


# composition


def roadside(camera: Camera, rng: random.Random, x: float, mood: str) -> Iterator[Thing]:
    """What stands at `x` along the street, from its far end to the camera."""
    out = math.copysign(1.0, x)
    barriers: list[Maker] = rng.sample((wall, fence), 2)
    near: tuple[list[Maker], ...]
    near = (barriers, barriers, [house, barriers[0]], [barriers[0], house], [tree, barriers[0]])
    cuts = (FAR, 38.0, 22.0, 13.0, 5.0)
    kinds: list[Maker] = [rng.choice((house, tree)), house]
    for z1, z0, kind in zip(cuts[:-1], cuts[1:], kinds + rng.choice(near), strict=True):
        if kind is house:
            yield house(camera, rng, x + out * rng.uniform(0, 0.6), z0, z1, mood)
            continue
        for i in range(4):
            z = z1 + (z0 - z1) * (i + rng.random()) / 4
            yield tree(camera, rng, x + out * rng.uniform(1.8, 3.5), z, rng.uniform(4.5, 7.5))
        if kind is not tree:
            yield kind(camera, rng, x, z0, z1)


def traffic(camera: Camera, rng: random.Random, walk: int) -> Iterator[Group]:
    """Large vehicles and cars; one may have stopped at the kerb on side `walk`."""
    kerb, other = rng.sample((bus, truck), 2)
    if rng.random() < 0.8:
        z = rng.uniform(9.5, 13)
        yield z, [kerb(camera, rng, walk * rng.uniform(2.4, 2.6), z)]
    if rng.random() < 0.5:
        z = rng.uniform(16, 20)
        yield z, [other(camera, rng, rng.uniform(-2, 2), z, crossing=True)]
    elif rng.random() < 0.7:
        z = rng.uniform(11, 16)
        yield z, [other(camera, rng, -walk * 1.7, z)]
    lane = rng.choice((-1.6, 1.6))
    for x, near, far, chance in ((lane, 8, 12, 1), (-lane, 14, 24, 0.4), (-walk * 3, 8, 14, 0.6)):
        if rng.random() < chance:
            z = rng.uniform(near, far)
            yield z, [car(camera, rng, x, z)]


def riders(camera: Camera, rng: random.Random, walk: int) -> Iterator[Group]:
    """Two-wheelers, ridden on the road and parked on the pavement."""
    sides = rng.sample((-1, 1), 2)
    for make, side in ((bicycle, sides[0]), (motorcycle, sides[1])):
        if rng.random() < 0.7:
            x, z = side * rng.uniform(0.9, 2.6), rng.uniform(5.6, 7.4)
            at = camera.front(x, z, 1.1, flip=rng.random() < 0.5)
            vehicle = make(at, rng)
            shadow(vehicle, camera, x - 0.8, x + 0.8, z, z + 0.4)
            yield z, [vehicle, rider(at, rng)]
        if rng.random() < 0.4:
            x, z = walk * rng.uniform(5.0, 6.2), rng.uniform(6.8, 9.5)
            yield z, [make(camera.front(x, z, 1.1, flip=rng.random() < 0.5), rng)]


def pavement(camera: Camera, rng: random.Random, walk: int) -> Iterator[Group]:
    """Posts at both kerbs; people, a dustbin and ducks."""
    near = rng.sample(("light", "sign"), 2)
    for i, load in enumerate([*near, *rng.choices(("light", "sign", "sign", ""), k=2)]):
        z = rng.uniform(6.6, 8.6) if i < 2 else rng.uniform(10, 13)
        yield z, pole(camera, rng, (-1) ** i * (ROAD + 0.4), z, load)
    for _ in range(rng.randint(2, 4)):
        z = rng.uniform(7, 12)
        yield z, [person(camera, rng, walk * rng.uniform(5.1, 6.9), z)]
    if rng.random() < 0.5:  # on the way to the other side
        z = rng.uniform(7, 9)
        yield z, [person(camera, rng, -walk * rng.uniform(3.0, 4.2), z)]
    if rng.random() < 0.5:
        z = rng.uniform(8, 12)
        yield z, [dustbin(camera, rng, walk * 6.9, z)]
    if rng.random() < 0.35:
        z = rng.uniform(4.6, 5.4)
        yield z, list(ducks(camera, rng, rng.uniform(-1.2, 1.2), z))


def compose(rng: random.Random) -> tuple[list[Thing], str]:
    """A street as things from back to front, and its mood."""
    camera, mood = Camera(rng), rng.choice(("noon", "noon", "overcast", "dusk"))
    walk, has_rail = rng.choice((-1, 1)), rng.random() < 0.75  # the rail is opposite `walk`
    things = [sky(camera, rng, mood)]
    if rng.random() < 0.3:
        things.append(balloon(rng))
    things += [meadow(camera, rng), town_hall(camera, rng)]
    for side in (-walk, walk):
        kerb, lawn = ROAD + rng.choice((0.0, 1.2, 1.8)), rng.choice((0.5, 1.5, 2.5))
        if has_rail and side != walk:
            kerb, lawn = ROAD + 4.2, 0.2
            things.append(rail_track(camera, side * (ROAD + 2.55)))
        edge = kerb + rng.uniform(2.0, 2.5)
        things.append(sidewalk(camera, rng, side * kerb, side * edge))
        things += roadside(camera, rng, side * (edge + lawn), mood)
    things.append(road(camera, rng))
    if has_rail:
        things.append(train(camera, rng, -walk * (ROAD + 2.55), rng.uniform(11, 17)))
    groups = [*traffic(camera, rng, walk), *riders(camera, rng, walk), *pavement(camera, rng, walk)]
    for _, group in sorted(groups, key=lambda item: -item[0]):
        things += group
    return [*things, bonnet(rng)], mood


# rendering


def pixels(polygon: Polygon, width: int, height: int) -> list[list[int]]:
    """Whole-pixel coordinates of a polygon, clipped just outside the picture."""
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
    draw_label, draw_instance = ImageDraw.Draw(label_ids), ImageDraw.Draw(instance_ids)
    counts: dict[str, int] = {}
    for item in objects:
        label = LABELS[item["label"]]
        value = label.id
        if label.has_instances:
            counts[label.name] = counts.get(label.name, -1) + 1
            value = label.id * 1000 + counts[label.name]
        polygon = [tuple(point) for point in item["polygon"]]
        draw_label.polygon(polygon, fill=label.id)
        draw_instance.polygon(polygon, fill=value)
    return Annotation(np.array(label_ids), np.array(instance_ids).astype(np.uint16), objects)


def coarse_objects(objects: list[dict], rng: random.Random, width: int, height: int) -> list[dict]:
    """A hurried annotator's version: a simplified core of each larger object in a void rim."""
    hurried = []
    for item in objects:
        points = np.array(item["polygon"], dtype=float)
        low, high = points.min(axis=0), points.max(axis=0)
        shrink, spared = rng.uniform(0.78, 0.9), rng.random() < 0.15
        extent, centre = high - low, (high + low) / 2
        hurried.append({"label": "unlabeled", "polygon": item["polygon"]})
        if spared or (extent.prod() > 0.004 * width * height and extent.min() > 0.015 * width):
            core = (centre + (points - centre) * shrink)[:: max(1, len(points) // 9)]
            hurried.append({"label": item["label"], "polygon": core.round().astype(int).tolist()})
    return hurried


def render(
    things: Sequence[Thing], mood: str, rng: random.Random, width: int, height: int
) -> np.ndarray:
    """(H, W, 3) uint8: paints at twice the size, then lights it and adds grain."""
    sx, sy = SUPERSAMPLING * width / 2, SUPERSAMPLING * height
    canvas = Image.new("RGB", (SUPERSAMPLING * width, SUPERSAMPLING * height))
    draw = ImageDraw.Draw(canvas, "RGBA")
    for thing in things:
        for polygon, color in thing.strokes:
            draw.polygon([(x * sx - 0.5, y * sy - 0.5) for x, y in polygon], fill=color)
    picture = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(64))
    grain = noise.standard_normal((height, width, 1), dtype=np.float32)
    coarse = Image.fromarray(noise.standard_normal((9, 17), dtype=np.float32))
    blotch = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    light = np.array(MOODS[mood][2], dtype=np.float32) * rng.uniform(0.9, 1.05)
    picture = picture * light * (1 + 0.03 * blotch[..., None]) + 4.0 * grain
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_scene(rng: random.Random, width: int, height: int) -> Scene:
    """One street. The same state of `rng` gives the same street at every size."""
    things, mood = compose(rng)
    objects = []
    for thing in things:
        polygon = pixels(thing.outline, width, height)
        if len(polygon) > 2:
            objects.append({"label": thing.label, "polygon": polygon})
    image = render(things, mood, rng, width, height)
    coarse = coarse_objects(objects, rng, width, height)
    return Scene(image, annotate(objects, width, height), annotate(coarse, width, height))
