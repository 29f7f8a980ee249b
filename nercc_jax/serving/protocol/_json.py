"""JSON of requests: tensors as arrays, bounds that are checked before parsing, and a reader.

Parsing holds Python's interpreter lock, so that it delays every request in progress. Large JSON is
therefore read by a process of its own, which runs this file: it imports nothing of the package.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import orjson

# By kind of a tensor's dtype: the Python types that JSON may have for it, and their name.
_TYPES = {
    "f": ({int, float}, "numbers"),
    "i": ({int}, "whole numbers"),
    "u": ({int}, "whole numbers"),
    "b": ({bool}, "booleans"),
}
# By the first letter of a datatype, the kind of its dtype.
_KINDS = {"F": "f", "I": "i", "U": "u", "B": "b"}

# Bytes of JSON that a number takes at most, with what separates it from the next.
NUMBER_BYTES = 32
# Bytes of JSON apart from numbers, and names, values and objects apart from tensors.
_OTHER_BYTES, _OTHER_PARTS = 2**16, 2**12
# Bytes of JSON that are read without counting its parts: they take no time.
_SMALL = 2**12
_PIECE = 2**18  # bytes that are counted at a time, which fit into a cache


class TooManyNumbers(ValueError):
    """JSON with more numbers than the model takes at a time."""


@dataclasses.dataclass(frozen=True)
class JsonBounds:
    """The most numbers and lists, nested as their shapes, that a request's tensors may have."""

    numbers: int
    lists: int

    @classmethod
    @functools.cache
    def of(cls, shapes: tuple[tuple[int, ...], ...], rows: int) -> "JsonBounds":
        """Return the bounds for this number of queries, whose tensors have these shapes."""
        numbers = rows * sum(math.prod(shape) for shape in shapes)
        prefixes = (math.prod(shape[:axis]) for shape in shapes for axis in range(len(shape)))
        return cls(numbers, rows * sum(prefixes) + len(shapes))

    @property
    def bytes(self) -> int:
        return NUMBER_BYTES * self.numbers + _OTHER_BYTES

    @property
    def limits(self) -> dict[str, int]:
        """The number of each sign of JSON's structure."""
        return {
            ",": self.numbers + _OTHER_PARTS,
            "[": self.lists + _OTHER_PARTS,
            **dict.fromkeys("{:", _OTHER_PARTS),
            '"': 4 * _OTHER_PARTS,
        }


class JsonCounter:
    """Counts the parts of JSON as it arrives, and refuses more than the bounds."""

    def __init__(self, bounds: JsonBounds, length: int | None):
        """Create a counter; JSON has `length` bytes, if something else follows it."""
        self._bounds, self._left = bounds, math.inf if length is None else length
        self._seen = 0
        self._counts: dict[str, int] = {}

    def add(self, part: bytes | bytearray | memoryview) -> None:
        """Count the parts of the next bytes.

        Raises:
            TooManyNumbers: for more numbers than the bounds.
            ValueError: for more of anything else.
        """
        size = int(min(self._left, len(part)))
        self._left -= size
        self._seen += size
        if self._seen <= _SMALL:
            return
        text, limits = np.frombuffer(part, np.uint8, size), self._bounds.limits
        for begin in range(0, len(text), _PIECE):
            piece = text[begin : begin + _PIECE]
            for sign, limit in limits.items():
                count = self._counts.get(sign, 0) + int(np.count_nonzero(piece == ord(sign)))
                self._counts[sign] = count
                if count > limit and sign == ",":
                    raise TooManyNumbers(
                        f"the JSON has more than {limit} numbers: send fewer queries"
                    )
                if count > limit:
                    raise ValueError(f"the JSON has more than {limit} {sign!r}, as no request has")

    @property
    def counting(self) -> bool:
        return self._left > 0

    @property
    def numbers(self) -> int:
        """The most numbers that there are so far."""
        return self._counts.get(",", 0)


def loads(text: bytes | bytearray | memoryview) -> tuple[Any, list[np.ndarray | str | None]]:
    """Parse the JSON of a request.

    Returns:
        The request without the data of its inputs, and those data: arrays of one axis, or what is
        wrong with them; None for an input without data. Raises ValueError where it is no JSON.
    """
    request = orjson.loads(text)
    inputs = request.get("inputs") if isinstance(request, dict) else None
    data: list[np.ndarray | str | None] = []
    for each in inputs if isinstance(inputs, list) else ():
        given = each.get("data") if isinstance(each, dict) else None
        if isinstance(given, list):
            data.append(array_or_error(given, each.get("shape"), each.get("datatype")))
            each["data"] = []
        else:  # nothing, or something else that is refused later
            data.append(None)
    return request, data


def array_or_error(data: Sequence[Any], shape: Any, datatype: Any) -> np.ndarray | str:
    """Return a tensor's data as an array of one axis, or what is wrong with them.

    Sizes and types are checked first, since NumPy converts whatever it is given, at a price.
    """
    try:
        return _array(data, shape, datatype)
    except (ValueError, OverflowError, TypeError) as error:
        return str(error)


def _array(data: Sequence[Any], shape: Any, datatype: Any) -> np.ndarray:
    kind = _KINDS.get(str(datatype)[:1].upper())
    if kind is None or not isinstance(shape, list):
        raise ValueError("its shape or datatype is unknown")
    count = math.prod(map(int, shape))
    while len(data) and isinstance(data[0], list):
        if len(set(map(len, data))) > 1:
            raise ValueError("nested lists have different lengths")
        data = list(itertools.chain.from_iterable(data))
    if len(data) != count:
        raise ValueError(f"it takes {count} elements, but {len(data)} came")
    allowed, what = _TYPES[kind]
    # Nulls would become NaN, strings and booleans numbers.
    if not set(map(type, data)) <= allowed:
        raise ValueError(f"not all of it are {what}")
    if kind == "f":
        with np.errstate(over="ignore"):
            return np.fromiter(data, np.float64, count).astype(np.float32)
    numbers = np.array(data, bool if kind == "b" else None)
    if numbers.dtype.kind not in "iub":  # whole numbers of any size
        raise ValueError("some of it do not fit into 64 bits")
    return numbers


class JsonProcess:
    """A process that parses JSON, one request at a time. It starts when it is needed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def loads(self, text: bytes | bytearray | memoryview) -> Any:
        """Parse as `loads` does, and raise OSError where the process ends meanwhile.

        It blocks; `end` interrupts it.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _write(process.stdin, text)
                value = pickle.loads(_read(process.stdout))
            except (OSError, EOFError) as error:
                self.end()
                raise OSError("the process that reads JSON has ended") from error
        if isinstance(value, ValueError):
            raise value
        return value

    def end(self) -> None:
        """End the process. The next request starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # of what could not be written
                    assert pipe is not None
                    pipe.close()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.end()
            # Without OpenBLAS's threads. Modules are found where this process finds them.
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's
            )
        return self._process


def _write(file: IO[bytes], message: bytes | bytearray | memoryview) -> None:
    file.write(len(message).to_bytes(8, "little"))
    file.write(message)
    file.flush()


def _read(file: IO[bytes]) -> bytes:
    """Return the next message. Raises EOFError where there is none."""
    size = int.from_bytes(file.read(8), "little")
    message = file.read(size) if size else b""
    if not size or len(message) < size:
        raise EOFError
    return message


def _serve() -> None:
    """Answer messages from the standard input until it ends, below the priority of all else."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(15)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                value: Any = loads(_read(sys.stdin.buffer))
            except (ValueError, MemoryError, RecursionError) as error:
                value = ValueError(str(error))  # orjson's own cannot be pickled
            _write(sys.stdout.buffer, pickle.dumps(value, 5))


if __name__ == "__main__":
    _serve()
