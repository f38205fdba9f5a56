"""What of a command line may be kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.arguments import ARGUMENTS_MAX, REDACTED, without_secrets

R = REDACTED


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["claude", "-p", "summarise", "--model", "opus"], ["claude", "-p", R, "--model", "opus"]),
        (["codex", "exec", "fix the bug"], ["codex", "exec", R]),
        (
            ["curl", "-s", "-H", "x-api-key: k", "https://api.x.ai/v1/chat?key=k", "-d", "{}"],
            ["curl", "-s", "-H", R, f"https://api.x.ai/v1/chat?{R}", "-d", R],
        ),
        (["app", "https://me:pw@host.example/a"], ["app", "https://host.example/a"]),
        (["python", "-c", "print(1)"], ["python", "-c", R]),
        (
            ["python", "-m", "agent", "run.py", "--n=3"],
            ["python", "-m", "agent", "run.py", "--n=3"],
        ),
        (["agent", "--api-key=abc", "--prompt=hi"], ["agent", f"--api-key={R}", f"--prompt={R}"]),
        (["agent", "--my-token", "abc"], ["agent", "--my-token", R]),
        (["agent", "sk-ant-abc"], ["agent", R]),
        (["node", "/srv/app/index.js", "8080"], ["node", "/srv/app/index.js", "8080"]),
    ],
)
def test_what_says_something_is_hidden_and_what_names_something_stays(
    argv: list[str], kept: list[str]
) -> None:
    assert list(without_secrets(argv)) == kept


def test_a_long_random_word_is_taken_for_a_key() -> None:
    assert without_secrets(["x", "a1B2" * 10]) == ("x", R)


@given(st.lists(st.text(), min_size=1, max_size=80))
def test_the_program_always_stays_and_the_length_is_bounded(argv: list[str]) -> None:
    kept = without_secrets(argv)
    assert len(kept) == min(len(argv), ARGUMENTS_MAX)
    assert argv[0].startswith(kept[0])


@given(st.text(alphabet="abc xyz{}\"'", min_size=1).filter(lambda text: " " in text))
def test_nothing_with_a_space_in_it_ever_stays(said: str) -> None:
    assert without_secrets(["agent", said]) == ("agent", R)
