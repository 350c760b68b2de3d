from collections.abc import Callable

from sandbox import Sandbox
from script import Script, log_in


def test_a_login_shows_the_account_twice_and_ends_well(
    sandbox: Sandbox, start: Callable[..., Script]
) -> None:
    script = start(**sandbox.environment)
    assert "The login came through" in log_in(script).text
    assert script.status() == 0
    assert script.stdout.count('"company"') == 2
    assert script.stderr == ""
