"""`python -m saisa_jax VERB ...`, or `saisa_jax VERB ...` where it is installed: everything that this program does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from saisa_jax.cli.parser import COMPILING_VERBS, cache_choice
from saisa_jax.cli.process import quiet_libraries
from saisa_jax.compilation import Programs, keep_programs
from saisa_jax.errors import UserError, did_you_mean

# A verb's module is imported only when it is called; its `main(argv)` returns an exit status.
VERBS = {
    "train": ("saisa_jax.cli.train", "trains a model by a recipe, as train.py does; --dry_run tells what it would be"),
    "eval": ("saisa_jax.cli.eval", "evaluates a finished run, or asks its model a question, as eval.py does"),
    "chat": ("saisa_jax.cli.chat", "a conversation with a finished model about pictures"),
    "serve": ("saisa_jax.cli.serve", "a server with OpenAI's chat-completions interface, and a page to try a model"),
    "report": ("saisa_jax.cli.report", "the HTML page and the plots of finished runs"),
    "convert": ("saisa_jax.cli.convert", "weights in, weights out: Hugging Face, GGUF, LLaVA, the official SAISA"),
    "checkpoint export": ("saisa_jax.cli.checkpoint_export", "a finished model of any step of a run"),
    "data drawings": ("saisa_jax.cli.data_drawings", "a set of pictures, captions and questions out of drawings"),
    "data prepare": ("saisa_jax.cli.data_prepare", "samples of any source as checked ArrayRecord shards with an index"),
    "data inspect": ("saisa_jax.cli.data_inspect", "a batch as it is trained on: supervised text, images, padding"),
    "layers": ("saisa_jax.cli.layers", "which layers of a model read the picture, and which could do without"),
    "flops": ("saisa_jax.cli.flops", "what a prompt costs under LLaVA, NAAViT and SAISA"),
    "plan": ("saisa_jax.cli.plan", "whether a recipe fits accelerators that are not here, and what it costs"),
    "rows": ("saisa_jax.cli.rows", "which rows, of how many text tokens and images, cost least for the data"),
    "bench image": ("saisa_jax.cli.bench_image", "a first and a second question about a picture, and a compilation"),
    "bench serve": ("saisa_jax.cli.bench_serve", "a server with 1, 8 and 64 clients, against one by one"),
    "bench eval": ("saisa_jax.cli.bench_eval", "questions a second of an evaluation, and where its time goes"),
    "bench step": ("saisa_jax.cli.bench_step", "a training step under SAISA, NAAViT and LLaVA"),
    "bench peers": ("saisa_jax.cli.bench_peers", "SAISA and LLaVA beside the same models in PyTorch, in one run"),
    "bench growth": ("saisa_jax.cli.bench_growth", "time and memory as visual tokens and pictures become more"),
    "bench parts": (
        "saisa_jax.cli.bench_parts",
        "each part of a question and of a step against what this machine can do",
    ),
    "bench data": ("saisa_jax.cli.bench_data", "images a second of a core, beside PIL with transformers' processor"),
}


def usage(first: str = "") -> str:
    """The verbs, or those whose first word is `first`."""
    shown = {verb: about for verb, (_, about) in VERBS.items() if not first or verb.split()[0] == first}
    width = max(map(len, VERBS))
    lines = (f"  {verb:<{width}}  {about}" for verb, about in shown.items())
    return "\n".join(["usage: python -m saisa_jax VERB [--help] ...", "", "verbs:", *lines])


def main(argv: Sequence[str]) -> int:
    """Runs a verb; 2 and one line if there is no such verb, or if it cannot do what it is told."""
    verb = verb_of(argv)
    if verb is None:
        first = argv[0] if argv and argv[0] in {verb.split()[0] for verb in VERBS} else ""
        rest = argv[1:] if first else argv
        if rest and rest[0] in ("-h", "--help"):
            print(usage(first))
            return 0
        print(usage(first), file=sys.stderr)
        if rest:
            name = f"{first} {rest[0]}".strip()
            known = VERBS if first else {verb.split()[0] for verb in VERBS}
            print(f"\nthere is no verb {name!r}{did_you_mean(name, known)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(VERBS[verb][0]).main(argv[len(verb.split()) :]) or 0
    except (UserError, OSError) as error:
        print(f"{verb}: {error}", file=sys.stderr)
        return 2


def verb_of(argv: Sequence[str]) -> str | None:
    """The verb that a command line begins with."""
    return next((words for words in (" ".join(argv[:1]), " ".join(argv[:2])) if words in VERBS), None)


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """The program `saisa_jax`, in a process of its own."""
    quiet_libraries()
    words = sys.argv[1:] if argv is None else argv
    verb = verb_of(words)
    if verb not in COMPILING_VERBS or {"-h", "--help"} & set(words):
        sys.exit(main(words))
    keep_programs(cache_choice(words))
    if verb == "chat":  # counts its programs between the lines of the conversation
        sys.exit(main(words))
    programs = Programs(say)
    status = main(words)
    if status == 0 and (account := str(programs)):  # the last line of a failure is its error
        say(account)
    sys.exit(status)


def say(line: str) -> None:
    """On stderr as it is now, which a progress bar may have taken."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    program()
