"""Files that are written whole or not at all, with a checksum that reveals damage.

Every file contains the SHA-256 of its own bytes, where its format has room for a text: a JSON
file in an entry, an .npz file in the archive's comment, a safetensors file in its metadata. The
hash is computed with zeros in its place, so that it does not depend on itself.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

NO_CHECKSUM = "nercc-sha256:" + 64 * "0"  # the place of a file's checksum, before it is known
_CHECKSUM = re.compile(rb"nercc-sha256:([0-9a-f]{64})")


def write_checked(path: Path, content: bytes) -> None:
    """Replace the file's content, in which the checksum replaces `NO_CHECKSUM`.

    If two processes write the same file, one of them wins. On failure the file is unchanged.

    Args:
        path: The file.
        content: Bytes with `NO_CHECKSUM` in them.

    Raises:
        OSError: As `open`.
    """
    checksum = NO_CHECKSUM.replace(64 * "0", hashlib.sha256(content).hexdigest())
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(content.replace(NO_CHECKSUM.encode(), checksum.encode(), 1))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_checked(path: Path, remedy: str) -> bytes:
    """Return the bytes that `write_checked` wrote.

    Args:
        path: The file.
        remedy: The end of an error's message: the user's way out.

    Raises:
        ValueError: The bytes do not have the checksum that they carry, or they carry none.
        OSError: As `open`.
    """
    content = path.read_bytes()
    found = list(_CHECKSUM.finditer(content))
    for each in found:  # one is the file's own; a caller's data may hold others
        zeros = content[: each.start()] + NO_CHECKSUM.encode() + content[each.end() :]
        if hashlib.sha256(zeros).hexdigest().encode() == each[1]:
            return content
    if found:
        raise ValueError(f"{path} is damaged: it does not match its checksum; {remedy}")
    raise ValueError(
        f"{path} has no checksum: it is another file, damaged, or of an earlier nercc-jax; {remedy}"
    )


def write_arrays(path: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Write arrays by name as an .npz file with a checksum; raise OSError as `open`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = NO_CHECKSUM.encode()
    write_checked(path, buffer.getvalue())


def read_arrays(path: Path, remedy: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return what `write_arrays` wrote; raise as `read_checked`."""
    content = read_checked(path, remedy)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return dict(file)
    except ValueError as error:  # it takes what it does not know for a pickle
        raise ValueError(f"{path} is no .npz file: {remedy}") from error


def write_entries(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a file's entries as JSON with the kind of file ("code"), a version and a checksum.

    Raises:
        TypeError: An entry is not JSON.
        OSError: As `open`.
    """
    head = {"format": f"nercc-jax {kind}", "version": 1, "checksum": NO_CHECKSUM}
    write_checked(path, (json.dumps(head | dict(content), indent=1) + "\n").encode())


def read_entries(
    path: Path, kind: str, entries: set[str], remedy: str, *, editable: bool = False
) -> dict[str, Any]:
    """Return the entries that `write_entries` wrote.

    Args:
        path: The file.
        kind: The kind of file.
        entries: The names of its entries.
        remedy: The end of the message about a damaged file: the user's way out.
        editable: Whether people may edit such files. A file without a checksum is then read, too.

    Raises:
        ValueError: The named file is damaged or not of this kind.
        OSError: As `open`.
    """
    content = path.read_bytes()
    if editable:
        remedy += "; if you edited it, remove its entry 'checksum', and it is read as it stands"
    if not editable or b'"checksum"' in content:
        content = read_checked(path, remedy)
    try:
        found = json.loads(content)
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path} is no JSON, so no file of a {kind}: {error}; {remedy}") from error
    name = f"nercc-jax {kind}"
    if not isinstance(found, dict) or found.get("format") != name:
        raise ValueError(f"{path} does not say 'format': {name!r}: it is no file of a {kind}")
    if found.get("version") != 1:
        raise ValueError(f"{path} is of version {found.get('version')}; this nercc-jax reads 1")
    found = {each: found[each] for each in found.keys() - {"format", "version", "checksum"}}
    if found.keys() != entries:
        have = f"has the entries {sorted(found)}, and a file of a {kind} has {sorted(entries)}"
        raise ValueError(f"{path} {have}; {remedy}")
    return found
