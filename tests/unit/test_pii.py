"""Personal data and secrets: what is found, what is not, and that looking is quick. All values are invented."""

import random
import string
import time

import pytest

from stages.lib import pii

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIBOgIBAAJBAKj34Gky\nFXt9\n-----END RSA PRIVATE KEY-----"
HIDDEN = [  # kind, what stands in the text; parts are joined so that no scanner takes this file for a leak
    ("email", "Ada.Lovelace+notes@mail.example.co.uk"),
    ("email", "jörg@example.de"),
    ("phone", "+49 30 901820"),
    ("phone", "+1 (415) 555-0123"),
    ("phone", "(415) 555-0123"),
    ("phone", "415-555-0123"),
    ("phone", "020 7946 0958"),
    ("phone", "01 23 45 67 89"),
    ("phone", "0044 20 7946 0958"),
    ("card", "4111 1111 1111 1111"),
    ("card", "4111-1111-1111-1111"),
    ("card", "5555555555554444"),
    ("card", "378282246310005"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB29NWBK60161331926819"),
    ("iban", "MT84 MALT 0110 0001 2345 MTLC AST0 01S"),
    ("key", "AKIA" + "IOSFODNN7EXAMPLE"),
    ("key", "ghp_" + "a1B2" * 9),
    ("key", "github_pat_" + "11AB_c" * 6),
    ("key", "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"),
    ("key", "sk-" + "proj-abc_DEF-0123456789xyz"),
    ("key", "xoxb-" + "123456789012-abcdefABCDEF"),
    ("key", "AIza" + "Sy" + "a0_-B" * 6 + "abc"),
    ("key", "eyJ" + "hbGciOiJIUzI1" + ".eyJ" + "zdWIiOiIxMjM0" + ".SflKxwRJ_adQssw"),
    ("key", PEM),
]


@pytest.mark.parametrize(("kind", "value"), HIDDEN)
def test_each_kind_is_found_where_it_stands(kind: str, value: str) -> None:
    text = f"Please take {value}, thanks"
    assert [(one.kind, text[one.start : one.end]) for one in pii.found(text)] == [(kind, value)]


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # fails Luhn's check
        "0000 0000 0000 0000",
        "DE88 3704 0044 0532 0130 00",  # fails mod 97
        "XX89 3704 0044 0532 0130 00",  # no such country
        "on 2021-03-04 10:20:30, 02.03.2021 and 01-02-2003",
        "array([[0.4111111111111111, 1.25], [100, 200]]), 192.168.100.200",
        "1 000 000 rows in 1700000000000 ms, ISBN 978-3-16-148410-0",
        "numpy 1.26.4, 12345678, 3.14159265358979323846",
        "x = a @ b; @decorator",
        "task-scheduling-with-many-words-in-it risk-adjusted-return-0123456789-x",
        "sk-learn-is-written-with-many-dashes",
        "key: the_quick_brown_fox_jumps; max_tokens = 100000000000000000",
        "sha256=9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ],
)
def test_numbers_code_and_dates_are_not_taken_for_personal_data(text: str) -> None:
    assert pii.found(text) == []


@pytest.mark.parametrize(
    "line", ['api_key = "{}"', "API-KEY: {}", '{{"auth_token": "{}"}}', "export DB_PASSWORD={}", "secret => '{}'"]
)
def test_what_is_assigned_to_the_name_of_a_secret_is_one(line: str) -> None:
    value = "Zx81" + "qwErty" * 3 + "09"
    text = line.format(value)
    assert [(one.kind, text[one.start : one.end]) for one in pii.found(text)] == [("key", value)]


def test_what_is_a_card_or_an_account_is_no_phone_number_too() -> None:
    text = "DE89 3704 0044 0532 0130 00 or 4111 1111 1111 1111, call +49 30 901820"
    assert [one.kind for one in pii.found(text)] == ["iban", "card", "phone"]


def test_an_account_ends_where_its_country_says() -> None:
    text = "DE89 3704 0044 0532 0130 00 IS MINE"
    assert pii.redacted(text, pii.found(text)) == "<iban> IS MINE"


def test_redaction_puts_the_kind_in_place_and_leaves_the_rest() -> None:
    text = f"From a@b.example to c@d.example:\n{PEM}\nend"
    assert pii.redacted(text, pii.found(text)) == "From <email> to <email>:\n<key>\nend"


def test_a_key_that_was_cut_off_is_redacted_to_its_end() -> None:
    text = "-----BEGIN PRIVATE KEY-----\nMIIBOgIBAAJBAKj34Gky"
    assert pii.redacted(text, pii.found(text)) == "<key>"


def test_the_quick_look_never_misses_what_the_closer_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, missed, held = pii.may_hold, [], 0
    monkeypatch.setattr(pii, "may_hold", lambda text: True)
    chance = random.Random(0)
    for _, value in HIDDEN:
        for _ in range(20):
            cut = chance.randrange(len(value)) if chance.random() < 0.3 else len(value)
            around = "".join(chance.choices(string.ascii_letters + string.digits + " \n.,:-", k=8))
            text = f"{around}{chance.choice(' (')}{value[:cut]}{chance.choice(' ).')}{around}"
            if pii.found(text):
                held += 1
                missed += [] if quick(text) else [text]
    assert held > 200
    assert missed == []


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "a@",
        "+1",
        "1",
        "00",
        "0 ",
        "A1",
        "eyJa.",
        "-----BEGIN PRIVATE KEY-----",
        "key=",
        "sk-",
        "+1(2",
        "3782 ",
        "DE12 ",
        "a@b.example ",
    ],
)
def test_hostile_repetition_takes_no_longer_than_a_moment(piece: str) -> None:
    text = piece * (16_000 // len(piece))
    started = time.process_time()
    pii.found(text)
    assert time.process_time() - started < 1
