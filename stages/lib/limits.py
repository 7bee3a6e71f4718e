"""What the base model itself allows, read from its config.json before anything is computed."""

from pathlib import Path

from transformers import AutoConfig

from stages.lib.errors import ConfigError


def check_length(base: Path, max_tokens: int) -> None:
    """Refuse rows longer than the model has positions for: attention beyond them was never trained.

    Packs do not count their documents through, so that it is the longest row that matters.

    Raises: ConfigError, naming pack.max_tokens.
    """
    positions = max_positions(base)
    if positions is not None and max_tokens > positions:
        raise ConfigError(
            f"pack.max_tokens: found {max_tokens}, expected at most {positions}, the positions that {base} has "
            "(max_position_embeddings in its config.json)"
        )


def max_positions(base: Path) -> int | None:
    """Longest sequence of the model, tokens; None where its configuration sets no end."""
    text = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False).get_text_config()
    return getattr(text, "max_position_embeddings", None)
