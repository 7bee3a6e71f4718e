"""JSON read exactly: what another reader would take otherwise, or not at all, is refused with a reason.

orjson reads fast, but keeps the last of two equal keys and rounds whole numbers beyond 64 bits. Whether that happened
can be counted; only lines where it may have, or that orjson refuses, are read by the json module and its hooks.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import orjson

from stages.lib.rows import Unfit

MAX_DEPTH = 100  # objects and lists inside each other; readers give up at depths of their own
MAX_BYTES = 16 << 20  # of a line, or of an item of a list

_CHUNK = 1 << 20
# Groups are atomic, (?>(...)*), not possessive, (...)*+: those match wrongly until Python 3.11.4 (CPython issue 106052)
_STRING = re.compile(rb'"[^"\\]*+(?>(?:\\.[^"\\]*+)*)"?', re.DOTALL)
_KEY_END = re.compile(rb'"[ \t\r\n]*+:')


class BadSyntax(Unfit):
    """The text is no JSON; where one value of a longer text ends is then uncertain."""


def value(text: bytes) -> Any:
    """The one value that a text holds.

    Raises: Unfit (bad_utf8, bad_json, not_a_number, repeated_key, surrogate); of these BadSyntax, when it is no JSON.
    """
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _strict(text)
    keys = _keys((found,), MAX_DEPTH)
    if keys != len(_KEY_END.findall(text)):  # more: a key repeated, or \": in a string
        plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote left begins or ends a string
        if keys != len(_KEY_END.findall(plain)):
            return _strict(text)
    return found


def _keys(inner: Iterable[Any], depth: int) -> int:
    """Number of keys of all objects among some values; far below 0, when a whole number may have been rounded."""
    if depth < 0:
        raise _too_deep()
    count = 0
    for item in inner:
        kind = type(item)
        if kind is str:
            continue
        if kind is dict:
            count += len(item) + _keys(item.values(), depth - 1)
        elif kind is list:
            count += _keys(item, depth - 1)
        elif kind is float and not -(2.0**63) < item < 2.0**64:
            count -= 1 << 60
    return count


def _too_deep() -> Unfit:
    return Unfit("bad_json", f"objects and lists stand more than {MAX_DEPTH} deep inside each other")


def _strict(text: bytes) -> Any:
    """The value, by the json module, which tells every fault."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise Unfit("bad_utf8", f"byte {fault.start + 1} of the line is no UTF-8") from None
    _check_depth(text)
    try:
        found = json.loads(decoded, parse_constant=_refused, parse_float=_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as fault:
        place = f"column {fault.colno}" if fault.lineno == 1 else f"line {fault.lineno} of it, column {fault.colno}"
        raise BadSyntax("bad_json", f"{fault.msg} at {place}") from None
    except ValueError as fault:  # more digits than Python reads
        raise Unfit("bad_json", str(fault)) from None
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Unfit("surrogate", "holds half a character (a lone surrogate)") from None
    return found


def _check_depth(text: bytes) -> None:
    depth = 0
    for bracket in re.sub(rb"[^][{}]+", b"", _STRING.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _refused(constant: str) -> Any:
    raise Unfit("not_a_number", f"holds {constant}, which is no JSON")


def _finite(text: str) -> float:
    if math.isinf(found := float(text)):
        raise Unfit("not_a_number", f"holds {text[:40]}, which is larger than any number of 64 bits")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise Unfit("repeated_key", f"the key {repeated!r} stands twice in one object")
    return found


class NoList(Exception):
    """A text is no JSON list from its beginning to its end: (line, what is wrong)."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason


def items(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """The items of a JSON list as (line in which it begins, its text), unread; None for one of more than MAX_BYTES.

        [ {"a": [1, 2]}, "b" , 3 ]  ->  {"a": [1, 2]}  "b"  3

    Strings and brackets are followed, nothing else: whether an item is JSON is for `value` to say. Memory is bounded.

    Raises: NoList, when the text does not begin with a bracket, ends before the list does, or goes on after it.
    """
    start = stream.read(_CHUNK).removeprefix(b"\xef\xbb\xbf")
    text = start.lstrip()
    line = 1 + start.count(b"\n", 0, len(start) - len(text))
    if text[:1] != b"[":
        raise NoList(line, f"begins with {text[:1].decode('utf-8', 'replace')!r}, expected a JSON list of objects")
    scanner = _Scanner(line)
    chunk = text[1:]
    while True:
        yield from scanner.feed(chunk)
        if scanner.is_closed or not (chunk := stream.read(_CHUNK)):
            break
    if not scanner.is_closed:
        raise NoList(scanner.line, "the list is not closed: the file seems cut short. Expected a ']'")
    chunk = scanner.rest
    while chunk:
        if rest := chunk.strip():
            raise NoList(scanner.line, f"found {rest[:20].decode('utf-8', 'replace')!r} after the end of the list")
        chunk = stream.read(_CHUNK)


class _Scanner:
    """Cuts a list into items, piece by piece of its text.

    An item is a string or what stands between brackets; else it goes on to the next comma.
    """

    _mark = re.compile(rb'["\[\]{},]')
    # up to a bracket
    _inner = re.compile(rb'[^"\[\]{}]*+(?>(?:"[^"\\]*+(?>(?:\\.[^"\\]*+)*)"[^"\[\]{}]*+)*)', re.DOTALL)
    _string_rest = re.compile(rb'[^"\\]*+(?>(?:\\.[^"\\]*+)*)', re.DOTALL)

    def __init__(self, line: int) -> None:
        self.is_closed = False
        self.line = line
        self.rest = b""  # what has been read beyond the list
        self._depth = 0
        self._in_string = False
        self._pieces: list[bytes] | None = []  # of the item that has begun; None: too long to be held
        self._held = 0
        self._began = 0  # line
        self._carried = b""  # a backslash at the end of a piece belongs to what follows

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes | None]]:
        chunk, self._carried = self._carried + chunk, b""
        start = position = 0  # of the item's part in this piece; of what is looked at
        while position < len(chunk):
            if self._in_string:
                rest = self._string_rest.match(chunk, position)
                assert rest is not None
                position = rest.end()
                if position == len(chunk):
                    break
                if chunk[position : position + 1] == b"\\":
                    chunk, self._carried = chunk[:position], chunk[position:]
                    break
                self._in_string = False
                position += 1
                if not self._depth:
                    yield from self._ended(chunk[start:position])
                    start = position
                continue
            if self._depth:
                inner = self._inner.match(chunk, position)
                assert inner is not None
                position = inner.end()
            found = self._mark.search(chunk, position)
            if found is None:
                break
            mark, position = found[0], found.end()
            if not self._depth and mark != b",":  # begins an item, or ends the list
                if mark == b"]":
                    yield from self._ended(chunk[start : found.start()])
                    self.is_closed, self.rest = True, chunk[position:]
                    return
                if chunk[start : found.start()].strip() or self._held:
                    yield from self._ended(chunk[start : found.start()])  # a bare word before it
                    start = found.start()
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
                self._depth += 1
            elif mark in b"]}":
                self._depth = max(self._depth - 1, 0)
                if not self._depth:
                    yield from self._ended(chunk[start:position])
                    start = position
            elif not self._depth:  # a comma between items
                yield from self._ended(chunk[start : found.start()])
                start = position
        self._hold(chunk[start:])

    def _hold(self, piece: bytes) -> None:
        if not self._held:  # blanks before an item
            stripped = piece.lstrip()
            self.line += piece.count(b"\n", 0, len(piece) - len(stripped))
            self._began, piece = self.line, stripped
        self.line += piece.count(b"\n")
        self._held += len(piece)
        if self._held > MAX_BYTES:
            self._pieces = None
        elif self._pieces is not None and piece:
            self._pieces.append(piece)

    def _ended(self, piece: bytes) -> Iterator[tuple[int, bytes | None]]:
        self._hold(piece)
        if self._held:
            yield self._began, None if self._pieces is None else b"".join(self._pieces).strip()
        self._pieces, self._held = [], 0
