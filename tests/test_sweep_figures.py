"""Figures of sweeps show the numbers of the table: what is drawn is read back from the figure."""

import dataclasses
import warnings

import numpy as np
import pytest
from matplotlib.colors import LogNorm

import robustreg as rr
from robustreg.figures import sweep_figures as pictures

BETAS, ALPHAS, DISCOUNTS = np.geomspace(0.1, 100, 6), np.array([0.5, 1.0, 2.0]), np.array([0.8, 0.95])


def table(axes=("discount", "alpha", "beta"), zipped=False, **more):
    """A table whose numbers say which cell they belong to."""
    known = {"discount": DISCOUNTS, "alpha": ALPHAS, "beta": BETAS} | more
    coordinates = {name: known[name] for name in axes}
    shape = (len(coordinates[axes[0]]),) if zipped else tuple(len(x) for x in coordinates.values())
    number = np.arange(np.prod(shape), dtype=float).reshape(shape)
    columns = {
        "objective": number,
        "nominal_return": number + 0.5,
        "price_of_robustness": 1000 - number,
        "steps": number.astype(np.int32) + 3,
        "status": np.zeros(shape, np.int32),
    }
    return rr.Table(coordinates, columns, zipped, np.ones(shape, bool))


def lines(axes):
    """Lines of more than crosses: style and points."""
    return [(x.get_linestyle(), *x.get_data()) for x in axes.lines if x.get_marker() != "x"]


def crosses(axes):
    return [tuple(map(float, p)) for x in axes.lines if x.get_marker() == "x" for p in zip(*x.get_data())]


@pytest.mark.parametrize("axes", [("discount", "alpha", "beta"), ("beta", "discount", "alpha")])
def test_returns_have_a_panel_per_discount_and_a_line_per_alpha_and_column(axes):
    t = table(axes)
    panels = pictures.returns(t, title="T").axes
    assert [x.get_title() for x in panels] == ["discount 0.8", "discount 0.95"]
    for panel, discount in zip(panels, DISCOUNTS):
        assert panel.get_xscale() == "log"
        drawn = lines(panel)
        expected = [("-", "objective", a) for a in ALPHAS] + [("--", "nominal_return", a) for a in ALPHAS]
        assert len(drawn) == len(expected)
        for (style, x, y), (wanted, name, alpha) in zip(drawn, expected):
            assert style == wanted
            np.testing.assert_array_equal(x, BETAS)
            np.testing.assert_array_equal(y, t.select(discount=discount, alpha=alpha)[name])
        assert "reward units" in panels[0].get_ylabel() and "1/reward units" in panel.get_xlabel()
    figure = pictures.returns(t, title="T")
    assert figure.get_suptitle() == "T: return against strength"
    assert [x.get_text() for x in figure.legends[0].get_texts()][:3] == ["α = 0.5", "α = 1", "α = 2"]


def test_price_is_drawn_in_ascending_beta():
    t = table(("beta",), beta=BETAS[::-1])
    ((style, x, y),) = lines(pictures.price(t).axes[0])
    np.testing.assert_array_equal(x, BETAS)
    np.testing.assert_array_equal(y, t["price_of_robustness"][::-1])


def test_other_axes_become_a_median_and_a_band():
    t = table(("mdp", "beta"), mdp=np.arange(11))
    (axes,) = pictures.price(t).axes
    ((_, _, y),) = lines(axes)
    np.testing.assert_allclose(y, np.median(t["price_of_robustness"], axis=0))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(np.percentile(t["price_of_robustness"], 10, axis=0).min())
    assert band.max() == pytest.approx(np.percentile(t["price_of_robustness"], 90, axis=0).max())


def legend(figure):
    return [x.get_text() for x in figure.legends[0].get_texts()]


def test_the_legend_says_what_is_drawn_and_of_what():
    """One column alone, a band and of whom it is, and lines of so many alphas that bands would hide each other."""
    alone = table(("mdp", "beta"), mdp=np.arange(11))
    alone = dataclasses.replace(alone, columns={"objective": alone["objective"]})
    assert legend(pictures.returns(alone)) == ["guaranteed\n(objective)", "line: median\nband: 10–90 %\nof 11 (mdp)"]
    many = table(("mdp", "alpha", "beta"), mdp=np.arange(11), alpha=np.array([-1.0, 0.5, 1.0, 2.0]))
    figure = pictures.price(many)
    assert legend(figure) == [
        *("α = −1", "α = 0.5", "α = 1", "α = 2", "optimum less\nnominal return", "line: median\nof 11 (mdp)")
    ]
    assert not figure.axes[0].collections
    assert "median of 11 (mdp)" in pictures.step_map(many).get_suptitle()
    many.computed[:4] = False
    figure = pictures.price(many)
    assert legend(figure)[-1] == "line: median\nof 7 (mdp)"
    assert f"{4 * many.computed[0].size} of {len(many)} cells are not there" in figure.get_suptitle()
    many["status"][5, 1, 2] = rr.Status.MAX_STEPS
    assert legend(pictures.price(many))[-1] == "not all converged"
    assert "×: not all of them converged" in pictures.step_map(many).get_suptitle()
    zipped = table(("beta", "discount"), zipped=True, discount=np.linspace(0.5, 0.9, 6))
    assert "along the line discount changes too" in pictures.returns(zipped).get_suptitle()


def test_a_line_may_reach_from_one_end_of_the_numbers_to_the_other(tmp_path):
    """Matplotlib's own logarithmic axes fail beyond 1e290: such values are left out, and the picture says so."""
    t = table(("beta",), beta=np.array([1e-320, 1e-300, 1.0, 10.0, 1e300, 1.7e308]))
    assert len(pictures.write(tmp_path, t)) == 2
    figure = pictures.returns(t)
    np.testing.assert_array_equal(lines(figure.axes[0])[0][1], [1.0, 10.0])
    assert "4 of 6 values of β are beyond the axis" in figure.get_suptitle()


def test_failed_cells_have_a_cross_and_missing_ones_leave_a_gap():
    t = table(("alpha", "beta"), alpha=np.array([-1.0, 1.0, 2.0]))
    t["status"][1, 2], t["status"][2, 4] = rr.Status.MAX_STEPS, rr.Status.NONFINITE
    t["objective"][2, 4] = np.nan
    t.computed[0, 3] = False
    (axes,) = pictures.returns(t).axes
    at = crosses(axes)
    assert (BETAS[2], t["objective"][1, 2]) in at and (BETAS[2], t["nominal_return"][1, 2]) in at
    assert (BETAS[4], 0.02) in at and len(at) == 4  # at the lower edge, in units of the axes
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(lines(axes)[0][2])), [3])
    figure = pictures.step_map(t, title="T")
    axes = figure.axes[0]
    assert "−1" in [label.get_text() for label in axes.get_yticklabels()]
    assert set(crosses(axes)) == {(BETAS[2], 1.0), (BETAS[4], 2.0)} and "×: not converged" in figure.get_suptitle()
    shown = np.ma.filled(axes.collections[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(np.isnan(shown), ~t.computed)


def test_map_of_steps_over_alpha_or_else_over_discount():
    t = table()
    *panels, _ = pictures.step_map(t).axes
    for axes, discount in zip(panels, DISCOUNTS, strict=True):
        np.testing.assert_array_equal(axes.collections[0].get_array(), t.select(discount=discount)["steps"])
        assert [x.get_text() for x in axes.get_yticklabels()] == ["0.5", "1", "2"]
    t = table(("beta", "discount"))
    axes, bar = pictures.step_map(t).axes
    np.testing.assert_array_equal(axes.collections[0].get_array(), t["steps"].T)
    assert axes.get_ylabel() == "discount" and bar.get_ylabel() == "steps" and axes.get_xscale() == "log"
    edges = axes.collections[0].get_coordinates()[0, :, 0]
    np.testing.assert_allclose(np.sqrt(edges[1:] * edges[:-1]), BETAS)  # every cell around its beta
    t.columns["steps"][0, 0] = 5000
    assert isinstance(pictures.step_map(t).axes[0].collections[0].norm, LogNorm)


def test_long_axes_are_thinned_and_say_so():
    t = table(discount=np.linspace(0.1, 0.9, 17), alpha=np.linspace(1, 3, 21))
    figure = pictures.returns(t)
    assert len(figure.axes) == 6 and "(6 of 17 discounts)" in figure.get_suptitle()
    assert [figure.axes[i].get_title() for i in (0, -1)] == ["discount 0.1", "discount 0.9"]
    assert len(lines(figure.axes[0])) == 14


def test_what_there_is_is_written_and_looks_finished(tmp_path):
    def names(t):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # among others of a layout that does not fit
            return [path.name for path in pictures.write(tmp_path, t, "A problem with a name of some length")]

    assert names(table()) == ["returns.png", "price.png", "steps.png"]
    assert names(table(("beta", "alpha"), zipped=True, alpha=np.linspace(1, 2, 6))) == ["returns.png", "price.png"]
    assert names(table(("alpha", "discount"))) == names(table(("beta",), beta=np.ones(1))) == []
    full = table()
    assert names(dataclasses.replace(full, columns={"steps": full["steps"]})) == ["steps.png"]
    empty = table()
    empty.computed[:] = False
    assert names(empty) == []
    lost = table()
    lost["objective"][:], lost["status"][:] = np.nan, rr.Status.NONFINITE
    assert names(lost) == ["returns.png", "price.png", "steps.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))
