"""Chat rows like those that people bring, as many as asked: equal seed, equal bytes, and fewer rows are the first ones.

    89% of their own     made-up words by Zipf's law, numbers, sentences; 2 to 4 turns; log-normal lengths
    5%  exact repeats    of an earlier row, in other case and punctuation
    10% near-duplicates  of an earlier row, one to three words replaced
    1%  bad              broken JSON, roles, turns or text  (taken from the others, whatever they were)

`python -m bench.rows --rows 1000 rows.jsonl` writes some to look at.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson

VOCABULARY = 50_000
NUMBERS = 4_000  # as words of the vocabulary: about 3% of the running text
CHUNK = 20_000  # rows made at once, each chunk from a seed of its own
REPEATS, NEAR, BAD = 0.05, 0.10, 0.01
POOL = 50_000  # earlier rows that may be repeated
USER_WORDS, ANSWER_WORDS, SPREAD, LONGEST = 16, 38, 0.65, 400  # median, median, sigma of the logarithm, at most
INSTRUCTIONS = (
    "Explain in plain words what is meant here: ",
    "Summarize the following text in a few sentences.\n\n",
    "Answer the question and give one example.\nQuestion: ",
    "Rewrite this so that a child understands it: ",
    "List the three most important points of the following note:\n",
)
SYSTEM = (
    "You are a careful assistant. You answer in complete sentences, say so when you do not know something, and never "
    "make up sources."
)
CONSONANTS = np.array(["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "ch", "st", "tr"])
VOWELS = np.array(["a", "e", "i", "o", "u", "ai", "ou", "ea"])
CLOSINGS = np.array(["", "", "n", "r", "s", "t"])

Turns = list[dict[str, str]]


def write(path: Path, rows: int, seed: int = 0) -> None:
    """Write the rows as JSON lines."""
    with path.open("wb") as file:
        for chunk in lines(rows, seed):
            file.write(b"\n".join(chunk) + b"\n")


def lines(rows: int, seed: int) -> Iterator[list[bytes]]:
    """The rows as JSON lines, a chunk at a time."""
    words = Words(seed)
    pool: list[Turns] = []
    for number, start in enumerate(range(0, rows, CHUNK)):
        rng = np.random.default_rng([seed, number])
        yield [_line(turns, rng) for turns in _chunk(words, pool, rng)][: rows - start]


class Words:
    """A vocabulary, and text drawn from it: the k-th word comes about 1/k as often as the first."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, VOCABULARY])
        plain = self._made_up(rng, VOCABULARY - NUMBERS)
        numbers = [str(number) for number in rng.integers(0, 10_000, NUMBERS)]
        for place, number in zip(rng.permutation(VOCABULARY - 200)[:NUMBERS] + 200, numbers, strict=True):
            plain.insert(int(place), number)
        forms: list[Callable[[str], str]] = [str, str.capitalize, lambda word: word + ",", lambda word: word + "."]
        self.forms = np.array([form(word) for form in forms for word in plain[:VOCABULARY]], dtype=object)
        share = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
        draws = (np.arange(1 << 21) + 0.5) / (1 << 21)
        self._drawn = np.searchsorted(share / share[-1], draws).astype(
            np.int32
        )  # draw -> word, by inverse distribution

    @staticmethod
    def _made_up(rng: np.random.Generator, count: int) -> list[str]:
        """Distinct words of one to four syllables, the frequent ones short."""
        found: dict[str, None] = {}
        while len(found) < count:
            most = 1 + np.searchsorted([40, 2_000, 20_000], len(found), side="right")
            for size in rng.integers(1, most + 1, 1000):
                heads, hearts = rng.integers(0, len(CONSONANTS), size), rng.integers(0, len(VOWELS), size)
                word = "".join(CONSONANTS[h] + VOWELS[v] for h, v in zip(heads, hearts, strict=True))
                found[word + CLOSINGS[rng.integers(len(CLOSINGS))]] = None
        return list(found)[:count]

    def texts(self, lengths: np.ndarray, rng: np.random.Generator) -> list[str]:
        """One text of so many words for each length: sentences of 4 to 20 words, commas between."""
        total = int(lengths.sum())
        ids = self._drawn[rng.integers(0, len(self._drawn), total)]
        ends = np.cumsum(lengths)
        is_last = np.zeros(total, dtype=bool)
        is_last[np.cumsum(rng.integers(4, 21, total // 4 + 1))[:-1].clip(max=total - 1)] = True
        is_last[ends - 1] = True
        is_first = np.roll(is_last, 1)
        has_comma = rng.random(total) < 0.06
        form = np.where(is_last, 3, np.where(is_first, 1, np.where(has_comma, 2, 0)))
        running = self.forms[ids + form * VOCABULARY].tolist()
        return [" ".join(running[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def some(self, count: int, rng: np.random.Generator) -> list[str]:
        return self.forms[self._drawn[rng.integers(0, len(self._drawn), count)]].tolist()


def _chunk(words: Words, pool: list[Turns], rng: np.random.Generator) -> list[Turns]:
    """A chunk of rows; those of their own go to the pool, of which later ones may be repeats."""
    rows = _own(words, rng)
    kind = rng.random(CHUNK)
    origins = rng.integers(0, 1 << 30, CHUNK)
    for number in np.flatnonzero(kind < REPEATS + NEAR).tolist():
        if pool:
            origin = pool[origins[number] % len(pool)]
            rows[number] = _repeated(origin, rng) if kind[number] < REPEATS else _edited(origin, words, rng)
    fresh = [rows[number] for number in np.flatnonzero(kind >= REPEATS + NEAR).tolist()]
    room = POOL - len(pool)
    pool.extend(fresh[:room])
    for row, place in zip(fresh[room:], rng.integers(0, POOL, max(0, len(fresh) - room)).tolist(), strict=True):
        if place % 4 == 0:
            pool[place] = row
    return rows


def _own(words: Words, rng: np.random.Generator) -> list[Turns]:
    """Rows of two turns, of three with a system prompt, and of four."""
    turns = rng.choice([2, 3, 4], CHUNK, p=[0.6, 0.2, 0.2])
    pairs = np.where(turns == 4, 2, 1)
    exchanges = int(pairs.sum())
    asked = iter(words.texts(_lengths(USER_WORDS, exchanges, rng), rng))
    answered = iter(words.texts(_lengths(ANSWER_WORDS, exchanges, rng), rng))
    instructions = rng.integers(0, len(INSTRUCTIONS), CHUNK).tolist()
    rows: list[Turns] = []
    for instruction, size in zip(instructions, turns.tolist(), strict=True):
        row: Turns = [{"role": "system", "content": SYSTEM}] if size == 3 else []
        row.append({"role": "user", "content": INSTRUCTIONS[instruction] + next(asked)})
        row.append({"role": "assistant", "content": next(answered)})
        if size == 4:
            row.append({"role": "user", "content": next(asked)})
            row.append({"role": "assistant", "content": next(answered)})
        rows.append(row)
    return rows


def _lengths(median: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.exp(rng.normal(np.log(median), SPREAD, count)).astype(np.int64).clip(1, LONGEST)


def _repeated(row: Turns, rng: np.random.Generator) -> Turns:
    """The same words in capitals, in small letters, or with other punctuation."""
    ways: list[Callable[[str], str]] = [str.upper, str.lower, lambda text: text.replace(",", "").replace(".", " !")]
    way = ways[rng.integers(len(ways))]
    return [{**turn, "content": way(turn["content"])} for turn in row]


def _edited(row: Turns, words: Words, rng: np.random.Generator) -> Turns:
    """One to three words of the longest turn replaced."""
    longest = max(range(len(row)), key=lambda number: len(row[number]["content"]))
    text = row[longest]["content"].split(" ")
    for word in words.some(int(rng.integers(1, 4)), rng):
        text[rng.integers(len(text))] = word
    return [*row[:longest], {**row[longest], "content": " ".join(text)}, *row[longest + 1 :]]


def _line(turns: Turns, rng: np.random.Generator) -> bytes:
    """A row as a line of JSON; one in a hundred is spoiled, each of the ways as often."""
    line = orjson.dumps({"messages": turns})
    if (drawn := rng.random()) >= BAD:
        return line
    content = orjson.dumps(turns[-1]["content"])
    spoiled = [
        line[: len(line) // 2],  # broken JSON
        orjson.dumps({"messages": turns[:-1]}),  # ends without an answer
        orjson.dumps({"messages": [*turns, turns[-1]]}),  # two answers in a row
        orjson.dumps({"messages": [{**turn, "role": "narrator"} for turn in turns]}),
        orjson.dumps({"messages": [*turns[:-1], {"role": "assistant", "content": " "}]}),
        line.replace(content, b"17", 1),  # a number for a text
        line.replace(content, b'"\\u0000' + content[1:], 1),
        line.replace(content, b'"\\ud800' + content[1:], 1),  # half a character
        line.replace(content[:2], b'"\xff', 1),  # no UTF-8
        b"[]",
    ]
    return spoiled[int(drawn / BAD * len(spoiled))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    write(arguments.path, arguments.rows, arguments.seed)
