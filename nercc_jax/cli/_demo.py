"""`nercc demo`: coded inference under stragglers, on real data, next to other codes."""

import dataclasses

import jax
import numpy as np
from rich.console import Console

from ..codes import (
    AbstractCode,
    Berrut,
    BerrutSpline,
    Lagrange,
    NeRCC,
    Replication,
    load_code,
)
from ..evaluation import evaluate
from ..tuning import learn_decoder
from ._demo_work import draw_kept, kept_labels, kept_table
from ._errors import of_option
from ._options import DemoOptions
from ._output import evaluating, print_whole, write_json
from ._pictures import draw_batch, straggler_plot, straggler_table
from ._process import compile_quickly
from ._workload import find_workload, require_groups, straggler_laws

# Groups that the demo learns a decoder from: a second or two, where `learn_decoder` takes more.
_GROUPS = 100


def demo(options: DemoOptions) -> None:
    """Compare codes at each number of stragglers, and labels kept against work."""
    num_data, num_workers, seed = options.num_data, options.num_workers, options.seed
    outputs = options.outputs
    tuned_codes: dict[str, AbstractCode] = {}
    if options.code is not None:
        with of_option(f"--code {options.code}"):
            tuned_codes = {"tuned": load_code(options.code)}
        num_data, num_workers = tuned_codes["tuned"].num_data, tuned_codes["tuned"].num_workers
    if num_workers < num_data:
        raise ValueError(
            f"--num-workers {num_workers}: the codes compared need at least as many workers as "
            f"data points, {num_data}"
        )
    laws = straggler_laws(num_data, num_workers, options.max_stragglers)
    nercc = NeRCC(num_data, num_workers)
    rivals = {
        "BACC": Berrut(num_data, num_workers),
        "BSCC": BerrutSpline(num_data, num_workers),
        "LCC": Lagrange(num_data, num_workers),
        "replication": Replication(num_data, num_workers),
    }
    workload = find_workload(options, outputs)
    x = workload.points("test", options.max_inputs, seed)
    x = require_groups(x, workload.source, num_data, 1, f"--max-inputs {options.max_inputs}")
    compile_quickly(workload.model, x, 20 * len(x))

    console = Console()
    codes: dict[str, AbstractCode] = {**tuned_codes, "NeRCC": nercc}
    training = workload.points("train", options.max_inputs, seed)
    if len(training) >= num_data:
        try:
            with console.status("learning a decoder ..."):
                codes["NeRCC learned"] = learn_decoder(
                    workload.model, nercc, training, key=jax.random.key(seed),
                    num_groups=_GROUPS,
                )  # fmt: skip
        except ValueError as error:  # other codes take what is not finite for stragglers
            console.print(f"no decoder was learned: {error}", soft_wrap=True)
    codes |= rivals
    with evaluating(console) as progress:
        rows = evaluate(
            workload.model,
            codes,
            x,
            laws,
            key=jax.random.key(seed),
            num_sets=options.sets,
            progress=progress,
        )
    used = rows[0].num_data_points
    what = (
        f"{options.model}, K={num_data}, N={num_workers}, {used} data points x {options.sets} "
        "straggler sets"
    )
    console.print(f"\n{what}; means over the sets with 95 % intervals; * is the best in a row.")
    # Replication recovers exact predictions or none: it has no error to compare.
    approximate = [row for row in rows if row.code != "replication"]
    print_whole(
        console, straggler_table(approximate, "mse", f"MSE of decoded {outputs}", best="min")
    )
    panels = {"mse": (f"MSE of {outputs}", True)}
    if outputs != "values":
        title = (
            "RelAcc: % of predictions with the label that the uncoded model gives; those not "
            "recovered count as wrong"
        )
        print_whole(console, straggler_table(rows, "rel_acc", title, best="max"))
        panels["rel_acc"] = ("labels kept (RelAcc)", False)
    with console.status("measuring labels kept for an amount of work; compiles first ..."):
        sized = dataclasses.replace(options, num_data=num_data, num_workers=num_workers)
        kept_rows = kept_labels(workload, x, sized)
    if kept_rows:
        print_whole(console, kept_table(kept_rows))
    top_panels = []
    if outputs != "values" and x.ndim == 4 and x.shape[-1] in (1, 3):
        available = np.random.default_rng(seed).permutation(num_workers) >= num_workers // 5
        top_panels = [draw_batch(workload.model, nercc, x[:num_data], available)]
    top_panels += [draw_kept(kept_rows)] if kept_rows else []
    straggler_plot(rows, panels, what, options.plot, top_panels)
    console.print(f"picture: {options.plot.resolve()}", soft_wrap=True)
    about = {"model": options.model, "data": workload.source, "outputs": outputs, "seed": seed}
    about |= {"num_data": num_data, "num_workers": num_workers}
    about |= {"labels_kept": [row.record() for row in kept_rows]}
    write_json(console, options.numbers, about, rows.records())
