"""Languages: clear ones are named, short and mixed texts are not judged."""

import pytest

from stages.lib import languages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The harvest was late this year because of the rain.", "en"),
        ("Die Ernte kam dieses Jahr wegen des Regens spät.", "de"),
        ("La récolte a été tardive cette année à cause de la pluie.", "fr"),
        ("今年は雨のせいで収穫が遅れました。農家の人々はとても困っています。", "ja"),
        ("THE HARVEST WAS LATE\r\nTHIS YEAR BECAUSE OF THE RAIN", "en"),
    ],
)
def test_a_clear_text_has_its_language(text: str, expected: str) -> None:
    assert languages.language(text) == expected


@pytest.mark.parametrize("text", ["", "Oui, merci.", "1234567890 " * 20, "x = f(y); z[0] += 1"])
def test_what_is_too_short_to_say_has_none(text: str) -> None:
    assert languages.language(text) is None
