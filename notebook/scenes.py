"""Street scenes drawn by the project itself: a picture and its exact mask, different for every seed.

A scene is a small world in metres (x to the right, y up, z away from the camera) that is projected through a
pinhole camera and painted from far to near, four times larger than needed. Each stroke goes into the picture and,
with the index of its class, into the mask. Walls, cars, fences and clothes share one set of colors, so that a network
has to learn what things look like and where they stand, not which color they have. Poles, signs, fences and people
stand near the camera, where they are more than a pixel wide, and cover a sixth of the pictures. (In CamVid they cover
a twentieth, which takes more to learn than the minutes that a tutorial has.)
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

T = TypeVar("T")
Rng = np.random.Generator
Color = Sequence[float] | np.ndarray  # red, green and blue, 0 to 255
Point = tuple[float, float, float]  # in metres
Thing = tuple[float, Callable[..., None], tuple]  # how far away it is, what paints it, and the arguments of that

CODES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Sidewalk",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
    "Void",
)
PAINT = [
    (164, 84, 66),
    (214, 172, 110),
    (234, 222, 198),
    (240, 240, 236),
    (104, 128, 158),
    (146, 164, 132),
    (214, 156, 146),
    (156, 156, 154),
    (66, 70, 78),
    (226, 182, 66),
    (48, 66, 116),
    (196, 48, 46),
    (54, 124, 128),
    (78, 116, 76),
]
# light: sky at the top, sky at the horizon, tint of the sun, depth of the shadows, share of clouds, lit windows
LIGHTS = [
    ((84, 148, 222), (196, 222, 242), (1.06, 1.03, 0.98), 0.45, 0.45, 0.0),
    ((126, 172, 226), (250, 230, 206), (1.06, 1.00, 0.90), 0.42, 0.35, 0.1),
    ((104, 138, 202), (255, 214, 166), (1.10, 0.98, 0.85), 0.50, 0.40, 0.2),
    ((164, 172, 184), (218, 221, 224), (0.94, 0.96, 0.99), 0.12, 0.90, 0.1),
    ((82, 90, 150), (246, 178, 162), (0.86, 0.82, 0.88), 0.18, 0.50, 0.6),
]
LIGHT_NAMES = ["noon", "afternoon", "evening", "overcast", "dusk"]
LEAVES = [(92, 140, 62), (74, 122, 66), (118, 150, 66), (58, 104, 70), (204, 142, 58), (190, 96, 56), (226, 164, 180)]
TRAFFIC = [(196, 30, 38), (24, 84, 168), (244, 196, 32), (20, 116, 84)]  # what signs are painted with
VEST = (226, 236, 70)
SKIN = [(240, 204, 176), (206, 156, 120), (150, 104, 76), (98, 68, 52)]
NEAR = 1.5  # metres; nothing is drawn closer to the camera than this


class Canvas:
    """The picture and its mask, drawn together through one camera."""

    def __init__(self, rng: Rng, height: int, width: int):
        self.rng, self.h, self.w = rng, height, width
        self.light = int(rng.integers(len(LIGHTS)))
        self.sky, self.haze, self.sun, self.depth, self.cloud, self.lit = LIGHTS[self.light]
        self.sun_side = rng.choice([-1, 1])
        self.focal = width * rng.uniform(0.72, 0.9)
        self.cx, self.horizon = width * rng.uniform(0.42, 0.58), height * rng.uniform(0.42, 0.5)
        self.eye_x, self.eye_y = 0.0, rng.uniform(1.6, 2.3)
        self.picture = Image.new("RGB", (width, height))
        self.mask = Image.new("L", (width, height), CODES.index("Sky"))
        self.shade = Image.new("L", (width, height), 0)
        self.pens = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.mask), ImageDraw.Draw(self.shade)

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """The pixel of a point given in metres."""
        return (self.cx + self.focal * (x - self.eye_x) / z, self.horizon - self.focal * (y - self.eye_y) / z)

    def color(self, color: Color, z: float, light: float = 1.0) -> tuple[int, ...]:
        """What is left of a color at distance z: tinted by the sun, paled by the air."""
        clear = exp(-z / 110)
        return tuple(
            int(min(v * tint * light, 255) * clear + air * (1 - clear))
            for v, tint, air in zip(color, self.sun, self.haze, strict=True)
        )

    def fill(self, points: list[Point], color: Color, name: str, light: float = 1.0) -> None:
        """A polygon through points in metres."""
        z = sum(p[2] for p in points) / len(points)
        pixels = [self.at(*p) for p in points]
        self.pens[0].polygon(pixels, self.color(color, z, light))
        self.pens[1].polygon(pixels, CODES.index(name))

    def disc(
        self, x: float, y: float, z: float, rx: float, ry: float, color: Color, name: str, light: float = 1.0
    ) -> None:
        """An ellipse that faces the camera; radii in metres."""
        (u0, v0), (u1, v1) = self.at(x - rx, y + ry, z), self.at(x + rx, y - ry, z)
        box = [u0, v0, max(u1, u0 + 1), max(v1, v0 + 1)]
        self.pens[0].ellipse(box, self.color(color, z, light))
        self.pens[1].ellipse(box, CODES.index(name))

    def line(
        self, points: list[tuple[float, float]], z: float, width: float, color: Color, name: str, light: float = 1.0
    ) -> None:
        """A stroke of a width in metres, at least one pixel of the finished picture, that faces the camera."""
        pixels = [self.at(x, y, z) for x, y in points]
        width = max(round(self.focal * width / z), self.w // 128, 1)
        self.pens[0].line(pixels, self.color(color, z, light), width, joint="curve")
        self.pens[1].line(pixels, CODES.index(name), width, joint="curve")

    def front(
        self, x0: float, x1: float, y0: float, y1: float, z: float, color: Color, name: str, light: float = 1.0
    ) -> None:
        """A rectangle that faces the camera."""
        self.fill([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], color, name, light)

    def side(
        self, x: float, z0: float, z1: float, y0: float, y1: float, color: Color, name: str, light: float = 1.0
    ) -> None:
        """A rectangle along the street, such as a wall beside it."""
        self.fill([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], color, name, light)

    def flat(
        self, x0: float, x1: float, z0: float, z1: float, color: Color, name: str, light: float = 1.0, y: float = 0.0
    ) -> None:
        """A rectangle that lies flat, such as the road."""
        self.fill([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], color, name, light)

    def box(self, x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, color: Color, name: str) -> None:
        """A box: the faces of it that the camera sees, the one that looks to the sun brighter than the other."""
        if y1 < self.eye_y:
            self.flat(x0, x1, z0, z1, color, name, 1.12, y=y1)
        if x0 > self.eye_x:
            self.side(x0, z0, z1, y0, y1, color, name, 1.0 if self.sun_side < 0 else 0.72)
        elif x1 < self.eye_x:
            self.side(x1, z0, z1, y0, y1, color, name, 1.0 if self.sun_side > 0 else 0.72)
        self.front(x0, x1, y0, y1, z0, color, name, 0.86)

    def shadow(self, x0: float, x1: float, z0: float, z1: float, reach: float) -> None:
        """The shadow on the ground of a thing that stands on x0..x1, z0..z1 and is about `reach` metres high."""
        dx = -self.sun_side * reach * 0.7
        ground = [
            (x0, z0),
            (x1, z0),
            (x1 + dx, z0 + 0.3 * reach),
            (x1 + dx, z1 + 0.3 * reach),
            (x0 + dx, z1 + 0.3 * reach),
            (x0, z1),
        ]
        if dx < 0:
            ground = [
                (x1, z0),
                (x0, z0),
                (x0 + dx, z0 + 0.3 * reach),
                (x0 + dx, z1 + 0.3 * reach),
                (x1 + dx, z1 + 0.3 * reach),
                (x1, z1),
            ]
        self.pens[2].polygon([self.at(x, 0, max(z, NEAR)) for x, z in ground], 255)


def noise(rng: Rng, height: int, width: int, cells: int, octaves: int = 3) -> np.ndarray:
    """Smooth noise, float32 (height, width), mean about 0, within about -1..1; `cells` bumps across the width."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        n = cells * 2**octave
        grid = Image.fromarray(rng.uniform(-1, 1, (max(2, n * height // width), n)).astype(np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return total / 1.5


def pick(rng: Rng, choices: Sequence[T]) -> T:
    """One of `choices`."""
    return choices[int(rng.integers(len(choices)))]


def ordered(a: float, b: float) -> tuple[float, float]:
    """The smaller of two numbers, then the larger."""
    return (a, b) if a <= b else (b, a)


def sky(c: Canvas) -> None:
    """A gradient with clouds; it fills the whole picture, the street is painted over it."""
    down = np.linspace(0, 1, c.h)[:, None, None] * c.h / c.horizon
    air = np.array(c.sky) * (1 - np.clip(down, 0, 1)) + np.array(c.haze) * np.clip(down, 0, 1)
    streaks = Image.fromarray(noise(c.rng, c.h * 3 // 4, c.w // 4, 4, 5))
    streaks = streaks.resize((c.w, c.h), Image.Resampling.BICUBIC)  # clouds are wider than high
    clouds = np.clip((np.asarray(streaks) - 0.45 + c.cloud) * 1.8, 0, 0.9)[..., None]
    white = np.clip(np.array((250, 248, 246)) * (np.array(c.sun) * 0.4 + 0.58), 0, 255)
    c.picture.paste(Image.fromarray((air * (1 - clouds) + white * clouds).astype(np.uint8)))


def windows(c: Canvas, rng: Rng, x: float, z0: float, z1: float, y0: float, y1: float) -> None:
    """Rows of windows in a wall beside the street."""
    frame = pick(rng, [(244, 244, 240), (90, 80, 74), (208, 196, 180)])
    rows, columns = max(1, round((y1 - y0) / 3)), max(1, round((z1 - z0) / rng.uniform(2.2, 3.2)))
    dy, dz = (y1 - y0) / rows, (z1 - z0) / columns
    for row in range(rows):
        for column in range(columns):
            a, b = z0 + dz * (column + 0.27), z0 + dz * (column + 0.73)
            low, high = y0 + dy * (row + 0.25), y0 + dy * (row + 0.8)
            glass = (
                (252, 214, 132) if rng.random() < c.lit else pick(rng, [(66, 82, 100), (92, 114, 136), (52, 60, 72)])
            )
            if b > NEAR * 1.2:
                a = max(a, NEAR)
                c.side(x, a - 0.08, b + 0.08, low - 0.1, high + 0.1, frame, "Building", 0.95)
                c.side(x, a, b, low, high, glass, "Building")
                c.side(x, a, b, (low + high) / 2 - 0.05, (low + high) / 2 + 0.05, frame, "Building", 0.9)


def terrace(c: Canvas, rng: Rng, side: int, edge: float) -> list[Thing]:
    """A closed row of town houses whose walls stand at the pavement."""
    z, rows = NEAR, []
    while z < 95:
        rows.append((z, z + rng.uniform(6, 13), rng.uniform(5.5, 13), pick(rng, PAINT[:9])))
        z = rows[-1][1]

    def paint(z0: float, z1: float, height: float, wall: Color) -> None:
        x0, x1 = sorted((side * edge, side * (edge + 9)))
        c.box(x0, x1, 0, height, z0, z1, wall, "Building")
        wall_x = side * edge
        if rng.random() < 0.6:  # a roof that slopes away from the street
            roof = pick(rng, [(120, 66, 54), (92, 92, 100), (142, 90, 68)])
            rise = rng.uniform(2.5, 4)
            c.fill(
                [
                    (wall_x, height, z0),
                    (wall_x, height, z1),
                    (wall_x + side * 3, height + rise, z1),
                    (wall_x + side * 3, height + rise, z0),
                ],
                roof,
                "Building",
            )
            c.fill(
                [(wall_x, height, z0), (wall_x + side * 3, height + rise, z0), (wall_x + side * 6, height, z0)],
                wall,
                "Building",
                0.86,
            )
        shop = rng.random() < 0.4
        windows(c, rng, wall_x, z0 + 0.3, z1 - 0.3, 3.2 if shop else 0.6, height - 0.3)
        c.side(wall_x, z0, z1, height - 0.3, height, wall, "Building", 1.15)
        c.side(wall_x, z0, z1, 0, 0.4, wall, "Building", 0.7)
        if shop:
            color = pick(rng, PAINT)
            c.side(wall_x, z0 + 0.5, z1 - 0.5, 0.3, 2.5, (70, 84, 96), "Building")
            stripes = max(2, int((z1 - z0) / 0.8))
            for i in range(stripes):  # the awning
                a, b = (z0 + (z1 - z0) * (i + k) / stripes for k in (0, 1))
                c.fill(
                    [(wall_x, 3.1, a), (wall_x, 3.1, b), (wall_x - side * 0.9, 2.5, b), (wall_x - side * 0.9, 2.5, a)],
                    color if i % 2 else (244, 240, 232),
                    "Building",
                )
        else:
            door = z0 + (z1 - z0) * rng.uniform(0.1, 0.8)
            c.side(wall_x, max(door, NEAR), door + 1.1, 0, 2.2, pick(rng, PAINT), "Building", 0.9)

    return [(z1 + 0.5, paint, row) for row in rows for z1 in [row[1]]]


def houses(c: Canvas, rng: Rng, side: int, edge: float) -> list[Thing]:
    """Detached houses with gables, behind a fence or a hedge and a strip of lawn."""
    things, z = [], NEAR
    c.flat(*ordered(side * edge, side * 60), NEAR, 130, pick(rng, LEAVES[:3]), "Tree", 0.95)
    kind = rng.integers(5)
    paint_fence, hedge = pick(rng, PAINT), pick(rng, LEAVES[:4])

    def house(z0: float, z1: float, back: float, height: float, wall: Color, roof: Color) -> None:
        x0, x1 = sorted((side * (edge + back), side * (edge + back + 8)))
        c.box(x0, x1, 0, height, z0, z1, wall, "Building")
        eave, ridge, rise = side * (edge + back - 0.4), side * (edge + back + 4), rng.uniform(2.8, 3.8)
        c.fill([(x0, height, z0), ((x0 + x1) / 2, height + rise, z0), (x1, height, z0)], wall, "Building", 0.86)
        c.box(
            ridge - 0.4,
            ridge + 0.4,
            height + rise - 0.8,
            height + rise + 0.9,
            z0 + 2,
            z0 + 2.8,
            (140, 84, 66),
            "Building",
        )
        c.fill(
            [
                (eave, height - 0.2, z0 - 0.3),
                (eave, height - 0.2, z1),
                (ridge, height + rise, z1),
                (ridge, height + rise, z0 - 0.3),
            ],
            roof,
            "Building",
            1.0 if c.sun_side == -side else 0.75,
        )
        windows(c, rng, side * (edge + back), z0 + 0.5, z1 - 0.5, 0.5, height - 0.3)
        middle = (x0 + x1) / 2
        for x in (middle - 2.4, middle + 1.2):
            c.front(x - 0.1, x + 1.3, 0.9, 2.5, z0, (240, 238, 232), "Building")
            c.front(x, x + 1.2, 1.0, 2.4, z0, (78, 96, 116), "Building")
        c.shadow(x0, x1, z0, z1, height * 0.8)

    def border(z0: float, z1: float) -> None:
        x = side * edge
        if kind == 0:
            c.box(*ordered(x, x + side * 0.8), 0, 1.1, z0, z1, hedge, "Tree")
        elif kind < 3:
            c.side(x, z0, z1, 0.15, 1.0, paint_fence, "Fence", 0.92)
            for post in np.arange(z0, z1, 0.5):
                c.side(x, post, post + 0.3, 0, 1.25, paint_fence, "Fence")
        else:
            c.side(x, z0, z1, 0, 0.45, (150, 120, 104), "Fence", 0.9)
            c.side(x, z0, z1, 0.45, 0.95, paint_fence, "Fence", 0.75)
            for post in np.arange(z0, z1, 1.6):
                c.side(x, post, post + 0.25, 0, 1.2, (150, 120, 104), "Fence")

    while z < 100:
        length, gap = rng.uniform(7, 11), rng.uniform(2.5, 6)
        things.append(
            (
                z + length + 0.5,
                house,
                (
                    z,
                    z + length,
                    rng.uniform(2.5, 5),
                    rng.uniform(3.6, 6.2),
                    pick(rng, PAINT[:8]),
                    pick(rng, [(150, 76, 58), (96, 96, 106), (128, 92, 74)]),
                ),
            )
        )
        things.append(
            (
                z + length + gap / 2,
                tree,
                (c, rng, side * (edge + rng.uniform(1, 6)), z + length + gap / 2, rng.uniform(2.5, 7)),
            )
        )
        for start in np.arange(z, z + length + gap, 3.0):
            if start + 1.5 > z + 1.2 or z > 100:
                things.append((start + 3, border, (start, min(start + 3, z + length + gap))))
        z += length + gap
    return things


def park(c: Canvas, rng: Rng, side: int, edge: float) -> list[Thing]:
    """A lawn with trees behind railings."""
    c.flat(*ordered(side * edge, side * 80), NEAR, 130, pick(rng, LEAVES[:3]), "Tree")
    color = pick(rng, PAINT)

    def railing(z0: float, z1: float) -> None:
        x = side * edge
        c.side(x, z0, z1, 0.1, 1.15, color, "Fence", 0.8)
        c.side(x, z0, z1, 1.0, 1.25, color, "Fence", 1.1)
        for post in np.arange(z0, z1, 0.45):
            c.side(x, post, post + 0.18, 0, 1.3, color, "Fence", 1.05)

    things = [
        (z, tree, (c, rng, side * (edge + rng.uniform(1.5, 22)), z, rng.uniform(4, 9))) for z in rng.uniform(5, 80, 22)
    ]
    if rng.random() < 0.9:
        things += [(z + 4, railing, (z, z + 4)) for z in np.arange(NEAR, 80, 4)]
    return things


def guard_rail(c: Canvas, rng: Rng, x: float, start: float) -> list[Thing]:
    """A railing of some length at the kerb."""
    color = pick(rng, PAINT)

    def panel(z0: float, z1: float) -> None:
        c.side(x, z0, z1, 0.1, 1.0, color, "Fence", 0.8)
        c.side(x, z0, z1, 0.9, 1.1, color, "Fence", 1.1)
        for post in np.arange(z0, z1, 0.45):
            c.side(x, post, post + 0.18, 0, 1.1, color, "Fence", 1.05)

    return [(z + 3, panel, (z, z + 3)) for z in np.arange(start, start + rng.uniform(9, 18), 3)]


def tree(c: Canvas, rng: Rng, x: float, z: float, height: float) -> None:
    """A trunk and a crown of leaf clusters, or a conifer."""
    conifer = rng.random() < 0.2
    leaf = np.array(pick(rng, LEAVES[:4] if conifer else LEAVES)) * rng.uniform(0.85, 1.1)
    c.shadow(x - height * 0.22, x + height * 0.22, z, z + height * 0.25, height * 0.8)
    c.line([(x, 0), (x + rng.normal() * 0.1, height * 0.5)], z, height * 0.045, (96, 74, 58), "Tree")
    if conifer:
        for level in range(4):
            y, r = height * (0.18 + 0.2 * level), height * (0.26 - 0.055 * level)
            c.fill([(x - r, y, z), (x + r, y, z), (x, y + height * 0.36, z)], leaf * 0.8, "Tree", 0.8 + 0.1 * level)
        return
    for light, grow in ((0.68, 1.0), (0.9, 0.8), (1.12, 0.5)):
        for _ in range(9):
            angle, r = rng.uniform(0, 6.3), height * rng.uniform(0.08, 0.2) * grow
            dx = np.cos(angle) * height * 0.2 * grow + c.sun_side * height * 0.1 * (1 - grow)
            dy = np.sin(angle) * height * 0.22 * grow + height * 0.1 * (1 - grow)
            c.disc(x + dx, height * 0.7 + dy, z, r + height * 0.06, r + height * 0.05, leaf, "Tree", light)


def lamp(c: Canvas, rng: Rng, x: float, z: float, towards: int) -> None:
    """A street lamp whose arm reaches over the road, or a wooden pole that carries wires."""
    gray, height = pick(rng, [(70, 74, 78), (120, 124, 124), (58, 78, 66)]), rng.uniform(5, 7)
    c.shadow(x - 0.1, x + 0.1, z, z + 0.2, height)
    if rng.random() < 0.3:
        wood = (112, 88, 68)
        c.line([(x, 0), (x, height)], z, 0.3, wood, "Pole")
        for y in (height - 0.3, height - 0.9):
            c.line([(x - 0.8, y), (x + 0.8, y)], z, 0.16, wood, "Pole", 0.85)
        return
    top = [(x, height), (x + towards * 0.5, height + 0.3), (x + towards * 1.3, height + 0.3)]
    c.line([(x, 0), *top], z, 0.2, gray, "Pole")
    c.line([(x, 0), (x, 1.1)], z, 0.32, gray, "Pole")
    c.disc(x + towards * 1.4, height + 0.22, z, 0.5, 0.18, (252, 226, 160) if c.lit > 0.5 else (226, 226, 220), "Pole")


def sign(c: Canvas, rng: Rng, x: float, z: float) -> None:
    """A traffic sign on a pole: a disc, a triangle, a board or a traffic light."""
    kind, color, y = rng.integers(4), pick(rng, TRAFFIC), rng.uniform(2.3, 2.7)
    white, name = (242, 242, 240), "SignSymbol"
    c.shadow(x - 0.1, x + 0.1, z, z + 0.2, y)
    c.line([(x, 0), (x, y)], z, 0.16, (128, 130, 132), "Pole")
    if kind == 0:
        c.disc(x, y, z, 0.62, 0.62, color, name)
        c.disc(x, y, z, 0.44, 0.44, white, name)
        c.front(x - 0.3, x + 0.3, y - 0.09, y + 0.09, z, (50, 50, 54), name)
    elif kind == 1:
        c.fill([(x - 0.78, y - 0.6, z), (x + 0.78, y - 0.6, z), (x, y + 0.75, z)], color, name)
        c.fill([(x - 0.44, y - 0.4, z), (x + 0.44, y - 0.4, z), (x, y + 0.36, z)], white, name)
    elif kind == 2:
        c.front(x - 0.85, x + 0.85, y - 0.5, y + 0.55, z, white, name)
        c.front(x - 0.75, x + 0.75, y - 0.4, y + 0.45, z, color, name)
        c.front(x - 0.55, x + 0.55, y - 0.03, y + 0.14, z, white, name)
    else:
        c.front(x - 0.36, x + 0.36, y - 0.85, y + 0.85, z, (44, 46, 50), name)
        on = rng.integers(3)
        for i, lamp_color in enumerate([(70, 200, 110), (250, 190, 60), (236, 60, 50)]):
            c.disc(x, y - 0.54 + 0.54 * i, z, 0.22, 0.22, lamp_color, name, 1.1 if i == on else 0.3)


def car(c: Canvas, rng: Rng, x: float, z: float, oncoming: bool) -> None:
    """A car or a van, seen from behind or, if it is oncoming, from the front."""
    color, glass = pick(rng, PAINT), (58, 70, 84)
    van = rng.random() < 0.2
    half, length, roof = (0.95, 4.9, 2.1) if van else (0.86, 4.0, 1.48)
    waist = 1.15 if van else 0.88
    z1 = z + length
    c.shadow(x - half, x + half, z, z1, 0.8)
    c.pens[2].polygon([c.at(u, 0, v) for u, v in [(x - half, z), (x + half, z), (x + half, z1), (x - half, z1)]], 255)
    for u in (x - half + 0.12, x + half - 0.12):
        c.front(u - 0.12, u + 0.12, 0, 0.5, z + 0.3, (34, 34, 38), "Car")
    c.box(x - half, x + half, 0.25, waist, z, z1, color, "Car")
    flank = x - half if x - half > c.eye_x else x + half if x + half < c.eye_x else None
    if flank is not None:
        for wheel in (z + 0.75, z1 - 0.8):
            turn = np.linspace(0, 2 * np.pi, 14)
            for r, shade in ((0.34, (32, 32, 36)), (0.2, (150, 152, 156))):
                c.fill([(flank, 0.33 + r * np.sin(t), wheel + r * np.cos(t)) for t in turn], shade, "Car")
    # the cabin narrows towards the roof, and stands away from the boot or the bonnet
    back, front = z + (0.1 if van else 1.2 if oncoming else 0.5), z1 - (0.5 if van else 1.2)
    inner, slope = half - 0.14, 0.15 if van else 0.55
    c.flat(x - inner, x + inner, back + slope, front - slope, color, "Car", 1.12, y=roof)
    if flank is not None:
        s = np.sign(flank - x)
        lower, upper = x + s * (half - 0.03), x + s * inner
        c.fill(
            [(lower, waist, back), (lower, waist, front), (upper, roof, front - slope), (upper, roof, back + slope)],
            color,
            "Car",
            0.9,
        )
        middle = (back + front) / 2
        for a, b in ((back + 0.25, middle - 0.06), (middle + 0.06, front - 0.25)):
            lean = slope * 0.7
            top_a, top_b = (a + lean, b) if a < middle - 0.1 else (a, b - lean)
            c.fill(
                [
                    (lower, waist + 0.05, a),
                    (lower, waist + 0.05, b),
                    (upper, roof - 0.1, top_b),
                    (upper, roof - 0.1, top_a),
                ],
                glass,
                "Car",
            )
    c.fill(
        [
            (x - half + 0.03, waist, back),
            (x + half - 0.03, waist, back),
            (x + inner, roof, back + slope),
            (x - inner, roof, back + slope),
        ],
        color,
        "Car",
        0.86,
    )
    c.fill(
        [
            (x - half + 0.15, waist + 0.06, back),
            (x + half - 0.15, waist + 0.06, back),
            (x + inner - 0.1, roof - 0.08, back + slope),
            (x - inner + 0.1, roof - 0.08, back + slope),
        ],
        glass,
        "Car",
        1.15,
    )
    lamps = (252, 246, 214) if oncoming else (206, 34, 34)
    for u in (x - half + 0.22, x + half - 0.22):
        c.front(u - 0.18, u + 0.18, 0.6, 0.78, z, lamps, "Car", 1.1)
    c.front(x - 0.27, x + 0.27, 0.45, 0.58, z, (240, 236, 210), "Car")
    c.front(x - half, x + half, 0.25, 0.36, z, (48, 50, 54), "Car")


def person(c: Canvas, rng: Rng, x: float, z: float) -> None:
    """Somebody on foot, sometimes small, sometimes under an umbrella."""
    tall, skin = rng.uniform(1.1, 1.3) if rng.random() < 0.15 else rng.uniform(1.6, 1.9), pick(rng, SKIN)
    coat, trousers, stride = pick(rng, PAINT[8:]), pick(rng, PAINT[7:11]), rng.uniform(0.05, 0.24) * tall / 1.8
    k = tall / 1.8
    c.shadow(x - 0.2, x + 0.2, z, z + 0.2, tall)
    for foot in (-stride, stride):
        c.line([(x, 0.85 * k), (x + foot, 0)], z, 0.23 * k, trousers, "Pedestrian")
    c.fill(
        [
            (x - 0.25 * k, 0.75 * k, z),
            (x + 0.25 * k, 0.75 * k, z),
            (x + 0.28 * k, 1.47 * k, z),
            (x - 0.28 * k, 1.47 * k, z),
        ],
        coat,
        "Pedestrian",
    )
    for hand in (-1, 1):
        c.line(
            [(x + hand * 0.27 * k, 1.4 * k), (x + hand * 0.35 * k + stride * 0.5, 0.85 * k)],
            z,
            0.15 * k,
            coat,
            "Pedestrian",
            0.85,
        )
    c.disc(
        x,
        1.64 * k,
        z,
        0.14 * k,
        0.17 * k,
        pick(rng, [(60, 44, 36), (140, 100, 60), (40, 36, 36), (186, 180, 172)]),
        "Pedestrian",
    )
    c.disc(x, 1.61 * k, z, 0.11 * k, 0.13 * k, skin, "Pedestrian")
    if c.cloud > 0.8 and rng.random() < 0.5:
        c.line([(x + 0.25, 1.2), (x + 0.15, 2.1)], z, 0.04, (60, 60, 64), "Pedestrian")
        arc = [(x + 0.15 + 0.65 * np.cos(t), 1.95 + 0.45 * np.sin(t), z) for t in np.linspace(0, np.pi, 12)]
        c.fill(arc, pick(rng, PAINT), "Pedestrian")


def cyclist(c: Canvas, rng: Rng, x: float, z: float) -> None:
    """Somebody on a bicycle, from behind or from the side."""
    coat, skin, frame = VEST if rng.random() < 0.6 else pick(rng, PAINT), pick(rng, SKIN), pick(rng, PAINT)
    dark, name = (40, 40, 44), "Bicyclist"
    c.shadow(x - 0.2, x + 0.2, z, z + 1.2, 1.6)
    helmet = pick(rng, PAINT)
    if rng.random() < 0.4:
        c.line([(x, 0), (x, 0.7)], z, 0.12, dark, name)
        c.line([(x - 0.3, 1.05), (x + 0.3, 1.05)], z, 0.06, dark, name)
        for foot, lift in ((-0.13, 0.18), (0.13, 0.42)):
            c.line([(x + foot * 0.7, 0.95), (x + foot * 1.3, lift)], z, 0.16, pick(rng, PAINT[7:11]), name)
        c.fill([(x - 0.2, 0.9, z), (x + 0.2, 0.9, z), (x + 0.27, 1.5, z), (x - 0.27, 1.5, z)], coat, name)
        for hand in (-1, 1):
            c.line([(x + hand * 0.25, 1.45), (x + hand * 0.33, 1.05)], z, 0.11, coat, name, 0.85)
        c.disc(x, 1.68, z, 0.13, 0.15, skin, name)
        c.disc(x, 1.75, z, 0.15, 0.11, helmet, name)
        return
    s = rng.choice([-1, 1])
    for wheel in (-0.52, 0.52):
        turn = np.linspace(0, 2 * np.pi, 20)
        c.disc(x + wheel, 0.34, z, 0.33, 0.33, (132, 132, 130), name)  # the spokes
        c.line([(x + wheel + 0.33 * np.cos(t), 0.34 + 0.33 * np.sin(t)) for t in turn], z, 0.07, dark, name)
    c.line(
        [(x - 0.52, 0.34), (x - 0.1 * s, 0.34), (x + 0.4 * s, 0.85), (x - 0.2 * s, 0.85), (x - 0.1 * s, 0.34)],
        z,
        0.06,
        frame,
        name,
    )
    c.line([(x + 0.52 * s, 0.34), (x + 0.4 * s, 0.95)], z, 0.06, frame, name)
    c.line([(x - 0.2 * s, 0.95), (x + 0.12 * s, 0.65), (x - 0.05 * s, 0.25)], z, 0.16, pick(rng, PAINT[7:11]), name)
    c.line([(x - 0.2 * s, 0.95), (x + 0.12 * s, 1.45)], z, 0.3, coat, name)
    c.line([(x + 0.12 * s, 1.4), (x + 0.42 * s, 1.0)], z, 0.1, coat, name, 0.85)
    c.disc(x + 0.2 * s, 1.66, z, 0.13, 0.15, skin, name)
    c.disc(x + 0.19 * s, 1.74, z, 0.16, 0.11, helmet, name)


def bin_(c: Canvas, rng: Rng, x: float, z: float) -> None:
    """A wheelie bin: one of the many things in a street that none of the classes names."""
    color = pick(rng, PAINT)
    c.shadow(x - 0.3, x + 0.3, z, z + 0.6, 1.0)
    c.box(x - 0.3, x + 0.3, 0, 1.0, z, z + 0.6, color, "Void")
    c.box(x - 0.34, x + 0.34, 1.0, 1.1, z - 0.05, z + 0.65, np.array(color) * 0.7, "Void")


def draw_scene(seed: int, size: tuple[int, int] = (96, 128)) -> tuple[Image.Image, Image.Image]:
    """A street and its mask: an RGB picture and an 8-bit picture of class indices, both of `size` (height, width).

    The same seed and size give the same pixels.
    """
    c, scale = open_canvas(seed, size)
    rng = c.rng
    sky(c)

    half, pave = rng.uniform(2.9, 3.8), rng.uniform(2.0, 3.0)
    edge = half + pave
    c.eye_x = rng.uniform(-0.65, 0.1) * half
    things = []

    # where the street ends: a ridge of trees or roofs, and the land in front of it
    x, far = -160.0, []
    while x < 160:
        width = rng.uniform(6, 22)
        far.append((x, x + width, rng.uniform(4, 13), rng.random() < 0.5))
        x += width
    c.flat(-300, 300, NEAR, 130, pick(rng, LEAVES[:3]), "Tree", 0.9)
    for x0, x1, height, wood in far:
        if wood:
            for x in np.arange(x0, x1, 4):
                c.disc(x + 2, height * 0.3, 125, 4, height * 0.6, pick(rng, LEAVES[:4]), "Tree", 0.85)
        else:
            c.front(x0, x1, 0, height, 125, pick(rng, PAINT[:8]), "Building", 0.9)
    for side in (-1, 1):
        row = pick(rng, [terrace, terrace, houses, houses, park])
        things += row(c, rng, side, edge)
        if row is terrace and rng.random() < 0.6:  # it keeps people on the pavement
            things += guard_rail(c, rng, side * (half + 0.15), rng.uniform(NEAR, 9))
        if row is terrace and side == c.sun_side:
            c.shadow(*ordered(side * edge, side * (edge + 1)), NEAR, 95, rng.uniform(3, 9))

    gray = rng.uniform(80, 118)
    road, slab = (gray, gray, gray + rng.uniform(0, 8)), np.array((172, 166, 158)) * rng.uniform(0.92, 1.14)
    c.flat(-half, half, NEAR, 130, road, "Road")
    for side in (-1, 1):
        x0, x1 = sorted((side * half, side * edge))
        c.flat(x0, x1, NEAR, 130, slab, "Sidewalk")
        for z in np.arange(2, 40, 1.5):
            c.flat(x0, x1, z, z + 0.06, slab, "Sidewalk", 0.86)
        c.flat(*ordered(side * half, side * (half + 0.22)), NEAR, 130, slab, "Sidewalk", 1.14)
    for _ in range(rng.integers(0, 5)):  # patches in the asphalt
        x, z = rng.uniform(-half, half - 1), rng.uniform(4, 25)
        c.flat(x, x + rng.uniform(0.5, 1.6), z, z + rng.uniform(0.6, 4), road, "Road", rng.uniform(0.88, 1.06))
    paint = (236, 234, 226)
    dash, start = rng.uniform(2, 4), rng.uniform(0, 6)
    for z in np.arange(NEAR + start, 90, dash * 2.2):
        c.flat(-0.08, 0.08, z, z + dash, paint, "Road")
    if rng.random() < 0.5:
        for side in (-1, 1):
            c.flat(side * (half - 0.35) - 0.06, side * (half - 0.35) + 0.06, NEAR, 100, paint, "Road", 0.95)
    if rng.random() < 0.4:  # a zebra crossing, and somebody on it
        z = rng.uniform(5, 11)
        for x in np.arange(-half + 0.4, half - 0.4, 1.0):
            c.flat(x, x + 0.5, z, z + 2.6, paint, "Road")
        for x in rng.uniform(-half, half, rng.integers(1, 3)):
            things.append((z + 1, person, (c, rng, x, z + 1)))

    # what stands on the pavement, between the kerb and the walls: little of it far away, where a pixel is a person
    for side in (-1, 1):
        leafy, parked = rng.random() < 0.4, rng.random() < 0.6
        for z in np.arange(rng.uniform(5, 12), 45, rng.uniform(14, 20)):
            things.append((z, lamp, (c, rng, side * (half + 0.35), z, -side)))
            if leafy:
                things.append((z + 6, tree, (c, rng, side * (half + 0.5), z + 6, rng.uniform(4, 6.5))))
        for z in rng.uniform(5, 14, rng.integers(1, 3)):
            things.append((z, sign, (c, rng, side * (half + rng.uniform(0.4, 1.0)), z)))
        for z in rng.uniform(4, 9, rng.integers(3, 5)):
            things.append((z, person, (c, rng, side * rng.uniform(half + 0.4, edge - 0.5), z)))
        for z in rng.uniform(5, 16, rng.integers(0, 2)):
            things.append((z, bin_, (c, rng, side * (edge - 0.5), z)))
        z = rng.uniform(7, 12)
        while parked and z < 50:
            if rng.random() < 0.75:
                things.append((z + 2, car, (c, rng, side * (half - 1.0), z, side > 0)))
            z += rng.uniform(5.2, 9)
        for z in rng.uniform(5, 13, rng.integers(0, 3)):
            things.append((z, cyclist, (c, rng, side * (half - (2.2 if parked else 0.8)), z)))
    for side in (-1, 1):
        if rng.random() < 0.6:
            z = rng.uniform(9, 30)
            things.append((z + 2, car, (c, rng, side * half * 0.36, z, side > 0)))

    for _, paint_thing, what in sorted(things, key=lambda t: -t[0]):
        paint_thing(*what)
    if rng.random() < 0.25:  # the bonnet of the car that carries the camera
        color = np.array(pick(rng, PAINT)) * c.sun * 0.8
        box = [c.w * 0.08, c.h * rng.uniform(0.9, 0.94), c.w * 0.92, c.h * 1.2]
        c.pens[0].ellipse(box, tuple(int(v) for v in np.clip(color, 0, 255)))
        c.pens[1].ellipse(box, CODES.index("Void"))
    return finish(c, rng, size, scale)


def open_canvas(seed: int, size: tuple[int, int]) -> tuple[Canvas, int]:
    """The empty canvas of a scene, with its light and its camera, and how much larger than `size` it is."""
    scale = 4 if size[0] < 200 else 2
    return Canvas(np.random.default_rng(seed), size[0] * scale, size[1] * scale), scale


def light_and_end(seed: int, size: tuple[int, int] = (96, 128)) -> tuple[str, tuple[float, float]]:
    """What `draw_scene` of the same arguments does not say of a scene.

    Returns:
        Its light, one of LIGHT_NAMES, and (x, y) in pixels of the point in which the lines of the street meet.
    """
    c, scale = open_canvas(seed, size)
    return LIGHT_NAMES[c.light], (c.cx / scale, c.horizon / scale)


def finish(c: Canvas, rng: Rng, size: tuple[int, int], scale: int) -> tuple[Image.Image, Image.Image]:
    """Shadows on the ground, texture on the surfaces, then the camera's own noise at the final size."""
    index, picture = np.asarray(c.mask), np.asarray(c.picture).astype(np.float32)
    ground = np.isin(index, [CODES.index("Road"), CODES.index("Sidewalk"), CODES.index("Tree")])
    shade = np.asarray(c.shade.filter(ImageFilter.GaussianBlur(c.w / 250))).astype(np.float32) / 255
    picture *= (1 - c.depth * shade * ground)[..., None]
    strength = np.full(len(CODES), 0.04, np.float32)
    strength[[CODES.index(n) for n in ("Sky", "Tree", "Road")]] = 0.0, 0.3, 0.06
    fine = noise(rng, c.h, c.w, 90 * 4 // scale, 2)
    picture *= 1 + (strength[index] * fine)[..., None]
    picture *= 1 + 0.06 * noise(rng, c.h, c.w, 3, 2)[..., None]
    height, width = size
    small = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BOX)
    values = (np.asarray(small).astype(np.float32) - 118) * rng.uniform(0.9, 1.1) + 118 + rng.uniform(-10, 10)
    values += rng.normal(0, rng.uniform(0.5, 3), (height, width, 1)) + rng.normal(0, 1, (height, width, 3))
    values = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return values, c.mask.resize((width, height), Image.Resampling.NEAREST)
