"""Rows made of the documentation of installed packages: read from their sources, never imported.

Two tasks. `parameters`: a function's Parameters section -> {name: type} as JSON. `summary`: a function's signature and
body -> the one-line summary of its docstring. Both answers are what the function's author wrote.
"""

import gc
import json
import logging
import re
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import griffe

from stages.lib.errors import DataError
from stages.lib.rows import Unfit, Unparsed

PARAMETERS_INSTRUCTION = 'Give the parameters as a JSON object {"name": "type"}, without defaults.'
SUMMARY_INSTRUCTION = "Summarize this function in one line."
MAX_PARAMETERS = 4
SKIPPED_FOLDERS = {"tests", "testing", "_testing", "externals", "vendored", "benchmarks", "conftest", "distutils"}

_SECTION = re.compile(r"^(?P<title>[A-Z][A-Za-z ]+)\n-{3,}[ ]*$", re.MULTILINE)
_HEADING = re.compile(r"^(?P<names>\*{0,2}\w+(?:, ?\*{0,2}\w+)*)(?: ?: ?(?P<type>.*))?$")
_NOT_THE_TYPE = re.compile(
    r"(?:,|;|\s)*\(?\b(?:optional|default(?:s)?|by default|keyword[- ]only|positional[- ]only|required)\b.*$",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"%\(|%s|\{[a-z_]+\}|\$\{")
_ROLE = re.compile(r":\w+(?::\w+)*:`~?\.?([^`<]+?)(?:\s*<[^`]*>)?`")


@dataclass
class Function:
    """A documented function or method, where it stands, and its source."""

    package: str
    name: str
    owner: str
    where: str
    docstring: str
    source: str
    arguments: frozenset[str]


Found = tuple[str, Any]  # (`file:line`, a row or the Unparsed that tells why there is none)


def rows(packages: Sequence[str], max_chars: int) -> Iterator[Found]:
    """All rows of the packages with their places, in the order of package, file and line.

    A row has messages, group (what the function belongs to), task, source (its package) and meta (its name).

    Args: packages: names as in the lock file. max_chars: longest prompt and answer together, characters.
    Raises: DataError, when a package is not installed.
    """
    gc.freeze()  # else every collection walks all imported libraries again: 13 s instead of 8 for the default packages
    try:
        for package in packages:
            for function in functions(package):
                if not isinstance(function, Function):
                    yield function
                    continue
                if parameters_section(function.docstring):
                    yield function.where, _checked(function, "parameters", parameters_row, max_chars)
                yield function.where, _checked(function, "summary", summary_row, max_chars)
    finally:
        gc.unfreeze()


def functions(package: str) -> Iterator[Function | Found]:
    """Documented functions and methods of an installed package, file by file and line by line.

    Files are visited one by one: loading whole packages resolves every alias between them and takes ten times as long.
    """
    logging.getLogger("griffe").setLevel(logging.CRITICAL)  # its complaints about docstrings become rejections here
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise DataError(
            f"data.packages: {package!r} is not installed, expected a package of requirements.lock. Type `make env`."
        ) from None
    sources = sorted(
        str(file)
        for file in distribution.files or []
        if file.suffix == ".py" and not SKIPPED_FOLDERS & set(file.with_suffix("").parts)
    )
    for source in sources:
        path = Path(str(distribution.locate_file(source)))
        module = ".".join(Path(source).with_suffix("").parts).removesuffix(".__init__")
        try:
            with tokenize.open(path) as file:  # in the encoding that the file itself declares
                code = file.read()
            visited = griffe.visit(module, filepath=path, code=code, docstring_parser="numpy")
        except (SyntaxError, UnicodeDecodeError) as fault:
            yield f"{source}:1", Unparsed("unreadable_file", f"no Python source ({fault})", module)
            continue
        yield from _functions_of(visited, package, source, code.splitlines())


def _functions_of(owner: Any, package: str, source: str, lines: Sequence[str]) -> Iterator[Function]:
    own = [member for member in owner.members.values() if not member.is_alias]
    for member in sorted(own, key=lambda member: member.lineno or 0):
        if member.is_class:
            yield from _functions_of(member, package, source, lines)
        elif member.is_function and member.docstring:
            yield Function(
                package=package,
                name=member.name,
                owner=owner.path,
                where=f"{source}:{member.lineno}",
                docstring=member.docstring.value,
                source=without_docstring(member, lines),
                arguments=frozenset(parameter.name.lstrip("*") for parameter in member.parameters),
            )


def without_docstring(member: griffe.Function, lines: Sequence[str]) -> str:
    """A function's signature and body, dedented, without decorators, docstring and empty lines."""
    start, end, docstring = member.lineno, member.endlineno, member.docstring
    if not (start and end and docstring and docstring.lineno and docstring.endlineno):
        return ""
    head = lines[start - 1 : docstring.lineno - 1]
    while head and not head[0].lstrip().startswith(("def ", "async def ")):
        head = head[1:]
    body = lines[docstring.endlineno : end]
    return textwrap.dedent("\n".join(line for line in [*head, *body] if line.strip()))


def _checked(function: Function, task: str, make: Any, max_chars: int) -> dict[str, Any] | Unparsed:
    try:
        prompt, answer = make(function)
        if (length := len(prompt) + len(answer)) > max_chars:
            raise Unfit("too_long", f"{length} characters, data.max_chars is {max_chars}")
    except Unfit as unfit:
        return Unparsed(f"{task}/{unfit.code}", unfit.reason, f"{function.owner}.{function.name}")
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        "group": function.owner,
        "source": function.package,
        "task": task,
        "meta": {"function": f"{function.owner}.{function.name}"},
    }


def parameters_row(function: Function) -> tuple[str, str]:
    """(prompt, answer) from the Parameters section.

        axis : int, optional      ->  {"axis": "int", "keepdims": "bool"}
            The axis to reduce.
        keepdims : bool
            ...

    The type is what stands after the colon, without "optional" and defaults: every answer can be read off its prompt.
    """
    section = parameters_section(function.docstring)
    if _PLACEHOLDER.search(section):
        raise Unfit("placeholder", "a template whose holes are filled when the package is imported")
    types = parameter_types(section)
    if len(types) > MAX_PARAMETERS:
        raise Unfit("many_parameters", f"{len(types)} parameters, at most {MAX_PARAMETERS}")
    if strangers := sorted({name.lstrip("*") for name in types} - function.arguments):
        raise Unfit("not_in_signature", f"documents {strangers[0]}, which the signature does not have")
    return f"{PARAMETERS_INSTRUCTION}\n\n{section}", json.dumps(types, ensure_ascii=False)


def parameters_section(docstring: str) -> str:
    """The text under the heading Parameters, up to the next heading; empty when there is none."""
    headings = list(_SECTION.finditer(docstring))
    ends = [heading.start() for heading in headings[1:]] + [len(docstring)]
    for heading, end in zip(headings, ends, strict=False):  # no heading at all leaves one end over
        if heading["title"] == "Parameters":
            return docstring[heading.end() : end].strip("\n").rstrip()
    return ""


def parameter_types(section: str) -> dict[str, str]:
    """{name: type} of a Parameters section, in its order; `a, b : int` gives both."""
    types: dict[str, str] = {}
    for line in section.splitlines():
        if not line or line[0].isspace():
            continue
        heading = _HEADING.match(line)
        if heading is None:
            raise Unfit("heading", f"{line!r} is no `name : type`")
        found = type_of(heading["type"] or "")
        for name in heading["names"].replace(" ", "").split(","):
            if name in types:
                raise Unfit("repeated", f"{name} is documented twice")
            types[name] = found
    return types


def type_of(text: str) -> str:
    """What stands after the colon, without "optional", defaults and the like: "int, default 0" -> "int"."""
    found = _NOT_THE_TYPE.sub("", text).strip().rstrip(",.;").strip()
    if not found:
        raise Unfit("no_type", f"no type in {text!r}")
    if any(found.count(opening) != found.count(closing) for opening, closing in ("{}", "[]", "()")):
        raise Unfit("broken_type", f"the type {text!r} goes on in the next line")
    if (
        "`" in found
        or not re.search(r"[^\W\d_]", found)
        or found.endswith((" or", " of", ":"))
        or "  " in found
        or len(found) > 80
    ):
        raise Unfit("garbled_type", f"{text!r} is markup, a sentence or unfinished")
    return found


def summary_row(function: Function) -> tuple[str, str]:
    """(prompt, answer): signature and body without the docstring -> the docstring's first line."""
    answer = summary(function.docstring)
    if not function.source or function.source.endswith(":"):
        raise Unfit("no_body", "nothing but a docstring")
    return f"{SUMMARY_INSTRUCTION}\n\n{function.source}", answer


def summary(docstring: str) -> str:
    """The first paragraph, when it is one line and says something."""
    paragraph = docstring.strip().split("\n\n")[0].splitlines() or [""]
    line = paragraph[0].strip()
    if len(paragraph) > 1:
        raise Unfit("long_summary", "the summary is longer than a line")
    if _PLACEHOLDER.search(line) or "::" in line or line.startswith(".."):
        raise Unfit("markup", f"{line!r} is a template or markup")
    line = re.sub(r"``?([^`]+)``?", r"\1", _ROLE.sub(r"\1", line))
    if not line.endswith("."):
        raise Unfit("no_sentence", f"{line!r} does not end in a full stop")
    if not 4 <= len(line.split()) <= 20:
        raise Unfit("summary_length", f"{len(line.split())} words, expected 4 to 20")
    return line
