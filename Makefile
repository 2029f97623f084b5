PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# command -> Debian package that brings it; tests whose program is missing skip with a reason.
PACKAGES := gcc libc6-dev criu strace sqlite3 xz-utils perl default-jre-headless python3-venv \
	bash git less make nano nodejs procps ruby screen tmux vim
# Servers that get checkpointed under load. Debian starts services at the next boot, so on a machine that boots (systemd)
# they are installed for CI only; `make test SERVERS=` leaves them out everywhere.
SERVERS := redis-server redis-tools memcached postgresql nginx wrk apache2 dnsmasq vsftpd openssh-server openssh-client \
	mariadb-server tomcat10
ifeq ($(CI)$(wildcard /run/systemd/system),/run/systemd/system)
SERVERS :=
endif

.PHONY: all apt venv demo lint test bench clean
all: venv

# Installs what is missing, and only then touches the network; without root (or apt) it says what is missing. While it
# works, a policy keeps new services from being started.
apt:
	@command -v dpkg-query >/dev/null || { echo "no dpkg here; the tests use: $(PACKAGES) $(SERVERS)"; exit 0; }; \
	missing=; for p in $(PACKAGES) $(SERVERS); do \
	  case "$$(dpkg-query -W -f='$${Status}' $$p 2>/dev/null)" in *"ok installed") ;; *) missing="$$missing $$p";; esac; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" != 0 ]; then echo "missing packages (install them as root):$$missing"; exit 0; fi; \
	policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; fi; \
	export DEBIAN_FRONTEND=noninteractive; apt-get update -q || true; \
	apt-get install -q -y --no-install-recommends $$missing && exit 0; \
	for p in $$missing; do \
	  apt-get install -q -y --no-install-recommends $$p || echo "cannot install $$p; tests that need it will skip"; \
	done

venv: $(VENV)/.made

$(VENV)/.made: pyproject.toml src/firn/cli/launcher.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) apt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m firn.cli.launcher $(BIN)
	@touch $@

demo: venv
	$(BIN)/python demo/demo.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

test: apt venv lint
	@mkdir -p build; rm -f build/failed
	FIRN_FAILED=$(CURDIR)/build/failed $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup || \
	  { test -s build/failed && echo "what has failed, once more, with nothing beside it:" && \
	    sort -u build/failed | tr '\n' '\0' | xargs -0 $(BIN)/python -m pytest -q; }

bench: venv
	$(BIN)/python bench/run.py

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests demo bench -name __pycache__ -type d -prune -exec rm -rf {} +
