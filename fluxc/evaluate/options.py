"""What an evaluation is asked for."""

from __future__ import annotations

import dataclasses

from fluxc.budget import check_budget
from fluxc.errors import OptionError
from fluxc.evaluate.suites import DEFAULT, USER, check_suites
from fluxc.options import Options

ORACLES = ("", "ranking", "greedy")
SEED = 1000
COUNT = 24


@dataclasses.dataclass(frozen=True)
class EvalOptions(Options):
    """`count`: prompts a suite. `budgets`, `lengths` (tokens): empty for the plan's own and the suite's. `oracle`: also
    route with the answer at hand. `together`: routings of one prompt that run as one batch, 0 for 8 on a GPU and 1
    on a CPU. `part` (i, n): this process begins with prompts i, i + n, ... (from 1), and then takes what is missing.
    """

    suites: tuple[str, ...] = DEFAULT
    budgets: tuple[float, ...] = ()
    count: int = COUNT
    lengths: tuple[int, ...] = ()
    seed: int = SEED
    oracle: str = ""
    together: int = 0
    part: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        check_suites([name for name in self.suites if name != USER])
        for budget in self.budgets:
            check_budget(budget)
        if self.oracle not in ORACLES:
            raise OptionError(f"there is no oracle {self.oracle!r}", hint="choose ranking or greedy")
        for name, least in (("count", 1), ("together", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} is {getattr(self, name)}", hint=f"it must be at least {least}")
        if not 1 <= self.part[0] <= self.part[1]:
            raise OptionError(f"part {self.part[0]}/{self.part[1]} is none", hint="the parts of 2 are 1/2 and 2/2")

    def batch(self, device: str) -> int:
        """Routings of one prompt that run together on `device`."""
        return self.together or (8 if device.startswith("cuda") else 1)
