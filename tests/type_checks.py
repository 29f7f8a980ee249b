"""Run-time type checks that cost what they check.

`jaxtyped` binds the arguments of every call, and checks them twice: 20 microseconds, also for those
five in six functions here that take no array. Here beartype alone checks them, and arrays share the
sizes of their axes as with `jaxtyped`. A check is made when a function is first called: a process
of tests calls few of those that it loads. A test that serves 1,600 queries took 21.9 s of CPU time
with `jaxtyped`.
"""

import functools
import inspect
import types

import jaxtyping
from jaxtyping import _decorator, _storage, _typeguard

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
    annotations = inspect.get_annotations(function).values()
    if any(isinstance(each, str) for each in annotations):  # a name that is not there yet
        return _jaxtyped(function, typechecker=typechecker)
    checked = functools.cache(lambda: typechecker(function))
    shapes = any("jaxtyping" in repr(each) for each in annotations)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if not shapes:
            return checked()(*args, **kwargs)
        _storage.push_shape_memo({})
        try:
            return checked()(*args, **kwargs)
        finally:
            _storage.pop_shape_memo()

    return call


def _leaf_checked(function):
    """Decorate what `PyTree` checks a leaf with."""
    kind = function.__annotations__["x"]
    if not isinstance(kind, type | types.UnionType):
        return _typechecked(function)

    def check(x):
        if not isinstance(x, kind):
            raise TypeError

    return check
