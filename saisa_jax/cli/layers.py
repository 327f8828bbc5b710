"""`python -m saisa_jax layers`: which layers of a trained model read the picture, and which could do without.

python -m saisa_jax layers --checkpoint=CKPT --task=gqa --data=playground/data/eval --limit=64 --keep=8
python -m saisa_jax layers --checkpoint=CKPT --data=mine.json --images=pictures

Prints a table, draws it (OUTPUT/layers.png), writes it down (OUTPUT/layers.json), and proposes `model.visual_layers`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from saisa_jax.cli import devices
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError, FlamingoConfig, ModelConfig, ProjectorConfig

if TYPE_CHECKING:
    from saisa_jax.evaluation.layers import LayerUse


def main(argv: Sequence[str]) -> int:
    """The verb `layers`.

    Raises:
      ConfigError, CheckpointError, DataError: a model or data that cannot be used, or numbers that make no sense.
    """
    parser = Parser("layers", __doc__)
    parser.add_argument("--checkpoint", required=True, help="a finished model")
    parser.add_argument("--task", help="a benchmark whose questions are asked (default: source with --data, else the "
                        "first of the model's recipe)")  # fmt: skip
    parser.add_argument("--data", default="", help="where the questions lie: a file or a folder")
    parser.add_argument("--images", default="", help="where the names of pictures in --data lead")
    parser.add_argument("--limit", type=int, default=64, help="the first so many questions (default 64)")
    parser.add_argument("--batch_size", type=int, default=4, help="questions at once (default 4)")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="of an answer (default 16)")
    parser.add_argument("--keep", type=int, help="how many layers to propose (default: a quarter of them)")
    parser.add_argument("--output", help="a folder for the results (default: CHECKPOINT-layers)")
    devices.add_model_flags(parser)
    options = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}={getattr(options, name)} must be at least 1")
    from saisa_jax import buckets, flops
    from saisa_jax.evaluation import layers, runner
    from saisa_jax.evaluation.tasks import TASKS, TaskData
    from saisa_jax.inference.model import load
    from saisa_jax.report import plots

    console = Console()
    model = load(options.checkpoint, **devices.placed(options))
    config = model.model_config
    name = options.task or ("source" if options.data else next(iter(model.config.evaluation.tasks), ""))
    if not name:
        raise ConfigError(f"the model's recipe names no benchmark: choose --task of {', '.join(TASKS)}, or --data=FILE")
    task = TASKS[name].under("llava")
    data = TaskData(options.data, options.images, model.stage_config.validation, model.stage, "llava", name)
    items = runner.read_items(task, data, options.limit)
    few = max(1, min(config.num_layers // 4, len(config.visible_layers)))
    keep = few if options.keep is None else options.keep

    def progress(what: str, done: int, total: int) -> None:
        console.print(f"{what}: {done} of {total}", highlight=False)

    used = layers.measure(model, items, keep, options.batch_size, options.max_new_tokens, progress)
    console.print(table(used))
    chosen = ",".join(map(str, used.proposal))
    costs = {
        n: flops.prefill(c, 64).total for n, c in (("this", config), ("proposed", proposed(config, used.proposal)))
    }
    console.print(
        f"model.visual_layers={chosen}: with the picture hidden in all other layers the answers diverge by "
        f"{used.kept:.3g} nats a token, and by {used.blind:.3g} without the picture. A SAISA of these layers, with one "
        f"projector, reads a picture and 64 tokens with {costs['proposed']:.3g} FLOPs; this model with "
        f"{costs['this']:.3g}.",
        highlight=False,
    )
    output = buckets.place(options.output or f"{options.checkpoint.rstrip('/')}-layers")
    output.mkdir(parents=True, exist_ok=True)
    record = dataclasses.asdict(used) | {"checkpoint": options.checkpoint, "task": name, "prefill_flops": costs}
    lists = {key: value.tolist() for key, value in record.items() if hasattr(value, "tolist")}
    (output / "layers.json").write_text(json.dumps(record | lists, indent=1) + "\n")
    title = f"{model.config.name} on {name}, {used.questions} questions"
    (output / "layers.png").write_bytes(plots.layer_use(title, used.divergence, used.attention, used.proposal))
    console.print(f"layers.json and layers.png are in {output}", highlight=False, soft_wrap=True)
    return 0


def table(used: LayerUse) -> Table:
    """A row for each layer."""
    shown = Table(title=f"{used.questions} questions, {used.tokens} tokens of answers", title_justify="left")
    for column in ("layer", "attention on the picture", "divergence without it, nats", "proposed"):
        shown.add_column(column, justify="right")
    for layer, (mass, nats) in enumerate(zip(used.attention, used.divergence, strict=True)):
        shown.add_row(str(layer), f"{mass:.1%}", f"{nats:.4g}", "*" if layer in used.proposal else "")
    return shown


def proposed(config: ModelConfig, layers: tuple[int, ...]) -> ModelConfig:
    """A SAISA with one projector whose tokens these layers read, as ViCA is."""
    others = {"naavit_layers": (), "frozen_visual_layers": (), "flamingo": FlamingoConfig()}
    shared = ProjectorConfig(sharing="shared", hidden_dim=config.projector.hidden_dim)
    return dataclasses.replace(config, alignment="saisa", projector=shared, visual_layers=layers, **others)
