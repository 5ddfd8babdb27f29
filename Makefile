# What a developer needs, by name. `make test` is all of it.

CARGO ?= cargo
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# The clients that the tests read with, and what the tests set up with.
# Not qemu-system-*: those packages replace a newer qemu-utils by an older one.
PACKAGES := build-essential ca-certificates iproute2 libnbd-bin nbd-client openssl \
	python3-libnbd qemu-utils

.PHONY: help test check unit tools build certs clean

help:
	@echo 'make test    install what the tests need, and run all of them'
	@echo 'make check   formatting, lints, documentation'
	@echo 'make unit    unit and integration tests, with the tools that are there'
	@echo 'make tools   install the clients that the tests read with (Debian)'
	@echo 'make build   the program, in target/release/hexz-nbd'
	@echo 'make certs   a throw-away CA and certificates for localhost, in certs/pki'
	@echo 'make clean   remove what was built'

test: tools check unit

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps

unit:
	$(CARGO) test --locked

# Installs only what is missing, so that it needs no network where nothing is.
tools:
	@missing=''; for package in $(PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}\n' $$package 2>/dev/null | grep -qx installed \
			|| missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -qy --no-install-recommends $$missing; \
	fi

build:
	$(CARGO) build --locked --release

certs:
	test -e certs/pki/server-key.pem || certs/make-certs.sh certs/pki localhost 127.0.0.1 ::1

clean:
	$(CARGO) clean
	rm -rf certs/pki
