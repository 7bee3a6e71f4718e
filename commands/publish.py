"""make publish: send a promoted folder to the Hugging Face hub; without --upload only say what would be sent.

    python -m commands.publish --repo owner/name FOLDER [--upload] [--public]

Only the files that the folder's manifest names go there, in one commit, to a private repository. Files of an earlier
upload that the manifest no longer names are removed from it; others in the repository stay. The token comes from the
environment, HF_TOKEN, and is shown nowhere. Exit 0: said or done; 2: the folder or the hub refuses.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from httpx2 import HTTPError  # what huggingface_hub raises for a broken connection
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from yaml import YAMLError

from stages.lib.errors import ConfigError, DataError, ExternalError, PipelineError
from stages.lib.export import manifest

CARD = "README.md"
NEEDED = ("license", "base_model", "pipeline_tag", "library_name")
"""Of the card's metadata: without them the hub shows a model that nobody finds, or may not use."""


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="publish", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    known.add_argument("--repo", required=True, help="owner/name on the hub; made when it is not there")
    known.add_argument("folder", type=Path, help="a copy that `make promote` made")
    known.add_argument("--upload", action="store_true", help="do send it (DRY=0)")
    known.add_argument("--public", action="store_true", help="for everybody to see; private otherwise")
    return known


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    try:
        names = checked(asked.folder)
        check_name(asked.repo)
        card = described(asked.folder / CARD)
        sizes = {name: (asked.folder / name).stat().st_size for name in names}
        for name, size in sizes.items():
            print(f"  {size:>14,}  {name}")
        visible = "public" if asked.public else "private"
        print(f"  {sum(sizes.values()):>14,}  bytes in {len(sizes)} files, for {asked.repo}, {visible}")
        print("  card: " + ", ".join(f"{key} {card[key]}" for key in NEEDED))
        if not asked.upload:
            print("Nothing was sent. DRY=0 (or --upload) sends it.")
            return 0
        print(upload(asked.folder, names, asked.repo, is_private=not asked.public))
    except (PipelineError, OSError) as fault:
        print(f"publish: {fault}", file=sys.stderr)
        return 2
    return 0


def checked(folder: Path) -> list[str]:
    """The files to send, sorted.

    Raises: DataError, when the folder is not what its manifest says, or was not promoted.
    """
    manifest.verify(folder)
    found = manifest.read(folder)
    if "promoted" not in found:
        raise DataError(f"{folder}: its manifest names no commit and no run, expected a copy that `make promote` made.")
    return sorted([*found["files"], manifest.NAME])


def check_name(repo: str) -> None:
    """Raises: ConfigError, for what cannot be a repository on the hub."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII):
        raise ConfigError(f"REPO: found {repo!r}, expected owner/name of letters, digits, dots, - and _.")


def described(card: Path) -> dict[str, object]:
    """The metadata of a model card, by key.

    Raises: DataError, when the hub could not read it, or what it lists models by is missing.
    """
    try:
        data: ModelCardData = ModelCard.load(card).data
    except (OSError, ValueError, YAMLError) as fault:
        raise DataError(f"{card}: the hub could not read this card: {fault}") from None
    found = data.to_dict()
    if missing := [key for key in NEEDED if not found.get(key)]:
        raise DataError(f"{card}: no {', '.join(missing)} in its metadata. The configuration base_model names them.")
    return dict(found)


def upload(folder: Path, names: list[str], repo: str, *, is_private: bool) -> str:
    """Send files as one commit; returns its address.

    Raises: ExternalError, when the hub refuses or is away, or the repository is not as private as asked;
        ConfigError, without a token.
    """
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ConfigError("HF_TOKEN: not set, expected a token that may write. Make one in the hub's settings.")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        api.create_repo(repo, private=is_private, exist_ok=True)
        if api.model_info(repo).private != is_private:
            wanted = "private" if is_private else "public"
            raise ExternalError(f"{repo}: is not {wanted}, as asked. Change its settings on the hub, or PUBLIC=1.")
        gone = sorted(earlier(api, repo) - set(names))
        removed = [CommitOperationDelete(name) for name in gone]
        added = [CommitOperationAdd(name, folder / name) for name in names]
        origin = manifest.read(folder)["promoted"]
        message = f"Experiment {origin['experiment']}, commit {origin['commit'][:12]}"
        return str(api.create_commit(repo, [*removed, *added], commit_message=message).commit_url)
    except (HTTPError, ValueError, RuntimeError) as fault:
        status = getattr(getattr(fault, "response", None), "status_code", None)
        reason = f"status {status}" if status else str(fault).splitlines()[0]
        raise ExternalError(
            f"{repo}: the hub did not take it ({reason}); nothing was committed. May the owner of HF_TOKEN write there?"
        ) from None


def earlier(api: HfApi, repo: str) -> set[str]:
    """The files that the manifest of an earlier upload names and the repository still holds."""
    try:
        before = manifest.read(Path(api.hf_hub_download(repo, manifest.NAME)).parent)
    except (EntryNotFoundError, DataError):
        return set()
    return set(before["files"]) & set(api.list_repo_files(repo))


if __name__ == "__main__":
    sys.exit(main())
