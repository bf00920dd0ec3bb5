#!/usr/bin/env python3
"""Makes examples/portrait.png and examples/voice.wav, the inputs that Talkie ships.

Both are ours: the portrait is drawn below, the voice is spoken by espeak-ng.
Needs Python 3.9 (standard library only) and `espeak-ng` (apt-get install espeak-ng) for the voice.
The portrait comes out the same, byte for byte, on every machine with the same zlib; the voice depends on
the version of espeak-ng (1.51 made the one in the repository).

    scripts/make-examples.py [--out DIR] [portrait|voice ...]
"""

import argparse
import math
import struct
import subprocess
import wave
import zlib
from pathlib import Path

WIDTH, HEIGHT = 512, 640
SENTENCE = "Hello, nice to meet you! I was a drawing, and now I can talk."
SECONDS = 4.0


# --- Drawing: smooth closed curves, filled with anti-aliasing, softly blurred where they are light. ---


def curve(points, mirror=False, steps=12):
    """A closed Catmull-Rom curve through `points`; `mirror` adds the left half of a right half."""
    if mirror:
        points = points + [(WIDTH - x, y) for x, y in reversed(points) if abs(x - WIDTH / 2) > 0.5]
    count, path = len(points), []
    for i in range(count):
        p = [points[(i + k) % count] for k in (-1, 0, 1, 2)]
        for s in range(steps):
            t = s / steps
            path.append(
                tuple(
                    0.5 * (2 * p[1][c] + (p[2][c] - p[0][c]) * t
                           + (2 * p[0][c] - 5 * p[1][c] + 4 * p[2][c] - p[3][c]) * t * t
                           + (3 * p[1][c] - p[0][c] - 3 * p[2][c] + p[3][c]) * t ** 3)
                    for c in (0, 1)
                )
            )
    return path


def ellipse(x, y, rx, ry, angle=0.0, steps=96):
    cos, sin, path = math.cos(angle), math.sin(angle), []
    for i in range(steps):
        a = 2 * math.pi * i / steps
        u, v = rx * math.cos(a), ry * math.sin(a)
        path.append((x + u * cos - v * sin, y + u * sin + v * cos))
    return path


def stroke(points, widths, steps=12):
    """A brush stroke along an open curve whose half width follows `widths`."""
    def at(values, t):
        i = min(int(t), len(values) - 2)
        p = [values[max(0, min(len(values) - 1, i + k))] for k in (-1, 0, 1, 2)]
        t -= i
        return 0.5 * (2 * p[1] + (p[2] - p[0]) * t + (2 * p[0] - 5 * p[1] + 4 * p[2] - p[3]) * t * t
                      + (3 * p[1] - p[0] - 3 * p[2] + p[3]) * t ** 3)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    upper, lower = [], []
    total = (len(points) - 1) * steps
    for s in range(total + 1):
        t = s / steps
        a, b = max(0.0, t - 0.02), min(len(points) - 1.0, t + 0.02)
        dx, dy = at(xs, b) - at(xs, a), at(ys, b) - at(ys, a)
        length = math.hypot(dx, dy) or 1.0
        half = max(0.0, at(widths, t))
        x, y = at(xs, t), at(ys, t)
        upper.append((x + dy / length * half, y - dx / length * half))
        lower.append((x - dy / length * half, y + dx / length * half))
    return upper + lower[::-1]


SUB_ROWS = 8


class Mask:
    """Coverage 0…1 of each pixel in a rectangle."""

    def __init__(self, x0, y0, rows):
        self.x0, self.y0, self.rows = x0, y0, rows

    @staticmethod
    def fill(path, pad=0):
        """Exact across, SUB_ROWS samples down."""
        x0 = math.floor(min(x for x, _ in path)) - pad
        x1 = math.ceil(max(x for x, _ in path)) + pad
        y0 = math.floor(min(y for _, y in path)) - pad
        y1 = math.ceil(max(y for _, y in path)) + pad
        width = x1 - x0
        rows = [[0.0] * width for _ in range(y1 - y0)]
        crossings = {}
        for (ax, ay), (bx, by) in zip(path, path[1:] + path[:1]):
            if ay == by:
                continue
            direction = 1
            if ay > by:
                ax, ay, bx, by, direction = bx, by, ax, ay, -1
            first = math.ceil(ay * SUB_ROWS - 0.5)
            for line in range(first, math.ceil(by * SUB_ROWS - 0.5)):
                y = (line + 0.5) / SUB_ROWS
                crossings.setdefault(line, []).append((ax + (bx - ax) * (y - ay) / (by - ay), direction))
        for line, found in crossings.items():
            row = rows[line // SUB_ROWS - y0]
            found.sort()
            winding = 0
            for (a, direction), (b, _) in zip(found, found[1:]):
                winding += direction
                if winding == 0:
                    continue
                a, b = a - x0, b - x0
                i, j = int(a), int(b)
                if i == j:
                    row[i] += (b - a) / SUB_ROWS
                else:
                    row[i] += (i + 1 - a) / SUB_ROWS
                    for k in range(i + 1, j):
                        row[k] += 1 / SUB_ROWS
                    if j < width:
                        row[j] += (b - j) / SUB_ROWS
        return Mask(x0, y0, rows)

    def blur(self, radius):
        """Three box blurs each way, which are nearly a Gaussian."""
        def box(line):
            out, total, span = [], 0.0, 2 * radius + 1
            padded = [line[0]] * radius + line + [line[-1]] * radius
            total = sum(padded[:span])
            for i in range(len(line)):
                out.append(total / span)
                if i + span < len(padded):
                    total += padded[i + span] - padded[i]
            return out
        rows = self.rows
        for _ in range(2):
            for _ in range(3):
                rows = [box(row) for row in rows]
            rows = [list(column) for column in zip(*rows)]
        self.rows = rows
        return self

    def clip(self, other):
        for r, row in enumerate(self.rows):
            source = r + self.y0 - other.y0
            for c in range(len(row)):
                column = c + self.x0 - other.x0
                inside = 0 <= source < len(other.rows) and 0 <= column < len(other.rows[source])
                row[c] *= other.rows[source][column] if inside else 0.0
        return self


class Picture:
    def __init__(self, colour):
        """`colour(x, y)` in 0…255 fills the background."""
        self.rows = [[colour(x, y) for x in range(WIDTH)] for y in range(HEIGHT)]

    def paint(self, mask, colour, opacity=1.0):
        """Paints with an RGB triple, or with a function of (x, y)."""
        plain = not callable(colour)
        for r, line in enumerate(mask.rows):
            y = r + mask.y0
            if not 0 <= y < HEIGHT:
                continue
            row = self.rows[y]
            for c, cover in enumerate(line):
                x = c + mask.x0
                if cover <= 0.0 or not 0 <= x < WIDTH:
                    continue
                a = min(1.0, cover) * opacity
                new = colour if plain else colour(x, y)
                old = row[x]
                row[x] = tuple(o + (n - o) * a for o, n in zip(old, new))

    def png(self):
        """8-bit RGB, each row with the filter that leaves the smallest differences."""
        raw, above = bytearray(), bytes(3 * WIDTH)
        for row in self.rows:
            line = bytes(max(0, min(255, int(v + 0.5))) for pixel in row for v in pixel)
            left = bytes(3) + line[:-3]
            corner = bytes(3) + above[:-3]
            def paeth(a, b, c):
                p = a + b - c
                return min(((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c)))[2]
            filters = [
                line,
                bytes((x - a) & 255 for x, a in zip(line, left)),
                bytes((x - b) & 255 for x, b in zip(line, above)),
                bytes((x - (a + b) // 2) & 255 for x, a, b in zip(line, left, above)),
                bytes((x - paeth(a, b, c)) & 255 for x, a, b, c in zip(line, left, above, corner)),
            ]
            cost = [sum(min(v, 256 - v) for v in candidate) for candidate in filters]
            best = cost.index(min(cost))
            raw += bytes([best]) + filters[best]
            above = line
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(raw), 9))
                + chunk(b"IEND", b""))


def mix(a, b, t):
    t = max(0.0, min(1.0, t))
    return tuple(p + (q - p) * t for p, q in zip(a, b))


def vertical(top, bottom, y0, y1):
    return lambda _x, y: mix(top, bottom, (y - y0) / (y1 - y0))


def flip(path):
    return [(WIDTH - x, y) for x, y in path]


# --- The portrait: light from the upper left. ---

SKIN, SKIN_LIGHT, SKIN_SHADE, SKIN_DEEP = (238, 190, 160), (252, 218, 194), (208, 146, 118), (166, 100, 80)
HAIR, HAIR_LIGHT, HAIR_DARK = (92, 56, 40), (150, 98, 66), (52, 30, 24)
SWEATER, SWEATER_LIGHT, SWEATER_DARK = (44, 96, 112), (82, 144, 156), (24, 58, 72)
LIP, LIP_DARK, LIP_LIGHT = (200, 100, 98), (132, 52, 54), (232, 150, 142)


def background(x, y):
    wall = mix((236, 222, 200), (176, 186, 184), y / HEIGHT * 0.75 + x / WIDTH * 0.25)
    glow = math.exp(-(((x - 190) / 230) ** 2 + ((y - 200) / 260) ** 2))
    return mix(wall, (255, 246, 226), 0.6 * glow)


def draw():
    picture = Picture(background)

    def soft(path, colour, blur, opacity, inside=None):
        mask = Mask.fill(path, pad=3 * blur + 2).blur(blur)
        picture.paint(mask.clip(inside) if inside else mask, colour, opacity)

    def solid(path, colour, opacity=1.0, inside=None):
        mask = Mask.fill(path, pad=1)
        picture.paint(mask.clip(inside) if inside else mask, colour, opacity)
        return mask

    # Hair behind the head, down to the shoulders.
    back = curve([(256, 64), (322, 74), (384, 122), (408, 214), (412, 320), (418, 410), (404, 466),
                  (350, 482), (256, 470)], mirror=True)
    soft([(x + 8, y + 10) for x, y in back], (120, 112, 104), 14, 0.35)
    solid(back, vertical(mix(HAIR, HAIR_LIGHT, 0.25), HAIR_DARK, 60, 420))

    # Shoulders and sweater.
    body = curve([(256, 476), (312, 474), (352, 494), (424, 520), (476, 556), (500, 620), (508, 700),
                  (256, 720)], mirror=True)
    sweater = solid(body, lambda x, y: mix(SWEATER_LIGHT, SWEATER, (x - 60) / 260 + (y - 480) / 400))
    soft(curve([(420, 510), (520, 560), (530, 700), (400, 700), (440, 600)]), SWEATER_DARK, 20, 0.7, sweater)
    soft(curve([(80, 560), (150, 520), (190, 530), (130, 600), (70, 650)]), SWEATER_LIGHT, 16, 0.55, sweater)
    for x in (132, 380):
        soft(stroke([(x, 560), (x + (256 - x) * 0.06, 600), (x + (256 - x) * 0.1, 650)], [1, 5, 6]),
             SWEATER_DARK, 4, 0.5, sweater)

    # Neck, with the shadow of the chin, and the collar around it.
    neck = curve([(256, 380), (310, 384), (312, 430), (318, 470), (344, 494), (300, 526), (256, 532)],
                 mirror=True)
    neck_mask = solid(neck, lambda x, _y: mix(SKIN, SKIN_SHADE, (x - 200) / 140))
    soft(curve([(196, 380), (256, 452), (330, 380), (326, 440), (262, 478), (196, 436)]), SKIN_DEEP, 10, 0.75,
         neck_mask)
    soft(stroke([(222, 470), (236, 500), (252, 522)], [1, 3, 1]), SKIN_DEEP, 4, 0.45, neck_mask)
    soft(stroke([(292, 470), (280, 500), (264, 522)], [1, 3, 1]), SKIN_DEEP, 4, 0.45, neck_mask)
    collar = stroke([(160, 490), (186, 520), (220, 540), (256, 546), (292, 540), (326, 520), (352, 490)],
                    [11, 12, 12, 12, 12, 12, 11])
    soft([(x, y + 6) for x, y in collar], SWEATER_DARK, 5, 0.6, sweater)
    solid(collar, lambda x, y: mix(SWEATER_LIGHT, SWEATER, (x - 130) / 220))
    for i in range(-11, 12):
        a = i / 11 * 1.12
        x, y = 256 + 96 * math.sin(a), 456 + 86 * math.cos(a) + 6 * abs(math.sin(a))
        solid(stroke([(x, y - 8), (x + 4 * math.sin(a), y + 8)], [0.8, 0.8]), SWEATER_DARK, 0.28)

    # The face.
    face = curve([(256, 116), (318, 126), (362, 168), (378, 236), (374, 298), (356, 350), (322, 396),
                  (284, 422), (256, 427)], mirror=True)
    def skin(x, y):
        return mix(SKIN_LIGHT, SKIN, ((x - 150) * 0.6 + (y - 130) * 0.35) / 190)
    head = solid(face, skin)
    soft(curve([(352, 180), (390, 220), (392, 340), (320, 430), (256, 440), (312, 384), (346, 320)]),
         SKIN_SHADE, 18, 0.75, head)
    soft(curve([(120, 240), (144, 230), (158, 320), (200, 392), (256, 430), (200, 440), (130, 350)]),
         SKIN_SHADE, 13, 0.4, head)
    for x, tint in ((178, 0.42), (334, 0.46)):
        soft(ellipse(x, 320, 30, 22), (232, 120, 108), 15, tint, head)
    soft(ellipse(226, 172, 60, 26), (255, 236, 218), 18, 0.55, head)
    soft(ellipse(184, 296, 24, 12, 0.3), (255, 236, 220), 9, 0.5, head)
    soft(ellipse(254, 406, 20, 9), (255, 228, 208), 7, 0.45, head)

    # Eyes.
    for x, side in ((200, lambda path: path), (312, lambda path: flip(path))):
        def here(points):
            return side([(px, py) for px, py in points])
        socket = here(ellipse(200, 244, 38, 24))
        soft(socket, SKIN_SHADE, 10, 0.5, head)
        white = here(curve([(170, 254), (180, 240), (199, 233), (219, 239), (230, 256), (216, 265), (199, 268),
                            (182, 264)]))
        eye = solid(white, vertical((236, 232, 230), (254, 253, 251), 234, 264))
        centre = x + (1 if x < 256 else -1)
        solid(ellipse(centre, 251, 15.5, 16), (62, 42, 32), 1.0, eye)
        solid(ellipse(centre, 251, 14, 14.5), lambda px, py: mix((86, 58, 40), (158, 112, 70), (py - 244) / 20),
              1.0, eye)
        solid(ellipse(centre, 251, 6.6, 6.8), (20, 14, 14), 1.0, eye)
        soft(here(curve([(168, 252), (180, 236), (200, 229), (221, 235), (232, 254), (218, 246), (199, 241),
                         (182, 246)])), (70, 46, 44), 3, 0.45, eye)
        solid(ellipse(centre - 5, 245, 3.8, 4.2), (255, 255, 255), 0.95, eye)
        solid(ellipse(centre + 5, 257, 1.8, 1.8), (255, 255, 255), 0.55, eye)
        solid(here(stroke([(166, 256), (179, 240), (199, 232), (220, 238), (233, 257)],
                          [1.2, 2.6, 3.1, 2.7, 0.9])), (48, 28, 24))
        for lash in (((171, 250), (163, 244)), ((178, 241), (171, 233)), ((188, 235), (184, 227))):
            solid(here(stroke([lash[0], ((lash[0][0] + lash[1][0]) / 2 + 1, (lash[0][1] + lash[1][1]) / 2),
                               lash[1]], [1.6, 1.1, 0.2])), (48, 28, 24))
        soft(here(stroke([(178, 264), (198, 269), (218, 264)], [0.4, 1.2, 0.4])), (150, 92, 78), 1, 0.7)
        soft(here(stroke([(172, 234), (198, 222), (226, 232)], [0.5, 1.6, 0.5])), SKIN_DEEP, 2, 0.55)
        soft(here(stroke([(182, 276), (200, 281), (220, 275)], [0.4, 2.2, 0.4])), SKIN_SHADE, 3, 0.5)
        brow = here(stroke([(162, 220), (180, 205), (202, 201), (230, 208)], [1.0, 4.4, 5.2, 3.6]))
        soft(brow, HAIR, 1, 0.9)

    # Nose.
    soft(curve([(262, 236), (272, 262), (280, 300), (272, 318), (262, 300)]), SKIN_SHADE, 7, 0.5, head)
    soft(stroke([(250, 240), (249, 275), (250, 302)], [3, 4, 6]), (255, 238, 222), 5, 0.65, head)
    soft(ellipse(252, 306, 11, 8), (255, 236, 220), 5, 0.55, head)
    soft(stroke([(228, 312), (240, 326), (256, 329), (272, 326), (284, 312)], [2, 3.4, 3.4, 3.4, 2]),
         SKIN_DEEP, 4, 0.5, head)
    for path in (ellipse(242, 321, 6, 2.8, 0.25), ellipse(270, 321, 6, 2.8, -0.25)):
        soft(path, (120, 62, 52), 1, 0.8)
    soft(stroke([(229, 304), (226, 314), (232, 321)], [0.4, 1.6, 0.5]), SKIN_DEEP, 2, 0.6)
    soft(stroke([(283, 304), (286, 314), (280, 321)], [0.4, 1.6, 0.5]), SKIN_DEEP, 2, 0.6)

    # Mouth: a closed, friendly smile.
    upper = curve([(208, 360), (228, 353), (246, 349), (256, 352), (266, 349), (284, 353), (304, 360),
                   (282, 365), (256, 367), (230, 365)])
    lower = curve([(208, 360), (230, 365), (256, 367), (282, 365), (304, 360), (290, 376), (272, 384),
                   (256, 386), (240, 384), (222, 376)])
    soft(lower + [], SKIN_SHADE, 6, 0.5, head)
    solid(upper, vertical(LIP, (182, 84, 84), 350, 366))
    lips = solid(lower, vertical((206, 108, 104), (218, 124, 118), 362, 386))
    soft(ellipse(250, 375, 20, 4), LIP_LIGHT, 3, 0.8, lips)
    solid(stroke([(203, 358), (212, 361), (232, 365), (256, 367), (280, 365), (300, 361), (309, 358)],
                 [0.5, 1.5, 1.5, 1.3, 1.5, 1.5, 0.5]), LIP_DARK)
    for corner in (stroke([(200, 353), (203, 359), (201, 366)], [0.4, 2.2, 0.4]),
                   stroke([(312, 353), (309, 359), (311, 366)], [0.4, 2.2, 0.4])):
        soft(corner, SKIN_DEEP, 3, 0.6)
    soft(stroke([(238, 394), (256, 397), (274, 394)], [0.5, 3, 0.5]), SKIN_SHADE, 4, 0.75, head)
    soft(stroke([(252, 334), (253, 345)], [1.5, 2.2]), SKIN_SHADE, 3, 0.5, head)
    for fold in (stroke([(222, 318), (206, 334), (196, 352)], [0.4, 2, 0.4]),
                 stroke([(290, 318), (306, 334), (316, 352)], [0.4, 2, 0.4])):
        soft(fold, SKIN_SHADE, 4, 0.55, head)

    # Hair in front: parted on the right, falling to both sides; first its shadow on the forehead.
    left = curve([(304, 86), (256, 72), (194, 82), (136, 124), (108, 206), (102, 300), (97, 390), (98, 446),
                  (114, 473), (142, 468), (154, 400), (142, 310), (146, 250), (170, 204), (218, 168), (272, 140)])
    right = curve([(288, 92), (328, 86), (378, 126), (403, 208), (409, 300), (414, 390), (413, 446), (398, 473),
                   (370, 468), (360, 400), (374, 310), (370, 250), (352, 196), (322, 158), (294, 132)])
    for lock in (left, right):
        soft([(x + 3, y + 9) for x, y in lock], SKIN_DEEP, 7, 0.55, head)
    for lock, span in ((left, (100, 270)), (right, (300, 420))):
        mask = solid(lock, lambda x, y, span=span: mix(HAIR_LIGHT, HAIR, (x - span[0]) / (span[1] - span[0])
                                                       + (y - 90) / 500))
        for i in range(7):
            t = i / 6
            if lock is left:
                points = [(290 - 6 * t, 100 + 36 * t), (214 - 24 * t, 108 + 56 * t), (134 + 18 * t, 170 + 48 * t),
                          (106 + 36 * t, 280 + 10 * t), (101 + 48 * t, 390), (104 + 36 * t, 466)]
            else:
                points = [(296 + 4 * t, 100 + 30 * t), (336 - 8 * t, 106 + 46 * t), (386 - 24 * t, 160 + 50 * t),
                          (406 - 32 * t, 280), (411 - 48 * t, 390), (407 - 34 * t, 466)]
            shade = HAIR_DARK if i % 2 else (178, 122, 82)
            soft(stroke(points, [0.5, 2.2, 3, 2.6, 2, 0.5]), shade, 2, 0.32 if i % 2 else 0.3, mask)
    soft(stroke([(300, 92), (294, 112), (286, 136)], [0.5, 1.4, 0.5]), HAIR_DARK, 1, 0.6)
    crown = curve([(150, 150), (196, 104), (250, 92), (262, 104), (206, 122), (160, 168)])
    soft(crown, (206, 150, 104), 9, 0.4)
    soft(curve([(338, 112), (372, 146), (386, 190), (374, 184), (352, 146)]), (196, 140, 98), 7, 0.35)
    return picture


def speak(path):
    """The sentence as mono 16-bit WAV at espeak-ng's 22,050 Hz, cut or padded to SECONDS."""
    command = ["espeak-ng", "-v", "en-us+f3", "-s", "170", "-p", "52", "-w", str(path), SENTENCE]
    subprocess.run(command, check=True)
    with wave.open(str(path)) as source:
        params, data = source.getparams(), source.readframes(source.getnframes())
    if (params.nchannels, params.sampwidth) != (1, 2):
        raise SystemExit(f"espeak-ng made {params}, expected mono 16 bit")
    samples = struct.unpack(f"<{len(data) // 2}h", data)
    loud = [i for i, s in enumerate(samples) if abs(s) > 200]
    lead, length = params.framerate // 10, int(SECONDS * params.framerate)
    spoken = samples[max(0, loud[0] - lead):loud[-1] + lead]
    if len(spoken) > length:
        raise SystemExit(f"the sentence lasts {len(spoken) / params.framerate:.2f} s, expected at most {SECONDS}")
    spoken = list(spoken) + [0] * (length - len(spoken))
    with wave.open(str(path), "wb") as target:
        target.setparams(params)
        target.writeframes(struct.pack(f"<{length}h", *spoken))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=["portrait", "voice", []], help="default: both")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "examples")
    arguments = parser.parse_args()
    what = arguments.what or ["portrait", "voice"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    if "portrait" in what:
        (arguments.out / "portrait.png").write_bytes(draw().png())
    if "voice" in what:
        speak(arguments.out / "voice.wav")


if __name__ == "__main__":
    main()
