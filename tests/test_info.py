"""The facts for bug reports and benchmark files: complete, plain values, nothing that is nobody's business."""

from __future__ import annotations

import json
import platform

import pytest
import torch

import espkernels
from espkernels import backends
from espkernels.__main__ import COMMANDS, main, parser
from espkernels.info import collect


def test_facts_are_those_of_this_process() -> None:
    facts = collect().as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["espkernels"] == espkernels.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["machine"]["architecture"] == platform.machine()
    assert facts["machine"]["cpu"]


def test_every_backend_is_usable_or_says_why_not() -> None:
    facts = collect().backends
    assert tuple(facts) == backends.NAMES
    for name, text in facts.items():
        assert text == (backends.why_not(name) or "usable")
    assert facts["reference"] == "usable"


def test_defaults_say_whether_they_were_measured() -> None:
    defaults = collect().defaults
    assert defaults["cuda"].startswith("cuda, triton, reference")
    assert "nothing was measured on a GPU" in defaults["cuda"]


def test_instruction_sets_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.library is not None:
        facts = collect()
        assert facts.instruction_sets["in use"] == backends.library.isa()
        assert facts.instruction_sets["in use"] in facts.instruction_sets["available"]
        assert facts.build == backends.library.build_info()
    monkeypatch.setattr(backends, "library", None)
    facts = collect()
    assert facts.build == {}
    assert "in use" not in facts.instruction_sets


def test_environment_holds_what_changes_speed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    environment = collect().environment
    assert environment["MALLOC_ARENA_MAX"] == "1"
    assert environment["OMP_PROC_BIND"] == "close"
    assert "SOME_TOKEN" not in environment


def test_command_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for section in ("versions", "machine", "instruction sets", "backends", "threads"):
        assert section in text.splitlines()
    assert f"  espkernels         {espkernels.__version__}" in text
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == collect().as_dict()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parser().parse_args([command, "--help"])
    assert leaving.value.code == 0
    assert command in capsys.readouterr().out


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([])
    assert leaving.value.code == 2
    assert "command" in capsys.readouterr().err
