"""Words of command lines that are known to be harmless: data for `arguments.py`, no rules.

A word may stay in a stored command line because it is listed here, or because of its position in
the command line of a program that is described here. Add a program when its reports would gain by
it: its subcommands, whose list is closed, or what its first word is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Takes(Enum):
    """What a program's first word names, if it is not one of its subcommands."""

    NOTHING = "nothing that may be kept"
    SCRIPT = "a file that it runs"
    COMMAND = "a program, a package or a file that it runs"
    TASK = "a task that a project's own file defines"


@dataclass(frozen=True, slots=True)
class Program:
    """How to read a program's command line, up to the last word that may be kept.

    `letters` are its single-dash options without a value, `joined` those whose value is always
    joined on, `flags` its other options without one, `valued` those with a value in the next word.
    `modules` are options before the name of a module, `scripts` options before the file it runs.
    """

    subcommands: Mapping[str, Program] = field(default_factory=dict)
    takes: Takes = Takes.NOTHING
    letters: str = ""
    joined: str = ""
    flags: frozenset[str] = frozenset()
    valued: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    scripts: frozenset[str] = frozenset()


def _options(text: str) -> frozenset[str]:
    return frozenset(text.split())


OTHER = Program()


def _with(words: str, **deeper: Program) -> dict[str, Program]:
    return dict.fromkeys(words.split(), OTHER) | deeper


_PYTHON = Program(
    takes=Takes.SCRIPT,
    letters="bBdEhiIOPqsSuvVx",
    valued=_options("-W -X --check-hash-based-pycs"),
    modules=_options("-m"),
)
_NODE = Program(
    takes=Takes.SCRIPT,
    letters="chiv",
    flags=_options(
        "--no-warnings --no-deprecation --enable-source-maps --expose-gc --inspect --inspect-brk "
        "--trace-warnings --trace-deprecation --preserve-symlinks --experimental-strip-types "
        "--experimental-transform-types --experimental-vm-modules --no-experimental-fetch --watch"
    ),
    valued=_options(
        "-r --require --import --loader --experimental-loader -C --conditions --env-file --title"
    ),
)
_SHELL = Program(takes=Takes.SCRIPT, letters="efilnuvx", flags=_options("--login --posix"))
_SCRIPTED = Program(takes=Takes.SCRIPT)
_RUNNER = Program(
    takes=Takes.COMMAND,
    letters="yqs",
    flags=_options("--yes --no --quiet --bun --no-install --isolated --offline --frozen --locked"),
    valued=_options("-p --package --from --with --python --group --extra --project --directory"),
)
_MODULES = Program(
    takes=Takes.COMMAND, letters=_RUNNER.letters, flags=_RUNNER.flags, valued=_RUNNER.valued,
    modules=_options("-m --module"), scripts=_options("-s --script"),
)  # fmt: skip
_LINKER = Program(
    takes=Takes.COMMAND, valued=_options("--library-path --preload --argv0 --inhibit-rpath")
)
_TASK = Program(takes=Takes.TASK, letters="s", flags=_options("--silent"))
_PACKAGES = _with("install add remove update list init build publish audit outdated why link")
_NPM = Program(
    _PACKAGES
    | _with("ci start test", run=_TASK, exec=_RUNNER, dlx=_RUNNER, x=_RUNNER, create=OTHER)
)
_MCP = Program(_with("add remove list get serve start login logout"))
_COMPOSE = Program(_with("up down build run exec logs ps pull start stop restart"))
_DOCKER = Program(
    _with(
        "run exec build pull push start stop restart logs ps images login logout inspect cp rm rmi",
        compose=_COMPOSE,
    )
)

PROGRAMS: dict[str, Program] = {
    # What calls models.
    "claude": Program(
        _with(
            "agents auth config doctor install migrate-installer plugin update setup-token",
            mcp=_MCP,
        )
    ),
    "codex": Program(
        _with(
            "exec e login logout apply resume fork review completion sandbox cloud app-server",
            mcp=_MCP,
        )
    ),
    "gemini": Program(_with("extensions", mcp=_MCP)),
    "qwen": Program(_with("extensions", mcp=_MCP)),
    "gh": Program(
        _with(
            "api auth browse codespace gist issue pr release repo run search secret workflow",
            copilot=Program(_with("suggest explain config alias")),
            models=Program(_with("list run view eval")),
        )
    ),
    "copilot": Program(_with("help init login")),
    "opencode": Program(_with("run serve auth models agent upgrade web acp attach", mcp=_MCP)),
    "goose": Program(_with("session run configure info serve web recipe schedule", mcp=_MCP)),
    "amp": Program(_with("login logout threads mcp")),
    "llm": Program(
        _with("prompt chat keys logs models templates embed embed-multi collections plugins tools")
    ),
    "ollama": Program(_with("serve run pull push list ps show create cp rm stop")),
    "q": Program(_with("chat login logout translate doctor settings", mcp=_MCP)),
    "cursor-agent": Program(_with("agent login logout status update resume", mcp=_MCP)),
    "litellm": OTHER,
    "openai": Program(_with("api tools migrate")),
    "langgraph": Program(_with("dev up build new")),
    # What runs others' files.
    "python": _PYTHON,
    "pypy": _PYTHON,
    "node": _NODE,
    "nodejs": _NODE,
    "tsx": _NODE,
    "ts-node": _SCRIPTED,
    "electron": _SCRIPTED,
    "bun": Program(_PACKAGES | _with("test", run=_MODULES, x=_RUNNER), takes=Takes.SCRIPT),
    "deno": Program(
        _with("test fmt lint check repl eval install", run=_SCRIPTED, task=_TASK, serve=_SCRIPTED)
    ),
    **dict.fromkeys(("sh", "bash", "dash", "zsh", "ksh", "fish"), _SHELL),
    **dict.fromkeys(("ruby", "perl", "php", "lua", "rscript"), _SCRIPTED),
    "java": Program(takes=Takes.SCRIPT, joined="DX", scripts=_options("-jar")),
    "dotnet": Program(_with("run build test publish restore", exec=_SCRIPTED), takes=Takes.SCRIPT),
    "npx": _RUNNER,
    "bunx": _RUNNER,
    "pnpx": _RUNNER,
    "uvx": _RUNNER,
    "npm": _NPM,
    "pnpm": _NPM,
    "yarn": _NPM,
    "pipx": Program(_with("install list upgrade", run=_RUNNER)),
    "uv": Program(
        _with(
            "add remove sync lock pip venv build publish init tree python cache version",
            run=_MODULES,
            tool=Program(_with("install list upgrade uninstall", run=_RUNNER)),
        )
    ),
    **dict.fromkeys(("poetry", "pdm", "hatch", "rye"), Program(_PACKAGES | _with("", run=_RUNNER))),
    # What builds and deploys; also of a CI job.
    "git": Program(
        _with(
            "add blame branch checkout clone commit diff fetch init log merge pull push rebase "
            "remote-https reset restore show stash status submodule switch tag worktree"
        )
    ),
    "docker": _DOCKER,
    "podman": _DOCKER,
    "kubectl": Program(
        _with("apply create delete describe exec get logs port-forward run rollout")
    ),
    "cargo": Program(_with("build run test check clippy bench doc fmt install publish")),
    "go": Program(_with("build test mod get install vet generate fmt", run=_SCRIPTED)),
    "pip": Program(_with("install uninstall list download wheel freeze show index")),
    "gcloud": Program(_with("ai auth compute run storage")),
    "aws": Program(_with("bedrock bedrock-runtime s3 sts sagemaker")),
    "az": Program(_with("login cognitiveservices ml")),
    # A program can be run by naming it to its linker.
    "ld-linux-x86-64.so.2": _LINKER,
    "ld-linux-aarch64.so.1": _LINKER,
    "curl": Program(letters="#0146fgikLnNqRsSvVZ"),
    "pytest": OTHER,
}

# Programs that write a title over their command line, beside those above.
TITLED = frozenset(
    "celery chrome chromium code gunicorn nginx php-fpm postgres postgresql puma redis-server "
    "sidekiq sshd unicorn uwsgi".split()
)

# Packages and files that go by another name than the program that they hold.
ALIASES = {"claude-code": "claude", "gemini-cli": "gemini", "qwen-code": "qwen"}

# npm packages of these have their name kept, in spite of the @.
SCOPES = frozenset(
    "anthropic-ai openai google github githubnext modelcontextprotocol qwen-code sourcegraph "
    "mistralai vercel langchain cloudflare microsoft continuedev cline aws playwright".split()
)

# A digit or a capital is no part of a name or an option, but in these.
NAMES = frozenset(
    "7z Code Cursor Electron Windsurf Zed base64 bin32 bin64 g++ gpt4all k9s lib32 lib64 md5sum "
    "ld-linux-aarch64.so.1 ld-linux-x86-64.so.2 node_modules "
    "python2 s3cmd sha256sum sqlite3 x86_64-linux-gnu aarch64-linux-gnu".split()
)
OPTIONS = frozenset(
    "--http1.0 --http1.1 --http2 --http2-prior-knowledge --http3 --ipv4 --ipv6 --oauth2-bearer "
    "--tls-max --tlsv1.2 --tlsv1.3 --socks5 --socks5-hostname".split()
)
VERSIONED = re.compile(
    r"(?:python|pypy|node|nodejs|ruby|perl|php|pip|lua|gcc|clang|java)-?\d{1,2}(?:\.\d{1,2}){0,2}"
)
EXTENSIONS = frozenset(
    "py pyc pyz js mjs cjs ts mts cts tsx jsx sh bash zsh rb pl php lua r jar java kts go dll "
    "exe".split()
)

_COUNT = re.compile(r"\d{1,6}(?:\.\d{1,3})?")
_MODEL = re.compile(
    r"(?:[a-z]{2,12}/)?(?:claude|gpt|chatgpt|codex|o\d|gemini|gemma|llama|mi[sx]tral|codestral|"
    r"devstral|magistral|ministral|deepseek|qwen|qwq|grok|command|kimi|glm|phi|nova|sonar|"
    r"text-embedding|sonnet|opus|haiku)(?:\d(?:\.\d)?)?"
    r"(?:[-.](?:\d{1,4}[bko]?|20\d{6}|[a-z]{2,12}|[rvk]\d))*"
    r"(?:\[1m\])?"
)
_LEVEL = re.compile(r"trace|debug|info|warn|warning|error|critical|minimal|low|medium|high|max")

# Options whose value may stay, where it looks as it must.
VALUES: dict[str, re.Pattern[str]] = {
    **dict.fromkeys(("--model", "--fallback-model"), _MODEL),
    **dict.fromkeys(
        ("--output-format", "--input-format", "--format"),
        re.compile(r"text|json|stream-json|jsonl|markdown|csv|table|yaml"),
    ),
    "--permission-mode": re.compile(r"plan|default|acceptEdits|bypassPermissions|dontAsk|auto"),
    "--approval-mode": re.compile(r"suggest|auto-edit|full-auto|default|auto_edit|yolo|plan"),
    "--ask-for-approval": re.compile(r"untrusted|on-failure|on-request|never"),
    "--sandbox": re.compile(r"read-only|workspace-write|danger-full-access|docker|podman"),
    **dict.fromkeys(("--log-level", "--effort", "--reasoning-effort", "--thinking"), _LEVEL),
    **dict.fromkeys(
        ("--port", "--workers", "--concurrency", "--max-turns", "--max-tokens", "--temperature",
         "--top-p", "--max-time", "--max-old-space-size"),
        _COUNT,
    ),
    # The kind of a browser's process.
    "--type": re.compile(r"renderer|utility|gpu-process|zygote|ppapi|broker|crashpad-handler"),
    "--utility-sub-type": re.compile(
        r"network\.mojom\.NetworkService|audio\.mojom\.AudioService|"
        r"storage\.mojom\.StorageService|node\.mojom\.NodeService|"
        r"video_capture\.mojom\.VideoCaptureService"
    ),
}  # fmt: skip
