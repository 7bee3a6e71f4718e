"""New rows in the manner of given ones, self-instruct style (arXiv:2212.10560): what to ask a model, what to keep.

    seeds -> request 0, 1, 2, ...  ->  an endpoint  ->  recorded responses  ->  pairs  ->  rows, and the rest by reason
                                       (commands/synthesize.py)

Nothing here asks anybody: the same seeds, responses and settings give the same rows, to the byte.
"""

import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib import cleaning, records

INSTRUCTION, ANSWER = "### Instruction", "### Answer"
MAX_EXAMPLE_CHARS = 3000  # of a seed shown as an example: question and answer together
MIN_INSTRUCTION_WORDS, MAX_INSTRUCTION_WORDS = 3, 150  # as in the paper
MIN_WORDS_TO_REPEAT = 20
MIN_DISTINCT = 0.5  # of an answer's runs of three words: a model in a loop says few things often
SHINGLE_WORDS = 2
MIN_SEEDS_FOR_A_TEMPLATE = 10
_HEADING = re.compile(
    r"^[ \t]*#{2,4}[ \t]*(instruction|answer)(?:[ \t]*\d+)?[ \t]*:?[ \t]*$", re.MULTILINE | re.IGNORECASE
)
_WISH = (
    f"Write one more instruction of this kind, about something else, and its correct answer: the line {INSTRUCTION}, "
    f"below it the instruction, then the line {ANSWER}, below it the answer."
)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[-+*/=<>^%&|~@]")  # no blanks: a character is a word
_UNPRINTABLE = re.compile(r"[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Settings:
    model: str
    examples: int  # seeds shown in a request
    temperature: float
    max_tokens: int  # of a response
    max_similarity: float  # Jaccard of an instruction's word pairs with a seed's, a test row's or another new one's
    seed: int


@dataclass(frozen=True)
class Seed:
    question: str
    answer: str
    task: str


def seeds_of(rows: Iterable[Mapping[str, Any]]) -> list[Seed]:
    """One question and one answer of each row that is nothing else, in an order of their content alone, each once.

    Rows that were made from others, by this or by noise, are no seeds.

    Args: rows: {messages}, {prompt, completion} or {instruction[, input], output}, with or without a task; records too.
    """
    found = {seed for row in rows if (seed := _seed(row))}
    short = [seed for seed in found if len(seed.question) + len(seed.answer) <= MAX_EXAMPLE_CHARS]
    return sorted(short, key=lambda seed: (seed.task, seed.question, seed.answer))


def _seed(row: Mapping[str, Any]) -> Seed | None:
    meta = row.get("meta")
    if row.get("source") == records.SYNTHETIC or (isinstance(meta, Mapping) and "noise_of" in meta):
        return None
    pair: Sequence[Any] = ()
    if isinstance(row.get("messages"), list):
        turns = [turn for turn in _turns(row) if turn.get("role") != "system"]
        if [turn.get("role") for turn in turns] == ["user", "assistant"]:
            pair = [turn.get("content") for turn in turns]
    elif "prompt" in row:
        pair = (row["prompt"], row.get("completion"))
    elif "instruction" in row:
        parts = [row["instruction"], row.get("input")]
        pair = ("\n\n".join(part for part in parts if isinstance(part, str) and part.strip()), row.get("output"))
    if len(pair) != 2 or not all(isinstance(text, str) and text.strip() for text in pair):
        return None
    question, answer = pair
    if _UNPRINTABLE.search(question + answer):
        return None
    return Seed(question.strip(), answer.strip(), str(row.get("task") or "chat"))


def _turns(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [turn for turn in row["messages"] if isinstance(turn, Mapping)]


def questions_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Everything a user says in rows such as `seeds_of` takes, several turns and long ones too: what a test asks."""
    found = set()
    for row in rows:
        if isinstance(row.get("messages"), list):
            found |= {
                str(turn["content"]) for turn in _turns(row) if turn.get("role") == "user" and turn.get("content")
            }
        elif seed := _seed(row):
            found.add(seed.question)
    return sorted(found)


def request(seeds: Sequence[Seed], number: int, settings: Settings) -> tuple[dict[str, Any], str]:
    """(body for /v1/chat/completions, task) of the number-th request; it does not depend on any answer.

        user: Write one ..   assistant: <seed>   user: Write one ..   assistant: <seed>   user: Write one ..

    The seeds shown are of one task, that of one drawn by chance; chance belongs to the settings' seed and the number.
    """
    chance = random.Random(f"examples {settings.seed} {number}")  # of text: the same on every machine
    task = seeds[int(chance.random() * len(seeds))].task
    same = [seed for seed in seeds if seed.task == task]
    shown: list[Seed] = []
    while same and len(shown) < settings.examples:
        shown.append(same.pop(int(chance.random() * len(same))))
    turns: list[dict[str, str]] = []
    for seed in shown:
        example = f"{INSTRUCTION}\n{seed.question}\n{ANSWER}\n{seed.answer}"
        turns += [{"role": "user", "content": _WISH}, {"role": "assistant", "content": example}]
    body = {
        "model": settings.model,
        "messages": [*turns, {"role": "user", "content": _WISH}],
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed + number,
    }
    return body, task


def pairs_of(content: str) -> list[tuple[str, str]]:
    """(instruction, answer) of each pair in a response; a part that is missing is empty.

    "### Instruction\\nName a fish.\\n### Answer\\nTrout."  ->  [("Name a fish.", "Trout.")]
    """
    _, *parts = _HEADING.split(content)
    found: list[list[str]] = []
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        if heading.lower() == "instruction":
            found.append([text.strip(), ""])
        elif found and not found[-1][1]:
            found[-1][1] = text.strip()
        else:
            found.append(["", text.strip()])
    return [(instruction, answer) for instruction, answer in found]


class Sieve:
    """Takes responses one after the other; keeps rows, and counts what it left out and why.

    counts: responses, pairs, rows, dropped/<why>; pairs = rows + all that was dropped.

    dropped/  format (a part is missing, or holds no text), cut (the response ended in it), length, repetition, refusal,
              echo (of the request or of its own instruction), seed, test, duplicate (too similar to one of these)
    """

    def __init__(self, seeds: Sequence[Seed], test: Iterable[str], settings: Settings) -> None:
        """test: questions of the test split."""
        self.rows: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter({"responses": 0, "pairs": 0, "rows": 0})
        self._settings = settings
        questions = sorted({seed.question for seed in seeds})
        holding = Counter(gram for question in questions for gram in _shingles(question))
        enough = len(questions) >= MIN_SEEDS_FOR_A_TEMPLATE
        self._shared = {gram for gram, count in holding.items() if enough and count > len(questions) / 2}
        self._known = _Known()
        for question in questions:
            self._known.add(self._compared(question), "seed")
        for question in sorted(set(test)):
            self._known.add(self._compared(question), "test")

    def take(self, content: str, is_cut: bool, *, task: str, limit: int) -> None:
        """Judge the pairs of one response in their order, until there are `limit` rows; is_cut: for its length."""
        if len(self.rows) == limit:
            return
        self.counts["responses"] += 1
        pairs = pairs_of(content)
        if not pairs:
            self.counts["responses/without_pairs"] += 1
        for number, (instruction, answer) in enumerate(pairs, start=1):
            if len(self.rows) == limit:
                return
            self.counts["pairs"] += 1
            compared = self._compared(instruction)
            why = "cut" if is_cut and number == len(pairs) else self._fault(instruction, answer)
            if why := why or self._known.like(compared, self._settings.max_similarity):
                self.counts[f"dropped/{why}"] += 1
                continue
            self._known.add(compared, "duplicate")
            self.counts["rows"] += 1
            self.rows.append({"prompt": instruction, "completion": answer, "source": records.SYNTHETIC, "task": task})

    def _fault(self, instruction: str, answer: str) -> str | None:
        """What is wrong with a pair by itself."""
        if not instruction or not answer or _UNPRINTABLE.search(instruction + answer):
            return "format"
        asked, said = _words(instruction), _words(answer)
        if not MIN_INSTRUCTION_WORDS <= len(asked) <= MAX_INSTRUCTION_WORDS:
            return "length"
        if len(said) >= MIN_WORDS_TO_REPEAT:
            runs = list(zip(said, said[1:], said[2:], strict=False))
            if len(set(runs)) < MIN_DISTINCT * len(runs):
                return "repetition"
        if cleaning.is_refusal(answer):
            return "refusal"
        if said == asked or _WISH[:40] in instruction + answer:
            return "echo"
        return None

    def _compared(self, question: str) -> frozenset[str]:
        """Its word pairs without the wording that most seeds share; all of them where it has no others."""
        grams = _shingles(question)
        return grams - self._shared or grams


class _Known:
    """Questions that a new one must not resemble; finds the most similar exactly, through the word pairs they share."""

    def __init__(self) -> None:
        self._members: list[tuple[frozenset[str], str]] = []
        self._holding: dict[str, list[int]] = defaultdict(list)

    def add(self, grams: frozenset[str], what: str) -> None:
        for gram in grams:
            self._holding[gram].append(len(self._members))
        self._members.append((grams, what))

    def like(self, grams: frozenset[str], threshold: float) -> str | None:
        """What it resembles: the test split before seeds before other new ones; None, when nothing enough."""
        common = Counter(number for gram in grams for number in self._holding.get(gram, ()))
        found = {
            self._members[number][1]
            for number, count in common.items()
            if count >= threshold * (len(grams) + len(self._members[number][0]) - count)
        }
        return next((what for what in ("test", "seed", "duplicate") if what in found), None)


def _words(text: str) -> list[str]:
    """Words without case and punctuation; signs, which change what is said, are kept."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _shingles(text: str) -> frozenset[str]:
    words = _words(text) or [text]
    return frozenset(" ".join(words[at : at + SHINGLE_WORDS]) for at in range(max(1, len(words) - SHINGLE_WORDS + 1)))
