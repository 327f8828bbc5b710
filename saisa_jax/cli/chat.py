"""`python -m saisa_jax chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from saisa_jax.cli import devices
from saisa_jax.cli.parser import Parser
from saisa_jax.compilation import Programs
from saisa_jax.config import ConfigError
from saisa_jax.data.sample import ASSISTANT, Turn
from saisa_jax.errors import UserError
from saisa_jax.inference.chat import Chat
from saisa_jax.inference.generate import Sampling, check_sampling
from saisa_jax.inference.model import load
from saisa_jax.inference.quantize import QUANTIZATIONS

HELP = """\
/image FILE   show the model a picture with the next question
/history      the conversation so far
/reset        start anew, without pictures
/save FILE    write the conversation (JSON: turns, and the pictures' files)
/help         this list
/exit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


class Terminal:
    """Reads lines, answers them, obeys commands."""

    def __init__(self, chat: Chat, console: Console, max_new_tokens: int | None, sampling: Sampling, seed: int):
        self.chat, self.console = chat, console
        self.max_new_tokens, self.sampling, self.seed = max_new_tokens, sampling, seed
        self.pictures: list[str] = []
        self.programs = Programs()

    def run(self) -> None:
        """Until /exit or the end of the input."""
        while True:
            try:
                line = self.console.input("[bold green]you[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self.command(*line.split(maxsplit=1))
                elif line:
                    self.answer(line)
            except (UserError, OSError) as error:
                self.console.print(f"[red]{escape(str(error))}[/]")

    def command(self, name: str, argument: str = "") -> None:
        """One of HELP's.

        Raises:
          DataError, OSError: a picture that cannot be read, a file that cannot be written.
        """
        if name == "/image" and argument:
            with self.console.status("looking at it (the first picture compiles)"):
                self.chat.add_image(argument)
            self.pictures.append(argument)
            self.console.print(f"[dim]{escape(argument)} goes with the next question[/]")
        elif name == "/reset":
            self.chat, self.pictures = Chat(self.chat.model), []
            self.console.print("[dim]a new conversation[/]")
        elif name == "/save" and argument:
            turns = [{"role": turn.role, "text": turn.text} for turn in self.chat.turns]
            content = json.dumps({"images": self.pictures, "turns": turns}, indent=2, ensure_ascii=False)
            Path(argument).write_text(content + "\n")
            self.console.print(f"[dim]{len(turns)} turns written to {escape(argument)}[/]")
        elif name == "/history":
            for turn in self.chat.turns:
                self.say(turn)
        elif name == "/help":
            self.console.print(HELP, markup=False, highlight=False)
        else:
            wanted = " FILE" if name in ("/image", "/save") else ""
            self.console.print(f"[red]{escape(name + wanted)}: {'which file?' if wanted else 'no such command'}[/]")
            self.console.print(HELP, markup=False, highlight=False)

    def say(self, turn: Turn) -> None:
        """A turn that was."""
        color = "cyan" if turn.role == ASSISTANT else "green"
        self.console.print(f"[bold {color}]{'model' if turn.role == ASSISTANT else 'you'}[/] ", end="")
        self.console.print(turn.text, markup=False, highlight=False)

    def clocks(self) -> tuple[float, float]:
        """The time, and the time without what was spent on compiling, in seconds."""
        now = time.perf_counter()
        return now, now - self.programs.seconds

    def answer(self, question: str) -> None:
        """Prints the answer as it comes, and how fast it came. Ctrl-C stops it.

        Raises:
          DataError: the question cannot be asked.
        """
        started, first = self.clocks(), None
        pieces = self.chat.ask(question, self.max_new_tokens, self.sampling, self.seed)
        try:
            with self.console.status("reading (the first question of its length compiles)"):
                piece = next(pieces, None)
            first = self.clocks()
            self.console.print("[bold cyan]model[/] ", end="")
            while piece is not None:
                self.console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                piece = next(pieces, None)
        except KeyboardInterrupt:
            pieces.close()
            self.console.print(" [red]stopped[/]", end="")
        self.console.print()
        ended = self.clocks()
        first = first or ended
        later = self.chat.generated - 1
        rate = f", {later / max(ended[1] - first[1], 1e-9):.1f} tokens/s" if later > 0 else ""
        compiled = (ended[0] - started[0]) - (ended[1] - started[1])
        self.console.print(
            f"[dim]{self.chat.generated} token{'' if self.chat.generated == 1 else 's'}{rate}; the first after "
            f"{first[0] - started[0]:.2f} s; {self.chat.reused} tokens of the prompt were read before"
            f"{f'; compiling took {compiled:.1f} s, once' if compiled > 0.05 else ''}[/]",
            highlight=False,
        )


def main(argv: Sequence[str]) -> int:
    """The verb `chat`.

    Raises:
      CheckpointError, ConfigError, DataError: the model cannot be loaded, a flag is wrong, a picture cannot be read.
    """
    parser = Parser("chat", __doc__)
    parser.add_argument("--checkpoint", required=True, help="a finished model: WORKDIR/finetune/model, or an import")
    parser.add_argument("--image", action="append", default=[], help="a picture of the first question; may be repeated")
    parser.add_argument("--allow_urls", action="store_true", help="fetch pictures that are named by an http(s) URL")
    parser.add_argument("--max_new_tokens", type=int, help="of an answer; by default as many as fit, at most 256")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the best token")
    parser.add_argument("--top_p", type=float, default=1.0, help="choose among the likeliest tokens of this mass")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    devices.add_model_flags(parser)
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="int8: 8-bit weights (needs qwix)")
    flags = parser.parse_args(argv)
    sampling = Sampling(flags.temperature, flags.top_p)
    check_sampling(sampling)
    if flags.max_new_tokens is not None and flags.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens={flags.max_new_tokens} must be at least 1")
    console = Console()
    with console.status("loading"):
        model = load(flags.checkpoint, quantize=flags.quantize, allow_urls=flags.allow_urls, **devices.placed(flags))
    chat = Chat(model)
    with console.status("looking at the picture (the first one compiles)"):
        for image in flags.image:
            chat.add_image(image)
    _line_editing()
    config = model.model_config
    console.print(
        f"{model.config.name}: {config.alignment}, {config.num_layers} layers of width {config.embed_dim}. "
        "/help lists the commands. A first answer takes longer: the model's programs are compiled.",
        highlight=False,
        soft_wrap=True,
    )
    terminal = Terminal(chat, console, flags.max_new_tokens, sampling, flags.seed)
    terminal.pictures += flags.image
    terminal.run()
    return 0


def _line_editing() -> None:
    """Arrow keys and the history of lines, where the terminal's Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
