"""Commands in a warm process, as fixtures; a plugin of tests/hostile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.reliability.attacks import Bases
from support.reliability.warm_commands import WarmCommands


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCommands]:
    """A process that has imported everything and runs commands."""
    commands = WarmCommands(tmp_path_factory.mktemp("warm"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, warm: WarmCommands) -> Bases:
    """Right inputs, made once."""
    return Bases(tmp_path_factory.mktemp("bases"), warm)
