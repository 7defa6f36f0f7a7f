"""Running the whole programs of a model.flux directory in eager torch, and measuring them; answers: fluxc.engine."""
