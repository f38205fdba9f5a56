# Two commands do everything: `make demo` and `make test`. Both set up what they need first.
#
# System packages are installed with apt where that is possible (as root, or with sudo that asks no
# password); elsewhere the command to run is printed. Python packages go into .venv only.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_HOME ?= .cache/demo

# clang and libbpf build and load the kernel program; without root the demo does without them.
DEMO_COMMANDS := tshark $(if $(filter 0,$(shell id -u)),curl clang ip)
DEMO_PACKAGES := tshark $(if $(filter 0,$(shell id -u)),curl clang libbpf1 iproute2)
# Whatever a test would otherwise be skipped for, so that on this machine none is.
TEST_COMMANDS := tshark chromium clang gcc aarch64-linux-gnu-gcc curl node npm go ip nft bpftool keytool systemctl \
	gsettings zsh fish
TEST_PACKAGES := tshark chromium clang llvm gcc libc6-dev libssl-dev libbpf1 libbpf-dev bpftool python3-bpfcc \
	gcc-aarch64-linux-gnu libc6-dev-arm64-cross \
	clang-19 linux-headers-amd64 curl nodejs npm golang-go default-jdk-headless iproute2 nftables procps zsh fish \
	systemd dbus-user-session libglib2.0-bin gsettings-desktop-schemas dconf-gsettings-backend \
	libcurl3-nss libmbedtls-dev libwolfssl-dev

# setuptools warns at length of what any editable install is.
QUIETLY := PYTHONWARNINGS=ignore

# Of the table of clients (tests/lab/real_clients/clients.toml).
CLIENT_COMMANDS := erl gnutls-cli http lua5.4 ncat php pypy3 ruby socat tclsh haproxy stunnel perl mcs haxe
CLIENT_PACKAGES := erlang-base erlang-inets erlang-ssl gnutls-bin httpie lua5.4 lua-sec ncat php-cli php-curl \
	pypy3 python3-pycurl ruby socat tcl tcl-tls haproxy stunnel4 liblwp-protocol-https-perl \
	mono-runtime mono-mcs ca-certificates-mono haxe

.PHONY: demo test test-all setup setup-test lint unit kernel lab clients fuzz bench bench-toy clean

demo: setup
	@$(BIN)/python tools/demo.py --home $(DEMO_HOME)

# Some 8 minutes on two quiet cores. What takes long is left to test-all: tests marked `slow`, seven eighths
# of each property's examples.
test: setup-test
	@$(BIN)/python tools/run_tests.py

test-all: setup-test
	@$(BIN)/python tools/run_tests.py --all

setup: $(VENV)/.installed
	@sh tools/system_packages.sh "$(DEMO_COMMANDS)" "$(DEMO_PACKAGES)"

setup-test: $(VENV)/.installed-dev
	@sh tools/system_packages.sh "$(TEST_COMMANDS)" "$(TEST_PACKAGES)"

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Run: sudo apt-get install -y python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh tools/system_packages.sh --always "python3-venv"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(QUIETLY) $(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(QUIETLY) $(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

# One group alone, as `make test` runs it.
lint: setup-test
	@$(BIN)/python tools/run_tests.py lint

unit: setup-test
	@$(BIN)/python tools/run_tests.py unit

kernel: setup-test
	@$(BIN)/python tools/run_tests.py kernel

lab: setup-test
	@$(BIN)/python tools/run_tests.py lab

# Real binaries of npm and PyPI, all versions (`make test` runs the newest Claude Code and Bun): long
# downloads. What they prove is kept for the table in docs/capture.md.
clients: setup-test
	@sh tools/system_packages.sh chromium chromium
	@sh tools/system_packages.sh "$(CLIENT_COMMANDS)" "$(CLIENT_PACKAGES)"
	HALTON_CLIENT_RESULTS=1 $(BIN)/python -m pytest -m "lab" tests/lab/real_clients tests/lab/test_older.py
	$(BIN)/python tools/client_table.py

# Bytes of any kind over every border, from a new seed each time; `unit` runs some hundred cases of
# each. A fault's traceback, and the command that repeats it, are kept in .cache/fuzz.
FUZZ_MINUTES ?= 5
fuzz: setup-test
	$(BIN)/python -m tests.fuzz --minutes $(FUZZ_MINUTES)

bench: setup-test
	$(BIN)/python -m bench

# Every benchmark in seconds: whether it still runs is all that this tells.
bench-toy: setup-test
	$(BIN)/python -m bench --toy

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
