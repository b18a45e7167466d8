"""Every code block of the README runs, and prints what the README says it prints."""

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest

from robustreg.cli import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
# What depends on the machine, and how far rounding got on it.
VARIES = re.compile(r"^(compile seconds|run seconds|certified gap|indifference residual|iterations) .*", re.M)


def pairs(language):
    """Blocks in a language with the text block that follows, "" where none does."""
    following = [*BLOCKS[1:], ("", "")]
    return [
        (code, after[1] if after[0] == "text" else "")
        for (kind, code), after in zip(BLOCKS, following)
        if kind == language
    ]


def steady(text):
    return VARIES.sub(r"\1", text).strip()


def test_every_block_is_of_a_kind_that_is_tested_here():
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "text", "toml"}
    outputs = sum(bool(expected) for kind in ("bash", "python") for _, expected in pairs(kind))
    assert outputs == sum(kind == "text" for kind, _ in BLOCKS)
    assert README.count("```") == 2 * len(BLOCKS)


def test_the_table_is_a_shipped_configuration():
    ((code, _),) = pairs("toml")
    assert tomllib.loads(code) == tomllib.loads((ROOT / "configs" / "machine.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("code", "expected"), pairs("python"))
def test_python(code, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_commands(capsys, tmp_path, monkeypatch):
    """`pip` and `pytest` are left to .ci/run, which runs both commands word for word."""
    (first, printed), (second, _) = pairs("bash")
    assert second == 'pip install ".[test]" && pytest\n'
    install, command = first.strip().split(" && ")
    assert install == 'pip install ".[all]"'
    program, *arguments = command.split()
    assert program == "robustreg"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert commands.main(arguments) == 0
    assert steady(capsys.readouterr().out) == steady(printed)


def test_links_and_length():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
    assert len(README.splitlines()) < 150


def test_the_example_is_ten_lines():
    lines = [line for line in pairs("python")[0][0].splitlines() if line]
    assert len(lines) == 10
