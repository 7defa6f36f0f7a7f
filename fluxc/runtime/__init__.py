"""Running a model.flux directory in eager torch: prefill with routing, short answers, and its measurements."""
