"""Words of many texts at once, as hashes, and the sets of their n-grams."""

import hashlib
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

PIECE = 2**20  # n-grams worked on at once
PIECE_BYTES = 16 * 2**20  # of text whose words are found at once: bounds the memory, changes no result
_ODD = np.uint64(0x9E3779B97F4A7C15)
BLANK, WORD, SIGN = 0, 1, 2  # what a character is: between words, part of one, a word by itself
SIGNS = "-+*/=<>^%&|~@"  # they change what is said; other punctuation does not
ALONE = (  # scripts written without blanks, and Hangul, whose words are short: one character, one word
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x3400, 0x9FFF),  # Han
    (0xAC00, 0xD7AF),  # Hangul
    (0x20000, 0x3FFFF),  # Han, rare
)


@dataclass(frozen=True)
class Ngrams:
    """Sets of 64-bit hashes, one a row: those of row i are grams[offsets[i]:offsets[i + 1]], ascending and distinct.

    offsets: int64 (rows + 1,), from 0; grams: uint64 (total,).
    """

    offsets: Ints
    grams: Hashes

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def sizes(self) -> Ints:
        return np.diff(self.offsets)

    def of(self, row: int) -> Hashes:
        return self.grams[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: Ints) -> "Ngrams":
        """The sets of these rows, in this order."""
        return Ngrams.gathered([self], rows)

    @classmethod
    def joined(cls, parts: Sequence["Ngrams"]) -> "Ngrams":
        """The sets of several parts, one after another."""
        sizes = [part.sizes for part in parts] or [np.zeros(0, np.int64)]
        grams = [part.grams for part in parts] or [np.zeros(0, np.uint64)]
        return cls(starts(np.concatenate(sizes)), np.concatenate(grams))

    @classmethod
    def gathered(cls, parts: list["Ngrams"], rows: Ints) -> "Ngrams":
        """The sets of these rows, each at most once, in this order; rows are counted through all parts.

        The list of parts is emptied, each part as soon as it has been copied: two copies of all would not fit.
        """
        sizes = np.concatenate([np.zeros(0, np.int64), *(part.sizes for part in parts)])
        offsets = starts(sizes[rows])
        grams = np.empty(offsets[-1], np.uint64)
        place = np.full(len(sizes), -1)
        place[rows] = np.arange(len(rows))
        parts.reverse()
        while parts:
            part = parts.pop()
            here, place = place[: len(part)], place[len(part) :]
            for begin, end in pieces(part.sizes, PIECE):
                wanted = np.flatnonzero(here[begin:end] >= 0) + begin
                into = ranges(offsets[:-1][here[wanted]], part.sizes[wanted])
                grams[into] = part.grams[ranges(part.offsets[:-1][wanted], part.sizes[wanted])]
        return cls(offsets, grams)


def starts(sizes: npt.NDArray[Any]) -> Ints:
    """Where pieces of these sizes begin when they lie one after another, and the end: [2, 3] -> [0, 2, 5]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def ranges(begin: Ints, sizes: Ints) -> Ints:
    """begin[i], begin[i] + 1, ... sizes[i] of them, for each i: [5, 0], [2, 3] -> [5, 6, 0, 1, 2]."""
    before = starts(sizes)
    return np.repeat(begin - before[:-1], sizes) + np.arange(before[-1])


@dataclass(frozen=True)
class Words:
    """The words of each row as hashes: those of row i are hashes[offsets[i]:offsets[i + 1]], in the order of the text.

    A row without a word has one entry all the same: the hash of its text.
    """

    offsets: Ints
    hashes: Hashes

    @classmethod
    def of(cls, texts: Sequence[str] | pa.Array) -> "Words":
        column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
        bytes_of = pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        found = [_words(column.slice(begin, end - begin)) for begin, end in pieces(bytes_of, PIECE_BYTES)]
        sizes = [np.diff(part.offsets) for part in found] or [np.zeros(0, np.int64)]
        hashes = [part.hashes for part in found] or [np.zeros(0, np.uint64)]
        return cls(starts(np.concatenate(sizes)), np.concatenate(hashes))

    def ngrams(self, length: int) -> Ngrams:
        """The hashes of all runs of `length` words of each row; of the whole, when it has fewer."""
        sizes = np.diff(self.offsets)
        run = mixed(self.hashes)  # of as many words as counted so far, at the place of the first
        whole = np.zeros(len(sizes), np.uint64)
        for count in range(1, length + 1):
            ends_here = sizes == count
            whole[ends_here] = run[self.offsets[:-1][ends_here]]
            if count < length:
                run = run[: len(self.hashes) - count] * _ODD + self.hashes[count:]
        runs = np.where(sizes < length, 1, sizes - length + 1)
        grams = np.empty(int(runs.sum()), np.uint64)
        offsets = starts(runs)
        is_short = sizes < length
        grams[offsets[:-1][is_short]] = whole[is_short]
        long = ranges(self.offsets[:-1][~is_short], runs[~is_short])
        grams[ranges(offsets[:-1][~is_short], runs[~is_short])] = run[long]
        return _distinct(offsets, mixed(grams))

    def keys(self) -> npt.NDArray[np.uint64]:
        """128 bits of each row's words in their order: (rows, 2)."""
        content = self.hashes.tobytes()
        bounds = (self.offsets * 8).tolist()
        digests = [
            hashlib.blake2b(content[begin:end], digest_size=16).digest() for begin, end in itertools.pairwise(bounds)
        ]
        return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def pieces(sizes: Ints, total: int, most: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut things of these sizes into runs of some `total` together, at least one and at most `most` things in each."""
    ends = starts(sizes)
    begin = 0
    while begin < len(sizes):
        end = max(int(np.searchsorted(ends, ends[begin] + total, side="right")) - 1, begin + 1)
        end = min(end, len(sizes), begin + (most or len(sizes)))
        yield begin, end
        begin = end


def word_ngrams(texts: Sequence[str] | pa.Array, length: int) -> Ngrams:
    """The set of word n-grams of each text: equal texts give equal sets, whatever texts stand beside them.

    Words are without case and punctuation, signs kept: "Axis : int, A+B" -> axis int a + b.
    """
    return Words.of(texts).ngrams(length)


def _words(texts: pa.Array) -> Words:
    """Find the words among the bytes of all texts at once, and hash each distinct one once.

    bytes   A x i s   :   i n t     lower case, then: what is a byte part of?
    kinds   1 1 1 1 0 0 0 1 1 1     a word begins where a 1 follows none, and at each sign
    """
    lower = pc.utf8_lower(pc.utf8_normalize(texts, "NFKC"))
    lower = pa.concat_arrays([lower])  # from offset 0
    ends = np.frombuffer(lower.buffers()[1], np.int32, len(lower) + 1).astype(np.int64)
    ends -= ends[0]
    content = np.frombuffer(lower.buffers()[2] or b"", np.uint8)[: ends[-1]]
    kinds = _kinds(content)
    is_word = kinds == WORD
    begins = is_word.copy()
    begins[1:] &= ~is_word[:-1]
    row_starts = ends[:-1][np.diff(ends) > 0]
    begins[row_starts] |= is_word[row_starts]
    begins |= (kinds == SIGN) & ((content & 0xC0) != 0x80)  # a character's first byte
    is_part = kinds != BLANK

    words_before = np.searchsorted(np.flatnonzero(begins), ends)
    bytes_before = np.flatnonzero(begins[is_part])
    letters = content[is_part]
    offsets = np.append(bytes_before, len(letters)).astype(np.int32)
    words = pa.StringArray.from_buffers(len(bytes_before), pa.py_buffer(offsets), pa.py_buffer(letters))
    coded = words.dictionary_encode()
    found = hashes(coded.dictionary)[coded.indices.to_numpy()]

    counts = np.diff(words_before)
    is_empty = counts == 0
    if not is_empty.any():
        return Words(words_before, found)
    bare = hashes(texts.filter(pa.array(is_empty)))
    return Words(starts(np.maximum(counts, 1)), np.insert(found, words_before[:-1][is_empty], bare))


def hashes(texts: pa.Array) -> Hashes:
    """64 bits of each text."""
    digests = [hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest() for text in texts.to_pylist()]
    return np.frombuffer(b"".join(digests), np.uint64)


def _kinds(content: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """For each byte of UTF-8 text, what its character is: BLANK, WORD or SIGN."""
    if not len(content) or content.max() < 0x80:
        return _kind_of(0x80)[content]
    codes = np.frombuffer(content.tobytes().decode("utf-8").encode("utf-32-le"), np.uint32)
    sizes = np.ones(len(codes), np.uint8)
    for limit in (0x80, 0x800, 0x10000):
        sizes += codes >= limit
    return np.repeat(_kind_of(0x110000)[codes], sizes)


@cache
def _kind_of(codes: int) -> npt.NDArray[np.uint8]:
    """What each code point below `codes` is. Marks belong to the word they stand in: often they are its vowels."""
    categories = [unicodedata.category(chr(code)) for code in range(codes)]
    is_word = [category[0] in "LNM" for category in categories]
    kinds = np.where(is_word, WORD, BLANK).astype(np.uint8)
    kinds[ord("_")] = WORD
    kinds[[ord(sign) for sign in SIGNS]] = SIGN
    for first, last in ALONE:
        kinds[first : last + 1] = np.where(kinds[first : last + 1] == WORD, SIGN, kinds[first : last + 1])
    return kinds


def mixed(values: Hashes) -> Hashes:
    """Values whose every bit depends on all bits (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _distinct(offsets: Ints, grams: Hashes) -> Ngrams:
    """Sort each row's grams and leave out the repeated."""
    bounds = offsets.tolist()
    for begin, end in itertools.pairwise(bounds):
        grams[begin:end].sort()
    is_first = np.ones(len(grams), bool)
    is_first[1:] = grams[1:] != grams[:-1]
    is_first[offsets[:-1][np.diff(offsets) > 0]] = True
    return Ngrams(starts(is_first)[offsets], grams[is_first])
