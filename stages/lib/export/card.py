"""The model card: what the model is, what it was trained and measured on, where its limits are, how to run it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.lib.export.ladder import Rung, tasks
from stages.lib.schema.base_model import BaseModel
from stages.lib.schema.data import Data, Source
from stages.lib.schema.lora import FROM_WEIGHTS
from stages.lib.schema.numerics import Numerics, Quantization

MEASURES = {
    "loss": "loss per answer token, nats",
    "perplexity": "perplexity",
    "field_f1": "field F1",
    "json_valid": "valid JSON",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "bleu": "BLEU",
    "token_f1": "token F1",
    "json_schema": "JSON with the reference's keys and types",
    "bits_per_byte": "bits per byte of the answer",
    "stops": "ends by itself",
}
DATASETS = {
    "python_docs": "Documentation of the pinned packages {packages}: the parameters of a function as a JSON object, "
    "and the one-line summary of a function.",
    "local": "A file of the user's own, `{file}`.",
    "hub": "Hugging Face data set `{id}` at revision `{revision}`.",
    "url": "`{url}` (sha256 `{sha256}`).",
}
HELD = {
    Quantization.nf4: "4-bit NF4",
    Quantization.fp4: "4-bit FP4",
    Quantization.int8: "8-bit integers (LLM.int8)",
    Quantization.none: "16 bit",
}
STARTS = {"pissa": "PiSSA", "olora": "OLoRA", "dora": "DoRA", "lora": "LoRA"}


@dataclass(frozen=True)
class Facts:
    """What a card says.

    source: models/base/source.json. adapter, trained: adapter_config.json and trained.json. evaluated: metrics of
    evaluate. metrics: of quantize_export. rungs: of the ladder. files: name of each format's file or folder. skipped:
    formats that were asked for and could not be written, with the reason. recommended: the GGUF file for llama.cpp.
    stops: texts of the stop tokens.
    """

    name: str
    base: BaseModel
    source: Mapping[str, Any]
    data: Data
    adapter: Mapping[str, Any]
    trained: Mapping[str, Any]
    numerics: Numerics
    confidence: float
    evaluated: Mapping[str, float]
    metrics: Mapping[str, float]
    rungs: Sequence[Rung]
    files: Mapping[str, str]
    skipped: Mapping[str, str]
    recommended: str | None
    stops: Sequence[str]
    has_modelfile: bool


def write(path: Path, f: Facts) -> None:
    """Write README.md with the hub's metadata block."""
    head = ModelCardData(
        base_model=f.base.id,
        license=f.base.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qlora", "lora", *(["gguf"] if f.recommended else [])],
        model_name=f.name,
        eval_results=_eval_results(f),
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {f.name}",
        f"A QLoRA fine-tune of [{f.base.id}]({f.base.license_url}), merged and exported.",
        f"## Data\n\n{_dataset(f.data)} Near-duplicates are removed, and no row or group of test is in train.",
        _method(f),
        _results(f),
        _ladder(f),
        _limits(f),
        _usage(f),
        f"## Licence\n\nThe weights derive from {f.base.id}, licensed {f.base.license} ({f.base.license_url}).\n\n"
        f"Data: {_data_licence(f.data)}\n\nSee LICENSE.md.",
    ]
    path.write_text(str(ModelCard("\n\n".join(parts) + "\n")), encoding="utf-8")


def license_note(base: BaseModel, data: Data, carried: Sequence[str]) -> str:
    """Args: carried: files of the base model's licence beside the note."""
    beside = f"Its own files lie beside this one: {', '.join(carried)}.\n" if carried else ""
    notice = f"{base.license_notice}\n" if base.license_notice else ""
    return (
        f"# Licence\n\nThese weights are a modified version of {base.id}, which is licensed {base.license}:\n"
        f"{base.license_url}\n{beside}{notice}\n"
        "Modifications: low-rank adapters were trained and added to the weights, which were then "
        "converted and quantized.\nPass this note and the licence's own text on with any copy.\n\n"
        f"Data they were trained on: {_data_licence(data)}\n"
    )


def _dataset(data: Data) -> str:
    """A card is for others: of the user's own file it names the file, not the folders above it."""
    told = []
    for source in data.each().values():
        facts = vars(source) | {"packages": ", ".join(source.packages), "file": Path(source.path).name}
        told.append(DATASETS[str(source.source)].format(**facts))
    return " ".join(told)


def _data_licence(data: Data) -> str:
    """Of packages what they declare; of other data nobody told this pipeline, and the card says so."""
    told = []
    for source in data.each().values():
        if source.source is Source.python_docs:
            told += [f"{package}: {_declared(package)}." for package in source.packages]
        elif source.source is Source.hub:
            told.append(f"see the card of https://huggingface.co/datasets/{source.id}.")
        else:
            told.append("the licence of the file named above was not recorded: name it before you publish.")
    return " ".join(told)


def _declared(package: str) -> str:
    """The licence in a package's own metadata, in one line."""
    about: Any = metadata.metadata(package)
    if expression := about.get("License-Expression"):
        return str(expression)
    named = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    given = str(about.get("License", "")).strip()  # a name, or the whole text
    return ", ".join(named) or (given if 0 < len(given) < 60 else "see the package")


def _eval_results(f: Facts) -> list[EvalResult] | None:
    """The tuned model's task scores on the test split, as the hub's model index; the data set is the run's own."""
    sources = ", ".join(sorted({str(source.source) for source in f.data.each().values()}))
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=f"{sources}, task {task}",
            dataset_config=task,  # results of one config are taken together
            dataset_split="test",
            metric_type=measure,
            metric_name=MEASURES.get(measure, measure),
            metric_value=round(f.evaluated[f"test/{task}/{measure}/tuned"], 4),
        )
        for task, _, measure in (name.rpartition("/") for name in tasks(f.rungs))
        if f"test/{task}/{measure}/tuned" in f.evaluated
    ]
    return found or None


def _method(f: Facts) -> str:
    merged = next(rung.figures for rung in f.rungs if rung.name == "merged")
    return (
        f"## Method\n\n{_trained(f)}, trained over the base frozen in {HELD[f.numerics.quantization]}. The adapter was "
        "then merged in 32 bit. Against the base so held with its adapter the merged model has a mean KL divergence of "
        f"{merged['kl/mean']:.2g} nats per token and agrees on {merged['top1']:.1%} of the most likely tokens.\n\n"
        f"Base weights: {f.source['origin']}, revision `{f.source['revision']}`."
    )


def _trained(f: Facts) -> str:
    """What was trained, by the ranks that were configured: adapters that start from weights are stored at twice it."""
    modules = f.adapter["target_modules"]
    if isinstance(modules, str):  # no layer has an adapter: weights were trained themselves
        return f"The weights of {len(f.adapter['modules_to_save'])} modules"
    last = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))
    if "r" not in f.adapter:
        return f"IA3 vectors on {last}"
    method = f.trained["method"]
    times = 2 if method in map(str, FROM_WEIGHTS) else 1
    dropout = f"dropout {f.adapter['lora_dropout']:g}"
    return (
        f"{STARTS[method]} adapters of rank {f.adapter['r'] // times} (alpha {f.adapter['lora_alpha'] / times:g}, "
        f"{dropout}) on {last}"
    )


def _results(f: Facts) -> str:
    """One row for each `test/<task>/<measure>/{base,fewshot,tuned,delta,low,high}`."""
    evaluated = f.evaluated
    lines = [
        "## Results on the held-out test split",
        "",
        f"Same prompts and greedy decoding for every arm; the interval, at {f.confidence:.0%}, is a paired bootstrap "
        "over rows.",
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
        label = MEASURES.get(measure, measure)
        lines.append(f"| {'/'.join(task)} | {label} | {' | '.join(cells)} | {evaluated[key]:+.3f} | {interval} |")
    return "\n".join(lines)


_ARMS = ("base", "fewshot", "tuned")


def _ladder(f: Facts) -> str:
    """One row for each rung; the last column from its task scores."""
    lines = [
        "## Formats, and what is left of the trained model in them",
        "",
        f"The trained model is the base in {HELD[f.numerics.quantization]} with its adapter; every figure compares "
        "with it, on the same tokens of held-out conversations. Each format was loaded again (GGUF through "
        "transformers, dequantized). The task score is that of answers which the format's own runtime wrote, minus the "
        f"tuned model's on the same rows, with its paired bootstrap interval at {f.confidence:.0%}.",
        "",
        "![Fidelity ladder](ladder.svg)",
        "",
        "| model | MiB | bits per weight | perplexity ratio | mean KL, nats | 99th percentile KL | same top-1 "
        "| task score, minus tuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rung in f.rungs:
        cells = [
            pattern.format(rung.figures[key]) if key in rung.figures else ""
            for key, pattern in (
                ("mib", "{:.1f}"),
                ("bits_per_weight", "{:.2f}"),
                ("perplexity_ratio", "{:.4f}"),
                ("kl/mean", "{:.2g}"),
                ("kl/p99", "{:.2g}"),
                ("top1", "{:.1%}"),
            )
        ]
        lines.append(f"| {rung.label} | {' | '.join(cells)} | {_task_scores(rung)} |")
    if any(rung.name == "fewshot" for rung in f.rungs):
        lines += [
            "",
            "Examples make the wording of questions easy to guess, too, so the perplexity of the base with examples, "
            "over questions and answers together, may be below the trained model's.",
        ]
    if f.skipped:
        lines += ["", f"Asked for and not written: {'; '.join(f'{form} ({why})' for form, why in f.skipped.items())}."]
    chats = {name: f.metrics[f"export/{name}/round_trip/chats"] for name in f.files if _was_asked(f, name)}
    if chats:
        parsed = max(f.metrics[f"export/{name}/round_trip/control_text"] for name in chats)
        lines += [
            "",
            f"{max(chats.values()):.0f} chats are written and read token for token as in training by each format's own "
            f"runtime. In {parsed:.0f} of them the words hold what looks like a control token: runtimes read it as "
            "one, training read it as text.",
        ]
    return "\n".join(lines)


def _was_asked(f: Facts, name: str) -> bool:
    return f"export/{name}/round_trip/chats" in f.metrics


def _task_scores(rung: Rung) -> str:
    shown = []
    for name, score in rung.scores.items():
        task, _, measure = name.rpartition("/")
        label = MEASURES.get(measure, measure)
        shown.append(f"{task}, {label}: {score.delta:+.3f} ({score.low:+.3f} to {score.high:+.3f})")
    return "; ".join(shown)


def _limits(f: Facts) -> str:
    limits = [
        "- Trained for the tasks above; other abilities of the base were not measured and may have suffered.",
        "- Answers can be wrong or invented. Nothing was done for safety beyond what the base does.",
        "- Figures hold for greedy decoding and for prompts written as in training.",
    ]
    general = [f.evaluated.get(f"general/perplexity/{arm}", math.nan) for arm in ("base", "tuned")]
    if not any(map(math.isnan, general)):
        limits[0] = (
            "- Trained for the tasks above. Perplexity on general prose went from "
            f"{general[0]:.1f} to {general[1]:.1f}; other abilities of the base were not measured and may have "
            "suffered."
        )
    weights = f.source.get("weights", "")
    if "dequantized" in weights:
        limits.insert(
            0, f"- The base weights themselves were {weights}: they are not bit for bit the ones that were published."
        )
    return "## Limits\n\n" + "\n".join(limits)


def _usage(f: Facts) -> str:
    """How to run what is there, and nothing else."""
    folders = {form: name for form, name in f.files.items() if form in _TRANSFORMERS}
    served = {form: name for form, name in f.files.items() if form in _VLLM}
    parts = ["## Use"]
    if folders:
        folder = next(iter(folders.values()))
        needed = f" (needs {_TRANSFORMERS[next(iter(folders))]})" if _TRANSFORMERS[next(iter(folders))] else ""
        parts += [
            f"transformers{needed}:",
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'folder = "{folder}"\n'
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
    if served:
        parts += ["vLLM:", f"```sh\nvllm serve ./{next(iter(served.values()))}\n```"]
    if f.recommended:
        parts += ["llama.cpp:", f"```sh\nllama-cli -m {f.recommended} --jinja --temp 0 -cnv\n```"]
        if f.has_modelfile:
            name = f.name.lower()
            parts += [
                "Ollama, in the folder of the Modelfile:",
                f"```sh\nollama create {name} -f Modelfile\nollama run {name}\n```",
            ]
        else:
            parts += ["No Ollama Modelfile comes with it: the chat template is more than a sequence of turns."]
    parts += [f"Answers end with {' or '.join(f'`{stop}`' for stop in f.stops)}."]
    return "\n\n".join(parts)


_TRANSFORMERS = {
    "safetensors": "",
    "bnb_int8": "bitsandbytes",
    "bnb_nf4": "bitsandbytes",
    "w8a8": "compressed-tensors",
    "w4a16": "compressed-tensors",
}
"""Formats that transformers loads from their folder, the plainest first, and what it needs beside."""

_VLLM = ("w8a8", "w4a16", "safetensors", "bnb_nf4")
