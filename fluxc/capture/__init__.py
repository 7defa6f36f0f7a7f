"""Capture: a model goes in, one `ExportedProgram` in normal form comes out. `fluxc.capture(...)` is `api.capture`."""

from fluxc.verbs import make_callable

make_callable(__name__, "fluxc.capture.api:capture")
