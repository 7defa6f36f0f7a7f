"""End-to-end training of the routers on the softened graph. `fluxc.train(...)` is `api.train`."""

from fluxc.verbs import make_callable

make_callable(__name__, "fluxc.train.api:train")
