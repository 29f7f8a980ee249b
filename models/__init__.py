"""The models that NeRCC is shown on, installed as `nercc_models`. Nothing here knows of coding."""

from .data import Data as Data
from .data import list_data as list_data
from .data import load_data as load_data
from .hybrid import HybridViT as HybridViT
from .hybrid import fold_stem as fold_stem
from .hybrid import hybrid_vit_cifar as hybrid_vit_cifar
from .lenet5 import LeNet5 as LeNet5
from .pretrained import Pretrained as Pretrained
from .pretrained import load_pretrained as load_pretrained
from .pretrained import load_state_dict as load_state_dict
from .registry import ReadyModel as ReadyModel
from .registry import evaluate_model as evaluate_model
from .registry import list_models as list_models
from .registry import load_model as load_model
from .registry import model_card as model_card
from .repvgg import RepVGG as RepVGG
from .repvgg import reparameterize as reparameterize
from .repvgg import repvgg_cifar as repvgg_cifar
from .scoring import Score as Score
from .scoring import score as score
from .vit import ViT as ViT
from .vit import vit_base_patch16_224 as vit_base_patch16_224
from .vit import vit_small_cifar as vit_small_cifar
from .vit import vit_small_patch16_224 as vit_small_patch16_224
from .vit import vit_tiny_patch16_224 as vit_tiny_patch16_224
