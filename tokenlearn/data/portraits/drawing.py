"""Draw a scene: shapes at four times the size, shrunk by averaging and softened as by a lens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tokenlearn.data.portraits.scene import COLORS, EYE_COLORS, Scene
from tokenlearn.data.portraits.styles import apply_style

IMAGE_SIZE = 64
_OVERSAMPLING = 4
_HEAD_SCALE = 1.07
_LENS = ImageFilter.GaussianBlur(0.45)  # edges as soft as a camera's, which a small autoencoder can keep

Color = tuple[int, int, int]
Point = tuple[float, float]

_HAIR: dict[str, Color] = {
    "black": (38, 32, 36),
    "brown": (104, 66, 38),
    "blond": (226, 188, 104),
    "red": (178, 76, 36),
    "gray": (176, 178, 184),
}
_INK: Color = (34, 26, 28)
_WHITE: Color = (248, 248, 246)
_GOLD: Color = (240, 192, 48)


def _mix(color: Sequence[float], other: Sequence[float], amount: float) -> Color:
    red, green, blue = (round(a + (b - a) * amount) for a, b in zip(color, other, strict=True))
    return max(0, min(255, red)), max(0, min(255, green)), max(0, min(255, blue))


def _thickness(width: float) -> int:
    return max(1, round(width * _HEAD_SCALE * _OVERSAMPLING))


class _Canvas:
    """Shapes in units of about a pixel of the final image, relative to the middle of the head."""

    def __init__(self, scene: Scene, background: Color) -> None:
        side = IMAGE_SIZE * _OVERSAMPLING
        self.image = Image.new("RGB", (side, side), background)
        self._draw = ImageDraw.Draw(self.image, "RGBA")
        self._origin = (IMAGE_SIZE / 2 + scene.shift[0], 36.5 + scene.shift[1])

    def _at(self, point: Point) -> Point:
        x, y = (_HEAD_SCALE * place + start for place, start in zip(point, self._origin, strict=True))
        return x * _OVERSAMPLING, y * _OVERSAMPLING

    def ellipse(self, center: Point, radius: Point, fill: Sequence[int]) -> None:
        left, top = self._at((center[0] - radius[0], center[1] - radius[1]))
        right, bottom = self._at((center[0] + radius[0], center[1] + radius[1]))
        self._draw.ellipse((left, top, right, bottom), fill=tuple(fill))

    def ring(self, center: Point, radius: Point, color: Sequence[int], width: float) -> None:
        left, top = self._at((center[0] - radius[0], center[1] - radius[1]))
        right, bottom = self._at((center[0] + radius[0], center[1] + radius[1]))
        self._draw.ellipse((left, top, right, bottom), outline=tuple(color), width=_thickness(width))

    def slice(self, center: Point, radius: Point, angles: Point, fill: Sequence[int]) -> None:
        """Part of an ellipse between two angles, degrees clockwise from the right, closed by its chord."""
        left, top = self._at((center[0] - radius[0], center[1] - radius[1]))
        right, bottom = self._at((center[0] + radius[0], center[1] + radius[1]))
        self._draw.chord((left, top, right, bottom), angles[0], angles[1], fill=tuple(fill))

    def arc(self, center: Point, radius: Point, angles: Point, color: Sequence[int], width: float) -> None:
        left, top = self._at((center[0] - radius[0], center[1] - radius[1]))
        right, bottom = self._at((center[0] + radius[0], center[1] + radius[1]))
        box = (left, top, right, bottom)
        self._draw.arc(box, angles[0], angles[1], fill=tuple(color), width=_thickness(width))

    def polygon(self, points: Sequence[Point], fill: Sequence[int]) -> None:
        self._draw.polygon([self._at(point) for point in points], fill=tuple(fill))

    def line(self, points: Sequence[Point], color: Sequence[int], width: float) -> None:
        places = [self._at(point) for point in points]
        self._draw.line(places, fill=tuple(color), width=_thickness(width), joint="curve")

    def rectangle(self, corner: Point, opposite: Point, fill: Sequence[int]) -> None:
        self._draw.rectangle((*self._at(corner), *self._at(opposite)), fill=tuple(fill))


class _Painter:
    """The shapes of one scene, in the order in which they cover each other."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.width, self.height = 12.5 * scene.head[0], 15.0 * scene.head[1]
        self.hair = _HAIR["gray" if scene.has("gray hair") else scene.hair_color]
        self.hair_shade = _mix(self.hair, (0, 0, 0), 0.35)
        self.skin_shade = _mix(scene.skin, (90, 30, 20), 0.28)
        self.background: Color = _mix(np.add(COLORS[scene.background], scene.tint).tolist(), (255, 255, 255), 0.12)
        self.shirt: Color = _mix(np.add(COLORS[scene.shirt], scene.tint).tolist(), (0, 0, 0), 0.12)
        self.rng = np.random.default_rng(scene.detail_seed)
        self.canvas = _Canvas(scene, self.background)

    def paint(self) -> Image.Image:
        scene = self.scene
        self._hair_behind()
        self._shoulders()
        self._part("clothes")
        self._part("accessory")
        self._head()
        self._hair_in_front()
        self._eyes()
        self._nose()
        if scene.has("makeup"):
            self._makeup()
        if scene.has("beard"):
            self._beard()
        self._mouth()
        if scene.has("bangs"):
            self._bangs()
        if scene.has("glasses"):
            self._glasses()
        if scene.has("hat"):
            self._hat()
        self._part("face")
        self._part("head")
        if "a magnifying glass" in scene.parts:
            self._magnifying_glass()
        if scene.pipe:
            self._pipe()
        return self.canvas.image

    def _part(self, place: str) -> None:
        part = self.scene.part_at(place)
        if part in _PARTS:
            _PARTS[part](self)

    # hair

    @property
    def _wears_wig(self) -> bool:
        return not self.scene.parts.isdisjoint(("a green mohawk", "a rainbow wig"))

    @property
    def has_natural_hair(self) -> bool:
        return not self.scene.has("bald") and not self._wears_wig

    def _locks(self, points: Sequence[Point], radius: float) -> None:
        """Round curls along a path, each with a dark arc, which tells curls from a bumpy edge."""
        for x, y in points:
            size = radius * float(self.rng.uniform(0.85, 1.15))
            self.canvas.ellipse((x, y), (size, size), self.hair)
        for x, y in points:
            start = float(self.rng.uniform(0, 360))
            self.canvas.arc((x, y), (radius * 0.62, radius * 0.62), (start, start + 230), self.hair_shade, 0.75)

    def _strands(self, strands: Sequence[tuple[Point, Point]]) -> None:
        """White strands, which tell gray hair from blond in styles that remove the colours."""
        if self.scene.has("gray hair"):
            for strand in strands:
                self.canvas.line(strand, _WHITE, 0.8)

    def _hair_behind(self) -> None:
        if not self.has_natural_hair:
            return
        canvas, width, height = self.canvas, self.width, self.height
        curly = self.scene.has("curls")
        if self.scene.has("female"):
            spread = width + (2.5 if not curly else 2.0)
            canvas.ellipse((0, -3), (spread, height), self.hair)
            canvas.polygon([(-spread, -3), (spread, -3), (spread + 0.8, 17), (-spread - 0.8, 17)], self.hair)
            if curly:
                for side in (-1, 1):
                    self._locks([(side * (spread + 0.4), y) for y in np.arange(-7, 19, 4.3)], 3.0)
            else:
                self._strands([((side * (width + 1), 0), (side * (width + 1.4), 16)) for side in (-1, 1)])
        else:
            canvas.ellipse((0, -3.5), (width + 1.3, height - 1), self.hair)

    def _hair_in_front(self) -> None:
        canvas, width, height = self.canvas, self.width, self.height
        if self.scene.has("bald") and not self._wears_wig:
            canvas.ellipse((-4, -10.5), (2.6, 1.7), _mix(self.scene.skin, (255, 255, 255), 0.6))
            for side in (-1, 1):  # curls and gray remain visible in a tuft at each ear
                canvas.ellipse((side * (width + 0.1), -0.5), (1.7, 3.4), self.hair)
                if self.scene.has("curls"):
                    self._locks([(side * (width + 1), y) for y in (-3.2, 0.6, 4.2)], 2.2)
                self._strands([((side * width, -2.5), (side * (width + 0.4), 1.8))])
        if not self.has_natural_hair:
            return
        top = -height - 1.2
        canvas.slice((0, -2), (width + 1.2, height + 0.6), (198, 342), self.hair)
        parting = [(-width - 0.6, -5), (-width + 2.2, -9), (0, -10.8), (width - 2.2, -9), (width + 0.6, -5)]
        canvas.polygon([*parting, (width * 0.8, -12), (-width * 0.8, -12)], self.hair)
        for side in (-1, 1):
            canvas.polygon(
                [
                    (side * (width + 1), -7),
                    (side * (width - 1.6), -8),
                    (side * (width - 0.6), 0),
                    (side * (width + 1.2), 0),
                ],
                self.hair,
            )
        if self.scene.has("curls"):
            angles = np.linspace(np.pi * 1.02, np.pi * 1.98, 9)
            crown = [(float(np.cos(a)) * (width + 0.8), -4 + float(np.sin(a)) * (height - 1.2)) for a in angles]
            self._locks(crown, 3.3)
            self._locks([(x, -11.5) for x in np.linspace(-width * 0.6, width * 0.6, 5)], 2.6)
        else:
            self._strands([((x * 0.5, top + 2.2), (x, -10.2)) for x in (-8, -4, 0, 4, 8)])

    def _bangs(self) -> None:
        """A fringe down to the eyes: over the brows, so that it shows under a hat and behind glasses too."""
        canvas, width = self.canvas, self.width
        if self.scene.has("curls"):
            for y in (-8.4, -5.2):
                self._locks([(float(x), y) for x in np.linspace(-width * 0.76, width * 0.76, 6)], 2.6)
            return
        edges = np.linspace(-width * 0.92, width * 0.92, 7)
        points: list[Point] = [(-width * 0.96, -10)]
        for left, right in pairwise(edges):
            points += [(float(left), -4.4), (float(left + right) / 2, -2.5), (float(right), -4.4)]
        points += [(width * 0.96, -10), (width * 0.6, -13), (-width * 0.6, -13)]
        canvas.polygon(points, self.hair)
        canvas.line(points[1:-3], self.hair_shade, 0.9)
        for x in edges[1:-1]:
            canvas.line([(float(x) * 0.75, -12), (float(x), -4.4)], self.hair_shade, 0.8)
        self._strands([((float(x) * 0.75 + 1.2, -12), (float(x) + 1.2, -4.6)) for x in edges[1:-1:2]])

    # body and face

    def _shoulders(self) -> None:
        canvas = self.canvas
        neck = 4.6 if self.scene.has("female") else 6.2
        canvas.ellipse((0, 32), (24, 14), self.shirt)
        canvas.rectangle((-neck, 8), (neck, 20), self.skin_shade)
        canvas.ellipse((0, 19.5), (neck, 3), self.skin_shade)

    def _head(self) -> None:
        canvas, skin, width, height = self.canvas, self.scene.skin, self.width, self.height
        for side in (-1, 1):
            canvas.ellipse((side * width, 1.5), (2.2, 3.2), self.skin_shade)
            if self.scene.has("female"):
                canvas.ellipse((side * (width + 0.7), 6.6), (1.3, 1.9), _GOLD)
        canvas.ellipse((0, 0), (width, height), skin)
        if not self.scene.has("female"):
            canvas.polygon(
                [
                    (-width * 0.97, 3),
                    (width * 0.97, 3),
                    (width * 0.72, 12.6),
                    (3, 15.6),
                    (-3, 15.6),
                    (-width * 0.72, 12.6),
                ],
                skin,
            )

    def _eyes(self) -> None:
        canvas, female = self.canvas, self.scene.has("female")
        brow = self.hair_shade if self.scene.has("gray hair") else _mix(self.hair, (0, 0, 0), 0.3)
        for side in (-1, 1):
            x = side * 5.2
            canvas.ellipse((x, -0.6), (2.7, 1.9), _WHITE)
            canvas.ellipse((x, -0.6), (1.55, 1.7), EYE_COLORS[self.scene.eyes])
            canvas.ellipse((x, -0.6), (0.8, 0.9), _INK)
            if female:
                canvas.arc((x, -0.4), (3.1, 2.5), (190, 350), _INK, 0.9)
                canvas.line([(x + side * 2.4, -1.4), (x + side * 4.0, -2.8)], _INK, 0.8)
                canvas.line([(x - 2.5, -4.2), (x + 2.5, -4.2)], brow, 0.7)
            else:
                canvas.line([(x - side * 2.8, -3.7), (x + side * 3.2, -4.5)], brow, 1.7)

    def _nose(self) -> None:
        self.canvas.line([(0.6, 0.5), (1.4, 4.4), (-1.2, 4.8)], self.skin_shade, 0.9)

    def _makeup(self) -> None:
        canvas = self.canvas
        for side in (-1, 1):
            canvas.slice((side * 5.2, -1.0), (3.5, 3.0), (180, 360), (150, 64, 190))
            canvas.ellipse((side * 5.2, -0.3), (2.6, 1.6), _WHITE)
            canvas.ellipse((side * 5.2, -0.4), (1.5, 1.5), EYE_COLORS[self.scene.eyes])
            canvas.ellipse((side * 5.2, -0.4), (0.8, 0.9), _INK)
            canvas.ellipse((side * 7.6, 5.0), (2.7, 1.9), (232, 84, 120, 190))

    def _beard(self) -> None:
        canvas, width = self.canvas, self.width
        if "a long white beard" in self.scene.parts:
            self._long_beard([(-9.5, 7), (-6.5, 20), (0, 28), (6.5, 20), (9.5, 7)])
            return
        canvas.polygon(
            [
                (-width * 0.97, 2.5), (-width * 0.66, 5.4), (-5.6, 5.8), (0, 5.2), (5.6, 5.8), (width * 0.66, 5.4),
                (width * 0.97, 2.5), (width * 0.82, 11.8), (5.4, 17.2), (0, 18.4), (-5.4, 17.2), (-width * 0.82, 11.8),
            ],
            self.hair,
        )  # fmt: skip
        for x in (-6, -3, 0, 3, 6):
            canvas.line([(x * 1.05, 12.6), (x * 0.85, 16)], self.hair_shade, 0.6)
        self._strands([((x * 1.05 + 1.4, 12.2), (x * 0.85 + 1.2, 16)) for x in (-6, -2, 2, 5)])
        if "a braided beard" in self.scene.parts:
            for side in (-1, 1):
                for step in range(3):
                    canvas.ellipse((side * 3.2, 18 + 3.2 * step), (2.1, 2.0), self.hair)
                    canvas.line(
                        [(side * 3.2 - 1.6, 19.4 + 3.2 * step), (side * 3.2 + 1.6, 19.4 + 3.2 * step)],
                        self.hair_shade,
                        0.7,
                    )
                canvas.ellipse((side * 3.2, 27), (1.7, 1.2), _GOLD)

    def _long_beard(self, outline: Sequence[Point]) -> None:
        self.canvas.polygon([*outline, (5, 5.2), (-5, 5.2)], _WHITE)
        for x in (-4, 0, 4):
            self.canvas.line([(x, 12), (x * 0.5, 24)], (198, 200, 210), 0.7)

    def _mouth(self) -> None:
        canvas = self.canvas
        lips = (206, 26, 58) if self.scene.has("makeup") else _mix(self.scene.skin, (150, 40, 46), 0.6)
        thick = 1.9 if self.scene.has("makeup") else 1.1
        if self.scene.has("smile"):
            canvas.slice((0, 7.4), (6.0, 5.2), (0, 180), lips)
            canvas.slice((0, 7.9), (4.8, 3.2), (0, 180), _WHITE)
            canvas.line([(-6.4, 6.9), (-5.2, 8)], lips, 1)
            canvas.line([(6.4, 6.9), (5.2, 8)], lips, 1)
        else:
            canvas.line([(-3.7, 9.2), (3.7, 9.2)], lips, thick + 0.5)

    def _glasses(self) -> None:
        canvas = self.canvas
        for side in (-1, 1):
            canvas.ellipse((side * 5.4, -0.4), (4.5, 3.9), (225, 240, 255, 70))
            canvas.ring((side * 5.4, -0.4), (4.6, 4.0), _INK, 1.15)
            canvas.line([(side * 9.8, -1), (side * (self.width + 0.6), -2)], _INK, 1.1)
        canvas.line([(-1.2, -1), (1.2, -1)], _INK, 1.1)

    def _hat(self) -> None:
        """A bowler that sits high, so that bangs, curls and a bald head show under its brim."""
        canvas, width = self.canvas, self.width
        felt = _mix(self.shirt, (20, 20, 30), 0.45)
        canvas.slice((0, -12.5), (width * 0.86, 13), (180, 360), felt)
        canvas.rectangle((-width * 0.86, -15.2), (width * 0.86, -12.6), _mix(felt, (255, 255, 255), 0.7))
        canvas.ellipse((0, -12), (width + 4.2, 1.9), _mix(felt, (0, 0, 0), 0.2))

    def _pipe(self) -> None:
        canvas = self.canvas
        canvas.line([(3.5, 9.6), (9, 12.5), (13, 12)], (74, 42, 24), 1.6)
        canvas.rectangle((11.4, 7.6), (16.2, 13.2), (92, 50, 26))
        for x, y, size in ((14, 4.5, 2.0), (16, 0, 2.6), (15.4, -5.5, 3.2)):
            canvas.ellipse((x, y), (size, size * 0.85), (238, 238, 240, 170))

    # parts: clothes

    def _jacket(self, color: Color) -> None:
        self.canvas.ellipse((0, 32), (24.5, 14.5), color)

    def _dark_blue_robe(self) -> None:
        self._jacket((36, 44, 118))
        for x, y in ((-12, 22), (12, 22), (-18, 24.5), (18, 24.5)):
            self._star((x, y), 1.6, _GOLD)

    def _striped_shirt(self) -> None:
        self._jacket(_WHITE)
        for y in (20.5, 24.5):
            self.canvas.arc((0, 32), (24 - (y - 20.5), 12.5 - (y - 20.5)), (180, 360), (30, 34, 70), 2)
        self.canvas.ellipse((0, 18.5), (6, 2.5), self.skin_shade)

    def _white_jacket(self) -> None:
        self._jacket(_WHITE)
        for side in (-1, 1):
            for y in (22.5, 26.5):
                self.canvas.ellipse((side * 9, y), (1.1, 1.1), (60, 60, 70))

    def _fur_collar(self) -> None:
        self._jacket((92, 66, 46))
        for x in np.arange(-18, 19, 4.5):
            self.canvas.ellipse((float(x), 20.5 + abs(float(x)) * 0.16), (3.6, 3.6), (190, 160, 122))
            self.canvas.ellipse((float(x), 20.5 + abs(float(x)) * 0.16), (2.2, 2.2), (150, 118, 84))

    def _leather_vest(self) -> None:
        self._jacket((120, 72, 36))
        self.canvas.polygon([(-6, 18), (6, 18), (9, 30), (-9, 30)], (226, 206, 170))

    def _spiked_collar(self) -> None:
        self._jacket((30, 28, 32))
        self.canvas.rectangle((-7.4, 15), (7.4, 19), (24, 22, 26))
        for x in (-6, -2, 2, 6):
            self.canvas.polygon([(x - 1.5, 16), (x + 1.5, 16), (x, 21.6)], (226, 228, 236))

    def _scrubs(self) -> None:
        turquoise = (58, 188, 190)
        self._jacket(turquoise)
        self.canvas.polygon([(-5.5, 17), (5.5, 17), (0, 25)], self.skin_shade)
        self.canvas.line([(-5.5, 17), (0, 25), (5.5, 17)], _mix(turquoise, (0, 0, 0), 0.35), 1)

    def _space_suit(self) -> None:
        self._jacket((234, 236, 240))
        self.canvas.ellipse((0, 20), (15, 4.5), (150, 156, 170))
        self.canvas.rectangle((-15, 22.5), (-10, 26), (206, 60, 50))
        self.canvas.rectangle((10, 22.5), (15, 26), (50, 90, 190))

    def _ruffled_collar(self) -> None:
        self._jacket((246, 206, 60))
        for index, x in enumerate(np.arange(-14, 15, 4)):
            color = (230, 60, 70) if index % 2 else _WHITE
            self.canvas.ellipse((float(x), 19.5), (3, 3.6), color)

    def _purple_robe(self) -> None:
        self._jacket((104, 40, 140))
        self.canvas.arc((0, 32), (22.3, 12.3), (180, 360), _GOLD, 1.6)

    def _beige_coat(self) -> None:
        self._jacket((206, 180, 136))
        for side in (-1, 1):
            self.canvas.polygon([(side * 4, 17), (side * 12, 18.5), (side * 3, 28)], (176, 148, 104))

    # parts: accessories

    def _neckerchief(self) -> None:
        self.canvas.polygon([(-8, 15.5), (8, 15.5), (3, 21), (0, 25), (-3, 21)], (204, 36, 44))

    def _sheriff_star(self) -> None:
        self._star((14, 24), 4.4, _GOLD)

    def _stethoscope(self) -> None:
        self.canvas.arc((0, 16), (8, 10), (10, 170), (40, 42, 52), 1.5)
        self.canvas.ellipse((3, 26), (2.2, 2.2), (206, 210, 220))

    def _ermine_collar(self) -> None:
        self.canvas.polygon([(-14, 18), (14, 18), (17, 24), (0, 28.5), (-17, 24)], _WHITE)
        for x, y in ((-11, 21), (-6, 23.4), (0, 24.6), (6, 23.4), (11, 21)):
            self.canvas.ellipse((x, y), (0.9, 1.5), _INK)

    def _magnifying_glass(self) -> None:
        self.canvas.line([(15, 20), (19, 27)], (70, 44, 26), 2.4)
        self.canvas.ellipse((13, 15), (5.6, 5.6), (216, 236, 250, 170))
        self.canvas.ring((13, 15), (6.2, 6.2), (60, 56, 60), 1.6)

    # parts: faces

    def _eye_patch(self) -> None:
        self.canvas.line([(-self.width, -5.5), (self.width, 1.6)], _INK, 1)
        self.canvas.ellipse((-5.2, -0.7), (3.7, 3.3), _INK)

    def _nose_ring(self) -> None:
        self.canvas.ring((0, 6), (3.0, 2.8), _INK, 1.5)

    def _ball_nose(self) -> None:
        self.canvas.ellipse((0, 3.6), (3.2, 3.1), (226, 30, 38))
        self.canvas.ellipse((-1, 2.6), (0.9, 0.8), (255, 180, 180))

    # parts: heads

    def _star(self, center: Point, size: float, color: Color) -> None:
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, size, size * 0.42)
        points = np.stack([center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)], axis=1)
        self.canvas.polygon([(float(x), float(y)) for x, y in points], color)

    def _pointed_hat(self) -> None:
        blue = (44, 54, 150)
        self.canvas.polygon([(-self.width - 1, -10.5), (self.width + 1, -10.5), (2, -36)], blue)
        self.canvas.ellipse((0, -10.5), (self.width + 5, 2.2), _mix(blue, (0, 0, 0), 0.25))
        for x, y, size in ((-4, -16, 2.4), (4, -18, 2.2), (0, -24, 2)):
            self._star((x, y), size, _GOLD)

    def _bandana(self) -> None:
        canvas, red = self.canvas, (200, 34, 42)
        canvas.slice((0, -5), (self.width + 1.4, self.height - 2.5), (186, 354), red)
        canvas.polygon([(-self.width - 1, -8.5), (self.width + 1, -8.5), (self.width, -5.4), (-self.width, -5.4)], red)
        canvas.polygon([(self.width, -7), (self.width + 6, -4), (self.width + 5, 2), (self.width + 1, -4)], red)
        for x, y in ((-7, -10), (-2, -13), (3, -10), (8, -11)):
            canvas.ellipse((x, y), (1, 1), _WHITE)

    def _toque(self) -> None:
        shade = (214, 216, 222)
        for x, y in ((-8, -24), (0, -27), (8, -24), (-4, -21), (4, -21)):
            self.canvas.ellipse((x, y), (6.4, 6), _WHITE)
        for x in (-5, 5):
            self.canvas.arc((x, -23), (4, 5), (40, 150), shade, 0.9)
        self.canvas.rectangle((-self.width * 0.9, -20), (self.width * 0.9, -10.5), _WHITE)
        self.canvas.line([(-self.width * 0.9, -18.5), (self.width * 0.9, -18.5)], shade, 1)

    def _horned_helmet(self) -> None:
        canvas, steel = self.canvas, (150, 156, 168)
        for side in (-1, 1):
            horn = [(side * 10.5, -14), (side * 17, -16), (side * 19, -27), (side * 14.5, -20), (side * 10, -19)]
            canvas.polygon(horn, (240, 228, 196))
        canvas.slice((0, -8), (self.width + 1.2, 13.5), (180, 360), steel)
        canvas.rectangle((-self.width - 1.2, -10.2), (self.width + 1.2, -7), (196, 150, 60))
        canvas.rectangle((-1.5, -21), (1.5, -8), (196, 150, 60))

    def _wide_hat(self) -> None:
        canvas, felt = self.canvas, (132, 84, 44)
        canvas.polygon(
            [
                (-self.width * 0.8, -10),
                (-self.width * 0.72, -24),
                (-3, -22),
                (3, -22),
                (self.width * 0.72, -24),
                (self.width * 0.8, -10),
            ],
            felt,
        )
        canvas.rectangle((-self.width * 0.8, -14), (self.width * 0.8, -11.4), (70, 40, 20))
        canvas.slice((0, -13.8), (self.width + 12, 5.2), (0, 180), _mix(felt, (0, 0, 0), 0.12))

    def _mohawk(self) -> None:
        green = (64, 206, 70)
        for x in (-4.2, -2.1, 0, 2.1, 4.2):
            self.canvas.polygon([(x * 0.8 - 2.2, -11.5), (x * 0.8 + 2.2, -11.5), (x * 1.9, -30 + abs(x))], green)
        for x in (-2, 1.5):
            self.canvas.line([(x, -13), (x * 1.6, -25)], (28, 140, 44), 0.7)

    def _nurse_cap(self) -> None:
        top = [(-9.5, -21), (9.5, -21), (11.5, -11), (-11.5, -11)]
        self.canvas.polygon(top, _WHITE)
        self.canvas.rectangle((-1.3, -20), (1.3, -12.4), (212, 30, 40))
        self.canvas.rectangle((-4, -17.4), (4, -14.9), (212, 30, 40))

    def _glass_helmet(self) -> None:
        canvas = self.canvas
        canvas.ellipse((0, -0.5), (20, 20.5), (190, 220, 250, 46))
        canvas.ring((0, -0.5), (20.6, 21), (226, 230, 238), 2.6)
        canvas.arc((0, -0.5), (16, 16.5), (200, 245), _WHITE, 1.8)

    def _rainbow_wig(self) -> None:
        canvas, width = self.canvas, self.width
        colors = ((226, 52, 60), (246, 150, 40), (246, 220, 60), (70, 180, 80), (60, 120, 210), (150, 70, 180))
        angles = np.linspace(np.pi * 0.93, np.pi * 2.07, 12)
        for index, angle in enumerate(angles):
            x, y = float(np.cos(angle)) * (width + 3), -4 + float(np.sin(angle)) * (self.height - 0.5)
            canvas.ellipse((x, y), (4.5, 4.5), colors[index // 2])

    def _crown(self) -> None:
        canvas, width = self.canvas, self.width * 0.95
        points = [
            (-width, -10.5),
            (-width - 1, -23),
            (-width * 0.5, -16.5),
            (0, -26),
            (width * 0.5, -16.5),
            (width + 1, -23),
            (width, -10.5),
        ]
        canvas.polygon(points, _GOLD)
        canvas.rectangle((-width, -12.8), (width, -10.2), (206, 152, 26))
        for x, y in ((-width - 1, -23), (0, -26), (width + 1, -23)):
            canvas.ellipse((x, y), (1.6, 1.6), (206, 30, 50))
        for x, color in ((-6, (40, 90, 200)), (0, (206, 30, 50)), (6, (40, 90, 200))):
            canvas.ellipse((x, -14.8), (1.4, 1.4), color)

    def _deerstalker(self) -> None:
        canvas, width = self.canvas, self.width
        wool, check = (150, 120, 80), (92, 70, 46)
        canvas.slice((0, -9), (width + 0.6, 14), (180, 360), wool)
        for x in (-8, -2.7, 2.7, 8):
            canvas.line([(x, -10), (x * 0.72, -20.5)], check, 0.9)
        for y in (-12.5, -17):
            canvas.line([(-width * 0.9 + (-12 - y) * -0.35, y), (width * 0.9 - (-12 - y) * -0.35, y)], check, 0.9)
        canvas.slice((0, -9.6), (width + 4.5, 4), (0, 180), check)
        canvas.ellipse((0, -23), (1.8, 1.4), check)


_PARTS: Mapping[str | None, Callable[[_Painter], None]] = {
    "a pointed blue hat with stars": _Painter._pointed_hat,
    "a red bandana": _Painter._bandana,
    "a tall white toque": _Painter._toque,
    "a horned helmet": _Painter._horned_helmet,
    "a wide brown hat": _Painter._wide_hat,
    "a green mohawk": _Painter._mohawk,
    "a white cap with a red cross": _Painter._nurse_cap,
    "a round glass helmet": _Painter._glass_helmet,
    "a rainbow wig": _Painter._rainbow_wig,
    "a golden crown": _Painter._crown,
    "a checked deerstalker cap": _Painter._deerstalker,
    "an eye patch": _Painter._eye_patch,
    "a nose ring": _Painter._nose_ring,
    "a red ball nose": _Painter._ball_nose,
    "a dark blue robe": _Painter._dark_blue_robe,
    "a striped shirt": _Painter._striped_shirt,
    "a white jacket with buttons": _Painter._white_jacket,
    "a fur collar": _Painter._fur_collar,
    "a leather vest": _Painter._leather_vest,
    "a spiked collar": _Painter._spiked_collar,
    "turquoise scrubs": _Painter._scrubs,
    "a white space suit": _Painter._space_suit,
    "a ruffled collar": _Painter._ruffled_collar,
    "a purple robe": _Painter._purple_robe,
    "a beige coat": _Painter._beige_coat,
    "a red neckerchief": _Painter._neckerchief,
    "a sheriff star": _Painter._sheriff_star,
    "a stethoscope": _Painter._stethoscope,
    "an ermine collar": _Painter._ermine_collar,
}
"""What draws each part; the beards are drawn with the face, and the magnifying glass over everything."""


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of 64 x 64 pixels; the same scene always gives the same pixels."""
    large = _Painter(scene).paint()
    small = large.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return apply_style(small.filter(_LENS), scene)
