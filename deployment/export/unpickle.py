"""Unpickle what another program, and another Python, pickled: what is missing here is replaced by inert stand-ins."""

from __future__ import annotations  # an earlier fastai's environment runs this too, see rescue.py

import builtins
import dataclasses
import functools
import importlib
import pickle
import re
import sys
import types
import typing

from . import earlier


@dataclasses.dataclass
class Found:
    """What a pickle holds of functions whose code cloudpickle or dill wrote into it."""

    installed: list = dataclasses.field(default_factory=list)  # (pickled bytecode, the installed module's function)
    missing: bool = False  # there are others
    python: str = ""  # the version that pickled them, by their files' names
    named: set = dataclasses.field(default_factory=set)  # (module, name) of every class and function in the pickle

    def is_earlier(self) -> bool:
        """Whether a fastai before 2.8 pickled it: until then fastcore had the transforms."""
        return any(module in earlier.GONE for module, _ in self.named)

    def same_bytecode(self) -> bool:
        """Whether the Python that pickled them has this one's bytecode: the longest function tells."""
        code, function = max(self.installed, key=lambda pair: len(pair[0]), default=(None, None))
        return function is not None and code == function.__code__.co_code


class MissingType(type):
    """Gives a stand-in the attributes, such as class methods, that a pickle asks it for."""

    def __getattr__(cls, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return stand_in(f"{cls.symbol}.{name}")


class Missing(metaclass=MissingType):
    """Stands for a class or function that a learner's pickle names and that cannot be imported here."""

    symbol = ""
    python = ""  # the version that its code was pickled under

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def stand_in(symbol: str, found: Found | None = None) -> type:
    """A new `Missing` for `symbol`, whose code `found` holds, if given."""
    return type(symbol.rpartition(".")[2], (Missing,), {"symbol": symbol, "python": found.python if found else ""})


def lenient_pickle(found: Found, own_code: bool) -> types.SimpleNamespace:
    """A stand-in for the module `pickle` that unpickles what cannot be imported as `Missing`.

    Functions that were pickled with their code are taken from the installed module that they are from. Their bytecode
    is used only with `own_code`: that of another Python can crash this one.
    """
    unpickler = type("Unpickler", (LenientUnpickler,), {"found": found, "own_code": own_code})

    def load(file, **options):
        return unpickler(file, **options).load()

    return types.SimpleNamespace(__name__="pickle", Unpickler=unpickler, load=load)


class Code(tuple):
    """The arguments of a code object, in the order that Python has had since 3.8."""

    def __new__(cls, *args):
        if not isinstance(args[0], int):  # dill's own, before the others
            args = args[1:]
        if len(args) == 15:  # of Python 3.7, without the number of arguments that are positional alone
            args = (args[0], 0, *args[1:])
        return super().__new__(cls, args)


class LenientUnpickler(pickle._Unpickler):  # the one in Python, whose steps can be changed
    """See `lenient_pickle`, which sets `found` and `own_code`."""

    found: Found
    own_code: bool
    stack: list  # the base class's
    dispatch = pickle._Unpickler.dispatch.copy()

    def load_build(self):
        """Set an object's state. plum's, which dispatch fastai's transforms, are compiled on most Pythons.

        Their state is a dict then, else a pair of None and a dict: take either. Functions have theirs from dill: what
        takes their places has its own.
        """
        thing, state = self.stack[-2:]
        if isinstance(thing, MissingType) or any(thing is function for _, function in self.found.installed):
            self.stack.pop()
            return
        if type(thing).__module__.startswith("plum.") and not hasattr(thing, "__dict__"):
            self.stack.pop()
            for name, value in (state[1] if isinstance(state, tuple) else state).items():
                setattr(thing, name, value)
            return
        super().load_build()  # pyrefly: ignore[missing-attribute]  # typeshed lacks it
        if any(isinstance(value, earlier.TypeDispatch) for value in getattr(thing, "__dict__", {}).values()):
            earlier.set_dispatch(thing)

    dispatch[pickle.BUILD[0]] = load_build  # pyrefly: ignore[unsupported-operation]  # typeshed names another class

    def find_class(self, module: str, name: str):
        self.found.named.add((module, name))
        if module.partition(".")[0] == "cloudpickle" and (function := self.cloudpickled(name)):
            return function
        if module == "dill._dill" and (function := self.dilled(name)):
            return function
        if module in ("builtins", "__builtin__") and name == "getattr":
            return attribute
        if module.partition(".")[0] == "pathlib":  # Python 3.13 alone has pathlib._local
            module, name = "pathlib", "Path" if name in ("PosixPath", "WindowsPath") else name  # the other system's
        try:
            here = getattr(sys.modules["__main__"], "__package__", None)
            if not (module == "__main__" and here == __package__):  # the trainer's __main__ was another program
                return super().find_class(module, name)
        except (ImportError, AttributeError):
            package = module.partition(".")[0]
            if package in earlier.PACKAGES:
                try:
                    return earlier.moved(module, name)
                except AttributeError:  # in fastai, a callback may be there that lacks a package of its own
                    if package == "fastcore":
                        raise
            if package == "dill":  # not installed: see why_not
                raise
        return stand_in(f"{module}.{name}")

    def cloudpickled(self, name: str):
        """What takes the place of cloudpickle's function `name`; None: nothing does."""
        functions = {"_builtin_type": self.builtin_type, "subimport": import_module}
        if not self.own_code:
            functions |= {
                "_make_function": self.make_function,
                "_make_skeleton_class": self.make_class,
                "_make_skeleton_enum": self.make_enum,
                "_function_setstate": keep,
                "_class_setstate": keep,
            }
        return functions.get(name)

    def dilled(self, name: str):
        """What takes the place of dill's function `name`; None: nothing does."""
        if self.own_code:
            return dill_function if name == "_create_function" else None
        functions = {
            "_create_code": Code,
            "_create_function": self.make_function,
            "_create_type": self.make_dilled_class,
        }
        return functions.get(name)

    def make_function(self, code, scope, *_):
        module = scope.get("__name__", "__main__") if isinstance(scope, dict) else "__main__"
        filename, name, qualname = code[10:13]
        if version := re.search(r"[Pp]ython(3)\.?(\d+)", filename):
            self.found.python = ".".join(version.groups())
        function = installed(module, name, qualname if isinstance(qualname, str) else None, code[9][: code[0]])
        if function:
            self.found.installed.append((code[6], function))
            return function
        self.found.missing = True
        return stand_in(f"{module}.{name}", self.found)

    def make_class(self, kind, name, bases, options, *_):
        self.found.missing = True
        return stand_in(f"{options.get('__module__', '__main__')}.{name}", self.found)

    def make_dilled_class(self, kind, name, bases, members, *_):
        return self.make_class(kind, name, bases, members)

    def make_enum(self, bases, name, members, qualname, module, *_):
        self.found.missing = True
        return stand_in(f"{module}.{name}", self.found)

    def builtin_type(self, name: str):
        if name == "CodeType" and not self.own_code:
            return Code
        return typing.Union if name == "UnionType" else getattr(types, name)  # one and the same from Python 3.14 on


def import_module(name: str):
    """The module `name`, or a stand-in."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return stand_in(name)


def attribute(thing, name: str, *default):
    """As `getattr`, or a stand-in."""
    try:
        return getattr(thing, name, *default)
    except AttributeError:  # such as a function's __annotate__, which Python 3.14 has
        return stand_in(f"{getattr(thing, '__qualname__', thing)}.{name}")


def keep(thing, state):
    """`thing`, whose state plays no part."""
    return thing


def dill_function(code, scope, *rest):
    """A function that dill took apart: that of its module, or made anew where the module is missing here.

    dill takes apart what is bound to a class, such as `PILImage.create`, and Python before 3.11 has no `co_qualname`.
    """
    if isinstance(scope, dict):
        qualname = getattr(code, "co_qualname", code.co_name)
        arguments = code.co_varnames[: code.co_argcount]
        known = qualname if qualname != code.co_name else None
        if function := installed(scope.get("__name__", "__main__"), code.co_name, known, arguments):
            return function
    create = importlib.import_module("dill._dill")._create_function
    return create(code, scope if isinstance(scope, dict) else {"__builtins__": builtins}, *rest)


def installed(module: str, name: str, qualname: str | None, arguments: tuple) -> types.FunctionType | None:
    """The function of an importable module, other than `__main__`, that has this name and takes these arguments.

    Python 3.10 pickles no `qualname`: then `name` is looked for in the module and its classes.
    """
    if module == "__main__":
        return None
    try:
        scope = importlib.import_module(module)
    except ImportError:
        return None
    names = [qualname] if qualname else [name, *(f"{n}.{name}" for n, v in vars(scope).items() if isinstance(v, type))]
    functions = set()
    for path in names:
        function = functools.reduce(lambda thing, part: getattr(thing, part, None), path.split("."), scope)
        function = getattr(function, "__func__", function)  # of a class method
        if isinstance(function, types.FunctionType):
            code = function.__code__
            if code.co_varnames[: code.co_argcount] == arguments:
                functions.add(function)
    return functions.pop() if len(functions) == 1 else None
