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
    annotations = inspect.get_annotations(function)
    kind = _KINDS.get(function.__code__)
    if kind is None or kind.annotations != annotations:
        kind = _KINDS[function.__code__] = _Kind(annotations, typechecker)
    if kind.by_name:
        return _jaxtyped(function, typechecker=typechecker)
    checked, shapes = functools.cache(lambda: kind.checked(function)), kind.shapes

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


class _Kind:
    """What functions of one `def` share: local ones are made anew at each call of another."""

    def __init__(self, annotations, typechecker):
        self.annotations, self._typechecker, self._template = annotations, typechecker, None
        each = annotations.values()
        self.by_name = any(isinstance(one, str) for one in each)  # a name that is not there yet
        self.shapes = any("jaxtyping" in repr(one) for one in each)

    def checked(self, function):
        """Return the function with its check, which beartype takes 0.8 ms to make.

        Local ones get that of an empty one, which keeps nothing alive: of 22 s of CPU time that
        serving took, 1.7 had been for such functions.
        """
        if "<locals>" not in function.__qualname__:
            return self._typechecker(function)
        if self._template is None:
            code, defaults = function.__code__, function.__defaults__
            cells = tuple(types.CellType() for _ in code.co_freevars)
            empty = types.FunctionType(code, function.__globals__, code.co_name, defaults, cells)
            empty.__annotations__, empty.__kwdefaults__ = self.annotations, function.__kwdefaults__
            empty.__qualname__ = function.__qualname__
            self._template = self._typechecker(empty)
        constants = self._template.__kwdefaults__ or {}
        if "__beartype_func" not in constants:  # there is nothing to check
            return function
        made = types.FunctionType(self._template.__code__, self._template.__globals__)
        made.__kwdefaults__ = constants | {"__beartype_func": function}
        return made


_KINDS: dict[types.CodeType, _Kind] = {}


def _leaf_checked(function):
    """Decorate what `PyTree` checks a leaf with."""
    kind = function.__annotations__["x"]
    if not isinstance(kind, type | types.UnionType):
        return _typechecked(function)

    def check(x):
        if not isinstance(x, kind):
            raise TypeError

    return check
