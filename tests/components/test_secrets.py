"""Secrets in a store's options: which are hidden, and what a message may hold."""

from __future__ import annotations

import json
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from components.corpora import CorpusSpec, PairSpec, SourceSpec, shown_spec
from components.secrets import HIDDEN, hidden_names, holds_secret, public, redacted, scrubbed, usable, without_secrets

SECRET = "S3cr3t/+=: &x"

PLAIN: dict[str, Any] = {
    "endpoint_url": "https://minio.example:9000",
    "anon": True,
    "region_name": "eu-north-1",
    "timeout": 5,
    "client_kwargs": {"endpoint_url": "http://127.0.0.1:9", "verify": False},
    "config_kwargs": {"signature_version": "s3v4", "s3": {"addressing_style": "path"}},
    "profile": None,
}


@pytest.mark.parametrize(
    "storage",
    [
        {"key": SECRET},
        {"secret": SECRET},
        {"token": SECRET},
        {"password": SECRET},
        {"PASSWD": SECRET},
        {"account_key": SECRET},
        {"sas_token": SECRET},
        {"connection_string": f"AccountName=a;AccountKey={SECRET};EndpointSuffix=x"},
        {"client_kwargs": {"aws_secret_access_key": SECRET, "region_name": "x"}},
        {"client_kwargs": {"headers": {"Authorization": f"Bearer {SECRET}"}}},
        {"headers": {"Cookie": SECRET}},
        {"endpoint_url": f"https://user:{SECRET}@minio:9000"},
        {"endpoint_url": f"https://{SECRET}@minio:9000"},
        {"client_kwargs": {"endpoint_url": f"https://minio/?X-Amz-Signature={SECRET}"}},
        {"endpoint": f"https://a.blob.core/c?sv=1&sig={SECRET}"},
        {"auth": ["user", SECRET]},
        {"clientSecret": SECRET},
        {"an_option_of_next_year": SECRET},
        {"proxies": {"https": f"http://u:{SECRET}@proxy"}},
        {"cookies": [{"name": "a", "value": SECRET}]},
    ],
)
def test_a_secret_is_in_no_file_no_digest_and_no_message(storage: dict[str, Any]) -> None:
    spec = CorpusSpec(name="a", sources=[SourceSpec(kind="tar", path="s3://b/x", storage={**PLAIN, **storage})])
    assert SECRET not in json.dumps([redacted(storage), public(storage), shown_spec(spec)])
    assert public({**storage, "anon": True}) == {**public(storage), "anon": True}
    assert hidden_names(storage) == [] and hidden_names(redacted({**storage, "password": "x" * 9}))
    assert usable(redacted(storage)) == public(storage)
    for message in (f"cannot open {storage}", f"{SECRET} is wrong", json.dumps(storage)):
        assert SECRET not in scrubbed(message, storage)
    assert spec.sources[0].storage == {**PLAIN, **storage}, "the job itself needs the secret"


def test_plain_options_stay() -> None:
    assert redacted(PLAIN) == public(PLAIN) == usable(PLAIN) == PLAIN
    assert hidden_names(PLAIN) == []
    assert redacted({"password": 123456, "port": 9000}) == {"password": redacted({"key": "x"})["key"], "port": 9000}


def test_addresses_with_secrets() -> None:
    hidden = ("https://u:p@h/x", "s3://KEY:SEC@bucket/x", "https://a/b?sv=1&sig=abc", "https://a/b?X-Amz-Signature=1")
    assert all(map(holds_secret, hidden))
    assert not any("SEC" in without_secrets(text) or "abc" in without_secrets(text) for text in hidden)
    plain = ("s3://b/*.tar", "hf://datasets/a/b@main/x", "github://o:r@main/x", "s3://b/key=3/x", "sftp://me@host/x")
    assert not any(map(holds_secret, plain))


@pytest.mark.parametrize(
    "address",
    [
        "https://SECRET@h/x.csv",
        "https://user%3ASECRET@h/x",
        "https://h/x?access_key=SECRET",
        "https://h/x?client_secret=SECRET&a=1",
        "https://h/x?refresh_token=SECRET",
        "https://h/x?credential=SECRET",
        "https://h/x?Policy=SECRET&Key-Pair-Id=K",
        "https://h/x?jwt=SECRET",
        "https://h/x?pwd=SECRET",
        "https://h/x?hdnea=SECRET",
        "https://h/x?auth=SECRET",
        "https://h/x#access_token=SECRET",
        "https://h/x?api-key=SECRET",
        "https://h/x?x-api-key=SECRET",
        "https://h/x?oauth_token=SECRET",
        "https://h/x?private_token=SECRET",
        "https://h/x?tempauth=SECRET",
        "https://h/x?authkey=SECRET",
        "https://h/x?resourcekey=SECRET",
        "https://h/x?q-ak=1&q-signature=SECRET",
        "https://h/x?hdnts=exp=1~hmac=SECRET",
        "https://h/x?__token__=exp=1~hmac=SECRET",
        "https://h/x?auth[token]=SECRET",
        "https://h/x?AccessKeyId=SECRET",
        "https://h/x?secretAccessKey=SECRET",
        "https://h/x?passcode=SECRET",
        "https://h/x;jsessionid=SECRET",
        "https://h/x?PHPSESSID=SECRET",
        "https://u:a/SECRET@h/x",
        "https://u:a?SECRET@h/x",
        "https://u:a#SECRET@h/x",
        "s3a://SECRET@b/x",
        "r2://SECRET@b/x",
        "gs://SECRET@b/x",
        "oss://id:SECRET@b/x",
        "sftp://me:SECRET@h/x",
        "smb://domain;me:SECRET@h/x",
        "simplecache::s3://key:SECRET@b/x",
        "webdav://SECRET@h/public.php",
        "github://SECRET@owner:repository@main/x",
        "github://me:SECRET@owner:repository@main/x",
    ],
)
def test_more_places_of_secrets_in_addresses(address: str) -> None:
    assert holds_secret(address) and "SECRET" not in without_secrets(f"cannot open {address}: no")
    assert "SECRET" not in json.dumps(redacted({"endpoint_url": address}))


def test_addresses_that_look_like_secrets_stay() -> None:
    for address in (
        "sftp://me@host/x",
        "https://h/@user/x?author=me&passage=2&tokenizer=x&keyword=y&assignment=z",
        "hf://datasets/a/b@main/x",
        "hf://gpt2@main/x",
        "abfs://container@account.dfs.core.windows.net/x",
        "http://127.0.0.1:9000/a/b@2x.png",
        "http://[::1]:9000/a@2x.png",
        "github://owner:repository@main/x",
    ):
        assert without_secrets(address) == address


def test_paths_of_sources_and_pairs_are_shown_without_secrets() -> None:
    path = "s3://KEY:SECRET@bucket/x"
    spec = CorpusSpec(name="a", sources=[SourceSpec(path=path)], pairs=[PairSpec(hq=path, lq=path), PairSpec(lq="a#b")])
    assert "SECRET" not in json.dumps(shown_spec(spec)) and spec.pairs[0].hq == path
    assert shown_spec(spec)["pairs"][1]["lq"] == "a#b"


def test_an_endpoint_with_a_query_is_not_shown() -> None:
    assert SECRET not in json.dumps(redacted({"endpoint_url": f"https://h/?code={SECRET}", "pin": 4711, "ticket": 12}))
    assert redacted({"pin": 4711, "ticket": 12}) == {"pin": HIDDEN, "ticket": HIDDEN}


@pytest.mark.parametrize("secret", ['a"b\\c&<1>', "päß wörd", "line\nbreak", "it's me"])
def test_a_secret_is_found_in_every_form_of_a_message(secret: str) -> None:
    data = secret.encode()
    forms = (secret, json.dumps(secret), ascii(secret), repr(data), escape(secret), quote(secret), quote_plus(secret))
    for form in (*forms, escape(secret, quote=False), b64encode(data).decode(), json.dumps(secret, ensure_ascii=False)):
        shown = scrubbed(f"it says {form} here", {"password": secret})
        core = form.strip("b\"'")
        assert core not in shown and shown.startswith("it says ") and shown.endswith(" here")


@pytest.mark.parametrize(
    "message",
    [
        "headers={'Authorization': 'Basic bWU6U0VDUkVU'}",
        'headers={"Proxy-Authorization": "Bearer SECRET"}',
        "authorization=SECRET",
        "Illegal header value b'Bearer SECRET123'",
    ],
)
def test_headers_in_messages_lack_their_values(message: str) -> None:
    shown = scrubbed(f"cannot connect: {message}, again", {})
    assert "SECRET" not in shown and "U0VDUkVU" not in shown and shown.endswith("again")
    for plain in ("basic authentication is off", "the bearer of bad news", "Authorization failed for x"):
        assert scrubbed(plain, {}) == plain


def test_secrets_of_the_environment_are_not_in_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("SOME_TOKEN", "short")
    message = f"refused: {quote(SECRET, safe='')} with {tmp_path}, in short"
    assert scrubbed(message, {}) == f"refused: ... with {tmp_path}, in short"
