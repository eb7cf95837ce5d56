"""`tether data inspect`: what a data set holds, before anything is trained on it."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tether.errors import InvalidArgumentError

if TYPE_CHECKING:
    from tether_services.recipes.data.inspection import Inspection

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_data(commands: Commands) -> None:
    """Add `tether data inspect` to the command."""
    parser = commands.add_parser(
        "data", help="look at training data, take its prompts", description="Look at training data."
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    text = "print shape, counts, lengths, repeats and the length baseline of data"
    inner = actions.add_parser(
        "inspect",
        help=text,
        description=f"{text.capitalize()}.",
        epilog=_describe_shapes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="file, folder, org/name or org/name:split; all of one kind"
    )
    inner.add_argument("--shape", default="auto", metavar="NAME", help="what the rows look like (auto)")
    inner.add_argument(
        "--validation", action="append", default=[], metavar="SOURCE", help="data to measure on; repeatable"
    )
    inner.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="count tokens too, with this model's tokenizer")
    inner.add_argument("--template", default="auto", metavar="NAME", help="auto, chat, dialogue or plain (auto)")
    inner.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="a data setting of the stages"
    )
    inner.add_argument("--json", action="store_true", help="print everything as JSON")
    inner.set_defaults(run=inspect)
    _add_prompts(actions)


def _add_prompts(actions: Commands) -> None:
    text = "write the prompts of data as the prompts of a run"
    inner = actions.add_parser("prompts", help=text, description=f"{text.capitalize()}, each once, in their order.")
    inner.add_argument("sources", nargs="+", metavar="SOURCE", help="demonstrations, pairs or rankings of any shape")
    inner.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines to write")
    inner.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="of the policy")
    inner.add_argument("--template", default="auto", metavar="NAME", help="auto, dialogue or plain (auto)")
    inner.add_argument("--shape", default="auto", metavar="NAME", help="what the rows look like (auto)")
    inner.add_argument("--max-tokens", type=int, metavar="N", help="leave longer prompts out, and count them")
    inner.add_argument("--max-malformed-share", metavar="SHARE", help="refuse data of which more is malformed (0.01)")
    inner.set_defaults(run=write_prompts)


def _describe_shapes() -> str:
    from tether_services.recipes.data.shapes import SHAPES

    examples = (f"{name}:\n{textwrap.indent(shape.example, '    ')}" for name, shape in SHAPES.items())
    return "The shapes, with one row of each:\n\n" + "\n".join(examples)


def inspect(known: argparse.Namespace) -> int:
    """Print what the sources hold and return 0.

    Raises:
        InvalidArgumentError: A source cannot be read, or a setting is wrong.
    """
    from tether_services.recipes.config import DataConfig
    from tether_services.recipes.data.inspection import inspect_data
    from tether_services.runtime.settings import merge_overrides, validate

    values: dict[str, Any] = {
        "sources": tuple(known.sources),
        "validation_sources": tuple(known.validation),
        "shape": known.shape,
    }
    merge_overrides(values, known.overrides)
    config, renderer = validate(DataConfig, values), _load_renderer(known)
    with _row_counter() as on_row:
        inspection = inspect_data(config, renderer=renderer, on_row=on_row)
    if known.json:
        print(json.dumps(inspection.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print_tables(inspection)
    return 0


def write_prompts(known: argparse.Namespace) -> int:
    """Write the distinct prompts of the sources as JSON lines, print all counts, and return 0.

    Raises:
        InvalidArgumentError: A source cannot be read, too much of it is malformed, no prompt is left, a setting is
            wrong, or the chat template would be needed.
    """
    from tether_services.recipes.config import DataConfig
    from tether_services.recipes.data.reading import check_malformed, read_parts
    from tether_services.recipes.data.records import Demonstration
    from tether_services.runtime.settings import validate

    if known.max_tokens is not None and known.max_tokens < 1:
        raise InvalidArgumentError(f"{known.max_tokens} leaves every prompt out; 1 is the least", field="--max-tokens")
    values = {name: getattr(known, name) for name in ("sources", "shape", "max_malformed_share")}
    config = validate(DataConfig, {name: value for name, value in values.items() if value is not None})
    renderer = _load_renderer(known)
    with _row_counter() as on_row:
        parts = read_parts(config, kind=Demonstration, on_row=on_row)
    check_malformed(parts, config)
    records, tally = parts[0].records, parts[0].tally
    prompts = list(dict.fromkeys(record.prompt for record in records if isinstance(record, Demonstration)))
    fitting = [p for p in prompts if not known.max_tokens or len(renderer.prompt_ids(p)) <= known.max_tokens]
    _write_rows(known.output, [{"prompt": renderer.prompt_text(prompt)} for prompt in fitting])
    print(f"{known.output}: {len(fitting)} prompts, {len(prompts) - len(fitting)} longer ones left out")
    print(f"{tally.num_rows} rows; malformed: {_counts(tally.malformed)}; dropped: {_counts(tally.dropped)}")
    return 0


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines to a file, in a new folder if need be.

    Raises:
        InvalidArgumentError: There is no row, or the place cannot be written to.
    """
    from tether_services.runtime.durable import write_text

    if not rows:
        raise InvalidArgumentError("no prompt is left to write", field="sources")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {path}: {error.strerror}", field="--output") from error


def _load_renderer(known: argparse.Namespace) -> Any:
    from tether_services.recipes.data.rendering import Renderer, check_template

    check_template(known.template, field="--template")
    if known.tokenizer is None:
        return None
    from tether_services.recipes.base_model import load_tokenizer

    return Renderer(load_tokenizer(known.tokenizer, field="--tokenizer"), template=known.template, field="--template")


@contextmanager
def _row_counter() -> Iterator[Callable[[], None]]:
    """Yield a function to call after every row; stderr shows their number while the work goes on."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.completed} rows"), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda: progress.advance(task)


def _print_tables(inspection: Inspection) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    figures = Table(show_header=False)
    figures.add_column(no_wrap=True)
    figures.add_column(overflow="fold")
    for name, value in _figures(inspection):
        figures.add_row(name, escape(value))
    console = Console()
    console.print(figures)
    lengths = Table("lengths", "count", "mean", *(inspection.lengths[0].percentiles if inspection.lengths else ()))
    for row in inspection.lengths:
        lengths.add_row(row.name, str(row.count), f"{row.mean:.0f}", *map(str, row.percentiles.values()))
    if inspection.lengths:
        console.print(lengths)


def _figures(inspection: Inspection) -> Iterator[tuple[str, str]]:
    """Yield what the first table shows, line by line; the first malformed rows are in the log."""
    report = inspection.report
    yield from (("source", f"{source} ({shape})") for source, shape in report["shapes"].items())
    yield "rows", str(report["num_rows"])
    yield "malformed", f"{_counts(report['malformed'])} ({inspection.malformed_share:.2%} of the rows)"
    yield "dropped", _counts(report["dropped"])
    yield "records", f"{report['num_train']} training, {report['num_validation']} validation"
    yield "distinct prompts", f"{inspection.num_prompts} ({inspection.num_repeated_prompts} repeated)"
    if inspection.num_answers:
        yield "answers per prompt", ", ".join(f"{k}: {count}" for k, count in inspection.num_answers.items())
        yield "pairs in both directions", str(inspection.num_conflicts)
    if inspection.labels:
        yield "labels", ", ".join(f"{label}: {count}" for label, count in inspection.labels.items())
    for overlap in inspection.overlaps:
        shared = f"{overlap.num_prompts} prompts and {overlap.num_openings} openings"
        yield "shared", f"{shared} by {overlap.first} and {overlap.second}"
    if length := inspection.length_preference:
        yield "longer answer wins", f"{length.longer_wins:.3f} of {length.num_pairs} pairs"
        yield "longest is best", f"{length.longest_is_best:.3f} of the rankings"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "0"
