"""The adapter: where it sits, by which method, how it is written down, and that it comes back as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from commands.params import FAULTS, composed
from stages.lib import adapters, chat, files, generation, loss, merging, models, numerics, scoring
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import FROM_WEIGHTS, VIRTUAL, AlphaMode, Lora, Method, check_together
from stages.lib.schema.numerics import ComputeDtype, Determinism, Device, Numerics, Quantization
from tests.conftest import ROOT
from tests.exported import MERGE

NF4 = Numerics(Determinism.strict, ComputeDtype.float32, ComputeDtype.float32, Device.cpu, Quantization.nf4, True)
PLAIN = replace(NF4, quantization=Quantization.none)
FEW = ["k_proj", "v_proj", "down_proj"]
ATTENTION, MLP = ["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]


@pytest.fixture(scope="module")
def load(tiny_model_dir: Path) -> Callable[[], Any]:
    return lambda: models.load_base(tiny_model_dir, NF4)


@pytest.mark.parametrize(
    ("wanted", "last_parts", "n"),
    [
        ("all-linear", sorted([*ATTENTION, *MLP]), 14),
        ("attention", ATTENTION, 8),
        ("mlp", MLP, 6),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"], 4),
        (r".*\.mlp\.(up|down)_proj", ["down_proj", "up_proj"], 4),
    ],
)
def test_targets_are_named_by_group_by_name_or_by_a_regular_expression(
    load: Callable[[], Any], wanted: Any, last_parts: list[str], n: int
) -> None:
    base = load()
    targets = adapters.resolve_targets(base, wanted)
    assert len(targets) == n
    assert adapters.short_names(base, targets) == last_parts


def test_a_single_layer_is_named_in_full(load: Callable[[], Any]) -> None:
    base = load()
    targets = adapters.resolve_targets(base, ["0.mlp.up_proj"])
    assert targets == ["model.layers.0.mlp.up_proj"]
    assert adapters.short_names(base, targets) == targets


@pytest.mark.parametrize("wanted", [["query"], ["q_proj", "query"], ["lm_head"], ["proj"], "q_proj", "lm_head"])
def test_names_that_match_nothing_are_refused_even_beside_others_that_do(
    load: Callable[[], Any], wanted: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules: \['(query|lm_head|proj|q_proj)'\] of .*'down_proj'"):
        adapters.add_adapter(load(), Lora(4, 4.0, 0.0, wanted))


def test_the_saved_configuration_is_sorted_and_names_no_machine(load: Callable[[], Any], tmp_path: Path) -> None:
    model = adapters.add_adapter(load(), Lora(4, 8.0, 0.0, ["v_proj", "q_proj"]))
    adapters.save(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = files.read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "models/base"
    assert str(tmp_path.anchor + "tmp") not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    described = adapters.describe(model, Lora(4, 8.0, 0.0, ["v_proj", "q_proj"]), numerics.resolve(NF4))
    assert described["modules"] == [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]
    assert described["scaling"] == 2.0
    assert described["parameters"] == sum(p.numel() for p in adapters.trainable(model).values())


ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8}),
    "mistral": (MistralConfig, {}),
    "phi3": (Phi3Config, {"pad_token_id": 0}),
    "gpt2": (
        GPT2Config,
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32, "bos_token_id": 0, "eos_token_id": 0},
    ),
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def small(name: str) -> Any:
    kind, more = ARCHITECTURES[name]
    config = kind(vocab_size=64, **more) if name == "gpt2" else kind(**SMALL, **more)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        *((name, ATTENTION, MLP) for name in ("llama", "qwen3", "gemma3", "mistral")),
        ("phi3", ["o_proj", "qkv_proj"], ["down_proj", "gate_up_proj"]),
        ("gpt2", ["c_attn", "c_proj"], ["c_fc", "c_proj"]),
    ],
)
def test_layers_are_found_in_any_architecture_and_take_an_adapter(
    name: str, attention: list[str], mlp: list[str]
) -> None:
    for wanted, last_parts in {"attention": attention, "mlp": mlp}.items():
        base = small(name)
        targets = adapters.resolve_targets(base, wanted)
        assert sorted({target.rsplit(".", 1)[-1] for target in targets}) == last_parts
        model = adapters.add_adapter(base, Lora(2, 2.0, 0.0, wanted))
        sits = [layer for layer, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
        assert sorted(sits) == targets


def tuned(model: Any, *, steps: int = 2) -> Any:
    """Train on two documents, the way the training does; every trainable tensor has to move."""
    before = {name: parameter.detach().clone() for name, parameter in adapters.trainable(model).items()}
    ids, positions = IDS.clone(), torch.cat([torch.arange(20), torch.arange(17)])[None]
    labels = torch.where(positions < 8, chat.IGNORED, ids)
    optimizer = torch.optim.AdamW(adapters.trainable(model).values(), lr=1e-2)
    model.train()
    for _ in range(steps):
        nll, _ = loss.answer_nll(model, {"input_ids": ids, "labels": labels, "position_ids": positions})
        nll.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name, values in adapters.trainable(model).items() if torch.equal(values, before[name])]
    return model.eval()


IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def recipe(method: Method, **more: Any) -> Lora:
    return Lora(4, 8.0, 0.0, FEW, method=method, virtual_tokens=5, **more)


@pytest.mark.parametrize(
    "p",
    [*map(recipe, Method), recipe(Method.full, last_layers=1)],
    ids=lambda p: str(p.method) if p.last_layers is None else "last_layers",
)
def test_every_method_starts_at_the_base_learns_comes_back_and_merges(
    tiny_model_dir: Path, tmp_path: Path, p: Lora
) -> None:
    comes_back(tiny_model_dir, tmp_path, p, PLAIN if p.method is Method.full else NF4)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("method", list(Method))
def test_every_method_comes_back_from_every_quantization_it_can_have(
    tiny_model_dir: Path, tmp_path: Path, method: Method, quantization: Quantization
) -> None:
    p, n = recipe(method), replace(NF4, quantization=quantization)
    try:
        check_together(p, n, gradient_checkpointing=False)
    except ConfigError:
        return
    comes_back(tiny_model_dir, tmp_path, p, n)


def comes_back(base: Path, folder: Path, p: Lora, n: Numerics) -> None:
    torch.manual_seed(0)
    frozen = models.load_base(base, n)
    untouched = logits(frozen)
    model = adapters.add_adapter(frozen, p).eval()
    if p.method not in VIRTUAL:
        torch.testing.assert_close(logits(model), untouched, rtol=0, atol=1e-5)
    tuned(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), untouched, rtol=0, atol=1e-5)
    adapters.save(model, folder)

    learned = sum(parameter.numel() for parameter in adapters.trainable(model).values())
    saved = {tensor.numpy().tobytes() for tensor in load_file(folder / "adapter_model.safetensors").values()}
    assert sum(map(len, saved)) == learned * 4 * (2 if p.method in FROM_WEIGHTS else 1)  # tied ones are written twice
    assert (logits(model)[:, -len(IDS[0]) :] - untouched).abs().max() > 1e-3
    torch.testing.assert_close(logits(models.load_tuned(base, folder, n)), logits(model), rtol=0, atol=1e-5)
    if p.method in VIRTUAL:
        with pytest.raises(ConfigError, match=r"lora\.method: .* cannot be merged.*serve models/base"):
            merging.merge(base, folder, MERGE, n)
        return
    merged = merging.merge(base, folder, MERGE, n)
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "modules_to_save" in name]
    close = 0.05 if n.quantization is Quantization.int8 else 1e-5  # 8-bit layers round their inputs, merged ones do not
    merging.save(merged, base, folder / "merged")
    torch.testing.assert_close(logits(models.load_dense(folder / "merged", n)), logits(model), rtol=0, atol=close)


@pytest.mark.parametrize(("alpha_mode", "scaling"), [("fixed", 2.0), ("ratio", 32.0), ("rslora", 8.0)])
def test_alpha_mode_says_how_the_update_is_scaled(load: Callable[[], Any], alpha_mode: str, scaling: float) -> None:
    p = Lora(16, 32.0, 0.0, ["q_proj"], alpha_mode=AlphaMode(alpha_mode))
    model = adapters.add_adapter(load(), p)
    assert {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)} == {scaling}
    assert adapters.describe(model, p, numerics.resolve(NF4))["scaling"] == scaling


@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_an_adapter_that_starts_from_weights_starts_at_their_principal_part(
    tiny_model_dir: Path, method: Method
) -> None:
    """PiSSA: B A is W's best approximation of rank r. OLoRA: B is orthonormal and B A reproduces r columns of W."""
    torch.manual_seed(0)
    model = adapters.add_adapter(models.load_base(tiny_model_dir, PLAIN), replace(recipe(method), alpha=4.0))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    weight = layer.get_base_layer().weight
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if method is Method.pissa:
        best = torch.linalg.svdvals(weight)[4:].norm()
        assert best <= (weight - product).norm() < 1.01 * best < 0.98 * weight.norm()
    else:
        torch.testing.assert_close(product[:, :4], weight[:, :4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [Method.lora, Method.ia3, Method.full])
def test_the_configuration_is_written_the_same_whatever_the_order_of_sets(
    tiny_model_dir: Path, tmp_path: Path, method: Method
) -> None:
    p = recipe(method, modules_to_save=["norm", "input_layernorm"] if method is not Method.full else [])
    adapters.save(adapters.add_adapter(models.load_base(tiny_model_dir, PLAIN), p), tmp_path)
    config = files.read_json(tmp_path / "adapter_config.json")
    lists = {key: value for key, value in config.items() if isinstance(value, list)}
    assert lists.keys() >= {"modules_to_save"}
    assert all(value == sorted(value) for value in lists.values())


def test_virtual_tokens_are_scored_and_continued_as_peft_computes_them(tiny_model_dir: Path) -> None:
    prompts = [[5, 9, 7], [5, 9, 30, 31, 32, 33], [5, 9]]
    answers = [[40, 41], [42, 43, 44], [45]]
    for method in VIRTUAL:
        model = tuned(adapters.add_adapter(models.load_base(tiny_model_dir, NF4), recipe(method)))
        found = scoring.answer_likelihoods(model, prompts, answers, batch_size=2)
        written = generation.greedy(model, prompts, stop_ids=[], max_new_tokens=4, batch_size=3)
        for prompt, answer, likelihood, line in zip(prompts, answers, found, written, strict=True):
            with torch.no_grad():
                output = model(input_ids=torch.tensor([prompt + answer])).logits[0, -len(answer) - 1 : -1]
            nll = torch.nn.functional.cross_entropy(output, torch.tensor(answer), reduction="sum")
            assert likelihood.nll == pytest.approx(nll.item(), abs=1e-4)
            ids = list(prompt)
            for _ in range(4):
                with torch.no_grad():
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert line.ids == ids[len(prompt) :]
        with model.disable_adapter():
            off = scoring.answer_likelihoods(model, prompts, answers, batch_size=2)
        base = scoring.answer_likelihoods(models.load_base(tiny_model_dir, NF4), prompts, answers, batch_size=2)
        assert [one.nll for one in off] == pytest.approx([one.nll for one in base], abs=1e-5)
        assert max(abs(a.nll - b.nll) for a, b in zip(found, off, strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("is_tied", "names"),
    [
        (True, ["lm_head"]),
        (False, ["lm_head", "embed_tokens"]),
        *(
            pytest.param(is_tied, names, marks=pytest.mark.slow)
            for is_tied, names in ((True, ["embed_tokens"]), (True, ["lm_head", "embed_tokens"]), (False, ["lm_head"]))
        ),
    ],
)
def test_embeddings_trained_whole_come_back_and_merge_tied_as_they_were(
    tiny_model_dir: Path, tmp_path: Path, is_tied: bool, names: list[str]
) -> None:
    base = tiny_model_dir if is_tied else untied(tiny_model_dir, tmp_path / "base")
    model = tuned(adapters.add_adapter(models.load_base(base, NF4), recipe(Method.lora, modules_to_save=names)))
    adapters.save(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(models.load_tuned(base, tmp_path / "adapter", NF4)), logits(model))
    merging.save(merging.merge(base, tmp_path / "adapter", MERGE, NF4), base, tmp_path / "merged")
    torch.testing.assert_close(logits(models.load_dense(tmp_path / "merged", NF4)), logits(model), rtol=0, atol=1e-5)
    assert files.read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] == is_tied


def test_an_output_embedding_trained_alone_is_untied_by_the_merge(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_tied", lambda base: [])  # as another tool would write it, without tying
    p = recipe(Method.lora, modules_to_save=["lm_head"])
    model = tuned(adapters.add_adapter(models.load_base(tiny_model_dir, NF4), p))
    adapters.save(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = merging.merge(tiny_model_dir, tmp_path / "adapter", MERGE, NF4)
    merging.save(merged, tiny_model_dir, tmp_path / "merged")
    torch.testing.assert_close(logits(models.load_dense(tmp_path / "merged", NF4)), logits(model), rtol=0, atol=1e-5)
    assert files.read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is False


def untied(base: Path, folder: Path) -> Path:
    """The same model with an output embedding of its own."""
    model = models.load_dense(base, PLAIN)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.01)
    model.save_pretrained(folder)
    merging.copy_unchanged(base, folder)
    return folder


def test_new_tokens_get_a_place_learn_come_back_and_merge(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    models.load_dense(tiny_model_dir, PLAIN).save_pretrained(base)
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    known = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("</tool>", special=True)])
    tokenizer.save_pretrained(base)
    frozen = models.load_base(base, NF4)
    embedding = frozen.get_input_embeddings().weight
    assert embedding.shape[0] == frozen.get_output_embeddings().weight.shape[0] == known + 2
    torch.testing.assert_close(embedding[known], embedding[:known].mean(0))
    model = tuned(adapters.add_adapter(frozen, recipe(Method.lora, modules_to_save=["embed_tokens"])))
    adapters.save(model, tmp_path / "adapter")
    new = torch.tensor([[5, known, known + 1, 7]])
    with torch.no_grad():
        expected = model(input_ids=new).logits
        torch.testing.assert_close(models.load_tuned(base, tmp_path / "adapter", NF4)(input_ids=new).logits, expected)
        merging.save(merging.merge(base, tmp_path / "adapter", MERGE, NF4), base, tmp_path / "merged")
        loaded = models.load_dense(tmp_path / "merged", NF4)
        torch.testing.assert_close(loaded(input_ids=new).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("p", "n", "message"),
    [
        (
            recipe(Method.lora, modules_to_save=["head"]),
            NF4,
            r"modules_to_save: \['head'\] match no module.*embed_tokens",
        ),
        (recipe(Method.lora, modules_to_save=["mlp"]), NF4, r"mlp holds .*mlp\.down_proj, which lora\.target_modules"),
        (recipe(Method.lora, modules_to_save=["q_proj"]), NF4, r"q_proj is quantized.*numerics\.quantization=none"),
        (recipe(Method.full), NF4, r"is quantized.*numerics\.quantization=none"),
        (recipe(Method.full, last_layers=3), PLAIN, r"lora\.last_layers: found 3, expected at most the 2 layers"),
        (recipe(Method.ia3, modules_to_save=["lm_head"]), PLAIN, r"ia3, but this base ties"),
        (
            replace(recipe(Method.pissa), r=200),
            NF4,
            r"lora\.r: found 200 with lora\.method=pissa, expected at most 128",
        ),
    ],
)
def test_what_the_base_cannot_give_is_refused(tiny_model_dir: Path, p: Lora, n: Numerics, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapters.add_adapter(models.load_base(tiny_model_dir, n), p)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last_layers": 2}, r"lora\.last_layers: found 2"),
        ({"method": Method.ia3, "dropout": 0.1}, r"lora\.dropout: found 0\.1, expected 0, for lora\.method=ia3"),
        ({"method": Method.prompt_tuning, "modules_to_save": ["norm"]}, r"lora\.modules_to_save: found"),
        ({"virtual_tokens": 0}, r"lora\.virtual_tokens: found 0"),
        ({"target_modules": "(q_proj"}, r"lora\.target_modules: found '\(q_proj'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(recipe(Method.lora), **changes)


@pytest.mark.parametrize(
    ("method", "quantization", "checkpointing", "message"),
    [
        (Method.full, Quantization.nf4, False, r"numerics\.quantization: found nf4 with lora\.method=full"),
        (Method.dora, Quantization.int8, False, r"numerics\.quantization: found int8 with lora\.method=dora"),
        (Method.prefix_tuning, Quantization.nf4, True, r"train\.gradient_checkpointing: found true"),
    ],
)
def test_what_a_method_asks_of_other_sections_is_known_before_the_model_is_loaded(
    method: Method, quantization: Quantization, checkpointing: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_together(recipe(method), replace(NF4, quantization=quantization), gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("method", [Method.dora, Method.ia3, Method.prompt_tuning, Method.full])
def test_all_that_is_trained_has_the_adapters_type_inside_a_base_of_another(
    tiny_model_dir: Path, tmp_path: Path, method: Method
) -> None:
    whole = ["embed_tokens"] if method is Method.dora else []
    half = replace(PLAIN, compute_dtype=ComputeDtype.bfloat16)
    model = adapters.add_adapter(models.load_base(tiny_model_dir, half), recipe(method, modules_to_save=whole))
    for parameter in adapters.trainable(model).values():
        parameter.data = parameter.data.float()
    adapters.save(tuned(model), tmp_path)
    loaded = models.load_tuned(tiny_model_dir, tmp_path, half)
    found = get_peft_model_state_dict(loaded, save_embedding_layers=False).values()
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert logits(loaded).dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0.05)


def test_every_configuration_of_a_method_says_what_it_is_and_starts_at_scaling_one() -> None:
    found = []
    for path in sorted((ROOT / "conf/lora").glob("*.yaml")):
        assert path.read_text().startswith("# ")
        merged = OmegaConf.merge(OmegaConf.load(ROOT / "conf/lora/r16.yaml"), OmegaConf.load(path))
        merged.pop("defaults", None)
        found.append(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Lora), merged)))
    assert {p.method for p in found} == set(Method)
    assert {p.scaling for p in found} == {1.0}


def test_a_method_that_the_quantization_rules_out_does_not_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(FAULTS, match=r"numerics\.quantization: found nf4 with lora\.method=full"):
        composed(["lora=full"])
    assert composed(["lora=last_layers", "numerics.quantization=none"])["lora"]["last_layers"] == 8
