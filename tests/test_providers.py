"""Logins at servers that others have written: nothing but the configuration is different."""

from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import pytest
from providers import Provider, log_in
from script import Script

Start = Callable[..., Script]


def failed_login(script: Script, client_secret: str) -> str:
    """Log in, and return the error of the script: just one, and nothing that is secret."""
    (code,) = parse_qs(urlsplit(log_in(script).url).query)["code"]
    return script.error(code, client_secret)


def test_a_login_at_django_oauth_toolkit(start: Start, django: Provider) -> None:
    script = start(**django("example"))
    log_in(script)
    assert (script.status(), script.stderr) == (0, "")
    assert script.stdout.count('"sub": "1"') == 2


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("TOKEN_URL", "301 Moved Permanently"),  # without its final slash
        ("CLIENT_SECRET", "401 Unauthorized: invalid_client"),
    ],
)
def test_a_value_without_its_last_character_ends_in_one_error(
    start: Start, django: Provider, key: str, error: str
) -> None:
    variables = django("example")
    variables[key] = variables[key][:-1]
    told = failed_login(start(**variables), variables["CLIENT_SECRET"])
    assert error in told
    assert key in told


def test_a_login_at_oidc_provider(start: Start, oidc_provider: Provider) -> None:
    script = start(**oidc_provider("secret in the form"))
    log_in(script)
    assert (script.status(), script.stderr) == (0, "")
    assert script.stdout.count('"sub": "alice"') == 2


@pytest.mark.parametrize(
    ("key", "part"), [("OAUTH_SCOPE", " offline_access"), ("AUTH_URL", "?prompt=consent")]
)
def test_oidc_provider_gives_a_refresh_token_only_for_offline_access_with_consent(
    start: Start, oidc_provider: Provider, key: str, part: str
) -> None:
    variables = oidc_provider("secret in the form")
    variables[key] = variables[key].removesuffix(part)
    assert "no refresh token" in failed_login(start(**variables), variables["CLIENT_SECRET"])


@pytest.mark.parametrize("client_id", ["HTTP Basic", "public"])
def test_a_client_that_authenticates_in_another_way_is_refused(
    start: Start, oidc_provider: Provider, client_id: str
) -> None:
    variables = {"CLIENT_SECRET": "sDDDDDDD-unknown", **oidc_provider(client_id)}
    error = failed_login(start(**variables), variables["CLIENT_SECRET"])
    assert "401 Unauthorized: invalid_client" in error
