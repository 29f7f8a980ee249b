"""The models that NeRCC is shown on, installed as `nercc_models`. Nothing here knows of coding."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # all names, for readers and type checkers; the same as in `_WHERE`
    from .data import Data as Data
    from .data import list_data as list_data
    from .data import load_data as load_data
    from .distillation import Distilled as Distilled
    from .distillation import StudentScore as StudentScore
    from .distillation import score_student as score_student
    from .finding import SoftmaxModel as SoftmaxModel
    from .finding import example_inputs as example_inputs
    from .finding import find_callable as find_callable
    from .finding import find_model as find_model
    from .hub import HubModel as HubModel
    from .hub import TorchModel as TorchModel
    from .hub import load_hub_model as load_hub_model
    from .hub_files import hub_file as hub_file
    from .hybrid import HybridViT as HybridViT
    from .hybrid import fold_stem as fold_stem
    from .hybrid import hybrid_vit_cifar as hybrid_vit_cifar
    from .inputs import load_inputs as load_inputs
    from .lenet5 import LeNet5 as LeNet5
    from .names import list_models as list_models
    from .names import model_card as model_card
    from .points import DataPoints as DataPoints
    from .points import Split as Split
    from .points import find_points as find_points
    from .pretrained import Pretrained as Pretrained
    from .pretrained import load_pretrained as load_pretrained
    from .pretrained import load_state_dict as load_state_dict
    from .registry import ParityModel as ParityModel
    from .registry import ReadyModel as ReadyModel
    from .registry import evaluate_model as evaluate_model
    from .registry import list_parity_models as list_parity_models
    from .registry import load_model as load_model
    from .registry import load_parity_model as load_parity_model
    from .registry import parity_card as parity_card
    from .repvgg import RepVGG as RepVGG
    from .repvgg import reparameterize as reparameterize
    from .repvgg import repvgg_cifar as repvgg_cifar
    from .scoring import Score as Score
    from .scoring import score as score
    from .students import Student as Student
    from .students import list_students as list_students
    from .students import load_student as load_student
    from .students import load_student_file as load_student_file
    from .students import multiplications as multiplications
    from .students import student_card as student_card
    from .vit import ViT as ViT
    from .vit import vit_base_patch16_224 as vit_base_patch16_224
    from .vit import vit_small_cifar as vit_small_cifar
    from .vit import vit_small_patch16_224 as vit_small_patch16_224
    from .vit import vit_tiny_patch16_224 as vit_tiny_patch16_224

# Imported late: Flax and JAX take seconds, and to know a name needs neither.
_WHERE = {
    "data": "Data list_data load_data",
    "distillation": "Distilled StudentScore score_student",
    "finding": "SoftmaxModel example_inputs find_callable find_model",
    "hub": "HubModel TorchModel load_hub_model",
    "hub_files": "hub_file",
    "hybrid": "HybridViT fold_stem hybrid_vit_cifar",
    "inputs": "load_inputs",
    "lenet5": "LeNet5",
    "names": "list_models model_card",
    "points": "DataPoints Split find_points",
    "pretrained": "Pretrained load_pretrained load_state_dict",
    "registry": (
        "ParityModel ReadyModel evaluate_model list_parity_models load_model "
        "load_parity_model parity_card"
    ),
    "repvgg": "RepVGG reparameterize repvgg_cifar",
    "scoring": "Score score",
    "students": (
        "Student list_students load_student load_student_file multiplications student_card"
    ),
    "vit": ("ViT vit_base_patch16_224 vit_small_cifar vit_small_patch16_224 vit_tiny_patch16_224"),
}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    name for names in _WHERE.values() for name in names.split()
]


def __getattr__(name: str) -> Any:
    """Return a public name or a module, imported when it is first asked for."""
    for place, names in _WHERE.items():
        if name == place or name in names.split():
            module = importlib.import_module(f".{place}", __name__)
            globals()[name] = found = module if name == place else getattr(module, name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_WHERE})
