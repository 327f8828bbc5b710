"""`python -m saisa_jax convert`: weights in, weights out, and what is in there.

python -m saisa_jax convert import --from=DIR_OR_REPO_OR_GGUF --to=CKPT
python -m saisa_jax convert import --llm=DIR --vision=DIR --to=CKPT
python -m saisa_jax convert export --from=CKPT --layout=saisa --to=DIR
python -m saisa_jax convert inspect PATH
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import transformers

from saisa_jax.checkpoints import read_account
from saisa_jax.cli.parser import Parser, layer_numbers
from saisa_jax.config import ALIGNMENTS, DTYPES
from saisa_jax.convert.export_checkpoint import export_checkpoint
from saisa_jax.convert.files.hub import check_push, push, resolve
from saisa_jax.convert.import_checkpoint import ImportOptions, import_checkpoint
from saisa_jax.convert.inspection import inspect
from saisa_jax.convert.layouts import LAYOUTS
from saisa_jax.convert.memory import allowance, peak_bytes
from saisa_jax.data.text.templates import NAMES


def main(argv: Sequence[str]) -> int:
    """The verb `convert`.

    Raises:
      ConvertError, CheckpointError, ConfigError, DataError, OSError: something does not fit, or cannot be written.
    """
    args = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # files and host memory alone: leave accelerators to others
    transformers.logging.set_verbosity_error()  # a tokenizer beside a config of LLaVA makes it wonder at length
    {"import": _import, "export": _export, "inspect": _inspect}[args.action](args)
    return 0


def _parser() -> Parser:
    parser = Parser("convert", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|export|inspect")
    where = "a directory, a .gguf file or a repository of the hub (org/name)"

    action = actions.add_parser("import", help="somebody else's files -> a finished model")
    source = action.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", dest="source", help=f"a whole multimodal checkpoint, or an LLM alone: {where}")
    source.add_argument("--llm", dest="source", help=f"an LLM, for training together with --vision: {where}")
    action.add_argument("--vision", help=f"the vision tower, where the checkpoint does not hold it: {where}")
    action.add_argument("--base", help=f"of a LoRA adapter (default: the one that it names): {where}")
    action.add_argument("--projector", help="a trained mm_projector.bin for --llm and --vision, to start stage 2")
    action.add_argument("--to", required=True, help="the finished model: a directory that does not exist yet")
    action.add_argument("--layout", choices=LAYOUTS, help="of the source (default: told from its tensors)")
    action.add_argument("--dtype", choices=DTYPES, help="of the parameters (default: that of the files)")
    action.add_argument("--template", choices=NAMES, help="default: told from the tokenizer")
    action.add_argument("--system_prompt", help="default: that of the tokenizer's chat template, or the template's")
    action.add_argument("--tokenizer", help="a directory, or none (default: the source's own)")
    said = (
        "what the model is (default: what its layout says, saisa of --llm and --vision): a LLaVA can be read as SAISA"
    )
    action.add_argument("--as", "--alignment", dest="alignment", choices=ALIGNMENTS, help=said)
    action.add_argument(
        "--visual_layers", type=layer_numbers, help="of SAISA, the layers that see images: 0,1,7 (default: all)"
    )
    action.add_argument(
        "--frozen_prefix", action="store_true", help="text before the first image gets no attention: ViCA's 7B"
    )
    action.add_argument("--select_layer", type=int, help="the tower's hidden state to use (default -2; ConvNeXt -1)")
    action.add_argument("--image_size", type=int, help="pixels of a side (default: what the tower was trained on)")
    action.add_argument("--seed", type=int, default=0, help="of the fresh projectors")
    action.add_argument(
        "--allow_nonfinite", action="store_true", help="import weights that hold inf or NaN as they are"
    )

    action = actions.add_parser("export", help="a finished model -> safetensors, config and tokenizer")
    action.add_argument("--from", dest="source", required=True, help="a finished model")
    action.add_argument("--layout", choices=LAYOUTS, required=True)
    action.add_argument("--to", required=True, help="a directory that does not exist yet")
    action.add_argument("--dtype", choices=DTYPES, help="default: that of the import, or of the parameters")
    action.add_argument("--push", metavar="ORG/NAME", help="upload it to the hub as well, with a model card")
    action.add_argument("--public", action="store_true", help="with --push: for everybody to see (default: private)")

    action = actions.add_parser("inspect", help="what is in there, and what would be ignored or missing")
    action.add_argument("source", metavar="PATH", help=f"{where}, or a finished model")
    action.add_argument("--vision", help="the vision tower, where the checkpoint does not hold it")
    action.add_argument("--all", action="store_true", help="list every tensor")
    return parser


def _import(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    names = ("source", "vision", "layout", "dtype", "template", "system_prompt", "tokenizer", "alignment")
    others = (
        "visual_layers",
        "frozen_prefix",
        "select_layer",
        "image_size",
        "seed",
        "allow_nonfinite",
        "base",
        "projector",
    )
    plan = import_checkpoint(ImportOptions(**{name: getattr(args, name) for name in (*names, *others)}), args.to)
    document, config = read_account(args.to)
    seconds = time.perf_counter() - started
    print(f"{args.to}: {document['parameters']:,} parameters ({', '.join(plan.parts)}) in {seconds:.0f} s")
    kept = [key for piece in plan.pieces for key in piece.match.ignored]
    print(f"tensors that the model never reads, kept in the sidecar: {len(kept)}")
    print(f"template {config.stage(plan.stage).template}; alignment {config.model.alignment}; stage {plan.stage}")
    if config.model.visual_layers is not None:
        seen = ",".join(map(str, config.model.visual_layers))
        print(f"layers that see images: {seen} of {config.model.num_layers} (model.visual_layers)")
    if "vision" in plan.parts:
        vision = config.model.vision
        unused = vision.num_layers - vision.num_used_layers
        rest = f"; the last {unused} are not, and stay in the sidecar" if unused else ""
        print(
            f"vision: {vision.num_used_layers} of {vision.num_layers} layers are used "
            f"(model.vision.select_layer={vision.select_layer}){rest}"
        )
        print(f"images are made square by model.vision.image_mode={config.model.vision.image_mode}")
    _print_peak(document["leaves"])


def _print_peak(leaves: Mapping[str, Any]) -> None:
    """The memory that this process took, beside what parameters of this size may take."""
    if peak := peak_bytes():
        print(f"peak host memory {peak / 2**30:.2f} GiB of {allowance(leaves) / 2**30:.2f} GiB allowed")


def _export(args: argparse.Namespace) -> None:
    readme = ""
    if args.push:
        from saisa_jax.report.model_card import (
            model_card,
        )  # it counts FLOPs, for which other conversions need no memory

        check_push(args.push)
        readme = model_card(args.source, args.layout, args.push)
    exported = export_checkpoint(args.source, args.layout, args.to, dtype=args.dtype, readme=readme)
    print(f"{args.to}: {', '.join(exported.files)}")
    if exported.restored:
        print(f"tensors written back from the sidecar: {len(exported.restored)}")
    if exported.stale:
        print(
            "STALE: the parameters around these have changed since the import, and these have not: "
            + ", ".join(exported.stale)
        )
    for note in exported.notes:
        print(f"NOTE: {note}")
    _print_peak(read_account(args.source)[0]["leaves"])
    if args.push:
        print(f"pushed to {push(Path(args.to), args.push, public=args.public)}")


def _inspect(args: argparse.Namespace) -> None:
    path = resolve(args.source)
    vision = Path(resolve(args.vision)) if args.vision else None
    inspect(path, vision=vision, everything=args.all)
