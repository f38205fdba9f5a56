"""What of a command line may be kept: what identifies a program, and nothing else."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from capture.processes.arguments import ARGUMENTS_MAX, NAME_CHARS_MAX, REDACTED, without_secrets
from capture.processes.command_words import PROGRAMS, VALUES

R = REDACTED
CLAUDE_JS = "/usr/lib/node_modules/@anthropic-ai/claude-code/cli.js"


def kept(line: str) -> str:
    """As `without_secrets`, of words parted by single spaces."""
    return " ".join(without_secrets(line.split(" ")))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("claude -p hi --model sonnet", f"claude -p {R} --model sonnet"),
        ("claude --output-format=json --verbose", "claude --output-format=json --verbose"),
        ("claude --model claude-3-5-sonnet-20241022", "claude --model claude-3-5-sonnet-20241022"),
        ("claude mcp list", "claude mcp list"),
        ("codex exec --sandbox read-only hi", f"codex exec --sandbox read-only {R}"),
        ("codex --model o4-mini exec hi", f"codex --model o4-mini exec {R}"),
        ("gh copilot suggest -t shell undo", f"gh copilot suggest -t {R}"),
        ("llm logs list", f"llm logs {R}"),
        ("python -m pytest -q tests", f"python -m pytest -q {R}"),
        ("python3.11 -u -X dev agent.py fast", f"python3.11 -u -X {R} agent.py {R}"),
        ("python -Wignore train_v2.py", "python -W [redacted] train_v2.py"),
        ("/venv/bin/python /usr/local/bin/aider hi", f"/venv/bin/python /usr/local/bin/aider {R}"),
        (
            "python -P -m halton_meter.live.proxy.worker",
            "python -P -m halton_meter.live.proxy.worker",
        ),
        ("node --inspect server.js 8080", f"node --inspect server.js {R}"),
        (f"node {CLAUDE_JS} -p hi", f"node {CLAUDE_JS} -p {R}"),
        ("npx -y @anthropic-ai/claude-code mcp", "npx -y @anthropic-ai/claude-code mcp"),
        ("npx cowsay hi", f"npx cowsay {R}"),
        ("npm run build -- fast", f"npm run build -- {R}"),
        ("uv run script.py", "uv run script.py"),
        ("uv run --with rich python -m app x", f"uv run --with {R} python -m app {R}"),
        ("uvx ruff check", f"uvx ruff {R}"),
        ("docker run --rm -it alpine sh", f"docker run --rm -i {R}"),
        ("java -Xmx4g -jar app.jar run", f"java -X -jar app.jar {R}"),
        ("bash -e deploy.sh prod", f"bash -e deploy.sh {R}"),
        ("curl -sS --max-time 30 -o out", f"curl -sS --max-time 30 -o {R}"),
        ("chrome --type=renderer --lang=de", f"chrome --type=renderer --lang={R}"),
        ("/opt/google/chrome/chrome", "/opt/google/chrome/chrome"),
        ("-bash", "bash"),
    ],
)
def test_what_identifies_a_program_stays(line: str, expected: str) -> None:
    assert kept(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # a value joined to a single-dash option
        ("curl -uuser:hunter2", "curl -u"),
        ("curl -sSuuser:hunter2", "curl -s"),
        ("curl -bsession=PLANTED -dPLANTED", "curl -b -d"),
        ("curl -Hx-auth:PLANTED -xuser:pass@proxy", "curl -H -x"),
        ("mysql -phunter2", "mysql -p"),
        ("tool -password=hunter2 -pass hunter2", f"tool -p -p {R}"),
        # in the next word, or after = or :
        ("tool --openai-key V --pat V --jwt V", f"tool --openai-key {R} --pat {R} --jwt {R}"),
        ("tool --openai_key=V --session=V", f"tool --openai_key={R} --session={R}"),
        ("curl --proxy user:pass@host", f"curl --proxy {R}"),
        ("curl --proxy=http://user:pass@host", f"curl --proxy={R}"),
        ("tool --password:hunter2 /key:hunter2", f"tool --password:{R} {R}"),
        ("tool --model hunter2 --port secret", f"tool --model {R} --port {R}"),
        ("tool --model=sk-ant-abc", f"tool --model={R}"),
        # words
        ("claude hi", f"claude {R}"),
        ("llm word", f"llm {R}"),
        ("codex exec word", f"codex exec {R}"),
        ("git commit -m word --text word", f"git commit -m {R} --text {R}"),
        ("docker login hunter2", f"docker login {R}"),
        ("tool hunter2 of=/tmp/x KEY=value @file user:pass", f"tool {R}"),
        ("tool AKIAIOSFODNN7EXAMPLE glpat-abcdefghij npm_abcdef", f"tool {R}"),
        ("curl user:hunter2@host/p https://hooks.slack.com/services/T0/B0/x", f"curl {R}"),
        ("tool -- --token hunter2 -phunter2", f"tool -- {R}"),
        # code and standard input
        ("bash -c hunter2 deploy.sh", f"bash -c {R}"),
        ("bash -lc hunter2", f"bash -l {R}"),
        ("python -c print(1) x.py", f"python -c {R}"),
        ("python - hunter2.py", f"python - {R}"),
        ("node -e hunter2 x.js", f"node -e {R}"),
        ("node --title word server.js", f"node --title {R} server.js"),
        ("node --unknown word.js prompt.js", f"node --unknown {R}"),
        ("perl -pe word.pl notes.pl", f"perl -p {R}"),
        # names that hold a secret
        ("tool --hunter2 --token-sk-ant-abc --xkcdqwrtz", f"tool {R}"),
        ("tool --deadbeefcafe --aaaaaaaa --Password", f"tool {R}"),
        (f"tool --{'a-b' * 40}", f"tool {R}"),
        ("python /tmp/token-abcdef/run.py", f"python {R}/run.py"),
        ("bash /tmp/token-abcdef", f"bash {R}"),
        ("python /tmp/b2c4d6/run.py", f"python {R}/run.py"),
        ("npx @hunter/two", f"npx {R}"),
        ("npx pkg@hunter2", f"npx {R}"),
        ("python -m hunter2", f"python -m {R}"),
        ("python3 -mllm letmein", f"python3 -m llm {R}"),
        ("python -mhunter2 dragonfly", f"python -m {R}"),
        ("uv run -mllm dragonfly", f"uv run -m llm {R}"),
        ("python -m -c dragonfly", f"python -m -c {R}"),
        ("/srv/b2c4d6/claude -p hi", f"{R}/claude -p {R}"),
        ("user:pass@host", R),
        ("hunter2", R),
    ],
)
def test_what_may_be_said_or_secret_is_hidden(line: str, expected: str) -> None:
    assert kept(line) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nginx: worker process user:pass@host"], ["nginx"]),
        (["postgres: bob secrets 10.0.0.1 idle", "x"], ["postgres", R]),
        (["/opt/google/chrome/chrome --type=renderer --key=x"], ["/opt/google/chrome/chrome"]),
        (["summarise the report"], [R]),
        (["claude -p hi"], ["claude"]),
        (["claude\r\n=1+1"], [R]),
        (["cla\rude"], [R]),
        (["\x1b[31mclaude"], [R]),
        ([""], [R]),
        (["claude", "", "-p", "", "x"], ["claude", "", "-p", "", R]),
        (["claude", "\ufffd\ufffd", "-\ufffd", "--m\u00f6del", "--ｍodel"], ["claude", R]),
        (["claude", "-p", "two words", "-p", "a\nb"], ["claude", "-p", R, "-p", R]),
        (["python", "a.py\n"], ["python", R]),
        (["claude", "--verbose\n"], ["claude", R]),
        ([], []),
    ],
)
def test_odd_words(argv: list[str], expected: list[str]) -> None:
    assert list(without_secrets(argv)) == expected


# --- the property: what is kept does not depend on what is said ----------------------------------

# Where a value can stand. Each takes the value's text.
VALUE_FORMS: list[Callable[[str], list[str]]] = [
    lambda said: ["claude", "-p", said],
    lambda said: ["claude", said, "--verbose"],
    lambda said: ["claude", "--print", "--append-system-prompt", said],
    lambda said: ["claude", f"--append-system-prompt={said}"],
    lambda said: ["codex", "exec", said],
    lambda said: ["tool", said, said],
    lambda said: ["tool", "--", said],
    lambda said: ["tool", "-u", said, "-x"],
    lambda said: ["tool", "--key", said, "run"],
    lambda said: ["tool", f"--key={said}"],
    lambda said: ["tool", f"--key:{said}"],
    lambda said: ["tool", f"--model=!{said}"],
    lambda said: ["tool", f"/key:{said}"],
    lambda said: ["tool", f"key={said}"],
    lambda said: ["tool", f"@{said}"],
    lambda said: ["tool", f"https://{said}@host/"],
    lambda said: ["tool", f"https://host/{said}?k={said}"],
    lambda said: ["mysql", f"-p{said}!"],
    lambda said: ["curl", f"-u{said}!"],
    lambda said: ["curl", f"-sSu{said}"],
    lambda said: ["curl", f"-Hx:{said}"],
    lambda said: ["java", f"-Dkey={said}", "-jar", "app.jar"],
    lambda said: ["python", "-c", said, "x.py"],
    lambda said: ["python", "-X", said, "x.py"],
    lambda said: ["python", "x.py", said],
    lambda said: ["python", "-m", "pytest", said],
    lambda said: ["bash", "-c", said, said],
    lambda said: ["bash", "-lc", said],
    lambda said: ["node", "-e", said],
    lambda said: ["node", "server.js", said],
    lambda said: ["node", "--flag", said, said],
    lambda said: ["npx", "-p", said, "cowsay"],
    lambda said: ["npx", "cowsay", said],
    lambda said: ["uv", "run", "--env-file", said, said],
    lambda said: ["uv", "run", "x.py", said],
    lambda said: ["docker", "run", "-e", said, said],
    lambda said: ["docker", "login", "-u", said, "-p", said],
    lambda said: [f"nginx: {said}"],
    lambda said: ["nginx", *["x"] * ARGUMENTS_MAX, said],
]


@given(st.sampled_from(VALUE_FORMS), st.text(min_size=1, max_size=60))
@example(VALUE_FORMS[0], "hi")
@example(VALUE_FORMS[1], "sonnet")
def test_values_and_prose_make_no_difference(form: Callable[[str], list[str]], said: str) -> None:
    assume(not said.startswith("-"))  # then it is an option, see below
    assume(not any(said in program.subcommands for program in PROGRAMS.values()))
    assert without_secrets(form(said)) == without_secrets(form("~"))


# Where a secret can stand that is like a name.
NAME_FORMS: list[Callable[[str], list[str]]] = [
    *VALUE_FORMS,
    lambda secret: [secret],
    lambda secret: [f"/tmp/{secret}/tool", "-v"],
    lambda secret: [f"/usr/bin/{secret}"],
    lambda secret: [f"{secret}: worker"],
    lambda secret: ["tool", secret],
    lambda secret: ["tool", f"-{secret}"],
    lambda secret: ["tool", f"--{secret}"],
    lambda secret: ["tool", f"--{secret}=x"],
    lambda secret: ["tool", f"--token-{secret}"],
    lambda secret: ["tool", "--model", secret],
    lambda secret: ["tool", f"--model={secret}", "--port", secret],
    lambda secret: ["curl", f"-s{secret}"],
    lambda secret: ["python", secret],
    lambda secret: ["python", f"-m{secret}"],
    lambda secret: ["python", "-m", secret],
    lambda secret: ["python", f"/tmp/{secret}"],
    lambda secret: ["python", f"/tmp/{secret}/x.py"],
    lambda secret: ["python", f"-I{secret}m", "pytest"],
    lambda secret: ["bash", f"./{secret}"],
    lambda secret: ["npx", secret],
    lambda secret: ["npx", f"@anthropic-ai/{secret}"],
    lambda secret: ["npx", f"@{secret}/claude-code"],
    lambda secret: ["npx", f"cowsay@{secret}"],
    lambda secret: ["npm", "run", secret],
    lambda secret: ["uv", "run", secret],
    lambda secret: ["gh", secret],
    lambda secret: ["claude", "mcp", secret],
]
MIXED = string.ascii_letters + string.digits
SECRETS = st.one_of(
    st.builds(
        "{}{}".format,
        st.sampled_from(
            "AKIA ghp_ glpat- npm_ AIza sk- sk-ant-api03- xoxb-1- hf_ gsk_ eyJhbGci. PLANTED "
            "hunter2 4f9d31c2-".split()
        ),
        st.text(MIXED + "_-", min_size=8, max_size=40).filter(
            lambda text: any(c.isdigit() for c in text)
        ),
    ),
    st.text("0123456789abcdef", min_size=12, max_size=64).filter(lambda text: not text.isalpha()),
    st.text(MIXED + "+/", min_size=12, max_size=88).filter(
        lambda text: any(c.isdigit() for c in text) and any(c.isupper() for c in text)
    ),
    st.uuids().map(str),
    st.text(string.digits, min_size=7, max_size=30),
)


@given(st.sampled_from(NAME_FORMS), SECRETS)
def test_no_four_characters_of_a_secret_stay_wherever_it_stands(
    form: Callable[[str], list[str]], secret: str
) -> None:
    """But for what the same command line has of its own."""
    shown = "\n".join(without_secrets(form(secret)))
    usual = "\n".join([*form("~"), *without_secrets(form("~")), R])
    leaked = [
        secret[at : at + 4]
        for at in range(len(secret) - 3)
        if secret[at : at + 4] in shown and secret[at : at + 4] not in usual
    ]
    assert not leaked, shown


WORDS = st.one_of(
    st.text(max_size=30),
    SECRETS,
    st.sampled_from(
        "claude python node npx uv run exec -m -c -p - -- --model sonnet x.py ./x /a/b2/tool -Im "
        "-sS -Wx -jar --with --with=x @anthropic-ai/claude-code mcp --hunter2 --a:b -- [redacted]"
        .split()
    ),
)  # fmt: skip


@given(st.lists(WORDS, max_size=80))
def test_it_is_bounded_printable_and_stable(argv: list[str]) -> None:
    shown = without_secrets(argv)
    assert without_secrets(shown) == shown
    assert len(shown) <= ARGUMENTS_MAX + 1
    assert bool(shown) == bool(argv)
    for word in shown:
        assert word.isascii()
        assert word.isprintable()
        assert " " not in word
        assert word == R or word.endswith((f"={R}", f":{R}")) or ":" not in word
        assert "@" not in word or word.startswith("@") or "/@" in word


@given(st.lists(st.text(), min_size=1, max_size=6), st.text(" \t\n{}\"';|&$`", min_size=1))
def test_nothing_with_blanks_or_quotes_in_it_stays(argv: Sequence[str], odd: str) -> None:
    assert odd not in "".join(without_secrets([*argv, f"a{odd}b"])).replace(R, "")


def test_an_endless_command_line_is_cut_and_costs_little() -> None:
    endless = ["claude", *["x"] * 10_000, "a" * 1_000_000]
    assert without_secrets(endless) == ("claude", R)
    for word in ("a" * 1_000_000, "--" + "a-" * 500_000, "--model=" + "claude" * 170_000):
        assert R in without_secrets(["npx", word])[1]
    assert R in without_secrets(["tool", "--model", "claude" + "ab" * 17 + "!"])[2]


def test_what_may_have_a_value_is_a_name_and_its_values_are_short() -> None:
    for option, pattern in VALUES.items():
        assert without_secrets(["tool", option]) == ("tool", option)
        assert not pattern.fullmatch("hunter2")
        assert without_secrets(["tool", option, "1" * (NAME_CHARS_MAX + 1)]) == ("tool", option, R)
