"""Files that stand in the place of the data: Git LFS pointers, web pages, failed downloads.

A clone without git-lfs leaves three lines of text where each large file belongs, and a download may
end as a login page, as the error message of a storage service, or as nothing at all. Every reader
of weights, tokenizers, settings and data asks here, so that such a file is named as what it is.
Source: the specification of Git LFS, "The Pointer" (https://git-lfs.com).
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError

HEAD_BYTES = 4096
"""Bytes at a file's start that tell what it is."""

_AGAIN = "download the file itself again"
_POINTERS = (
    (
        re.compile(rb"(version https://(git-lfs\.github\.com/spec|hawser\.github\.com/spec)/"
                   rb"|version http://git-media\.io/v/|# git-media\n|# external\n)"),
        f"is a Git LFS pointer, not the file that it names; run `git lfs pull` there, or {_AGAIN}",
    ),
    (
        re.compile(rb"# xet version "),
        f"is a Xet pointer, not the file that it names; run `git xet checkout` there, or {_AGAIN}",
    ),
    (
        re.compile(rb"(\.\./)*(\.git)?/annex/objects/"),
        f"is a git-annex pointer, not the file that it names; run `git annex get` there, or "
        f"{_AGAIN}",
    ),
)  # fmt: skip
_PAGE = re.compile(
    rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S
)
_XML = re.compile(rb"<\?xml\b|<(Error|html:Error|ListBucketResult)\b[^>]*>")
_CODE = re.compile(rb"<Code>([\w. -]{1,80})</Code>")
_ANSWERS = re.compile(
    rb"(\d{3}:? )?(not found|entry not found|repository not found|forbidden|unauthorized"
    rb"|access denied|bad gateway|gateway time-?out|service unavailable|internal server error"
    rb"|too many requests|invalid username or password\.?|file not found)\.?"
    rb"|access to (model|dataset) \S+ is restricted.{0,400}",
    re.I | re.S,
)
_ANSWER_KEYS = frozenset(
    """error errors error_description error_code message code status detail details type title
    documentation_url request_id requestId reason success""".split()
)
_ARCHIVES = (
    (b"\x1f\x8b", "gzip-compressed", "gunzip"),
    (b"BZh", "bzip2-compressed", "bunzip2"),
    (b"\xfd7zXZ\x00", "xz-compressed", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unzstd"),
    (b"\x04\x22\x4d\x18", "lz4-compressed", "unlz4"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "7z x"),
    (b"Rar!\x1a\x07", "a RAR archive", "unrar x"),
)


def describe_stand_in(head: bytes, size: int) -> str | None:
    """Return what a file is in place of its data and what to do, or None where it may be data.

    Args:
        head: Its first `HEAD_BYTES` bytes, or all of a shorter file.
        size: Its size in bytes.

    Returns:
        The rest of a sentence that begins with the file's path.
    """
    if not size:
        return f"is empty; {_AGAIN}"
    if not head.strip(b"\0"):
        return f"begins with {len(head)} zero bytes: its download or copy did not end; {_AGAIN}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, what in _POINTERS:
        if pattern.match(text):
            return what
    if _PAGE.match(text):
        return f"is an HTML page, such as a login or an error page, not the file itself; {_AGAIN}"
    if _XML.match(text):
        code = _CODE.search(text)
        named = f" ({code[1].decode()})" if code else ""
        return f"is an XML answer of a storage service{named}, not the file itself; {_AGAIN}"
    if size <= HEAD_BYTES and (_ANSWERS.fullmatch(text.rstrip()) or _is_answer(text)):
        shown = text.decode("utf-8", "replace").split("\n")[0].strip()[:80]
        return f"is a server's answer ({shown}), not the file itself; {_AGAIN}"
    return None


def describe_compression(head: bytes) -> str | None:
    """Return which archive a file is and how to unpack it, or None; see `describe_stand_in`."""
    for magic, what, command in _ARCHIVES:
        if head.startswith(magic):
            return f"is {what}; unpack it first (`{command}`)"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it first (`tar xf`)"
    return None


def refuse_stand_in(path: Path, head: bytes | None = None) -> None:
    """Refuse a file that is not the data that its name stands for.

    Args:
        path: The file; what cannot be read is left to its reader to explain.
        head: Its content or its start, where that has been read already.

    Raises:
        InputError: The file is a pointer, a page, an answer of a server, or empty.
    """
    try:
        size = path.stat().st_size if head is None else len(head)
        if head is None:
            if not path.is_file():
                return
            with path.open("rb") as stream:
                head = stream.read(HEAD_BYTES)
    except OSError:
        return
    if what := describe_stand_in(head[:HEAD_BYTES], size):
        raise InputError(f"{path} {what}")


def refuse_special(path: Path) -> None:
    """Refuse what is no file of bytes: a pipe or a device gives no end, or waits for a writer.

    Raises:
        InputError: The path leads to one.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # its reader explains
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path} is a pipe, a device or a socket, where a file was expected")


def describe_missing(path: Path, what: str = "does not exist") -> str:
    """Return what to say of a file that does not exist: it may be a link whose target is gone."""
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which is not there; copy that file too"
    return f"{path} {what}"


def _is_answer(text: bytes) -> bool:
    """Whether a short text is a JSON object that says nothing but that something went wrong."""
    if not text.startswith(b"{"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    known = isinstance(value, dict) and 0 < len(value) and value.keys() <= _ANSWER_KEYS
    return known and bool(value.keys() & {"error", "errors", "message", "detail"})
