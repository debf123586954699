"""Where the project's folders are, for tests in any room."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
TESTS = PROJECT / "tests"
SUPPORT = TESTS / "support"
SAMPLES = PROJECT / "checkpoints" / "samples"
ORACLES = TESTS / "oracles"
"""The few genuine Megatron checkpoints that ship with the tests."""
GOLDEN = TESTS / "golden"
