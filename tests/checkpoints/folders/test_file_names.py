"""Names that come from a file never lead out of the folder that they are used in."""

from __future__ import annotations

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.folders.file_names import safe_name

REFUSED = {
    "/etc/passwd": "a path",
    "../../up": "a path",
    "a/b": "a path",
    "C:\\windows": "a path",
    "..": "begins with a dot",
    ".": "begins with a dot",
    ".bashrc": "begins with a dot",
    "": "empty",
    "  ": "empty",
    "a\0b": "cannot be printed",
    "a\nb": "cannot be printed",
    "\x1b[2J": "cannot be printed",
    "a\u202eb": "cannot be printed",
    "a\ud800": "cannot be printed",
    "a" * 5000: "more than 200 bytes",
}


@pytest.mark.parametrize("name", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_name_of_a_file_is_refused(name):
    with pytest.raises(InputError, match=REFUSED[name]) as caught:
        safe_name(name, "p.jsonl: the set")
    message = str(caught.value)
    assert message.startswith("p.jsonl: the set") and len(message) < 200
    assert message.isascii() and message.isprintable()


@pytest.mark.parametrize("name", ["dev-middle", "__0_0.distcp", "a b", "größe", "model-00001.x"])
def test_names_are_taken_as_they_are(name):
    assert safe_name(name, "the set") == name
