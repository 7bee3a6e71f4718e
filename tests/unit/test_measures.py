"""Measures: literals checked by eye, the reference implementations, and answers that must not win."""

import json
import math
import string
from collections import Counter
from statistics import mean

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from stages.lib.measures import OF_JSON, SCORES, applicable, classification, json_schema, json_text, likelihood

REFERENCE = '{"x": "int", "axis": "int, optional"}'
PROMPT = "Give the parameters as JSON.\n\nx : int\naxis : int, optional\n"


@pytest.mark.parametrize(
    ("answer", "exact", "valid", "schema", "field", "token", "rouge", "bleu", "chrf"),
    [
        (REFERENCE, 1, 1, 1, 1, 1, 1, 1, 1),
        ('{"axis":"int,  optional","x":"int"}', 0, 1, 1, 1, 0, 0.6, 0.8315, 0.8573),  # other order and spacing
        ('{"x": "int", "axis": "int"}', 0, 1, 1, 0.5, 0.8889, 0.8889, 0.8121, 0.6946),
        ('{"x": "int"}', 0, 1, 0, 0.6667, 0.5714, 0.5714, 0.3026, 0.2965),
        ('{"x": "int", "x": "int", "axis": "int, optional"}', 0, 1, 0, 0.8, 0.8333, 0.8333, 0.6855, 0.9383),
        ('{"x": 1, "axis": "int, optional"}', 0, 1, 0, 0.5, 0.8, 0.8, 0.7363, 0.7703),  # wrong kind
        (f"```json\n{REFERENCE}\n```", 0, 0, 0, 0, 0.9091, 0.9091, 0.7136, 0.9383),  # of no use to a program
        ("", 0, 0, 0, 0, 0, 0, 0, 0),
        ("{}", 0, 1, 0, 0, 0, 0, 0.0001, 0.0373),  # valid and empty: the others see through it
        ("[1]", 0, 0, 0, 0, 0, 0, 0, 0),
        ("NaN", 0, 0, 0, 0, 0, 0, 0, 0.0123),
    ],
)
def test_measures_give_figures_worked_out_by_hand_and_those_of_ngrams_the_recorded_ones(
    answer, exact, valid, schema, field, token, rouge, bleu, chrf
):
    found = [round(SCORES[name](answer, REFERENCE), 4) for name in applicable([REFERENCE])]
    expected = [exact, valid, schema, field, token, rouge, bleu, chrf]
    assert found == expected


MAIN = ("exact_match", "field_f1", "json_schema", "accuracy")
QUESTIONS = {  # prompt -> right answer; of a task with JSON answers, one of sentences, and one of labels
    "json": {
        "Give the parameters.\n\nx : int\naxis : int, optional": REFERENCE,
        "Give the parameters.\n\ny : float": '{"y": "float"}',
        "Give the parameters.\n\nn : int\nseed : int or None": '{"n": "int", "seed": "int or None"}',
        "Give the parameters.\n\nNone": "{}",
    },
    "text": {
        "Say it in a line.\n\nThe sum of the elements over an axis, ...": "Sum of array elements.",
        "Say it in a line.\n\nDraw samples from a normal distribution": "Draw random samples.",
        "Say it in a line.\n\nA test of the hypothesis that both are equal": "Test whether two means are equal.",
        "Say it in a line.\n\n1/3 of it": "1/3 of it is left!",
    },
    "label": {
        "Name the class.\n\nWhere is my card? card_arrival?": "card_arrival",
        "Name the class.\n\nIt was swallowed": "card_swallowed",
        "Name the class.\n\nHow old must I be?": "age_limit",
        "Name the class.\n\nThere was a charge": "cash_withdrawal_charge",
    },
}
JUDGING = [(task, name) for task in ("json", "text") for name in applicable(list(QUESTIONS[task].values()))]
JUDGING += [("label", name) for name in applicable([], of_labels=True)]


@pytest.mark.parametrize(("task", "name"), [each for each in JUDGING if each[1] != "json_valid"])
def test_an_empty_a_constant_or_a_copied_answer_never_comes_near_the_right_ones(task: str, name: str) -> None:
    questions = QUESTIONS[task]
    references = list(questions.values())
    score = SCORES[name]
    right = mean(score(reference, reference) for reference in references)
    constants = ["", "{}", ".", " ", "the", "null", *references, " ".join(references), string.printable]
    lazy = {repr(constant): mean(score(constant, reference) for reference in references) for constant in constants}
    lazy["the prompt"] = mean(score(prompt, reference) for prompt, reference in questions.items())
    lazy["its text"] = mean(score(prompt.partition("\n\n")[2], reference) for prompt, reference in questions.items())
    assert right == pytest.approx(1)
    limit = 0.5 if name in MAIN else 0.8  # words copied from a prompt that holds the answer are words of the answer
    assert max(lazy.values()) < limit, lazy


@pytest.mark.parametrize(("task", "name"), JUDGING)
def test_no_answer_beats_the_right_one(task: str, name: str) -> None:
    for prompt, reference in QUESTIONS[task].items():
        for answer in ("", "{}", prompt, reference + reference, *QUESTIONS[task].values()):
            assert SCORES[name](answer, reference) <= SCORES[name](reference, reference) + 1e-9


@pytest.mark.parametrize("name", [name for name in SCORES if name not in OF_JSON])
def test_an_empty_answer_is_worth_nothing_to_any_measure_of_text(name: str) -> None:
    assert SCORES[name]("", "Sum of array elements.") == SCORES[name]("Sum of array elements.", "") == 0


def test_json_validity_says_nothing_of_content_and_so_never_stands_alone() -> None:
    assert SCORES["json_valid"]("{}", REFERENCE) == 1
    names = applicable([REFERENCE])
    assert {"json_schema", "field_f1"} <= set(names)


ANSWERS = [
    "Sum of elements.",
    "The sum, of the array's elements over an axis!",
    "Nothing",
    "1/3",
    "a an the",
    "Ünïcode ok",
]
REFERENCES = ["Sum of array elements.", "Sum over an axis.", "nothing.", "a third: 1/3", "The array", "Ünïcode, ok"]


def test_measures_of_text_equal_the_reference_implementations() -> None:
    rouge, bleu, chrf = rouge_scorer.RougeScorer(["rougeL"]), BLEU(effective_order=True), CHRF()
    for answer, reference in zip(ANSWERS, REFERENCES, strict=True):
        assert SCORES["rouge_l"](answer, reference) == rouge.score(reference, answer)["rougeL"].fmeasure
        assert SCORES["bleu"](answer, reference) == bleu.sentence_score(answer, [reference]).score / 100
        assert SCORES["chrf"](answer, reference) == chrf.sentence_score(answer, [reference]).score / 100


def test_bleu_is_the_geometric_mean_of_ngram_precisions_and_chrf_the_f2_of_character_ngrams() -> None:
    answer, reference = "the cat sat on the mat", "the cat sat on a mat"
    assert SCORES["bleu"](answer, reference) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    short = "the cat sat on"  # every n-gram is right, but two words are missing
    assert SCORES["bleu"](short, reference) == pytest.approx(math.exp(1 - 6 / 4))
    assert SCORES["chrf"](answer, reference) == pytest.approx(plain_chrf(answer, reference))


def plain_chrf(answer: str, reference: str) -> float:
    """chrF2 by its definition (Popovic, 2015): precision and recall, each a mean over orders, without white space."""
    shares = []
    for n in range(1, 7):
        found, expected = (
            Counter(bare[i : i + n] for i in range(len(bare) - n + 1))
            for bare in (text.replace(" ", "") for text in (answer, reference))
        )
        right = (found & expected).total()
        shares.append((right / found.total(), right / expected.total()))
    precision, recall = (mean(column) for column in zip(*shares, strict=True))
    return 5 * precision * recall / (4 * precision + recall)


def squad_f1(prediction: str, truth: str) -> float:
    """f1_score of the official evaluate-v1.1.py, in its own words."""

    def normalize_answer(s: str) -> str:
        import re

        def remove_articles(text: str) -> str:
            return re.sub(r"\b(a|an|the)\b", " ", text)

        def white_space_fix(text: str) -> str:
            return " ".join(text.split())

        def remove_punc(text: str) -> str:
            exclude = set(string.punctuation)
            return "".join(ch for ch in text if ch not in exclude)

        return white_space_fix(remove_articles(remove_punc(s.lower())))

    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(truth).split()
    common = Counter(prediction_tokens) & Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def test_token_f1_equals_that_of_the_official_squad_script() -> None:
    for answer in (*ANSWERS, ""):
        for reference in REFERENCES:
            assert SCORES["token_f1"](answer, reference) == pytest.approx(squad_f1(answer, reference))
    assert SCORES["token_f1"]("...", "...") == 1  # the same text, though no word is left of it
    assert SCORES["token_f1"](".", "the") == SCORES["token_f1"]("", ".") == 0


def test_measures_of_labels_equal_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    names = np.array(["a", "b", "c", "d", "only predicted"])
    labels, predicted = names[random.integers(0, 4, 200)], names[random.integers(0, 5, 200)]
    found = classification.confusion(labels.tolist(), predicted.tolist())
    assert found.labels == sorted(names)
    assert (found.counts == confusion_matrix(labels, predicted)).all()
    expected = f1_score(labels, predicted, average="macro", zero_division=0)
    assert classification.macro_f1(labels.tolist(), predicted.tolist()) == pytest.approx(expected)
    codes = [np.searchsorted(found.labels, each) for each in (labels, predicted)]
    assert classification.macro_f1(*codes) == pytest.approx(expected)
    rows = [SCORES["accuracy"](*row) for row in zip(predicted.tolist(), labels.tolist(), strict=True)]
    assert mean(rows) == pytest.approx(accuracy_score(labels, predicted))


def test_a_constant_label_has_the_accuracy_of_its_share_and_nearly_no_macro_f1() -> None:
    labels = ["common"] * 90 + ["rare"] * 5 + ["rarer"] * 5
    assert classification.macro_f1(labels, ["common"] * 100) == pytest.approx((2 * 90 / 190) / 3)
    assert classification.macro_f1(labels, labels) == 1


def test_mistakes_are_listed_by_how_often_they_are_made() -> None:
    found = classification.confusion(list("aaabbc"), list("abbbac"))
    assert found.mistakes() == [("a", "b", 2), ("b", "a", 1)]


def test_perplexity_and_bits_per_byte_are_those_of_a_uniform_choice() -> None:
    nll = 10 * math.log(8)  # ten tokens, each one of eight that are equally likely: 3 bits a token
    assert likelihood.perplexity(nll, 10) == pytest.approx(8)
    assert likelihood.bits_per_byte(nll, 15) == pytest.approx(2)


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ('{"n": 2.5, "of": {"a": null}, "names": ["c", "d"], "is": false}', True),  # other values of the same kinds
        ('{"is": false, "names": ["c"], "of": {"a": null}, "n": 0}', True),  # in another order
        ('{"n": "1", "of": {"a": null}, "names": ["c"], "is": false}', False),  # a string for a number
        ('{"n": 1, "of": {"a": null}, "names": ["c"], "is": 0}', False),  # a number for a boolean
        ('{"n": 1, "of": {"b": null}, "names": ["c"], "is": true}', False),  # another key inside
        ('{"n": 1, "of": {"a": null}, "names": [1], "is": true}', False),  # an item of another kind
        ('{"n": 1, "of": {"a": null}, "names": [], "is": true}', False),  # empty where the reference is not
        ('{"n": 1, "of": [["a", null]], "names": ["c"], "is": true}', False),  # an array for an object
        ('{"n": 1, "of": {"a": null}, "names": ["c"], "is": true, "is": true}', False),  # a key twice
        ('{"n": 1, "of": {"a": null}, "names": ["c"]}', False),
    ],
)
def test_an_answer_fits_the_schema_when_it_has_the_references_keys_and_kinds_of_values(answer: str, fits: bool) -> None:
    reference = json.dumps({"n": 1, "of": {"a": None}, "names": ["c"], "is": True})
    assert json_schema.score(answer, reference) == fits


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"accuracy"}))
def test_a_perfect_answer_scores_one_and_white_space_around_it_costs_nothing(name: str) -> None:
    assert SCORES[name](f"\n{REFERENCE} ", REFERENCE) == pytest.approx(1, abs=0.02)
    assert SCORES[name](REFERENCE, REFERENCE) == pytest.approx(1)


def test_measures_apply_where_they_mean_something() -> None:
    text = ["exact_match", "token_f1", "rouge_l", "bleu", "chrf"]
    assert applicable([REFERENCE, "{}"]) == ["exact_match", "json_valid", "json_schema", "field_f1", *text[1:]]
    assert applicable([REFERENCE, "Return the sum."]) == text
    assert applicable(["yes", "no"], of_labels=True) == ["exact_match", "accuracy"]


def test_an_object_nested_too_deep_to_read_is_no_json_object_rather_than_a_crash() -> None:
    assert json_text.read_object('{"a":' * 100_000) is None


def test_the_evaluate_library_gives_the_scores_of_every_row() -> None:
    from stages.lib.measures import library

    found = library.score_rows(["exact_match", "field_f1"], [REFERENCE, '{"x": "int"}'], [REFERENCE, REFERENCE])
    assert found == {"exact_match": [1, 0], "field_f1": [1, pytest.approx(2 / 3)]}
