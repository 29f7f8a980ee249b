"""The `nercc` command, one file a command. Only this room imports both library and models."""

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence

from ._command import Option, error_text, fail, help_text, parse
from ._options import COMMANDS, Options
from ._process import compile_plainly, end, keep_programs

_ABOUT = "Coded computing: approximate predictions from whichever workers answered."


def main() -> None:
    """Run `nercc` with the process's arguments, and end the process.

    An error about invalid input is printed as one line, and the exit code is 2.
    """
    try:
        try:
            _follow(sys.argv[1:])
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except ModuleNotFoundError as error:
            name = str(error.name).partition(".")[0]
            if name in ("matplotlib", "rich", "safetensors", "sklearn"):  # of the extra "demo"
                fail(f"nercc needs {name}, which is missing: pip install '.[demo]' in a clone", 2)
            fail(str(error), 2)
        except (ValueError, OSError, ImportError) as error:
            text = error_text(error)
            # If an error begins with an argument's name, replace it by the option's name.
            if found := re.match(r"(\w+) (?=must be |is needed)", text):
                name = f"{found[1]}_s" if hasattr(Options, f"{found[1]}_s") else found[1]
                if hasattr(Options, name):
                    text = f"--{name.replace('_', '-')} {text[found.end() :]}"
            fail(text, 2)
        except RuntimeError as error:
            if "CpuCallback error" not in str(error):  # JAX's, around a model's
                raise
            from ..pools.batch import reason_of

            fail(f"the model failed: {reason_of(error)}", 1)
    except SystemExit as error:
        end(error.code)


def _follow(words: Sequence[str]) -> None:
    """Run the command with the options that are given as `words`."""
    name, *rest = words or ("--help",)
    if name == "--help":
        commands = [(name, each.help.partition("\n")[0]) for name, each in COMMANDS.items()]
        panels = {"Commands": commands, "Options": [("--version", "Print the version.")]}
        print(help_text("nercc", _ABOUT, panels), end="")
        sys.exit(0 if words else 2)
    if name == "--version":
        return print(f"nercc {importlib.metadata.version('nercc-jax')}")
    if name not in COMMANDS:
        fail(f"there is no command {name!r}, but {', '.join(COMMANDS)}", 2)
    command, serves = COMMANDS[name], name == "serve"  # `serve` sets up its process itself
    if not serves:
        compile_plainly()
        keep_programs()
    # JAX calls OpenBLAS's LAPACK on CPUs. OpenBLAS's threads wait by spinning, on cores that XLA
    # needs: a learner's update and prediction took 11.8 ms, and 6.4 ms with one thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    found = parse(name, command.help, options_of(name), rest)
    file, _, function = command.function.partition(":")
    options = found if serves else command.read(found)
    getattr(importlib.import_module(f".{file}", __package__), function)(options)


def options_of(name: str) -> list[Option]:
    """Return the options of a command; those of `serve` are its settings, which import slowly."""
    if name != "serve":
        return COMMANDS[name].options()
    from ._serve import options

    return options()
