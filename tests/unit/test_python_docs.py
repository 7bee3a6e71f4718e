"""Rows out of documentation: the answer can be read off the prompt, or there is no row."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.lib.errors import DataError
from stages.lib.rows import Unfit, Unparsed
from stages.lib.sources import python_docs

MODULE = '''
"""A module."""
import enum


class Table(enum.Enum):
    def total(self, axis, *, keep=False):
        """
        Add up the values along an axis.

        Parameters
        ----------
        axis : int, optional
            Which one.
        keep : bool, default False
            Keep the axis.

        Returns
        -------
        float
            The total.
        """
        # along the axis
        return add(self, axis)


@cached
def twice(x): 
    """Return twice the value of x."""
    return 2 * x


def bare(x):
    """Does nothing at all with x."""
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `toy`, which nobody could import."""
    (tmp_path / "toy" / "tests").mkdir(parents=True)
    (tmp_path / "toy" / "__init__.py").write_text("raise ImportError('never imported')\n" + MODULE)
    (tmp_path / "toy" / "tests" / "test_it.py").write_text(MODULE)
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "RECORD").write_text("toy/tests/test_it.py,,\ntoy/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def rows_of(max_chars: int = 1000) -> tuple[list[dict[str, Any]], list[tuple[str, Unparsed]]]:
    found = list(python_docs.rows(["toy"], max_chars))
    rows = [row for _, row in found if not isinstance(row, Unparsed)]
    return rows, [(where, row) for where, row in found if isinstance(row, Unparsed)]


def test_a_package_is_read_without_being_imported_and_its_tests_are_left_out(toy: Path) -> None:
    rows, rejected = rows_of()
    assert [row["meta"]["function"] for row in rows] == ["toy.Table.total", "toy.Table.total", "toy.twice"]
    assert [row["task"] for row in rows] == ["parameters", "summary", "summary"]
    assert [row["group"] for row in rows] == ["toy.Table", "toy.Table", "toy"]
    assert [row["source"] for row in rows] == ["toy"] * 3
    assert [(where, row.code, row.row) for where, row in rejected] == [
        ("toy/__init__.py:34", "summary/no_body", "toy.bare")
    ]


def test_the_parameters_answer_is_names_and_types_of_the_section(toy: Path) -> None:
    (prompt, answer) = (turn["content"] for turn in rows_of()[0][0]["messages"])
    assert json.loads(answer) == {"axis": "int", "keep": "bool"}
    assert prompt.endswith("axis : int, optional\n    Which one.\nkeep : bool, default False\n    Keep the axis.")


def test_the_summary_prompt_is_signature_and_body_without_docstring_and_decorators(toy: Path) -> None:
    rows, _ = rows_of()
    assert rows[1]["messages"][0]["content"].endswith(
        "\n\ndef total(self, axis, *, keep=False):\n    # along the axis\n    return add(self, axis)"
    )
    assert rows[1]["messages"][1]["content"] == "Add up the values along an axis."
    assert rows[2]["messages"][0]["content"].split("\n\n")[1].splitlines()[1:] == ["    return 2 * x"]


def test_a_row_longer_than_configured_is_rejected_with_its_length(toy: Path) -> None:
    _, rejected = rows_of(max_chars=100)
    assert {row.code for _, row in rejected} >= {"parameters/too_long"}
    assert any("data.max_chars is 100" in row.reason for _, row in rejected)


def test_a_source_that_is_no_python_is_rejected_and_the_rest_is_read(toy: Path) -> None:
    (toy / "toy" / "tests" / "test_it.py").rename(toy / "toy" / "broken.py")
    (toy / "toy" / "broken.py").write_bytes(b"x = '\xa4'")
    (toy / "toy-1.0.dist-info" / "RECORD").write_text("toy/broken.py,,\ntoy/__init__.py,,\n")
    rows, rejected = rows_of()
    assert ("toy/broken.py:1", "unreadable_file") in [(where, row.code) for where, row in rejected]
    assert len(rows) == 3


def test_a_package_that_is_not_installed_is_an_error_that_names_the_key() -> None:
    with pytest.raises(DataError, match=r"data\.packages: 'nowhere' is not installed"):
        list(python_docs.rows(["nowhere"], 1000))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("int", "int"),
        ("int, optional", "int"),
        ("int, default 0", "int"),
        ("int, default=0", "int"),
        ("bool, optional (default: True)", "bool"),
        ("{'a', 'b'}, default 'a'", "{'a', 'b'}"),
        ("str or None, keyword-only", "str or None"),
        ("array-like of shape (n_samples, n_features)", "array-like of shape (n_samples, n_features)"),
        ("array_like, shape (n,)", "array_like, shape (n,)"),
        ("callable.", "callable"),
    ],
)
def test_a_type_is_what_stands_after_the_colon_without_its_default(text: str, found: str) -> None:
    assert python_docs.type_of(text) == found


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "no_type"),
        ("optional", "no_type"),
        ("{'a', 'b',", "broken_type"),
        ("`Generator`, optional", "garbled_type"),
        ("int or", "garbled_type"),
        ("???", "garbled_type"),
        ("a thing " * 20, "garbled_type"),
    ],
)
def test_a_type_that_is_missing_or_garbled_gives_no_row(text: str, code: str) -> None:
    with pytest.raises(Unfit) as unfit:
        python_docs.type_of(text)
    assert unfit.value.code == code


def test_names_that_share_a_type_are_all_given_it_in_order() -> None:
    assert python_docs.parameter_types("a, b : int\n    Two.\n\n**more : dict") == {
        "a": "int",
        "b": "int",
        "**more": "dict",
    }


@pytest.mark.parametrize(
    ("section", "code"),
    [("The first one is x.", "heading"), ("x : int\nx : str", "repeated"), ("x", "no_type")],
)
def test_a_section_in_another_form_gives_no_row(section: str, code: str) -> None:
    with pytest.raises(Unfit) as unfit:
        python_docs.parameter_types(section)
    assert unfit.value.code == code


@pytest.mark.parametrize(
    ("docstring", "code"),
    [
        ("", "no_sentence"),
        ("Return", "no_sentence"),
        ("Go.", "summary_length"),
        ("Return the value\nof the thing.", "long_summary"),
        ("Return the %(name)s of it.", "markup"),
    ],
)
def test_a_docstring_without_a_one_line_sentence_gives_no_summary(docstring: str, code: str) -> None:
    with pytest.raises(Unfit) as unfit:
        python_docs.summary(docstring)
    assert unfit.value.code == code


def test_markup_is_taken_out_of_a_summary() -> None:
    assert python_docs.summary("Return the ``axis`` of :class:`~pandas.Index` as `it` is.") == (
        "Return the axis of pandas.Index as it is."
    )
