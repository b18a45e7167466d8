"""The command line as text: its commands, their arguments, and what each argument has to look like.

An argument that is none ends in argparse's own message and exit code 2, before any work is done.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DEVICES = ("cpu", "gpu", "tpu")
PRECISIONS = ("float32", "float64")
_LOST_HELP = "silence after which a process is lost, which ends the others (default: 100)"


def parser(commands: Mapping[str, Callable[[argparse.Namespace], int]], version: str) -> argparse.ArgumentParser:
    """Make the parser of `robustreg`.

    Args:
        commands: by name what to call with the options of each.
        version: of the package.

    Returns:
        A parser whose options have the `command` to call.
    """
    whole = argparse.ArgumentParser(
        prog="robustreg",
        description="Policy-regularised Markov decision processes: solve, certify, show the adversary.",
    )
    whole.add_argument("--version", action="version", version=f"robustreg {version}")
    added = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, (text, describe) in _DESCRIBED.items():
        one = added.add_parser(name, help=text)
        describe(one)
        one.set_defaults(command=commands[name])
    return whole


def _precision(one: Any, default: str | None = "float64", text: str = "default: float64") -> None:
    one.add_argument("--precision", choices=PRECISIONS, default=default, help=text)


def _device(one: Any) -> None:
    one.add_argument("--device", choices=DEVICES, help="where to run (JAX's default)")


def _solve(one: Any) -> None:
    one.add_argument("config", metavar="CONFIG", type=_path, help="a TOML file; configs/ holds examples")
    one.add_argument("--out", metavar="DIR", type=_path, help="write result.npz and pictures here")
    _precision(one)
    _device(one)


def _sweep(one: Any) -> None:
    one.add_argument("config", metavar="CONFIG", type=_path, help="a TOML file with a [sweep] table")
    one.add_argument("--out", metavar="DIR", type=_path, required=True, help="stream results here, then table.csv")
    one.add_argument("--resume", action="store_true", help="go on with what DIR already holds")
    one.add_argument("--part", "--shard", metavar="I/N", type=_part, help="only part I (from 0) of N")
    one.add_argument(
        "--list-outputs", action=_ListOutputs, nargs=0, help="say what [sweep] outputs there are, and stop"
    )
    _precision(one)
    _device(one)
    several = one.add_argument_group("several processes", "start the same command in each, on one host or many")
    several.add_argument("--distributed", action="store_true", help="share the work; DIR must be the same for all")
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", type=_address, help="of process 0 (JAX finds it on clusters)"
    )
    several.add_argument("--num-processes", metavar="N", type=_count, help="how many (JAX finds it on clusters)")
    several.add_argument("--process-id", metavar="I", type=_number, help="which, from 0 (JAX finds it on clusters)")
    several.add_argument("--lost-after", metavar="SECONDS", type=_seconds, help=_LOST_HELP)


class _ListOutputs(argparse.Action):
    """Print the outputs of a sweep and end, as `--help` does: nothing else is asked of the command line then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from robustreg.sweeps.outputs import OUTPUTS

        width = max(map(len, OUTPUTS))
        print(*(f"{name:{width}}  {output.meaning}" for name, output in OUTPUTS.items()), sep="\n")
        parser.exit()


def _merge(one: Any) -> None:
    one.add_argument("config", metavar="CONFIG", type=_path, help="the configuration of the sweep")
    one.add_argument("parts", metavar="DIR", type=_path, nargs="+", help="folders of the parts")
    one.add_argument("--out", metavar="DIR", type=_path, required=True, help="folder of the whole")
    _precision(one, text="as the parts were made with")


def _figure(one: Any) -> None:
    text = "a TOML file with a [figure] table; configs/paper/ holds them"
    one.add_argument("config", metavar="CONFIG", type=_path, help=text)
    one.add_argument("--out", metavar="DIR", type=_path, default=Path("."), help="write NAME.png, .pdf and .npz here")
    one.add_argument("--small", action="store_true", help="with the replacements of its [small] tables: a quick look")
    _precision(one)


def _example(one: Any) -> None:
    which = one.add_mutually_exclusive_group(required=True)
    which.add_argument("name", metavar="NAME", nargs="?", type=_text, help="of a pipeline, or a TOML file like its own")
    which.add_argument("--list", action="store_true", help="say which there are")
    one.add_argument("--small", action="store_true", help="with the replacements of its [small] tables: seconds")
    one.add_argument("--seed", metavar="N", type=_number, help="of the random numbers (default: the file's)")
    one.add_argument("--out", metavar="DIR", type=_path, default=Path("."), help="write NAME.png and NAME.npz here")


def _certify(one: Any) -> None:
    text = "a TOML file, or the result.npz of `robustreg solve`"
    one.add_argument("source", metavar="CONFIG|RESULT", type=_path, help=text)
    one.add_argument("--policy", metavar="FILE", type=_path, help="another policy: an .npz with an array `policy`")
    one.add_argument("--deployed", metavar="FILE", type=_path, help="the reward it meets: an .npz with a `reward`")
    one.add_argument("--out", metavar="DIR", type=_path, help="write certificate.npz here")
    _precision(one, None, "default: that of RESULT, float64 for CONFIG")


_DESCRIBED: dict[str, tuple[str, Callable[[Any], None]]] = {
    "solve": ("solve a configuration: print a table, write results", _solve),
    "sweep": ("solve a configuration at every cell of its [sweep] grid", _sweep),
    "merge": ("join the parts of a sweep that ran with --part", _merge),
    "figure": ("draw a figure of the paper from its configuration", _figure),
    "example": ("run a worked pipeline from data to decision, and check what it claims", _example),
    "certify": ("check what a policy is guaranteed, under a deployed reward too", _certify),
    "info": ("print versions, devices and precisions", lambda one: None),
}

# ---- what arguments look like


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(text)


def _text(text: str) -> str:
    return str(_path(text))


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT, such as 10.0.0.1:1234")
    return text


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _count(text: str) -> int:
    if (count := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return seconds


def _part(text: str) -> tuple[int, int]:
    """`I/N` as two numbers."""
    try:
        i, n = (int(x) for x in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 0/4") from None
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text}: the part runs from 0 to {n - 1}")
    return i, n
