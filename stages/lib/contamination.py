"""Contamination: training rows that contain what validation, test or a benchmark asks.

The share of a held-out row's word n-grams that is found in one training row decides; case and punctuation do not count.

    held out   who painted the ceiling of the chapel        6 trigrams
    train      Tell me: WHO painted the ceiling of a ...    4 of them, share 0.67
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.lib.dedup import compared_texts
from stages.lib.engine import ordered_map
from stages.lib.errors import DataError
from stages.lib.ngrams import Hashes, Ints, Ngrams, Words, mixed, ranges, starts
from stages.lib.rows import Unparsed
from stages.lib.schema.dedup import Contamination
from stages.lib.sources import places, reading

Shares = npt.NDArray[np.float64]

KEY = "dedup.contamination.benchmarks"
FEW = 5  # rows of one place: wording that more of them have is a phrase or a template, and says nothing of any one row
ENOUGH = 10  # rows of a task: with fewer, "most rows" says nothing
RUN = 3  # words of the runs that tell a template
SAMPLE = 1000  # held-out rows of a task that its template is seen in
TABLE_BITS = 28  # of the table that answers most questions for an n-gram with no, 32 MiB
PIECE_GRAMS = 2**20  # entered into the table at once
PIECE = 1000  # hits whose wording is looked up at once
EXCERPT = 300  # characters of the wording that is listed


@dataclass(frozen=True)
class Hit:
    """A training row that holds most of a held-out row."""

    id: str  # of the training row
    overlaps: str  # id of the row of validation or test; `file:line` of a benchmark's row
    where: str  # validation, test, or the benchmark's file name
    share: float  # of the held-out row's n-grams
    matched: str  # the first of them, as the held-out row words it


@dataclass(frozen=True)
class Texts:
    """Held-out texts of one place: whole records or whole rows of a benchmark, and the fields of these, marked is_part.

    question: the part of a record's text before its answer; else "".
    """

    where: str
    id: pa.Array
    task: pa.Array
    text: pa.Array
    question: pa.Array
    is_part: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Held:
    """Held-out texts and their n-grams, those of the question marked."""

    texts: Texts
    grams: Ngrams
    is_asked: npt.NDArray[np.bool_]  # of each n-gram


def hits(
    train: Iterable[pa.RecordBatch],
    held_out: Iterable[tuple[str, pa.RecordBatch]],
    settings: Contamination,
    shared_fraction: float,
) -> list[Hit]:
    """Every training row that has at least `min_overlap` of a held-out row's n-grams: the closest match of each place.

    A held-out row is looked for as a whole and by its question alone, each field of a benchmark's row by itself. What
    has fewer than `ngram_words` n-grams must be there completely. Wording that more than shared_fraction of a task's
    rows have is its template, and does not count as long as there is other; n-grams of more than FEW rows of a place
    never do.

    Args: train, held_out: records as dedup_split writes them; held_out with the name of their split.
    Returns: by id, then place. Raises: DataError, when there is no file at settings.benchmarks.
    """
    texts = [*(record_texts(*part) for part in held_out), *benchmark_texts(Path(settings.benchmarks))]
    templates = _templates(texts, shared_fraction)
    index = _Index(list(ordered_map(partial(_held, settings.ngram_words, templates), texts)))
    texts.clear()
    ids, tasks, rows, grams = [], [], [], []
    seen = 0
    for batch_ids, batch_tasks, found in ordered_map(partial(_train_ngrams, settings.ngram_words), train):
        row, gram = index.find(found)
        rows.append(row + seen)
        grams.append(gram)
        ids.append(batch_ids)
        tasks.append(batch_tasks)
        seen += len(batch_ids)
    if not seen:
        return []
    row, gram = np.concatenate(rows), np.concatenate(grams)
    task = pa.concat_arrays(tasks).dictionary_encode().indices.to_numpy().astype(np.int64)
    shared = _common(row, gram, task, index.count, shared_fraction)
    counts = ~np.isin(gram, shared)
    row, gram = row[counts], gram[counts]
    pairs = np.sort(row * index.count + gram)
    row, held, share = index.matches(row, gram, shared, settings)
    names = pa.concat_arrays(ids)
    listed = []
    for begin in range(0, len(row), PIECE):
        piece = slice(begin, begin + PIECE)
        named = [index.text(int(number)) for number in held[piece]]
        matched = index.wording(row[piece], [text for *_, text in named], pairs, settings.ngram_words)
        numbers = zip(row[piece].tolist(), share[piece].tolist(), named, matched, strict=True)
        listed += [
            Hit(names[number].as_py(), overlaps, where, part, run)
            for number, part, (where, overlaps, _), run in numbers
        ]
    return sorted(listed, key=lambda hit: (hit.id, hit.where))


def record_texts(where: str, batch: pa.RecordBatch) -> Texts:
    """Records as held-out texts, with their questions: all turns before the answer."""
    lists = batch["messages"]
    sizes = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends_with_answer = pc.not_equal(batch["kind"], "preference").to_numpy(zero_copy_only=False)
    asked = np.maximum(sizes - ends_with_answer, 0)
    turns = lists.flatten().take(pa.array(ranges(starts(sizes)[:-1], asked)))
    questions = pa.ListArray.from_arrays(pa.array(starts(asked), pa.int32()), turns)
    nothing = pa.nulls(len(batch), lists.type)
    columns = {"messages": questions, "text": pa.nulls(len(batch), pa.string()), "chosen": nothing, "rejected": nothing}
    question = compared_texts(pa.RecordBatch.from_pydict(columns))
    return Texts(where, batch["id"], batch["task"], compared_texts(batch), question, np.zeros(len(batch), bool))


def benchmark_texts(path: Path) -> Iterator[Texts]:
    """The rows of a benchmark file, or of each file of a folder, by name: all texts of a row, and each by itself.

    Raises: DataError, when there is nothing at the path, or a row cannot be read: it would go unnoticed in training.
    """
    if path.is_dir() and not any(places.kind(file.name) for file in path.rglob("*")):
        return
    for file, name in places.files(str(path), key=KEY):
        for block in reading.file_blocks(file, name, key=KEY):
            rows = list(_rows(block))
            fields = [(where, list(_strings(row))) for where, row in rows]
            whole = [(where, "\n".join(found)) for where, found in fields]
            parts = [(where, text) for where, found in fields if len(found) > 1 for text in found]
            id, text = (pa.array(column, pa.string()) for column in zip(*whole, *parts, strict=True))
            is_part = np.arange(len(id)) >= len(whole)
            yield Texts(name, id, pa.array([name] * len(id)), text, pa.array([""] * len(id)), is_part)


def _rows(block: reading.Block) -> Iterator[tuple[str, Any]]:
    """(`file:line`, row); of a plain text each line is a row."""
    kind = places.kind(block.name)
    for where, row in reading.parsed(block):
        if isinstance(row, Unparsed):
            raise DataError(f"{where}: {row.code}: {row.reason}. Mend the benchmark, or change {KEY}.")
        if kind and kind[0] == "txt":
            lines = enumerate(row["text"].splitlines(), 1)
            yield from ((f"{block.name}:{number}", line) for number, line in lines if line.strip())
        else:
            yield where, row


def _strings(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value.encode("utf-8", "replace").decode()  # a lone surrogate is no text
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _strings(value[key])
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)


def _held(length: int, templates: Mapping[str, Hashes], texts: Texts) -> Held:
    """N-grams of held-out texts: where some are free of their task's template, these alone."""
    words = Words.of(texts.text)
    long = np.flatnonzero(~texts.is_part | (np.diff(words.offsets) >= length))  # a short field says nothing by itself
    texts = _taken(texts, long)
    words, asked = Words.of(texts.text), Words.of(texts.question)
    grams, questions = words.ngrams(length), asked.ngrams(length)
    is_long = np.repeat(np.diff(asked.offsets) >= length, questions.sizes)
    is_asked = np.isin(_of_row(grams), _of_row(questions)[is_long])
    is_own = np.isin(_of_row(grams), _own(words, texts.task, templates, length))
    row = np.repeat(np.arange(len(grams)), grams.sizes)
    has_own, has_own_asked = (
        np.bincount(row[marked], minlength=len(grams)) > 0 for marked in (is_own, is_own & is_asked)
    )
    stays = is_own | ~has_own[row] | (is_asked & ~has_own_asked[row])
    sizes = np.bincount(row[stays], minlength=len(grams))
    texts = replace(texts, question=pa.nulls(len(grams), pa.string()))  # it has done its part
    return Held(texts, Ngrams(starts(sizes), grams.grams[stays]), is_asked[stays])


def _taken(texts: Texts, rows: Ints) -> Texts:
    columns = (texts.id, texts.task, texts.text, texts.question)
    id, task, text, question = (column.take(pa.array(rows)) for column in columns)
    return Texts(texts.where, id, task, text, question, texts.is_part[rows])


def _templates(texts: Sequence[Texts], shared_fraction: float) -> dict[str, Hashes]:
    """The short runs of words that more than shared_fraction of a task's held-out rows have, by a sample of them."""
    if not texts:
        return {}
    id, task, text = (pa.chunked_array([getattr(part, name) for part in texts]) for name in ("id", "task", "text"))
    is_part = np.concatenate([part.is_part for part in texts])
    order = pc.sort_indices(id).to_numpy()  # ids are hashes: the first ones are a sample, whatever the order of rows
    order = order[~is_part[order]]
    code = task.combine_chunks().dictionary_encode()
    found = {}
    for number, name in enumerate(code.dictionary.to_pylist()):
        chosen = order[code.indices.to_numpy()[order] == number][:SAMPLE]
        if len(chosen) >= ENOUGH:
            runs, row = _runs(Words.of(text.take(pa.array(chosen)).combine_chunks()))
            pairs = np.unique(np.stack([runs, row.astype(np.uint64)]), axis=1)
            distinct, counts = np.unique(pairs[0], return_counts=True)
            found[name] = distinct[counts > shared_fraction * len(chosen)]
    return found


def _runs(words: Words) -> tuple[Hashes, Ints]:
    """(hash of the run of RUN words, row) at each word that begins one; 0 where the row ends before."""
    row = np.repeat(np.arange(len(words.offsets) - 1), np.diff(words.offsets))
    runs = np.zeros(len(row), np.uint64)
    if len(row) >= RUN:
        run = words.hashes[: 1 - RUN]
        for number in range(1, RUN):
            run = mixed(run) + words.hashes[number : len(row) + 1 - RUN + number]
        runs[: len(run)] = np.where(row[: len(run)] == row[RUN - 1 :], run, 0)
    return runs, row


def _own(words: Words, task: pa.Array, templates: Mapping[str, Hashes], length: int) -> Hashes:
    """The n-grams of each row, as `_of_row` gives them, that have no word of its task's template.

    Name the class of this text . How do I unblock my PIN ?        template: the first six words
    """
    runs, row = _runs(words)
    code = task.dictionary_encode()
    of_task = code.indices.to_numpy()[row]
    is_template = np.zeros(len(runs), bool)
    for number, name in enumerate(code.dictionary.to_pylist()):
        begins = np.flatnonzero((of_task == number) & np.isin(runs, templates.get(name, ())) & (runs != 0))
        for step in range(RUN):
            is_template[begins + step] = True
    kept = np.flatnonzero(~is_template)
    if not len(kept):
        return np.zeros(0, np.uint64)
    begins = np.flatnonzero(np.append(True, (np.diff(kept) > 1) | (np.diff(row[kept]) > 0)))
    sizes = np.diff(np.append(begins, len(kept)))
    long = sizes >= length
    pieces = Words(starts(sizes[long]), words.hashes[kept[ranges(begins[long], sizes[long])]])
    return _of_row(pieces.ngrams(length), row[kept[begins[long]]])


def _of_row(found: Ngrams, rows: Ints | None = None) -> Hashes:
    """Each n-gram, told apart from the same one of another row. rows: their numbers, else counted from 0."""
    numbers = np.arange(len(found)) if rows is None else rows
    return found.grams ^ mixed(np.repeat(numbers, found.sizes).astype(np.uint64) + np.uint64(1))


def _train_ngrams(length: int, batch: pa.RecordBatch) -> tuple[pa.Array, pa.Array, Ngrams]:
    return batch["id"], batch["task"], Words.of(compared_texts(batch)).ngrams(length)


class _Index:
    """Which held-out texts have an n-gram.

    grams: sorted, distinct, each by its number from here on. users: the texts that have gram g are
    users[used[g]:used[g + 1]], is_asked tells whether in their question. size, asked: n-grams that count of each text,
    and of its question. place: of each text.
    """

    def __init__(self, found: list[Held]) -> None:
        self.texts = [part.texts for part in found]
        self.places = sorted({texts.where for texts in self.texts})
        counts = [len(texts.id) for texts in self.texts]
        self.first = starts(np.array(counts, np.int64))
        self.place = np.repeat(np.array([self.places.index(texts.where) for texts in self.texts], np.int64), counts)
        sizes = np.concatenate([np.zeros(0, np.int64), *(part.grams.sizes for part in found)])
        grams = np.concatenate([np.zeros(0, np.uint64), *(part.grams.grams for part in found)])
        is_asked = np.concatenate([np.zeros(0, bool), *(part.is_asked for part in found)])
        found.clear()
        order = np.argsort(grams)
        grams = grams[order]
        text = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
        is_asked = is_asked[order]
        del order
        is_new = np.ones(len(grams), bool)
        is_new[1:] = grams[1:] != grams[:-1]
        begin = np.flatnonzero(is_new)
        uses = np.diff(begin, append=len(grams)).astype(np.int32)
        is_phrase = np.zeros(len(begin), bool)
        is_phrase[self._phrases(np.flatnonzero(uses > FEW), begin, uses, text)] = True
        counts_here = np.repeat(~is_phrase, uses)
        del begin
        self.grams = grams[is_new & counts_here]
        del grams, is_new
        self.count = len(self.grams)
        self.users, self.is_asked = text[counts_here], is_asked[counts_here]
        self.used = starts(uses[~is_phrase])
        self.size = np.bincount(self.users, minlength=len(sizes))
        self.asked = np.bincount(self.users[self.is_asked], minlength=len(sizes))
        self.table = np.zeros(2 ** (TABLE_BITS - 3), np.uint8)
        for first in range(0, self.count, PIECE_GRAMS):
            place = self.grams[first : first + PIECE_GRAMS] >> np.uint64(64 - TABLE_BITS)
            np.bitwise_or.at(self.table, place >> np.uint64(3), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8))

    def _phrases(self, often: Ints, begin: Ints, uses: npt.NDArray[np.int32], text: npt.NDArray[np.int32]) -> Ints:
        """Those of the n-grams `often` that more than FEW rows of one place have."""
        is_part = np.concatenate([np.zeros(0, bool), *(texts.is_part for texts in self.texts)])
        sizes = uses[often].astype(np.int64)
        users = text[ranges(begin[often], sizes)]
        gram = np.repeat(np.arange(len(often)), sizes)[~is_part[users]]
        places = max(1, len(self.places))
        keys, counts = np.unique(gram * places + self.place[users[~is_part[users]]], return_counts=True)
        return often[keys[counts > FEW] // places]

    def find(self, found: Ngrams) -> tuple[Ints, Ints]:
        """(row, number of the gram) of every n-gram that a held-out text has, too."""
        place = found.grams >> np.uint64(64 - TABLE_BITS)
        bit = (self.table[place >> np.uint64(3)] >> (place & np.uint64(7)).astype(np.uint8)) & 1
        likely = np.flatnonzero(bit)
        grams = found.grams[likely]
        number = np.searchsorted(self.grams, grams)
        is_held = self.grams[np.minimum(number, max(0, self.count - 1))] == grams if self.count else grams != grams
        return np.searchsorted(found.offsets, likely[is_held], "right") - 1, number[is_held]

    def matches(self, row: Ints, gram: Ints, shared: Ints, settings: Contamination) -> tuple[Ints, Ints, Shares]:
        """(training row, held-out text, share) of the closest match in each place, by training row and place.

        Args: row, gram: what was found and counts. shared: grams that do not.
        """
        uses = np.diff(self.used)
        dropped = ranges(self.used[:-1][shared], uses[shared])
        gone = self.users[dropped]
        size = self.size - np.bincount(gone, minlength=len(self.size))
        asked = self.asked - np.bincount(gone[self.is_asked[dropped]], minlength=len(self.size))
        places = ranges(self.used[gram], uses[gram])
        texts = max(1, len(size))
        pairs, which = np.unique(np.repeat(row, uses[gram]) * texts + self.users[places], return_inverse=True)
        row, text = pairs // texts, pairs % texts
        share, is_hit = np.zeros(len(pairs)), np.zeros(len(pairs), bool)
        for grams, every in ((which, size[text]), (which[self.is_asked[places]], asked[text])):
            part = np.bincount(grams, minlength=len(pairs)) / np.maximum(1, every)
            share = np.maximum(share, part)
            # what one word more or less would change so much is looked for whole
            is_hit |= part >= np.where(every < settings.ngram_words, 1.0, settings.min_overlap) - 1e-9
        found = np.flatnonzero(is_hit)
        row, text, share = row[found], text[found], share[found]
        order = np.lexsort((self._by_name(text), -share, self.place[text], row))
        row, text, share = row[order], text[order], share[order]
        is_first = np.ones(len(row), bool)
        is_first[1:] = (row[1:] != row[:-1]) | (self.place[text[1:]] != self.place[text[:-1]])
        return row[is_first], text[is_first], share[is_first]

    def _by_name(self, held: Ints) -> Ints:
        """Each held-out row's place in the order of their ids: equal matches are told apart by no order of rows."""
        rows, place = np.unique(held, return_inverse=True)
        names = [self.text(int(row))[1] for row in rows]
        rank = np.empty(len(rows), np.int64)
        rank[sorted(range(len(rows)), key=names.__getitem__)] = np.arange(len(rows))
        return rank[place]

    def text(self, held: int) -> tuple[str, str, str]:
        """(place, id, whole text) of a held-out row."""
        number = int(np.searchsorted(self.first, held, "right")) - 1
        texts, within = self.texts[number], held - int(self.first[number])
        return texts.where, texts.id[within].as_py(), texts.text[within].as_py()

    def wording(self, row: Ints, texts: list[str], pairs: Ints, length: int) -> list[str]:
        """The first run of words of each held-out text that the training row has.

        Args: pairs: training row * count + gram of all that was found, ascending.
        """
        tokens = [text.split() for text in texts]
        sizes = np.array([max(1, len(found) - length + 1) for found in tokens], np.int64)
        runs = [
            " ".join(found[begin : begin + length])
            for found, size in zip(tokens, sizes, strict=True)
            for begin in range(size)
        ]
        grams = Words.of(runs).ngrams(length)
        run, number = self.find(grams)
        text = np.repeat(np.arange(len(texts)), sizes)[run]
        wanted = row[text] * self.count + number
        near = np.minimum(np.searchsorted(pairs, wanted), max(0, len(pairs) - 1))
        found = np.flatnonzero(pairs[near] == wanted)
        first = starts(sizes)[:-1]
        first[text[found][::-1]] = run[found][::-1]  # the last one written, the first run, stays
        return [runs[number][:EXCERPT] for number in first]


def _common(row: Ints, gram: Ints, task: Ints, grams: int, shared_fraction: float) -> Ints:
    """Numbers of the n-grams that more than shared_fraction of the training rows of some task have."""
    rows = np.bincount(task)
    keys, counts = np.unique(task[row] * max(1, grams) + gram, return_counts=True)
    of_task = rows[keys // max(1, grams)]
    return np.unique(keys[(counts > shared_fraction * of_task) & (of_task >= ENOUGH)] % max(1, grams))
