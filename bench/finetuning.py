"""Measure coded predictions before and after fine-tuning through the nested objective.

    python bench/finetuning.py [--train] [--quick] [--only MODELS] [--data-dir FOLDER]

Writes results/finetuning.json (--quick: finetuning-quick.json). For every model, (N, K, S)
and layout of the workers' points: the share of test images whose decoded label is not that model's
own label of the image itself, for the shipped model and for its fine-tuned form, in random order
and ordered as one buffer. Both are judged by their own labels, so neither gains by copying the
other; beside it stands the accuracy of the decoded labels, and clean accuracy on all test images,
which must not fall by more than 0.3 points.

--train makes the fine-tuned weights anew, on training images alone, and writes them where shipped
weights are, models/weights/<model>-coded.*; else they are read from there.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"bench/finetuning.py needs {error.name}, missing: pip install '.[demo]' in a clone")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, write_json
from _settings import PACKAGES
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from nercc_jax import ExactStragglers, NeRCC, evaluate
from nercc_jax.cli._options import Outputs
from nercc_jax.cli._workload import WorkerModel, load_worker_model
from nercc_jax.evaluation._answers import batched
from nercc_jax.inference import order_points
from nercc_jax.tuning import Descent, Sampling, Target, fine_tune
from nercc_jax.tuning._fine_tune import FineTuned, FineTuningStep
from nercc_models import ReadyModel, load_data, load_model, model_card, score
from nercc_models.augmentation import Augmentation, augment
from nercc_models.cards import made_on, store, write_card
from nercc_models.convolution import convolve
from nercc_models.recipes import RECIPES
from nercc_models.registry import WEIGHTS_DIR

_RESULTS = Path(__file__).parent / "results"
CELLS = ((60, 20, 20), (30, 20, 5), (24, 20, 2), (20, 8, 3), (10, 8, 2))
LAYOUTS = ("chebyshev", "interleaved", "repeated")
ORDERS = ("random", "ordered")
FORMS = ("original", "fine-tuned")
OUTPUTS: tuple[Outputs, ...] = ("probabilities", "logits")
ALLOWED_LOSS = 0.003  # of clean accuracy


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model's fine-tuning: its outputs, the cells and layouts that take turns, numbers."""

    model: str
    outputs: Outputs
    settings: tuple[tuple[int, int, int, str], ...]
    steps: int
    learning_rate: float
    groups: int
    fidelity: float
    label_weight: float
    tolerance: float
    images: int
    held_out: int = 1000
    checks: int = 10
    flip: bool = False
    seed: int = 0


PLANS = (
    Plan(
        model="lenet5-mnist",
        outputs="logits",
        settings=((30, 20, 5, "chebyshev"), (10, 8, 2, "chebyshev")),
        steps=800,
        learning_rate=1e-3,
        groups=6,
        fidelity=1.0,
        label_weight=1.0,
        tolerance=0.003,
        images=20_000,
    ),
    Plan(
        model="repvgg-cifar10",
        outputs="probabilities",
        settings=((30, 20, 5, "chebyshev"),),
        steps=160,
        learning_rate=2e-4,
        groups=4,
        fidelity=1.0,
        label_weight=0.2,
        # Its labels of training images are better than of others: some of that may go.
        tolerance=0.02,
        images=16_000,
        held_out=500,
        checks=4,
        flip=True,
    ),
)


def sharp(decoded: Array, original: Array) -> Array:
    """Return the divergence between both probability vectors as logits ten times as large.

    So what decides labels counts, not how certain they are beyond that.
    """
    wanted = jax.nn.log_softmax(10 * original)
    return jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(10 * decoded)))


def surprise(probabilities: Array, label: Array) -> Array:
    """Return the cross-entropy of outputs that are probabilities."""
    return -jnp.log(jnp.maximum(probabilities[label], 1e-6))


def train(plan: Plan, data_dir: Path, folder: Path, log: Callable[[str], None]) -> None:
    """Fine-tunes a shipped model on training images and writes its weights and card."""
    original = load_worker_model(plan.model, plan.outputs)
    x, labels = original.images("train", data_dir, plan.images, plan.seed)
    probabilities = plan.outputs == "probabilities"
    tuned = fine_tune(
        _fast(original),
        [NeRCC(k, n, points=layout) for n, k, _, layout in plan.settings],
        x,
        [ExactStragglers(s) for *_, s, _ in plan.settings],
        key=jax.random.key(plan.seed),
        labels=labels,
        criterion=sharp if probabilities else "cross_entropy",
        target=Target(
            fidelity=plan.fidelity,
            label_weight=plan.label_weight,
            label_criterion=surprise if probabilities else None,
            tolerance=plan.tolerance,
        ),
        sampling=Sampling(
            groups_per_step=plan.groups,
            held_out_share=plan.held_out / len(x),
            held_out_sets=8,
            augment=_augmented(plan),
        ),
        descent=Descent(
            plan.steps, plan.learning_rate, max(plan.steps // plan.checks, 1), stop_after=None
        ),
        on_step=lambda step, model: _checkpoint(plan, step, model, log),
    )
    _write(plan, tuned, folder, data_dir)


def _fast(network: WorkerModel) -> WorkerModel:
    """Return the same function, with convolutions whose gradient a CPU computes fast."""
    ready = network.network
    module: Any = nnx.merge(ready.graphdef, ready.state)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Conv) and plain_padding(part.padding):
            part.conv_general_dilated = convolve
    graphdef, state = nnx.split(module)
    return WorkerModel(dataclasses.replace(ready, graphdef=graphdef, state=state), network.outputs)


def plain_padding(padding: Any) -> bool:
    """Return whether a convolution's padding is given in pixels, as `convolve` wants it."""
    return not isinstance(padding, str)


def _augmented(plan: Plan) -> Callable[[Array, PRNGKeyArray], Array]:
    """Return the changes to images with which the shipped model was trained."""
    recipe = RECIPES[plan.model].augmentation
    how = Augmentation(padding=recipe.padding, flip=plan.flip)
    return lambda x, key: augment(key, x, jnp.zeros((len(x), 1)), how)[0]


def _checkpoint(
    plan: Plan, step: FineTuningStep, model: WorkerModel, log: Callable[[str], None]
) -> None:
    """Write the model so far at each judgement: a long run may be cut off."""
    if step.held_out is None:
        return
    store(Path("checkpoints") / f"{plan.model}-coded", f"step-{step.step}", model.network.state)
    accuracy = f"{step.accuracy:.4f}" if step.accuracy is not None else "unknown"
    log(
        f"{plan.model}, step {step.step}: held-out objective {step.held_out:.4f}, "
        f"agreement {step.agreement:.4f}, accuracy {accuracy}"
    )


def _write(plan: Plan, tuned: FineTuned[WorkerModel], folder: Path, data_dir: Path) -> None:
    name, shipped = f"{plan.model}-coded", load_model(plan.model)
    summary = store(folder, name, tuned.model.network.state)
    card = {
        "name": name,
        "base": plan.model,
        "made_by": f"python bench/finetuning.py --train --only {plan.model}",
        "data": shipped.data,
        "train_images": plan.images,
        "classes": list(shipped.classes),
        "score": {},
        **summary,
        "training_seconds": round(tuned.seconds, 1),
        "machine": made_on(),
        "recipe": model_card(plan.model)["recipe"],  # of the original
        "plan": dataclasses.asdict(plan),
        "objective": tuned.objective,
        "held_out_agreement": tuned.agreement,
        "held_out_accuracy": tuned.accuracy,
        "original_held_out_accuracy": tuned.original_accuracy,
        "evaluations": tuned.evaluations,
        "differentiated": tuned.differentiated,
        "rejected_steps": tuned.rejected,
        "history": [vars(step) for step in tuned.history if step.held_out is not None],
    }
    write_card(folder, card)
    write_card(
        folder, card | {"score": clean_score(load_model(name, weights_dir=folder), data_dir)}
    )


def clean_score(model: ReadyModel, data_dir: Path) -> dict[str, Any]:
    """Return how many of all test images a model gets right."""
    classify = eqx.filter_jit(lambda model, images: model(model.preprocess(images)))
    result = score(
        lambda images: classify(model, images), load_data(model.data, "test", data_dir=data_dir)
    )
    return {**dataclasses.asdict(result), "accuracy": result.accuracy}


@dataclasses.dataclass(frozen=True)
class Size:
    """The amount that is run."""

    points: int = 1000
    sets: int = 20
    cells: int = len(CELLS)


def measure(
    plan: Plan, size: Size, data_dir: Path, folder: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Both forms of a model in every cell, layout and order; clean accuracy."""
    tuned = load_model(f"{plan.model}-coded", weights_dir=folder)
    networks = {"original": load_model(plan.model), "fine-tuned": tuned}
    part: dict[str, Any] = {
        "clean": {form: clean_score(network, data_dir) for form, network in networks.items()},
        "card": json.loads((folder / f"{plan.model}-coded.json").read_text()),
        "size": dataclasses.asdict(size),
    }
    part["agreement"] = _agreement(networks, data_dir)
    for outputs in OUTPUTS:
        forms = {form: WorkerModel(network, outputs) for form, network in networks.items()}
        # What it was not fine-tuned for is looked at in the published form alone.
        own = outputs == plan.outputs
        layouts, orders = (LAYOUTS, ORDERS) if own else (LAYOUTS[:1], ORDERS[:1])
        part[outputs] = _rows(forms, size, data_dir, layouts, orders)
        log(f"{plan.model}, {outputs}: measured")
        jax.clear_caches()  # XLA maps memory for every program, and a process has a limit
    part["environment"] = environment(PACKAGES)
    return part


def _agreement(networks: Mapping[str, ReadyModel], data_dir: Path) -> float:
    """Return the share of test images that both forms give the same label."""
    first = next(iter(networks.values()))
    data = load_data(first.data, "test", data_dir=data_dir)
    choices = []
    for network in networks.values():
        classify = eqx.filter_jit(lambda model, images: model(model.preprocess(images)))
        parts = [
            np.argmax(classify(network, data.images[i : i + 500]), axis=-1)
            for i in range(0, len(data), 500)
        ]
        choices.append(np.concatenate(parts))
    return float(np.mean(choices[0] == choices[1]))


def _rows(
    forms: Mapping[str, WorkerModel],
    size: Size,
    data_dir: Path,
    layouts: Sequence[str],
    orders: Sequence[str],
) -> list[dict[str, Any]]:
    """Every cell, layout, order and form, on the same images and straggler sets."""
    x, labels = forms["original"].images("test", data_dir, size.points, 0)
    rows = []
    for order in orders:
        for n, k, s in CELLS[: size.cells]:
            chosen = _arranged(forms["original"], x, k, order)
            codes = {layout: NeRCC(k, n, points=layout) for layout in layouts}
            laws = {str(s): ExactStragglers(s)}
            for form, network in forms.items():
                for row in evaluate(
                    network, codes, x[chosen], laws, labels=labels[chosen],
                    key=jax.random.key(1), num_sets=size.sets,
                ):  # fmt: skip
                    summary = dataclasses.asdict(row)
                    where = {"cell": [n, k, s], "order": order, "form": form}
                    rows.append({**where, "layout": summary.pop("code"), **summary})
    return rows


def _arranged(original: WorkerModel, x: np.ndarray, num_data: int, order: str) -> np.ndarray:
    """Return the order of the data points, the same for both forms of a model.

    A shallow model's are ordered by their pixels, a deep one's by the original's own outputs, an
    upper bound on what a cheap proxy of it can give.
    """
    if order == "random":
        return np.arange(len(x))
    shallow = original.network.name.startswith("lenet5")
    features = None if shallow else batched(original, 256)(x)
    return np.asarray(order_points(x, num_data, features=features))


def disagreement(
    rows: list[dict[str, Any]], cell: tuple[int, int, int], layout: str, order: str, form: str
) -> tuple[float, float] | None:
    """Disagreement in percent with the half width of its interval, where it was measured."""
    for row in rows:
        if (tuple(row["cell"]), row["layout"], row["order"], row["form"]) == (
            cell, layout, order, form,
        ):  # fmt: skip
            return 100 * (1 - row["rel_acc"]["mean"]), 100 * row["rel_acc"]["half_width"]
    return None


def table(results: Mapping[str, Any]) -> Table:
    """Disagreement before and after, in percent."""
    head = ("model", "outputs", "(N, K, S)", "layout", "order", "before", "after")
    shown = Table(*head, title="1 - RelAcc against the model's own labels, %")
    for model, part in results["parts"].items():
        for outputs in OUTPUTS:
            for cell in CELLS:
                for layout in LAYOUTS:
                    for order in ORDERS:
                        summary = [
                            disagreement(part[outputs], cell, layout, order, form) for form in FORMS
                        ]
                        if all(summary):
                            words = [f"{t[0]:.2f} ± {t[1]:.2f}" for t in summary if t is not None]
                            shown.add_row(model, outputs, str(cell), layout, order, *words)
    return shown


def main() -> None:
    options = _parse()
    console, start = Console(emoji=False), time.perf_counter()
    path = _RESULTS / ("finetuning-quick.json" if options.quick else "finetuning.json")
    size = Size(points=240, sets=5, cells=2) if options.quick else Size()

    def log(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)

    for plan in PLANS:
        if options.only and plan.model not in options.only:
            continue
        if options.train:
            train(plan, options.data_dir, options.weights_dir, log)
        if (options.weights_dir / f"{plan.model}-coded.json").exists():
            part = measure(plan, size, options.data_dir, options.weights_dir, log)
            # Another process may have added a model by now.
            results = json.loads(path.read_text()) if path.exists() else {"parts": {}}
            results["parts"][plan.model] = part
            write_json(path, results)
            console.print(table(results))
            lost = part["clean"]["original"]["accuracy"] - part["clean"]["fine-tuned"]["accuracy"]
            within = "within" if lost <= ALLOWED_LOSS else "NOT within"
            log(f"{plan.model}: clean accuracy fell by {100 * lost:.2f} points, {within} 0.3")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--train", action="store_true", help="fine-tune anew and write the weights")
    parser.add_argument("--quick", action="store_true", help="two cells, few images and sets")
    parser.add_argument("--only", choices=[p.model for p in PLANS], nargs="+", help="models")
    parser.add_argument("--weights-dir", type=Path, default=WEIGHTS_DIR)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
