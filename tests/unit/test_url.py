"""A file at an address: fetched once, told by its sha256, and each refusal names its key."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from stages.lib.errors import ConfigError, ExternalError
from stages.lib.schema.data import Source
from stages.lib.sources import reading, url
from tests.data_settings import settings
from tests.hub_stub import COMMIT, serving

LINE = b'{"prompt": "2+2?", "completion": "4"}\n'
SHA256 = hashlib.sha256(LINE).hexdigest()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_is_fetched_once_and_read_like_any_other(tmp_path: Path) -> None:
    with serving() as served:
        served.files["datasets/maker/data"] = {"my.jsonl": LINE}
        address = f"{served.address}/datasets/maker/data/resolve/{COMMIT}/my.jsonl?download=1"
        data = settings(source=Source.url, url=address, sha256=SHA256)
        (block,) = reading.blocks(data)
    assert (block.name, block.content) == ("my.jsonl", LINE)
    assert list(reading.blocks(data)) == [block]  # nobody serves any more


def test_a_kept_file_that_was_changed_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_bytes(LINE)
    url.fetch(f"file://{tmp_path}/my.jsonl", SHA256).write_bytes(b"changed")
    assert url.fetch(f"file://{tmp_path}/my.jsonl", SHA256).read_bytes() == LINE


def test_a_member_of_an_archive_is_reached_by_a_chain(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "my.zip", "w") as archive:
        archive.writestr("my.jsonl", LINE)
    address = f"zip://my.jsonl::file://{tmp_path}/my.zip"
    assert url.fetch(address, SHA256).read_bytes() == LINE
    assert url.name(address) == "my.jsonl"


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_bytes(b"other")
    with pytest.raises(ExternalError, match=rf"has sha256 \w+, expected {SHA256}.*data\.sha256"):
        url.fetch(f"file://{tmp_path}/my.jsonl", SHA256)
    assert list(url.cache().iterdir()) == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file:///absent.jsonl", r"file:///absent\.jsonl: could not be fetched \(FileNotFoundError.*data\.url"),
        ("http://me:secret@127.0.0.1:9/my.jsonl?key=secret", r"http://127\.0\.0\.1:9/my\.jsonl: could not be fetched"),
    ],
)
def test_an_address_that_does_not_answer_is_one_message_without_secrets(address: str, message: str) -> None:
    with pytest.raises(ExternalError, match=message) as refused:
        url.fetch(address, SHA256)
    assert "secret" not in str(refused.value)


def test_an_unknown_kind_of_address_and_a_missing_package_are_told() -> None:
    with pytest.raises(ConfigError, match=r"data\.url: found 'htp://host/my\.jsonl'.*'htp' is none"):
        url.fetch("htp://host/my.jsonl", SHA256)
    with pytest.raises(ExternalError, match=r"s3:// needs a package.*s3fs.*make lock"):
        url.fetch("simplecache::s3://bucket/my.jsonl", SHA256)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://host/sets/chats.jsonl.gz?download=1#top", "chats.jsonl.gz"),
        ("s3://bucket/a%20b.csv", "a b.csv"),
        ("simplecache::s3://bucket/x.parquet", "x.parquet"),
        ("zip://sets/a.csv::https://host/all.zip", "a.csv"),
        ("/data/x.json", "x.json"),
    ],
)
def test_the_name_of_a_file_is_the_last_part_of_its_address(address: str, name: str) -> None:
    assert url.name(address) == name
