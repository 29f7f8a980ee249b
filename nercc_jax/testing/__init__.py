"""Checks for extensions: the contract that every code keeps."""

from ._codes import check_code

__all__ = ["check_code"]
