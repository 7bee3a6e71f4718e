"""The Hugging Face hub: one commit of one repository, chosen files only, a token from the environment only."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from httpx2 import HTTPError  # what huggingface_hub raises for a broken connection
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from stages.lib import files, licences
from stages.lib.errors import ConfigError, ExternalError, ModelError
from stages.lib.sources import places

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    *licences.FILES,
)
"""What a model folder needs beside its weights; no code, no other framework's copy of the weights."""


def resolve(id: str, reference: str | None, *, kind: str) -> str:
    """The 40-hex commit that a branch, a tag or (None) the default branch points at now.

    Args: kind: "model" or "dataset".
    """
    with _explained(id, reference, kind=kind):
        info = _api().repo_info(id, revision=reference, repo_type=kind)
    if info.sha is None:
        raise ExternalError(f"{id}: the hub names no commit for {reference or 'its default branch'}.")
    return info.sha


def fetch_model(id: str, revision: str, folder: Path, *, license_url: str) -> None:
    """Copy one commit of a model into `folder`: safetensors weights and the files of MODEL_FILES.

    Weights are those that model.safetensors.index.json names, or model.safetensors: repositories may hold the same
    weights twice (consolidated.safetensors, original/). The hub's own cache keeps a broken download, to be continued.

    Raises: ExternalError, when the hub refuses or is out of reach; ModelError, when there are no safetensors weights.
    """
    with _explained(id, revision, kind="model", license_url=license_url):
        held = _names(id, revision, kind="model")
        chosen = [name for name in held if any(fnmatch(name, pattern) for pattern in MODEL_FILES) and "/" not in name]
        if "model.safetensors.index.json" in held:
            index = files.read_json(_download(id, revision, "model.safetensors.index.json", kind="model"))
            weights = sorted(set(index["weight_map"].values()))
        else:
            weights = ["model.safetensors"]
        if absent := sorted(set(weights) - set(held)):
            others = [name for name in held if name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"))]
            found = f"found {', '.join(others[:3])}" if others else "found no weights of another kind either"
            raise ModelError(
                f"{id}@{revision[:8]}: {absent[0]} is not there, {found}; only safetensors are read, pickled weights "
                "can run code. Choose a base_model.id or base_model.revision with safetensors."
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted({*chosen, *weights}):
            shutil.copyfile(_download(id, revision, name, kind="model"), folder / name)


def fetch_data(id: str, revision: str, split: str | None) -> list[tuple[Path, str]]:
    """The data files of one commit of a data set whose names mention `split` (all of them for None).

    What was fetched once is read again without the hub: a commit never changes, so neither does its list of files.

    Returns: (file in the hub's own cache, its name in the repository), sorted by name.
    Raises: ExternalError, when the hub refuses or is out of reach, or no file of a known format is there.
    """
    page = f"https://huggingface.co/datasets/{id}"
    with _explained(id, revision, kind="dataset", license_url=page):
        held = _names(id, revision, kind="dataset")
        tables = [name for name in held if places.kind(name)]
        chosen = [name for name in tables if split is None or split in _words(name)]
        if not chosen:
            raise ExternalError(
                f"{id}@{revision[:8]}: no file of split {split!r} ({', '.join(places.KINDS)}), found "
                f"{', '.join(tables[:6]) or 'no such file at all'}. "
                "Change data.split (null takes every file) or data.id."
            )
        return [(_download(id, revision, name, kind="dataset"), name) for name in chosen]


def _words(name: str) -> set[str]:
    """data/train-00000-of-00002.parquet -> {data, train, 00000, of, 00002, parquet}."""
    for mark in "/-_.":
        name = name.replace(mark, " ")
    return set(name.split())


def _api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=_token())


def _token() -> str | bool:
    """HF_TOKEN, or False: a token that was once stored on this machine is not taken unasked."""
    return os.environ.get("HF_TOKEN") or False


def _names(id: str, revision: str, *, kind: str) -> list[str]:
    """The files of a commit, sorted; the list is kept beside them in the hub's cache."""
    kept = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=id, repo_type=kind), "listings", f"{revision}.json")
    if kept.exists():
        return list(files.read_json(kept))
    names = sorted(_api().list_repo_files(id, revision=revision, repo_type=kind))
    files.write_json(kept, names)
    return names


def _download(id: str, revision: str, name: str, *, kind: str) -> Path:
    return Path(
        hf_hub_download(
            id,
            name,
            revision=revision,
            repo_type=kind,
            token=_token(),
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    )


@contextmanager
def _explained(id: str, revision: str | None, *, kind: str, license_url: str | None = None) -> Iterator[None]:
    """Turn the hub's refusals into one message each."""
    section = "base_model" if kind == "model" else "data"
    place = f"{id}@{(revision or 'default branch')[:40]}"
    page = license_url or f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{id}"
    try:
        yield
    except HFValidationError as fault:
        raise ConfigError(f"{section}.id: found {id!r}, expected owner/name on the hub ({fault}).") from None
    except RevisionNotFoundError:
        raise ExternalError(
            f"{place}: the hub has no such commit. Change {section}.revision, or type `make pin`."
        ) from None
    except (HTTPError, OSError) as fault:
        status = getattr(getattr(fault, "response", None), "status_code", None)
        if isinstance(fault, GatedRepoError) or status in (401, 403):
            token = (
                "HF_TOKEN is set, but its owner has no access" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
            )
            raise ExternalError(
                f"{place}: the hub refuses access (status {status}); {token}. Accept the licence at {page}, make a "
                f"token that may read it, put it into the environment variable HF_TOKEN. Is {section}.id spelt right?"
            ) from None
        if isinstance(fault, RepositoryNotFoundError):
            raise ExternalError(f"{place}: the hub has no such {kind}. Change {section}.id.") from None
        if isinstance(fault, OSError) and fault.errno and not isinstance(fault, ConnectionError):
            raise  # the disk, not the hub
        reason = f"status {status}" if status else "no answer"
        instead = "base_model=smollm2_135m, which a package registry serves" if kind == "model" else "data=local"
        raise ExternalError(
            f"{place}: the hub is out of reach ({reason}). Try again later, or choose {instead}."
        ) from None
