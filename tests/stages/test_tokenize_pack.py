"""Stage tokenize_pack, on a throwaway tokenizer."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import tokenize_pack
from stages.lib import chat, engine, files, packing, records
from stages.lib.schema.pack import ControlTokens, Labels, OnOverlong, Pack
from stages.lib.schema.runtime import Engine, Runtime

PARAMS = tokenize_pack.Params(Pack(128, OnOverlong.drop, Labels.assistant_only, ControlTokens.text, 0.05))


def write_splits(tiny_model_dir: Path) -> None:
    Path("models").mkdir()
    Path("models/base").symlink_to(tiny_model_dir)
    for split, n in (("train", 8), ("validation", 3)):
        turns = [
            [{"role": "user", "content": f"add {i} 1"}, {"role": "assistant", "content": "9 " * i + "."}]
            for i in range(n)
        ]
        rows = [records.make(messages, group=split, source="test", task="add") for messages in turns]
        records.write(Path(f"data/splits/{split}.parquet"), rows)
    files.write_json(Path("metrics/prepare.json"), {"rows/in": 15, "rows/out": 13, "rejected/no_answer": 2})
    rows_of = {"rows/in": 13, "rows/train": 8, "rows/validation": 3, "rows/test": 1, "duplicates/exact": 1}
    files.write_json(Path("metrics/dedup_split.json"), rows_of)


def digests() -> dict[Path, str]:
    """Of everything the stage writes."""
    folders = ("data/packed", "plots", "metrics", "reports")
    return {path: files.sha256(path) for folder in folders for path in Path(folder).rglob("*.*")}


def use_workers(n: int) -> None:
    engine.start(Runtime(None, n, Engine.local, None, "info", None, 2))


def test_it_packs_both_splits_and_reports_where_tokens_went(in_tmp: Path, tiny_model_dir: Path) -> None:
    write_splits(tiny_model_dir)
    tokenize_pack.main(PARAMS)
    packs = packing.read(Path("data/packed/train"))
    assert sum(len(pack.row_ids) for pack in packs) == 8
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    assert tokenizer.decode(packing.documents(packs[0])[0].answer).endswith(".<|im_end|>")
    counts = files.read_json(Path("metrics/tokenize_pack.json"))
    assert counts["train/tokens/trained"] == sum(packing.trained_tokens(pack.labels) for pack in packs)
    labels = files.read_csv(Path("plots/labels.csv"))
    trained = counts["train/tokens/trained"] + counts["validation/tokens/trained"]
    assert sum(int(line["trained"]) for line in labels) == trained


def test_it_writes_a_report_that_needs_nothing_else_and_whose_totals_are_right(
    in_tmp: Path, tiny_model_dir: Path
) -> None:
    write_splits(tiny_model_dir)
    tokenize_pack.main(PARAMS)
    html = Path("reports/data/index.html").read_text(encoding="utf-8")
    assert "Of 15 rows read, 8 are for training" in html
    assert "no_answer&nbsp;2" in html
    assert "unexplained&nbsp;" not in html
    assert html.count("<article") == 8
    assert not [word for word in ("http://", "https://", "<script", "<link") if word in html]


def test_bytes_depend_on_neither_the_rows_encoded_at_once_nor_their_order(
    in_tmp: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_splits(tiny_model_dir)
    use_workers(1)
    tokenize_pack.main(PARAMS)
    before = digests()
    monkeypatch.setattr(tokenize_pack, "ROWS", 3)
    for path in Path("data/splits").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.take(pa.array(range(len(table))[::-1])), path)
    tokenize_pack.main(PARAMS)
    assert digests() == before


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_workers(
    in_tmp: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_splits(tiny_model_dir)
    monkeypatch.setattr(tokenize_pack, "ROWS", 3)
    found = []
    for n in (1, 2):
        use_workers(n)
        tokenize_pack.main(PARAMS)
        found.append(digests())
    assert found[0] == found[1]
