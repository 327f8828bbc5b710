"""Packages of drawings that are drawn here, so that `data drawings` runs without any download."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from saisa_jax.data.drawings.packages import GROUPS

COUNT = 60  # concepts
COLORS = ("red", "blue", "green", "black", "teal")


def draw_packages(root: Path, photographs: bool = True) -> Path:
    """Folders as the packages of `data drawings` are: 60 things of five sub-groups, each drawn by four artists."""
    codes = [f"1f{number:03x}" for number in range(COUNT)]
    names = [f"{COLORS[number % 5]} thing {number}" for number in range(COUNT)]
    emoji = [
        {"image": f"{code}.png", "category": GROUPS[number % 5], "subcategory": f"group {number % 5}"}
        for number, code in enumerate(codes)
    ]
    labels = [{"hexcode": code.upper(), "label": name} for code, name in zip(codes, names, strict=True)]
    _text(root / "emoji-datasource-google/emoji.json", json.dumps(emoji))
    _text(root / "emojibase-data/en/data.json", json.dumps(labels))
    for number, (code, name) in enumerate(zip(codes, names, strict=True)):
        places = (
            f"emoji-datasource-google/img/google/64/{code}.png",
            f"emoji-datasource-twitter/img/twitter/64/{code}.png",
            f"fluent-emoji-3d/assets/{code}.webp",
            f"openmoji/color/72x72/{code.upper()}.png",
        )
        for artist, place in enumerate(places):
            _draw(root / place, number, artist)
        if photographs and number % 4 == 0:
            stamp = root / "tuxpaint-stamps-default/usr/share/stamps" / f"{code}.png"
            _draw(stamp, number, len(places))
            _text(stamp.with_suffix(".txt"), f"A {name}.\nde.utf8=Ein Ding.\n")
    return root


def _draw(path: Path, number: int, artist: int) -> None:
    """A polygon: color and corners say which thing it is, place and outline which artist drew it."""
    image = Image.new("RGBA", (64, 64))
    corners = (32 + artist, 32, 20 + artist), 3 + number // 5
    outline = ("white", "gray", "yellow", "orange", "purple")[artist]
    ImageDraw.Draw(image).regular_polygon(*corners, fill=COLORS[number % 5], outline=outline, rotation=10 * artist)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, lossless=True) if path.suffix == ".webp" else image.save(path)


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
