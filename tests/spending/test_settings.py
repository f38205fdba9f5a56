"""`[budgets]` of config.toml: what is right is taken, and each wrong value has its line."""

from __future__ import annotations

from decimal import Decimal

import pytest

from halton_meter.budget import Budget
from halton_meter.settings.budgets import NotMoney, money
from halton_meter.settings.config import read_text


def budgets(text: str) -> tuple[Budget, ...]:
    found = read_text(text.encode(), "c.toml")
    assert (found.wrong, found.notes) == ((), ())
    return found.config.budgets


def test_a_budget_with_all_that_it_can_have() -> None:
    (found,) = budgets(
        '[budgets.web]\nusd = "150.50"\nper = "week"\nproject = "web*"\n'
        'model = ["gpt-5*", "claude-*"]\neach = "model"\nat = [100, 50]\n'
        'action = ["stop", "notify"]\ncommand = ["alarm", "--loud"]\n'
        'webhook = "https://hooks.example.com/x"\ncounts = "billed"\n'
    )
    assert found == Budget(
        "web",
        Decimal("150.50"),
        "week",
        {"project": ("web*",), "model": ("gpt-5*", "claude-*")},
        "model",
        (50, 100),
        ("stop", "notify"),
        ("alarm", "--loud"),
        "https://hooks.example.com/x",
        "billed",
    )
    assert found.holds == "stop"


def test_a_budget_needs_its_limit_alone() -> None:
    (found,) = budgets("[budgets.all]\nusd = 20\n")
    assert found == Budget("all", Decimal("20.00"))
    assert (found.per, found.at, found.holds) == ("month", (50, 80, 95, 100), None)


@pytest.mark.parametrize(
    ("value", "usd"),
    [
        (20, "20.00"),
        (12.5, "12.50"),
        (0.1, "0.10"),
        ("12.50", "12.50"),
        ("$1,250", "1250.00"),
        ("1,234,567.8", "1234567.80"),
        ("1_000", "1000.00"),
        ("20 USD", "20.00"),
        (".5", "0.50"),
    ],
)
def test_amounts_are_exact(value: object, usd: str) -> None:
    assert str(money(value)) == usd


@pytest.mark.parametrize(
    "value", [0, -1, 0.001, 12.345, "12.345", "abc", "", True, None, [], 1e300, float("nan"), "1e9"]
)
def test_what_is_no_amount(value: object) -> None:
    with pytest.raises(NotMoney):
        money(value)


@pytest.mark.parametrize(
    ("value", "meant"), [("5,50", "5.50"), ("0,5", "0.50"), ("1250,00", "1250.00")]
)
def test_a_comma_before_the_cents_is_not_a_hundred_times_as_much(value: str, meant: str) -> None:
    with pytest.raises(NotMoney, match=f"did you mean {meant}"):
        money(value)


@pytest.mark.parametrize("value", ["1,2345", "1.250,00", "1,,000", "12_3", "5,"])
def test_thousands_are_three_digits(value: str) -> None:
    with pytest.raises(NotMoney):
        money(value)


WRONG = [
    ("usd = 12.345", '2: [budgets.b] usd must be dollars and cents, such as 20 or "12.50", not '
     "12.345; did you mean 12.34?"),
    ("per = \"day\"", "1: [budgets.b] has no limit; write usd = 20"),
    ('usd = 1\nper = "daily"', '3: [budgets.b] per must be one of "day", "week", "month", '
     '"session", not "daily"; did you mean "day"?'),
    ('usd = 1\neach = "session"', '3: [budgets.b] each must be one of "project", "provider", '
     '"model", "process", "account", not "session"'),
    ('usd = 1\nper = "session"\neach = "model"', '4: [budgets.b] each = "model" does not go with '
     'per = "session", which holds for each session'),
    ('usd = 1\naction = "kill"', '3: [budgets.b] action must be of "notify", "stop", "end", '
     '"none", not "kill"; did you mean "end"?'),
    ('usd = 1\naction = ["notify", "stpo"]', '3: [budgets.b] action must be of "notify", "stop", '
     '"end", "none", not "stpo"; did you mean "stop"?'),
    ('usd = 1\naction = "webhook"', '3: [budgets.b] action "webhook" is a setting of its own: '
     'write webhook = "http://127.0.0.1:9000/spent"'),
    ('usd = 1\naction = ["stop", "end"]', '3: [budgets.b] action holds "stop" and "end"; '
     "choose one"),
    ('usd = 1\nat = ["80%"]', '3: [budgets.b] at holds "80%", which is no whole percentage from 1 '
     "to 1000; did you mean 80?"),
    ("usd = 1\nat = [0.8]", "3: [budgets.b] at holds 0.8, which is no whole percentage from 1 "
     "to 1000; did you mean 80?"),
    ('usd = 1\nprojct = "web"', '3: [budgets.b] unknown setting "projct"; did you mean project?'),
    ("usd = 1\nproject = 7", "3: [budgets.b] project must be a name in quotes, or a list of 64 at "
     'most, not 7; did you mean "7"?'),
    ('usd = 1\nwebhook = "127.0.0.1:9000"', '3: [budgets.b] webhook must be a URL such as '
     '"http://127.0.0.1:9000/spent" or "https://hooks.example.com/…", without a user name; '
     'did you mean "http://127.0.0.1:9000/"?'),
    ("usd = 1\ncommand = 5", "3: [budgets.b] command must be a text for the shell, or a list such "
     'as ["notify", "--loud"], not 5'),
    ('usd = 1\ncounts = "bill"', '3: [budgets.b] counts must be one of "list", "billed", not '
     '"bill"; did you mean "billed"?'),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "said"), WRONG)
def test_a_wrong_value_is_told_with_its_line_and_the_budget_left_out(lines: str, said: str) -> None:
    found = read_text(f"[budgets.b]\n{lines}\n[budgets.ok]\nusd = 5\n".encode(), "c.toml")
    assert found.wrong == (f"c.toml:{said}",)
    assert [each.name for each in found.config.budgets] == ["ok"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("budgets = 5", "1: budgets must be tables, not 5: write below a line [budgets.daily] "
         'usd = 20 and per = "day"'),
        ("[budgets]\nusd = 5", "2: [budgets] usd belongs to one budget: write it below a line such "
         "as [budgets.daily]"),
        ("[budgets]\nday = 5", "2: [budgets.day] must be a table, not 5; did you mean the line "
         "[budgets.day] and below it usd = 5?"),
        ('[budgets."a b"]\nusd = 5', "1: [budgets.a b] is no name for a budget: it has 40 ASCII "
         "letters, digits, _ . and - at most, the first a letter or a digit"),
    ],
)  # fmt: skip
def test_a_table_that_is_none(text: str, said: str) -> None:
    assert read_text(text.encode(), "c.toml").wrong == (f"c.toml:{said}",)


def test_a_provider_that_nobody_knows_is_noted() -> None:
    text = '[budgets.b]\nusd = 5\nprovider = ["antropic", "open*"]\n'
    found = read_text(text.encode(), "c.toml")
    assert found.notes == (
        'c.toml:3: [budgets.b] no provider is called "antropic"; did you mean "anthropic"?',
    )
    assert len(found.config.budgets) == 1


def test_a_webhooks_path_may_be_a_secret_and_is_never_said() -> None:
    found = read_text(b'[budgets.b]\nusd = 5\nwebhook = "htp://host/SECRET"\n', "c.toml")
    assert "SECRET" not in found.wrong[0]


def test_what_is_written_is_read_again() -> None:
    text = '[budgets.b]\nusd = "1.50"\nper = "day"\nproject = ["a", "b"]\nat = [100]\n'
    (found,) = budgets(text)
    import tomlkit

    again = tomlkit.dumps({"budgets": {"b": found.as_table()}})
    assert budgets(again) == (found,)
