"""Prepare: every row in is a record out or a rejection with its reason; the counts add up."""

import contextlib
import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stages import prepare
from stages.lib import engine, files, formats, preparing, records
from stages.lib.errors import ConfigError, DataError
from stages.lib.schema.data import Source
from stages.lib.schema.runtime import Engine, Runtime
from stages.lib.sources import reading
from tests.conftest import ROOT
from tests.corpus import make
from tests.data_settings import settings
from tests.hub_stub import COMMIT, serving
from tests.unit.test_formats import FORMS

PAIR = {"prompt": "2+2?", "completion": "4"}


def run(**changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    prepare.main(prepare.Params(data=settings(**{"path": "my.jsonl", "max_rejected_fraction": 0.99} | changes)))
    rejected = [json.loads(line) for line in Path("data/prepared/rejected.jsonl").read_text().splitlines()]
    return files.read_rows(Path("data/prepared")), rejected, files.read_json(Path("metrics/prepare.json"))


def write(*rows: object) -> None:
    Path("my.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")


def test_every_row_is_a_record_or_a_rejection_and_the_counts_add_up(in_tmp: Path) -> None:
    write(PAIR, "{", {"prompt": "?", "completion": ""}, {"prompt": "3+3?", "completion": "6", "task": "sums"})
    rows, rejected, metrics = run()
    assert [(row["where"], row["code"]) for row in rejected] == [
        ("my.jsonl:2", "bad_json"),
        ("my.jsonl:3", "empty_answer"),
    ]
    assert set(rejected[0]) == {"where", "code", "reason", "row"}
    assert metrics["rows/in"] == metrics["rows/out"] + metrics["rows/rejected"] == 4
    assert metrics["rows/rejected"] == sum(n for key, n in metrics.items() if key.startswith("rejected/"))
    assert metrics["rows/out"] == sum(n for key, n in metrics.items() if key.startswith("rows/out/")) == len(rows)
    assert [row["task"] for row in rows] == ["chat", "sums"]


@pytest.mark.parametrize("policy", ["redact", "reject"])
def test_a_rejected_row_is_kept_without_what_the_policy_keeps_out(in_tmp: Path, policy: str) -> None:
    write(PAIR, {"prompt": "Mail ann@example.org", "completion": ""}, '{"prompt": "Mail ann@example.org"')
    run(clean={"pii": {"email": policy}})
    kept = Path("data/prepared/rejected.jsonl").read_text()
    assert len(kept.splitlines()) == 2
    assert "ann@" not in kept
    assert kept.count("Mail <email>") == 2


def test_shards_hold_the_rows_in_order(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROWS_PER_SHARD", 2)
    monkeypatch.setattr(records, "ROWS_PER_GROUP", 1)
    write(*({"prompt": f"{number}?", "completion": "yes"} for number in range(5)))
    rows, _, _ = run()
    assert [row["messages"][0]["content"] for row in rows] == ["0?", "1?", "2?", "3?", "4?"]
    assert len(list(Path("data/prepared").glob("*.parquet"))) == 3


def shards() -> dict[str, str]:
    """The sha256 of every file of data/prepared."""
    return {path.name: files.sha256(path) for path in Path("data/prepared").iterdir()}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_rows_give_the_same_bytes_however_they_are_cut_and_spread(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    rows: list[Any] = [{**PAIR, "completion": f"{number}", "task": "sums"} for number in range(200)]
    rows[50], rows[90] = "{", {"prompt": "?", "completion": ""}
    write(*rows)
    run()
    before = shards()
    write(*(dict(reversed(row.items())) if isinstance(row, dict) else row for row in rows))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(engine, "_runtime", Runtime(None, workers, Engine.local, None, "info", None, 2))
    run()
    assert {name: sha for name, sha in shards().items() if name != "rejected.jsonl"} == {
        name: sha for name, sha in before.items() if name != "rejected.jsonl"
    }
    rejected = [json.loads(line) for line in Path("data/prepared/rejected.jsonl").read_text().splitlines()]
    assert [row["where"] for row in rejected] == ["my.jsonl:51", "my.jsonl:91"]


def test_a_file_with_nothing_usable_is_an_error_with_the_first_reasons_and_keeps_what_was_there(in_tmp: Path) -> None:
    write(PAIR)
    run()
    write({"prompt": "?"}, "{")
    with pytest.raises(
        DataError, match=r"none of 2 rows can be used[\s\S]*my\.jsonl:1: unknown_format[\s\S]*data\.columns"
    ):
        run()
    assert len(files.read_rows(Path("data/prepared"))) == 1
    assert not Path("data/prepared.partial").exists()


def test_more_rejected_rows_than_allowed_end_the_stage_with_the_counts_and_the_rows_are_kept(in_tmp: Path) -> None:
    write(
        *[PAIR] * 7,
        "{",
        {"prompt": "?", "completion": [{"text": "ann@example.com"}]},
        {"prompt": "?", "completion": ""},
    )
    message = (
        r"my\.jsonl: 3 of 10 rows cannot be used \(1 bad_json, 1 empty_answer, 1 no_turn\), "
        r"data\.max_rejected_fraction is 0\.2\.\n  my\.jsonl:8: bad_json[\s\S]*"
        r"raise data\.max_rejected_fraction to 0\.3[\s\S]*runs/rejected\.jsonl"
    )
    with pytest.raises(DataError, match=message) as fault:
        run(max_rejected_fraction=0.2)
    assert "ann@example.com" not in str(fault.value)
    assert len(Path("runs/rejected.jsonl").read_text().splitlines()) == 3
    assert not Path("data/prepared").exists()
    run(max_rejected_fraction=0.3)


def test_several_sources_are_counted_and_judged_apart_and_records_bear_their_names(in_tmp: Path) -> None:
    write(PAIR, {**PAIR, "completion": "four"})
    Path("other.csv").write_text("text,category\nI add,sum\n,\n")
    sources: dict[str, Any] = {
        "chats": {"path": "my.jsonl"},
        "classes": {"path": "other.csv", "columns": {"label": "category"}, "official": "test"},
    }
    rows, rejected, metrics = run(path=".", sources=sources, max_rejected_fraction=0.5)
    assert [(row["source"], row["split"], row["task"]) for row in rows] == [
        ("chats", None, "chat"),
        ("chats", None, "chat"),
        ("classes", "test", "classification"),
    ]
    assert [row["where"] for row in rejected] == ["classes/other.csv:3"]
    assert (metrics["source/classes/in"], metrics["source/classes/out"], metrics["source/chats/in"]) == (2, 1, 2)
    with pytest.raises(DataError, match=r"data\.sources\.classes \(other\.csv\): 1 of 2 rows"):
        run(path=".", sources=sources, max_rejected_fraction=0.1)


def test_generated_rows_keep_their_mark(in_tmp: Path) -> None:
    write({**PAIR, "source": "synthetic"}, {**PAIR, "source": "web"})
    rows, _, _ = run()
    assert [row["source"] for row in rows] == ["synthetic", "my.jsonl"]


FOREIGN = [
    None,
    4,
    "4",
    [],
    {},
    [4],
    ["4"],
    [{}],
    {"role": "user"},
    [{"role": "user", "content": "4"}],
    "\udc00",
    "\x00",
    True,
]


def test_rows_in_are_rows_out_and_rejected_by_reason_whatever_a_field_holds(in_tmp: Path) -> None:
    good = [row for _, row, _ in FORMS]
    hostile = [{**row, key: value} for row in good for key in row for value in FOREIGN]
    hostile += [{key: row[key] for key in row if key != left} for row in good for left in row]
    write(*good, *hostile, "[]", "4", "null", "{", "", '{"prompt": NaN}')
    rows, rejected, metrics = run()
    assert metrics["rows/in"] == len(good) + len(hostile) + 5 == len(rows) + len(rejected)
    assert metrics["rows/rejected"] == sum(n for key, n in metrics.items() if key.startswith("rejected/"))
    assert metrics["rows/out"] == sum(n for key, n in metrics.items() if key.startswith("rows/out/"))
    assert metrics["rows/out"] == sum(n for key, n in metrics.items() if key.startswith("format/"))
    assert {f"my.jsonl:{number}" for number in range(1, len(good) + 1)}.isdisjoint(row["where"] for row in rejected)


def test_no_hostile_file_ends_in_anything_but_records_rejections_and_one_message() -> None:
    data = settings()
    work = functools.partial(preparing.prepared, data={"": data}, templates=formats.templates(data))
    for path in sorted(make.FOLDER.iterdir()):
        with contextlib.suppress(DataError):  # what is refused, and how, is told by the tests of reading
            for block in reading.file_blocks(path, path.name):
                outcome = work(block)
                total = outcome.table.num_rows + len(outcome.rejected)
                assert total == outcome.counts["rows/in"] == len(list(reading.parsed(block))), path.name


LLAMAFACTORY = ROOT.parent / "shared/data/llamafactory_demo"


@pytest.mark.parametrize(
    ("name", "kind", "count", "reasons"),
    [
        ("alpaca_en_demo", "chat", 999, {}),
        ("glaive_toolcall_en_demo", "chat", 300, {}),
        ("dpo_en_demo", "preference", 300, {"rejected/too_long": 2}),
        ("kto_en_demo", "unpaired", 300, {}),
    ],
)
@pytest.mark.skipif(not LLAMAFACTORY.exists(), reason="needs the shared data beside the repository")
def test_files_that_people_share_go_through_with_every_rejection_explained(
    in_tmp: Path, name: str, kind: str, count: int, reasons: dict[str, int]
) -> None:
    rows, _, metrics = run(path=str(LLAMAFACTORY / f"{name}.json"), max_chars=16000, max_rejected_fraction=0.1)
    assert {row["kind"] for row in rows} == {kind}
    assert metrics["rows/in"] == count == len(rows) + sum(reasons.values())
    assert {key: n for key, n in metrics.items() if key.startswith("rejected/")} == reasons


def test_a_table_with_a_header_only_is_an_error(in_tmp: Path) -> None:
    Path("my.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match=r"my\.csv: holds no row, expected at least one\. Change data\.path"):
        run(path="my.csv")


@pytest.mark.parametrize(("source", "key"), [(Source.hub, "id"), (Source.url, "url"), (Source.python_docs, "packages")])
@pytest.mark.parametrize(("name", "section"), [("", "data"), ("mine", "data.sources.mine")])
def test_a_source_without_rows_is_mended_by_its_own_key(source: Source, key: str, name: str, section: str) -> None:
    data = settings()
    data.source = source
    assert prepare.too_few(name, data, prepare.Tally()).endswith(f"Change {section}.{key}.")
    of_none = prepare.Tally(Counter({"rows/in": 1, "rows/rejected": 1, "rejected/bad_json": 1}))
    assert prepare.too_few(name, data, of_none).endswith(f"or {section}.{key}.")


def test_a_data_set_of_the_hub_is_read_by_commit(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(in_tmp / "cache"))
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.files["datasets/maker/data"] = {"data/train.jsonl": json.dumps(PAIR).encode(), "data/test.jsonl": b"{"}
        rows, rejected, _ = run(source=Source.hub, id="maker/data", revision=COMMIT, split="train")
    assert [row["source"] for row in rows] == ["data/train.jsonl"]
    assert rejected == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": Source.hub, "id": "maker/data"}, r"data\.revision: found None.*make pin"),
        ({"source": Source.hub, "revision": COMMIT}, r"data\.id"),
        ({"columns": {"promt": "a"}}, r"data\.columns: found \['promt'\]"),
        ({"source": Source.python_docs}, r"data\.packages"),
        ({"max_chars": 0}, r"data\.max_chars"),
        ({"sources": {"a/b": {}}}, r"data\.sources: found \['a/b'\]"),
        ({"sources": {"a": "b.jsonl"}}, r"data\.sources: found \['a'\]"),
        ({"sources": {"a": {"clean": {}}}}, r"data\.sources: found \['clean'\]"),
        ({"sources": {"a": {"format": "chatty"}}}, r"data\.sources\.a: .*chatty"),
        ({"sources": {"a": {"max_chars": "many"}}}, r"data\.sources\.a: .*many"),
        ({"sources": {"a": {"official": "training"}}}, r"data\.official: found 'training'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_reading(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_the_documentation_of_an_installed_package_gives_rows_of_both_tasks(in_tmp: Path) -> None:
    rows, rejected, metrics = run(source=Source.python_docs, packages=["threadpoolctl", "joblib"])
    assert {row["task"] for row in rows} == {"parameters", "summary"}
    assert all(
        isinstance(json.loads(row["messages"][1]["content"]), dict) for row in rows if row["task"] == "parameters"
    )
    assert metrics["rows/in"] == len(rows) + len(rejected)


def test_run_as_a_stage_a_bad_file_ends_with_one_message_and_no_traceback(repo: Path) -> None:
    (repo / "my.jsonl").write_text("{}\n")
    command = [sys.executable, "-m", "stages.prepare", "data.source=local", "data.path=my.jsonl"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "prepare: my.jsonl: none of 1 rows can be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (repo / "data/prepared").exists()
