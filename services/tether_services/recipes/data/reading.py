"""What a stage trains on: records of one kind from all sources, checked, counted and divided."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from tether.errors import FieldViolation, InvalidArgumentError
from tether_services.recipes.config import DataConfig
from tether_services.recipes.data.problems import Dropped, Malformed, RowError, Tally
from tether_services.recipes.data.records import Demonstration, Document, LabelledText, Ranking
from tether_services.recipes.data.rows import Row, RowLimits, read_rows
from tether_services.recipes.data.shapes import SHAPES, Record, RowShape, detect_shape, shapes_of
from tether_services.recipes.data.splitting import identity, is_validation, split_key

__all__ = [
    "DataReport",
    "DataSet",
    "Part",
    "check_malformed",
    "divide_parts",
    "read_all_demonstrations",
    "read_all_documents",
    "read_demonstrations",
    "read_documents",
    "read_labelled",
    "read_parts",
    "read_rankings",
    "report_of",
]

RecordT = TypeVar("RecordT", Demonstration, Document, LabelledText, Ranking)
OnRow = Callable[[], object]
ALSO_READ: dict[type[Record], tuple[type[Record], ...]] = {Demonstration: (Ranking,), Document: (LabelledText,)}
"""What may stand in place of the records that are wanted."""
PROBED_ROWS = 100
"""Rows that are looked at before giving up on telling a shape."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was read and what became of it."""

    shapes: dict[str, str]
    """Shape of the rows by source."""
    num_rows: int
    """Rows of all sources, malformed ones included."""
    num_train: int
    num_validation: int
    dropped: dict[str, int]
    """Records left out by reason, `duplicate` among them."""
    malformed: dict[str, int]
    """Rows left out by reason."""
    first_malformed: tuple[str, ...]
    """Place and reason of the first malformed rows."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON spells it, with every file reduced to its name, or what tells it from others."""
        names = _short_names(self.shapes)

        def shorten(place: str) -> str:
            source = next((source for source in names if place.startswith(f"{source}:")), "")
            return names.get(source, "") + place.removeprefix(source)

        shapes = {names[source]: shape for source, shape in self.shapes.items()}
        return asdict(self) | {"shapes": shapes, "first_malformed": [shorten(place) for place in self.first_malformed]}


def _short_names(sources: Iterable[str]) -> dict[str, str]:
    """Return the shortest end of each file's path that no other one has; data sets of a hub keep their names."""
    parts = {source: Path(source).parts if Path(source).exists() else (source,) for source in sources}

    def name_of(source: str) -> str:
        for count in range(1, len(parts[source]) + 1):
            end = parts[source][-count:]
            if sum(other[-count:] == end for other in parts.values()) == 1:
                return str(Path(*end)) if Path(source).exists() else source
        return source

    return {source: name_of(source) for source in parts}


@dataclass(frozen=True, slots=True)
class DataSet(Generic[RecordT]):
    """What a stage trains on and measures on; in the order of the sources."""

    train: list[RecordT]
    """Never empty."""
    validation: list[RecordT]
    """Never empty; shares no prompt with `train`."""
    report: DataReport


@dataclass(frozen=True, slots=True)
class Part:
    """The records of a list of sources, each once, not yet divided."""

    records: list[Record]
    shapes: dict[str, str]
    """By source."""
    tally: Tally


def read_demonstrations(config: DataConfig, *, field: str = "") -> DataSet[Demonstration]:
    """Return prompts with the answer to learn; of rankings the best answer, the first of several.

    Raises:
        InvalidArgumentError: A source cannot be read, too much of it is malformed, or one part is empty.
    """
    return _read(config, Demonstration, field=field)


def read_rankings(config: DataConfig, *, field: str = "") -> DataSet[Ranking]:
    """Return prompts with ranked answers.

    Raises:
        InvalidArgumentError: As `read_demonstrations`.
    """
    return _read(config, Ranking, field=field)


def read_documents(config: DataConfig, *, field: str = "") -> DataSet[Document]:
    """Return plain texts; of labelled texts the words. The only document of a source, a book, is always trained on.

    Raises:
        InvalidArgumentError: As `read_demonstrations`.
    """
    return _read(config, Document, field=field)


def read_labelled(config: DataConfig, *, field: str = "") -> DataSet[LabelledText]:
    """Return texts with labels; two spellings of a sentence are one text, and the first one's label counts.

    Raises:
        InvalidArgumentError: As `read_demonstrations`.
    """
    return _read(config, LabelledText, field=field)


def read_all_demonstrations(config: DataConfig, *, field: str = "") -> list[Demonstration]:
    """Return every demonstration of all sources, undivided and each once: to measure on, so one is enough.

    Raises:
        InvalidArgumentError: A source cannot be read, too much of it is malformed, or nothing is left.
    """
    return _read_all(config, Demonstration, field=field)


def read_all_documents(config: DataConfig, *, field: str = "") -> list[Document]:
    """Return every document of all sources, undivided and each once; of labelled texts the words.

    Raises:
        InvalidArgumentError: As `read_all_demonstrations`.
    """
    return _read_all(config, Document, field=field)


def _read_all(config: DataConfig, kind: type[RecordT], *, field: str) -> list[RecordT]:
    with _named_under(field):
        parts = read_parts(config, kind=kind)
        check_malformed(parts, config)
        records = drop_repeated((record for part in parts for record in part.records), Tally())
        if not records:
            raise InvalidArgumentError(f"no {kind.__name__.lower()} is left", field="sources")
    return cast("list[RecordT]", records)


def _read(config: DataConfig, kind: type[RecordT], *, field: str) -> DataSet[RecordT]:
    with _named_under(field):
        return _read_kind(config, kind)


@contextmanager
def _named_under(field: str) -> Iterator[None]:
    """Let errors name their setting under `field`, where the configuration stands in a larger one; empty: nowhere."""
    try:
        yield
    except InvalidArgumentError as error:
        if not field:
            raise
        violations = tuple(FieldViolation(f"{field}.{v.field}", v.description) for v in error.violations)
        raise InvalidArgumentError(error.message, reason=error.reason, violations=violations) from error


def _read_kind(config: DataConfig, kind: type[RecordT]) -> DataSet[RecordT]:
    parts = read_parts(config, kind=kind)
    check_malformed(parts, config)
    train, validation = divide_parts(parts, fraction=config.validation_fraction)
    _check_not_empty(train, validation, has_validation_sources=len(parts) == 2)
    report = report_of(parts, num_train=len(train), num_validation=len(validation))
    return DataSet(cast("list[RecordT]", train), cast("list[RecordT]", validation), report)


def read_parts(config: DataConfig, *, kind: type[Record] | None, on_row: OnRow | None = None) -> list[Part]:
    """Return one part, or two where validation data has sources of its own; each record of a part is there once.

    Args:
        config: What to read and how.
        kind: What is wanted; None for what the first source holds.
        on_row: Called after every row.

    Raises:
        InvalidArgumentError: A source cannot be read, or holds something else.
    """
    train = _read_part(config, config.sources, kind=kind, field="sources", on_row=on_row)
    if not config.validation_sources:
        return [train]
    kind = kind or SHAPES[next(iter(train.shapes.values()))].record
    reserved = config.validation_sources
    return [train, _read_part(config, reserved, kind=kind, field="validation_sources", on_row=on_row)]


def divide_parts(parts: Sequence[Part], *, fraction: float) -> tuple[list[Record], list[Record]]:
    """Return (training, validation) records without a key of the split in common."""
    if len(parts) == 1:
        return _divide(parts[0].records, fraction=fraction)
    train, validation = parts
    keys = {split_key(record) for record in validation.records}
    kept = [record for record in train.records if split_key(record) not in keys]
    if len(kept) < len(train.records):
        train.tally.dropped["in_validation"] += len(train.records) - len(kept)
    return kept, validation.records


def _read_part(
    config: DataConfig, sources: Sequence[str], *, kind: type[Record] | None, field: str, on_row: OnRow | None
) -> Part:
    limits = RowLimits(config.max_row_bytes, config.max_rows, config.separator, field)
    part = Part([], {}, Tally())
    for source in sources:
        rows = _tallied(read_rows(source, limits), part.tally, on_row=on_row)
        shape, rows = _find_shape(rows, part.tally, source=source, name=config.shape, field=field)
        kind = kind or shape.record
        _check_kind(shape, kind, source=source, field=field)
        part.shapes[source] = shape.name
        for record in _parse_rows(rows, shape, tally=part.tally):
            part.records.append(_as_kind(record, kind))
    return replace(part, records=drop_repeated(part.records, part.tally))


def _tallied(found: Iterable[Row | Malformed | Dropped], tally: Tally, *, on_row: OnRow | None) -> Iterator[Row]:
    """Yield the rows; count what is none."""
    for item in found:
        if on_row:
            on_row()
        if isinstance(item, Malformed):
            tally.add_malformed(item)
        elif isinstance(item, Dropped):
            tally.dropped[item.reason] += 1
        else:
            yield item


def _find_shape(
    rows: Iterator[Row], tally: Tally, *, source: str, name: str, field: str
) -> tuple[RowShape, Iterator[Row]]:
    """Return the shape of a source and all its rows; rows before the first telling one are read like the others."""
    if name != "auto":
        return SHAPES[name], rows
    probed: list[Row] = []
    for row in itertools.islice(rows, PROBED_ROWS):
        probed.append(row)
        if shape := detect_shape(row.value):
            return shape, itertools.chain(probed, rows)
    found = ", ".join(repr(key)[:40] for key in list(probed[0].value)[:10]) if probed else "no row that can be read"
    raise InvalidArgumentError(
        f"cannot tell the shape of {source} from its rows ({'; '.join([found, *tally.first_malformed])}); "
        f"there are {', '.join(SHAPES)}: see `tether data inspect --help` for one row of each",
        field=field,
    )


def _check_kind(shape: RowShape, kind: type[Record], *, source: str, field: str) -> None:
    accepted = [name for held in (kind, *ALSO_READ.get(kind, ())) for name in shapes_of(held)]
    if shape.name not in accepted:
        raise InvalidArgumentError(
            f"{source} holds rows of the shape {shape.name}; here one of {', '.join(accepted)} is needed", field=field
        )


def _parse_rows(rows: Iterable[Row], shape: RowShape, *, tally: Tally) -> Iterator[Record]:
    for row in rows:
        try:
            records = list(shape.parse(row.value, row.place))
        except RowError as error:
            tally.add_malformed(Malformed(row.place, error.reason, error.detail))
            continue
        tally.num_rows += 1
        for record in records:
            if isinstance(record, Dropped):
                tally.dropped[record.reason] += 1
            else:
                yield record


def _as_kind(record: Record, kind: type[Record]) -> Record:
    """Return the record, or what of it is wanted: the best answer of a ranking, the words of a labelled text."""
    if kind is Demonstration and isinstance(record, Ranking):
        return best_demonstration(record)
    if kind is Document and isinstance(record, LabelledText):
        return Document(record.text, record.place)
    return record


def best_demonstration(ranking: Ranking) -> Demonstration:
    """Return the best answer of a ranking, the first of several, as the answer to learn."""
    best = ranking.levels.index(max(ranking.levels))
    return Demonstration(ranking.prompt, ranking.answers[best], ranking.place)


def drop_repeated(records: Iterable[Record], tally: Tally) -> list[Record]:
    """Return each record once, the first of its kind; the others are counted."""
    first: dict[bytes, Record] = {}
    for record in records:
        kept = first.setdefault(key := identity(record), record)
        if kept is not record:
            is_conflict = isinstance(record, LabelledText) and record.label != cast(LabelledText, first[key]).label
            tally.dropped["conflicting_label" if is_conflict else "duplicate"] += 1
    return list(first.values())


def _divide(records: Sequence[Record], *, fraction: float) -> tuple[list[Record], list[Record]]:
    """Return (training, validation) records by the hash of their key."""
    num_of_source = Counter(record.place.source for record in records)
    train: list[Record] = []
    validation: list[Record] = []
    for record in records:
        # Held out whole, the one document of a file would take its share at once.
        is_alone = isinstance(record, Document) and num_of_source[record.place.source] == 1
        is_kept = not is_alone and is_validation(split_key(record), fraction=fraction)
        (validation if is_kept else train).append(record)
    return train, validation


def check_malformed(parts: Sequence[Part], config: DataConfig) -> None:
    """Refuse the data if more of a part is malformed than the configuration allows.

    Raises:
        InvalidArgumentError: With the share and the first places.
    """
    for part, field in zip(parts, ("sources", "validation_sources"), strict=False):
        _check_share(part.tally, field=field, most=config.max_malformed_share)


def _check_share(tally: Tally, *, field: str, most: float) -> None:
    if tally.malformed_share > most:
        raise InvalidArgumentError(
            f"{tally.malformed.total()} of {tally.num_rows} rows ({tally.malformed_share:.1%}) are malformed, "
            f"more than max_malformed_share = {most:g}; the first: {'; '.join(tally.first_malformed)}",
            field=field,
        )


def _check_not_empty(train: Sequence[object], validation: Sequence[object], *, has_validation_sources: bool) -> None:
    if not train:
        raise InvalidArgumentError("no record is left to train on", field="sources")
    if not validation:
        field = "validation_sources" if has_validation_sources else "validation_fraction"
        raise InvalidArgumentError(
            f"{len(train)} records to train on and none to measure on; raise validation_fraction, "
            "give more data, or name validation_sources",
            field=field,
        )


def report_of(parts: Sequence[Part], *, num_train: int, num_validation: int) -> DataReport:
    """Return what was read and what became of it."""
    dropped = sum((part.tally.dropped for part in parts), Counter[str]())
    malformed = sum((part.tally.malformed for part in parts), Counter[str]())
    return DataReport(
        shapes={source: shape for part in parts for source, shape in part.shapes.items()},
        num_rows=sum(part.tally.num_rows for part in parts),
        num_train=num_train,
        num_validation=num_validation,
        dropped=dict(sorted(dropped.items())),
        malformed=dict(sorted(malformed.items())),
        first_malformed=tuple(place for part in parts for place in part.tally.first_malformed),
    )
