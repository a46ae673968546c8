"""Device classes by what a person writes: a model's name, ``package.module:Class``, or ``path/to/file.py:Class``.

Only a command line may name a module: what comes over a wire, or stands in a topology, names models that are here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec

from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError
from vfio_model.pci.device import PCIDevice


def find_class(name: str) -> type[PCIDevice]:
    """The device class that ``name`` stands for.

    :raise ConfigError: when there is none, or its module cannot be imported.
    """
    known = DEVICES.get(name)
    if known is not None:
        return known
    place, colon, attribute = name.rpartition(":")
    if not colon:
        hint = "known: " + ", ".join(sorted(DEVICES)) + "; one of your own is path/to/file.py:Class"
        raise ConfigError(f"no device model {name!r}", hint=hint)
    try:
        module = _module(place)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # of code that somebody else has written
        hint = f"python {place if place.endswith('.py') else f'-m {place}'} shows where that comes from"
        raise ConfigError(_told(error), where=_place(error, place), hint=hint) from error
    found = getattr(module, attribute, None)
    if isinstance(found, type) and issubclass(found, PCIDevice):
        return found
    what = "there is no class" if found is None else "no subclass of PCIDevice is"
    there = sorted(each for each, value in vars(module).items() if _is_device(value))
    raise ConfigError(
        f"{what} {attribute!r}", where=place, hint="device classes there: " + (", ".join(there) or "none")
    )


def _is_device(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, PCIDevice) and value is not PCIDevice


def _told(error: BaseException) -> str:
    """Kind and message, without what says where."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: BaseException, place: str) -> str:
    """File and line of what went wrong: the innermost that lies beside or below the named file, else of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [(each.filename, each.lineno) for each in traceback.extract_tb(error.__traceback__)]
    folder = Path(place).resolve().parent if place.endswith(".py") else None
    theirs = [each for each in frames if folder is not None and Path(each[0]).is_relative_to(folder)]
    others = [each for each in frames if Path(each[0]).is_file() and each[0] != __file__]
    last = next(reversed(theirs or others), None)
    return place if last is None else f"{last[0]}:{last[1]}"


def _module(place: str) -> ModuleType:
    path = Path(place)
    if path.suffix != ".py":
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(str(error), where=place, hint="a file is named with its .py") from error
    if not path.is_file():
        raise ConfigError("no such file", where=place)
    return _file(path.resolve())


def _file(path: Path) -> ModuleType:
    """The module in the file ``path``, executed once. It finds what lies beside it, as a script does, and its relative
    imports where it is part of a package."""
    root, names = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        root, names = root.parent, [root.name, *names]
    if str(root) not in sys.path:
        sys.path.append(str(root))
    if len(names) > 1:
        return importlib.import_module(".".join(names))
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    name = path.stem if known is None and path.stem not in sys.stdlib_module_names else path.name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def read_props(cls: type[PCIDevice], pairs: tuple[str, ...], text: str) -> dict[str, object]:
    """Properties from ``k=v`` pairs, converted to the type that ``cls`` declares, over those of a JSON object.

    :raise ConfigError: when one does not fit.
    """
    try:
        values: dict[str, object] = msgspec.json.decode(text, type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise ConfigError(str(error), where="--props") from error
    declared = cls.PROPS
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r} is not K=V", where="--prop")
        if key not in declared:
            known = ", ".join(sorted(declared)) or "it has none"
            raise ConfigError(f"{cls.__name__} has no property {key!r}", where="--prop", hint=known)
        values[key] = _convert(declared[key].type, value, pair)
    return values


_CONVERTERS: dict[type, Callable[[str], object]] = {
    bool: lambda text: {"on": True, "true": True, "off": False, "false": False}[text],
    int: lambda text: int(text, 0),
    float: float,
}


def _convert(kind: type, text: str, pair: str) -> object:
    convert = _CONVERTERS.get(kind, str)
    try:
        return convert(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{pair!r}: not a {kind.__name__}", where="--prop") from error
