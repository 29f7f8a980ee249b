"""Run a benchmark: `python bench/run.py NAME [--quick] [options]`.

`--quick` measures a small version, to see that it runs; `NAME --help` tells what is measured, and
all options. Results go to `bench/results/NAME.json` (`NAME-quick.json`), which pages show.
"""

import argparse
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# By name: module and function, and what is measured.
BENCHES = {
    "paper": ("paper", "NeRCC and all rivals: error, labels kept, noise"),
    "convergence": ("rates:convergence", "slopes of the error in N, against the proven bounds"),
    "independent": ("rates:independent", "the same where workers straggle independently"),
    "rivals": ("rivals", "BACC, BSCC and NeRCC with intervals of everything"),
    "tuning": ("tuning", "gradient tuning against a grid of both lambdas"),
    "beyond": ("beyond", "order, layout, student and learner on images"),
    "functions": ("functions", "smooth functions: learners, copies, codes"),
    "rows": ("rows", "many rows against an executor"),
    "row_curves": ("rows:curves", "how many rows a tolerance needs"),
    "late_rows": ("rows:late", "rows that are late because of what they are"),
    "spot": ("spot", "rows by a deadline on spot nodes"),
    "ensembles": ("ensembles", "mean, quantile and probability of an ensemble by a deadline"),
    "tails": ("tails", "latency of a stream of queries under laws of stragglers"),
    "service_times": ("tails:record", "seconds of calls on this machine, a law of `tails`"),
    "dependent": ("dependent", "promises where slowness depends on the query"),
    "dependent_server": ("dependent:server", "the same on the real server"),
    "serving": ("serving", "coded, uncoded, hedged and replicated servers, and Ray Serve"),
    "serving_minutes": ("serving:minutes", "ten minutes of an open loop"),
    "serving_price": ("serving_costs:price", "the server's own cost beside a bare handler"),
    "serving_requests": ("serving_costs:requests", "batches, gRPC and bytes"),
    "serving_checks": ("serving_costs:checks", "the cost of checking answers"),
    "error_probability": ("decoding", "whether a server's error probabilities keep their limits"),
    "hedging": ("hedging", "hedged HTTP calls against none, a fixed limit, and two at once"),
    "adversaries": ("adversaries", "workers that lie"),
    "wrong_answers": ("wrong_answers", "checks of answers, and of the workers that give them"),
    "coding": ("coding", "coding beside the bare product, SciPy and csaps, and first calls"),
    "accelerator": ("accelerator", "programs timed on a device, or counted for one not there"),
    "cluster": ("cluster", "a node of a Ray cluster is killed, or frozen"),
}


def find(name: str) -> Callable[..., Any]:
    """Return the function of a benchmark; its module is imported now."""
    module, _, function = BENCHES[name][0].partition(":")
    return getattr(importlib.import_module(module), function or "run")


def parser_of(name: str, run: Callable[..., Any]) -> argparse.ArgumentParser:
    """Return a parser with an option for each parameter of `run` after the first, its report.

    A default says what an option takes: a flag, a value, or several values. Names are choices,
    unless "*" is among them: then patterns are. The docstring's `Options:` are their help.
    """
    about = (inspect.getdoc(run) or "").partition("\n\nOptions:")[0]
    parser = argparse.ArgumentParser(
        prog=f"bench/run.py {name}",
        description=f"{sys.modules[run.__module__].__doc__}\n{name}: {about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small version: does it run?")
    parser.add_argument(
        "--data-dir", type=Path, help="parquet files (default: shared/data, or hub)"
    )
    parser.add_argument("--output", type=Path, help="the file of the results")
    helps = dict(re.findall(r"^ +(\w+): (.+)$", run.__doc__ or "", re.MULTILINE))
    for option in [*inspect.signature(run, eval_str=True).parameters.values()][1:]:
        default, kind = option.default, option.annotation
        takes: dict[str, Any] = {"help": helps.get(option.name)}
        if isinstance(default, bool):
            takes |= {"action": "store_true"}
        elif isinstance(default, tuple):
            named = isinstance(default[0], str) and "*" not in default
            takes |= {"nargs": "+", "type": type(default[0]), "default": default}
            takes |= {"choices": default} if named else {}
        else:
            kinds = [each for each in typing.get_args(kind) or (kind,) if each is not type(None)]
            takes |= {"type": kinds[0], "default": default}
        parser.add_argument(f"--{option.name.replace('_', '-')}", **takes)
    return parser


def main(words: Sequence[str]) -> Any:
    if not words or words[0] not in BENCHES:
        width = max(map(len, BENCHES))
        lines = (f"  {name:{width}}  {about}" for name, (_, about) in BENCHES.items())
        print(__doc__, *lines, sep="\n")
        return 0 if words[:1] in ([], ["--help"], ["-h"]) else 2
    run = find(words[0])
    options = vars(parser_of(words[0], run).parse_args(words[1:]))
    from report import Report  # late: some benchmarks set variables before NumPy is imported

    common = {each: options.pop(each) for each in ("quick", "data_dir", "output")}
    report = Report(words[0], **common)
    found = run(report, **options)
    print(f"results: {report.path}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
