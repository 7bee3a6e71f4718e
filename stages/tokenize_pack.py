"""Stage tokenize_pack: render conversations with the chat template, label the answers, pack whole conversations.

Reads data/splits/{train,validation}.parquet and the tokenizer of models/base; writes data/packed, plots/lengths.csv and
metrics/tokenize_pack.json.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from stages.lib import chat, engine, files, packing, stage, tracking
from stages.lib.schema.pack import Pack

SPLITS = ("train", "validation")


@dataclass
class Params:
    pack: Pack


def main(p: Params) -> None:
    tokenizer = chat.load_tokenizer(Path("models/base"))
    metrics: dict[str, float] = {}
    lengths: dict[str, list[int]] = {}
    with files.replacing(Path("data/packed")) as folder:
        for split in SPLITS:
            rows = files.read_rows(Path(f"data/splits/{split}.parquet"))
            sorted_out = packing.encode_rows(tokenizer, rows, p.pack, split=split)
            packs = packing.pack(sorted_out.kept, max_tokens=p.pack.max_tokens)
            files.write_rows(folder / split / "packs.parquet", [asdict(pack) for pack in packs], packing.PACK)
            files.write_jsonl(folder / split / "dropped.jsonl", sorted_out.dropped)
            metrics |= packing.account(sorted_out, packs, max_tokens=p.pack.max_tokens, split=split)
            lengths[split] = sorted_out.lengths
    files.write_csv(Path("plots/lengths.csv"), packing.length_histogram(lengths, max_tokens=p.pack.max_tokens))
    tracking.report("tokenize_pack", metrics)


if __name__ == "__main__":
    stage.run("tokenize_pack", main, Params, start=engine.start)
