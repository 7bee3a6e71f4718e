"""Stage tokenize_pack, on a throwaway tokenizer."""

from pathlib import Path

from stages import tokenize_pack
from stages.lib import chat, files, packing, records
from stages.lib.schema.pack import OnOverlong, Pack

PARAMS = tokenize_pack.Params(pack=Pack(max_tokens=128, on_overlong=OnOverlong.drop))


def write_splits(tiny_model_dir: Path) -> None:
    Path("models").mkdir()
    Path("models/base").symlink_to(tiny_model_dir)
    for split, n in (("train", 8), ("validation", 3)):
        turns = [
            [{"role": "user", "content": f"add {i} 1"}, {"role": "assistant", "content": "9 " * i + "."}]
            for i in range(n)
        ]
        rows = [records.make(messages, group=split, source="test", task="add") for messages in turns]
        files.write_rows(Path(f"data/splits/{split}.parquet"), rows, records.RECORD)


def test_it_packs_both_splits_reports_where_tokens_went_and_does_so_again(in_tmp: Path, tiny_model_dir: Path) -> None:
    write_splits(tiny_model_dir)
    tokenize_pack.main(PARAMS)
    written = sorted(path for folder in ("data/packed", "plots") for path in Path(folder).rglob("*.*"))
    digests = {path: files.sha256(path) for path in [*written, Path("metrics/tokenize_pack.json")]}
    packs = packing.read(Path("data/packed/train"))
    assert sum(len(pack.row_ids) for pack in packs) == 8
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    assert tokenizer.decode(packing.documents(packs[0])[0].answer).endswith(".<|im_end|>")
    counts = files.read_json(Path("metrics/tokenize_pack.json"))
    assert counts["train/tokens/trained"] == sum(packing.trained_tokens(pack.labels) for pack in packs)
    tokenize_pack.main(PARAMS)
    assert {path: files.sha256(path) for path in digests} == digests
