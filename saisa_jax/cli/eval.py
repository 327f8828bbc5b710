"""Evaluates a finished run, asks its model a question, or compares two evaluations.

python eval.py --workdir=runs/demo
python eval.py --workdir=runs/mine --tasks=source --data=test.json --images=pictures
python eval.py --checkpoint=runs/demo/finetune/model --image=photo.png --question="what color is the shape?"
python eval.py --checkpoint=CKPT --tasks=gqa,pope,mmmu --data=playground/data/eval --prompts=lmms
python eval.py --tasks=mmmu --answers=samples_mmmu_val.jsonl --data=data/MMMU
python eval.py --checkpoint=CKPT --tasks=pope --data=DIR --dtype=bfloat16 --mesh=fsdp=4,tensor=2 --coordinator=auto
python eval.py --compare runs/a/evaluation/easy_vqa.json runs/b/evaluation/easy_vqa.json
"""

from __future__ import annotations

import signal
import sys
from argparse import Namespace
from collections.abc import Sequence

from absl import logging

from saisa_jax.cli import devices
from saisa_jax.cli.parser import Parser
from saisa_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """The verb `eval`: 0; 1 if the evaluation failed; 130 or 143 if it was stopped by SIGINT or SIGTERM."""
    parser = Parser("eval", __doc__)
    parser.add_argument("--workdir", help="a run of train.py; its last finished stage is evaluated")
    parser.add_argument("--checkpoint", help="a finished model")
    parser.add_argument("--output", help="where the results go (default: --workdir, or CHECKPOINT-evaluation)")
    parser.add_argument("--tasks", default="", help="benchmarks, with commas between; these and the next three are "
                        "as the run's config says")  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--batch_size", type=int, help="questions answered at once, over all devices (default: the "
                        "recipe's, or what the memory has room for)")  # fmt: skip
    parser.add_argument("--image_cache_bytes", type=lambda size: int(float(size)), metavar="BYTES", help="of pictures "
                        "that stay on each device, such as 4e9 (default: what the memory has room for)")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, help="the most tokens of an answer")
    parser.add_argument("--quantize", choices=("int8",), help="answers with 8-bit weights (needs qwix)")
    parser.add_argument("--blind", action="store_true", help="without the pictures, whose slots stay empty: what the "
                        "words alone give away")  # fmt: skip
    devices.add_model_flags(parser)
    devices.add_process_flags(parser)
    parser.add_argument("--data", default="", help="where a task's questions lie: a file or a folder")
    parser.add_argument("--images", default="", help="where the names of pictures in --data lead: a folder or archive")
    parser.add_argument("--prompts", choices=("llava", "lmms"), help="the school of prompts and scores: LLaVA's guide, "
                        "as the paper (default), or lmms-eval")  # fmt: skip
    parser.add_argument("--question", help="asks this instead of a benchmark's questions")
    parser.add_argument("--image", action="append", default=[], help="an image of --question; may be repeated")
    parser.add_argument("--answers", metavar="FILE", help="asks no model: scores the answers in a file to the one "
                        "task of --tasks (TASK.jsonl, lmms-eval's samples, LLaVA's or MMMU's answers)")  # fmt: skip
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="evaluates nothing: how much better B is than "
                        "A, and which answers changed; TASK.json files or output folders")  # fmt: skip
    options = parser.parse_args(argv)
    if options.compare:
        return _compare(parser, options)
    tasks = [name for name in options.tasks.split(",") if name]
    if options.answers:
        return _answers(parser, options, tasks)
    if bool(options.workdir) == bool(options.checkpoint):
        parser.error("name either --workdir=RUN or --checkpoint=MODEL")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        parser.error(f"--max_new_tokens={options.max_new_tokens} must be at least 1")
    if options.image and not options.question:
        parser.error("--image needs --question")
    if options.question and (tasks or options.data or options.images):
        parser.error("--question is asked instead of a benchmark: leave out --tasks, --data and --images")
    if options.question and options.coordinator:
        parser.error("--question is asked by one process: leave out --coordinator")
    from saisa_jax.evaluation import command, runner  # import jax, which --help does not need
    from saisa_jax.training.processes import exit_on_lost_process

    logging.use_absl_handler()
    stop = command.Stop(several=bool(options.coordinator))
    try:
        devices.join(options)
        placed = {"quantize": options.quantize, "blind": options.blind, **devices.placed(options)}
        checkpoint = options.checkpoint or command.model_of(options.workdir)
        if options.question:
            print(command.ask(checkpoint, options.question, options.image, options.max_new_tokens, **placed))
            return 0
        output = options.output or options.workdir or f"{checkpoint.rstrip('/')}-evaluation"
        with stop, exit_on_lost_process():
            command.run(
                checkpoint,
                output,
                tasks=tasks,
                data=options.data,
                images=options.images,
                limit=options.limit,
                batch_size=options.batch_size,
                image_cache_bytes=options.image_cache_bytes,
                max_new_tokens=options.max_new_tokens,
                prompts=options.prompts or "llava",
                stop=stop,
                **placed,
            )
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except (runner.Interrupted, KeyboardInterrupt) as error:
        print(f"The evaluation was {error if error.args else 'stopped before it began'}.", file=sys.stderr)
        if isinstance(error.__cause__ or error, KeyboardInterrupt):  # this process was stopped, at once
            return 128 + (signal.SIGTERM if isinstance(error.__cause__ or error, command.Terminated) else signal.SIGINT)
        return 128 + (stop.number or signal.SIGTERM)
    return 0


def _answers(parser: Parser, options: Namespace, tasks: Sequence[str]) -> int:
    kept = ("answers", "tasks", "data", "images", "prompts", "limit", "output")
    others = [name for name, value in vars(options).items() if value and name not in kept]
    if others:
        parser.error(f"--answers asks no model: leave out {', '.join(f'--{name}' for name in others)}")
    if len(tasks) != 1:
        parser.error("--answers needs --tasks=NAME, the one task that the answers are of")
    from saisa_jax.evaluation import answers

    try:
        output = options.output or f"{options.answers}-evaluation"
        answers.score_file(
            tasks[0],
            options.answers,
            output,
            data=options.data,
            images=options.images,
            prompts=options.prompts or "",
            limit=options.limit,
        )
        print(f"{tasks[0]}.json is in {output}/evaluation")
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _compare(parser: Parser, options: Namespace) -> int:
    others = [name for name, value in vars(options).items() if value and name not in ("compare", "output")]
    if others:
        parser.error(f"--compare evaluates nothing: leave out {', '.join(f'--{name}' for name in others)}")
    from saisa_jax.evaluation import compare

    try:
        compare.run(*options.compare, output=options.output or "")
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
