"""Stage qlora_train, on a tiny random model: what it writes, and that it writes the same again."""

import dataclasses
from pathlib import Path

import pytest

from stages import qlora_train
from stages.lib import chat, files, models, numerics, packing, records
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import Lora
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization
from stages.lib.schema.pack import ControlTokens, Labels, OnOverlong, Pack
from tests import tiny_training

NF4 = Numerics(Determinism.strict, ComputeDtype.auto, ComputeDtype.auto, Device.cpu, Quantization.nf4, True)
PACK = Pack(64, OnOverlong.drop, Labels.assistant_only, ControlTokens.text, 0.05)
TRAIN = dataclasses.replace(tiny_training.TRAIN, early_stopping_patience=3, samples=1)


@pytest.fixture
def prepared(in_tmp: Path, tiny_model_dir: Path) -> Path:
    """A working folder with the outputs of the stages before."""
    Path("models").mkdir()
    Path("models/base").symlink_to(tiny_model_dir)
    for split, n in (("train", 12), ("validation", 3)):
        turns = [
            [{"role": "user", "content": f"add {i} 1"}, {"role": "assistant", "content": f"{i} plus"}] for i in range(n)
        ]
        rows = [records.make(messages, group=split, source="test", task="add") for messages in turns]
        found = packing.encoded(records.table(rows), tokenizer=chat.load_tokenizer(tiny_model_dir), p=PACK, where=split)
        packs = packing.packs(found.tokens, max_tokens=PACK.max_tokens)
        packing.write(Path(f"data/packed/{split}/packs.parquet"), packs)
    return in_tmp


def params(target_modules: object = "all-linear") -> qlora_train.Params:
    return qlora_train.Params(seed=7, lora=Lora(4, 8.0, 0.0, target_modules), train=TRAIN, numerics=NF4)


def test_it_writes_an_adapter_that_loads_and_the_same_bytes_again(prepared: Path) -> None:
    qlora_train.main(params())
    written = [Path("metrics/qlora_train.json"), Path("plots/train.csv"), *sorted(Path("models/adapter").iterdir())]
    assert [path.name for path in written[2:]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "samples.jsonl",
        "trained.json",
    ]
    assert not any(str(prepared).encode() in path.read_bytes() for path in written)
    found = files.read_json(written[0])
    lines = Path("plots/train.csv").read_text().splitlines()
    assert len(lines) == 1 + found["train/steps"]
    assert found["train/tokens"] == sum(len(pack.input_ids) for pack in packing.read(Path("data/packed/train")))
    assert not any("second" in name for name in found)
    models.load_tuned(Path("models/base"), Path("models/adapter"), NF4)
    digests = [files.sha256(path) for path in written]
    qlora_train.main(params())
    assert [files.sha256(path) for path in written] == digests


def test_targets_that_do_not_exist_leave_the_last_adapter_in_place(prepared: Path) -> None:
    before = Path("models/adapter")
    before.mkdir()
    (before / "kept").touch()
    with pytest.raises(ConfigError, match=r"lora\.target_modules: \['quary'\]"):
        qlora_train.main(params(["q_proj", "quary"]))
    assert [path.name for path in before.iterdir()] == ["kept"]


def test_the_dtypes_are_resolved_and_recorded(prepared: Path) -> None:
    qlora_train.main(params(["q_proj"]))
    recorded = files.read_json(Path("models/adapter/trained.json"))
    assert recorded["compute_dtype"] == recorded["adapter_dtype"] == numerics.resolve(NF4).compute_dtype == "float32"
    assert recorded["modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.mark.gpu
def test_it_trains_on_a_gpu_by_the_same_command(prepared: Path) -> None:
    on_gpu = dataclasses.replace(NF4, device=Device.cuda)
    qlora_train.main(dataclasses.replace(params(), numerics=on_gpu))
    found = files.read_json(Path("metrics/qlora_train.json"))
    assert found["train/loss/last"] < found["train/loss/first"]
    recorded = files.read_json(Path("models/adapter/trained.json"))
    assert recorded["adapter_dtype"] == "float32"
    assert recorded["compute_dtype"] == numerics.resolve(on_gpu).compute_dtype
    assert models.load_tuned(Path("models/base"), Path("models/adapter"), on_gpu).device.type == "cuda"
