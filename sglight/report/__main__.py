"""The command: `python -m sglight.report PATH...`, or `sglight-report` once installed; imports no torch."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path

from rich.console import Console

from sglight.errors import UserError
from sglight.files import replacing
from sglight.output import escape_unknown
from sglight.report.groups import tasks
from sglight.report.measures import BACKPROP, FIT, TARGET, compare
from sglight.report.page import render
from sglight.report.runs import find_runs
from sglight.report.tables import markdown, print_tables, to_csv

SWEEP_MEASURES = (
    "test/acc",
    TARGET,
    FIT,
    BACKPROP,
    "memory/peak_bytes",
)  # in the table at the end of a sweep


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a mistake ends it with one sentence and status 1."""
    escape_unknown()
    options = _parser().parse_args(arguments)
    try:
        report(options)
        sys.stdout.flush()
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # or flushing at exit would fail again
        if isinstance(error, BrokenPipeError):
            sys.exit(0)  # the reader, such as `head`, has closed the pipe
        sys.exit(f"error: {error}")


def report(options: argparse.Namespace) -> None:
    """Read the runs, print the comparison and write the files that the options ask for.

    Raises:
        UserError: if there are no runs, or no run has a key of ``--by``.
    """
    runs = find_runs(options.paths)
    if not runs:
        raise UserError(
            f"no runs in {', '.join(map(str, options.paths))}; give the folder of one, or one above it"
        )
    comparisons = [compare(task, options.target) for task in tasks(runs, options.by)]
    if options.markdown:
        print(markdown(comparisons))
    else:
        print_tables(comparisons, runs, Console())
    if options.csv is not None:
        _write(options.csv, to_csv(comparisons, runs))
    if options.html is not None:
        _write(options.html, render(runs, comparisons, options.html.parent))


def summarise(folder: Path) -> bool:
    """Print a short comparison of the runs in a folder; returns whether there are any with results."""
    runs = find_runs([folder]) if folder.is_dir() else []
    if not any(run.metrics for run in runs):
        return False
    print_tables([compare(task) for task in tasks(runs)], runs, Console(), SWEEP_MEASURES)
    return True


def _write(path: Path, text: str) -> None:
    data = text.encode("utf-8", "replace")  # names of folders may contain bytes that are no UTF-8
    if path.exists() and (path.is_symlink() or not path.is_file()):
        path.write_bytes(data)  # a link, device or pipe must not be replaced by a file
    else:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    print(f"written: {path}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglight.report",
        description="Compare runs: accuracy, time, speed-up, memory; mean and deviation over seeds.",
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[Path("outputs")], metavar="PATH",
        help="folders of runs, or folders above them (default: outputs)",
    )  # fmt: skip
    parser.add_argument(
        "--by", type=_names, default=[], metavar="KEY,...",
        help="group by these keys (strategy,model,trainer.devices or just devices) instead of by all but the seed",
    )  # fmt: skip
    parser.add_argument(
        "--target", type=_accuracy, metavar="ACC",
        help="validation accuracy to which time is taken, such as 0.97 (default: 99 %% of the worst contender's)",
    )  # fmt: skip
    parser.add_argument("--html", type=_file, metavar="FILE", help="write a page with tables and charts")
    parser.add_argument("--csv", type=_file, metavar="FILE", help="write a line for each run")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _file(text: str) -> Path:
    if not text or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file")
    return Path(text)


def _accuracy(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no accuracy; give a number above 0, at most 1")
    return value


if __name__ == "__main__":
    main()
