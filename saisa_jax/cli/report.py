"""`python -m saisa_jax report`: plots and one self-contained HTML page of a run, or of several side by side; or of an
evaluation, to browse its answers.

python -m saisa_jax report --workdir=runs/demo
python -m saisa_jax report --runs=runs/compare/saisa,runs/compare/llava --output=runs/compare/report
python -m saisa_jax report --evaluation=runs/demo/evaluation/easy_vqa.json
"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath
from rich.console import Console

from saisa_jax.cli.parser import Parser
from saisa_jax.evaluation.results import find_results, read_result
from saisa_jax.report import browse, build, page
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
    which.add_argument("--evaluation", help="a TASK.json of eval.py, or an output folder: wrong answers with their "
                       "pictures, as TASK.html")  # fmt: skip
    parser.add_argument("--output", help="where index.html and the plots go (default: WORKDIR/report), or TASK.html "
                        "(default: beside TASK.json)")  # fmt: skip
    parser.add_argument("--attention", type=int, default=12, help="of --evaluation: wrong answers whose attention over "
                        "the picture is drawn, for which the model is loaded; 0: none (default: 12)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.evaluation:
        return _evaluation(args.evaluation, args.output, args.attention)
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


def _evaluation(place: str, output: str | None, looks: int) -> int:
    console = Console()
    for path in find_results(place).values():
        folder = epath.Path(output) if output else path.parent
        page_path, notices = browse.write(read_result(path), folder, looks)
        for notice in notices:
            console.print(f"Note: {notice}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"The answers are in {page_path}", highlight=False, markup=False, soft_wrap=True)
    return 0
