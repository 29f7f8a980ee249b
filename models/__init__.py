"""The models that NeRCC is shown on, installed as `nercc_models`. Nothing here knows of coding."""

from .data import Data as Data
from .data import list_data as list_data
from .data import load_data as load_data
from .lenet5 import LeNet5 as LeNet5
from .registry import ReadyModel as ReadyModel
from .registry import evaluate_model as evaluate_model
from .registry import list_models as list_models
from .registry import load_model as load_model
from .registry import model_card as model_card
from .scoring import Score as Score
from .scoring import score as score
