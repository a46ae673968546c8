"""One campaign for all tests of a run, and its report at the end."""

from __future__ import annotations

import pytest

from tests.interop.campaign import Campaign

_CAMPAIGN = pytest.StashKey[Campaign]()


@pytest.fixture(scope="session")
def campaign(pytestconfig: pytest.Config) -> Campaign:
    """The campaign, run."""
    made = pytestconfig.stash[_CAMPAIGN] = Campaign.from_environment()
    made.run()
    return made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was compared."""
    made = config.stash.get(_CAMPAIGN, None)
    if made is not None:
        terminalreporter.section("comparison with QEMU")
        for line in made.report():
            terminalreporter.write_line(line)
