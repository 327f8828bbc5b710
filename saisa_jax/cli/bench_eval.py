"""`python -m saisa_jax bench eval`: questions a second of an evaluation, and where its time goes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from saisa_jax.bench import evaluation
from saisa_jax.cli import devices
from saisa_jax.cli.parser import Parser
from saisa_jax.evaluation import runner
from saisa_jax.evaluation.settings import Settings
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.inference.model import load
from saisa_jax.inference.quantize import QUANTIZATIONS


def main(argv: Sequence[str]) -> int:
    """The verb `bench eval`.

    Raises:
      UserError: a flag is wrong, the model cannot be loaded, or a task has nothing to ask.
    """
    parser = Parser("bench eval", evaluation.__doc__)
    parser.add_argument("--checkpoint", required=True, help="a finished model")
    parser.add_argument("--tasks", default="easy_vqa", help="benchmarks, with commas between (default easy_vqa)")
    parser.add_argument("--data", default="", help="where their questions lie: a file or a folder")
    parser.add_argument("--images", default="", help="where the names of pictures in --data lead")
    parser.add_argument("--limit", type=int, default=512, help="the first so many questions (default 512)")
    parser.add_argument("--batch_size", type=int, help="questions at once (default: the recipe's, or what fits)")
    parser.add_argument("--image_cache_bytes", type=lambda size: int(float(size)), metavar="BYTES", help="of pictures "
                        "that stay on each device (default: what the memory has room for)")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, help="of an answer (default: the task's, or the recipe's)")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="int8: 8-bit weights (needs qwix)")
    devices.add_model_flags(parser)
    options = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    tasks = {name: TASKS[name] for name in options.tasks.split(",")}
    model = load(options.checkpoint, **devices.placed(options), quantize=options.quantize)
    for name, task in tasks.items():
        given = ("limit", "batch_size", "image_cache_bytes", "max_new_tokens", "data", "images")
        settings = Settings.of(name, model.config.evaluation, **{field: vars(options)[field] for field in given})
        place = settings.place(name, model.config, model.stage)
        items = runner.read_items(task.under(settings.prompts), place, settings.limit)
        prompts, batches, cache_bytes, told = runner.plan(model, items, settings)
        console.print(f"{name}: {told}")
        timed = evaluation.bench(model, prompts, batches, settings.max_new_tokens, cache_bytes)
        rates = f"{timed.questions / timed.seconds:,.1f} questions/s, {timed.tokens / timed.seconds:,.1f} tokens/s"
        waited = timed.waited / timed.seconds
        console.print(f"{name}: {rates}; {waited:.0%} of the time the host waited for the device")
        console.print(evaluation.table(timed))
    return 0
