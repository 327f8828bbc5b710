"""`python -m saisa_jax report`: plots and one self-contained HTML page of a run, or of several side by side.

python -m saisa_jax report --workdir=runs/demo
python -m saisa_jax report --runs=runs/compare/saisa,runs/compare/llava --output=runs/compare/report
"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath
from rich.console import Console

from saisa_jax.cli.parser import Parser
from saisa_jax.report import build, page
from saisa_jax.report.runs import read_runs


def main(argv: Sequence[str]) -> int:
    """The verb `report`.

    Raises:
      ReportError: there is nothing to report.
    """
    parser = Parser("report", __doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", help="one run of train.py")
    which.add_argument("--runs", help="several of them, with commas between; then --output is needed")
    parser.add_argument("--output", help="where index.html and the plots go (default: WORKDIR/report)")
    args = parser.parse_args(argv)
    if args.runs and not args.output:
        parser.error("--runs needs --output=DIRECTORY")
    directories = [args.workdir] if args.workdir else [name for name in args.runs.split(",") if name]
    runs = read_runs(directories)
    content, files = build.collect(runs)
    out = epath.Path(args.output) if args.output else epath.Path(args.workdir) / "report"
    build.write(out, page.render(content), files)
    console = Console()
    console.print(build.result_table(runs))
    for notice in content.notices:
        console.print(f"Note: {notice}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"The report is in {out / 'index.html'}", highlight=False, markup=False, soft_wrap=True)
    return 0
