"""Students: small, cheap stand-ins for a model, and what they cost.

A student was trained on a model's own outputs (`nercc_models.distill`) and answers on the same
scale. This file holds the forms that students come in, the count of multiplications that keeps them
cheap, and their files: `<name>-student.safetensors` with the card `<name>-student.json`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .names import WEIGHTS_DIR, read_card
from .repvgg import RepVGG, reparameterize
from .weights import load_weights, num_parameters

# A student's multiplications, as a share of the model's, at most.
SHARE = 0.07


class ConvStudent(nnx.Module):
    """Means over squares of pixels, 3x3 convolutions of stride 2, and a linear map of the rest.

    Maps images (B, *input_shape), channels last, to outputs (B, num_outputs).

    Arguments:
        pool: edge of the squares that are averaged first; what is left over at the far edges of the
            images is not looked at.
        widths: channels of each convolution.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        *,
        pool: int,
        widths: Sequence[int],
        rngs: nnx.Rngs,
    ):
        height, width, channels = input_shape
        self.pool = pool
        self.convolutions = nnx.List()
        rows, columns = height // pool, width // pool
        for before, after in zip([channels, *widths[:-1]], widths, strict=True):
            options: dict[str, Any] = {"kernel_init": nnx.initializers.he_normal(), "rngs": rngs}
            conv = nnx.Conv(before, after, (3, 3), strides=(2, 2), padding="VALID", **options)
            self.convolutions.append(conv)
            rows, columns = (rows - 1) // 2, (columns - 1) // 2
        self.head = nnx.Linear(rows * columns * widths[-1], num_outputs, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch outputs"]:
        x = nnx.avg_pool(images, (self.pool,) * 2, (self.pool,) * 2) if self.pool > 1 else images
        for conv in self.convolutions:
            x = jax.nn.relu(conv(x))
        return self.head(x.reshape(len(x), -1))


class Perceptron(nnx.Module):
    """Linear maps with ReLU between them, for data points (B, *input_shape) of any shape."""

    def __init__(
        self, input_shape: Sequence[int], num_outputs: int, *, widths: Sequence[int], rngs: nnx.Rngs
    ):
        sizes = [math.prod(input_shape), *widths]
        self.layers = nnx.List(
            [
                nnx.Linear(*pair, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
                for pair in itertools.pairwise(sizes)
            ]
        )
        self.head = nnx.Linear(sizes[-1], num_outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch outputs"]:
        x = x.reshape(len(x), -1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A student's form, as plain values that its card keeps.

    Attributes:
        kind: "repvgg" (colour images; trains with three branches for each block and ships with
            one), "convolution" (`ConvStudent`) or "perceptron" (`Perceptron`).
        input_shape: The shape of one data point.
        output_shape: The shape of the model's answer to it.
        widths: Channels or hidden units, layer by layer; for "repvgg" the stem's and each stage's.
        blocks: Blocks of each stage, "repvgg" only; stem and stages halve the image.
        pool: Edge of the squares that are averaged first, "convolution" only.
    """

    kind: Literal["repvgg", "convolution", "perceptron"]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    pool: int = 1

    def numbers(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return the untrained student in the form that trains, with flat outputs (B, outputs)."""
        outputs = math.prod(self.output_shape)
        if self.kind == "repvgg":
            strides = (2,) * len(self.widths)
            return RepVGG(self.widths, self.blocks, strides, num_classes=outputs, rngs=rngs)
        if self.kind == "convolution":
            shape, widths = self.input_shape, self.widths
            return ConvStudent(shape, outputs, pool=self.pool, widths=widths, rngs=rngs)
        return Perceptron(self.input_shape, outputs, widths=self.widths, rngs=rngs)

    def deployed(self, network: Any) -> nnx.Module:
        """Return a trained student in the form that ships, in evaluation mode."""
        if self.kind == "repvgg":
            network = reparameterize(network)
        network.eval()
        return network

    def blank(self) -> nnx.Module:
        """Return the shipped form, with shapes in the place of arrays."""
        return nnx.eval_shape(lambda: self.deployed(self.build(nnx.Rngs(0))))


class Student(eqx.Module):
    """A trained student as a function of a batch, with a model's shapes of input and output.

    A pytree whose leaves are its arrays, as `ReadyModel` is. `base` is the model's name.
    """

    state: nnx.State
    graphdef: Any = eqx.field(static=True)
    base: str = eqx.field(static=True)
    input_shape: tuple[int, ...] = eqx.field(static=True)
    output_shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """About the model's answers to a batch as the model takes it; `ValueError` otherwise."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"The student of {self.base} takes (B, {', '.join(map(str, self.input_shape))}); "
                f"got shape {tuple(x.shape)}."
            )
        network: Any = nnx.merge(self.graphdef, self.state)
        return network(x).reshape(len(x), *self.output_shape)

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters."""
        return num_parameters(self.state)


def as_student(plan: Plan, base: str, network: nnx.Module) -> Student:
    """Return a network in the form that ships, ready to run."""
    graphdef, state = nnx.split(network)
    return Student(state, graphdef, base, plan.input_shape, plan.output_shape)


def student_name(base: str) -> str:
    """Return the name of a model's student, and of its files."""
    return f"{base}-student"


def list_students(weights_dir: str | Path = WEIGHTS_DIR) -> tuple[str, ...]:
    """Return the models whose student `load_student` knows."""
    files = sorted(Path(weights_dir).glob("*-student.json"))
    return tuple(path.stem.removesuffix("-student") for path in files)


def load_student(name: str, *, weights_dir: str | Path = WEIGHTS_DIR) -> Student:
    """Load the shipped student of the model of that name; see `Student`.

    Raises:
        ValueError: There is none; the message lists what exists.

    ```python
    from nercc_models import list_models, list_students, load_data, load_model, load_student
    from nercc_models import model_card, multiplications, score_student, student_card

    print(list_models(), list_students(), model_card("lenet5-digits"))
    model, student = load_model("lenet5-digits"), load_student("lenet5-digits")
    x = model.preprocess(load_data("digits", "test").images[:100])
    print(score_student(model, student, x), student_card("lenet5-digits"))
    print(multiplications(student, model.input_shape), "of", multiplications(model, x.shape[1:]))
    ```
    """
    _check_student(name, weights_dir)
    return load_student_file(Path(weights_dir) / f"{student_name(name)}.safetensors")


def load_student_file(path: str | Path) -> Student:
    """Load the student that `nercc distill --output FILE` or `write_student` wrote.

    Raises:
        FileNotFoundError: The weights or their card are missing.
        ValueError: A file is damaged, the card is no student's, or the weights do not fit it.
    """
    path = Path(path)
    card_path = path.with_suffix(".json")
    for file in (path, card_path):
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file.resolve()}.")
    card = read_card(path.stem, path.parent)
    if not isinstance(card, dict) or "plan" not in card:
        raise ValueError(f"{card_path} is not the card of a student: it has no 'plan'.")
    plan = _plan_of(card["plan"])
    graphdef, blank = nnx.split(plan.blank())
    state = load_weights(path, blank, card.get("sha256"))
    return Student(state, graphdef, card["base"], plan.input_shape, plan.output_shape)


def student_card(name: str, *, weights_dir: str | Path = WEIGHTS_DIR) -> dict[str, Any]:
    """Return the card of a model's student: its making, its cost, its agreement."""
    _check_student(name, weights_dir)
    return read_card(student_name(name), weights_dir)


def _check_student(name: str, weights_dir: str | Path) -> None:
    known = list_students(weights_dir)
    if name not in known:
        raise ValueError(
            f"There is no student of {name!r} in {Path(weights_dir).resolve()}. "
            f"Known: {', '.join(known) or 'none'}."
        )


def _plan_of(numbers: dict[str, Any]) -> Plan:
    """Return the plan of `Plan.numbers`."""
    values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
    return Plan(**values)


# -- What a model costs ----------------------------------------------------------------------------


def multiplications(model: Callable[[Array], Any], input_shape: Sequence[int]) -> int:
    """Count the multiplications of a model's convolutions and matrix products for a data point.

    They are counted on the traced program, float32, with padding's zeros multiplied, too, as XLA
    does; what goes element by element (activations, normalisations) is left out, as is usual.

    Raises:
        ValueError: A loop's number of turns is known at run time only.
    """
    batch: Any = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    return _count(eqx.filter_make_jaxpr(model)(batch)[0].jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        shape = equation.invars[0].aval.shape
        return size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        # All of the kernel but its axis of outputs: its axis of inputs is a group's already.
        return size * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    inner = [_count(jaxpr) for jaxpr in _inner(params)]
    if name == "while" and any(inner):
        raise ValueError("a while loop's multiplications cannot be counted before it runs")
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _inner(params: dict[str, Any]) -> list[Any]:
    """Return the programs that an equation calls."""
    values = [
        each
        for value in params.values()
        for each in (value if isinstance(value, (tuple, list)) else [value])
    ]
    opened = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in opened if hasattr(value, "eqns")]


def plan_within(budget: float, input_shape: Sequence[int], output_shape: Sequence[int]) -> Plan:
    """Return the widest student of a plain form within a budget of multiplications.

    Images (height, width, channels) of 8 pixels and more get convolutions, anything else a
    perceptron with two hidden layers, or with none where the budget does not give these 4 units.

    Raises:
        ValueError: Not even the smallest student fits.
    """
    shape, outputs = tuple(input_shape), tuple(output_shape)
    if len(shape) == 3 and min(shape[:2]) >= 8:
        smallest = _conv_plan(shape, outputs, 1)
        wider = _widest(lambda width: _conv_plan(shape, outputs, width), 1, budget)
    else:
        smallest = Plan("perceptron", shape, outputs, ())
        wider = _widest(lambda width: Plan("perceptron", shape, outputs, (width,) * 2), 4, budget)
    if wider is not None:
        return wider
    cost = plan_cost(smallest)
    if cost > budget:
        raise ValueError(
            f"a student may do {budget:,.0f} multiplications, and the smallest does {cost:,}: the "
            "model is too cheap to be worth a student"
            + ", or JAX cannot trace it and count them"
            * (not budget)
        )
    return smallest


def _widest(plan: Callable[[int], Plan], least: int, budget: float) -> Plan | None:
    """Return the plan of the largest width, `least` or more, whose cost is within the budget."""
    if plan_cost(plan(least)) > budget:
        return None
    fits, fails = least, 2 * least
    while plan_cost(plan(fails)) <= budget:
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if plan_cost(plan(middle)) <= budget:
            fits = middle
        else:
            fails = middle
    return plan(fits)


def _conv_plan(shape: tuple[int, ...], outputs: tuple[int, ...], width: int) -> Plan:
    """Two convolutions, and one more for each doubling of the pooled image beyond 16 pixels."""
    side = min(shape[:2])
    pool = 1 if side < 16 else 2 if side < 64 else 4
    further = max(0, math.floor(math.log2(side / pool / 16)))
    widths = tuple(width * 2**i for i in range(2 + further))
    return Plan("convolution", shape, outputs, widths, pool=pool)


def plan_cost(plan: Plan) -> int:
    """Return a planned student's multiplications for a data point; not for "repvgg".

    They are in closed form, since the search asks for many, and tracing each would take seconds.
    """
    outputs = math.prod(plan.output_shape)
    if plan.kind == "perceptron":
        sizes = [math.prod(plan.input_shape), *plan.widths, outputs]
        return sum(before * after for before, after in itertools.pairwise(sizes))
    if plan.kind == "repvgg":
        raise ValueError("a RepVGG's multiplications are counted by `multiplications`")
    height, width, channels = plan.input_shape
    rows, columns, cost = height // plan.pool, width // plan.pool, 0
    for before, after in itertools.pairwise([channels, *plan.widths]):
        rows, columns = (rows - 1) // 2, (columns - 1) // 2
        cost += rows * columns * 9 * before * after
    return cost + rows * columns * plan.widths[-1] * outputs
