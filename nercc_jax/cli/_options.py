"""Options of all commands except `serve`: each is defined once, and checked without JAX.

A command has options, and a function in a file of its own, whose docstring is its help. The file is
imported after the options are checked: importing JAX takes a second or two, and neither `--help`
nor a misspelt option waits for it.
"""

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from nercc_models.names import HUB, check_model_name  # imports neither JAX nor the models

from ._command import Option, of_option

Returned: TypeAlias = Literal["logits", "probabilities", "values"]

# Types with their limits.
Count: TypeAlias = Annotated[int, {"least": 1}]
CountOrNone: TypeAlias = Annotated[int | None, {"least": 1}]
Positive: TypeAlias = Annotated[float, {"least": 0, "above": True}]
NotNegative: TypeAlias = Annotated[float, {"least": 0}]
NotNegativeOrNone: TypeAlias = Annotated[float | None, {"least": 0}]
Share: TypeAlias = Annotated[float, {"least": 0, "most": 1}]

# The titles of the panels of `--help`, by their first options.
PANELS = {
    "model": "Model and data",
    "num_data": "Code",
    "max_stragglers": "Comparison",
    "layout": "Descent",
    "latency": "Load and budget",
    "share": "Training",
    "tolerance": "Accuracy",
    "pool": "Workers",
    "faults": "Fault injection",
    "output": "Results",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """All options of all commands, each with its help below it.

    Raises ValueError for an unknown model or file, as far as that is known without JAX, and
    ImportError if the pool needs Ray, and Ray is missing.
    """

    model: str = "lenet5-digits"
    "Shipped model, your own as module:name, or hf:owner/name."
    weights: Path | None = None
    "Weights passed to the function module:name, which returns the model: a path, or hf:."
    inputs: Path | None = None
    "Data points: .npy, .npz, .csv or .parquet file, or data set digits (default: the model's)."
    columns: str | None = None
    "Input columns of a table, separated by commas (default: all except the id column)."
    id_column: str | None = None
    "Column of ids, texts or integers, which are copied to the results (default: none)."
    data_dir: Path | None = None
    "Folder with the data set of the model or of --inputs; not needed for the digits."
    split: str | None = None
    "Split of the data set (default: test; plan: train)."
    max_inputs: CountOrNone = None
    "Maximum number of data points (default: 1,000; plan: 2,000; run and distill: all)."
    outputs: Returned = "logits"
    "Kind of the model's outputs: a classifier's logits or probabilities, or values."
    seed: Annotated[int, {"least": 0}] = 0
    "Seed of all random numbers."

    num_data: Count = 8
    "K: number of data points that are coded together."
    num_workers: Count = 20
    "N: number of coded data points, each for one worker."
    code: Path | None = None
    "File of a code written by `nercc tune`, whose K and N are used (default: none)."
    groups: CountOrNone = None
    "Groups of K in a batch (default: 1); row by row: rows in a call (default: by time)."
    batches: CountOrNone = None
    "Maximum number of batches (default: all)."

    max_stragglers: int | None = None
    "Largest number of stragglers; all numbers from 0 are compared (default: N - K)."
    sets: Count = 20
    "Random straggler sets for each number of stragglers."

    layout: str = "chebyshev"
    "Layout to start from: chebyshev, interleaved, repeated or mixed:0.5."
    points: Annotated[bool, "--points", "--lambdas-only"] = True
    "Tune the regression points and the lambdas, or only the lambdas."
    learn_decoder: Annotated[bool, "--learn-decoder", "--spline"] = False
    "Learn the decoder after tuning, with 8 (N + K) N model calls, or keep the spline."
    criterion: Literal["mse", "cross_entropy"] = "mse"
    "Error to minimise."
    steps: Count = 400
    "Maximum number of gradient steps."

    latency: str = "lognormal:0.05:0.6"
    """Latency law of a call, in seconds: lognormal:MEDIAN:SIGMA, exponential:MEAN[:SHIFT],
    pareto:MINIMUM:SHAPE, stragglers:SECONDS:SHARE:FACTOR (SHARE is slow), or trace:FILE."""
    budget: NotNegative = 1.5
    "Maximum number of calls per query beyond one, on average."
    max_workers: Count = 20
    "Maximum number of workers for queries that arrive together."
    queries: Count = 8
    "Number of queries that arrive together; times end at the last answer."
    overhead_s: NotNegative = 0.02
    "Seconds for encoding, sending and decoding, added to every system's time."
    buffer: CountOrNone = None
    "Number of waiting queries that are ordered by similarity together (default: --queries)."
    layouts: str = "chebyshev,interleaved,repeated"
    "NeRCC's layouts to compare, as in `nercc tune`, separated by commas."
    surrogate: str | None = None
    "Surrogate: student, a file of `nercc distill`, or module:function (default: none)."

    share: Annotated[float, {"least": 0, "above": True, "most": 1}] = 0.07
    "Maximum multiplications of the student, as a share of the model's."
    answers: CountOrNone = None
    "Number of model answers to train on (default: twice the inputs, at least 4,000)."
    epochs: Count = 20
    "Passes over these answers."
    mixed: Share = 0.5
    "Share of the answers whose inputs are weighted sums of inputs."
    learning_rate: Positive = 3e-3
    "Largest learning rate of Adam."

    tolerance: float | None = None
    "Run row by row: largest error bar of predicted rows, in output units (0: compute all)."
    max_disagreement: float | None = None
    "Largest share of labels that differ from the model's own (default: none; plan: 0.005)."
    coverage: float = 0.9
    "Share of errors that error bars cover."
    compute: Literal["needed", "all"] = "needed"
    "Rows to compute: those whose predictions are too uncertain, or all except late ones."
    wait_for: int | None = None
    "Number of answers at which a batch is decoded (default: 85 % of N, at least K)."
    deadline_s: Positive = 30.0
    "Seconds after which a batch is decoded; row by row: after which a call is sent again."
    job_deadline_s: float | None = None
    "Seconds after which a run row by row ends, with the values known (default: no limit)."
    grace_s: float = 0.0
    "Seconds to wait after a run row by row for late answers, which test error bars."
    max_calls: int | None = None
    "Maximum number of rows to compute (default: no limit)."
    statistic: str | None = None
    "Estimate over all rows: mean, quantile:Q, above:VALUE, or of a function: mean@module:name."
    stop_at: NotNegativeOrNone = None
    "End the run when the statistic's interval is at most this long (default: do not)."
    check_answers: float | None = None
    "Share of right rows that may look wrong and be computed again (default: no checks)."
    max_fenced: float = 0.25
    "Maximum share of workers that may be fenced for wrong answers."

    pool: Literal["devices", "ray"] = "devices"
    "Kind of workers: threads on this process's devices, or Ray actors."
    workers: CountOrNone = None
    "Workers in the pool (default: N): more than N are spare; fewer run several points each."
    worker_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    "Dtype of workers' inputs and weights (default: the model's)."
    address: str | None = None
    "Ray cluster: HOST:6379, ray://HOST:10001, auto, local (default: RAY_ADDRESS, or this machine)."
    actor_options: dict[str, Any] | None = None
    """Ray's options for actors, as a TOML table: {num_cpus = 1, num_gpus = 0.5, resources =
    {TPU = 4}} (default: at most 0.5 CPUs; if the cluster has GPUs, 1 or an equal share)."""
    runtime_env: dict[str, Any] | None = None
    """Ray's runtime environment, as a TOML table: {working_dir = '.'} sends a folder to the nodes
    (default: none)."""

    faults: dict[str, Any] | None = None
    """Faults to inject for trials, as a TOML table: {straggler_rate = 0.05, straggler_delay_s =
    0.5}. Delays in seconds: service_delay_s of every call, straggler_delay_s (default: 1). Shares
    of the calls: straggler_rate, death_rate, wrong_rate (default: 1). straggler_score is a
    module:function that scores rows; calls with the largest scores straggle. wrong_workers,
    {swap = [1]}, swap rows. fault_seed is the seed (default: --seed)."""

    output: Path = Path()
    "File for the result; plan: a folder; run: a file or a folder."
    plot: Path = Path()
    "File for the picture."
    numbers: Path | None = None
    "JSON file for the table's numbers (default: none)."
    resume: Annotated[bool, "--resume"] = False
    "Continue a run that ended early."
    evaluate: Annotated[bool, "--evaluate"] = False
    "Measure the accuracy now, on the test set; needs the data."
    names: Annotated[list[str] | None, ""] = None
    "Names of models (default: all)."
    file: Annotated[Path, ""] = Path("my_model.py")
    "Path of the .py file to write."

    def __post_init__(self):
        model, weights, inputs = self.model, self.weights, self.inputs
        if ":" not in model:
            with of_option("--model"):
                check_model_name(model)
        elif model.startswith(HUB) and not re.fullmatch("[^/]+/[^/]+", model.removeprefix(HUB)):
            raise ValueError(f"--model: one of the hub is named hf:owner/name, not {model!r}")
        if weights is not None and not str(weights).startswith(HUB) and not weights.exists():
            raise ValueError(f"--weights {weights}: there are no weights at {weights}")
        if inputs is not None and not inputs.is_file():
            from nercc_models.data import list_data

            if str(inputs) not in list_data():
                raise ValueError(f"--inputs {inputs}: there is no such file, and no such data set")
        if self.pool == "ray" and importlib.util.find_spec("ray") is None:
            raise ImportError("--pool ray needs Ray: pip install '.[ray]' in a clone")

    @property
    def by_row(self) -> bool:
        """Return whether `nercc run` works row by row instead of in groups of a code."""
        return self.tolerance is not None or self.max_disagreement is not None


def refuse(options: Options, other: str, *names: str) -> None:
    """Raise ValueError if one of these options is set, which are not allowed with `other`."""
    for name in names:
        if getattr(options, name) != getattr(Options, name):
            raise ValueError(f"--{name.replace('_', '-')} does not go with {other}")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        function: Its function as `file:name` in this package, imported when the command runs.
        first: The options that come first in `--help`, separated by spaces.
        further: The other options that it takes, separated by spaces.
        defaults: Its own defaults for results; a path without an extension is a folder.
    """

    function: str
    first: str = ""
    further: str = ""
    defaults: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def help(self) -> str:
        """The docstring of the command's function."""
        file, _, name = self.function.partition(":")
        tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
        found: Any = next(each for each in tree.body if getattr(each, "name", "") == name)
        return str(ast.get_docstring(found))

    def options(self) -> list[Option]:
        """Return the command's options, in their order in `--help`."""
        fields: Any = ast.parse(inspect.getsource(Options)).body[0]
        words = {
            ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
            for field, text in itertools.pairwise(fields.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        }
        first, panel, found = self.first.split(), "", {}
        for name, kind in typing.get_type_hints(Options, include_extras=True).items():
            annotated = typing.get_origin(kind) is Annotated
            kind, *further = typing.get_args(kind) if annotated else (kind,)
            limits = further.pop() if further and isinstance(further[-1], dict) else {}
            flag, panel = f"--{name.replace('_', '-')}", PANELS.get(name, panel)
            flags = [*filter(None, further)] if further else [flag]
            default = self.defaults.get(name, getattr(Options, name))
            shown = "Options" if name in first else panel
            found[name] = Option(name, kind, default, words[name], shown, flags, **limits)
        taken = {*self.further.split()} - {*first}
        return [found[name] for name in (*first, *(name for name in found if name in taken))]

    def read(self, given: Mapping[str, Any]) -> Options:
        """Return the given options, with the command's own defaults for the others.

        Raises ValueError if an option is wrong or a result cannot be written, and
        ModuleNotFoundError if a picture needs a missing package: before the work, not after it.
        """
        options = Options(**{**self.defaults, **given})
        if "plot" in self.defaults and importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError(name="matplotlib")  # otherwise noticed only after the work
        taken = {*self.first.split(), *self.further.split()}
        for name in filter(taken.__contains__, ("output", "plot", "numbers", "file")):
            path, usual = getattr(options, name), self.defaults.get(name)
            if path is None or (usual is not None and not usual.suffix):  # a folder to create
                continue
            there = path if path.exists() else path.parent
            if not os.access(there, os.W_OK):
                trouble = "may not be written to" if there.exists() else "is no folder"
                raise ValueError(f"--{name} {path}: {there.resolve()} {trouble}")
        return options


_MODEL = "weights data_dir max_inputs seed"
_COMPARED = f"{_MODEL} max_stragglers sets"

COMMANDS = {
    "demo": Command(
        "_demo:demo",
        "model inputs outputs num_data num_workers code plot numbers",
        _COMPARED,
        {"plot": Path("nercc-demo.png")},
    ),
    "distill": Command(
        "_distill:distill_student",
        "model inputs share answers epochs output",
        f"{_MODEL} mixed learning_rate",
        {"output": Path("nercc-student.safetensors")},
    ),
    "models": Command("_models:models", "names evaluate data_dir numbers"),
    "new-model": Command("_models:new_model", "file"),
    "plan": Command(
        "_plan:plan_service",
        "model inputs latency queries max_workers budget max_disagreement output",
        f"{_MODEL} split outputs overhead_s buffer layouts surrogate",
        {"output": Path("nercc-plan")},
    ),
    "run": Command(
        "_run:run",
        "model inputs tolerance max_disagreement num_data num_workers output resume",
        f"{_MODEL} columns id_column split outputs code groups batches coverage compute wait_for "
        "deadline_s job_deadline_s grace_s max_calls statistic stop_at check_answers max_fenced "
        "pool workers worker_dtype address actor_options runtime_env faults",
        {"output": Path("nercc-run.npz")},
    ),
    "tune": Command(
        "_tune:tune_code",
        "model inputs outputs num_data num_workers layout steps output",
        f"{_COMPARED} points learn_decoder criterion plot numbers",
        {"output": Path("nercc-tuned.json"), "plot": Path("nercc-tune.png")},
    ),
    "serve": Command("_serve:serve_models"),
}
