"""Images a second of each model, against timm's on PyTorch.

    python bench/models.py [--quick] [--cores N] [--output FOLDER]

Runs on the CPU in float32, both sides with all its cores or the first N. Use `--cores 1` where
other work is running: PyTorch's threads wait for each other after every layer, so whatever holds up
one of them holds up all. The results beside this script are of one core, for that reason.

Each of our models holds the weights of timm's (random ones), and their logits are compared first.
Contenders, timed in turn:

- ours: the jitted forward pass, weights and images being its arguments; compiled beforehand.
- torch: the PyTorch model in `inference_mode`, NCHW, which is what timm's users call.
- torch NHWC: the same in PyTorch's `channels_last` memory format, often faster on a CPU.

The ratio is ours to the faster of the two. timm has no LeNet5, so there it is a plain one; its
RepVGG for 32x32 images is timm's `ByobNet` with our widths and a stem of stride 1.
"""

import argparse
import copy
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import timm  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from rich.console import Console
    from rich.table import Table
    from timm.models import byobnet  # pyright: ignore[reportMissingImports]
    from timm.utils import reparameterize_model  # pyright: ignore
except ModuleNotFoundError as error:
    sys.exit(f"bench/models.py needs {error.name}, missing: pip install '.[demo,torch]' in a clone")

import jax
import numpy as np
from _report import Contender, Timing, environment, interleaved, write_json
from flax import nnx

from nercc_jax.evaluation import system_look
from nercc_models.lenet5 import LeNet5
from nercc_models.pretrained import load_state_dict
from nercc_models.repvgg import reparameterize, repvgg, repvgg_cifar
from nercc_models.vit import vit_base_patch16_224, vit_small_cifar, vit_tiny_patch16_224
from nercc_models.weights import num_parameters

_PACKAGES = ("nercc-jax", "jax", "jaxlib", "flax", "torch", "timm", "numpy")
_AGREEMENT = 1e-4  # of the largest logit; a larger difference would mean different work
_FORMS = {True: ("training", "deploy"), False: ("single",)}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model on both sides: `ours` from rngs, `theirs` in PyTorch, and the batch it is timed on.

    `folds` says whether there is a deploy form beside the training form.
    """

    name: str
    ours: Callable[[nnx.Rngs], nnx.Module]
    theirs: Callable[[], Any]
    batch: tuple[int, int, int, int]
    folds: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
    """One form of one subject, all times in seconds a batch."""

    subject: Subject
    form: str
    parameters: int
    difference: float
    compile_s: float
    timings: dict[str, Timing]

    def rate(self, contender: str) -> float:
        """Return images a second, from the median."""
        return self.subject.batch[0] / self.timings[contender].median

    @property
    def rival(self) -> str:
        """Return the faster of PyTorch's two memory formats."""
        return max(("torch", "torch NHWC"), key=self.rate)

    @property
    def ratio(self) -> float:
        """Return our images a second over the rival's; the median over repeats."""
        return self.timings[self.rival].ratio(self.timings["ours"])

    @property
    def best_ratio(self) -> float:
        """Return the same from each side's fastest repeat, which other work disturbs least."""
        return min(self.timings[self.rival].seconds) / min(self.timings["ours"].seconds)


# --- PyTorch's side


def torch_lenet5() -> Any:
    nn = torch.nn
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


_LENET5_LAYERS = {"0": "conv1", "3": "conv2", "7": "fc1", "9": "fc2", "11": "fc3"}


def timm_repvgg_cifar() -> Any:
    stages = ((2, 64), (3, 128), (1, 256))
    blocks = tuple(byobnet.ByoBlockCfg(type="rep", d=d, c=c, s=2) for d, c in stages)
    config = byobnet.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=32)
    model = byobnet.ByobNet(config, num_classes=10)
    stem: Any = model.stem
    for branch in (stem.conv_kxk, stem.conv_1x1):
        branch.conv.stride = (1, 1)  # timm's stem always halves the image
    return model


def timm_vit_cifar() -> Any:
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 2,
    }
    return timm.models.VisionTransformer(
        **sizes, mlp_ratio=2.0, num_classes=10, class_token=False, global_pool="avg"
    )


def state_dict(model: Any) -> dict[str, np.ndarray]:
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    if not isinstance(model, torch.nn.Sequential):
        return arrays
    split = {key: key.split(".") for key in arrays}
    return {f"{_LENET5_LAYERS[a]}.{b}": arrays[key] for key, (a, b) in split.items()}


# Batches that take each side 20 to 500 ms on two cores.
SUBJECTS = (
    Subject("LeNet5", lambda rngs: LeNet5(rngs=rngs), torch_lenet5, (512, 32, 32, 1)),
    Subject(
        "RepVGG, 32x32",
        lambda rngs: repvgg_cifar(rngs=rngs),
        timm_repvgg_cifar,
        (64, 32, 32, 3),
        folds=True,
    ),
    Subject(
        "RepVGG-A0",
        lambda rngs: repvgg("a0", rngs=rngs),
        lambda: timm.create_model("repvgg_a0"),
        (8, 224, 224, 3),
        folds=True,
    ),
    Subject(
        "RepVGG-A2",
        lambda rngs: repvgg("a2", rngs=rngs),
        lambda: timm.create_model("repvgg_a2"),
        (4, 224, 224, 3),
        folds=True,
    ),
    Subject("ViT, 32x32", lambda rngs: vit_small_cifar(rngs=rngs), timm_vit_cifar, (64, 32, 32, 3)),
    Subject(
        "ViT-Tiny/16",
        lambda rngs: vit_tiny_patch16_224(rngs=rngs),
        lambda: timm.create_model("vit_tiny_patch16_224"),
        (8, 224, 224, 3),
    ),
    Subject(
        "ViT-Base/16",
        lambda rngs: vit_base_patch16_224(rngs=rngs),
        lambda: timm.create_model("vit_base_patch16_224"),
        (2, 224, 224, 3),
    ),
)


# --- measuring


def measure(subject: Subject, repeats: int) -> list[Measured]:
    """Both forms of a subject that folds, its only form otherwise."""
    torch.manual_seed(0)
    theirs = subject.theirs().eval()
    ours: Any = nnx.eval_shape(lambda: subject.ours(nnx.Rngs(0)))
    ours = load_state_dict(ours, state_dict(theirs))
    ours.eval()
    images = np.random.default_rng(0).standard_normal(subject.batch, np.float32)
    results = []
    for form in _FORMS[subject.folds]:
        if form == "deploy":
            ours, theirs = reparameterize(ours), reparameterize_model(theirs)
        results.append(measure_form(subject, form, ours, theirs, images, repeats))
    return results


def measure_form(
    subject: Subject, form: str, ours: nnx.Module, theirs: Any, images: np.ndarray, repeats: int
) -> Measured:
    graphdef, state = nnx.split(ours)
    inputs = jax.device_put(images)

    @jax.jit
    def forward(state: nnx.State, images: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graphdef, state)
        return model(images)

    start = time.perf_counter()
    compiled = forward.lower(state, inputs).compile()
    compile_s = time.perf_counter() - start
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(compiled(state, inputs)),
        "torch": torch_call(theirs, images, torch.contiguous_format),
        "torch NHWC": torch_call(theirs, images, torch.channels_last),
    }
    logits = {name: np.asarray(call()) for name, call in calls.items()}  # and it warms them up
    size = np.abs(logits["torch"]).max()
    difference = float(max(np.abs(one - logits["torch"]).max() for one in logits.values()) / size)
    if not difference < _AGREEMENT:
        sys.exit(f"{subject.name} ({form}): logits differ by {difference:.1e} of the largest")
    contenders = {name: Contender(call) for name, call in calls.items()}
    timings = interleaved(contenders, repeats)
    parameters = num_parameters(nnx.state(ours, nnx.Param))
    return Measured(subject, form, parameters, difference, compile_s, timings)


def torch_call(model: Any, images: np.ndarray, layout: Any) -> Callable[[], Any]:
    """Return the forward pass with weights and images in that memory format beforehand."""
    model = copy.deepcopy(model).to(memory_format=layout)
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)

    def call() -> Any:
        with torch.inference_mode():
            return model(batch)

    return call


# --- reporting


def as_table(measured: list[Measured]) -> Table:
    title = "Images a second (median). Ratio: ours to the faster PyTorch; best: of fastest repeats"
    table = Table(title=title)
    for column in (
        "model",
        "form",
        "parameters",
        "batch",
        "ours",
        "torch",
        "torch NHWC",
        "ratio",
        "best",
    ):
        table.add_column(column, justify="left" if column in ("model", "form") else "right")
    table.add_column("compile", justify="right")
    table.add_column("difference", justify="right")
    for one in measured:
        rates = [f"{one.rate(name):,.1f}" for name in one.timings]
        table.add_row(
            one.subject.name,
            one.form,
            f"{one.parameters:,}",
            str(one.subject.batch[0]),
            *rates,
            f"{one.ratio:.2f}",
            f"{one.best_ratio:.2f}",
            f"{one.compile_s:.1f} s",
            f"{one.difference:.0e}",
        )
    return table


def as_json(measured: list[Measured]) -> dict[str, Any]:
    return {
        "models": [
            {
                "model": one.subject.name,
                "form": one.form,
                "parameters": one.parameters,
                "batch": list(one.subject.batch),
                "compile_s": one.compile_s,
                "largest_relative_difference": one.difference,
                "images_per_s": {name: one.rate(name) for name in one.timings},
                "rival": one.rival,
                "ratio": one.ratio,
                "best_ratio": one.best_ratio,
                "timings": {name: timing.summary() for name, timing in one.timings.items()},
            }
            for one in measured
        ]
    }


def plot(measured: list[Measured], note: str, path: Path) -> None:
    """Draw ours against the faster PyTorch, a pair of bars for each form, on a log scale."""
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(measured) + 1.6), layout="constrained")
    places = np.arange(len(measured))
    for label, at, rates in (
        ("nercc_models", -0.2, [one.rate("ours") for one in measured]),
        ("timm on PyTorch", 0.2, [one.rate(one.rival) for one in measured]),
    ):
        axes.barh(places + at, rates, 0.38, label=label, color=system_look(label)["color"])
    for place, one in zip(places, measured, strict=True):
        axes.text(one.rate("ours"), place - 0.2, f" {one.ratio:.2f}x", va="center", fontsize=8)
    axes.set_yticks(places, [f"{one.subject.name}, {one.form} form" for one in measured])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("images a second, higher is better")
    axes.set_title(note, fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few repeats; writes no results")
    parser.add_argument("--cores", type=int, help="use so many cores only (default: all)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for models.json and models.png (default: results beside this script)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.cores is not None:  # before JAX starts, which counts the cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    start = environment(_PACKAGES)
    torch.set_num_threads(start["cores"])
    measured = []
    for subject in SUBJECTS:
        console.log(subject.name)
        measured += measure(subject, 3 if arguments.quick else 11)
    after = {
        "load_average_after": list(os.getloadavg()),
        "dtype": "float32",
        "torch_threads": torch.get_num_threads(),
    }
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    loads = f"load average {start['load_average'][0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    machine = f"{start['cpu']}, cores used: {start['cores']}, float32"
    console.print(as_table(measured))
    console.print(f"{machine}; {versions}; {loads}")
    if arguments.quick and arguments.output is None:
        return
    folder = arguments.output or Path(__file__).parent / "results"
    write_json(folder / "models.json", {"environment": start | after, **as_json(measured)})
    plot(measured, f"{machine}; {loads}", folder / "models.png")
    console.print(f"wrote {folder / 'models.json'} and {folder / 'models.png'}")


if __name__ == "__main__":
    main()
