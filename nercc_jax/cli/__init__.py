"""The `nercc` command: one file a command. Only this room knows both nercc_jax and the models."""

import importlib
import importlib.metadata
import itertools
import sys
from collections.abc import Sequence

from ._command import CommandParser, Option, error_text, fail, help_text
from ._options import COMMANDS
from ._process import compile_plainly, end, keep_lapack_to_one_thread, keep_programs, missing_extra

_KEEP = (
    "Keep compiled programs on disk, in JAX_COMPILATION_CACHE_DIR or the user's cache folder; for "
    "`serve` a setting."
)
_OPTIONS = (
    Option("version", bool, False, "Print the version.", "Options", ["--version"]),
    Option(
        *("compilation_cache", bool, True, _KEEP, "Options"),
        ["--compilation-cache", "--no-compilation-cache"],
    ),
)
_ABOUT = "Coded computing: approximate predictions from whichever workers answered."


def main() -> None:
    """Run `nercc` with the process's arguments, and end the process.

    An error that our own code raises about input becomes a sentence and exit code 2.
    """
    try:
        try:
            _follow(sys.argv[1:])
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except ModuleNotFoundError as error:
            fail(missing_extra(error) or str(error), 2)
        except (ValueError, OSError, ImportError) as error:
            fail(error_text(error), 2)
        except RuntimeError as error:
            if "CpuCallback error" not in str(error):  # JAX's, around what a model raised
                raise
            from ..pools.batch import reason_of

            fail(f"the model failed: {reason_of(error)}", 1)
    except SystemExit as error:
        end(error.code)


def _follow(words: Sequence[str]) -> None:
    """Run the command that the words name, with what they set."""
    flags = [*itertools.takewhile(lambda word: word.startswith("-"), words)]
    given = {}
    if "--help" not in flags:
        given = vars(CommandParser("", _ABOUT, _OPTIONS).parse_args(flags))
    if "version" in given:
        print(f"nercc {importlib.metadata.version('nercc-jax')}")
        return
    if "--help" in flags or len(flags) == len(words):
        commands = [(name, each.help.partition("\n")[0]) for name, each in COMMANDS.items()]
        panels = {"Commands": commands, "Options": [each.line() for each in _OPTIONS]}
        print(help_text("nercc", _ABOUT, panels), end="")
        sys.exit(0 if "--help" in flags else 2)
    name, *rest = words[len(flags) :]
    if name not in COMMANDS:
        fail(f"there is no command {name!r}, but {', '.join(COMMANDS)}", 2)
    command, serves = COMMANDS[name], name == "serve"  # whose settings say more of its process
    if not serves and given.get("compilation_cache", True):
        keep_programs()
    if not serves:
        compile_plainly()
    keep_lapack_to_one_thread()
    found = vars(CommandParser(name, command.help, options_of(name)).parse_args(rest))
    options = found if serves else command.read(found)
    file, _, function = command.function.partition(":")
    getattr(importlib.import_module(f".{file}", __package__), function)(options)


def options_of(name: str) -> list[Option]:
    """Return the options of a command; those of `serve` are its settings, and take a while."""
    if name != "serve":
        return COMMANDS[name].options()
    from ._serve import options

    return options()
