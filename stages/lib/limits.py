"""What the base model itself allows, read from its config.json before anything is computed."""

from pathlib import Path

from stages.lib import files
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
    """Longest sequence of the model, tokens; None where its configuration names no end."""
    config = files.read_json(base / "config.json")
    text = config["text_config"] if "text_config" in config else config
    return text["max_position_embeddings"] if "max_position_embeddings" in text else None
