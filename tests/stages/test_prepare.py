"""Prepare: every row in is a record out or a rejection with its reason; the counts add up."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages import prepare
from stages.lib import files, records
from stages.lib.errors import ConfigError, DataError
from stages.lib.schema.data import Clean, Data, Format, Noise, Policy, Source, Unicode
from tests.conftest import ROOT
from tests.hub_stub import COMMIT, serving

PAIR = {"prompt": "2+2?", "completion": "4"}


def settings(**changes: Any) -> Data:
    """conf/shared/data.yaml with what a test needs otherwise."""
    shared = yaml.safe_load((ROOT / "conf/shared/data.yaml").read_text())
    clean, noise = shared.pop("clean"), shared.pop("noise")
    clean |= {"unicode": Unicode(clean["unicode"]), "refusals": Policy(clean["refusals"])}
    clean["pii"] = {kind: Policy(policy) for kind, policy in clean["pii"].items()}
    shared |= {"source": Source.local, "path": "my.jsonl", "format": Format.auto, "max_rejected_fraction": 0.99}
    return Data(**shared | {"clean": Clean(**clean), "noise": Noise(**noise)} | changes)


def run(**changes: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    prepare.main(prepare.Params(data=settings(**changes)))
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


def test_shards_hold_the_rows_in_order(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROWS_PER_SHARD", 2)
    monkeypatch.setattr(records, "ROWS_PER_GROUP", 1)
    write(*({"prompt": f"{number}?", "completion": "yes"} for number in range(5)))
    rows, _, _ = run()
    assert [row["messages"][0]["content"] for row in rows] == ["0?", "1?", "2?", "3?", "4?"]
    assert len(list(Path("data/prepared").glob("*.parquet"))) == 3


def test_the_same_file_gives_the_same_bytes(in_tmp: Path) -> None:
    write(PAIR, "{")
    run()
    before = {path.name: files.sha256(path) for path in Path("data/prepared").iterdir()}
    run()
    assert {path.name: files.sha256(path) for path in Path("data/prepared").iterdir()} == before


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


def test_a_table_with_a_header_only_is_an_error(in_tmp: Path) -> None:
    Path("my.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match=r"my\.csv: holds no row"):
        run(path="my.csv")


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
    (repo / "my.jsonl").write_text("{\n")
    command = [sys.executable, "-m", "stages.prepare", "data.source=local", "data.path=my.jsonl"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "prepare: my.jsonl: none of 1 rows can be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (repo / "data/prepared").exists()
