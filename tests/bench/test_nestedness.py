"""How often a layer is full at a smaller budget and sparse at a larger one."""

from __future__ import annotations

from fluxc.bench.nestedness import nestedness, nestedness_table


def rows(**systems):
    """Rows of two prompts of four layers: `fluxc_02="1000 0000"` holds the routes at budget 0.2."""
    names = {name: name.replace("_0", " 0.") for name in systems}
    return [
        {"prompt": prompt, "system": names[name], "routes": routes}
        for name, text in systems.items()
        for prompt, routes in enumerate(text.split())
    ]


def test_nested_routes_break_nothing():
    found = nestedness(rows(fluxc_02="1000 0000", fluxc_04="1100 0001", fluxc_06="1110 0101"), (0.6, 0.2, 0.4))
    assert found == {
        "of": 8,
        "broken": 0,
        "steps": [{"smaller": 0.2, "larger": 0.4, "broken": 0}, {"smaller": 0.4, "larger": 0.6, "broken": 0}],
    }


def test_a_pair_that_breaks_twice_counts_once_in_all_and_other_systems_do_not_count():
    made = rows(fluxc_01="1000 1111", fluxc_02="0000 1111", fluxc_03="1000 1111", fluxc_04="0110 0111", dense="0000 0")
    found = nestedness(made, (0.1, 0.2, 0.3, 0.4))
    assert [step["broken"] for step in found["steps"]] == [1, 0, 2]
    assert (found["broken"], found["of"]) == (2, 8)


def test_one_budget_has_no_steps():
    assert nestedness(rows(fluxc_04="1100 0000"), (0.4,)) == {"of": 8, "broken": 0, "steps": []}


def test_the_table_has_a_line_for_every_step_and_one_for_all():
    table = nestedness_table({"needle": nestedness(rows(fluxc_02="1100 0000", fluxc_04="1000 0001"), (0.2, 0.4))})
    assert [list(column.cells) for column in table.columns] == [
        ["needle", "needle"],
        ["0.2 < 0.4", "any two"],
        ["1", "1"],
        ["8", "8"],
        ["0.1250", "0.1250"],
    ]
