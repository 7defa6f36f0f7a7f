"""Calibration: needs, routers, budgets. `fluxc.calibrate(...)` is `retarget.calibrate`."""

from fluxc.verbs import make_callable

make_callable(__name__, "fluxc.calibrate.retarget:calibrate")
