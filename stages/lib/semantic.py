"""Semantic near-duplicates: rows that say the same in other words, by the embeddings of a model that the user names."""

from collections.abc import Sequence

import numpy as np

from stages.lib.schema.dedup import Semantic


def pairs(texts: Sequence[str], settings: Semantic) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(left, right, score) of every pair of texts, left < right, whose embeddings' cosine reaches the threshold.

    Args: texts: in the order in which rows are kept (left before right). settings.model: a folder; not null.
    Raises: ModelError, when the folder holds no model that transformers reads.
    """
    raise NotImplementedError
