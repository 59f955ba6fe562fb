"""What is installed, and whether it is of a release that this package was run with."""

from __future__ import annotations

import platform
from importlib import metadata

import megatron_mod
from megatron_mod.doctor.findings import Findings

PACKAGE = megatron_mod.__name__
INSTALL = "pip install -e . in its repository's root"
NEEDED = ("torch", "megatron-core", "transformers")
# Used where they are, and not asked for.
OPTIONAL = ("transformer_engine", "transformer_engine_torch", "apex", "flash_attn", "lm_eval")


def versions(findings: Findings) -> dict[str, dict[str, str | None]]:
    """Of this package, Python and the libraries: ``version`` (``None``: not installed), and
    ``supported``, the range that this package's metadata gives (``None``: any)."""
    wanted = _wanted(findings)
    installed = {name: _installed(name) for name in (*wanted, *OPTIONAL)}
    installed["python"] = platform.python_version()
    for name, supported in wanted.items():
        _compare(name, installed[name], supported, findings)
    ours: dict[str, dict] = {PACKAGE: {"version": megatron_mod.__version__, "supported": None}}
    return ours | {
        name: {"version": version, "supported": wanted.get(name)}
        for name, version in installed.items()
    }


def _wanted(findings: Findings) -> dict[str, str | None]:
    """The libraries that this package needs, without its extras, and their versions."""
    unknown: dict[str, str | None] = dict.fromkeys(("python", *NEEDED))
    try:
        about = metadata.metadata(PACKAGE)
        from packaging.requirements import Requirement
    except metadata.PackageNotFoundError:
        findings.warn(
            f"{PACKAGE} is not installed but runs from a folder, so no version is compared with "
            "those it supports",
            INSTALL,
        )
        return unknown
    except ImportError:
        findings.problem("packaging is not installed, so no version is compared", INSTALL)
        return unknown
    found: dict[str, str | None] = {"python": about["Requires-Python"]}
    for requirement in map(Requirement, about.get_all("Requires-Dist") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            borders = sorted(map(str, requirement.specifier), reverse=True)  # >= before <
            found[requirement.name] = ",".join(borders) or None
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _compare(name: str, version: str | None, supported: str | None, findings: Findings) -> None:
    if version is None:
        findings.problem(f"{name} is not installed", INSTALL)
    elif supported is not None:
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(supported).contains(version, prereleases=True):
            remedy = f'pip install "{name}{supported}"'
            findings.problem(
                f"{name} {version} is not one that {PACKAGE} supports: {supported}",
                "use another Python" if name == "python" else remedy,
            )
