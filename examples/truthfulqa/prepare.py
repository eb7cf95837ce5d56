r"""Turn the judgements that fine-tuned the TruthfulQA judges into ranked answers.

    python prepare.py TRUTH.jsonl INFO.jsonl OUT.jsonl

Each input row is {"prompt": "Q: ...\nA: ...\nTrue:" or "...\nHelpful:", "completion": " yes" or " no"}. Both files
are joined on question and answer; an answer scores 2 * true + helpful, 0 to 3. Answers whose repeated labels disagree
and empty answers are dropped and counted. OUT.jsonl gets one row for each question, in the shape `ranked` with scores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

LABELS = {"yes": 1, "no": 0}

Judgements = dict[tuple[str, str], set[int]]
"""Labels by (question, answer)."""


def split_question(prompt: str) -> tuple[str, str]:
    """Return (question, answer) of a judged prompt.

    Some answers run on with more questions, so the first "A:" ends the question and the last line is the judge's.

    Raises:
        ValueError: The prompt has another form.
    """
    question, mark, rest = prompt.removeprefix("Q: ").partition("\nA: ")
    answer, end, _ = rest.rpartition("\n")
    if not prompt.startswith("Q: ") or not mark or not end:
        raise ValueError("a prompt must read 'Q: question', 'A: answer' and a last line with the judge's question")
    return question.strip(), answer.strip()


def read_judgements(path: Path) -> Judgements:
    """Return all labels that a file gives to each answer, in its order.

    Raises:
        SystemExit: A row has another form; names file and line.
    """
    judgements: Judgements = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                key, label = split_question(row["prompt"]), LABELS[row["completion"].strip()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SystemExit(f"{path}:{number}: {error}") from error
            judgements.setdefault(key, set()).add(label)
    return judgements


def join_scores(true: Judgements, helpful: Judgements) -> tuple[dict[str, dict[str, int]], int]:
    """Return the scores 0 to 3 of the answers by question, and how many answers had labels that disagree.

    Raises:
        SystemExit: An answer is in one file only.
    """
    if true.keys() != helpful.keys():
        raise SystemExit(f"{len(true.keys() ^ helpful.keys())} answers are in one of the two files only")
    scores: dict[str, dict[str, int]] = {}
    num_conflicts = 0
    for question, answer in true:
        labels = true[question, answer], helpful[question, answer]
        if any(len(found) > 1 for found in labels):
            num_conflicts += 1
        else:
            scores.setdefault(question, {})[answer] = 2 * max(labels[0]) + max(labels[1])
    return scores, num_conflicts


def ranked_row(question: str, scores: Mapping[str, int]) -> str:
    """Return one line of the output: the question as a user's turn, the answers and their scores."""
    prompt = [{"role": "user", "content": question}]
    return json.dumps({"prompt": prompt, "answers": list(scores), "scores": list(scores.values())}, ensure_ascii=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the ranked answers and print what was read and dropped."""
    parser = argparse.ArgumentParser(description="Turn TruthfulQA judgements into ranked answers.")
    for name in ("truth", "info", "out"):
        parser.add_argument(name, type=Path, metavar=f"{name.upper()}.jsonl")
    known = parser.parse_args(arguments)
    scores, num_conflicts = join_scores(read_judgements(known.truth), read_judgements(known.info))
    num_empty = sum(answers.pop("", None) is not None for answers in scores.values())
    rows = [ranked_row(question, answers) for question, answers in scores.items() if len(answers) > 1]
    known.out.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    num_answers = sum(len(answers) for answers in scores.values())
    dropped = f"dropped {num_conflicts} answers with labels that disagree and {num_empty} empty ones"
    print(f"{len(rows)} questions, {num_answers} answers; {dropped}")


if __name__ == "__main__":
    main()
