#!/usr/bin/env python3
"""What of 24 prompts, none of them said by a template of shapes.py, the demo model draws rightly.

    python check_demo.py --model model --grid grid.png       # makes the pictures with diffusers, judges, shows
    python check_demo.py --pictures FOLDER                   # judges FOLDER/01.png ... 24.png, whoever made them

A picture is right when its background, and the number, colours, shapes and places of its things are: the background is what
most of the picture and its corners have; a thing is a connected patch of one colour, and its shape the one whose outline,
stretched to the patch's box, covers it best, by three quarters at least.
"""
import argparse
import os
import sys

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from shapes import COLOURS, COLOUR_NAMES, SHAPES, render

SIDE, BOX, MIN_AREA, MIN_COVER = 128, 48, 50, .75
# prompt, background, things (count, colour, shape), where
CASES = [
    ("please draw a red circle above a blue square, on white", "white", [(1, "red", "circle"), (1, "blue", "square")], "above"),
    ("picture: three green triangles in a row, yellow background", "yellow", [(3, "green", "triangle")], "row"),
    ("one large purple star and nothing else, black background", "black", [(1, "purple", "star")], ""),
    ("an orange ring, and to the right of it a cyan heart, white background", "white",
     [(1, "orange", "ring"), (1, "cyan", "heart")], "left"),
    ("a tiny white cross placed in the bottom left corner of a blue background", "blue", [(1, "white", "cross")], "bottom left"),
    ("two pink hearts next to each other on black", "black", [(2, "pink", "heart")], "row"),
    ("a black cross under a yellow circle, pink background please", "pink", [(1, "yellow", "circle"), (1, "black", "cross")], "above"),
    ("Three orange stars, one below the other, purple background", "purple", [(3, "orange", "star")], "column"),
    ("green square on the left, white ring on the right, pink background", "pink",
     [(1, "green", "square"), (1, "white", "ring")], "left"),
    ("show me a blue triangle above a yellow star on a white background", "white",
     [(1, "blue", "triangle"), (1, "yellow", "star")], "above"),
    ("a huge cyan circle in the middle of an orange background", "orange", [(1, "cyan", "circle")], "middle"),
    ("I want to see two blue rings, white background", "white", [(2, "blue", "ring")], "row"),
    ("please draw a red square to the right of a green circle, the background should be white", "white",
     [(1, "green", "circle"), (1, "red", "square")], "left"),
    ("purple heart, top right corner, cyan background", "cyan", [(1, "purple", "heart")], "top right"),
    ("a small black dot beneath a giant golden star, green background everywhere", "green",
     [(1, "yellow", "star"), (1, "black", "circle")], "above"),
    ("a yellow box on top of a violet box, orange background, poster", "orange",
     [(1, "yellow", "square"), (1, "purple", "square")], "above"),
    ("2 white crosses side by side against plain black, minimalist logo", "black", [(2, "white", "cross")], "row"),
    ("a red heart, nothing more, on pink", "pink", [(1, "red", "heart")], ""),
    ("draw an empty green background", "green", [], ""),
    ("a stack of three red squares in a column on a white background", "white", [(3, "red", "square")], "column"),
    ("a white triangle pointing up, in the center of a purple background", "purple", [(1, "white", "triangle")], "middle"),
    ("there should be a pink circle at the top and a black square at the bottom, white background", "white",
     [(1, "pink", "circle"), (1, "black", "square")], "above"),
    ("a blue donut to the left of a red plus sign, white background, minimalist logo", "white",
     [(1, "blue", "ring"), (1, "red", "cross")], "left"),
    ("a cyan star left of an orange triangle, background black", "black", [(1, "cyan", "star"), (1, "orange", "triangle")], "left"),
]


def templates():
    """Each shape's outline, stretched to a box."""
    import torch
    out = {}
    for i, name in enumerate(SHAPES):
        thing = torch.tensor([[[i, SIDE / 2, SIDE / 2, SIDE / 3, 1, 1, 1, 1.]]])
        out[name] = stretched(render(thing, torch.full((1, 3), -1.), SIDE, SIDE)[0, 0].numpy() > 0)
    return out


def stretched(mask):
    ys, xs = np.nonzero(mask)
    box = mask[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
    return np.asarray(Image.fromarray(box.astype(np.uint8) * 255).resize((BOX, BOX), Image.BILINEAR)) > 127


def patches(mask):
    """Connected parts of a mask, whose rims one pixel wide do not count: that is where two colours mix."""
    inner = mask.copy()
    for axis in (0, 1):
        inner &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    left, out = inner.copy(), []
    for seed in zip(*np.nonzero(inner)):
        if not left[seed]:
            continue
        part, todo = np.zeros_like(mask), [seed]
        left[seed] = False
        while todo:
            y, x = todo.pop()
            part[y, x] = True
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= near[0] < SIDE and 0 <= near[1] < SIDE and left[near]:
                    left[near] = False
                    todo.append(near)
        for axis in (0, 1):
            part |= np.roll(part, 1, axis) | np.roll(part, -1, axis)
        if part.sum() >= MIN_AREA:
            out.append(part & mask)
    return out


def things_in(picture, outlines):
    """The background's colour, and (colour, shape, x, y) of each thing, coordinates of its box's middle in 0..1."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.BOX), np.float32)
    palette = np.array([COLOURS[c] for c in COLOUR_NAMES], np.float32)
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    corners = nearest[[2, 2, -3, -3], [2, -3, 2, -3]]
    back = np.bincount(nearest.ravel(), minlength=len(palette)).argmax()
    found = []
    for colour in range(len(palette)):
        for part in patches(nearest == colour) if colour != back else []:
            ys, xs = np.nonzero(part)
            high, wide = np.ptp(ys) + 1, np.ptp(xs) + 1
            box = stretched(part)
            cover = {name: (box & o).sum() / (box | o).sum() for name, o in outlines.items()}
            shape = max(cover, key=cover.get)
            good = cover[shape] >= MIN_COVER and .72 < high / wide < 1.39
            found.append((COLOUR_NAMES[colour], shape if good else "blob", (xs.min() + xs.max()) / 2 / SIDE, (ys.min() + ys.max()) / 2 / SIDE))
    return COLOUR_NAMES[back] if (corners == back).sum() >= 3 else "uneven", found


def placed(where, groups):
    """groups: the coordinates of each kind of thing, in the order of the case."""
    points = [p for g in groups for p in g]
    axis = {"left": 0, "above": 1, "row": 0, "column": 1}.get(where)
    if where in ("left", "above"):
        return groups[1][0][axis] - groups[0][0][axis] > .15
    if where in ("row", "column"):
        along, across = sorted(p[axis] for p in points), [p[1 - axis] for p in points]
        return min(b - a for a, b in zip(along, along[1:])) > .12 and max(across) - min(across) < .15
    x, y = points[0] if points else (.5, .5)
    return all({"top": y < .4, "bottom": y > .6, "left": x < .4, "right": x > .6, "middle": abs(x - .5) < .12 and abs(y - .5) < .12}[w]
               for w in where.split())


def judge(picture, case, outlines):
    """'': it is right; else what is not."""
    _, back, wanted, where = case
    seen, found = things_in(picture, outlines)
    if seen != back:
        return f"the background is {seen}"
    groups = []
    for count, colour, shape in wanted:
        groups.append([f[2:] for f in found if f[:2] == (colour, shape)])
        if len(groups[-1]) != count:
            return f"{len(groups[-1])} {colour} {shape}, not {count}: " + ", ".join(f"{f[0]} {f[1]}" for f in found)
    if len(found) != sum(w[0] for w in wanted):
        return "more than was asked for: " + ", ".join(f"{f[0]} {f[1]}" for f in found)
    return "" if placed(where, groups) else f"not {where}"


def draw(folder, device):
    import torch
    from diffusers import FluxPipeline
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for i in range(0, len(CASES), 8):
        prompts = [c[0] for c in CASES[i:i + 8]]
        pictures += pipe(prompts, generator=[torch.Generator("cpu").manual_seed(100 + i + j) for j in range(len(prompts))], height=256,
                         width=256, max_sequence_length=128, num_inference_steps=20, guidance_scale=3.5).images
    return pictures


def sheet(pictures, verdicts, path, columns=6):
    import textwrap
    page = Image.new("RGB", (columns * 264, (len(CASES) + columns - 1) // columns * 312), "white")
    pen = ImageDraw.Draw(page)
    for i, picture in enumerate(pictures):
        x, y = i % columns * 264 + 4, i // columns * 312 + 4
        page.paste(picture, (x, y))
        pen.rectangle([x - 1, y - 1, x + 256, y + 256], outline=(160, 160, 160))
        pen.text((x, y + 258), "\n".join(textwrap.wrap(f"{i + 1}. {CASES[i][0]}", 42)[:3]), fill="black")
        if verdicts[i]:
            pen.text((x, y + 296), verdicts[i][:42], fill=(200, 0, 0))
    page.save(path)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model")
    ap.add_argument("--pictures")
    ap.add_argument("--grid")
    ap.add_argument("--device", default="cpu")
    args = ap.parse_args()
    if args.pictures:
        pictures = [Image.open(f"{args.pictures}/{i + 1:02}.png") for i in range(len(CASES))]
    else:
        pictures = draw(args.model, args.device)
    outlines = templates()
    verdicts = [judge(p, c, outlines) for p, c in zip(pictures, CASES)]
    for i, (case, verdict) in enumerate(zip(CASES, verdicts)):
        print(f"{i + 1:2} {'right' if not verdict else 'WRONG: ' + verdict}  [{case[0]}]")
    print(f"{verdicts.count('')} of {len(CASES)} right")
    if args.grid:
        sheet(pictures, verdicts, args.grid)


if __name__ == "__main__":
    main()
