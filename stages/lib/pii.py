"""Personal data and secrets in a text: where they stand, by kind. What was found is never shown or logged.

    kind    what is found                                                        what is missed, among others
    email   name@host.tld                                                        "name at host dot com"
    phone   +49 ..., (415) 555-0123, 020 7946 0958                               digits without +, blank or hyphen
    card    13 to 19 digits that pass Luhn's check, first digit 2 to 6           other groups than of four (Amex: 4 6 5)
    iban    of the countries in the registry, length and mod 97 checked          in small letters
    key     tokens of AWS, GitHub, GitLab, Hugging Face, OpenAI, Anthropic,      short passwords; keys of other services
            Slack, Stripe, Google; JWT; private keys in PEM; api_key = "..."     that nothing names

Regular expressions know no names: persons, addresses, dates of birth and account numbers of other forms stay.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Found(NamedTuple):
    """Where something of a kind stands: text[start:end]."""

    start: int
    end: int
    kind: str


KEY_MARKS = (  # every key has one of these in it: looking for them is what most texts cost
    "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "hf_", "sk-", "k_live_", "xox",
    "AIza", "eyJ", "PRIVATE KEY",
)  # fmt: skip
_NUMBERS = re.compile(  # how every card, phone number and IBAN goes on from its first digit
    r"[0-9](?:[0-9 ().\xa0-]{6,}|(?<=[A-Z]{2}[0-9])[0-9][ \xa0-]?[A-Z0-9]{2})"
)
_KEY = re.compile(
    r"""
      (?<![A-Za-z0-9])(?:
        A(?:KI|SI)A[A-Z0-9]{16}(?![A-Za-z0-9])
      | gh[oprsu]_[A-Za-z0-9]{36,255}
      | github_pat_[A-Za-z0-9_]{22,255}
      | glpat-[A-Za-z0-9_-]{20,255}
      | hf_[A-Za-z0-9]{30,255}
      | sk-(?=[A-Za-z_-]{0,255}[0-9])[A-Za-z0-9_-]{20,255}
      | [rs]k_live_[A-Za-z0-9]{16,255}
      | xox[abeoprs]-[A-Za-z0-9-]{10,255}
      | AIza[A-Za-z0-9_-]{35}
      | eyJ[A-Za-z0-9_-]{8,4096}\.eyJ[A-Za-z0-9_-]{8,8192}(?:\.[A-Za-z0-9_-]{0,4096})?
      )
    | -----BEGIN[ ](?:[A-Z]{1,20}[ ]){0,3}PRIVATE[ ]KEY-----
      (?:[\s\S]{0,8192}?-----END[ ](?:[A-Z]{1,20}[ ]){0,3}PRIVATE[ ]KEY-----|(?:[A-Za-z0-9+/=\s]|\\n){0,8192})
    """,
    re.VERBOSE,
)
_ASSIGNED = re.compile(r"[:=>][ \t]{0,4}[\"']?(?P<value>[A-Za-z0-9_/+=-]{16,512})")
_NAME_OF_A_SECRET = re.compile(r"(?:key|token|secret|passw(?:or)?d)[\"']?[ \t]{0,4}[:=]?\Z", re.IGNORECASE)
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_PHONE = re.compile(
    r"""
    (?<![\w.+-])(?<![0-9][ .\xa0-])(?:
      (?:\+|00)[1-9][0-9]{0,2}(?:[ .\xa0-]?\(?[0-9]{1,5}\)?){1,6}
    | (?:1[ .-])?(?:\([2-9][0-9]{2}\)[ ]?|[2-9][0-9]{2}(?P<us>[ .-]))[2-9][0-9]{2}(?(us)(?P=us)|[ .-])[0-9]{4}
    | 0[0-9]{1,4}(?P<trunk>[ -])[0-9]{2,8}(?:(?P=trunk)[0-9]{2,8}){0,3}
    | \(0[0-9]{1,4}\)[ ]?[0-9]{2,8}(?:[ -][0-9]{2,8}){0,3}
    )(?![ .-]?[0-9])(?!\w)
    """,
    re.VERBOSE,
)
_CARD = re.compile(
    r"""
    (?<![\w.-])(?<![0-9][ -])(?:
      3[47][0-9]{2}(?P<amex>[ -]?)[0-9]{6}(?P=amex)[0-9]{5}
    | [2-6][0-9]{3}(?P<sep>[ -]?)[0-9]{4}(?P=sep)[0-9]{4}(?P=sep)[0-9]{1,7}
    )(?![.-]?[0-9])(?!\w)
    """,
    re.VERBOSE,
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}[ \xa0-]?[A-Z0-9]{2}(?:[ \xa0-]?[A-Z0-9]){9,34}")
_IBAN_LENGTH = dict(
    (entry[:2], int(entry[2:]))
    for entry in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
        "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 "
        "LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 "
        "QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
    ).split()
)


def found(text: str) -> list[Found]:
    """Everything of any kind, in the order of the text, without overlaps: what is a card is no phone number."""
    if not may_hold(text):
        return []
    taken, places = [], bytearray(len(text))
    for one in _candidates(text):
        if places.find(1, one.start, one.end) < 0:
            places[one.start : one.end] = b"\1" * (one.end - one.start)
            taken.append(one)
    return sorted(taken)


def may_hold(text: str) -> bool:
    """Whether a closer look is worth it: cheap, and never wrong in saying no."""
    return "@" in text or bool(_NUMBERS.search(text)) or _has_key_mark(text) or bool(_ASSIGNED.search(text))


def _has_key_mark(text: str) -> bool:
    for mark in KEY_MARKS:  # a generator for any() costs more than the search itself
        if mark in text:
            return True
    return False


def redacted(text: str, spans: list[Found]) -> str:
    """The text with each span replaced by its kind: "write to <email>"."""
    parts, end = [], 0
    for one in spans:
        parts += [text[end : one.start], f"<{one.kind}>"]
        end = one.end
    return "".join(parts) + text[end:]


def _candidates(text: str) -> Iterator[Found]:
    """Of each kind, the kinds in the order in which they win where they overlap."""
    if _has_key_mark(text):
        yield from (Found(*match.span(), "key") for match in _KEY.finditer(text))
    for match in _ASSIGNED.finditer(text):
        if _is_secret(text[max(0, match.start() - 40) : match.start()], match["value"]):
            yield Found(*match.span("value"), "key")
    if "@" in text:
        yield from (Found(*match.span(), "email") for match in _EMAIL.finditer(text))
    for match in _IBAN.finditer(text):
        if end := _iban_end(match.group()):
            yield Found(match.start(), match.start() + end, "iban")
    for match in _CARD.finditer(text):
        if _passes_luhn(match.group()):
            yield Found(*match.span(), "card")
    for match in _PHONE.finditer(text):
        if _has_length_of_a_phone(match.group()):
            yield Found(*match.span(), "phone")


def _is_secret(name: str, value: str) -> bool:
    """Whether `api_key` = `value` gives a secret away: letters and digits mixed, as words and names rarely are."""
    is_mixed = sum(sign.isdigit() for sign in value) >= 2 and any(sign.isalpha() for sign in value)
    return is_mixed and bool(_NAME_OF_A_SECRET.search(name))


def _passes_luhn(card: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1): every second digit from the right doubled, digits summed, a multiple of 10."""
    digits = [int(digit) for digit in reversed(card) if digit.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return 13 <= len(digits) <= 19 and (sum(digits[::2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def _iban_end(text: str) -> int:
    """Characters of the IBAN that `text` begins with, as long as its country says; 0 when there is none (ISO 13616)."""
    length = _IBAN_LENGTH.get(text[:2], 0)
    places = [place for place, sign in enumerate(text) if sign.isalnum()]
    if not length or len(places) < length:
        return 0
    end = places[length - 1] + 1
    iban = "".join(text[place] for place in places[:length])
    if len(places) > length and places[length] == end:  # goes on without a blank: something longer
        return 0
    return end if int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97 == 1 else 0


def _has_length_of_a_phone(number: str) -> bool:
    """8 to 15 digits (ITU-T E.164) behind a +, 9 to 12 without."""
    digits = sum(sign.isdigit() for sign in number)
    return 8 <= digits <= 15 if number.startswith(("+", "00")) else 9 <= digits <= 12
