"""The HTML page: one self-contained file."""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import saisa_jax
from saisa_jax.config import Config, to_dict
from saisa_jax.report import pictures, units
from saisa_jax.report.attention import Looked
from saisa_jax.report.examples import is_right
from saisa_jax.report.plots import COLORS, prefill_by_alignment
from saisa_jax.report.runs import NAMES, TITLES, Run
from saisa_jax.report.style import CSS


@dataclass(frozen=True)
class Card:
    """A test question: the prediction of the run that is shown, its image, and all runs' answers.

    Attributes:
      prediction: a row of TASK.jsonl.
      image: a PNG file; None if it could not be read.
      answers: (label of the run, its row).
    """

    prediction: dict[str, Any]
    image: bytes | None
    answers: tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Content:
    """The content of the page.

    Attributes:
      runs: in the order of the command line.
      shown: the run whose answers are shown; None if none was evaluated.
      figures: PNG files by their names.
      examples: test questions.
      looked: attention of some of them.
      notices: what is missing.
    """

    runs: Sequence[Run]
    shown: Run | None
    figures: Mapping[str, bytes]
    examples: Sequence[Card]
    looked: Sequence[Looked]
    notices: Sequence[str]


def render(content: Content) -> str:
    """The page."""
    title = _title(content)
    sections = [
        _header(title, content),
        *(f'<p class="notice">{escape(notice)}</p>' for notice in content.notices),
        _results(content),
        _costs(content),
        _curves(content),
        _mistakes(content),
        _examples(content),
        _attention(content),
        _recipes(content),
        f"<footer>Written by saisa_jax {escape(saisa_jax.__version__)}, python -m saisa_jax report. The method: SAISA, "
        "arXiv 2502.02458.</footer>",
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def result_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """The headline table: column titles, and a row for each run of (text, small print) cells."""
    groups = list(dict.fromkeys(name for run in runs if run.evaluation for name in run.evaluation["groups"]))
    columns = ["", "accuracy", *(group.replace("_", "/") for group in groups), "prefill / question", "training FLOPs"]
    columns += ["training time", "parameters"]
    timed = any(run.times for run in runs)
    if timed:
        columns.insert(columns.index("training FLOPs"), "measured")
    return columns, [_result_row(run, groups, timed) for run in runs]


def _result_row(run: Run, groups: Sequence[str], timed: bool) -> list[tuple[str, str]]:
    record = run.evaluation
    cells = [(run.label, "")]
    if record is None:
        cells += [(units.NOTHING, "")] * (2 + len(groups))
    else:
        parts = [record["overall"], *(record["groups"].get(name) for name in groups)]
        cells += [
            (units.percent(p["accuracy"]), units.interval(p["interval"])) if p else (units.NOTHING, "") for p in parts
        ]
        cost = record["prefill_flops"]
        cells.append((units.flops(cost["end_to_end"]), f"decoder {units.flops(cost['decoder'])}"))
    if timed:
        cells.append(_measured(run))
    cells.append((units.flops(run.train_flops), ""))
    cells.append((units.duration(run.wall_seconds), ""))
    cells.append((units.scaled(run.parameters).strip() if run.parameters else units.NOTHING, ""))
    return cells


def _measured(run: Run) -> tuple[str, str]:
    """Milliseconds of a first and a second question about a picture."""
    if not run.times:
        return units.NOTHING, ""
    first, second = (1e3 * statistics.median(run.times[name]) for name in ("first", "second"))
    return f"{first:.3g} ms", f"second {second:.3g} ms"


# --- sections --------------------------------------------------------------------------------------------------------


def _title(content: Content) -> str:
    labels = [run.label for run in content.runs]
    record = content.shown.evaluation if content.shown else None
    if record is None:
        return f"Training {', '.join(labels)}"
    if len(labels) == 1:
        return f"{labels[0]} on {record['title']}"
    names = [NAMES[name] for name in dict.fromkeys(run.model.alignment for run in content.runs)]
    if len(names) == 1:
        return f"{len(labels)} runs of {names[0]} on {record['title']}"
    return f"{', '.join(names[:-1])} and {names[-1]} on {record['title']}"


def _header(title: str, content: Content) -> str:
    model = (content.shown or content.runs[0]).model
    vision = model.vision
    layers = "stages" if vision.kind == "convnext" else "layers"
    text = (
        f"A decoder of {model.num_layers} layers of width {model.embed_dim} reads each image as "
        f"{model.num_visual_tokens} visual tokens from a vision encoder of {vision.num_used_layers} {layers} of width "
        f"{vision.embed_dim}{f', for each of up to {vision.max_views} views' if vision.grids else ''}."
    )
    return f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(text)}</p>'


def _results(content: Content) -> str:
    numbers = _numbers(content) if len(content.runs) == 1 else ""
    columns, rows = result_rows(content.runs)
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(_row(number, row, len(rows) > 1) for number, row in enumerate(rows))
    record = content.shown.evaluation if content.shown else None
    note = ""
    if record:
        baseline = record["baseline"]
        if baseline:
            guesses = [baseline.get(name) for name in ("overall", *record["groups"])]
            cells = "".join(f"<td>{units.percent(guess)}</td>" for guess in guesses)
            cells += "<td></td>" * (len(columns) - 1 - len(guesses))
            body += f'<tr class="guess"><th scope="row">most frequent answer, no image</th>{cells}</tr>'
        further = "".join(f" {name} {value:.4g}." for name, value in record["metrics"].items())
        note = (
            f'<p class="note">{escape(record["metric"].capitalize())} of freely generated answers to '
            f"{record['n']:,} test questions; below each accuracy its 95% interval, which allows for questions that "
            f"share an image.{escape(further)} Prefill: reading one question of {record['prompt_tokens']:.0f} text "
            "tokens with its image, end to end and for the decoder with its projectors alone."
            f"{_how_measured(content.runs)}</p>"
        )
    return (
        f'{numbers}<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{note}'
    )


def _how_measured(runs: Sequence[Run]) -> str:
    """Which machine the times are of, and whether it had other work."""
    timed = [run.times for run in runs if run.times]
    if not timed:
        return ""
    devices = ", ".join(dict.fromkeys(str(times["device"]) for times in timed))
    load = max(max(times["load_before"], times["load_after"]) for times in timed)
    return (
        f" Measured: until the first token of the answer to a first and a second question about a picture, medians; "
        f"{escape(devices)}, {timed[0]['cores']} cores, load at most {load:.1f}."
    )


def _numbers(content: Content) -> str:
    """The four main numbers of a page about one run."""
    run = content.runs[0]
    record = run.evaluation
    if record is None:
        return ""
    boxes = [(units.percent(record["accuracy"]), "right in all", f"of {record['n']:,} test questions")]
    for name, part in record["groups"].items():
        guess = record["baseline"].get(name)
        small = f"{units.percent(guess)} without the image" if guess is not None else f"{part['n']:,} questions"
        boxes.append((units.percent(part["accuracy"]), f"{name.replace('_', '/')} questions", small))
    costs = prefill_by_alignment(run, "decoder")
    mine = record["prefill_flops"]["decoder"]
    if run.model.alignment != "llava":
        boxes.append((units.change(mine / costs["llava"] - 1), "decoder FLOPs", "to read a question, against LLaVA"))
    boxes.append((units.duration(run.wall_seconds), "of training", f"{units.flops(run.train_flops)}"))
    cells = "".join(
        f"<div><b>{escape(number)}</b><span>{escape(what)}</span><small>{escape(small)}</small></div>"
        for number, what, small in boxes
    )
    return f'<div class="numbers">{cells}</div>\n'


def _row(number: int, cells: Sequence[tuple[str, str]], colored: bool) -> str:
    swatch = f'<span class="swatch" style="background:{COLORS[number % len(COLORS)]}"></span>' if colored else ""
    (label, _), *rest = cells
    values = "".join(
        f"<td>{escape(text)}{f'<small>{escape(small)}</small>' if small else ''}</td>" for text, small in rest
    )
    return f'<tr><th scope="row">{swatch}{escape(label)}</th>{values}</tr>'


def _costs(content: Content) -> str:
    if "accuracy_against_flops" not in content.figures:
        return ""
    return (
        "<h2>Accuracy against FLOPs</h2>\n<p>What reading a question and its image costs before the first word of the "
        "answer: with the vision encoder and the head, which all alignments share, and for the decoder with its "
        "projectors alone. Alignments that were not run are placed by what they would cost.</p>"
        f"{_figures(content, *(name for name in COSTS if name in content.figures))}"
        f"{_wide(content, 'flops_by_part')}"
    )


def _curves(content: Content) -> str:
    names = [f"loss_{stage}" for stage in TITLES if f"loss_{stage}" in content.figures]
    columns = ("steps", "samples", "last loss", "held-out loss", "FLOPs", "time")
    head = "".join(f'<th scope="col">{column}</th>' for column in ("", *columns))
    rows = []
    for run in content.runs:
        for stage in run.stages:
            summary = stage.summary or {}
            held_out = f"{stage.held_out[-1]['loss']:.3f}" if stage.held_out else units.NOTHING
            steps = stage.train[-1]["step"] if stage.train else 0
            cells = (
                f"{summary['steps']:,}" if summary else f"{steps:,}, not finished",
                f"{summary['samples']:,}" if summary else units.NOTHING,
                f"{stage.train[-1]['loss']:.3f}" if stage.train else units.NOTHING,
                held_out,
                units.flops(summary.get("train_flops")),
                units.duration(summary.get("wall_seconds")),
            )
            label = f"{run.label}: {stage.name}" if len(content.runs) > 1 else TITLES[stage.name]
            rows.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>')
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    marks = "Lines: loss on the training data, smoothed. Marks: loss on held-out images."
    return f'<h2>Learning</h2>\n<p class="note">{marks}</p>{_figures(content, *names)}{table}'


def _mistakes(content: Content) -> str:
    if "confusion" not in content.figures:
        return ""
    return f"<h2>Right and wrong</h2>\n{_figures(content, 'accuracy_by_kind', 'confusion')}"


def _examples(content: Content) -> str:
    if not content.examples or content.shown is None or content.shown.evaluation is None:
        return ""
    count, share = len(content.examples), content.shown.evaluation["accuracy"]
    wrong = sum(not is_right(example.prediction) for example in content.examples)
    more = ", more than their share" if wrong / count > 1 - share else ""
    among = f"{wrong} with a wrong answer{more}: {units.percent(share)} of all questions are answered correctly"
    of_run = "" if len(content.runs) == 1 else f" The choice goes by the answers of {content.shown.label}."
    return (
        f"<h2>{count} test question{'s' if count > 1 else ''}</h2>\n<p>Picked by a fixed rule from all kinds, {among}."
        f'{escape(of_run)}</p>\n<div class="cards">{"".join(map(_card, content.examples))}</div>'
    )


def _card(example: Card) -> str:
    row = example.prediction
    image = f'<img src="{_data(example.image)}" alt="">' if example.image else ""
    several = len(example.answers) > 1
    lines = "".join(_answer(label if several else "", answer) for label, answer in example.answers)
    return (
        f'<article class="card">{image}<div><p class="question">{escape(row["question"])}</p>{lines}'
        f'<div class="truth">truth: {escape(" | ".join(dict.fromkeys(row["answers"])))}</div></div></article>'
    )


def _answer(label: str, row: Mapping[str, Any]) -> str:
    state, mark = ("right", "✓") if is_right(row) else ("wrong", "✗")
    small = f"<i>{escape(label)}</i>" if label else f"<i>{state}</i>"
    return f'<div class="answer {state}"><b>{mark} {escape(row["output"] or "(nothing)")}</b> {small}</div>'


def _attention(content: Content) -> str:
    if not content.looked or content.shown is None:
        return ""
    of_run = "" if len(content.runs) == 1 else f" ({content.shown.label})"
    parts = []
    for looked in content.looked:
        row = looked.prediction
        tiles = "".join(
            f'<figure><img src="{_data(pictures.png(picture.pixels))}" alt="{escape(picture.caption)}">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
            for picture in looked.pictures
        )
        state = "right" if is_right(row) else f"wrong, it is {row['answers'][0]}"
        parts.append(
            f'<div class="looked"><b>{escape(row["question"])}</b> <span class="note">{escape(row["output"])} '
            f'({escape(state)})</span><div class="tiles">{tiles}</div></div>'
        )
    return (
        f"<h2>What the answer attends to</h2>\n<p>Attention from the token that the answer's first word is predicted "
        f"from to the patches of the image, averaged over heads, layer by layer{escape(of_run)}. Every layer has a "
        "scale of its own; its caption says how much of all attention goes to the image, the rest stays with the "
        "text.</p>"
        f"{''.join(parts)}"
    )


def _recipes(content: Content) -> str:
    defaults = json.loads(json.dumps(to_dict(Config())))  # with lists for tuples, as they are read from a file
    parts = []
    for run in content.runs:
        own = "\n".join(f"{name} = {json.dumps(value)}" for name, value in changed(run.raw, defaults))
        parts.append(
            f"<details><summary>{escape(run.label)}: what differs from the defaults</summary>"
            f'<p class="note">{escape(run.directory)}</p><pre>{escape(own)}</pre>'
            f"<details><summary>the whole configuration</summary><pre>{escape(json.dumps(run.raw, indent=2))}</pre>"
            "</details></details>"
        )
    return f"<h2>Recipe</h2>\n{''.join(parts)}"


def changed(config: Mapping[str, Any], defaults: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of all that is not as in `defaults`."""
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            found += changed(value, default, f"{path}{name}.")
        elif value != default:
            found.append((f"{path}{name}", value))
    return found


# --- images ----------------------------------------------------------------------------------------------------------

COSTS = ("accuracy_against_flops", "accuracy_against_decoder_flops", "accuracy_against_seconds")
ALTERNATIVES = {
    "loss_pretrain": "Loss of stage 1 against steps",
    "loss_finetune": "Loss of stage 2 against steps",
    "accuracy_against_flops": "Test accuracy against prefill FLOPs, end to end",
    "accuracy_against_decoder_flops": "Test accuracy against prefill FLOPs of the decoder",
    "accuracy_against_seconds": "Test accuracy against measured seconds of a first question",
    "flops_by_part": "Prefill FLOPs of LLaVA, NAAViT and SAISA by part",
    "accuracy_by_kind": "Test accuracy by kind of question",
    "confusion": "Truths against answers",
}


def _figures(content: Content, *names: str) -> str:
    shown = "".join(f"<figure>{_plot(content, name)}</figure>" for name in names if name in content.figures)
    return f'<div class="figures">{shown}</div>'


def _wide(content: Content, name: str) -> str:
    return f'<figure class="wide scroll">{_plot(content, name)}</figure>'


def _plot(content: Content, name: str) -> str:
    return f'<img class="plot" src="{_data(content.figures[name])}" alt="{escape(ALTERNATIVES[name])}">'


def _data(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"
