"""`tether score`: the rows of a file of any length, resumable, or a few responses on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from tether.client import Client
from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, TetherError
from tether.score_stream import CONCURRENCY
from tether.scores import ScoreItem
from tether_services.cli.connection import credential_options
from tether_services.cli.scoring_rows import InputRow, read_output, read_rows, write_row
from tether_services.runtime.durable import as_storage_error

if TYPE_CHECKING:
    from tether_services.recipes.progress import Report

__all__ = ["SCORE_DESCRIPTION", "add_score_arguments", "score"]

STDIN: Final = "-"
SCORE_DESCRIPTION: Final = """\
Score the rows of FILE, one JSON object per line; - reads them from stdin:

  {"prompt": "...", "response": "...", "id": 7}
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"prompt_token_ids": [1, 2], "response_token_ids": [3, 4]}

A row is written per row, in the same order: its other keys (such as id), then index, score, raw_score, error, model,
version and row_sha256, the begin of the hash of its line. A key that has one of these names is written as input_NAME.
A row that cannot be scored has an error and no score. All rows are scored by one version of the model.

  tether score rows.jsonl > scores.jsonl
  tether score rows.jsonl --output scores.jsonl
  tether score rows.jsonl --output scores.jsonl --resume

The last one goes on after the last whole row of scores.jsonl, also if that was begun with > scores.jsonl (a second
> would empty it first). It is refused if the rows so far are not those of rows.jsonl, or the model version is not
served any more. Or score responses to a prompt: tether score PROMPT RESPONSE...
"""


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what belongs to scoring alone."""
    parser.add_argument("prompt", metavar="FILE | PROMPT", help="JSONL file, - for stdin; with responses: a prompt")
    parser.add_argument("responses", metavar="RESPONSE", nargs="*", help="what to score as an answer to the prompt")
    parser.add_argument("--model", default="", metavar="NAME", help="reward model; the default one otherwise")
    parser.add_argument("--model-version", default="", metavar="VERSION", help="whichever is loaded otherwise")
    parser.add_argument("--json", action="store_true", help="with responses: print everything as JSON")
    parser.add_argument("--output", type=Path, metavar="OUT", help="file for the rows; stdout otherwise")
    parser.add_argument("--resume", action="store_true", help="go on after the last whole row of OUT")
    parser.add_argument(
        "--concurrency", type=int, default=CONCURRENCY, metavar="N", help=f"calls in flight ({CONCURRENCY})"
    )


def score(known: argparse.Namespace) -> int:
    """Score a file or a few responses and return 0, or 1 if something could not be scored."""
    if known.responses:
        if known.output is not None or known.resume:
            raise InvalidArgumentError("--output and --resume are for a FILE, not for a PROMPT", field="--output")
        from tether_services.cli.client_commands import score as score_responses

        return score_responses(known)
    if known.json:
        raise InvalidArgumentError("The rows of a FILE are JSON always; leave --json away", field="--json")
    if known.resume and known.output is None:
        message = "--resume needs the file to go on with: --output OUT --resume, also if it was begun with > OUT"
        raise InvalidArgumentError(message, field="--resume")
    try:
        return _score_file(known)
    except OSError as error:
        raise as_storage_error(error, known.output or Path("stdout")) or error from None


@dataclass(slots=True)
class _Progress:
    """How far a file is."""

    num_done: int = 0
    """Rows that are written."""
    num_failed: int = 0
    """Those of them that could not be scored."""
    model: str = ""
    """Name of the model that scores; empty until it is known."""
    version: str = ""
    """Its version."""
    in_flight: deque[InputRow] = field(default_factory=deque)
    """Rows that are read and not written, oldest first."""

    def note(self, *, failed: bool, model: str, version: str) -> None:
        """Count a row that is written."""
        self.num_done += 1
        self.num_failed += failed
        self.model, self.version = self.model or model, self.version or version

    def send(self, rows: Iterable[InputRow]) -> Iterator[ScoreItem]:
        """Yield what is to be scored."""
        for row in rows:
            self.in_flight.append(row)
            yield row.item


def _score_file(known: argparse.Namespace) -> int:
    """Score a file from its beginning, or from where an earlier attempt ended."""
    progress = _Progress(model=known.model, version=known.model_version)
    with ExitStack() as stack:
        lines, num_rows = _open_input(stack, known.prompt)
        rows = read_rows(lines, name=known.prompt)
        output = _open_output(stack, known)
        if known.resume:
            _find_end(output, rows, progress, name=str(known.output))
        with _saying_how_to_go_on(known, progress):
            _score_rows(known, rows, output, progress, num_rows=num_rows)
    judge = f"; model {progress.model} version {progress.version}" if progress.model else ""
    print(f"{progress.num_done} rows, {progress.num_failed} could not be scored{judge}", file=sys.stderr)
    return 1 if progress.num_failed else 0


def _open_input(stack: ExitStack, name: str) -> tuple[IO[bytes], int | None]:
    """Return the lines, and how many rows there are if that can be known before; every row of a file is checked then.

    Raises:
        InvalidArgumentError: The file cannot be read, or MALFORMED_ROW.
    """
    if name == STDIN:
        return sys.stdin.buffer, None
    try:
        lines = stack.enter_context(open(name, "rb"))  # noqa: SIM115 - the stack closes it
    except OSError as error:
        message = f"Cannot read {name}: {error.strerror}. Give a JSONL file, - for stdin, or a prompt with responses"
        raise InvalidArgumentError(message, field="FILE") from None
    if not lines.seekable():
        return lines, None
    num_rows = sum(1 for _ in read_rows(lines, name=name))
    lines.seek(0)
    return lines, num_rows


def _open_output(stack: ExitStack, known: argparse.Namespace) -> IO[bytes]:
    """Return where the rows go; a file is this command's alone while it runs.

    Raises:
        InvalidArgumentError: OUTPUT_EXISTS: there is one and it shall not be continued; or it cannot be written, or
            another command is at it.
    """
    if known.output is None:
        return sys.stdout.buffer
    flags = os.O_RDWR | os.O_CREAT | (0 if known.resume else os.O_EXCL)
    try:
        output = stack.enter_context(os.fdopen(os.open(known.output, flags, 0o666), "r+b"))
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileExistsError:
        message = f"{known.output} is there. Go on with it with --resume, or name another file"
        raise InvalidArgumentError(message, field="--output", reason="OUTPUT_EXISTS") from None
    except BlockingIOError:
        message = f"Another command writes {known.output}"
        raise InvalidArgumentError(message, field="--output", reason="OUTPUT_IN_USE") from None
    except OSError as error:
        raise InvalidArgumentError(f"Cannot write {known.output}: {error.strerror}", field="--output") from None
    return output


def _find_end(output: IO[bytes], rows: Iterator[InputRow], progress: _Progress, *, name: str) -> None:
    """Go to the end of the last whole row of an earlier attempt, past the rows that it is about.

    Raises:
        InvalidArgumentError: OUTPUT_DIFFERS: it is about other rows, or of another command.
        FailedPreconditionError: MODEL_CHANGED: another model or version is wanted than it began with.
    """
    end = 0

    def whole_lines() -> Iterator[bytes]:
        nonlocal end
        for line in output:
            if line.endswith(b"\n"):  # the last one may have been cut off
                end += len(line)
                yield line

    for number, written in enumerate(read_output(whole_lines(), name=name), start=1):
        row = next(rows, None)
        if row is None or row.sha256 != written.sha256:
            what = "the file has no such row" if row is None else "the file has another row there"
            message = f"{name}, line {number}: {what}. Resume with the file that it was begun with"
            raise InvalidArgumentError(message, field="--output", reason="OUTPUT_DIFFERS")
        wanted, found = (progress.model, progress.version), (written.model, written.version)
        if any(a and b and a != b for a, b in zip(wanted, found, strict=True)):
            message = f"{name}, line {number} was scored by model {found[0]} version {found[1]}, not {' '.join(wanted)}"
            raise FailedPreconditionError(message, field="--output", reason="MODEL_CHANGED")
        progress.note(failed=written.failed, model=written.model, version=written.version)
    output.seek(end)
    output.truncate()


def _score_rows(
    known: argparse.Namespace,
    rows: Iterator[InputRow],
    output: IO[bytes],
    progress: _Progress,
    *,
    num_rows: int | None,
) -> None:
    """Write a row for each that is left.

    Raises:
        FailedPreconditionError: MODEL_CHANGED: the version that scored the rows so far is not served any more.
    """
    first = progress.num_done
    with ExitStack() as stack:
        client = stack.enter_context(
            Client(reward=known.address, timeout_seconds=known.timeout, **credential_options(known))
        )
        report = stack.enter_context(_progress_line(known, num_rows))

        def show(done: int) -> None:
            output.flush()
            report(first + done, f"{progress.num_failed} errors" if progress.num_failed else "")

        results = client.score_many(
            progress.send(rows),
            model=progress.model,
            version=progress.version,
            concurrency=known.concurrency,
            on_progress=show,
        )
        try:
            for scored in results:
                row = progress.in_flight.popleft()
                output.write(write_row(row, dataclasses.replace(scored, index=first + scored.index)))
                progress.note(failed=scored.score.error is not None, model=scored.model, version=scored.version)
        except NotFoundError as error:
            if not first:
                raise
            message = (
                f"{known.output} was begun with model {progress.model} version {progress.version}:"
                f" {error.message.rstrip('.')}."
                " Load that version again, or score the whole file into another one"
            )
            raise FailedPreconditionError(message, reason="MODEL_CHANGED") from None
        finally:
            output.flush()


def _progress_line(known: argparse.Namespace, num_rows: int | None) -> AbstractContextManager[Report]:
    """Return what shows how far it is, on stderr; nothing where the rows themselves go to a terminal."""
    if known.output is None and sys.stdout.isatty():
        return nullcontext(lambda done, figures: None)
    from tether_services.recipes.progress import progress_line

    return progress_line("score", total=num_rows)


@contextmanager
def _saying_how_to_go_on(known: argparse.Namespace, progress: _Progress) -> Iterator[None]:
    """Say what was reached, and how to go on, where it ends too early."""
    try:
        yield
    except (TetherError, KeyboardInterrupt) as error:
        name = "OUT" if known.output is None else known.output
        hint = f"{progress.num_done} rows are written; go on after them with --output {name} --resume"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(hint) from None
        if progress.num_done or known.output is not None:  # the file is there now, though it may be empty
            print(hint, file=sys.stderr)
        raise
