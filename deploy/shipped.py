"""Scenarios and recordings that come with the package, and those that a user gives by path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from deploy import yaml_lines
from deploy.scenario import Scenario
from vfio_model.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")


def _folder(name: str) -> Path:
    return Path(str(resources.files("deploy"))) / name


def scenario_names() -> list[str]:
    """The names that ``vfio-model run`` takes besides paths."""
    return sorted(path.stem for path in _folder("scenarios").glob("*.yaml"))


def scenarios() -> list[Scenario]:
    """Every shipped scenario, by name."""
    return [yaml_lines.load(_folder("scenarios") / f"{name}.yaml", Scenario) for name in scenario_names()]


def load_scenario(name_or_path: str) -> Scenario:
    """The shipped scenario of that name, or the file at that path. :raise ConfigError: when there is neither, or it
    is wrong.
    """
    return yaml_lines.load(scenario_path(name_or_path), Scenario)


def scenario_path(name_or_path: str) -> Path:
    """Where the scenario is. :raise ConfigError: when nothing is there."""
    path = Path(name_or_path)
    if path.suffix in _SUFFIXES or "/" in name_or_path:
        return path
    if name_or_path not in scenario_names():
        raise ConfigError(
            f"no scenario is called {name_or_path}",
            hint=f"shipped: {', '.join(scenario_names())}; a file of your own is given by its path, ending in .yaml",
        )
    return _folder("scenarios") / f"{name_or_path}.yaml"


def recording(name_or_path: str, beside: Path = Path()) -> Path:
    """The trace of a replay step: a file relative to the folder ``beside``, or a shipped recording by name.

    :raise ConfigError: when there is neither.
    """
    choices = [beside / name_or_path, *(_folder("recordings") / (name_or_path + end) for end in (".trace.gz", ""))]
    for choice in choices:
        if choice.is_file():
            return choice
    known = sorted(path.name.removesuffix(".trace.gz") for path in _folder("recordings").glob("*.trace.gz"))
    raise ConfigError(f"no recording {name_or_path}", hint=f"shipped: {', '.join(known) or 'none'}; or give a path")
