"""A page to browse one evaluation's answers with their pictures: one file, which needs no server and no network."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from etils import epath

import saisa_jax
from saisa_jax.checkpoints import CheckpointError, read_account
from saisa_jax.data.images import image_name, load_image
from saisa_jax.data.sample import USER, DataError, ImageSource, Turn
from saisa_jax.errors import UserError
from saisa_jax.evaluation.results import Result
from saisa_jax.evaluation.tasks import TASKS, Item, TaskData
from saisa_jax.report import attention, pictures, units
from saisa_jax.report.examples import shuffled
from saisa_jax.report.style import CSS, DARK

MOST_ROWS = 5000  # questions on the page: failed and wrong ones first
MOST_PICTURES = 400  # different ones, in the same order; further questions are shown without
THUMBNAIL = 224  # pixels of the longer side
TILE = 144  # pixels of a side of an attention tile
LONGEST = 2000  # characters of a prompt or an answer


@dataclass(frozen=True)
class Content:
    """What the page holds.

    Attributes:
      record: TASK.json.
      rows: lines of TASK.jsonl, failed and wrong ones first.
      thumbnails: JPEG files by the name of the image.
      looked: attention by question id.
      notices: what is missing.
    """

    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    thumbnails: Mapping[str, bytes]
    looked: Mapping[str, attention.Looked]
    notices: Sequence[str]


def collect(result: Result, looks: int) -> Content:
    """Chooses the answers, opens their pictures, and draws the attention of some.

    Args:
      result: of the evaluation.
      looks: wrong answers whose attention is drawn, which loads the model; 0: none.
    """
    rows, notices = _chosen(result)
    sources, missing = _sources(result, rows)
    notices += missing
    thumbnails: dict[str, bytes] = {}
    broken: set[str] = set()
    for row in rows:
        for name, source in zip(row["images"], sources.get(row["id"], ()), strict=False):
            if len(thumbnails) == MOST_PICTURES or name in thumbnails or name in broken:
                continue
            try:
                image = load_image(source, row["id"])
            except DataError:
                broken.add(name)
                continue
            thumbnails[name] = pictures.jpeg(pictures.thumbnail(image, THUMBNAIL))
    different = {name for row in rows for name in row["images"]}
    if left := len(different) - len(thumbnails):
        some = f"at most {MOST_PICTURES} are" if len(thumbnails) == MOST_PICTURES else "they cannot be read"
        notices.append(f"{left:,} of {len(different):,} pictures are not on this page: {some}")
    looked: dict[str, attention.Looked] = {}
    if looks:
        looked, why = _look(result, rows, sources, looks)
        notices += why
    return Content(result.record, rows, thumbnails, looked, notices)


def _chosen(result: Result) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Failed questions, wrong answers by score, right ones: those that have a place on the page."""
    rows = sorted(shuffled(list(result.rows.values())), key=lambda row: -1 if row["score"] is None else row["score"])
    wrong = sum(row["score"] is None or row["score"] < 1 for row in rows)
    notices = []
    if len(rows) > MOST_ROWS:
        notices.append(
            f"{MOST_ROWS:,} of {len(rows):,} questions are on this page: failed and wrong ones first ({wrong:,} are "
            f"not wholly right); all are in {result.path.with_suffix('.jsonl').name}"
        )
    return rows[:MOST_ROWS], notices


def _sources(result: Result, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, tuple[ImageSource, ...]], list[str]]:
    """What each question's images are read from: paths, or, of pictures within files, what the task's data give."""
    found: dict[str, tuple[ImageSource, ...]] = {}
    inside = {}
    for row in rows:
        if all(Path(name).exists() for name in row["images"]):
            found[row["id"]] = tuple(row["images"])
        else:
            inside[row["id"]] = row["images"]
    if not inside:
        return found, []
    try:
        for item in TASKS[result.task].items(_data(result.record)):
            if isinstance(item, Item) and inside.get(item.id) == [image_name(image) for image in item.images]:
                found[item.id] = item.images
                del inside[item.id]
                if not inside:
                    break
    except (UserError, OSError) as error:
        return found, [f"the pictures of {len(inside):,} questions are not there any more: {error}"]
    return found, []


def _data(record: Mapping[str, Any]) -> TaskData:
    """Where the questions lay."""
    names = {field.name for field in dataclasses.fields(TaskData)}
    places = {name: value for name, value in record["settings"].items() if name in names}
    try:
        config = read_account(record["checkpoint"])[1]
    except (CheckpointError, OSError):
        return TaskData(**places)
    stage = record["stage"]
    return TaskData(**{**places, "validation": config.stage(stage).validation, "stage": stage})


def _look(
    result: Result,
    rows: Sequence[Mapping[str, Any]],
    sources: Mapping[str, tuple[ImageSource, ...]],
    count: int,
) -> tuple[dict[str, attention.Looked], list[str]]:
    """The attention of the first wrong answers about different single pictures, or why it cannot be shown."""
    record = result.record
    if record["model"].get("blind"):
        return {}, ["a blind model sees no image, so no attention is shown"]
    from saisa_jax.inference.model import load

    wrong = [row for row in rows if row["score"] is not None and row["score"] < 1 and len(row["images"]) == 1]
    wrong = [row for row in wrong if len(sources.get(row["id"], ())) == 1]
    wrong = list({row["images"][0]: row for row in reversed(wrong)}.values())[::-1]  # the first of each picture
    looked: dict[str, attention.Looked] = {}
    try:
        model = load(record["checkpoint"], quantize=record["settings"].get("quantize"))
        for row in wrong:
            if len(looked) == count:
                break
            asked = model.prompt((Turn(USER, row["question"]),), [1]).tokens.tolist()
            if model.tokenizer.decode(asked, skip_special_tokens=False) != row["prompt"]:
                continue  # turns before it, or a system prompt of its own, which the attention would not be of
            image = load_image(sources[row["id"]][0], row["id"])
            (looked[row["id"]],) = attention.look(model, [{**row, "image": image}], TILE)
    except (UserError, OSError) as error:
        return looked, [f"no more attention is shown: {error}" if looked else f"no attention is shown: {error}"]
    return looked, []


# --- the page --------------------------------------------------------------------------------------------------------


def render(content: Content) -> str:
    """The page."""
    record = content.record
    title = f"{record['model']['name']} on {record['title']}"
    notices = "".join(f'<p class="notice">{escape(notice)}</p>\n' for notice in content.notices)
    # "<" must not end the script early, whatever an answer says.
    data = json.dumps(_data_of_page(content), separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{DARK}{BROWSE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(_lead(record))}</p>\n{notices}{CONTROLS}'
        f"<footer>Written by saisa_jax {escape(saisa_jax.__version__)}, python -m saisa_jax report --evaluation. "
        f"{escape(_origin(record))}</footer>\n</main>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _lead(record: Mapping[str, Any]) -> str:
    school = f" (prompts: {record['prompts']})" if record.get("prompts") else ""
    first = "" if record.get("complete", True) else ", the first ones"
    failed = f"; {len(record['failed'])} could not be asked" if record["failed"] else ""
    if record["accuracy"] is None:
        return f"{record['note']}{school}{failed}."
    return (
        f"{record['metric'].capitalize()}{school} {units.percent(record['accuracy'])}, 95% interval "
        f"{units.interval(record['interval'])}%, of {record['n']:,} questions{first}{failed}."
    )


def _origin(record: Mapping[str, Any]) -> str:
    decoding = record.get("decoding", {})
    said = ", ".join(f"{name} {value}" for name, value in decoding.items() if value not in (None, ""))
    return f"The model: {record['checkpoint']}. Decoding: {said}. Evaluated {record['finished']}."


def _data_of_page(content: Content) -> dict[str, Any]:
    numbers = {name: number for number, name in enumerate(content.thumbnails)}
    rows = []
    for row in content.rows:
        answers = Counter(row["answers"])
        entry = {
            "id": row["id"],
            "kind": row["kind"],
            "question": row["question"],
            "output": None if row["output"] is None else row["output"][:LONGEST],
            "answers": [f"{answer} ({count})" if count > 1 else answer for answer, count in answers.most_common()],
            "score": row["score"],
            "images": [numbers[name] for name in row["images"] if name in numbers],
            "prompt": row["prompt"][:LONGEST],
        }
        if row["prediction"] not in (None, row["output"]):
            entry["parsed"] = str(row["prediction"])[:LONGEST]
        if row.get("error"):
            entry["error"] = row["error"]
        if row["id"] in content.looked:
            entry["looked"] = [
                [picture.caption, _jpeg(pictures.jpeg(picture.pixels))]
                for picture in content.looked[row["id"]].pictures
            ]
        rows.append(entry)
    return {"rows": rows, "images": [_jpeg(image) for image in content.thumbnails.values()]}


def _jpeg(image: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def write(result: Result, folder: epath.Path, looks: int) -> tuple[epath.Path, Sequence[str]]:
    """Writes FOLDER/TASK.html, under its name only when it is complete; returns its path and what is missing on it."""
    content = collect(result, looks)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.path.stem}.html"
    unfinished = folder / f"{path.name}.tmp"
    unfinished.write_text(render(content), encoding="utf-8")
    unfinished.replace(path)
    return path, content.notices


CONTROLS = """<noscript><p class="notice">This page needs JavaScript.</p></noscript>
<form class="filters" role="search">
<label>Answers <select id="score"></select></label>
<label>Kind <select id="kind"></select></label>
<label class="wide">Search <input id="search" type="search" placeholder="question, answer or id"></label>
</form>
<p class="note" id="count" aria-live="polite"></p>
<div class="cards" id="cards"></div>
<button id="more" type="button">Show more</button>
"""

BROWSE = """
.filters { display: flex; flex-wrap: wrap; gap: 10px 16px; margin: 22px 0 12px; align-items: end; position: sticky;
  top: 0; background: var(--paper); padding: 10px 0; z-index: 1; }
.filters label { display: grid; gap: 3px; font-size: 0.84rem; color: var(--soft); }
.filters .wide { flex: 1 1 220px; margin: 0; }
.filters select, .filters input, button { font: inherit; font-size: 1rem; color: var(--ink); background: var(--tint);
  border: 1px solid var(--line); border-radius: 8px; padding: 8px 10px; width: 100%; min-height: 42px; }
button { width: auto; margin: 22px 0 0; padding: 8px 22px; cursor: pointer; }
.card > .images { padding: 0; display: flex; flex-wrap: wrap; justify-content: center; gap: 2px;
  background: var(--tint); }
.images img { display: block; max-width: 100%; flex: 1 1 45%; min-width: 0; aspect-ratio: 1; object-fit: contain; }
.facts { color: var(--soft); font-size: 0.8rem; margin-top: 6px; overflow-wrap: anywhere; }
.card details { border: 0; padding: 0; margin-top: 8px; font-size: 0.84rem; }
.card summary { font-weight: 400; color: var(--soft); min-height: 24px; }
.card pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 8px 10px; margin: 6px 0 0; }
.card .tiles { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)); gap: 8px; }
.card .tiles img { width: 100%; }
.card .question { white-space: pre-line; }
@media (max-width: 640px) { .filters { position: static; } .filters label { flex: 1 1 40%; } }
"""

SCRIPT = """
"use strict";
const {rows, images} = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const PAGE = 48;
const SCORES = {
  wrong: ["wrong", r => r.score !== null && r.score < 0.5],
  partly: ["partly right", r => r.score > 0 && r.score < 1],
  right: ["right", r => r.score >= 0.5],
  unknown: ["not scored", r => r.score === null && !r.error],
  failed: ["not asked", r => r.error !== undefined],
  all: ["all", r => true],
};
let shown = [], drawn = 0;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function picture(source, alt) {
  const image = make("img");
  image.src = source;
  image.alt = alt;
  return image;
}

function fold(title, content) {
  const details = make("details");
  details.append(make("summary", "", title), content);
  return details;
}

function card(row) {
  const article = make("article", "card");
  if (row.images.length) {
    const box = make("div", "images");
    box.append(...row.images.map((n, i) => picture(images[n], "picture " + (i + 1) + " of " + row.id)));
    article.append(box);
  }
  const text = make("div");
  text.append(make("p", "question", row.question));
  if (row.error) {
    text.append(make("div", "answer", "not asked: " + row.error));
  } else if (row.score === null) {
    text.append(make("b", "", row.output || "(nothing)"));
  } else {
    const right = row.score >= 0.5;
    const answer = make("div", "answer " + (right ? "right" : "wrong"));
    answer.append(make("b", "", (right ? "\\u2713 " : "\\u2717 ") + (row.output || "(nothing)")));
    text.append(answer);
    if (row.parsed !== undefined) text.append(make("div", "facts", "understood as: " + (row.parsed || "(nothing)")));
  }
  if (row.answers.length) text.append(make("div", "truth", "truth: " + row.answers.join(" | ")));
  const facts = [row.id, row.kind];
  if (row.score !== null && row.score > 0 && row.score < 1) facts.push("score " + row.score.toFixed(2));
  text.append(make("div", "facts", facts.filter(Boolean).join(" \\u00b7 ")));
  if (row.looked) {
    const tiles = make("div", "tiles");
    for (const [caption, source] of row.looked) {
      const figure = make("figure");
      figure.append(picture(source, caption), make("figcaption", "", caption));
      tiles.append(figure);
    }
    const details = fold("attention over the picture, by layer", tiles);
    details.open = true;
    text.append(details);
  }
  text.append(fold("prompt", make("pre", "", row.prompt)));
  article.append(text);
  return article;
}

function more() {
  $("cards").append(...shown.slice(drawn, drawn + PAGE).map(card));
  drawn = Math.min(drawn + PAGE, shown.length);
  $("more").hidden = drawn === shown.length;
  $("count").textContent = shown.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en") +
    " questions" + (drawn < shown.length ? ", " + drawn + " shown" : "");
}

function filter() {
  const kind = $("kind").value, words = $("search").value.toLowerCase().split(/\\s+/).filter(Boolean);
  const fits = SCORES[$("score").value][1];
  shown = rows.filter(row => fits(row) && (kind === "" || row.kind === kind) &&
    words.every(word => row.text.includes(word)));
  shown.sort((a, b) => (b.looked !== undefined) - (a.looked !== undefined));  // keeps the order of the others
  drawn = 0;
  $("cards").replaceChildren();
  more();
}

function option(select, value, text) {
  const node = make("option", "", text);
  node.value = value;
  $(select).append(node);
}

for (const row of rows) row.text = [row.id, row.question, row.output || "", ...row.answers].join("\\n").toLowerCase();
for (const [value, [text, fits]] of Object.entries(SCORES)) {
  const count = rows.filter(fits).length;
  if (count) option("score", value, text + " (" + count.toLocaleString("en") + ")");
}
const kinds = new Map();
for (const row of rows) {
  const [wrong, all] = kinds.get(row.kind) || [0, 0];
  kinds.set(row.kind, [wrong + SCORES.wrong[1](row), all + 1]);
}
option("kind", "", "all");
for (const kind of [...kinds.keys()].filter(Boolean).sort())
  option("kind", kind, kind + " (" + kinds.get(kind)[0] + " of " + kinds.get(kind)[1] + " wrong)");
for (const id of ["score", "kind"]) $(id).addEventListener("change", filter);
$("search").addEventListener("input", filter);
$("more").addEventListener("click", more);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
filter();
"""
