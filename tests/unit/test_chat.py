"""Chats as tokens and labels: what is trained is the answers and the tokens that end them, and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from stages.lib import chat
from stages.lib.errors import ModelError
from stages.lib.schema.pack import ControlTokens

USER, ANSWER = {"role": "user", "content": "add 1 2"}, {"role": "assistant", "content": "3"}
TWO_TURNS = [USER, ANSWER, {"role": "user", "content": "add 4 5"}, {"role": "assistant", "content": "the quick 9"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return chat.load_tokenizer(tiny_model_dir)


def labelled(tokenizer: Any, encoded: chat.Encoded) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != chat.IGNORED])


def test_every_answer_and_the_token_that_ends_it_are_labelled_and_nothing_else(tokenizer: Any) -> None:
    encoded = chat.encode(tokenizer, TWO_TURNS)
    assert labelled(tokenizer, encoded) == "3<|im_end|>the quick 9<|im_end|>"
    assert all(label in (chat.IGNORED, i) for i, label in zip(encoded.input_ids, encoded.labels, strict=True))


def test_the_end_of_a_prompt_is_not_trained_although_it_has_the_same_id(tokenizer: Any) -> None:
    encoded = chat.encode(tokenizer, TWO_TURNS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id == end
    assert encoded.input_ids.tolist().count(end) == 4
    assert encoded.labels.tolist().count(end) == 2


def test_ids_are_those_of_the_rendered_text_with_the_templates_own_system_turn(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    own_turn = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nnothing at all<|im_end|>\n' }}{% endif %}"
    )
    tokenizer.chat_template = own_turn + tokenizer.chat_template
    encoded = chat.encode(tokenizer, TWO_TURNS)
    assert tokenizer.decode(encoded.input_ids).startswith(
        "<|im_start|>system\nnothing at all<|im_end|>\n<|im_start|>user"
    )
    assert encoded.input_ids.tolist() == chat.tokenize(tokenizer, chat.render(tokenizer, TWO_TURNS))
    assert labelled(tokenizer, encoded) == "3<|im_end|>the quick 9<|im_end|>"


def test_an_answer_is_trained_after_exactly_the_tokens_it_will_be_prompted_with(tokenizer: Any) -> None:
    encoded = chat.encode(tokenizer, TWO_TURNS)
    for n_messages in (1, 3):
        prompt = chat.prompt_ids(tokenizer, TWO_TURNS[:n_messages])
        assert encoded.input_ids[: len(prompt)].tolist() == prompt
        assert encoded.labels[len(prompt) - 1] == chat.IGNORED
        assert encoded.labels[len(prompt)] != chat.IGNORED


@pytest.mark.parametrize("messages", [[USER], [ANSWER, USER], []])
def test_a_conversation_that_answers_nothing_is_unusable(tokenizer: Any, messages: list[Any]) -> None:
    with pytest.raises(chat.UnusableConversation, match="without an assistant turn") as fault:
        chat.encode(tokenizer, messages)
    assert fault.value.reason == "no_answer"


@pytest.mark.parametrize("place", [0, 1])
def test_a_control_token_in_the_content_is_unusable_where_such_rows_are_dropped(tokenizer: Any, place: int) -> None:
    messages = [dict(USER), dict(ANSWER)]
    messages[place]["content"] = "so <|im_end|> what"
    with pytest.raises(chat.UnusableConversation, match=r"control token '<\|im_end\|>'") as fault:
        chat.encode(tokenizer, messages, control_tokens=ControlTokens.drop)
    assert fault.value.reason == "control_token"


def test_a_template_that_rewrites_earlier_turns_is_noticed(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(chat.UnusableConversation, match="writes earlier turns differently") as fault:
        chat.encode(tokenizer, TWO_TURNS)
    assert fault.value.reason == "template"


def test_a_conversation_that_the_template_refuses_is_unusable(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    with pytest.raises(chat.UnusableConversation, match="refuses it: no system role") as fault:
        chat.encode(tokenizer, [{"role": "system", "content": "be brief"}, *TWO_TURNS])
    assert fault.value.reason == "template"
    assert chat.encode(tokenizer, TWO_TURNS)


def test_a_template_that_ends_no_turn_is_noticed(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    with pytest.raises(chat.UnusableConversation, match="without a special token"):
        chat.encode(tokenizer, TWO_TURNS)


def test_a_token_across_the_border_of_prompt_and_answer_is_noticed(tiny_model_dir: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model_dir)
    tokenizer.add_tokens(["\n\n"])
    with pytest.raises(chat.UnusableConversation, match="reaches across the border") as fault:
        chat.encode(tokenizer, [USER, {"role": "assistant", "content": "\n3"}])
    assert fault.value.reason == "boundary"


def test_answers_stop_at_the_end_of_turn_and_where_the_model_says_so(tokenizer: Any, tiny_model_dir: Path) -> None:
    assert chat.stop_ids(tokenizer, tiny_model_dir) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_folder_without_tokenizer_or_template_says_which_key_to_change(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: not found.*base_model\.id"):
        chat.load_tokenizer(tmp_path)
    bare = chat.load_tokenizer(tiny_model_dir)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no chat template.*prompt\.template"):
        chat.load_tokenizer(tmp_path)
