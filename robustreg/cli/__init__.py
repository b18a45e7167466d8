"""The command line: commands, and TOML files to objects. No mathematics.

`parser` says what a command line may be, `commands` runs it. `config` builds problems, regularisers and solvers from a
file (`problem_kinds` lists the problems), `figure_config` figures; `verdicts` answers for `robustreg certify`.
"""

from robustreg.cli.commands import main

__all__ = ["main"]
