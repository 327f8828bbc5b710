"""Evaluates a finished run, or asks its model a question.

python eval.py --workdir=runs/demo
python eval.py --workdir=runs/mine --tasks=source --data=test.json --images=pictures
python eval.py --checkpoint=runs/demo/finetune/model --image=photo.png --question="what color is the shape?"
"""

import sys

from absl import app, flags, logging

from saisa_jax.cli.process import quiet_libraries

_WORKDIR = flags.DEFINE_string("workdir", None, "A run of train.py; its last finished stage is evaluated.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A finished model, instead of --workdir.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the results go: --workdir, or CHECKPOINT-evaluation.")
_TASKS = flags.DEFINE_list("tasks", [], "Benchmarks; these and the next three are as the run's config says.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first so many questions.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Questions answered at once.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "The most tokens of an answer.", lower_bound=1)
_QUANTIZE = flags.DEFINE_enum("quantize", None, ["int8"], "Answers with 8-bit weights (needs qwix).")
_DATA = flags.DEFINE_string("data", "", "Where a task's questions lie: a file or a folder.")
_IMAGES = flags.DEFINE_string("images", "", "What the names of pictures in --data lead into: a folder, .zip or .tar.")
_QUESTION = flags.DEFINE_string("question", None, "Asks this instead of a benchmark's questions.")
_IMAGE = flags.DEFINE_multi_string("image", [], "An image of --question; may be repeated.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if bool(_WORKDIR.value) == bool(_CHECKPOINT.value):
        raise app.UsageError("name either --workdir=RUN or --checkpoint=MODEL")
    if _IMAGE.value and not _QUESTION.value:
        raise app.UsageError("--image needs --question")
    if _QUESTION.value and (_TASKS.value or _DATA.value or _IMAGES.value):
        raise app.UsageError("--question is asked instead of a benchmark: leave out --tasks, --data and --images")
    from saisa_jax.errors import UserError
    from saisa_jax.evaluation import command, runner  # imports jax, which --help does not need

    logging.set_verbosity(logging.WARNING)
    try:
        checkpoint = _CHECKPOINT.value or command.model_of(_WORKDIR.value or "")
        if _QUESTION.value:
            print(command.ask(checkpoint, _QUESTION.value, _IMAGE.value, _MAX_NEW_TOKENS.value, _QUANTIZE.value))
            return
        output = _OUTPUT.value or _WORKDIR.value or f"{checkpoint.rstrip('/')}-evaluation"
        with command.terminable():
            command.run(
                checkpoint,
                output,
                tasks=_TASKS.value,
                data=_DATA.value,
                images=_IMAGES.value,
                limit=_LIMIT.value,
                batch_size=_BATCH_SIZE.value,
                max_new_tokens=_MAX_NEW_TOKENS.value,
                quantize=_QUANTIZE.value,
            )
    except (UserError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except (runner.Interrupted, KeyboardInterrupt) as error:
        print(f"The evaluation was {error if error.args else 'stopped before it began'}.", file=sys.stderr)
        sys.exit(143 if isinstance(error.__cause__ or error, command.Terminated) else 130)  # 128 + the signal's number


if __name__ == "__main__":
    quiet_libraries()
    app.run(main)
