"""``vfio-model new-device``: a package with a device that works, and its test, to change into one's own."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import sys
from importlib import resources
from pathlib import Path
from string import Template

import click
import msgspec

from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError

FILES = {"__init__.py": "__init__.py", "regs.py": "regs.py", "device.py": "device.py", "test.py": "test_{name}.py"}
"""Template -> file."""
MAX_NAME = 30


@click.command()
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where the package's folder is made.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def command(name: str, directory: Path, as_json: bool) -> None:
    """Make the package NAME: a PCI device that works, its registers as data, and its test.

    NAME is a Python package's name: lower-case letters, digits and _, for example my_card.
    """
    check_name(name)
    cls = "".join(word.capitalize() for word in name.split("_"))
    folder = directory / name
    made = _make(folder, {"name": name, "cls": cls, "title": f"``{name}``"})
    device = f"{folder / 'device.py'}:{cls}"
    if as_json:
        said = {"name": name, "class": cls, "device": device, "files": [str(path) for path in made]}
        click.echo(msgspec.json.encode(said).decode())
        return
    for path in made:
        click.echo(f"made {path}")
    click.echo(f"\ntest it:   python -m pytest {made[-1]}")
    click.echo(f"serve it:  vfio-model serve {device} --socket {name}.sock")


def check_name(name: str) -> None:
    """Whether a package may be called ``name``.

    :raise ConfigError: it is no name for one, or something else is called so.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > MAX_NAME:
        what = f"{name!r} is no name for a package"
        raise ConfigError(what, hint=f"lower-case letters, digits and _, a letter first, at most {MAX_NAME}")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise ConfigError(f"{name!r} is a word of Python's")
    if name in DEVICES:
        raise ConfigError(f"there is a model {name!r} already", hint="vfio-model serve would mean that one")
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise ConfigError(f"there is a Python module {name!r} already", hint="Python would import that one")


def _make(folder: Path, words: dict[str, str]) -> list[Path]:
    templates = resources.files("deploy") / "skeleton"
    texts = {
        file.format(name=words["name"]): Template((templates / f"{source}.txt").read_text()).substitute(words)
        for source, file in FILES.items()
    }
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError("it exists already", where=str(folder), hint="nothing was written") from error
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    try:
        for file, text in texts.items():
            (folder / file).write_text(text)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(folder)) from error
    return [folder / file for file in texts]
