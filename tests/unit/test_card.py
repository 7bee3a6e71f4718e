"""The model card, which is written to be published."""

from pathlib import Path

from stages.lib.export import card
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.base_model import Source as ModelSource
from tests.data_settings import settings


def test_the_card_names_the_users_file_but_not_the_folders_above_it(tmp_path: Path) -> None:
    base = BaseModel(ModelSource.package, "maker/toy", None, "toy==1.0", "toy.gguf", "0" * 64, "mit", "https://x.org")
    data = settings(path="/home/ann/secret/my.jsonl")
    card.write(
        tmp_path / "README.md",
        name="toy",
        base=base,
        source={"origin": "toy==1.0", "revision": "0", "weights": "as published"},
        data=data,
        adapter={"r": 8, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": ["q_proj"]},
        evaluated={},
        merged={"merge/kl/mean": 0.1, "merge/top1": 0.9},
        formats=[],
        exported={},
        gguf=None,
        stops=["<|im_end|>"],
        has_modelfile=False,
    )
    text = (tmp_path / "README.md").read_text()
    assert "A file of the user's own, `my.jsonl`." in text
    assert "ann" not in text
