"""Whole conversations into training sequences of bounded length, each token accounted for. Needs no torch.

    records --encoded--> Batch ... --collected--> Collected --best_fit, write--> packs.parquet

Tokens are held in flat arrays, one conversation after the other: no list of Python numbers is made of them.
"""

import functools
import heapq
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from stages.lib import chat, files, records
from stages.lib.chat import IGNORED, Encoded, UnusableConversation
from stages.lib.errors import DataError, GateError
from stages.lib.schema.pack import Labels, OnOverlong
from stages.lib.schema.pack import Pack as Settings

Int64s = npt.NDArray[np.int64]
IDS = pa.list_(pa.int32())
PACK = pa.schema([("input_ids", IDS), ("labels", IDS), ("position_ids", IDS), ("row_ids", pa.list_(pa.string()))])
"""Columns of data/packed/<split>/packs.parquet. A pack holds no padding: its lists end with its last conversation."""

PAIR = pa.schema([("row_id", pa.string()), ("prompt_ids", IDS), ("chosen_ids", IDS), ("rejected_ids", IDS)])
"""Columns of data/packed/<split>/pairs.parquet: a prompt and the two answers to it, wanted and not."""

GROUP_TOKENS = 1 << 20  # room in a row group of packs.parquet
NAMED = 3  # rows that an error message names


@dataclass(frozen=True)
class Pack:
    """Conversations one after the other; a position of 0 begins each, and attention never crosses it.

    rows [a a a] [b b]  ->  input_ids [a a a b b]  position_ids [0 1 2 0 1]
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    row_ids: list[str]


@dataclass(frozen=True)
class Tokens:
    """N sequences of T tokens together, end to end.

    row_ids  a     b
    offsets  0     3   5      (N + 1,) int64
    ids      a a a b b        (T,) int32
    trained  . . x . x        (T,) bool; never the first of a sequence, which nothing predicts
    """

    row_ids: pa.ChunkedArray | pa.Array
    offsets: Int64s
    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Sequence[tuple[str, Encoded]]) -> "Tokens":
        offsets = np.cumsum([0, *(len(row.input_ids) for _, row in rows)])
        trained = _joined([row.labels for _, row in rows], np.int32) != IGNORED
        trained[offsets[:-1]] = False
        row_ids = pa.chunked_array([[row_id for row_id, _ in rows]], pa.string())
        return cls(row_ids, offsets, _joined([row.input_ids for _, row in rows], np.int32), trained)

    def per_row(self, claims: npt.NDArray[np.bool_]) -> Int64s:
        """Of how many tokens of each sequence a claim is true, (N,)."""
        return np.diff(np.concatenate([[0], np.cumsum(claims)])[self.offsets])


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype)


@dataclass
class Batch:
    """What became of some records.

    lengths: tokens of each that could be encoded, before anything was cut, (n,) int32.
    dropped, cut: records of which nothing is packed, and of which something is not: id, reason, message, `tokens` that
        are not packed (None where they cannot be known), and `lost`, how many of them should have been learned.
    counts: by the last parts of the metrics' names (`rows/in`); `lost` is the sum of those above.
    """

    tokens: Tokens
    lengths: npt.NDArray[np.int32]
    dropped: list[dict[str, Any]]
    cut: list[dict[str, Any]]
    pairs: pa.Table
    counts: Counter[str]


def encoded(found: pa.RecordBatch | pa.Table, *, folder: Path, p: Settings, where: str) -> Batch:
    """Records as labelled tokens, none longer than pack.max_tokens, and what was lost on the way.

    Args: folder: of the tokenizer. where: the file of the records, for messages.
    Raises: DataError, for an overlong row where pack.on_overlong is `error`; GateError, for labels that break a rule.
    """
    tokenizer, rows = _tokenizer(folder), records.rows(found)
    sorting = _Sorting(tokenizer, p, where)
    for row, encoding in zip(rows, chat.encode_all(tokenizer, rows, p), strict=True):
        sorting.add(row, encoding)
    tokens = Tokens.of(sorting.kept)
    roles = _joined([row.roles for _, row in sorting.kept], np.int8)
    audit(tokens, roles, tokenizer, p, unfinished=sorting.unfinished)
    counts = sorting.counts + by_role(roles, tokens.trained)
    counts += Counter({"rows/in": len(rows), "tokens/in": len(tokens.ids)})
    pairs, of_pairs = preference_pairs(tokenizer, [row for row in rows if row["kind"] == "preference"], p)
    lengths = np.array(sorting.lengths, np.int32)
    return Batch(tokens, lengths, sorting.dropped, sorting.cut, pairs, counts + of_pairs)


@functools.cache
def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One a process. Work is spread over processes; threads of the tokenizer's own would contend with them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return chat.load_tokenizer(folder)


@dataclass
class _Sorting:
    """Sorts encoded records into those to pack, cut to size where pack.on_overlong says how, and those to drop."""

    tokenizer: PreTrainedTokenizerFast
    p: Settings
    where: str
    kept: list[tuple[str, Encoded]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    cut: list[dict[str, Any]] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)  # rows that may end within an answer
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any], encoding: Encoded | UnusableConversation) -> None:
        is_unwanted = row["kind"] == "unpaired" and row["label"] == "false"
        if isinstance(encoding, UnusableConversation):
            lost = 0 if is_unwanted else answer_tokens(self.tokenizer, row)
            self._drop(row, encoding.reason, str(encoding), None, lost)
            return
        length = len(encoding.input_ids)
        self.lengths.append(length)
        if is_unwanted:
            self._drop(row, "unwanted", "its answer is marked as unwanted", length, 0)
        elif not trained_tokens(encoding.labels[1:]):
            self._drop(row, "nothing_to_train", "no token that others stand before is learned", length, 0)
        elif length > self.p.max_tokens:
            self._shorten(row, encoding)
        else:
            self.kept.append((row["id"], encoding))

    def _drop(self, row: Mapping[str, Any], reason: str, message: str, tokens: int | None, lost: int) -> None:
        line = {"id": row["id"], "reason": reason, "message": message, "tokens": tokens, "lost": lost}
        self.dropped.append(line)
        gone = tokens or 0
        self.counts += Counter({f"rows/dropped/{reason}": 1, "lost": lost, "tokens/in": gone, "tokens/dropped": gone})

    def _shorten(self, row: Mapping[str, Any], encoding: Encoded) -> None:
        length, room = len(encoding.input_ids), self.p.max_tokens
        message = f"conversation of {length} tokens, a pack holds {room}"
        if row["kind"] == "text":
            parts, lost = [part(encoding, start, start + room) for start in range(0, length, room)], length % room == 1
        elif self.p.on_overlong is OnOverlong.error:
            raise DataError(
                f"{self.where}: row {row['id']}: {message}. "
                "Raise pack.max_tokens, or set pack.on_overlong to drop or to a way of cutting."
            )
        elif self.p.on_overlong is OnOverlong.split_turns and row["kind"] != "preference":
            parts, length, lost = split_turns(self.tokenizer, row, self.p)
        else:
            parts = self._one_part(encoding)
            lost = trained_tokens(encoding.labels) - sum(trained_tokens(part.labels) for part in parts)
        parts = [part for part in parts if trained_tokens(part.labels[1:])]
        if not parts:
            self._drop(row, "overlong", message, length, lost)
            return
        if self.p.on_overlong is OnOverlong.keep_start:
            self.unfinished.append(row["id"])
        for number, found in enumerate(parts, start=1):
            self.kept.append((row["id"] if number == 1 else f"{row['id']}#{number}", found))
        gone = length - sum(len(found.input_ids) for found in parts)
        how = "pieces" if row["kind"] == "text" else self.p.on_overlong.value
        self.cut.append({"id": row["id"], "reason": how, "message": message, "tokens": gone, "lost": lost})
        self.counts += Counter({"rows/cut": 1, "rows/further_parts": len(parts) - 1, "lost": lost})
        self.counts += Counter({"tokens/in": gone, "tokens/cut": gone})

    def _one_part(self, encoding: Encoded) -> list[Encoded]:
        """The record cut to one sequence, or none."""
        if self.p.on_overlong is OnOverlong.keep_start:
            return [part(encoding, 0, self.p.max_tokens)]
        if self.p.on_overlong is OnOverlong.keep_end_of_prompt:
            shorter = keep_end_of_prompt(encoding, self.tokenizer.bos_token_id, self.p)
            return [shorter] if shorter else []
        return []


def part(whole: Encoded, start: int, stop: int) -> Encoded:
    return Encoded(whole.input_ids[start:stop], whole.labels[start:stop], whole.roles[start:stop])


def keep_end_of_prompt(whole: Encoded, bos: int | None, p: Settings) -> Encoded | None:
    """The last answer and as much of what stands before it as a pack has room for; None where the answer has none.

        tokens B p p p p a a, max_tokens 5  ->  B p p a a

    What is left of an earlier answer that lost its beginning is not learned.
    """
    is_answer = whole.roles == chat.ROLES.index("assistant") if p.labels is Labels.all else whole.labels != IGNORED
    answers = np.flatnonzero(is_answer)
    begins = answers[np.diff(answers, prepend=-2) > 1][-1]  # of the last run of them
    opening = int(whole.input_ids[0] == bos and np.count_nonzero(whole.input_ids == bos) == 1)
    start = len(whole.input_ids) - p.max_tokens + opening
    if start >= begins + opening:  # at least one token has to stand before an answer for it to be learned whole
        return None
    labels = whole.labels.copy()
    if p.labels is not Labels.all and labels[start - 1] != IGNORED:
        finish = start + int(np.argmax(labels[start:] == IGNORED))
        labels[start:finish] = IGNORED
    keep = np.r_[0:opening, start : len(labels)]
    return Encoded(whole.input_ids[keep], labels[keep], whole.roles[keep])


def split_turns(
    tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any], p: Settings
) -> tuple[list[Encoded], int, int]:
    """A conversation as several, each with the system turn and as many whole rounds as a pack has room for.

        system  user answer  user answer  user answer  ->  system user answer user answer, system user answer

    Each part is a conversation of its own: with pack.labels=last_turn the last turn of each is learned.

    Returns: the parts; tokens of all parts, also of rounds too long for a pack; how many of these were to be learned.
    """
    opening, rounds = _rounds(row["messages"])
    parts: list[Encoded] = []
    tokens = lost = first = 0
    while first < len(rounds):
        best, count = None, 1
        for count in range(1, len(rounds) - first + 1):
            turns = [*opening, *itertools.chain(*rounds[first : first + count])]
            (found,) = chat.encode_all(tokenizer, [{**row, "messages": turns}], p)
            if isinstance(found, UnusableConversation) or len(found.input_ids) > p.max_tokens:
                break
            best, first_after = found, first + count
        if best is not None:
            parts.append(best)
            tokens += len(best.input_ids)
            first = first_after
            continue
        if isinstance(found, UnusableConversation):
            lost += answer_tokens(tokenizer, {**row, "messages": rounds[first]})
        else:
            tokens += len(found.input_ids)
            lost += trained_tokens(found.labels)
        first += 1
    return parts, tokens, lost


def _rounds(turns: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[list[Mapping[str, Any]]]]:
    """The turns before the first of a user, and then each user's turn with all that follows up to the next."""
    starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    rounds = [list(turns[start:end]) for start, end in itertools.pairwise([*starts, len(turns)])]
    return list(turns[: starts[0]]) if starts else list(turns), rounds


def answer_tokens(tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any]) -> int:
    """Tokens of the bare answers of a record that cannot be encoded as a whole."""
    turns = records.conversation(row) or [{"role": "assistant", "content": row["text"]}]
    texts = [turn.get("content") or "" for turn in turns if turn["role"] == "assistant"]
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def preference_pairs(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, Any]], p: Settings
) -> tuple[pa.Table, Counter[str]]:
    """Both answers of preference records, as PAIR, and counts by the last parts of the metrics' names.

    A pair is dropped when either of its sides cannot be encoded or has no room in a pack: one alone teaches nothing.
    """
    found: list[tuple[str, chat.Pair]] = []
    counts: Counter[str] = Counter()
    for row in rows:
        pair = chat.encode_pair(tokenizer, row, p)
        if isinstance(pair, UnusableConversation):
            counts[f"pairs/dropped/{pair.reason}"] += 1
        elif len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) > p.max_tokens:
            counts["pairs/dropped/overlong"] += 1
        else:
            found.append((row["id"], pair))
    sides = {name: [getattr(pair, name) for _, pair in found] for name in ("prompt", "chosen", "rejected")}
    counts["pairs"] = len(found)
    counts += Counter({f"pairs/tokens/{name}": sum(map(len, parts)) for name, parts in sides.items()})
    lists = [_lists(_joined(parts, np.int32), [len(part) for part in parts]) for parts in sides.values()]
    return pa.Table.from_arrays([pa.array([row_id for row_id, _ in found], pa.string()), *lists], schema=PAIR), counts


def _lists(values: npt.NDArray[Any] | pa.Array, sizes: Sequence[int] | Int64s) -> pa.ListArray:
    """[a b c], sizes [2 1]  ->  [[a b] [c]]"""
    return pa.ListArray.from_arrays(np.cumsum([0, *sizes], dtype=np.int32), pa.array(values))


def by_role(roles: npt.NDArray[np.int8], trained: npt.NDArray[np.bool_]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, of in (("tokens", roles), ("trained", roles[trained])):
        found = np.bincount(of, minlength=len(chat.ROLES)).tolist()
        counts += Counter({f"{name}/role/{role}": n for role, n in zip(chat.ROLES, found, strict=True)})
    return counts


def audit(
    tokens: Tokens,
    roles: npt.NDArray[np.int8],
    tokenizer: PreTrainedTokenizerFast,
    p: Settings,
    *,
    unfinished: Sequence[str],
) -> None:
    """Hold every sequence to what labels must be.

    Something is learned; at most one BOS, and that first; each answer is learned up to and with the token that ends it.

    Args: unfinished: rows cut within an answer, which need not end.
    Raises: GateError, naming row and rule: no data may lead here.
    """
    row_of = np.repeat(np.arange(len(tokens.row_ids)), np.diff(tokens.offsets))
    is_first = np.zeros(len(tokens.ids), dtype=bool)
    is_first[tokens.offsets[:-1]] = True
    faults = {"nothing is learned": np.flatnonzero(tokens.per_row(tokens.trained) == 0)}
    if tokenizer.bos_token_id is not None:
        is_bos = tokens.ids == tokenizer.bos_token_id
        is_wrong = is_bos & ~is_first
        if _bos_begins_turns(tokenizer):
            is_wrong &= np.roll(is_bos, 1)
        faults["a second BOS, or one that does not come first"] = row_of[is_wrong]
    if p.labels is not Labels.all:
        special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        goes_on = np.roll(tokens.trained & ~is_first, -1)
        ends = tokens.trained & ~goes_on & (roles != chat.ROLES.index("text"))
        open_ended = np.unique(row_of[ends & ~np.isin(tokens.ids, special)])
        may = pc.is_in(tokens.row_ids.take(open_ended), pa.array(unfinished, pa.string())).to_numpy()
        faults["an answer is not learned up to its end"] = open_ended[~may]
    for rule, rows in faults.items():
        if len(rows):
            row_id = tokens.row_ids[int(rows[0])].as_py()
            raise GateError(f"labels of row {row_id}: {rule}. This is a fault of the pipeline: report it with the row.")


@functools.cache
def _bos_begins_turns(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether BOS is the token that begins every turn, as in SmolLM2."""
    probe = chat.encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return int(np.count_nonzero(probe.input_ids == tokenizer.bos_token_id)) > 1


@dataclass
class Collected:
    """All batches of a split; the same fields, the tokens in files."""

    tokens: Tokens
    lengths: npt.NDArray[np.int32]
    dropped: list[dict[str, Any]]
    cut: list[dict[str, Any]]
    counts: Counter[str]


@contextmanager
def collected(batches: Iterable[Batch], folder: Path) -> Iterator[Collected]:
    """Put batches together, in bounded memory: tokens lie in files without a name that end with the block.

    Args: folder: an existing one, for those files; pairs.parquet is written there where there are any.
    """
    row_ids, sizes, lengths = [], [np.zeros(1, np.int64)], [np.empty(0, np.int32)]
    dropped: list[dict[str, Any]] = []
    cut: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        ids, trained = (stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(2))
        pairs: pq.ParquetWriter | None = None
        for batch in batches:
            batch.tokens.ids.tofile(ids)
            batch.tokens.trained.tofile(trained)
            row_ids += batch.tokens.row_ids.chunks
            sizes.append(np.diff(batch.tokens.offsets))
            lengths.append(batch.lengths)
            dropped += batch.dropped
            cut += batch.cut
            counts += batch.counts
            if len(batch.pairs):
                pairs = pairs or pq.ParquetWriter(folder / "pairs.parquet", PAIR, compression="zstd")
                pairs.write_table(batch.pairs)
        if pairs:
            pairs.close()
        tokens = Tokens(
            pa.chunked_array(row_ids, pa.string()),
            np.cumsum(np.concatenate(sizes)),
            _mapped(ids, np.int32),
            _mapped(trained, np.bool_),
        )
        yield Collected(tokens, np.concatenate(lengths), dropped, cut, counts)


def _mapped(file: IO[bytes], dtype: type) -> npt.NDArray[Any]:
    file.flush()
    size = os.fstat(file.fileno()).st_size
    return np.asarray(np.memmap(file, dtype, mode="r")) if size else np.empty(0, dtype)


def packs(tokens: Tokens, *, max_tokens: int) -> Iterator[pa.Table]:
    """Lay sequences into packs, each where it leaves least room, longest first; PACK, some packs at a time.

        lengths 3 2 2 1, max_tokens 4  ->  [3 1] [2 2]

    Returns: packs in the order they were begun; the same for any order of the sequences.
    """
    lengths = np.diff(tokens.offsets)
    assert lengths.max(initial=0) <= max_tokens
    tokens = replace(tokens, row_ids=tokens.row_ids.combine_chunks())  # rows are taken from one chunk faster
    keys = pa.table({"length": lengths, "id": tokens.row_ids})
    order = pc.sort_indices(keys, sort_keys=[("length", "descending"), ("id", "ascending")]).to_numpy()
    pack_of = best_fit(lengths[order], max_tokens=max_tokens)
    order = order[np.argsort(pack_of, kind="stable")]
    ends = np.cumsum(np.bincount(pack_of))  # rows of the packs up to each
    step = max(GROUP_TOKENS // max_tokens, 1)
    for first in range(0, len(ends), step):
        until = np.concatenate([[0], ends])[first : first + step + 1]
        yield _laid_out(tokens, order[until[0] : until[-1]], np.diff(until))


def best_fit(lengths: Int64s, *, max_tokens: int) -> Int64s:
    """The pack of each sequence (best-fit decreasing, arXiv:2404.10830); among packs of equal room the first begun.

    Args: lengths: longest first, 1 to max_tokens.
    Time: of the order of one heap operation a sequence, however many packs there are.
    """
    begun = 0
    waiting: list[list[int]] = [[] for _ in range(max_tokens + 1)]  # by room left: a heap of the packs
    rooms = 0  # bit r is set where waiting[r] holds a pack
    found = np.empty(len(lengths), np.int64)
    for i, length in enumerate(lengths.tolist()):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
            pack = heapq.heappop(waiting[room])
            if not waiting[room]:
                rooms ^= 1 << room
        else:
            pack, room, begun = begun, max_tokens, begun + 1
        if left := room - length:
            heapq.heappush(waiting[left], pack)
            rooms |= 1 << left
        found[i] = pack
    return found


def _laid_out(tokens: Tokens, rows: Int64s, rows_per_pack: Int64s) -> pa.Table:
    """Sequences in this order as consecutive packs of so many of them."""
    starts, ends = tokens.offsets[rows], tokens.offsets[rows + 1]
    lengths = ends - starts
    spans = [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    ids = np.concatenate([tokens.ids[span] for span in spans])  # a copy a row: faster than an index a token
    labels = np.where(np.concatenate([tokens.trained[span] for span in spans]), ids, np.int32(IGNORED))
    ramp = np.arange(lengths.max(), dtype=np.int32)
    positions = np.concatenate([ramp[:length] for length in lengths.tolist()])
    sizes = np.add.reduceat(lengths, np.cumsum(rows_per_pack) - rows_per_pack)
    columns = [_lists(values, sizes) for values in (ids, labels, positions)]
    row_ids = _lists(tokens.row_ids.take(rows), rows_per_pack)
    return pa.Table.from_arrays([*columns, row_ids], schema=PACK)


def write(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write packs; returns how many. Equal packs give equal bytes."""
    plain = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}  # a third faster, 4% larger
    with files.replacing(path) as new, pq.ParquetWriter(new, PACK, **plain) as writer:
        count = 0
        for table in tables:
            writer.write_table(table)
            count += len(table)
    return count


def check(found: Collected, p: Settings, *, where: str) -> None:
    """Raises: DataError, when nothing is left to pack, or more was lost than pack.max_lost_fraction allows."""
    if not len(found.tokens.row_ids):
        reasons = dict(sorted(Counter(row["reason"] for row in found.dropped).items()))
        raise DataError(
            f"{where}: none of {found.counts['rows/in']} rows can be trained on (dropped: {reasons}), "
            "expected at least one. Raise pack.max_tokens, or give more rows (data.*, split.*)."
        )
    lost, fraction = found.counts["lost"], lost_fraction(found)
    if fraction > p.max_lost_fraction:
        worst = sorted((*found.dropped, *found.cut), key=lambda row: (-row["lost"], row["id"]))
        named = ", ".join(f"{row['id'][:16]} ({row['lost']} lost, {row['reason']})" for row in worst[:NAMED])
        raise DataError(
            f"{where}: {lost} tokens to learn were lost, {fraction:.1%} of all, expected at most "
            f"{p.max_lost_fraction:.1%}. Most in the rows {named}. "
            "Raise pack.max_tokens, cut in another way (pack.on_overlong), or raise pack.max_lost_fraction."
        )


def lost_fraction(found: Collected) -> float:
    """Of the tokens to learn, the share that was dropped or cut."""
    trained, lost = int(np.count_nonzero(found.tokens.trained)), found.counts["lost"]
    return lost / (trained + lost) if lost else 0.0


def account(found: Collected, n_packs: int, *, max_tokens: int, split: str) -> dict[str, float]:
    """Where every row and token of a split went.

    rows/in = rows/packed + each rows/dropped; tokens/in = trained + context + cut + dropped. Of a row split at its
    turns the tokens in are those of its parts. A row that cannot be encoded has none here; its bare answers count in
    lost_fraction.
    """
    counts = found.counts
    packed, trained = len(found.tokens.ids), int(np.count_nonzero(found.tokens.trained))
    sequences = len(found.tokens.row_ids)
    rows = counts["rows/in"] - len(found.dropped)
    assert sequences == rows + counts["rows/further_parts"]
    assert counts["tokens/in"] == packed + counts["tokens/cut"] + counts["tokens/dropped"]
    assert trained == sum(n for name, n in counts.items() if name.startswith("trained/role/"))
    plain = {name: n for name, n in counts.items() if name not in ("lost", "rows/further_parts")}
    return {
        f"{split}/{name}": value
        for name, value in {
            **dict.fromkeys(("rows/cut", "tokens/cut", "tokens/dropped"), 0),
            **plain,
            "rows/packed": rows,
            "sequences": sequences,
            "tokens/trained": trained,
            "tokens/context": packed - trained,
            "tokens/unused_room": n_packs * max_tokens - packed,
            "lost_fraction": lost_fraction(found),
            "packs": n_packs,
            "fill": packed / (n_packs * max_tokens),
        }.items()
    }


@dataclass(frozen=True)
class Document:
    """One conversation of a pack, up to its first answer: what the model is asked, and what it should say."""

    row_id: str
    prompt: list[int]
    answer: list[int]


def documents(pack: Pack) -> list[Document]:
    """Take a pack apart again."""
    found, start = [], 0
    for row_id, length in zip(pack.row_ids, document_lengths(pack.position_ids), strict=True):
        ids, labels = pack.input_ids[start : start + length], pack.labels[start : start + length]
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        last = next((i for i in range(first, length) if labels[i] == IGNORED), length)
        found.append(Document(row_id, ids[:first], ids[first:last]))
        start += length
    return found


def read(folder: Path) -> list[Pack]:
    """The packs of one split.

    Raises: DataError, when the folder holds none.
    """
    path = folder / "packs.parquet"
    found = packs_of(pq.read_table(path)) if path.is_file() else []
    if not found:
        raise DataError(f"{path}: found no packs, expected at least one. Run the stage tokenize_pack.")
    return found


def packs_of(table: pa.Table) -> list[Pack]:
    return [Pack(**row) for row in table.to_pylist()]


def document_lengths(position_ids: Sequence[int]) -> list[int]:
    """Lengths of the conversations in a sequence: [0 1 2 0 1] -> [3 2]."""
    starts = [i for i, position in enumerate(position_ids) if position == 0] + [len(position_ids)]
    return [end - start for start, end in itertools.pairwise(starts)]


def trained_tokens(labels: Sequence[int] | npt.NDArray[np.int32]) -> int:
    return int(np.count_nonzero(np.asarray(labels) != IGNORED))


def length_histogram(
    lengths: Mapping[str, npt.NDArray[np.int32]], *, max_tokens: int, bins: int = 16
) -> list[dict[str, int]]:
    """Rows by length, one column per split. The last line counts what no pack can hold.

    Returns: lines {"tokens": upper edge, split: rows with at most that many tokens and more than the line before}.
    """
    width = -(-max_tokens // bins)
    edges = [min(width * (i + 1), max_tokens) for i in range(-(-max_tokens // width))]
    longest = max(int(found.max(initial=0)) for found in lengths.values())
    edges.append(max(longest, max_tokens + 1))
    counts = {
        split: np.bincount(np.searchsorted(edges, found), minlength=len(edges)).tolist()
        for split, found in sorted(lengths.items())
    }
    return [{"tokens": edge, **{split: n[i] for split, n in counts.items()}} for i, edge in enumerate(edges)]


def labels_by_role(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Tokens of each role over all splits: lines {"role", "trained", "not_trained"}, in the order of chat.ROLES.

    Args: metrics: of `account`, of one split or several.
    """

    def of(role: str, kind: str) -> int:
        return sum(int(value) for name, value in metrics.items() if name.endswith(f"/{kind}/role/{role}"))

    found = [(role, of(role, "tokens"), of(role, "trained")) for role in chat.ROLES]
    return [{"role": role, "trained": n, "not_trained": all_ - n} for role, all_, n in found if all_]
