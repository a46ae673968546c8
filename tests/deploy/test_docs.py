"""The documents under docs/ say what the code does: every field of the schema, and examples that run as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from deploy import run, scenario, yaml_lines
from deploy.quantity import dec_hook
from deploy.scenario_machine import Q35, Bridge, Device, Phb, Pseries, Vio
from deploy.scenario_steps import Probe, Step
from tests.deploy.page import Page
from tests.deploy.page import Step as PageStep
from tests.deploy.raw_client import RawClient
from tests.machine.q35_boards import ram_block
from vfio_model import device_api
from vfio_model.devices import DEVICES
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.memory.dma import DMASpace
from vfio_model.pci.device import PCIDevice
from vfio_model.testing import Bench

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OWNERS = (PCIDevice, DMASpace, device_api, device_api.Timer, device_api.Atc)
"""Whose methods the page on devices names."""
REFERENCE = (DOCS / "scenarios.md").read_text()
STEPS = {
    field.encode_name: next(kind for kind in field.type.__args__ if kind is not msgspec.UnsetType)
    for field in msgspec.structs.fields(Step)
    if field.name != "only"
}
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "The file": scenario.Scenario,
    **{kind.__name__: kind for kind in (Pseries, Phb, Vio, Q35, Bridge, Device)},
    **{kind.__name__: kind for kind in (scenario.Host, scenario.Fault, scenario.StartFails, Probe)},
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


def test_the_program_on_the_page_of_the_pc_runs_as_written() -> None:
    machine = Q35Machine([ram_block()], Q35Options(iommu=VtdOptions()))
    machine.root_bus.plug(DEVICES["edu"], 0x10)
    names: dict[str, Any] = {"machine": machine}
    exec(code("q35.md", "python"), names)
    assert names["functions"][1].device_id == 0x11E8
    assert names["vtd"].faults() == [] and names["domain"].table.find(0x4000_0000) is None


def test_the_device_of_ones_own_runs_as_written(runtime_dir: Path) -> None:
    """All but what needs QEMU (``make interop`` has that)."""
    page = Page("devices.md", runtime_dir)
    served = page.step("vfio-model serve")
    with page.running(served) as said:
        assert said == served.said
        done = [served]
        for step in page.steps():
            if step.command.split()[:2] not in (["vfio-model", "serve"], ["python", "drive.py"]):
                assert page.run(step) == step.said, step.command
                done.append(step)
    assert len(done) == len(page.steps()) - 1 == 5


def test_it_is_sixty_lines_and_the_pages_programs_are_clean(runtime_dir: Path) -> None:
    page = Page("devices.md", runtime_dir)
    assert len(page.files()["mine.py"].splitlines()) <= 60
    checker = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    done = subprocess.run([*checker, *page.files()], cwd=runtime_dir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_python_form_serves_the_same(runtime_dir: Path) -> None:
    page = Page("devices.md", runtime_dir)
    said = page.step("vfio-model serve").said.replace("mine.py:Mine", "Mine").replace("mine", "other")
    with page.running(PageStep("python serve_mine.py", said)) as heard, RawClient(runtime_dir / "other.sock") as client:
        assert heard == said
        assert client.read(0, 0, 4) == 0x4D494E45
        client.write(0, 0x10, 4, 1 << 20)
        assert client.read(0, 0x10, 4) == 4096, "its limit"
    assert len(page.files()["serve_mine.py"].split("\n\n")[-1].splitlines()) == 1


def test_the_page_names_the_whole_device_api_and_nothing_else() -> None:
    text = (DOCS / "devices.md").read_text()
    section = text[text.index("## The API") : text.index("### What a test does")]
    spans = set(re.findall(r"\b[A-Za-z_]\w*", " ".join(re.findall(r"`([^`]+)`", section))))
    assert set(device_api.__all__) <= spans, "every name that authors import"
    stated = {name for owner in PCIDevice.__mro__ for name in vars(owner) if name.isupper()}
    rows = "".join(re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE))
    named = set(re.findall(r"`([A-Z_]+)`", rows))
    assert named == stated | {"VENDOR_ID", "DEVICE_ID"}
    methods = set(re.findall(r"`(?:self\.)?(\w+)\(", section)) - {"function", "super"}
    missing = {name for name in methods if not any(hasattr(owner, name) for owner in OWNERS)}
    assert not missing, "what is called so exists"
    paragraph = text[text.index("### What a test does") : text.index("### What a class must never do")]
    public = {name for name in vars(Bench) if not name.startswith("_") and name != "HOST"}
    assert public - {"bring_up"} <= set(re.findall(r"`(\w+)`", paragraph))


def test_the_reference_of_scenarios_names_every_device_model() -> None:
    (row,) = re.findall(r"^\| `model` \| name \| required \| ([^;]*);", REFERENCE, re.MULTILINE)
    assert re.findall(r"`([^`]+)`", row) == list(DEVICES)


@pytest.mark.parametrize("document", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    """Code spans that look like a path of this repository, and relative links."""
    text = document.read_text()
    tops = {path.name for path in ROOT.iterdir()}
    named = {span for span in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if span.split("/")[0] in tops}
    links = {document.parent / link for link in re.findall(r"\]\((?!https?:)([\w./-]+)", text)}
    missing = [path for path in (*links, *(ROOT / span for span in named)) if not path.exists()]
    assert not missing
