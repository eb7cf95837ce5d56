"""Rows that compare answers: transcripts, pairs, rankings and message trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from tether_services.recipes.data.fields import (
    Fields,
    check_prompt,
    check_text,
    list_of,
    number_of,
    object_of,
    read_prompt,
    read_turns,
    text_of,
)
from tether_services.recipes.data.instruction_shapes import instruction_prompt
from tether_services.recipes.data.problems import Dropped, RowError
from tether_services.recipes.data.records import Place, Prompt, Ranking, Turn
from tether_services.recipes.data.transcripts import REPLY_MARK, read_transcript

__all__ = ["parse_hh", "parse_oasst", "parse_pair", "parse_ranked"]

SIDES = ("chosen", "rejected")


def parse_hh(row: Fields, place: Place) -> Iterator[Ranking | Dropped]:
    """Yield the ranking of two whole transcripts that differ in the last reply.

    Each is cut at the last reply mark. The space that follows a mark is layout, not text, so turns and answers are
    stripped.

    Raises:
        RowError: no_reply, different_prompts, empty_prompt, empty_answer, or as `check_text`.
    """
    chosen, rejected = (_cut_transcript(text_of(row, name, blank="empty_answer"), name) for name in SIDES)
    if chosen[0] != rejected[0]:
        raise RowError("different_prompts")
    prompt = check_prompt(read_transcript(chosen[0]), name="the transcript")
    yield _pair(prompt, (chosen[1], rejected[1]), place=place)


def _cut_transcript(text: str, name: str) -> tuple[str, str]:
    prompt, mark, answer = text.rpartition(REPLY_MARK)
    if not mark:
        raise RowError("no_reply", f"{name} has no reply of the assistant")
    return prompt, check_text(answer.strip(), name=name, blank="empty_answer")


def _pair(prompt: Prompt, answers: Sequence[str], *, place: Place, margin: float | None = None) -> Ranking | Dropped:
    return _ranking(Ranking(prompt, tuple(answers), (1.0, 0.0), place, margin=margin))


def _ranking(ranking: Ranking) -> Ranking | Dropped:
    """Return the ranking if it says something: scores, or two levels at least; and no answer on two levels."""
    if len(set(ranking.levels)) < 2 and not ranking.is_scored:
        return Dropped("only_ties")
    placed = set(zip(ranking.answers, ranking.levels, strict=True))
    return Dropped("identical_answers") if len(set(ranking.answers)) < len(placed) else ranking


def parse_pair(row: Fields, place: Place) -> Iterator[Ranking | Dropped]:
    """Yield the ranking of a prompt with a better and a worse answer.

    Raises:
        RowError: different_prompts, no_reply, bad_margin, or as `read_prompt` and `check_text`.
    """
    chosen, rejected = (_read_side(row.get(name), name=name) for name in SIDES)
    if chosen[0] != rejected[0]:
        raise RowError("different_prompts")
    yield _pair(_pair_prompt(row, chosen[0]), (chosen[1], rejected[1]), place=place, margin=_margin(row))


def _read_side(value: object, *, name: str) -> tuple[tuple[Turn, ...], str]:
    """Return (earlier turns, answer) of a text or of a list of messages."""
    if not isinstance(value, list):
        return (), check_text(value, name=name, blank="empty_answer")
    turns = read_turns(value, name=name)
    if not turns or turns[-1].role != "assistant":
        raise RowError("no_reply", f"{name} does not end with the assistant's turn")
    return turns[:-1], turns[-1].content


def _margin(row: Fields) -> float | None:
    margin = None if row.get("margin") is None else number_of(row["margin"], name="margin", reason="bad_margin")
    if margin is not None and margin < 0:
        raise RowError("bad_margin", "margin is negative")
    return margin


def _pair_prompt(row: Fields, shared: tuple[Turn, ...]) -> Prompt:
    """Return the prompt: the turns that both sides share, after those of the prompt field where they go on from it."""
    if row.get("instruction") is not None and row.get("prompt") is None:
        return instruction_prompt(row, row)
    if row.get("prompt") is None:
        return check_prompt(shared, name="chosen") if shared else read_prompt(None, name="prompt")
    prompt = read_prompt(row["prompt"], name="prompt")
    if not shared:
        return prompt
    return shared if isinstance(prompt, str) or shared[: len(prompt)] == prompt else (*prompt, *shared)


def parse_ranked(row: Fields, place: Place) -> Iterator[Ranking | Dropped]:
    """Yield the ranking of K answers with ranks (smaller is better) or scores (higher is better).

    Raises:
        RowError: too_few_answers, lengths_differ, bad_level, bad_margin, or as `read_prompt` and `check_text`.
    """
    prompt, items = read_prompt(row.get("prompt"), name="prompt"), list_of(row, "answers")
    if len(items) < 2:
        raise RowError("too_few_answers", f"{len(items)}")
    levels_name = "scores" if row.get("scores") is not None else "ranks"
    if any(isinstance(item, dict) for item in items):
        texts, levels, is_scored = _read_answer_objects([object_of(item, name="answers") for item in items])
    else:
        texts, levels, is_scored = items, list_of(row, levels_name), levels_name == "scores"
    if len(texts) != len(levels):
        raise RowError("lengths_differ", f"{len(texts)} answers, {len(levels)} {levels_name}")
    answers = tuple(check_text(text, name=f"answers[{i}]", blank="empty_answer") for i, text in enumerate(texts))
    numbers = (number_of(level, name=f"{levels_name}[{i}]", reason="bad_level") for i, level in enumerate(levels))
    signed = tuple(number if is_scored else 0.0 - number for number in numbers)
    yield _ranking(Ranking(prompt, answers, signed, place, margin=_margin(row), is_scored=is_scored))


def _read_answer_objects(items: Sequence[Fields]) -> tuple[Sequence[object], Sequence[object], bool]:
    is_scored = any(item.get("score") is not None for item in items)
    name = "score" if is_scored else "rank"
    return [item.get("text") for item in items], [item.get(name) for item in items], is_scored


def parse_oasst(row: Fields, place: Place) -> Iterator[Ranking | Dropped]:
    """Yield a ranking for each message of an OpenAssistant tree with two or more ranked replies of the assistant.

    Its prompt is the path from the root to that message. Replies without a rank and deleted ones are left out.

    Raises:
        RowError: missing_field, wrong_type, empty_turn, empty_answer, bad_role or bad_level, anywhere in the tree.
    """
    waiting: list[tuple[Fields, tuple[Turn, ...]]] = [(object_of(row.get("prompt"), name="prompt"), ())]
    groups: list[Ranking | Dropped] = []
    while waiting:
        message, before = waiting.pop()
        path = (*before, Turn(_role(message), text_of(message, "text", blank="empty_turn")))
        replies = [object_of(reply, name="replies") for reply in _replies(message)]
        replies = [reply for reply in replies if not reply.get("deleted")]
        groups.extend(_rank_replies(path, replies, place=place))
        waiting.extend((reply, path) for reply in reversed(replies))
    yield from groups or [Dropped("no_ranking")]


def _role(message: Fields) -> Literal["user", "assistant"]:
    role = text_of(message, "role", blank=None)
    if role not in ("prompter", "assistant"):
        raise RowError("bad_role", "role must be prompter or assistant")
    return "assistant" if role == "assistant" else "user"


def _replies(message: Fields) -> Sequence[object]:
    return list_of(message, "replies") if message.get("replies") is not None else ()


def _rank_replies(path: tuple[Turn, ...], replies: Sequence[Fields], *, place: Place) -> Iterator[Ranking | Dropped]:
    ranked = [reply for reply in replies if _role(reply) == "assistant" and reply.get("rank") is not None]
    if len(ranked) < 2:
        return
    answers = tuple(text_of(reply, "text", blank="empty_answer") for reply in ranked)
    levels = tuple(0.0 - number_of(reply["rank"], name="rank", reason="bad_level") for reply in ranked)
    yield _ranking(Ranking(path, answers, levels, place))
