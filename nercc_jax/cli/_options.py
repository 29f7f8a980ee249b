"""Options of all commands: dataclasses whose docstrings are the help, and checks without JAX.

A command is such a dataclass, and a function of it in a file of its own, which is imported once the
options are sound: JAX takes a second or two to import, and neither `--help` nor a misspelt option
waits for it.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import math
import os
import re
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from ._errors import of_option, report_errors
from ._own_models import HUB, check_weights, hub_name, is_own, is_shipped

Outputs: TypeAlias = Literal["logits", "probabilities"]  # of a classifier
Returned: TypeAlias = Literal["logits", "probabilities", "values"]

# Types with further arguments of `typer.Option`; `names` are its names.
Count: TypeAlias = Annotated[int, {"min": 1}]
CountOrNone: TypeAlias = Annotated[int | None, {"min": 1}]
NotNegative: TypeAlias = Annotated[float, {"min": 0}]
Share: TypeAlias = Annotated[float, {"min": 0, "max": 1}]


def command_of(options: Any, function: str) -> Callable[..., None]:
    """Return a command, as Typer reads it, that passes its options to a function of this package.

    Each field of the dataclass is an option. Its help stands in the docstring, in a section that is
    its panel of `--help`; what is before the first section is the command's help.

    Args:
        options: The dataclass, which raises ValueError where options do not fit.
        function: The function's `file:name`, imported when the command runs.
    """
    helps: dict[str, tuple[str, str]] = {}  # panel and help, by the option
    for kind in options.__mro__[:-1]:
        text = (inspect.getdoc(kind) or "") + "\n"
        for panel, section in re.findall(r"^(\S.*):\n((?: {4}.*\n)+)", text, re.MULTILINE):
            entries = re.findall(r"^ {4}(\w+): (.*\n(?: {8}.*\n)*)", section, re.MULTILINE)
            helps |= {name: (panel, " ".join(help.split())) for name, help in entries}
    hints, parameters = typing.get_type_hints(options, include_extras=True), []
    for field in dataclasses.fields(options):
        panel, help = helps[field.name]
        kind, further = hints[field.name], {}
        if typing.get_origin(kind) is Annotated:
            kind, further = typing.get_args(kind)
        names = further.get("names", (f"--{field.name.replace('_', '-')}",))
        limits = {name: value for name, value in further.items() if name != "names"}
        option = typer.Option(*names, help=help, rich_help_panel=panel, **limits)
        annotation = Annotated[kind, option]
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default,
                annotation=annotation,
            )
        )  # fmt: skip

    def call(**given: Any) -> None:
        with report_errors():
            made = options(**given)
            file, _, name = function.partition(":")
            getattr(importlib.import_module(f".{file}", __package__), name)(made)

    call.__doc__ = re.split(r"^\S.*:\n {4}", inspect.getdoc(options) or "", flags=re.MULTILINE)[0]
    call.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    return call


def check_folders(**paths: Path | None) -> None:
    """Raise ValueError if nothing can be written to an option's path: before work, not after it."""
    for name, path in paths.items():
        if path is None:
            continue
        option = f"--{name} {path}"
        if not path.parent.is_dir():
            raise ValueError(f"{option}: there is no folder {path.parent}")
        there = path if path.exists() else path.parent
        if not os.access(there, os.W_OK):
            raise ValueError(f"{option}: {there.resolve()} may not be written to")


def table_of_option(option: str, text: str, example: str) -> dict[str, Any]:
    """Return a table that is written as in TOML; raise ValueError, naming the option, if wrong."""
    try:
        return tomllib.loads(f"table = {text}")["table"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{option}: a table is needed, '{example}', not {text!r}") from error


def check_positive_options(**options: float | None) -> None:
    """Raise ValueError if an option is given that is not positive and finite."""
    for name, value in options.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """A model and its inputs.

    Raises ValueError if there is no such model or file, as far as that is known without JAX.

    Model and inputs:
        model: A shipped model (`nercc models` lists them), module:name for your own (`nercc
            new-model` writes one), or hf:owner/name from Hugging Face's hub.
        weights: Weights for module:name, which is then called with their path and returns the
            model: a file, a folder, or hf:owner/name/file.
        inputs: Data points without labels, as the model takes them, one a row: .npy, .npz, .csv or
            .parquet (default: the shipped model's data set, or example_inputs() of the module).
        data_dir: Folder with the shipped model's data set; not needed for the digits.
    Options:
        seed: Seed of all random numbers.
    """

    model: str = "lenet5-digits"
    weights: Path | None = None
    inputs: Path | None = None
    data_dir: Path | None = None
    seed: int = 0

    def __post_init__(self):
        if self.model.startswith(HUB):
            hub_name(self.model)
        elif is_shipped(self.model):
            from nercc_models.names import check_model_name  # it imports neither JAX nor the models

            with of_option("--model"):
                check_model_name(self.model)
        if self.weights is not None:
            if not is_own(self.model):
                raise ValueError(
                    f"--weights is for a model of your own, module:name, not {self.model!r}"
                )
            check_weights(self.weights)
        if self.inputs is not None and not self.inputs.is_file():
            raise ValueError(f"--inputs {self.inputs}: there is no such file")
        self.check()

    def check(self) -> None:
        """Raise ValueError where the command's own options do not fit."""


@dataclasses.dataclass(frozen=True)
class OutputOptions(ModelOptions):
    """A model with outputs of a kind.

    Model and inputs:
        outputs: What workers return: a classifier's logits, their softmax, or values without
            labels.
    """

    outputs: Returned = "logits"


@dataclasses.dataclass(frozen=True)
class ComparisonOptions(OutputOptions):
    """Codes of one size, compared at each number of stragglers.

    Code:
        num_data: K: data points that are coded together.
        num_workers: N: coded data points, each for one worker.
        max_stragglers: Largest number of stragglers; all numbers from 0 on are used (default: N -
            K).
        sets: Random straggler sets for each number of stragglers.
    Results:
        numbers: JSON file for the table's numbers (default: none).
    """

    num_data: Count = 8
    num_workers: Count = 20
    max_stragglers: int | None = None
    sets: Count = 20
    numbers: Path | None = None


@dataclasses.dataclass(frozen=True)
class DemoOptions(ComparisonOptions):
    """Compare NeRCC with BACC, BSCC, LCC, replication and a student when workers straggle.

    Each group of K data points is encoded as N coded data points, and each worker runs the model
    on one of them. S of the N workers straggle. All K predictions are recovered from the answers
    of the other workers, and compared with what the model predicts without coding.

    Model and inputs:
        max_inputs: Data points to use, at most.
    Code:
        code: File of a code, written by `nercc tune`, to compare too; its K and N are used.
    Results:
        plot: File for the picture.
    """

    max_inputs: Count = 1000
    code: Path | None = None
    plot: Path = Path("nercc-demo.png")

    def check(self) -> None:
        check_folders(plot=self.plot, numbers=self.numbers)


@dataclasses.dataclass(frozen=True)
class TuneOptions(ComparisonOptions):
    """Tune a code for a model by gradient descent through encoder, model and decoder.

    No labels are needed. The errors before and after are printed, on other data points, and the
    tuned code is written, for `nercc demo --code`, `nercc run --code` and `nercc serve --code`.

    Model and inputs:
        max_inputs: Data points to tune on, at most, and as many to compare on.
    Code:
        layout: Regression points to start from. chebyshev; interleaved, repeated or mixed:0.5 (that
            share of the further workers are repeats): predictions are exact if the data point's own
            worker answers; systematic:0.5: that share of data points have an own worker; search:
            the layout that keeps most labels.
    Descent:
        points: Tune the regression points, too, or the lambdas only.
        learn_decoder: In the end, learn the decoder from the model's answers to coded data points,
            in place of the spline's: less error, for 8 (N + K) N further calls of the model.
        criterion: Error to reduce: of the values, or of the labels' distribution, for logits only
            (default: mse; cross_entropy for a search on logits).
        steps: Gradient steps, at most.
    Results:
        output: File for the tuned code.
        plot: File for the picture.
    """

    max_inputs: Count = 1000
    layout: str = "chebyshev"
    points: Annotated[bool, {"names": ("--points/--lambdas-only",)}] = True
    learn_decoder: Annotated[bool, {"names": ("--learn-decoder/--spline",)}] = False
    criterion: Literal["mse", "cross_entropy"] | None = None
    steps: Count = 400
    output: Path = Path("nercc-tuned.json")
    plot: Path = Path("nercc-tune.png")

    def check(self) -> None:
        check_folders(output=self.output, plot=self.plot, numbers=self.numbers)
        if self.criterion == "cross_entropy" and self.outputs != "logits":
            raise ValueError("--criterion cross_entropy needs --outputs logits")
        if self.layout == "search" and self.outputs == "values":
            raise ValueError("--layout search goes by labels, and --outputs values have none")


@dataclasses.dataclass(frozen=True)
class PlanOptions(OutputOptions):
    """Plan how to serve a model: coded, replicated, hedged, or as it is.

    All of them are measured within a budget of workers, on data points without labels. The plan
    recommends the one whose last prediction is there soonest (p99), with few enough labels that
    differ from the model's own.

    Model and inputs:
        max_inputs: Data points to measure on, at most.
        split: Split of the data set. On data that the model was trained on, the plan promises too
            much.
    Load and requirements:
        latency: Law of the seconds that a call takes: lognormal:MEDIAN:SIGMA,
            exponential:MEAN[:SHIFT], pareto:MINIMUM:SHAPE, stragglers:SECONDS:SHARE:FACTOR or
            trace:FILE (one number a line). stragglers: the SHARE of calls takes FACTOR times as
            long, and all vary by 5 %.
        budget: Calls beyond one for each query, at most, as a share of the queries: copies or coded
            ones.
        max_workers: Workers for queries that arrive together, at most.
        max_disagreement: Share of labels that may differ from the model's own.
        queries: Queries that arrive together; the time of the last answer counts.
        overhead_s: Seconds for encoding, sending and decoding, added to every system's time.
    Systems to compare:
        buffer: Waiting queries that are ordered by similarity at a time (default: --queries).
        layouts: NeRCC's layouts of regression points, separated by commas, as in `nercc tune`.
        surrogate: Cheap model that queries may be ordered by, and stragglers' queries answered by:
            `student`, a file that `nercc distill` wrote, or module:function (default: none).
    Results:
        output: Folder for plan.json and plan.png.
    """

    max_inputs: Count = 2000
    split: str = "train"
    latency: str = "lognormal:0.05:0.6"
    budget: NotNegative = 1.5
    max_workers: Count = 20
    max_disagreement: Share = 0.005
    queries: Count = 8
    overhead_s: NotNegative = 0.02
    buffer: CountOrNone = None
    layouts: str = "chebyshev,interleaved,repeated"
    surrogate: str | None = None
    output: Annotated[Path, {"names": ("--output", "--output-dir")}] = Path("nercc-plan")

    def check(self) -> None:
        if self.outputs == "values":
            raise ValueError(
                "a plan keeps labels, and --outputs values have none: see `nercc run --tolerance`"
            )


@dataclasses.dataclass(frozen=True)
class DistillOptions(ModelOptions):
    """Train a cheap student to answer as a model does, in the model's own units.

    No labels are needed. A fifth of the inputs, 1,000 at most, is held out to measure how often
    student and model agree; for a shipped model these are the test images.
    `nercc_models.load_student_file` reads the student back.

    Training:
        share: The student's multiplications, at most, as a share of the model's.
        answers: Answers of the model to learn from (default: twice the inputs, at least 4,000).
        epochs: Passes over those answers.
        mixed: Share of the answers that are to weighted sums of inputs.
        learning_rate: Largest learning rate of Adam.
    Results:
        output: File for the weights, .safetensors; a card with its scores goes next to it.
    """

    share: float = 0.07
    answers: CountOrNone = None
    epochs: Count = 20
    mixed: Share = 0.5
    learning_rate: float = 3e-3
    output: Path = Path("nercc-student.safetensors")

    def check(self) -> None:
        if self.output.suffix != ".safetensors":
            raise ValueError(f"--output {self.output}: its name must end in .safetensors")
        check_folders(output=self.output)
        if not 0 < self.share <= 1:
            raise ValueError(f"--share {self.share} lies outside (0, 1]")
        check_positive_options(learning_rate=self.learning_rate)


@dataclasses.dataclass(frozen=True)
class RunOptions(OutputOptions):
    """Run a model over a data set on a pool whose workers may straggle or die.

    Each batch is encoded, sent to the workers, and decoded once enough of them answered; a batch
    that cannot be recovered is sent again. With --tolerance, each row is computed, or predicted
    well enough. Results are written as they come, and --resume goes on after any end. Exit codes: 0
    everything is done, 1 nothing is, 2 an option does not fit, 3 a part is missing or lost, 130
    Ctrl-C.

    Model and inputs:
        columns: Columns of --inputs (.csv, .parquet) that are inputs, by name, separated by commas
            (default: all but --id-column).
        id_column: Column of --inputs that holds an id of each row, a text or a whole number, which
            results carry as `id` (default: none).
        split: Split of the data set.
        max_inputs: Data points to use, at most (default: the whole split).
        batches: Batches to run, going over the data again and again (default: once over it).
    Code:
        num_data: K: data points that are coded together (default: 8).
        num_workers: N: coded data points, each for one worker.
        code: File of a code that `nercc tune` wrote, with its own K and N (default: NeRCC).
        groups: Groups of K data points in a batch (default: 1); row by row, rows in one call
            (default: as many as take 0.05 to 0.25 s). At most as many as there are.
    Row by row:
        tolerance: Run any function, such as a simulator, row by row: the largest error bar of a row
            that is not computed, in units of the outputs (root mean square over a row's outputs). 0
            computes all rows.
        coverage: Share of errors that error bars cover.
        compute: Rows to compute: those that are not known well enough, or all that arrive in time.
        job_deadline_s: Seconds after which a run row by row ends with what is known (default:
            none).
        grace_s: Seconds to wait, after a run row by row, for late answers that judge bars.
        max_calls: Rows to compute, at most (default: no limit).
        check_answers: Check computed rows by the learner: the share of right answers that may look
            wrong; such rows are computed again by other workers (default: no checks).
        max_fenced: Share of workers that is fenced for wrong answers, at most.
    When to decode:
        wait_for: Number of answers at which to decode (default: 85 % of N, but at least K).
        max_disagreement: Instead of a number: decode once at most this share of labels is expected
            to differ from the model's own, by 1,000 training images; for your own model, row by
            row, by the rows that are computed.
        deadline_s: Seconds after which a batch is decoded from the answers that are in.
    Workers:
        pool: Workers: threads on this process's devices, or Ray actors.
        workers: Workers in the pool: more than N are spare ones, fewer run several coded data
            points each (default: N).
        worker_dtype: Floating-point type that inputs and weights are cast to at workers (default:
            no cast).
    Ray:
        address: Ray's head: HOST:6379, ray://HOST:10001, auto or local (default: RAY_ADDRESS, or
            the Ray on this machine, or a new one).
        worker_cpus: CPUs per Ray actor (default: at most 0.5).
        worker_gpus: GPUs per Ray actor (default: one, or an equal part, where there are GPUs).
        worker_resources: Further resources per Ray actor: '{TPU = 4}' (default: none).
        working_dir: Folder to send to the nodes (default: that of a module:name which is not
            installed).
        py_modules: Python module to send to the nodes; may be repeated.
        runtime_env: File with Ray's runtime environment: .yaml, .json or .toml.
    Fault injection:
        straggler_rate: Share of calls that are delayed.
        straggler_delay_s: Seconds that such a call is delayed by.
        straggler_score: Score of a row, by which calls are delayed instead of at random, the
            largest first: `norm`, or module:function.
        straggler_leaning: With a score, the share of delayed calls that have the largest scores.
        death_rate: Share of calls in which the worker dies.
        wrong_workers: Workers that answer wrongly, by swapping rows, as a table: '{swap = [1]}'
            (default: none).
        wrong_rate: Share of these workers' calls that are answered wrongly.
    Results:
        output: Result file, .npz, .csv or row by row .parquet; or a folder, for parts of it. The
            summary's numbers go next to it, to NAME.summary.json, or into the folder.
        resume: Go on with a run that ended early.
    """

    columns: str | None = None
    id_column: str | None = None
    split: str = "test"
    max_inputs: CountOrNone = None
    batches: CountOrNone = None
    num_data: CountOrNone = None
    num_workers: Count = 20
    code: Path | None = None
    groups: CountOrNone = None
    tolerance: float | None = None
    coverage: float = 0.9
    compute: Literal["needed", "all"] = "needed"
    job_deadline_s: float | None = None
    grace_s: float = 0.0
    max_calls: int | None = None
    check_answers: float | None = None
    max_fenced: float = 0.25
    wait_for: int | None = None
    max_disagreement: float | None = None
    deadline_s: float = 30.0
    pool: Literal["devices", "ray"] = "devices"
    workers: CountOrNone = None
    worker_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    address: str | None = None
    worker_cpus: float | None = None
    worker_gpus: float | None = None
    worker_resources: str | None = None
    working_dir: Path | None = None
    py_modules: list[Path] | None = None
    runtime_env: Path | None = None
    straggler_rate: Share = 0.0
    straggler_delay_s: float = 1.0
    straggler_score: str | None = None
    straggler_leaning: Share = 1.0
    death_rate: Share = 0.0
    wrong_workers: str | None = None
    wrong_rate: Share = 1.0
    output: Path = Path("nercc-run.npz")
    resume: Annotated[bool, {"names": ("--resume",)}] = False

    def check(self) -> None:
        check_folders(output=self.output)
        check_positive_options(deadline_s=self.deadline_s, straggler_delay_s=self.straggler_delay_s)
        if self.pool == "ray" and importlib.util.find_spec("ray") is None:
            raise ImportError("--pool ray needs Ray: pip install '.[ray]' in a clone")
        if self.inputs is None or self.inputs.suffix not in (".csv", ".parquet"):
            self.refuse("inputs other than a .csv or .parquet", "columns", "id_column")
        if self.outputs == "values" and self.max_disagreement is not None:
            raise ValueError(
                "--max-disagreement is about labels, and --outputs values have none: give "
                "--tolerance"
            )
        if self.by_row:
            other = "--tolerance" if self.max_disagreement is None else "--max-disagreement"
            self.refuse(other, "code", "batches", "worker_dtype", "num_data", "wait_for")
        else:
            self.refuse("a coded run", "job_deadline_s", "max_calls", "check_answers", "grace_s")

    def refuse(self, other: str, *names: str) -> None:
        """Raise ValueError if an option is given that does not go with another one."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name.replace('_', '-')} does not go with {other}")

    @property
    def by_row(self) -> bool:
        """Return whether the model is a function that runs row by row."""
        own = self.inputs is not None or not is_shipped(self.model)
        return self.tolerance is not None or (own and self.max_disagreement is not None)
