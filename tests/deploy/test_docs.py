"""The documents under docs/ say what the code does: every field of the schema, and examples that run as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from deploy import run, scenario, yaml_lines
from deploy.quantity import dec_hook

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = (DOCS / "scenarios.md").read_text()
STEPS = {
    field.encode_name: next(kind for kind in field.type.__args__ if kind is not msgspec.UnsetType)
    for field in msgspec.structs.fields(scenario.Step)
    if field.name != "only"
}
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "The file": scenario.Scenario,
    **{kind.__name__: kind for kind in (scenario.Machine, scenario.Phb, scenario.Vio)},
    **{kind.__name__: kind for kind in (scenario.Host, scenario.Device, scenario.Fault)},
    **{kind.__name__: kind for kind in (scenario.StartFails, scenario.Probe)},
    **STEPS,
}


def section(heading: str) -> str:
    """What stands between ``heading`` and the next one, of whatever level."""
    found = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert found, f"no section is headed {heading}"
    return found[1]


def rows(heading: str) -> dict[str, str]:
    """The first table of a section: field -> default, as written."""
    table = section(heading).split("\n\n| action |")[0]
    return dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", table, re.MULTILINE))


def default_of(field: msgspec.structs.FieldInfo) -> object:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def code(document: str, language: str) -> str:
    """The first block of code in ``language``."""
    found = re.search(rf"```{language}\n(.*?)```", (DOCS / document).read_text(), re.DOTALL)
    assert found, f"{document} has no block of {language}"
    return found[1]


@pytest.mark.parametrize("heading", STRUCTS)
def test_every_field_stands_in_the_reference_with_its_default(heading: str) -> None:
    fields = {field.encode_name: field for field in msgspec.structs.fields(STRUCTS[heading])}
    written = rows(heading)
    assert set(written) == set(fields)
    for name, text in written.items():
        default = default_of(fields[name])
        if text in ("required", "none"):
            assert default is {"required": msgspec.NODEFAULT, "none": None}[text], name
        else:
            value = yaml.safe_load(text.strip("`"))
            assert msgspec.convert(value, fields[name].type, dec_hook=dec_hook, strict=False) == default, name


def test_every_action_of_a_fault_is_explained() -> None:
    actions = next(field for field in msgspec.structs.fields(scenario.Fault) if field.name == "action")
    assert set(re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\|$", section("Fault"), re.MULTILINE)) == set(
        actions.type.__args__
    )


def test_the_example_of_a_scenario_runs() -> None:
    example = yaml_lines.parse(code("scenarios.md", "yaml"), "scenarios.md", scenario.Scenario)
    verdict = run.run(example, DOCS, None, lambda *_: None, inline=True)
    assert verdict.passed, verdict.reason


def test_the_device_of_ones_own_runs_as_written(tmp_path: Path) -> None:
    program = tmp_path / "mine.py"
    program.write_text(code("devices.md", "python"))
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    said = code("devices.md", "console").split("\n", 1)[1]
    assert (done.stdout, done.returncode) == (said, 0), done.stderr


@pytest.mark.parametrize("document", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    """Code spans that look like a path of this repository, and relative links."""
    text = document.read_text()
    tops = {path.name for path in ROOT.iterdir()}
    named = {span for span in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if span.split("/")[0] in tops}
    links = {document.parent / link for link in re.findall(r"\]\(([\w./-]+)", text)}
    missing = [path for path in (*links, *(ROOT / span for span in named)) if not path.exists()]
    assert not missing
