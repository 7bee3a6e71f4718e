"""The model card: what the model is, what it was trained and measured on, where its limits are, how to run it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.data import Data

MEASURES = {
    "loss": "loss per answer token, nats",
    "perplexity": "perplexity",
    "field_f1": "field F1",
    "json_valid": "valid JSON",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
}
DATASETS = {
    "python_docs": "Documentation of the pinned packages {packages}: the parameters of a function as a JSON object, "
    "and the one-line summary of a function. The text stays under the packages' own BSD licences.",
    "local": "A file of the user's own, `{file}`.",
    "hub": "Hugging Face data set `{id}` at revision `{revision}`.",
    "url": "`{url}` (sha256 `{sha256}`).",
}


def write(
    path: Path,
    *,
    name: str,
    base: BaseModel,
    source: Mapping[str, Any],
    data: Data,
    adapter: Mapping[str, Any],
    evaluated: Mapping[str, float],
    merged: Mapping[str, float],
    formats: Sequence[Mapping[str, Any]],
    exported: Mapping[str, float],
    gguf: str | None,
    stops: Sequence[str],
    has_modelfile: bool,
) -> None:
    """Write README.md with the hub's metadata block.

    Args: source: models/base/source.json. adapter: adapter_config.json. evaluated, merged: metrics of those stages.
        formats: rows of plots/formats.csv. exported: metrics of quantize_export. gguf: the file recommended for
        llama.cpp. stops: texts of the stop tokens.
    """
    head = ModelCardData(
        base_model=base.id,
        license=base.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qlora", "lora", *(["gguf"] if gguf else [])],
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        f"A QLoRA fine-tune of [{base.id}]({base.license_url}), merged and exported.",
        f"## Data\n\n{_dataset(data)} Near-duplicates are removed, and no row or group of test is in train.",
        _method(source, adapter, merged),
        _results(evaluated),
        _formats(formats, exported),
        _limits(source),
        _usage(name, gguf, stops, has_modelfile),
        f"## Licence\n\nThe weights derive from {base.id}, licensed {base.license} ({base.license_url}). "
        "See LICENSE.md.",
    ]
    path.write_text(str(ModelCard("\n\n".join(parts) + "\n")), encoding="utf-8")


def license_note(base: BaseModel, carried: Sequence[str]) -> str:
    """Args: carried: files of the base model's licence beside the note."""
    beside = f"Its own files lie beside this one: {', '.join(carried)}.\n" if carried else ""
    notice = f"{base.license_notice}\n" if base.license_notice else ""
    return (
        f"# Licence\n\nThese weights are a modified version of {base.id}, which is licensed {base.license}:\n"
        f"{base.license_url}\n{beside}{notice}\n"
        "Modifications: low-rank adapters were trained and added to the weights, which were then "
        "converted and quantized.\nPass this note and the licence's own text on with any copy.\n"
    )


def _dataset(data: Data) -> str:
    """A card is for others: of the user's own file it names the file, not the folders above it."""
    told = []
    for source in data.each().values():
        facts = vars(source) | {"packages": ", ".join(source.packages), "file": Path(source.path).name}
        told.append(DATASETS[str(source.source)].format(**facts))
    return " ".join(told)


def _method(source: Mapping[str, Any], adapter: Mapping[str, Any], merged: Mapping[str, float]) -> str:
    return (
        f"## Method\n\n{_trained(adapter)}, trained over the base "
        "frozen in 4-bit NF4. The adapter was then merged in 32 bit. "
        f"Against 4-bit base + adapter the merged model has a mean KL divergence of {merged['merge/kl/mean']:.2g} nats "
        f"per token and agrees on {merged['merge/top1']:.1%} of the most likely tokens.\n\n"
        f"Base weights: {source['origin']}, revision `{source['revision']}`."
    )


def _trained(adapter: Mapping[str, Any]) -> str:
    """What was trained, from adapter_config.json."""
    modules = adapter["target_modules"]
    if isinstance(modules, str):  # no layer has an adapter: weights were trained themselves
        return f"The weights of {len(adapter['modules_to_save'])} modules"
    last = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))
    if "r" not in adapter:
        return f"IA3 vectors on {last}"
    dropout = f"dropout {adapter['lora_dropout']:g}"
    return f"LoRA adapters of rank {adapter['r']} (alpha {adapter['lora_alpha']:g}, {dropout}) on {last}"


def _results(evaluated: Mapping[str, float]) -> str:
    """One row for each `test/<task>/<measure>/{base,fewshot,tuned,delta,low,high}`."""
    lines = [
        "## Results on the held-out test split",
        "",
        "Same prompts and greedy decoding for every arm; the interval is a paired bootstrap over rows.",
        "",
        "| task | measure | base | base, with examples | tuned | tuned - base | interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in sorted(evaluated):
        if not key.endswith("/delta") or not key.startswith("test/"):
            continue
        stem = key.removesuffix("/delta")
        _, *task, measure = stem.split("/")
        cells = [f"{evaluated[f'{stem}/{arm}']:.3f}" if f"{stem}/{arm}" in evaluated else "" for arm in _ARMS]
        interval = f"{evaluated[f'{stem}/low']:+.3f} to {evaluated[f'{stem}/high']:+.3f}"
        label = MEASURES[measure] if measure in MEASURES else measure
        lines.append(f"| {'/'.join(task)} | {label} | {' | '.join(cells)} | {evaluated[key]:+.3f} | {interval} |")
    return "\n".join(lines)


_ARMS = ("base", "fewshot", "tuned")


def _formats(formats: Sequence[Mapping[str, Any]], exported: Mapping[str, float]) -> str:
    """One row for each format; the last column from `export/<format>/task/<task>/<measure>/{delta,low,high}`."""
    lines = [
        "## Formats",
        "",
        "Each file was loaded again through transformers (GGUF dequantized) and compared with the merged model on "
        "held-out conversations. The task score is that of answers written by llama.cpp itself, minus the tuned "
        "model's on the same rows, with its paired bootstrap interval.",
        "",
        "| format | MiB | bits per weight | mean KL, nats | 99th percentile KL | same top-1 | perplexity ratio "
        "| task score, minus tuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in formats:
        lines.append(
            f"| {row['format']} | {row['mib']:.1f} | {row['bits_per_weight']:.2f} | {row['kl_mean']:.2g} | "
            f"{row['kl_p99']:.2g} | {row['top1']:.1%} | {row['perplexity_ratio']:.4f} | "
            f"{_task_scores(exported, row['format'])} |"
        )
    return "\n".join(lines)


def _task_scores(exported: Mapping[str, float], form: str) -> str:
    prefix = f"export/{form}/task/"
    stems = sorted(key.removesuffix("/delta") for key in exported if key.startswith(prefix) and key.endswith("/delta"))
    shown = []
    for stem in stems:
        *task, measure = stem.removeprefix(prefix).split("/")
        low, high = exported[f"{stem}/low"], exported[f"{stem}/high"]
        label = MEASURES[measure] if measure in MEASURES else measure
        shown.append(f"{'/'.join(task)}, {label}: {exported[f'{stem}/delta']:+.3f} ({low:+.3f} to {high:+.3f})")
    return "; ".join(shown)


def _limits(source: Mapping[str, Any]) -> str:
    limits = [
        "- Trained for the tasks above; other abilities of the base were not measured and may have suffered.",
        "- Answers can be wrong or invented. Nothing was done for safety beyond what the base does.",
        "- Figures hold for greedy decoding and for prompts written as in training.",
    ]
    weights = source["weights"] if "weights" in source else ""
    if "dequantized" in weights:
        limits.insert(
            0, f"- The base weights themselves were {weights}: they are not bit for bit the ones that were published."
        )
    return "## Limits\n\n" + "\n".join(limits)


def _usage(name: str, gguf: str | None, stops: Sequence[str], has_modelfile: bool) -> str:
    parts = [
        "## Use",
        "transformers, from the folder of the merged model (or `bnb_nf4`, with bitsandbytes installed):",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "models/merged"\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'chat = [{"role": "user", "content": "..."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        "answer = model.generate(**inputs, max_new_tokens=96, do_sample=False)\n"
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
        "```",
    ]
    if gguf:
        parts += ["llama.cpp:", f"```sh\nllama-cli -m {gguf} --jinja --temp 0 -cnv\n```"]
        parts += ["Ollama, in the folder of the Modelfile:"] if has_modelfile else []
        parts += [f"```sh\nollama create {name.lower()} -f Modelfile\nollama run {name.lower()}\n```"] * has_modelfile
        if not has_modelfile:
            parts += ["No Ollama Modelfile comes with it: the chat template is more than a sequence of turns."]
        parts += [f"Answers end with {' or '.join(f'`{stop}`' for stop in stops)}."]
    return "\n\n".join(parts)
