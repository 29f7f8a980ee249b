"""`nercc tune`: tune the parameters of a code by gradient descent on unlabelled data."""

import datetime
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from ..codes import AbstractCode, Berrut, BerrutSpline, NeRCC, Replication, save_code
from ..codes.points import coincident
from ..tuning import Descent, learn_decoder, tune
from ._command import of_option
from ._comparison import compare, points_for, straggler_laws
from ._options import Options
from ._output import progress_bar, show, write_json
from ._workload import find_workload


def tune_code(options: Options) -> None:
    """Tune a code for a model by gradient descent through encoder, model and decoder.

    No labels are needed. The errors before and after tuning are printed, measured on other data
    points. The tuned code is written to a file for `nercc demo --code` and `nercc run --code`; with
    the layouts `interleaved` and `repeated`, also for `nercc serve --code`.
    """
    size, outputs = (options.num_data, options.num_workers), options.outputs
    num_data, num_workers = size
    if options.criterion == "cross_entropy" and outputs != "logits":
        raise ValueError("--criterion cross_entropy needs --outputs logits")
    laws = straggler_laws(*size, options.max_stragglers)
    with of_option(f"--layout {options.layout}"):
        start = NeRCC(*size, points=options.layout)
    if jnp.all(coincident(start.alpha, start.beta)):  # each data point has a worker of its own
        start = NeRCC(*size, points=options.layout, exact=True)
        laws.pop("0")  # without stragglers there is nothing to tune
    if not laws:
        raise ValueError(
            f"--num-workers {num_workers}: without stragglers, there is nothing to tune"
        )
    network, data = find_workload(options)
    x = points_for(options, data, "train", num_data, least=2)
    held = points_for(options, data, "test", num_data)
    console, key = Console(), jax.random.key(options.seed)
    about = {
        "model": options.model,
        "outputs": outputs,
        "data": data.source,
        "data_points": len(x),
        "layout": options.layout,
        "stragglers": f"{', '.join(laws)} of {num_workers} workers, each number alike",
        "criterion": options.criterion,
        "seed": options.seed,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "nercc tune",
    }
    descent: Any = {"criterion": options.criterion, "points": options.points}
    title = f"{options.model}, K={num_data}, N={num_workers}"
    with progress_bar(console) as bar:
        task = bar.add_task("compiling ...", total=options.steps)

        def on_step(step: Any, code: NeRCC) -> None:
            bar.update(task, completed=step.step)
            if step.held_out is not None:
                text = f"error {step.held_out:.3f} of the untuned code's"
                bar.update(task, description=text)

        descent |= {"descent": Descent(options.steps), "on_step": on_step}
        tuned = tune(network, start, x, laws, key=key, **descent)
    code, names = tuned.code, ("lambda_enc", "lambda_dec", "gap_exponent")
    numbers = ", ".join(f"{name} {float(getattr(code, name)):.3g}" for name in names)
    taken = sum(step.objective is not None for step in tuned.history)
    results = {
        "tuned": f"{taken} steps in {tuned.seconds:.0f} s: {numbers}",
        "objective": f"{tuned.objective:.4f} of the untuned code's, on held-out groups",
    }
    codes: dict[str, AbstractCode] = {"untuned": start, "tuned": code}
    if options.learn_decoder:
        with console.status("learning the decoder ..."):
            codes["learned"] = learn_decoder(network, code, x, key=jax.random.fold_in(key, 1))
        results["decoder"] = "learned from the model's answers"
    save_code(options.output, codes.get("learned", code), about | results)

    codes |= {"BACC": Berrut(*size), "ApproxIFER": Berrut(*size, points="approxifer")}
    codes["BSCC"] = BerrutSpline(*size)
    if num_workers >= num_data:
        codes["replication"] = Replication(*size)
    what = f"{title}, data that it was not tuned on"
    compared = compare(console, options, network, codes, held, laws, what)
    compared.plot(title=what).savefig(options.plot, dpi=130)
    write_json(console, options.numbers, about, compared.records())
    results |= {"tuned code": options.output.resolve(), "picture": options.plot.resolve()}
    show(console, *(f"{name}: {value}" for name, value in results.items()))
