"""The pages that people read: their links lead somewhere, their commands have these options."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import MISSING
from pathlib import Path

import pytest
import yaml

from megatron_mod.commands.train import DryRun
from megatron_mod.config.cli import FIELDS, SECTIONS, parse
from tests.helpers.commands import blocks
from tests.unit.test_commands import SCHEMAS, SCRIPTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", ".github", "configs", "megatron_mod", "tools")
    for path in (ROOT / folder).glob("**/*.md" if folder else "*.md")
)
ROOMS = sorted(p.parent.name for p in ROOT.glob("megatron_mod/*/__init__.py"))
COMMANDS = {script: name for name, script in SCRIPTS.items()}


def commands(page: str) -> list[list[str]]:
    lines = "".join(blocks(page, "bash"))
    lines = re.sub(r"\[[^]\n]*\]", "", lines.replace("\\\n", " "))
    return [
        words
        for line in lines.splitlines()
        if (words := shlex.split(line, comments=True)) and any(word in COMMANDS for word in words)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_have_the_options_that_are_shown(page):
    for words in commands(page):
        (place,) = (place for place, word in enumerate(words) if word in COMMANDS)
        name = COMMANDS[words[place]]
        given = [w.partition("=")[0][2:] for w in words[place + 1 :] if w.startswith("--")]
        if name == "train":
            known = {
                "config",
                *FIELDS,
                *(f.name.replace("_", "-") for f in dataclasses.fields(DryRun)),
            }
        else:
            schema = SCHEMAS[name]
            fields = schema.__dataclass_fields__
            aliases = [a for field in fields.values() for a in field.metadata.get("aliases", ())]
            known = {field.replace("_", "-") for field in fields}
            known |= {alias.removeprefix("--") for alias in aliases}
            known |= {option for option in given if "." in option and option in FIELDS}
        for option in given:
            plain = option if option in known else option.replace("_", "-")
            assert plain in known, f"{name}: --{option}"


def test_all_settings_are_listed_and_explained_with_their_defaults(tmp_path):
    (block,) = blocks("configs/README.md", "yaml")
    settings = [line for line in block.splitlines() if re.match(r"  \w", line)]
    assert all("#" in line for line in settings), "one that says nothing of what it is"
    listed = {
        f"{part}.{k}": v for part, own in yaml.safe_load(block).items() for k, v in own.items()
    }
    assert list(listed) == [
        name for part in SECTIONS for name in FIELDS if name.startswith(f"{part}.")
    ]
    for name, field in FIELDS.items():
        default = MISSING if field.default_factory is MISSING else field.default_factory()
        default = default if field.default is MISSING else field.default
        one_of_two = name in ("model.checkpoint", "train.steps")  # of which one must be set
        if default is not MISSING and not one_of_two:
            assert listed[name] == default, name
    path = tmp_path / "all.yaml"
    path.write_text(block, encoding="utf-8")
    assert parse(["--config", str(path)]).router.resolve(num_layers=30, hidden_size=576)


def test_every_room_has_a_page():
    for room in ROOMS:
        assert (ROOT / "megatron_mod" / room / "README.md").is_file(), room
