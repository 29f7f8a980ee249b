"""Past the paper: ordering, layouts, surrogates, error probabilities, training, and rivals.

    python bench/beyond.py [--only MODEL] [--cells 60:20:20 ...] [--parts PART ...] [--quick]
        [--data-dir FOLDER]

Measures the disagreement (1 - RelAcc) of every mode for each model at each (N, K, S), with its 95 %
interval over straggler sets and groups of images, the same for all. Whatever is chosen (lambdas,
layouts, shrinkage, error probability) is chosen on other test images than those that judge:
unlabelled, and as new to the model and its student as queries will be. Writes results/beyond.json,
which docs/beyond.md shows. An hour for a model on one core. Needs MNIST and CIFAR-10 as parquet
files (`models/data.py` says where).
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from _beyond_copies import copies, dealt
from _beyond_learners import Learners, learn, learners
from _beyond_modes import Bench, Cell, Judged, Order, Workload
from _report import environment, read_json, write_json
from _settings import PACKAGES
from rich.console import Console

from nercc_jax import NeRCC
from nercc_jax.cli._options import Outputs
from nercc_jax.cli._workload import WorkerModel, load_worker_model
from nercc_models import (
    list_parity_models,
    load_parity_model,
    load_student,
    student_card,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"

MODELS: dict[str, Outputs] = {
    "lenet5-mnist": "logits",
    "repvgg-cifar10": "probabilities",
    "vit-cifar10": "probabilities",
}
CELLS = (
    Cell(100, 20, 40),
    Cell(60, 20, 20),
    Cell(30, 20, 5),
    Cell(24, 20, 2),
    Cell(20, 8, 3),
    Cell(10, 8, 2),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """The amount that is run.

    It counts images to choose by, and as many to calibrate on as to judge by; straggler sets; steps
    of gradient descent in the search.
    """

    choose: int = 1024
    points: int = 1024
    split: str = "test"
    sets: int = 20
    steps: int = 60


PARTS = ("cells", "promises", "learners", "copies")

COPIED = Size(choose=1000, points=2000)
COPIED_CELLS = {
    "lenet5-mnist": (Cell(24, 20, 2), Cell(30, 20, 5), Cell(60, 20, 20), Cell(20, 8, 12)),
    "repvgg-cifar10": tuple(
        Cell(workers, 20, lost)
        for workers, several in ((24, (2, 4)), (30, (5, 10)), (60, (20, 40)))
        for lost in several
    ),
    "vit-cifar10": (Cell(20, 8, 8), Cell(20, 8, 12)),
}

# What an error probability promises is measured by many labels that are wrong. LeNet5's
# student gives so few that the 5,000 test images do not do.
PROMISED_CELLS = (Cell(30, 20, 5), Cell(24, 20, 2), Cell(10, 8, 2))
PROMISED = {
    "lenet5-mnist": Size(choose=1000, points=10_000, split="train", sets=100),
    "repvgg-cifar10": Size(choose=1000, points=2000, sets=100),
    "vit-cifar10": Size(choose=1000, points=2000, sets=100),
}


def main() -> None:
    options = _parse()
    path = RESULTS / ("beyond-quick.json" if options.quick else "beyond.json")
    console = Console(emoji=False)
    size = Size(choose=160, points=160, sets=4, steps=4) if options.quick else Size()
    models = [options.only] if options.only else list(MODELS)
    for name in models:
        outputs = MODELS[name]
        for part in options.parts:
            own_size, cells = size, CELLS
            if part == "promises":
                own_size, cells = size if options.quick else PROMISED[name], PROMISED_CELLS
            elif part == "copies":
                own_size, cells = size if options.quick else COPIED, COPIED_CELLS[name]
            work = workload(name, outputs, own_size, options.data_dir)
            if part == "copies":  # nothing is calibrated
                judged = np.concatenate([work.calibrate, work.judged])
                work = dataclasses.replace(work, judged=judged[dealt(len(judged))])
            for cell in cells:
                if options.cells and cell.name not in options.cells:
                    continue
                start = time.perf_counter()
                bench = Bench(work, cell, console.log)
                if part == "learners":
                    with_learners(bench, name, not options.no_student)
                elif part == "copies":
                    copies(bench)
                else:
                    measure = promises if part == "promises" else every_mode
                    measure(bench, name, outputs, size)
                seconds = round(time.perf_counter() - start, 1)
                # Another process may have measured another model by now.
                results = read_json(path)
                summary = results.setdefault(name, {})
                summary |= {"outputs": outputs, "student": student_card(name)}
                here = environment(PACKAGES)
                summary.setdefault("environment", here)  # of older cells, which have none
                summary.setdefault(part, {})[cell.name] = {
                    "rows": bench.rows, "size": vars(own_size), "seconds": seconds,
                    "environment": here,
                }  # fmt: skip
                write_json(path, results)
                console.log(f"{name} {cell.name}: {part} in {seconds} s")
                jax.clear_caches()  # XLA maps memory for every program
    console.print(f"results: {path}")


def workload(name: str, outputs: Outputs, size: Size, data_dir: Path) -> Workload:
    """Return the model, its student, and three disjoint parts of the images."""
    network = load_worker_model(name, outputs)
    x, _ = network.images(size.split, data_dir, size.choose + 2 * size.points, 0)
    student = WorkerModel(load_student(name), outputs)
    choose, calibrate, judged = np.split(x, [size.choose, size.choose + size.points])
    return Workload(network, student, choose, calibrate, judged, size.sets)


def promises(bench: Bench, name: str, outputs: Outputs, size: Size) -> None:
    """Measure the error probability of repeated points, with the surrogate and without.

    Each half of the images is judged by what was calibrated on the other one.
    """
    work = bench.work
    swapped = dataclasses.replace(work, calibrate=work.judged, judged=work.calibrate)
    halves = (bench, Bench(swapped, bench.cell, bench.log))
    num_workers, num_data = bench.cell.num_workers, bench.cell.num_data
    code = NeRCC(num_data, num_workers, points="repeated", exact=True)
    for order in (Order(), Order("surrogate", 1024)):
        _, surrogate, numbers = bench.best_with_surrogate({"repeated": code}, order)
        for mode, helper, more in (
            ("repeated", None, {}),
            ("with surrogate", surrogate, numbers),
        ):
            both = [half.judged(code, helper, order) for half in halves]
            judged = Judged(*(np.concatenate(part, axis=1) for part in zip(*both, strict=True)))
            bench.tell(mode, judged, order, **more)


LEARNED: dict[str, Learners] = {}  # by model: all cells have the same


def with_learners(bench: Bench, name: str, with_student: bool) -> None:
    """Measure a learner from past answers, without a student and with it."""
    if name not in LEARNED:
        LEARNED[name] = learn(bench, WorkerModel(load_student(name), "logits"))
    learners(bench, LEARNED[name], with_student)


def every_mode(bench: Bench, name: str, outputs: Outputs, size: Size) -> None:
    """Measure all modes at one (N, K, S)."""
    cell = bench.cell

    def parity_model(k: int):
        known = (name, k, outputs) in list_parity_models()
        return load_parity_model(name, k, outputs) if known else None

    bench.rivals(parity_model)
    published = bench.published()
    unordered = Order()
    orders = [Order("pixels", size) for size in (cell.num_data, 256, 1024)]
    by_student = Order("surrogate", 1024)
    for order in (unordered, *orders, by_student):
        bench.plain("published", published, order)
    found = {
        unordered: bench.search(unordered, 1, size.steps),
        orders[-1]: bench.search(orders[-1], 1, size.steps),
        by_student: bench.search(by_student, 0, size.steps),
    }
    for order in (unordered, *orders, by_student):
        codes = found.get(order, found[orders[-1]])
        for layout, code in codes.items():
            if (layout, order) == ("search", orders[-1]):
                bench.tell(layout, bench.judged(code, None, order), order)
            else:
                bench.plain(layout, code, order)
    for order in (unordered, by_student):
        bench.with_surrogate(found[order], order)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(MODELS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--cells", nargs="*", type=_cell_name, help="as in 60:20:20")
    parser.add_argument("--no-student", action="store_true", help="of learners, those without")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data-dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    return parser.parse_args()


def _cell_name(text: str) -> str:
    return Cell(*map(int, text.split(":"))).name


if __name__ == "__main__":
    main()
