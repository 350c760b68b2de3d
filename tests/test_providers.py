"""Logins at a server that others have written: nothing but the configuration is different."""

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


def test_a_login_with_a_secret_in_the_form(start: Start, oidc_provider: Provider) -> None:
    script = start(**oidc_provider("secret in the form"))
    log_in(script)
    assert (script.status(), script.stderr) == (0, "")
    assert script.stdout.count('"sub": "alice"') == 2


def test_a_login_of_a_public_client(start: Start, oidc_provider: Provider) -> None:
    variables = oidc_provider("public")
    assert variables["CLIENT_SECRET"] == ""
    script = start(**variables)
    log_in(script)
    assert (script.status(), script.stderr) == (0, "")
    assert script.stdout.count('"sub": "alice"') == 2


@pytest.mark.parametrize(
    ("key", "part"), [("OAUTH_SCOPE", " offline_access"), ("AUTH_URL", "?prompt=consent")]
)
def test_without_consent_to_offline_access_there_is_no_refresh_token(
    start: Start, oidc_provider: Provider, key: str, part: str
) -> None:
    variables = oidc_provider("secret in the form")
    variables[key] = variables[key].removesuffix(part)
    error = failed_login(start(**variables), variables["CLIENT_SECRET"])
    assert "sent no refresh token" in error
    assert part.strip() in error  # the remedy


@pytest.mark.parametrize("client_id", ["HTTP Basic", "public"])
def test_a_client_that_sends_an_unexpected_secret_is_refused(
    start: Start, oidc_provider: Provider, client_id: str
) -> None:
    variables = oidc_provider(client_id)
    variables["CLIENT_SECRET"] = variables["CLIENT_SECRET"] or "sDDDDDDD-unexpected"
    error = failed_login(start(**variables), variables["CLIENT_SECRET"])
    assert "401 Unauthorized: invalid_client" in error
    assert '"At another provider"' in error
