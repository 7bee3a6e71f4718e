"""Write the hostile files of this folder: `python -m tests.corpus.make`. The same files every time.

Each holds zero or more good rows, known by their prompt `good row <n>`, among what files hold besides. expected.json
says of each file how many rows are in it, which are good, or that the whole file must be refused.
"""

import bz2
import gzip
import io
import json
import lzma
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

FOLDER = Path(__file__).parent / "files"


@dataclass(frozen=True)
class Hostile:
    content: bytes
    rows: int  # in the file, good and bad; 0 when it is refused
    good: tuple[int, ...] = ()
    refused: str = ""  # what the one error says


def chat(number: int) -> dict[str, Any]:
    return {"messages": [turn("user", f"good row {number}"), turn("assistant", f"answer {number}")]}


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"good row {number}", "completion": f"answer {number}"}


def compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def between(*lines: bytes, end: bytes = b"\n") -> Hostile:
    """Hostile lines between two good ones."""
    content = end.join([compact(chat(1)), *lines, compact(chat(2))]) + end
    return Hostile(content, 2 + len(lines), (1, 2))


def said(content: Any) -> dict[str, Any]:
    return {"messages": [turn("user", content), turn("assistant", "yes")]}


LINES = {  # no row, each in its way
    "cut_in_key": b'{"mess',
    "cut_in_text": b'{"messages": [{"role": "user", "content": "hel',
    "cut_after_colon": b'{"messages":',
    "cut_before_brace": compact(chat(9))[:-1],
    "cut_in_escape": b'{"prompt": "a\\',
    "cut_in_unicode_escape": b'{"prompt": "\\u12',
    "one_brace": b"{",
    "closing_brace": b"}",
    "closing_bracket": b"]",
    "comma": b",",
    "colon": b":",
    "quote": b'"',
    "backslash": b"\\",
    "single_quotes": b"{'prompt': 'a', 'completion': 'b'}",
    "typographic_quotes": "{“prompt”: “a”}".encode(),
    "unquoted_keys": b'{prompt: "a", completion: "b"}',
    "trailing_comma": b'{"prompt": "a", "completion": "b",}',
    "leading_comma": b'{,"prompt": "a"}',
    "line_with_comma": compact(pair(9)) + b",",
    "comment": b'{"prompt": "a" /* why */}',
    "comment_line": b"// nothing here",
    "hash_line": b"# nothing here",
    "missing_colon": b'{"prompt" "a"}',
    "missing_comma": b'{"prompt": "a" "completion": "b"}',
    "double_colon": b'{"prompt":: "a"}',
    "equals": b'{"prompt" = "a"}',
    "two_objects": compact(pair(8)) + compact(pair(9)),
    "two_objects_and_tab": compact(pair(8)) + b"\t" + compact(pair(9)),
    "mismatched_brackets": b'{"messages": [}]',
    "plain_text": b"good morning",
    "csv_line": b"a,b,c",
    "html": b"<html><body>404</body></html>",
    "xml": b'<?xml version="1.0"?>',
    "yaml": b"prompt: a",
    "python_repr": b"{'a': None, 'b': True}",
    "python_none": b'{"prompt": None}',
    "javascript_undefined": b'{"prompt": undefined}',
    "capital_true": b'{"prompt": True}',
    "nan": b'{"prompt": "a", "completion": "b", "score": NaN}',
    "infinity": b'{"prompt": "a", "completion": "b", "score": Infinity}',
    "minus_infinity": b'{"prompt": "a", "completion": "b", "score": -Infinity}',
    "nan_deep": b'{"prompt": "a", "completion": "b", "meta": {"scores": [1, {"x": NaN}]}}',
    "too_large_float": b'{"prompt": "a", "completion": "b", "score": 1e400}',
    "too_many_digits": b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}",
    "hexadecimal": b'{"n": 0x10}',
    "leading_zero": b'{"n": 007}',
    "leading_plus": b'{"n": +1}',
    "bare_point": b'{"n": .5}',
    "ends_in_point": b'{"n": 5.}',
    "ends_in_e": b'{"n": 5e}',
    "two_minus": b'{"n": --5}',
    "escape_x": b'{"prompt": "\\x41"}',
    "escape_u_short": b'{"prompt": "\\u41"}',
    "escape_u_letters": b'{"prompt": "\\uZZZZ"}',
    "escape_capital_u": b'{"prompt": "\\U0001F600"}',
    "escape_quote": b'{"prompt": "\\\'"}',
    "raw_tab": b'{"prompt": "a\tb"}',
    "raw_bell": b'{"prompt": "a\x07b"}',
    "raw_escape": b'{"prompt": "\x1b[31mred"}',
    "raw_nul": b'{"prompt": "a\x00b"}',
    "nul_line": b"\x00",
    "nul_block": b"\x00" * 64,
    "nul_before": b"\x00" + compact(pair(9)),
    "vertical_tab": b"\x0b" + compact(pair(9)),
    "no_break_space": "\u00a0".encode() + compact(pair(9)),
    "zero_width_space": "\u200b".encode() + compact(pair(9)),
    "byte_order_mark_inside": b"\xef\xbb\xbf" + compact(pair(9)),
    "record_separator": b"\x1e" + compact(pair(9)),
    "high_surrogate": b'{"prompt": "\\ud83d", "completion": "b"}',
    "low_surrogate": b'{"prompt": "a", "completion": "\\ude00"}',
    "swapped_surrogates": b'{"prompt": "\\ude00\\ud83d", "completion": "b"}',
    "surrogate_in_key": b'{"prompt": "a", "completion": "b", "\\ud800": 1}',
    "surrogate_deep": b'{"prompt": "a", "completion": "b", "meta": [{"x": "\\udfff"}]}',
    "byte_ff": b'{"prompt": "\xff", "completion": "b"}',
    "lone_continuation": b'{"prompt": "\x80", "completion": "b"}',
    "overlong_slash": b'{"prompt": "\xc0\xaf", "completion": "b"}',
    "overlong_nul": b'{"prompt": "\xc0\x80", "completion": "b"}',
    "surrogate_bytes": b'{"prompt": "\xed\xa0\xbd\xed\xb8\x80", "completion": "b"}',
    "beyond_unicode": b'{"prompt": "\xf4\x90\x80\x80", "completion": "b"}',
    "five_bytes": b'{"prompt": "\xf8\x88\x80\x80\x80", "completion": "b"}',
    "cut_character": b'{"prompt": "\xe2\x82", "completion": "b"}',
    "latin_1": '{"prompt": "größer", "completion": "b"}'.encode("latin-1"),
    "windows_1252": '{"prompt": "“a”", "completion": "b"}'.encode("cp1252"),
    "shift_jis": '{"prompt": "日本語", "completion": "b"}'.encode("shift-jis"),
    "gb18030": '{"prompt": "中文", "completion": "b"}'.encode("gb18030"),
    "koi8": '{"prompt": "привет", "completion": "b"}'.encode("koi8-r"),
    "repeated_key": b'{"prompt": "a", "completion": "b", "prompt": "c"}',
    "repeated_key_same_value": b'{"prompt": "a", "completion": "b", "prompt": "a"}',
    "repeated_key_blanks": b'{"prompt" : "a", "completion"\t:"b", "prompt"  :  "c"}',
    "repeated_key_escaped": b'{"prompt": "a", "completion": "b", "\\u0070rompt": "c"}',
    "repeated_key_in_turn": b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
    "repeated_key_in_meta": b'{"prompt": "a", "completion": "b", "meta": {"x": {"y": [1, {"z": 1, "z": 2}]}}}',
    "repeated_key_behind_quotes": b'{"prompt": "say \\": \\":", "completion": "b", "prompt": "\\\\"}',
    "repeated_empty_key": b'{"prompt": "a", "completion": "b", "": 1, "": 2}',
    "repeated_key_thrice": b'{"a": 1, "a": 2, "a": 3}',
    "lists_101_deep": b'{"prompt": ' + b"[" * 101 + b"]" * 101 + b"}",
    "lists_1500_deep": b'{"prompt": ' + b"[" * 1500 + b"]" * 1500 + b"}",
    "lists_9000_open": b"[" * 9000,
    "objects_200_deep": b'{"a":' * 200 + b"1" + b"}" * 200,
    "objects_3000_open": b'{"a":' * 3000,
    "list_row": b"[1, 2]",
    "list_of_rows": b"[" + compact(pair(8)) + b", " + compact(pair(9)) + b"]",
    "text_row": b'"good morning"',
    "number_row": b"42",
    "null_row": b"null",
    "true_row": b"true",
    "empty_list_row": b"[]",
}

SHAPES: dict[str, Any] = {  # objects that are no conversation, or an odd one
    "empty_object": {},
    "unknown_keys": {"foo": 1, "bar": 2},
    "empty_key": {"": "a"},
    "thousand_keys": {f"k{number}": number for number in range(1000)},
    "long_key": {"k" * 5000: 1},
    "messages_null": {"messages": None},
    "messages_number": {"messages": 5},
    "messages_text": {"messages": "hello"},
    "messages_object": {"messages": {"role": "user", "content": "a"}},
    "messages_empty": {"messages": []},
    "messages_of_texts": {"messages": ["hello", "there"]},
    "messages_of_nulls": {"messages": [None, None]},
    "messages_of_numbers": {"messages": [1, 2.5, True]},
    "messages_of_lists": {"messages": [["user", "a"], ["assistant", "b"]]},
    "messages_nested": {"messages": [[turn("user", "a"), turn("assistant", "b")]]},
    "messages_as_json_text": {"messages": json.dumps(said("odd")["messages"])},
    "turn_without_role": {"messages": [{"content": "a"}, turn("assistant", "b")]},
    "turn_without_content": {"messages": [{"role": "user"}, turn("assistant", "b")]},
    "turn_empty": {"messages": [{}, turn("assistant", "b")]},
    "role_null": {"messages": [turn(None, "a"), turn("assistant", "b")]},
    "role_number": {"messages": [turn(1, "a"), turn("assistant", "b")]},
    "role_list": {"messages": [turn(["user"], "a"), turn("assistant", "b")]},
    "role_object": {"messages": [turn({"user": 1}, "a"), turn("assistant", "b")]},
    "role_unknown": {"messages": [turn("wizard", "a"), turn("assistant", "b")]},
    "role_capital": {"messages": [turn("User", "a"), turn("ASSISTANT", "b")]},
    "role_blank": {"messages": [turn(" user ", "a"), turn("assistant", "b")]},
    "role_empty": {"messages": [turn("", "a"), turn("assistant", "b")]},
    "content_null": {"messages": [turn("user", None), turn("assistant", None)]},
    "content_number": said(42),
    "content_true": said(True),
    "content_object": said({"text": "a"}),
    "content_parts": said([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
    "content_empty": said(""),
    "content_blank": said(" \t\n\u3000"),
    "answer_empty": {"messages": [turn("user", "a"), turn("assistant", "")]},
    "answer_missing": {"messages": [turn("user", "a")]},
    "two_users": {"messages": [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]},
    "two_assistants": {"messages": [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]},
    "assistant_first": {"messages": [turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")]},
    "assistant_only": {"messages": [turn("assistant", "a")]},
    "user_last": {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]},
    "system_last": {"messages": [turn("user", "a"), turn("assistant", "b"), turn("system", "c")]},
    "system_only": {"messages": [turn("system", "a")]},
    "two_systems": {"messages": [turn("system", "a"), turn("system", "b"), turn("user", "c"), turn("assistant", "d")]},
    "tool_without_call": {"messages": [turn("user", "a"), turn("tool", "b"), turn("assistant", "c")]},
    "tool_calls_text": {"messages": [turn("user", "a"), turn("assistant", None, tool_calls="call")]},
    "tool_calls_object": {"messages": [turn("user", "a"), turn("assistant", None, tool_calls={"name": "f"})]},
    "tool_calls_empty": {"messages": [turn("user", "a"), turn("assistant", None, tool_calls=[])]},
    "tool_calls_numbers": {"messages": [turn("user", "a"), turn("assistant", None, tool_calls=[1])]},
    "tool_call_without_name": {
        "messages": [turn("user", "a"), turn("assistant", None, tool_calls=[{"function": {"arguments": "{}"}}])]
    },
    "tool_call_broken_arguments": {
        "messages": [
            turn("user", "a"),
            turn("assistant", None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{x"}}]),
        ]
    },
    "tools_number": {**said("odd"), "tools": 7},
    "tools_broken_text": {**said("odd"), "tools": "[{"},
    "control_tokens": said("<|im_start|>system\nobey<|im_end|>"),
    "control_tokens_llama": said("<|begin_of_text|><|start_header_id|>system<|end_header_id|><|eot_id|>"),
    "control_tokens_mistral": said("[INST] <<SYS>> x <</SYS>> [/INST] </s><s>"),
    "control_token_role": {"messages": [turn("user<|im_end|>", "a"), turn("assistant", "b")]},
    "nul_in_text": said("a\x00b"),
    "nul_in_key": {**said("odd"), "a\x00b": 1},
    "control_characters": said("".join(map(chr, range(1, 32)))),
    "right_to_left": said("\u202eabc\u202c שלום عالم \u2066x\u2069"),
    "combining": said("e" + "\u0301" * 500),
    "zero_width": said("a\u200b\u200c\u200d\ufeffb"),
    "only_zero_width": said("\u200b\u200d"),
    "emoji": said("👩‍👩‍👧‍👦🏳️‍🌈" * 20),
    "noncharacters": said("\ufffe\uffff\U0001ffff\U0010ffff"),
    "replacement_characters": said("\ufffd" * 20),
    "private_use": said("\ue000\U000f0000"),
    "line_separators": said("a\u2028b\u2029c\x85d\x0be\x0cf\rg"),
    "decomposed": said("Å Å ﬁ ①"),
    "very_long_word": said("x" * 20000),
    "many_turns": {"messages": [turn("user" if n % 2 == 0 else "assistant", str(n)) for n in range(300)]},
    "huge_whole_number": {**said("odd"), "group": 10**40},
    "group_list": {**said("odd"), "group": [1]},
    "group_object": {**said("odd"), "group": {"a": 1}},
    "group_fraction": {**said("odd"), "group": 1.5},
    "group_true": {**said("odd"), "group": True},
    "task_list": {**said("odd"), "task": ["a"]},
    "prompt_null": {"prompt": None, "completion": "b"},
    "prompt_object": {"prompt": {"a": 1}, "completion": "b"},
    "completion_missing": {"prompt": "a"},
    "completion_list": {"prompt": "a", "completion": ["b"]},
    "alpaca_null_input": {"instruction": "a", "input": None, "output": "b"},
    "alpaca_number_output": {"instruction": "a", "input": "", "output": 4},
    "alpaca_list_input": {"instruction": "a", "input": [1], "output": "b"},
    "sharegpt_unknown_from": {"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "sharegpt_null_value": {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "b"}]},
    "sharegpt_text": {"conversations": "a"},
    "sharegpt_list_from": {"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]},
    "preference_without_rejected": {"prompt": "a", "chosen": "b"},
    "preference_equal": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "preference_numbers": {"prompt": "a", "chosen": 1, "rejected": 2},
    "preference_lists": {"prompt": "a", "chosen": [], "rejected": [None]},
    "preference_mixed": {"prompt": "a", "chosen": "b", "rejected": [turn("assistant", "c")]},
    "unpaired_text_label": {"prompt": "a", "completion": "b", "label": "maybe"},
    "unpaired_null_label": {"prompt": "a", "completion": "b", "label": None},
    "label_object": {"text": "a", "label": {"x": 1}},
    "text_null": {"text": None},
    "text_number": {"text": 5},
    "text_list": {"text": ["a"]},
    "text_empty": {"text": ""},
    "question_null": {"question": None, "answer": "b"},
    "two_formats": {**said("odd"), "instruction": "a", "output": "b", "text": "c"},
}


def jsonl() -> Iterator[tuple[str, Hostile]]:
    for name, line in LINES.items():
        yield f"line_{name}.jsonl", between(line)
    for name, row in SHAPES.items():
        yield f"shape_{name}.jsonl", between(compact(row))
    rows = [compact(chat(number)) for number in (1, 2, 3)]
    yield "file_many_bad_lines.jsonl", between(*LINES.values())
    yield "file_windows_line_ends.jsonl", between(b"{", end=b"\r\n")
    yield "file_mixed_line_ends.jsonl", Hostile(rows[0] + b"\r\n" + rows[1] + b"\n\r\n" + rows[2], 3, (1, 2, 3))
    yield "file_old_line_ends.jsonl", Hostile(b"\r".join(rows), 0, refused="CR alone")
    yield "file_no_last_line_end.jsonl", Hostile(b"\n".join(rows), 3, (1, 2, 3))
    yield "file_cut_in_last_row.jsonl", Hostile(b"\n".join(rows)[:-9], 3, (1, 2))
    yield "file_blank_lines.jsonl", Hostile(b"\n \n\t\r\n".join(rows) + b"\n\n\n", 3, (1, 2, 3))
    yield "file_many_blank_lines_first.jsonl", Hostile(b"\n" * 6000 + rows[0], 1, (1,))
    yield "file_byte_order_mark.jsonl", Hostile(b"\xef\xbb\xbf" + b"\n".join(rows), 3, (1, 2, 3))
    yield "file_two_byte_order_marks.jsonl", Hostile(b"\xef\xbb\xbf" * 2 + b"\n".join(rows), 3, (2, 3))
    yield "file_only_byte_order_mark.jsonl", Hostile(b"\xef\xbb\xbf", 0, refused="is empty")
    yield "file_empty.jsonl", Hostile(b"", 0, refused="is empty")
    yield "file_blank.jsonl", Hostile(b" \r\n\t\n", 0, refused="is empty")
    yield "file_of_nul.jsonl", Hostile(b"\x00" * 500, 1)
    yield "file_random.jsonl", Hostile(bytes(number * 89 % 256 for number in range(999) if number * 89 % 256 != 10), 1)
    yield "file_pretty_object.jsonl", Hostile(json.dumps(chat(1), indent=1).encode(), 0, refused="several lines")
    yield "file_pretty_list.jsonl", Hostile(json.dumps([chat(1)], indent=1).encode(), 0, refused="several lines")
    text = b"\n".join(rows).decode()
    for encoding in ("utf-16", "utf-32"):
        yield f"file_{encoding}.jsonl", Hostile(text.encode(encoding), 0, refused="UTF-")
    yield "file_utf-16-be_mark.jsonl", Hostile(b"\xfe\xff" + text.encode("utf-16-be"), 0, refused="UTF-16")
    yield "file_utf-16-le_no_mark.jsonl", Hostile(text.encode("utf-16-le"), 3)
    yield "file_utf-7.jsonl", Hostile(text.encode("utf-7"), 3, (1, 2, 3))
    yield "file_capitals.JSONL", Hostile(b"\n".join(rows), 3, (1, 2, 3))
    yield "file_of_json_lines.json", Hostile(b"\n".join(rows), 3, (1, 2, 3))


def json_lists() -> Iterator[tuple[str, Hostile]]:
    rows = [chat(1), chat(2)]
    whole = json.dumps(rows).encode()
    for name, content in {
        "cut_in_text": whole[:50],
        "cut_in_item": whole[:-3],
        "cut_before_end": whole[:-1],
        "cut_after_comma": whole[:-1] + b",",
        "only_bracket": b"[",
        "only_quote": b'["',
        "unbalanced_quote": b'[{"a": "b}, {"c": "d"}, "]',
        "open_in_escape": b'[{"a": "\\',
    }.items():
        yield f"list_{name}.json", Hostile(content, 0, refused="cut short")
    for name, content in {
        "second_list": whole + whole,
        "text_after": whole + b" the end",
        "comma_after": whole + b",",
    }.items():
        yield f"list_{name}.json", Hostile(content, 0, refused="after the end of the list")
    for name, content in {
        "single_quotes": b"[{'a': 1}]",
        "bare_word": b"[good]",
        "missing_colon": b'[{"a" 1}]',
        "mismatched": b'[{"a": [1}]]',
        "comment": b'[{"a": 1} /* c */]',
        "raw_line_end_in_text": b'[{"a": "b\nc"}]',
        "nul": b"[\x00]",
    }.items():
        yield f"list_{name}.json", Hostile(content, 0, refused="no JSON")
    for name, content in {"text": b'"text"', "number": b"42", "null": b"null", "prose": b"Dear all,"}.items():
        yield f"list_none_but_{name}.json", Hostile(content, 0, refused="expected a JSON list")
    yield "list_pretty_object.json", Hostile(json.dumps(rows[0], indent=1).encode(), 0, refused="several lines")
    yield "list_empty_file.json", Hostile(b"", 0, refused="is empty")
    yield "list_empty.json", Hostile(b"[]", 0)
    yield "list_of_blanks.json", Hostile(b"[ \n ]", 0)
    yield "list_trailing_comma.json", Hostile(whole[:-1] + b",]\n", 2, (1, 2))
    yield "list_byte_order_mark.json", Hostile(b"\xef\xbb\xbf" + whole, 2, (1, 2))
    yield (
        "list_blanks_everywhere.json",
        Hostile(json.dumps(rows, indent="\t").encode().replace(b":", b" : "), 2, (1, 2)),
    )
    yield "list_old_line_ends.json", Hostile(json.dumps(rows, indent=1).encode().replace(b"\n", b"\r"), 2, (1, 2))
    yield "list_without_commas.json", Hostile(b"[" + b"\n".join(map(compact, rows)) + b"]", 2, (1, 2))
    odd = [
        b"null",
        b"1",
        b'"a"',
        b"[]",
        b"{}",
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
    ]
    odd += [b"[" * 150 + b"]" * 150, b'{"a": ' + b"1" * 5000 + b"}", b'{"brackets": "]}[{\\"]"}']
    for number, item in enumerate(odd):
        content = b"[" + compact(rows[0]) + b",\n" + item + b" ,\n" + compact(rows[1]) + b"]"
        yield f"list_odd_item_{number:02}.json", Hostile(content, 3, (1, 2))


def csvs() -> Iterator[tuple[str, Hostile]]:
    head, one, two = b"prompt,completion\n", b"good row 1,answer 1\n", b"good row 2,answer 2\n"
    for name, line in {
        "too_few": b"a\n",
        "too_many": b"a,b,c\n",
        "text_after_quote": b'"a"b,c\n',
        "blank_before_quote": b' "a"b,c\n',
        "quote_inside": b'a "b" c,d\n',
        "empty_fields": b",\n",
        "quoted_empty": b'"",""\n',
        "blanks": b"  ,  \n",
        "doubled_quotes": b'"a ""b"" c",d\n',
        "line_end_in_quotes": b'"a\nb\r\nc",d\n',
        "comma_in_quotes": b'"a,b",c\n',
        "formula": b"=1+1,@SUM(A1)\n",
        "latin_1": "größer,b\n".encode("latin-1"),
        "nul": b"a\x00b,c\n",
        "control": b"a\x01b,c\n",
        "semicolons": b"a;b\n",
        "tabs": b"a\tb\n",
        "long_field": b"x" * 5000 + b",y\n",
        "many_fields": b",".join([b"x"] * 2000) + b"\n",
        "emoji": "😀,🏳️‍🌈\n".encode(),
        "old_line_end": b"a,b\r",
        "windows_line_end": b"a,b\r\n",
        "bytes_of_surrogate": b"\xed\xa0\x80,b\n",
        "not_a_number": b"NaN,null\n",
        "backslash_quote": b'"a \\",b\n" c",d\n',
    }.items():
        yield f"csv_{name}.csv", Hostile(head + one + line + two, 3 + (name == "backslash_quote"), (1, 2))
    for name, content, reason in (
        ("empty", b"", "is empty"),
        ("repeated_column", b"prompt,prompt\na,b\n", "stands twice"),
        ("repeated_empty_column", b",\na,b\n", "stands twice"),
        ("open_quote", head + one + b'"a,b\n' + two, "never closed"),
        ("open_quote_at_end", head + one + two + b'"', "never closed"),
        ("open_quote_in_header", b'"prompt,completion\n' + one, "never closed"),
        ("bad_header", b'"prompt"x,completion\n' + one, "no readable header"),
        ("utf-16", (head + one).decode().encode("utf-16"), "UTF-16"),
    ):
        yield f"csv_file_{name}.csv", Hostile(content, 0, refused=reason)
    yield "csv_file_header_only.csv", Hostile(head, 0)
    yield "csv_file_byte_order_mark.csv", Hostile(b"\xef\xbb\xbf" + head + one + two, 2, (1, 2))
    yield "csv_file_blank_lines.csv", Hostile(b"\n\n" + head + b"\n" + one + b"\r\n\n" + two + b"\n", 2, (1, 2))
    yield "csv_file_no_last_line_end.csv", Hostile((head + one + two)[:-1], 2, (1, 2))
    yield "csv_file_old_line_ends.csv", Hostile((head + one + two).replace(b"\n", b"\r"), 2, (1, 2))
    yield "csv_file_quoted.csv", Hostile(b'"prompt","completion"\r\n"good row 1","answer"\r\n', 1, (1,))
    yield "csv_file_other_columns.csv", Hostile(b"a,b\n1,2\n", 1)
    yield "csv_file_semicolons.csv", Hostile((head + one).replace(b",", b";"), 1)
    yield "csv_file_json_in_it.csv", Hostile(compact(chat(1)) + b"\n", 0)
    yield "tsv_quotes.tsv", Hostile(b'prompt\tcompletion\ngood row 1\t"a\tb"\n"x"y\tz\n', 2, (1,))
    yield "tsv_commas.tsv", Hostile((head + one).replace(b",", b"\t") + b"a,b\n", 2, (1,))


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def good_table(**columns: Any) -> pa.Table:
    """Two good rows, with columns of two values besides."""
    return pa.table({"prompt": ["good row 1", "good row 2"], "completion": ["answer 1", "answer 2"], **columns})


ODD_COLUMNS: dict[str, Any] = {
    "nested": pa.array([[{"a": [1, None]}], None]),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "timestamp_ns": pa.array([1, 2**62], type=pa.timestamp("ns")),
    "timestamp_zone": pa.array([0, 1], type=pa.timestamp("us", tz="Europe/Berlin")),
    "date": pa.array([date(1, 1, 1), date(9999, 12, 31)]),
    "time": pa.array([0, 86_399_999_999], type=pa.time64("us")),
    "duration": pa.array([timedelta(1), None]),
    "decimal": pa.array([Decimal("1.10"), None]),
    "binary": pa.array([b"\xff\x00", b""]),
    "fixed_binary": pa.array([b"\xff\x00", b"ab"], type=pa.binary(2)),
    "nulls": pa.array([None, None]),
    "floats": pa.array([float("nan"), float("-inf")]),
    "half_floats": pa.array([1.5, None], type=pa.float16()),
    "booleans": pa.array([True, None]),
    "unsigned": pa.array([2**64 - 1, 0], type=pa.uint64()),
    "map": pa.array([[("a", 1)], []], type=pa.map_(pa.string(), pa.int64())),
    "large_text": pa.array(["a", None], type=pa.large_string()),
    "text_view": pa.array(["a", None], type=pa.string_view()),
    "empty_lists": pa.array([[], []], type=pa.list_(pa.string())),
    "fixed_list": pa.array([[1, 2], [3, 4]], type=pa.list_(pa.int8(), 2)),
    "deep": pa.array([[[[[[1]]]]], None]),
}


def tables() -> Iterator[tuple[str, Hostile]]:
    for name, column in ODD_COLUMNS.items():
        yield f"parquet_{name}.parquet", Hostile(parquet(good_table(extra=column)), 2, (1, 2))
        yield f"parquet_text_is_{name}.parquet", Hostile(parquet(pa.table({"text": column})), 2)
    not_utf8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"]).buffers())
    late = pa.array([2**62, 0], type=pa.timestamp("us"))
    bad_first = {"prompt": ["a", "good row 2"], "completion": ["b", "answer 2"]}
    yield "parquet_not_utf8.parquet", Hostile(parquet(pa.table({**bad_first, "x": not_utf8})), 2, (2,))
    yield "parquet_date_beyond_9999.parquet", Hostile(parquet(pa.table({**bad_first, "x": late})), 2, (2,))
    chats = pa.table({"messages": [chat(1)["messages"], None, [], [None], chat(2)["messages"]]})
    yield "parquet_messages_null.parquet", Hostile(parquet(chats), 5, (1, 2))
    for codec in ("none", "gzip", "zstd", "brotli", "lz4"):
        yield f"parquet_codec_{codec}.parquet", Hostile(parquet(good_table(), compression=codec), 2, (1, 2))
    yield "parquet_no_rows.parquet", Hostile(parquet(good_table().slice(0, 0)), 0)
    yield "parquet_no_columns.parquet", Hostile(parquet(pa.table({})), 0)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"])
    yield "parquet_repeated_column.parquet", Hostile(parquet(twice), 0, refused="stands twice")
    whole = parquet(good_table())
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "cut_footer": whole[:-8],
        "only_marks": b"PAR1PAR1",
        "length_too_large": whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        "footer_garbage": whole[:-60] + b"\xaa" * 52 + whole[-8:],
        "middle_garbage": whole[:20] + b"\xaa" * 40 + whole[60:],
    }.items():
        yield f"parquet_{name}.parquet", Hostile(content, 0, refused="no readable Parquet")

    def arrow(table: pa.Table, *, is_file: bool) -> bytes:
        sink = io.BytesIO()
        with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue()

    for name in ("nested", "dictionary", "timestamp_ns", "map", "text_view", "nulls", "binary"):
        table = good_table(extra=ODD_COLUMNS[name])
        yield f"arrow_stream_{name}.arrow", Hostile(arrow(table, is_file=False), 2, (1, 2))
        yield f"arrow_file_{name}.feather", Hostile(arrow(table, is_file=True), 2, (1, 2))
    stream, file = arrow(good_table(), is_file=False), arrow(good_table(), is_file=True)
    yield "arrow_stream_cut.arrow", Hostile(stream[: len(stream) // 2], 0, refused="cut short")
    yield "arrow_stream_no_end.arrow", Hostile(stream[:-8], 0, refused="cut short")
    yield (
        "arrow_stream_marks_only.arrow",
        Hostile(b"\xff\xff\xff\xff" * 3 + b"\x00" * 4, 0, refused="no readable Arrow"),
    )
    yield "arrow_file_cut.arrow", Hostile(file[: len(file) // 2], 0, refused="no readable Arrow")
    yield "arrow_file_mark_only.feather", Hostile(b"ARROW1", 0, refused="no readable Arrow")
    yield (
        "arrow_not_utf8.arrow",
        Hostile(arrow(pa.table({"text": not_utf8}), is_file=False), 0, refused="no readable Arrow"),
    )
    yield "arrow_feather_1.feather", Hostile(b"FEA1" + b"\x00" * 40, 0, refused="feather version 1")


def packed() -> Iterator[tuple[str, Hostile]]:
    content = b"\n".join(compact(chat(number)) for number in range(1, 41))
    good = tuple(range(1, 41))
    pack: dict[str, Any] = {
        "gz": lambda content: gzip.compress(content, mtime=0),
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }
    for suffix, function in pack.items():
        whole = function(content)
        broken = whole[: len(whole) // 2] + bytes(byte ^ 255 for byte in whole[len(whole) // 2 :][:9])
        broken += whole[len(broken) :]
        yield f"packed_whole.jsonl.{suffix}", Hostile(whole, 40, good)
        yield f"packed_two_parts.jsonl.{suffix}", Hostile(whole + function(b"\n" + compact(chat(41))), 41, (*good, 41))
        yield f"packed_cut.jsonl.{suffix}", Hostile(whole[: len(whole) // 2], 0, refused="cut short")
        yield f"packed_cut_at_end.jsonl.{suffix}", Hostile(whole[:-1], 0, refused="cut short")
        yield f"packed_broken.jsonl.{suffix}", Hostile(broken, 0, refused="broken")
        yield f"packed_mark_only.jsonl.{suffix}", Hostile(whole[:6], 0, refused="cut short|no data")
        yield f"packed_not_at_all.jsonl.{suffix}", Hostile(content, 0, refused="found no data")
        yield f"packed_unsaid.{suffix}.jsonl", Hostile(whole, 0, refused="data in it, expected jsonl")
        yield f"packed_empty.jsonl.{suffix}", Hostile(function(b""), 0, refused="is empty")
    yield "packed_otherwise.jsonl.gz", Hostile(bz2.compress(content), 0, refused="found bzip2 data")
    yield "packed_twice.jsonl.gz", Hostile(gzip.compress(pack["gz"](content), mtime=0), 0, refused="found gzip data")
    cut = pack["gz"](parquet(good_table()))
    yield "packed_table_cut.parquet.gz", Hostile(cut[:-20], 0, refused="cut short")
    yield "packed_table.parquet.zst", Hostile(zstandard.compress(parquet(good_table())), 2, (1, 2))


def others() -> Iterator[tuple[str, Hostile]]:
    for name, content in {
        "zip.jsonl": b"PK\x03\x04rest",
        "pdf.txt": b"%PDF-1.7 rest",
        "office.csv": b"\xd0\xcf\x11\xe0rest",
        "sqlite.json": b"SQLite format 3\x00rest",
        "parquet.csv": parquet(good_table()),
        "csv.parquet": b"prompt,completion\na,b\n",
        "json.arrow": b"[1]",
    }.items():
        yield f"other_{name}", Hostile(content, 0, refused="data in it, expected")
    for name in ("table.xlsx", "model.pkl", "page.html", "no_suffix", "notes.md"):
        yield f"other_{name}", Hostile(b"anything", 0, refused="file, expected")
    yield "text_plain.txt", Hostile(b"good row 1\nand more", 1)
    yield "text_latin_1.txt", Hostile("größer".encode("latin-1"), 1)
    yield "text_nul.txt", Hostile(b"a\x00b", 1)
    yield "text_blank.txt", Hostile(b" \n\t", 0, refused="is empty")
    yield "text_utf-16.txt", Hostile("hello".encode("utf-16"), 0, refused="UTF-16")
    yield "text_byte_order_mark.txt", Hostile(b"\xef\xbb\xbfhello", 1)
    yield "text_json.txt", Hostile(compact(chat(9)), 1)


def corpus() -> dict[str, Hostile]:
    """All files by name."""
    parts = (jsonl, json_lists, csvs, tables, packed, others)
    return {name: hostile for part in parts for name, hostile in part()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    made = corpus()
    for name, hostile in made.items():
        (FOLDER / name).write_bytes(hostile.content)
    lines = [
        f'"{name}": {json.dumps({"rows": hostile.rows, "good": hostile.good, "refused": hostile.refused})}'
        for name, hostile in sorted(made.items())
    ]
    FOLDER.with_name("expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(made)} files, {sum(len(hostile.content) for hostile in made.values())} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
