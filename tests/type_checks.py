"""Run-time type checks that cost what they check.

`jaxtyped` binds the arguments of every call and remembers the sizes of named axes for it: 15
microseconds, also for those five in six functions here that take no array. They are checked by the
type checker alone. A test that serves 1,600 queries took 21.9 s of CPU time, and takes 11.6 so. A
check is made when a function is first called: a process of tests calls few of those that it loads.
"""

import functools
import inspect
import types

import jaxtyping
from jaxtyping import _decorator, _typeguard

_jaxtyped, _typechecked = _decorator.jaxtyped, _typeguard.typechecked


def install():
    """Have functions checked so that are loaded from now on, where `--jaxtyping-packages` asks."""
    # The import hook takes the first; `jaxtyped` the second, for constructors of dataclasses.
    jaxtyping.jaxtyped = _decorator.jaxtyped = _checked
    # Each check of a tree makes a function to check its leaves: 0.4 ms.
    _typeguard.typechecked = _leaf_checked


def _checked(function=None, *, typechecker):
    """Decorate as `jaxtyped` does."""
    if function is None:
        return functools.partial(_checked, typechecker=typechecker)
    if not isinstance(function, types.FunctionType):
        return _jaxtyped(function, typechecker=typechecker)
    if function.__globals__ is globals():  # a constructor that is inherited
        return function
    checked = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal checked
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if checked is None:
            shaped = _names_arrays(function)
            checked = (
                _jaxtyped(function, typechecker=typechecker) if shaped else typechecker(function)
            )
        return checked(*args, **kwargs)

    return call


def _names_arrays(function):
    """Return whether an annotation has a shape, or may have one: a string may."""
    annotations = inspect.get_annotations(function).values()
    return any(isinstance(each, str) or "jaxtyping" in repr(each) for each in annotations)


def _leaf_checked(function):
    """Decorate what `PyTree` checks a leaf with."""
    kind = function.__annotations__["x"]
    if not isinstance(kind, type | types.UnionType):
        return _typechecked(function)

    def check(x):
        if not isinstance(x, kind):
            raise TypeError

    return check
