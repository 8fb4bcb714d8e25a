"""Tables as text."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

from rmfx.table import Column, Record, change, milliseconds, spread, table, told_ratio


@dataclass(frozen=True)
class Row:
    name: str
    size: int | None


COLUMNS = (
    Column("name", "name", width=5),
    Column("size", "size", ",", right=True),
    Column("twice", lambda row: row.size and 2 * row.size, lambda n: f"{n} m", right=True),
)


def test_a_table_shows_what_its_columns_name() -> None:
    text = table([Row("a b c d", 1000), Row("1e5", None)], COLUMNS)
    assert text.splitlines() == [
        "name      size    twice",
        "------  ------  -------",
        "a b c    1,000   2000 m",
        "d",
        "1e5",
    ]


def test_no_rows_are_no_table() -> None:
    assert not table([], COLUMNS)


def test_rows_may_be_pairs() -> None:
    text = table([("a", 1)], (Column("", itemgetter(0)), Column("n", itemgetter(1))))
    assert text.splitlines()[-1] == "a   1"


def test_a_record_is_a_dict_of_its_attributes() -> None:
    @dataclass(frozen=True)
    class Rows(Record):
        rows: tuple[Row, ...]

    assert Rows((Row("a", 1),)).to_dict() == {"rows": ({"name": "a", "size": 1},)}


def test_numbers_for_people() -> None:
    assert change(1_500, 2_000_000) == "1.5 k -> 2 M"
    assert change(None, 1) is None
    assert spread((1.0, 0.5, 2.0)) == "1.00 (0.50 to 2.00)"
    assert told_ratio((1.0, 0.5, 2.0), is_noise=False) == "1.00 (0.50 to 2.00)"
    noise = told_ratio((1.0, 0.5, 2.0), is_noise=True)
    assert noise == "1.00 (0.50 to 2.00), not beyond the noise"
    few, enough = (told_ratio((1.0, 0.5, 2.0), is_noise=True, rounds=n) for n in (5, 6))
    assert few == "1.00 (0.50 to 2.00), too few rounds to tell (it takes 6)"
    assert enough == noise
    assert milliseconds((2e-5, 1.234e-5, 0.5)) == "0.02 (0.0123 to 500)"
    assert milliseconds((1.5, 0.1, 2.5)) == "1500 (100 to 2500)"
