"""The models that NeRCC is shown on, installed as `nercc_models`. Nothing here knows of coding."""
