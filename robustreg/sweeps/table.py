"""Tables that know their coordinates: what a sweep returns."""

import csv
import dataclasses
import importlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustreg._core.files import write_whole
from robustreg.solvers.solution import Status


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{name} is not installed: pip install "robustreg[tables]"') from error


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Results over a grid.

    Attributes:
        coordinates: values of every axis by name, `[n]` each, in the order of the axes.
        columns: results by name, `[*cells, ...]`: `cells` has one axis per coordinate of a product, one axis in all
            where coordinates were zipped.
        zipped: whether the coordinates run together.
        computed: which cells there are results for, `[*cells]`; elsewhere floating results are NaN.
    """

    coordinates: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]
    zipped: bool
    computed: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells per axis."""
        return self.computed.shape

    def __len__(self) -> int:
        return self.computed.size

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same cells and results, NaN being equal to NaN."""
        if not isinstance(other, Table):
            return NotImplemented
        mine, its = (({"": t.computed}, t.coordinates, t.columns) for t in (self, other))
        return self.zipped == other.zipped and all(
            list(a) == list(b) and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)
            for a, b in zip(mine, its)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays have none

    def __getitem__(self, name: str) -> np.ndarray:
        """A result, or a coordinate of every cell."""
        if name in self.columns:
            return self.columns[name]
        if name in self.coordinates:
            return self._cells()[name]
        raise KeyError(f"{name!r} is none of {', '.join((*self.coordinates, *self.columns))}")

    def _cells(self) -> dict[str, np.ndarray]:
        """Coordinates of every cell, `[*cells]` each."""
        if self.zipped:
            return dict(self.coordinates)
        mesh = np.meshgrid(*self.coordinates.values(), indexing="ij")
        return dict(zip(self.coordinates, mesh))

    def select(self, **where: Any) -> "Table":
        """Pick the cells with the given coordinates; the nearest value within 1e-6 relative is meant.

        Raises:
            KeyError: for an axis that is not there.
            ValueError: for a value that is not on it.
        """
        table = self
        for name, value in where.items():
            table = table._at(name, value)
        return table

    def _at(self, name: str, value: Any) -> "Table":
        if name not in self.coordinates:
            raise KeyError(f"no axis {name!r}; there are: {', '.join(self.coordinates)}")
        values = self.coordinates[name]
        hits = np.flatnonzero(np.isclose(values, value, rtol=1e-6, atol=0))
        if not hits.size:
            nearest = values[np.argmin(np.abs(values - value))]
            raise ValueError(f"{name} has no value {value}; the nearest is {nearest:g}")
        if self.zipped:
            pick: Any = hits
            coordinates = {n: x[hits] for n, x in self.coordinates.items()}
        else:
            pick = tuple(int(hits[0]) if n == name else slice(None) for n in self.coordinates)
            coordinates = {n: x for n, x in self.coordinates.items() if n != name}
        columns = {n: x[pick] for n, x in self.columns.items()}
        return Table(coordinates, columns, self.zipped, np.asarray(self.computed[pick]))

    def scalars(self) -> dict[str, np.ndarray]:
        """Results with one number per cell."""
        return {name: x for name, x in self.columns.items() if x.shape == self.shape}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dict per computed cell: coordinates and scalars, statuses by name."""
        return self._rows(np.flatnonzero(self.computed.ravel()))

    def _rows(self, cells: np.ndarray) -> Iterator[dict[str, Any]]:
        """Those of some cells, by flat number."""
        places = [cells] * len(self.coordinates) if self.zipped else np.unravel_index(cells, self.shape)
        flat = {name: x[i] for (name, x), i in zip(self.coordinates.items(), places)}
        flat |= {name: x.ravel()[cells] for name, x in self.scalars().items()}
        for i in range(len(cells)):
            row = {name: x[i].item() for name, x in flat.items()}
            if "status" in row:
                row["status"] = Status(row["status"]).name
            yield row

    def to_csv(self, path: str | Path) -> Path:
        """Write coordinates and scalars, one line per computed cell."""
        path = Path(path)

        def write(file: Any) -> None:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            writer = csv.DictWriter(text, [*self.coordinates, *self.scalars()], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows())
            text.detach()  # writes what is left; the file is not ours to close

        write_whole(path, write)
        return path

    def to_pandas(self) -> Any:
        """Coordinates and scalars as a `pandas.DataFrame` (extra: tables)."""
        return _extra("pandas").DataFrame(list(self.rows()))

    def to_xarray(self) -> Any:
        """Everything as an `xarray.Dataset` whose dimensions are the axes (extra: tables)."""
        xarray = _extra("xarray")
        axes = ("cell",) if self.zipped else tuple(self.coordinates)
        inner = {name: tuple(f"{name}_{i}" for i in range(x.ndim - len(axes))) for name, x in self.columns.items()}
        data = {name: (axes + inner[name], x) for name, x in self.columns.items()}
        coordinates = {n: ("cell", x) if self.zipped else (n, x) for n, x in self.coordinates.items()}
        return xarray.Dataset(data, coords=coordinates)

    def __repr__(self) -> str:
        """Head and tail, aligned."""
        cells = np.flatnonzero(self.computed.ravel())
        axes = " x ".join(f"{name} {x.size}" for name, x in self.coordinates.items())
        title = f"Table({'zip of ' if self.zipped else ''}{axes}; {len(cells)} of {len(self)} cells)"
        if not len(cells):
            return title
        rows = list(self._rows(cells if len(cells) <= 12 else np.concatenate([cells[:6], cells[-5:]])))
        shown = rows if len(cells) <= 12 else [*rows[:6], dict.fromkeys(rows[0], "..."), *rows[6:]]
        text = [[f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()] for row in shown]
        widths = [max(len(name), *(len(line[i]) for line in text)) for i, name in enumerate(rows[0])]
        lines = [[*rows[0]], *text]
        return "\n".join([title, *("  ".join(x.rjust(w) for x, w in zip(line, widths)) for line in lines)])
