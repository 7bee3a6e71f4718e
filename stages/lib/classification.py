"""Which of a task's labels a model finds the most likely answer.

The labels' answers are one trie behind each prompt; a node is read once, however many labels go through it, and many
nodes are read in one pass, each seeing the prompt and its own ancestors alone:

    labels  top up, top up failed, refund        prompt ─┬─ top ── up ─┬─ <end>
                                                         │             └─ failed ── <end>
                                                         └─ refund ── <end>

Only nodes with something behind them are read: what an answer's last token says of others is never asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stages.lib import chat, prefill, scoring
from stages.lib.schema.pack import Labels

MAX_LABELS = 500
"""More different labels than this are free text."""
TOKENS_PER_PASS = 256  # enough for fast matrix products; reading fewer nodes at a time means reading fewer in all
COLUMNS = 16384  # keys and values remembered at once, over all lines of a batch


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The labels of a classification, sorted; None for rows that are none: some lack a label, or there are too many."""
    if not rows or not all(row["kind"] == "chat" and row["label"] is not None for row in rows):
        return None
    found = sorted({str(row["label"]) for row in rows})
    return found if len(found) <= MAX_LABELS else None


def label_answers(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Mapping[str, Any]], labels: Sequence[str], tools: Any = None
) -> dict[str, list[int]]:
    """What each label is as an answer: its token ids after these turns, up to and with the end-of-turn token."""
    found = {}
    for label in labels:
        answered = [*turns, {"role": "assistant", "content": label}]
        encoded = chat.encode(tokenizer, answered, tools, labels=Labels.last_turn)
        found[label] = [int(token) for token in encoded.labels if token != chat.IGNORED]
    return found


@dataclass(frozen=True)
class Trie:
    """Beginnings of answers: node 0 is the empty one, a parent stands before its children.

    tokens: (N,) last token of each node. parents: (N,); the root's is -1. depths: (N,) tokens of each node.
    sees: (N + 1, N + 1), whether the second is the first or begins it; the last row and column are no node's.
    vocabulary: tokens that follow somewhere, (U,). nodes_behind, labels_behind: of each node, its children and the
    answers that one more token makes whole, and where that token stands in the vocabulary.
    paths: of each answer, the nodes it goes through, the root apart.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    sees: np.ndarray
    vocabulary: list[int]
    nodes_behind: list[tuple[list[int], list[int]]]
    labels_behind: list[tuple[list[int], list[int]]]
    paths: list[list[int]]

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> Trie:
        """Args: answers: A_i token ids each, at least one."""
        beginnings = sorted({tuple(a[:n]) for a in answers for n in range(len(a))}, key=lambda b: (len(b), b))
        place = {beginning: node for node, beginning in enumerate(beginnings)}
        parents = [place[b[:-1]] if b else -1 for b in beginnings]
        sees = np.zeros((len(beginnings) + 1,) * 2, bool)
        for node, parent in enumerate(parents):
            sees[node] = sees[parent]
            sees[node, node] = True
        vocabulary = sorted({token for answer in answers for token in answer})
        spot = {token: column for column, token in enumerate(vocabulary)}
        nodes: list[tuple[list[int], list[int]]] = [([], []) for _ in beginnings]
        labels: list[tuple[list[int], list[int]]] = [([], []) for _ in beginnings]
        for beginning in beginnings[1:]:
            behind = nodes[place[beginning[:-1]]]
            behind[0].append(place[beginning])
            behind[1].append(spot[beginning[-1]])
        for label, answer in enumerate(answers):
            behind = labels[place[tuple(answer[:-1])]]
            behind[0].append(label)
            behind[1].append(spot[answer[-1]])
        return cls(
            np.array([b[-1] if b else prefill.PAD for b in beginnings]),
            np.array(parents),
            np.array([len(b) for b in beginnings]),
            sees,
            vocabulary,
            nodes,
            labels,
            [[place[tuple(a[:n])] for n in range(1, len(a))] for a in answers],
        )

    def __len__(self) -> int:
        return len(self.tokens)


def label_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Mapping[str, Sequence[int]],
    *,
    batch_size: int,
    references: Sequence[str] | None = None,
) -> np.ndarray:
    """Negative log-likelihood of each label's answer after each prompt, in nats, summed over its tokens.

    With references, the right label of each row, a beginning that is less likely already than some whole label is not
    read on, and labels behind it stand as infinity: the smallest figure of a row and the reference's are exact, and
    most of the work is saved where the model is sure.

    Args: prompts: T_i token ids each, at least one. answers: of each label, at least one token id, end-of-turn
        included. batch_size: rows at once, at most.
    Returns: (rows, labels) float64, labels in the order of `answers`.
    """
    trie, names = Trie.of(list(answers.values())), list(answers)
    room = 2 * len(trie)
    longest = max((len(prompt) for prompt in prompts), default=0)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and longest + int(trie.depths.max()) >= window:
        return _one_by_one(model, prompts, list(answers.values()), batch_size=batch_size)
    batch_size = max(1, min(batch_size, COLUMNS // (longest + room)))
    found = np.full((len(prompts), len(names)), math.inf)
    for read in prefill.in_batches(model, prompts, room=room, batch_size=batch_size):
        sure = None if references is None else [names.index(references[row]) for row in read.rows]
        found[read.rows] = _Search(read, trie, len(names)).run(sure)
    return found


def _one_by_one(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, batch_size: int
) -> np.ndarray:
    """The same without a trie, for layers that look back less far than a prompt is long: its mask knows no distance."""
    columns = [
        scoring.answer_likelihoods(model, prompts, [answer] * len(prompts), batch_size=batch_size) for answer in answers
    ]
    return np.array([[each.nll for each in column] for column in columns]).T


class _Search:
    """The labels of one batch of prompts: which nodes each line has read, and how likely what stands behind them is."""

    def __init__(self, read: prefill.Read, trie: Trie, n_labels: int) -> None:
        self.read, self.trie = read, trie
        n = len(read.rows)
        self.cost = np.full((n, len(trie)), math.inf)  # of each node that stands behind one that was read
        self.cost[:, 0] = 0
        self.is_read = np.zeros((n, len(trie)), bool)
        self.nll = np.full((n, n_labels), math.inf)
        self.columns = np.full((n, 0), -1)  # node that each column behind the prompt holds; -1: none
        self.prompt = read.mask.clone()
        self.present = list(range(n))  # which row of the batch each line holds

    @torch.inference_mode()
    def run(self, sure: Sequence[int] | None) -> np.ndarray:
        """The figures of every label, (lines, labels); `sure`, labels to finish whatever they cost, lets others go."""
        self._follow(np.zeros((len(self.present), 1), int), self.read.logits[:, None])
        if sure is None:
            self._pass([list(range(1, len(self.trie)))] * len(self.present))
            return self.nll
        self._pass([self.trie.paths[label] for label in sure])
        while open_nodes := self._open():
            self._pass(open_nodes)
        return self.nll

    def _open(self) -> list[list[int]]:
        """What each line reads next: its cheapest nodes that may still lead to the best label. Lines without leave."""
        bound = self.nll.min(axis=1, keepdims=True)
        is_open = ~self.is_read & np.isfinite(self.cost) & (self.cost <= bound)
        going_on = [line for line, row in enumerate(self.present) if is_open[row].any()]
        if not going_on:
            return []
        if len(going_on) <= 0.75 * len(self.present):
            self.read.keep_lines(going_on)
            self.prompt = self.prompt[going_on]
            self.columns = self.columns[going_on]
            self.present = [self.present[line] for line in going_on]
        most = max(1, TOKENS_PER_PASS // len(self.present))
        if self.columns.shape[1] + most > len(self.trie):  # columns run out: all that is left, at once
            return [self._unread(row) if is_open[row].any() else [] for row in self.present]
        return [self._cheapest(row, is_open[row], most) for row in self.present]

    def _cheapest(self, row: int, is_open: np.ndarray, most: int) -> list[int]:
        nodes = np.flatnonzero(is_open)
        return sorted(nodes[np.argsort(self.cost[row, nodes], kind="stable")[:most]].tolist())

    def _unread(self, row: int) -> list[int]:
        return np.flatnonzero(~self.is_read[row]).tolist()

    def _pass(self, nodes: Sequence[Sequence[int]]) -> None:
        """Read some nodes of each line, parents before children, as many lines at a time as make a pass."""
        width = max(map(len, nodes))
        if width == 0:
            return
        wanted = np.full((len(nodes), width), -1)
        for line, some in enumerate(nodes):
            wanted[line, : len(some)] = some
        self.columns = np.concatenate([self.columns, wanted], axis=1)
        step = max(1, TOKENS_PER_PASS // width)
        for start in range(0, len(nodes), step):
            lines = slice(start, start + step)
            self._follow(wanted[lines], self._logits(lines, wanted[lines]), first=start)

    def _logits(self, lines: slice, wanted: np.ndarray) -> torch.Tensor:
        """Of each wanted node, (b, width, V)."""
        device = self.prompt.device
        mask = self.prompt[lines]
        sees = self.trie.sees[wanted[:, :, None], self.columns[lines][:, None, :]]  # (b, width, columns)
        sees = torch.from_numpy(sees).to(device)
        seen = torch.cat([mask.bool()[:, None].expand(-1, wanted.shape[1], -1), sees], dim=-1)
        positions = mask.sum(dim=-1, keepdim=True) + torch.from_numpy(self.trie.depths[wanted] - 1).to(device)
        ids = torch.from_numpy(self.trie.tokens[wanted]).to(device)
        return self.read.forward(lines, ids, seen[:, None], positions, keep=wanted.shape[1])

    def _follow(self, wanted: np.ndarray, logits: torch.Tensor, *, first: int = 0) -> None:
        """Take what the logits of some nodes, (b, width, V), say of the nodes and labels behind them."""
        logits = logits.float()
        chosen = logits[..., torch.tensor(self.trie.vocabulary, device=logits.device)]
        costs = (logits.logsumexp(dim=-1, keepdim=True) - chosen).double().cpu().numpy()  # (b, width, U)
        for line, (nodes, of_line) in enumerate(zip(wanted, costs, strict=True), start=first):
            row = self.present[line]
            for node, cost in zip(nodes, of_line, strict=True):
                if node < 0:
                    continue
                self.is_read[row, node] = True
                for behind, found in ((self.trie.nodes_behind, self.cost), (self.trie.labels_behind, self.nll)):
                    places, columns = behind[node]
                    found[row, places] = self.cost[row, node] + cost[columns]
