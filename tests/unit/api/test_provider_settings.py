"""External providers as they are configured: what is understood, and that everything else stops the start."""

import json
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from api.settings import BadSettings, Settings, as_environment, load
from fabric.identity.providers import Provider
from topology import enrollment, names

LEAST = {
    "issuer": "https://idp.example/realms/a",
    "audience": "restante",
    "jwks_url": "https://idp.example/realms/a/keys",
    "max_scope": "devices:read commands:send@group:garage/door.*",
}
FULL = LEAST | {
    "algorithms": ["ES256", "EdDSA"],
    "typ": "JWT",
    "scope_claim": "roles",
    "scope_prefix": "restante/",
    "allow_private": ["10.1.0.0/16", "fd12::/64"],
    "authority": "/etc/restante/idp.pem",
    "leeway": 5,
}


def from_environment(*tables: object) -> tuple[Provider, ...]:
    return load({"RESTANTE_PROVIDERS": json.dumps(tables)}).providers


def test_four_members_are_enough() -> None:
    assert from_environment(LEAST) == (Provider(**LEAST),)  # type: ignore[arg-type]
    assert load({}).providers == ()


def test_toml_has_tables(tmp_path: Path) -> None:
    file = tmp_path / "restante.toml"
    second = {
        "issuer": "https://b.example",
        "audience": "b",
        "jwks_url": "https://b.example/",
        "max_scope": "devices:read",
    }
    lines = ["retention = 7"]
    for table in (FULL, second):
        lines += ["[[providers]]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    file.write_text("\n".join(lines))
    settings = load({"RESTANTE_CONFIG": str(file)})
    full, least = settings.providers
    assert full == Provider(
        **LEAST,  # type: ignore[arg-type]
        algorithms=("ES256", "EdDSA"),
        typ="JWT",
        scope_claim="roles",
        scope_prefix="restante/",
        allow_private=(ip_network("10.1.0.0/16"), ip_network("fd12::/64")),
        authority=Path("/etc/restante/idp.pem"),
        leeway=5,
    )
    assert least.issuer == "https://b.example"
    assert (least.typ, least.scope_claim, least.scope_prefix, least.leeway) == ("at+jwt", "scope", "", 60)


def test_the_environment_of_a_process_says_it_all() -> None:
    settings = Settings(retention=9, providers=from_environment(FULL, LEAST | {"issuer": "https://b.example"}))
    assert load(as_environment(settings)) == settings
    assert load(as_environment(Settings())) == Settings()


BAD: dict[str, dict[str, Any]] = {
    "issuer: our own": {"issuer": enrollment.issuer("restante")},
    "issuer: a device id": {"issuer": "pump-17"},
    "issuer: http": {"issuer": "http://idp.example"},
    "issuer: with a mark": {"issuer": "https://idp.example#a"},
    "issuer: with a query": {"issuer": "https://idp.example?a"},
    "issuer: with a space": {"issuer": "https://idp.example/a b"},
    "issuer: with a newline": {"issuer": "https://idp.example\n"},
    "issuer: too long": {"issuer": "https://" + "a" * 143},
    "issuer: a number": {"issuer": 1},
    "audience: empty": {"audience": ""},
    "audience: a list": {"audience": ["a"]},
    "jwks_url: http": {"jwks_url": "http://idp.example/keys"},
    "jwks_url: file": {"jwks_url": "file:///etc/passwd"},
    "jwks_url: without a host": {"jwks_url": "https:///keys"},
    "jwks_url: with a user": {"jwks_url": "https://idp.example@10.0.0.1/keys"},
    "jwks_url: with a fragment": {"jwks_url": "https://idp.example/keys#a"},
    "jwks_url: with a bad port": {"jwks_url": "https://idp.example:99999/keys"},
    "jwks_url: with a newline": {"jwks_url": "https://idp.example/keys\r\nHost: x"},
    "max_scope: empty": {"max_scope": ""},
    "max_scope: malformed": {"max_scope": "devices:read commands:send@group:"},
    "max_scope: everything": {"max_scope": "*"},
    "max_scope: two spaces": {"max_scope": "devices:read  commands:read"},
    "max_scope: a list": {"max_scope": ["devices:read"]},
    "max_scope: over a hundred": {"max_scope": " ".join(["devices:read"] * 101)},
    "algorithms: symmetric": {"algorithms": ["RS256", "HS256"]},
    "algorithms: none": {"algorithms": ["none"]},
    "algorithms: nothing": {"algorithms": []},
    "algorithms: a text": {"algorithms": "RS256"},
    "typ: of devices": {"typ": enrollment.DEVICE_TOKEN_TYPE},
    "typ: of proofs": {"typ": enrollment.KEY_PROOF_TYPE},
    "typ: empty": {"typ": ""},
    "scope_claim: empty": {"scope_claim": ""},
    "scope_prefix: with a space": {"scope_prefix": "a "},
    "allow_private: a truth": {"allow_private": True},
    "allow_private: host bits": {"allow_private": ["10.1.2.3/8"]},
    "allow_private: a name": {"allow_private": ["localhost"]},
    "leeway: too long": {"leeway": 61},
    "leeway: negative": {"leeway": -1},
    "leeway: a text": {"leeway": "5"},
    "leeway: a truth": {"leeway": True},
}


@pytest.mark.parametrize(("which", "change"), BAD.items(), ids=BAD)
def test_a_bad_member_is_named(which: str, change: dict[str, Any]) -> None:
    with pytest.raises(BadSettings, match=f"provider 2: '{which.partition(':')[0]}' is "):
        from_environment(FULL, LEAST | {"issuer": "https://b.example"} | change)


@pytest.mark.parametrize("name", LEAST)
def test_what_must_be_there_is_named(name: str) -> None:
    with pytest.raises(BadSettings, match=f"provider 1: '{name}' is missing: "):
        from_environment({each: value for each, value in LEAST.items() if each != name})


def test_an_unknown_member_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(BadSettings, match=r"there is no 'scopes'.*max_scope"):
        from_environment(LEAST | {"scopes": "x"})


def test_one_issuer_is_one_provider() -> None:
    with pytest.raises(BadSettings, match="the same 'issuer'"):
        from_environment(LEAST, FULL)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "null", '"x"', "[", "[" * 100_000, json.dumps([LEAST] * 21)], ids=range(8)
)
def test_what_is_no_array_of_tables_is_refused(text: str) -> None:
    with pytest.raises(BadSettings, match="'providers'"):
        load({"RESTANTE_PROVIDERS": text})


def test_no_issuer_is_taken_for_another_verifier() -> None:
    (provider,) = from_environment(LEAST)
    assert not names.is_device(provider.issuer)
    assert provider.issuer != enrollment.issuer("restante")


def test_the_example_of_the_docs_is_good(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "identity.md").read_text(encoding="utf-8")
    file = tmp_path / "restante.toml"
    file.write_text(page.split("```toml\n")[1].split("```")[0])
    keycloak, entra = load({"RESTANTE_CONFIG": str(file)}).providers
    assert (keycloak.typ, keycloak.scope_prefix) == ("JWT", "restante/")
    assert entra.scope_claim == "roles"
    table = page.split("\n## External providers\n")[1].split("\n## ")[0]
    for member in fields(Provider):
        assert f"`{member.name}`" in table, member.name
