"""The demo model's world: what can be drawn, how it is said, and the drawing.

Flat shapes on a plain background, a caption for each picture, and the numbers that a caption states: no data set is needed.
"""
import copy
import random
import re
from collections import Counter

import numpy as np

SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "heart"]
SHAPE_WORDS = {  # (singular, plural, weight)
    "circle": [("circle", "circles", 8), ("disc", "discs", 1), ("dot", "dots", 1)],
    "square": [("square", "squares", 9), ("box", "boxes", 1)],
    "triangle": [("triangle", "triangles", 1)],
    "star": [("star", "stars", 9), ("five-pointed star", "five-pointed stars", 1)],
    "ring": [("ring", "rings", 8), ("donut", "donuts", 1), ("hoop", "hoops", 1)],
    "cross": [("cross", "crosses", 8), ("plus sign", "plus signs", 2)],
    "heart": [("heart", "hearts", 1)],
}
COLOURS = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (250, 215, 50), "green": (45, 160, 70),
    "cyan": (50, 200, 215), "blue": (45, 85, 215), "purple": (130, 60, 180), "pink": (250, 130, 185),
    "black": (20, 20, 20), "white": (250, 250, 250),
}
COLOUR_NAMES = list(COLOURS)
COLOUR_WORDS = {
    "red": ["red"] * 9 + ["crimson", "scarlet"], "purple": ["purple"] * 5 + ["violet"],
    "cyan": ["cyan"] * 5 + ["turquoise"], "yellow": ["yellow"] * 9 + ["golden"],
}
SIZES = ["small", "medium", "large"]
SIZE_WORDS = {"small": ["small"] * 3 + ["tiny", "little"], "large": ["large"] * 3 + ["big", "huge", "giant"]}
RADIUS = {  # by number of objects, in units of the shorter side
    1: {"small": (.12, .15), "medium": (.21, .27), "large": (.34, .41)},
    2: {"small": (.11, .13), "medium": (.16, .19), "large": (.21, .23)},
    3: {"small": (.09, .105), "medium": (.12, .135), "large": (.14, .15)},
}
PREFIXES = ["a picture of ", "an image of ", "a drawing of ", "an illustration of ", "a simple picture of ", "there is "]
SUFFIXES = [", flat vector art", ", minimalist", ", simple shapes", ", high quality", ", flat design",
            ", clean lines", ", digital art", ", poster design"]
MAX_OBJECTS = 3
MARGIN, GAP = .03, .035
FILLER = []


class Thing:
    """One drawn object; x, y, r are in units of the shorter image side."""

    def __init__(self, rng, n, not_colours=()):
        self.shape = rng.choice(SHAPES)
        self.colour = rng.choice([c for c in COLOUR_NAMES if c not in not_colours])
        self.size = rng.choices(SIZES, [.25, .5, .25])[0]
        self.r = rng.uniform(*RADIUS[n][self.size])
        self.x = self.y = 0.0

    def same_look(self, other):
        return self.shape == other.shape and self.colour == other.colour

    def words(self, rng, count=1):
        singular, plural, _ = rng.choices(SHAPE_WORDS[self.shape], [w[2] for w in SHAPE_WORDS[self.shape]])[0]
        parts = [] if self.size == "medium" else [rng.choice(SIZE_WORDS[self.size])]
        parts.append(say(rng, self.colour))
        parts.append(singular if count == 1 else plural)
        if count == 1:
            article = "an" if parts[0][0] in "aeiou" else "a"
            return " ".join([rng.choices([article, "one"], [30, 1])[0]] + parts)
        return " ".join([rng.choice({2: ["two", "two", "two", "2", "a pair of"], 3: ["three", "three", "three", "3"]}[count])] + parts)


def spread(rng, radii, length):
    """Centres for objects in order along an axis of this length; shrinks radii in place if they don't fit."""
    room = length - 2 * MARGIN - GAP * (len(radii) - 1)
    if 2 * sum(radii) > room:
        k = room / (2 * sum(radii))
        radii[:] = [r * k for r in radii]
    slack = room - 2 * sum(radii)
    cuts = sorted(rng.random() for _ in range(len(radii)))
    gaps = [slack * c for c in cuts]
    if rng.random() < .5:  # half of the time: evenly spread
        gaps = [slack * (i + 1) / (len(radii) + 1) for i in range(len(radii))]
    out, pos = [], MARGIN
    for i, r in enumerate(radii):
        out.append(pos + gaps[i] + r)
        pos += 2 * r + GAP
    return out


def across(rng, things, length, jitter, common):
    """Coordinates on the other axis: near the middle, in common or each for itself."""
    shared = length / 2 + rng.uniform(-jitter, jitter)
    out = []
    for t in things:
        v = shared + rng.uniform(-.015, .015) if common else length / 2 + rng.uniform(-jitter, jitter)
        out.append(min(max(v, t.r + MARGIN), length - t.r - MARGIN))
    return out


def line_up(rng, things, w, h, vertical, common):
    radii = [t.r for t in things]
    along = spread(rng, radii, h if vertical else w)
    for t, r in zip(things, radii):
        t.r = r
    cross = across(rng, things, w if vertical else h, .06 if common else .14, common)
    for t, a, c in zip(things, along, cross):
        t.x, t.y = (c, a) if vertical else (a, c)


def pick_background(rng):
    """Its colour, and the phrase for it: None when the caption is to be silent about it, then it is mostly white."""
    if rng.random() < .12:
        return rng.choices([rng.choice(COLOUR_NAMES), "white"], [1, 4])[0], None
    colour = rng.choice(COLOUR_NAMES)
    return colour, rng.choices(["", "plain ", "solid "], [12, 1, 1])[0] + say(rng, colour)


def say(rng, colour):
    return rng.choice(COLOUR_WORDS.get(colour, [colour]))


def relate(rng, a, b, relation):
    """A phrase for `a <relation> b`, where a and b are noun phrases; often said the other way round."""
    flip = {"above": "below", "below": "above", "left": "right", "right": "left"}[relation]
    if rng.random() < .35:
        a, b, relation, flipped = b, a, flip, True
    else:
        flipped = False
    ways = {
        "above": [f"{a} above {b}", f"{a} above {b}", f"{a} over {b}", f"{a} on top of {b}", f"{a} directly above {b}",
                  f"{a} with {b} below it", f"{a}, {b} below it", f"{a} at the top and {b} at the bottom"],
        "below": [f"{a} below {b}", f"{a} below {b}", f"{a} under {b}", f"{a} beneath {b}", f"{a} underneath {b}",
                  f"{a} with {b} above it", f"{a}, {b} above it", f"{a} at the bottom and {b} at the top"],
        "left": [f"{a} to the left of {b}", f"{a} to the left of {b}", f"{a} left of {b}", f"{a} on the left of {b}",
                 f"{a} with {b} on its right", f"{a}, {b} right of it", f"{a} on the left and {b} on the right"],
        "right": [f"{a} to the right of {b}", f"{a} to the right of {b}", f"{a} right of {b}", f"{a} on the right of {b}",
                  f"{a} with {b} on its left", f"{a}, {b} left of it", f"{a} on the right and {b} on the left"],
    }
    return rng.choice(ways[relation]), flipped


def filler(rng, n):
    """Ordinary words that no caption uses (Python's own manual has them)."""
    if not FILLER:
        ours = set(re.findall("[a-z]+", " ".join(map(str, [SHAPE_WORDS, COLOUR_WORDS, COLOUR_NAMES, SIZE_WORDS])))) | set(
            "one two three four five first last left right top bottom above below over under on in inside beside next beneath "
            "underneath center centre middle corner side row column pair empty plain with without and or not no it its".split())
        words = Counter(w for line in general_english() for w in re.findall(r"\b[a-z]{2,9}\b", line))
        FILLER.extend(sorted(w for w, n in words.most_common(1500) if w not in ours))
        FILLER.extend(["please", "draw", "show", "me", "want", "see", "picture", "poster", "logo", "background"] * 15)
    return " ".join(rng.choice(FILLER) for _ in range(n))


def place_one(rng, t, w, h):
    """Puts a single thing somewhere; the words for where."""
    spot = rng.choices(["", "centre", "corner", "edge"], [.5, .16, .17, .17] if t.size != "large" else [.7, .3, 0, 0])[0]
    x, y = rng.choice([-1, 1]), rng.choice([-1, 1])
    lo = t.r + MARGIN
    near = lambda side, size: rng.uniform(lo, lo + .05) if side < 0 else size - rng.uniform(lo, lo + .05)
    mid = lambda size: min(max(size / 2 + rng.uniform(-.04, .04), lo), size - lo)
    t.x, t.y = mid(w), mid(h)
    if spot == "":
        if rng.random() < .3:
            t.x, t.y = rng.uniform(lo, w - lo), rng.uniform(lo, h - lo)
        return ""
    if spot == "centre":
        return " " + rng.choice(["in the center", "in the centre", "in the middle", "at the center"])
    if spot == "corner":
        t.x, t.y = near(x, w), near(y, h)
        return " in the {} {}{}".format("top" if y < 0 else "bottom", "left" if x < 0 else "right",
                                        rng.choice([" corner", " corner", ""]))
    if rng.random() < .5:
        t.y = near(y, h)
        return " at the " + ("top" if y < 0 else "bottom")
    t.x = near(x, w)
    return " on the " + ("left" if x < 0 else "right") + rng.choice(["", " side"])


def sample_scene(rng, width, height):
    """Things in the order of their mention, the background's colour, the caption."""
    unit = min(width, height)
    w, h = width / unit, height / unit
    back, phrase = pick_background(rng)
    kind = rng.choices(["single", "relation", "pair", "count", "empty"], [.30, .42, .06, .20, .02])[0]
    things = []

    def new(n):
        while True:
            t = Thing(rng, n, [back])
            if not any(t.same_look(o) for o in things):
                things.append(t)
                return t

    if kind == "empty":
        text = rng.choice(["an empty", "a plain", "just a", "nothing but a"])
        return [], back, f"{text} {phrase or say(rng, back)} background"
    if kind == "single":
        text = new(1).words(rng) + place_one(rng, things[0], w, h)
    elif kind == "pair":
        a, b = new(2), new(2)
        line_up(rng, things if rng.random() < .5 else things[::-1], w, h, False, True)
        text = a.words(rng) + rng.choice([" and ", " next to ", " beside "]) + b.words(rng)
    elif kind == "relation":
        a, b = new(2), new(2)
        relation = rng.choice(["above", "below", "left", "right"])
        order = [a, b] if relation in ("above", "left") else [b, a]
        line_up(rng, order, w, h, relation in ("above", "below"), rng.random() < .5)
        text, flipped = relate(rng, a.words(rng), b.words(rng), relation)
        if flipped:
            things.reverse()
    else:
        n = rng.choice([2, 3])
        first = new(n)
        things = [first] + [copy.copy(first) for _ in range(n - 1)]
        text, vertical = first.words(rng, n), False
        how = rng.choice(["", "row", "column"])
        if how == "row":
            text += rng.choice([" in a row", " side by side", " in a horizontal row"])
        elif how == "column":
            text += rng.choice([" in a column", " stacked vertically", " in a vertical column"])
            vertical = True
        line_up(rng, things, w, h, vertical, True)

    if phrase:
        tail = rng.choice([" on a {} background"] * 4 + [" against a {} background", ", {} background",
                                                         " with a {} background", " on {}"])
        if rng.random() < .88:
            text += tail.format(phrase)
        else:
            text = rng.choice(["on a {} background, ", "{} background, ", "a {} background with "]).format(phrase) + text
        text = re.sub(r"\ba (orange)", r"an \1", text)
    if rng.random() < .12:
        text = rng.choice(PREFIXES) + text
    if rng.random() < .2:  # words that say nothing, so that what is not known is passed over
        text = filler(rng, rng.randint(1, 4)) + rng.choice([" ", ", ", ": "]) + text
    if rng.random() < .1:
        text += rng.choice([", ", " "]) + filler(rng, rng.randint(1, 3))
    if rng.random() < .08:
        text += rng.choice(SUFFIXES)
    case = rng.random()
    if case < .15:
        text = text[0].upper() + text[1:]
    elif case < .19:
        text = text.title()
    elif case < .21:
        text = text.upper()
    if rng.random() < .12:
        text += "."
    return things, back, text


N_LABELS = MAX_OBJECTS * 5 + 1  # per object: shape, colour, size, x fifth, y fifth; then the background's colour
LABEL_CLASSES = [len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, 6, 6] * MAX_OBJECTS + [len(COLOURS)]


def scene_arrays(rng, width, height):
    """A scene as numbers to draw from (obj, bg), labels for the auxiliary loss, and the caption."""
    things, back, caption = sample_scene(rng, width, height)
    unit = min(width, height)
    shade = lambda name: [min(max(v + rng.uniform(-6, 6), 0), 255) / 127.5 - 1 for v in COLOURS[name]]
    obj, labels = np.zeros((MAX_OBJECTS, 8), np.float32), np.zeros(N_LABELS, np.int8)
    shades = {}
    for i, t in enumerate(things):
        rgb = shades.setdefault((t.shape, t.colour), shade(t.colour))
        obj[i] = [SHAPES.index(t.shape), t.x * unit, t.y * unit, t.r * unit, *rgb, 1]
        labels[i * 5:i * 5 + 5] = [SHAPES.index(t.shape) + 1, COLOUR_NAMES.index(t.colour) + 1, SIZES.index(t.size) + 1,
                                   1 + min(4, int(t.x * unit / width * 5)), 1 + min(4, int(t.y * unit / height * 5))]
    labels[-1] = COLOUR_NAMES.index(back)
    return obj, np.array(shade(back), np.float32), labels, caption


def _scene_chunk(args):
    seed, n, width, height = args
    rng = random.Random(seed)
    rows = [scene_arrays(rng, width, height) for _ in range(n)]
    return [np.stack([r[i] for r in rows]) for i in range(3)] + [[r[3] for r in rows]]


def make_bucket(pool, seed, n, width, height, chunk=2000):
    jobs = [(f"{seed}/{width}x{height}/{i}", min(chunk, n - i), width, height) for i in range(0, n, chunk)]
    parts = pool.map(_scene_chunk, jobs)
    return {"size": (width, height), "obj": np.concatenate([p[0] for p in parts]), "bg": np.concatenate([p[1] for p in parts]),
            "labels": np.concatenate([p[2] for p in parts]), "captions": [c for p in parts for c in p[3]]}


def render(obj, bg, width, height, scale=1.0):
    """Draws a batch of scenes with signed distances, anti-aliased.  Returns [B, 3, H, W] in -1..1."""
    import torch
    dev, batch = obj.device, obj.shape[0]
    X = (torch.arange(width, device=dev) + .5).view(1, 1, width)
    Y = (torch.arange(height, device=dev) + .5).view(1, height, 1)
    cover = lambda d: (.5 - d).clamp(0, 1)
    at = lambda t: t.view(batch, 1, 1)

    img = bg.view(batch, 3, 1, 1).expand(batch, 3, height, width)
    for k in range(obj.shape[1]):
        o = obj[:, k]
        if not bool((o[:, 7] > 0).any()):
            continue
        shape, r = at(o[:, 0]), at(o[:, 3] * scale).clamp(min=1.0)
        x, y = X - at(o[:, 1] * scale), Y - at(o[:, 2] * scale)
        ax, ay = x.abs().expand(batch, height, width), y.abs().expand(batch, height, width)
        rad = torch.sqrt(x * x + y * y)
        d = rad - r                                                           # circle
        d = torch.where(shape == 1, torch.maximum(ax, ay) - .84 * r, d)       # square
        ty, tr = y - .25 * r, 1.1 * r                                         # triangle, pointing up
        d = torch.where(shape == 2, torch.maximum(ty, .8660254 * ax - .5 * ty) - .5 * tr, d)
        # star (five points): fold the plane along its mirrors
        kx, ky = .809016994375, -.587785252292
        px, py = ax, -y + 0 * ax
        m = 2 * (kx * px + ky * py).clamp(min=0)
        px, py = px - m * kx, py - m * ky
        m = 2 * (-kx * px + ky * py).clamp(min=0)
        px, py = (px + m * kx).abs(), py - m * ky
        py, bx, by = py - r * 1.05, .45 * -ky, .45 * kx - 1
        t = ((px * bx + py * by) / (bx * bx + by * by)).clamp(min=0)
        t = torch.minimum(t, r * 1.05)
        star = torch.sqrt((px - bx * t) ** 2 + (py - by * t) ** 2) * torch.sign(py * bx - px * by)
        d = torch.where(shape == 3, star, d)
        d = torch.where(shape == 4, (rad - .76 * r).abs() - .24 * r, d)       # ring
        arm = torch.minimum(torch.maximum(ax - .96 * r, ay - .32 * r), torch.maximum(ax - .32 * r, ay - .96 * r))
        d = torch.where(shape == 5, arm, d)                                   # cross
        s = 1.6 * r                                                           # heart
        hx, hy = ax / s, -y / s + .55
        lobe = torch.sqrt((hx - .25) ** 2 + (hy - .75) ** 2) - .35355339
        diag = .5 * (hx + hy).clamp(min=0)
        body = torch.sqrt(torch.minimum(hx ** 2 + (hy - 1) ** 2, (hx - diag) ** 2 + (hy - diag) ** 2)) * torch.sign(hx - hy)
        d = torch.where(shape == 6, torch.where(hx + hy > 1, lobe, body) * s, d)
        alpha = (cover(d) * at(o[:, 7])).unsqueeze(1)
        img = img + (o[:, 4:7].view(batch, 3, 1, 1) - img) * alpha
    return img


def general_english():
    """Some ordinary English (Python's own manual), so that other words split sensibly too."""
    try:
        import pydoc_data.topics as topics
        text = " ".join(topics.topics.values())
    except ImportError:
        return []
    lines = (re.sub(r"[^ -~]+", " ", s).strip() for s in re.split(r"(?<=[.:;])\s+", text))
    return [s for s in lines if 20 < len(s) < 300 and re.search(r"[a-z]{3}", s)]
