"""The command line: `robustreg solve`, `certify`, `sweep`, `merge`, `figure`, `example` and `info`.

It reads a configuration, calls the library, prints and writes what comes back; it has no method of its own.

Exit codes: 0 done, 1 the solve, its certificate or the claim failed (or another process, or the disk is full), 2 a bad
configuration, file or command line, 130 interrupted (Ctrl-C).
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import robustreg as rr
from robustreg import archive
from robustreg._core import interrupts
from robustreg._core.files import together
from robustreg.cli import config, figure_config, parser, verdicts
from robustreg.figures import solution_figures, style, sweep_figures
from robustreg.solvers import evaluation
from robustreg.sweeps import cluster
from robustreg.sweeps.progress import waiting
from robustreg.sweeps.runner import prepare
from robustreg.sweeps.store import HeldError, join

PACKAGES = ("robustreg", "jax", "jaxlib", "numpy", "optax", "chex", "gymnasium", "matplotlib", "scipy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: of the command; None: those of this process, which the command then has for itself: Ctrl-C ends it
            at once, with a message and exit code 130.
    """
    if arguments is None:
        interrupts.watch()
    options = parser.parser(_COMMANDS, _version("robustreg")).parse_args(arguments)
    try:
        code = options.command(options)
        sys.stdout.flush()
        return code
    except config.ConfigError as error:
        return _failed(2, str(error))
    except (rr.SolveError, rr.SweepError) as error:
        return _failed(1, str(error))
    except BrokenPipeError:  # whoever read what is printed (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = error.filename or "standard output"
        return _failed(1, f"cannot write {what}: {error.strerror}; files that were there are as they were")
    except MemoryError as error:
        return _failed(1, f"not enough memory: {error or 'take a smaller problem'}")


def _failed(code: int, message: str) -> int:
    print(f"robustreg: {message}", file=sys.stderr)
    return code


@dataclasses.dataclass(frozen=True)
class Run:
    """A solved configuration and the seconds that it took."""

    job: config.Job
    solution: rr.Solution
    certificate: rr.Certificate
    compile_seconds: float
    run_seconds: float


def _solve(options: argparse.Namespace) -> int:
    # The one place that sets JAX's precision: a program decides it for itself, a library does not.
    jax.config.update("jax_enable_x64", options.precision == "float64")
    with _folder(options.out), jax.default_device(_device(options.device)):
        with _named(options.config), _nothing_written(options.out), waiting():
            run = _run(config.load(options.config))
            rows = _rows(run)
        print(_table(rows))
        if options.out is not None:
            with _nothing_written(options.out), together():
                paths = _write(run, rows, options.out)
            for path in paths:
                print(f"wrote {path}")
    run.solution.raise_if_failed()
    # The solver and the certificate each round in their own way, by as much as the certificate says.
    run.certificate.raise_if_loose(float(run.solution.tol) + float(run.certificate.rounding))
    return 0


def _nothing_written(out: Path | None) -> contextlib.AbstractContextManager[None]:
    """Say at Ctrl-C that nothing is lost."""
    kept = "" if out is None else f"nothing was written to {out}; "
    return interrupts.saying(lambda: f"{kept}run the same command again")


def _sweep(options: argparse.Namespace) -> int:
    jax.config.update("jax_enable_x64", options.precision == "float64")
    with interrupts.saying(lambda: _chunks_kept(options.out)), _folder(options.out):
        if options.distributed:
            return _sweep_together(options)
        for name in ("coordinator", "num_processes", "process_id", "lost_after"):
            if getattr(options, name) is not None:
                raise config.ConfigError(f"--{name.replace('_', '-')} goes with --distributed")
        with jax.default_device(_device(options.device)), _named(options.config):
            job = config.load_sweep(options.config)
            arguments, how = _sweep_arguments(job)
            part = options.part or (0, 1)
            table = rr.sweep(*arguments, **how, out=options.out, resume=options.resume, part=part, progress=True)
        return _show(table, options.out, job.job.problem.title, options.part)


def _chunks_kept(out: Path) -> str:
    """Tell what a sweep has finished, and how to go on with it."""
    count = sum(1 for _ in out.glob("chunk-*.npz"))
    kept = f"{count} finished chunk{'s are' if count > 1 else ' is'} kept in {out}" if count else "no chunk is finished"
    return f"{kept}; go on with the same command and --resume"


def _sweep_together(options: argparse.Namespace) -> int:
    """One of several processes; process 0 has the table, and says so."""
    if options.part is not None:
        raise config.ConfigError("--part and --distributed exclude each other: each process takes its own part")
    if None not in (options.num_processes, options.process_id) and options.process_id >= options.num_processes:
        last = options.num_processes - 1
        raise config.ConfigError(f"--process-id {options.process_id}: the processes are numbered from 0 to {last}")
    where = (options.coordinator, options.num_processes, options.process_id)
    with _named("--distributed"), cluster.join_cluster(options.out, *where, options.lost_after or 100.0) as group:
        with jax.default_device(_device(options.device)), _named(options.config):
            job = config.load_sweep(options.config)
            arguments, how = _sweep_arguments(job)
            run = prepare(*arguments, **how)
            table = cluster.sweep(group, run, options.out, options.resume, progress=group.index == 0)
        if table is not None:
            code = _show(table, options.out, job.job.problem.title)
            group.say("done")
            return code
        group.wait(("done",))
    print(f"process {group.index} of {group.count} is done; process 0 has the table")
    return 0


@contextlib.contextmanager
def _named(source: Any) -> Iterator[None]:
    """Name what an error of values is about."""
    try:
        yield
    except config.ConfigError:
        raise
    except HeldError as error:
        raise config.ConfigError(str(error).replace("pass resume=True", "add --resume")) from error
    except (ValueError, OverflowError) as error:
        raise config.ConfigError(f"{source}: {error}") from error


def _merge(options: argparse.Namespace) -> int:
    jax.config.update("jax_enable_x64", options.precision == "float64")
    again = interrupts.saying(lambda: "what was copied is kept; run the same command again")
    with again, _folder(options.out):
        with _named(options.config):
            job = config.load_sweep(options.config)
            arguments, how = _sweep_arguments(job)
            run = prepare(*arguments, **how)
        with _named("merge"):
            join(options.parts, options.out, run.digest())
            table = rr.sweep(*arguments, **how, out=options.out, resume=True, part=None)
        return _show(table, options.out, job.job.problem.title)


def _sweep_arguments(run: config.SweepJob) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell what `sweep` is given, by position and by name."""
    job = run.job
    limits = {"solver": job.solver, "tol": job.tol, "max_steps": job.max_steps, "ambiguity": job.ambiguity}
    return (job.problem.mdp, job.regulariser, run.grid), {**limits, **run.options}


def _show(table: rr.Table, out: Path, title: str, part: tuple[int, int] | None = None) -> int:
    """Print a table, write it as CSV and pictures, and say by exit code whether all cells are there and converged.

    Args:
        table: of the whole sweep, or of a part of it that is done.
        out: folder for the files.
        title: name of the problem.
        part: (i, n), of a part.
    """
    print(table)
    print(f"wrote {table.to_csv(out / 'table.csv')}")
    with together():  # of some cells only there is no picture
        paths = sweep_figures.write(out, table, title) if part is None and _drawable() else []
    for path in paths:
        print(f"wrote {path}")
    missing = int((~table.computed).sum())
    if part is not None:
        here = f"{len(table) - missing} of {len(table)} cells are here"
        print(f"part {part[0]} of {part[1]} is done: {here}; `robustreg merge` joins the parts")
    elif missing:
        print(f"robustreg: {missing} of {len(table)} cells are not there: a part is missing", file=sys.stderr)
    failed = int((table["status"][table.computed] != rr.Status.CONVERGED).sum())
    if failed:
        print(f"robustreg: {failed} cells did not converge; see their status", file=sys.stderr)
    return 1 if failed or (missing and part is None) else 0


def _figure(options: argparse.Namespace) -> int:
    jax.config.update("jax_enable_x64", options.precision == "float64")
    with _folder(options.out), _named(options.config), _nothing_written(options.out), together(), waiting():
        _drawable()
        paths = figure_config.load(options.config, options.small).write(options.out)
    for path in paths:
        print(f"wrote {path}")
    return 0


def _example(options: argparse.Namespace) -> int:
    """Run a worked pipeline; the exit code says whether its claims hold."""
    from robustreg.cli import example_config  # the pipelines' modules: no other command should wait for them

    if options.list:
        print(_table(example_config.listed()))
        return 0
    jax.config.update("jax_enable_x64", True)
    with _folder(options.out), _named(options.name), _nothing_written(options.out), together(), waiting():
        _drawable()
        report = example_config.load(options.name, options.small, options.seed)
        paths = example_config.write(report, options.out, options.name)
    print(report, *(f"wrote {path}" for path in paths), sep="\n")
    return _failed(1, "; ".join(report.failed)) if report.failed else 0


def _certify(options: argparse.Namespace) -> int:
    """Print what holds; the exit code is the verdict."""
    with _folder(options.out), _named(options.source), _nothing_written(options.out), waiting():
        precision = options.precision or verdicts.precision_of(options.source)
        jax.config.update("jax_enable_x64", precision == "float64")
        verdict = verdicts.examine(verdicts.load(options.source, options.policy, options.deployed))
        print(_table(verdict.rows))
        if options.out is not None:
            print(f"wrote {verdict.write(options.out / 'certificate.npz', {'versions': versions()})}")
    if not verdict.holds:
        print(f"robustreg: {verdict.rows['verdict']}", file=sys.stderr)
    return 0 if verdict.holds else 1


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[None]:
    """Make the folder for results before any work is done for it; a command that is refused leaves no empty one."""
    if out is None:
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise config.ConfigError(f"--out {out}: cannot write there: {error.strerror}") from error
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty, or another process has removed it
                folder.rmdir()


def _device(kind: str | None) -> Any:
    if kind is None:
        return None
    try:
        return jax.local_devices(backend=kind)[0]
    except RuntimeError as error:
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise config.ConfigError(f"--device {kind}: JAX has none here; it found: {found}") from error


def _run(job: config.Job) -> Run:
    """Solve, and tell the time that JAX spent on making a program of it from the time that the program ran."""
    begin, before = time.perf_counter(), sum(_compiling())
    m, reg, ball = job.problem.mdp, job.regulariser, job.ambiguity
    solution = rr.solve(m, reg, job.solver, tol=job.tol, max_steps=job.max_steps, ambiguity=ball)
    jax.block_until_ready(solution.value)
    whole, compiling = time.perf_counter() - begin, sum(_compiling()) - before
    certificate = rr.certify(m, reg, solution, ambiguity=ball)
    return Run(job, solution, certificate, compiling, max(whole - compiling, 0.0))


@functools.cache
def _compiling() -> list[float]:
    """Seconds of every step of making a program (tracing, lowering, compiling), from the first call of this on."""
    steps: list[float] = []

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            steps.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
    return steps


def _rows(run: Run) -> dict[str, str]:
    """The printed table. Values are expectations over the initial distribution, in units of reward."""
    m, solution = run.job.problem.mdp, run.solution
    nominal = _start(m, rr.evaluate(m, solution.policy))
    return {
        "problem": run.job.problem.title,
        "states": f"{m.n_states}",
        "actions": f"{m.n_actions}",
        "discount": f"{float(m.discount):.6g}",
        **_strength(run.job.regulariser),
        **verdicts.ambiguity_of(run.job),
        "objective": f"{float(solution.objective):.9g}",
        "nominal return": f"{nominal:.9g}",
        "price of robustness": f"{_start(m, evaluation.nominal_optimum(m, run.job.regulariser)) - nominal:.4g}",
        "certified gap": f"{np.max(run.certificate.gap):.2e}",
        "indifference residual": f"{np.max(run.certificate.indifference):.2e}",
        "iterations": f"{int(solution.steps)}",
        "compile seconds": f"{run.compile_seconds:.3f}",
        "run seconds": f"{run.run_seconds:.4f}",
        "precision": str(m.dtype),
        "status": rr.Status(int(solution.status)).name,
    }


def _strength(regulariser: Any) -> dict[str, str]:
    """The numbers of a regulariser for people."""
    if isinstance(regulariser, rr.Sum):
        return {"regulariser": verdicts.name_of(regulariser)}
    return {"regulariser": type(regulariser).__name__, **verdicts.numbers_of(regulariser)}


def _start(m: rr.MDP, value: Any) -> float:
    return float(np.vdot(np.asarray(m.initial), np.asarray(value)))


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _write(run: Run, rows: Mapping[str, str], out: Path) -> list[Path]:
    """Write the result and the pictures; return what was written."""
    path, problem = out / "result.npz", run.job.problem
    about = {"config": run.job.table, "dtype": rows["precision"], "versions": versions(), "table": dict(rows)}
    archive.save(path, run.solution, about)
    if not _drawable() or not np.isfinite(run.solution.value).all():  # nothing to draw; the status says why
        return [path]
    numbers = _strength(run.job.regulariser)
    kind = numbers.pop("regulariser")
    own = f"({', '.join(f'{name}={value}' for name, value in numbers.items())})" if numbers else ""
    title = f"{problem.title}, {f'{kind}{own}'.replace('-', '−')}"
    logs, shape = run.job.regulariser.log_prior, (problem.mdp.n_states, problem.mdp.n_actions)
    excluded = None if logs is None else np.broadcast_to(np.isneginf(logs), shape)
    return [
        path,
        *solution_figures.write(out, problem.mdp, run.solution, title, problem.marks, problem.actions, excluded),
    ]


def _drawable() -> bool:
    """Whether there is matplotlib; says so where there is none."""
    if not style.available():
        print('no pictures: pip install "robustreg[figures]"', file=sys.stderr)
        return False
    return True


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, those that are installed."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: v for name, v in found.items() if v}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _info(options: argparse.Namespace) -> int:
    devices = ", ".join(f"{device.platform}:{device.id} ({device.device_kind})" for device in jax.devices())
    machine = {"platform": platform.platform(), "devices": devices, "precisions": ", ".join(parser.PRECISIONS)}
    print(_table(versions() | machine))
    return 0


_RUN = (_solve, _sweep, _merge, _figure, _example, _certify, _info)
_COMMANDS = {run.__name__.removeprefix("_"): run for run in _RUN}
