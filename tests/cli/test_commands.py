"""The commands as a shell runs them: exit codes, one clear line on a mistake, JSON where a script wants it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vitalloy.cli import main


def vitalloy(*args: str, cwd=None) -> subprocess.CompletedProcess:
    code = "import sys; sys.argv[0] = 'vitalloy'; from vitalloy.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.parametrize("command", ["fit", "compress", "predict", "evaluate", "export", "models", "systems"])
def test_help_shows_an_example(command):
    shown = vitalloy(command, "--help")
    assert shown.returncode == 0 and f"vitalloy {command}" in shown.stdout.split("Example:")[1]


def test_help_imports_nothing_heavy():
    heavy = "('torch', 'timm', 'numpy', 'lightning')"
    code = f"import sys; import vitalloy.cli; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["fit", "no/such/folder"], "no/such/folder does not exist"),
        (["fit", "--set", "epoch=3"], "'epochs'"),
        (["fit", "--set", "epochs=many"], "epochs"),
        (["fit", "--model", "cvt_14"], "'cvt_13'"),
        (["fit", "--resume", "nowhere"], "no such run folder"),
        (["predict", "nowhere", "x.png"], "nowhere: there is no such run folder"),
        (["compress", "nowhere"], "nowhere: there is no such run folder"),
        (["compress", "nowhere", "--set", "rounds"], "NAME=VALUE"),
        (["models", "zzz*"], "no model matches"),
        (["systems", "cvtt"], "'cvt'"),
        (["fit", "--recipe", "none.toml"], "none.toml"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vitalloy", *args])
    with pytest.raises(SystemExit) as left:
        main()
    written = capsys.readouterr().err
    assert left.value.code == 2, written
    assert says in written and "Traceback" not in written
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path):
    shown = vitalloy("systems", "cvtt", "--debug", cwd=tmp_path)
    assert shown.returncode == 1 and "Traceback" in shown.stderr and "ModelError" in shown.stderr


def test_models_as_json():
    rows = json.loads(vitalloy("models", "deit_tiny_patch16_224", "--json").stdout)
    assert rows[0]["params"] == 5_717_416 and rows[0]["macs"] == pytest.approx(1.26e9, rel=0.02)
    assert rows[0]["top1"] == 72.2


def test_systems_as_json_and_as_a_card():
    cards = json.loads(vitalloy("systems", "--json").stdout)
    assert len(cards) > 60 and {c["status"] for c in cards} == {"works", "planned"}
    shown = vitalloy("systems", "cvt").stdout
    assert "QuickGELU" in shown and "activation='gelu'" in shown
