"""Puts a report together: figures, examples and attention of some runs, as an HTML page with files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath
from rich import box
from rich.table import Table

from saisa_jax.data.images import load_image
from saisa_jax.data.sample import DataError
from saisa_jax.report import attention, examples, page, pictures, plots
from saisa_jax.report.runs import TITLES, Run

LARGEST_EXAMPLE = 512  # pixels; larger images are shown smaller


def collect(runs: Sequence[Run]) -> tuple[page.Content, dict[str, bytes]]:
    """The content of the page, and the PNG files beside it, by name."""
    several = len(runs) > 1
    notices = [f"{run.label}: {notice}" if several else notice for run in runs for notice in run.notices]
    evaluated = [run for run in runs if run.evaluation]
    # A blind run attends to no image.
    shown = next((run for run in evaluated if not run.config.data.blind), evaluated[0] if evaluated else None)
    figures = _figures(runs, shown)
    chosen, looked = [], []
    if shown:
        chosen = examples.choose(shown.predictions)
        looked, missing = _attention(shown, examples.choose_for_attention(chosen))
        notices += missing
    content = page.Content(runs, shown, figures, [_example(row, runs) for row in chosen], looked, notices)
    files = {f"{name}.png": figure for name, figure in figures.items()}
    files |= {f"attention_{number}.png": one.strip for number, one in enumerate(looked, 1)}
    return content, files


def _figures(runs: Sequence[Run], shown: Run | None) -> dict[str, bytes]:
    figures: dict[str, bytes] = {}
    for name, title in TITLES.items():
        found = [(run, stage) for run in runs for stage in run.stages if stage.name == name and stage.train]
        if found:
            figures[f"loss_{name}"] = plots.loss(title, found)
    evaluated = [run for run in runs if run.evaluation]
    if shown:
        for name, (title, convention) in page.PREFILL.items():
            figures[name] = plots.accuracy_against_prefill(title, evaluated, convention)
        if timed := [run for run in evaluated if run.times]:
            figures["accuracy_against_seconds"] = plots.accuracy_against_seconds("As measured", timed)
        if len(trained := [run for run in evaluated if run.train_flops]) > 1:
            figures["accuracy_against_training"] = plots.accuracy_against_training("Training, both stages", trained)
        figures["flops_by_part"] = plots.cost_by_part("Where the FLOPs of a prefill go", shown)
        if shown.evaluation and shown.evaluation["kinds"]:
            figures["accuracy_by_kind"] = plots.accuracy_by_kind("By kind of question, with 95% intervals", evaluated)
        of_run = f", {shown.label}" if len(runs) > 1 else ""
        figures["confusion"] = plots.confusion(f"Answers{of_run}", shown.predictions)
    return figures


def _attention(run: Run, predictions: Sequence[examples.Prediction]) -> tuple[list[attention.Looked], list[str]]:
    """The attention of some answers, or why it cannot be shown."""
    if run.config.data.blind:
        return [], ["a blind run sees no image, so no attention is shown"]
    if run.model.num_visual_tokens != run.model.vision.num_patches:
        return [], ["a resampler's visual tokens stand nowhere in the picture, so no attention is shown"]
    directory = run.model_directory
    if directory is None:
        train = f"python train.py --config=... --workdir={run.directory}"
        return [], [f"{run.directory} holds no finished model, so no attention is shown: {train} makes one"]
    from saisa_jax.checkpoints import CheckpointError
    from saisa_jax.inference import model

    try:
        return attention.look(model.load(directory), predictions), []
    except (CheckpointError, DataError) as error:
        return [], [f"no attention is shown: {error}"]


def _example(row: examples.Prediction, runs: Sequence[Run]) -> page.Card:
    answers = [(run.label, other) for run in runs for other in run.predictions if other["id"] == row["id"]]
    try:
        image = load_image(row["image"], row["id"]) if row["image"] else None
    except DataError:
        image = None  # the images were moved since; the question is shown without one
    if image is None:
        return page.Card(row, None, tuple(answers))
    return page.Card(row, pictures.png(pictures.thumbnail(image, LARGEST_EXAMPLE)), tuple(answers))


def write(out: epath.Path, html: str, files: dict[str, bytes]) -> None:
    """Writes the files, and the page last, under its name only when it is complete."""
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    unfinished = out / "index.html.tmp"
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(out / "index.html")


def result_table(runs: Sequence[Run]) -> Table:
    """The page's headline table, without its small print, for a terminal of 80 columns: of groups two at most."""
    columns, rows = page.result_rows(runs)
    first, last = columns.index("accuracy") + 1, columns.index("prefill / question")
    if last - first > 2:
        columns, rows = (columns[:first] + columns[last:], [row[:first] + row[last:] for row in rows])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in columns[:-1]:
        justify = "right" if table.columns else "left"
        table.add_column(title.replace("training ", "training\n").replace(" / ", " /\n"), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(text for text, _ in row[:-1]))
    return table
