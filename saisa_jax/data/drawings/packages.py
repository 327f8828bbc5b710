"""The drawings: one thing in several artists' styles, out of unpacked packages of npm and Debian.

A concept is an emoji of five groups that all four artists have drawn. Its name and sub-group are the published ones.
Photographs are Tux Paint's stamps whose caption is the name of a concept, with nothing else ("A guinea fowl." is none).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from saisa_jax.data.sample import DataError

GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")
LEFT_OUT = ("time",)  # sub-groups: 24 clocks that differ by where their hands point
PHOTOGRAPH = "photograph"


@dataclass(frozen=True)
class Package:
    """Where drawings come from.

    Attributes:
      folder: of the directory that `--from` names: the unpacked package.
      style: what its drawings are called in ids; "": it has none, but names.
      fetch: the command that brings it, in the directory of downloads.
      title, authors, licence, url: for the file of licences.
    """

    folder: str
    style: str
    fetch: str
    title: str
    authors: str
    licence: str
    url: str


PACKAGES = (
    Package(
        "emoji-datasource-google",
        "noto",
        "npm pack emoji-datasource-google@16.0.0",
        "Noto Emoji",
        "Google; packed by Cal Henderson (the package's code and names: MIT)",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "emoji-datasource-twitter",
        "twemoji",
        "npm pack emoji-datasource-twitter@16.0.0",
        "Twemoji",
        "Twitter, Inc and other contributors; packed by Cal Henderson",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
    ),
    Package(
        "fluent-emoji-3d",
        "fluent",
        "npm pack @lobehub/fluent-emoji-3d@1.1.0",
        "Fluent Emoji, 3D",
        "Microsoft Corporation; packed by LobeHub",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Package(
        "openmoji",
        "openmoji",
        "npm pack openmoji@17.0.0",
        "OpenMoji",
        "OpenMoji, the open-source emoji and icon project: Hochschule für Gestaltung Schwäbisch Gmünd and contributors",
        "CC-BY-SA-4.0",
        "https://openmoji.org",
    ),
    Package(
        "emojibase-data",
        "",
        "npm pack emojibase-data@17.0.0",
        "Emojibase, the names",
        "Miles Johnson",
        "MIT",
        "https://emojibase.dev",
    ),
    Package(
        "tuxpaint-stamps-default",
        PHOTOGRAPH,
        "apt-get download tuxpaint-stamps-default=2022.06.04-1 && dpkg-deb -x tuxpaint-stamps-default_*.deb "
        "tuxpaint-stamps-default",
        "Tux Paint stamps",
        "Bill Kendrick and the contributors that the package's docs/ and copyright file name",
        "GPL-2.0-or-later (some stamps: public domain)",
        "https://tuxpaint.org/stamps/",
    ),
)


@dataclass(frozen=True)
class Concept:
    """One thing and its drawings: files by the name of their style."""

    name: str
    group: str  # the sub-group, whose members look alike: animal-bird
    drawings: Mapping[str, Path]


def read_concepts(root: Path, photographs: bool = True) -> list[Concept]:
    """All concepts, by name. Of two with the very same drawing the second one is left out.

    Args:
      root: a directory with a folder for each of `PACKAGES`.
      photographs: whether those of Tux Paint are read.

    Raises:
      DataError: a package is not there; the message has the command that brings it.
    """
    folders = {package.folder: root / package.folder for package in PACKAGES}
    for package in PACKAGES:
        if not folders[package.folder].is_dir() and (photographs or package.style != PHOTOGRAPH):
            without = "; --nophotographs makes the set without it" if package.style == PHOTOGRAPH else ""
            raise DataError(
                f"{folders[package.folder]} is not there: `make proof-packages` brings all packages, or this one by "
                f"hand: {package.fetch}, unpacked into that folder (--from={root}){without}"
            )
    labels = {row["hexcode"]: row["label"] for row in _json(folders["emojibase-data"] / "en/data.json")}
    photos = _photographs(folders["tuxpaint-stamps-default"]) if photographs else {}
    found: dict[str, Concept] = {}
    seen: set[bytes] = set()
    for row in _json(folders["emoji-datasource-google"] / "emoji.json"):
        if row["category"] not in GROUPS or row["subcategory"] in LEFT_OUT:
            continue
        code = row["image"].removesuffix(".png")
        label = labels.get(code.upper()) or labels.get(code.upper().replace("-FE0F", ""))
        files = {style: next(filter(Path.exists, paths), None) for style, paths in _files(code, folders)}
        if not label or not all(files.values()):
            continue
        name = label.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()
        drawings = {style: file for style, file in files.items() if file}
        contents = {hashlib.sha256(file.read_bytes()).digest() for file in drawings.values()}
        if name in found or contents & seen:
            continue
        seen |= contents
        found[name] = Concept(name, row["subcategory"], drawings | photos.get(name, {}))
    return [found[name] for name in sorted(found)]


def _files(code: str, folders: Mapping[str, Path]) -> Iterator[tuple[str, list[Path]]]:
    """Where each artist's drawing of a code point may lie."""
    yield "noto", [folders["emoji-datasource-google"] / f"img/google/64/{code}.png"]
    yield "twemoji", [folders["emoji-datasource-twitter"] / f"img/twitter/64/{code}.png"]
    yield "fluent", [folders["fluent-emoji-3d"] / f"assets/{code.lstrip('0')}.webp"]
    names = (code.upper(), code.upper().replace("-FE0F", ""))
    # OpenMoji's releases have PNG files; its npm package has none.
    places = ("color/72x72/{}.png", "color/svg/{}.svg")
    yield "openmoji", [folders["openmoji"] / place.format(name) for place in places for name in names]


def _photographs(folder: Path) -> dict[str, dict[str, Path]]:
    """{name of a concept: {"photograph": file}}; of several the first by its path."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.rglob("*.png")):
        text = file.with_suffix(".txt")
        if not text.exists():
            continue
        caption = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        name = re.sub(r"^(an?|the|some) ", "", caption.strip().rstrip(".!").lower())
        found.setdefault(name, {PHOTOGRAPH: file})
    return found


def _json(path: Path) -> list[dict[str, str]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is not there: is it another version of the package?") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; unpack the package again") from error


def licences(packages: tuple[Package, ...]) -> str:
    """The text of LICENSES.md."""
    rows = "".join(f"| {p.title} | {p.authors} | {p.licence} | {p.url} |\n" for p in packages)
    return (
        "# Licences\n\nThe pictures of this set were made by `python -m saisa_jax data drawings` of the drawings of "
        "these authors: scaled,\nand put on backgrounds, one or several together. Each drawing keeps its licence. Who "
        "hands pictures on names the authors,\nand says that they were changed; those with OpenMoji's drawings are "
        "under CC-BY-SA-4.0, those with Tux Paint's under the GPL.\n`drawings` of each record in the JSON files says "
        "whose they are.\n\n| set | authors | licence | from |\n|---|---|---|---|\n" + rows
    )
