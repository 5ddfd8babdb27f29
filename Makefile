# What a developer needs, by name. `make test` is all of it.

CARGO ?= cargo
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# The clients that the tests read with, and what the tests set up with.
# Not qemu-system-*: those packages replace a newer qemu-utils by an older one.
PACKAGES := build-essential ca-certificates chromium curl groff-base haproxy iproute2 jq libnbd-bin mandoc \
	nbd-client nbd-server nbdkit openssl prometheus python3-libnbd qemu-utils \
	strace systemd tmux

# What the test of the Debian package sets up its root with, and reads with.
PACKAGE_PACKAGES := build-essential debootstrap iproute2 libnbd-bin python3 systemd util-linux

# What is measured, and what it is measured with; qemu-utils is among those above.
BENCH_PACKAGES := build-essential e2fsprogs fio libnbd-bin nbd-server nbdkit openssl \
	qemu-utils valgrind

.PHONY: help test check unit fuzz fuzz-short tools build deb package-test package-tools static \
	container stress attacks long-session bench bench-peers bench-micro bench-tools certs clean

help:
	@echo 'make test    install what the tests need, and run all of them'
	@echo 'make check   formatting, lints, documentation'
	@echo 'make unit    unit and integration tests, with the tools that are there'
	@echo 'make fuzz    each fuzz target for FUZZ_SECONDS (150, some 20 minutes in all)'
	@echo 'make fuzz-short   each of them for 10 seconds'
	@echo 'make tools   install the clients that the tests read with (Debian)'
	@echo 'make build   the program, in target/release/hexz-nbd'
	@echo 'make deb     the Debian package, in target/debian'
	@echo 'make package-test   install it into a clean Debian root, and use what it installed; as root'
	@echo 'make static  the program without shared libraries, in target/static, by rustup and musl'
	@echo 'make container      a container with that in it, by buildah'
	@echo 'make stress  hundreds of clients, and everything that may go wrong meanwhile; two minutes,'
	@echo '             or STRESS_SECONDS=...'
	@echo 'make long-session   258 GiB over one TLS 1.2 connection; some minutes, and both cores'
	@echo 'make attacks   what an honest reader notices of hostile archives and clients'
	@echo 'make bench   measure against the peers that there are, into docs/performance; some'
	@echo '             20 minutes, and as much peace as the machine has'
	@echo 'make bench-micro   parts of the hot paths, and the instructions that these take'
	@echo 'make certs   a CA to try things out with, and certificates for localhost, in certs/pki'
	@echo 'make clean   remove what was built'

test: tools check unit fuzz-short package-test

# The benchmarks, the fuzz targets and the stress test are workspaces of their own, built where
# the rest is, as much of it is the same.
PEERS := --manifest-path benches/peers/Cargo.toml
FUZZ := --manifest-path fuzz/Cargo.toml
FUZZ_SECONDS ?= 150
STRESS := --manifest-path tests/stress/Cargo.toml

check:
	$(CARGO) fmt --all --check
	$(CARGO) fmt $(PEERS) --check
	$(CARGO) fmt $(FUZZ) --check
	$(CARGO) fmt $(STRESS) --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked $(PEERS) --target-dir target -- -D warnings
	$(CARGO) clippy --locked $(FUZZ) --target-dir target -- -D warnings
	$(CARGO) clippy --locked $(STRESS) --target-dir target -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps

unit:
	$(CARGO) test --locked --workspace

fuzz:
	CARGO='$(CARGO)' fuzz/run.sh $(FUZZ_SECONDS)

fuzz-short:
	CARGO='$(CARGO)' fuzz/run.sh 10

# Installs only what is missing, so that it needs no network where nothing is.
bench-tools: PACKAGES := $(BENCH_PACKAGES)
package-tools: PACKAGES := $(PACKAGE_PACKAGES)
tools bench-tools package-tools:
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

# What packs the package. Its version is named, so that a newer one surprises nobody.
CARGO_DEB := target/tools/bin/cargo-deb
$(CARGO_DEB):
	$(CARGO) install cargo-deb --version 3.8.0 --locked --root target/tools

deb: build $(CARGO_DEB)
	packaging/prepare.sh target/release/hexz-nbd target/packaging
	rm -rf target/debian
	$(CARGO_DEB) --no-build

package-test: package-tools deb
	$(SUDO) tests/package/run.sh target/debian/hexz-nbd_*.deb

# Takes `rustup target add` and Debian's musl-tools, so it isn't part of `make test`.
STATIC := x86_64-unknown-linux-musl
static:
	$(CARGO) build --locked --release --target $(STATIC)
	mkdir -p target/static
	strip -s -o target/static/hexz-nbd target/$(STATIC)/release/hexz-nbd

container: static
	buildah build --isolation chroot -t hexz-nbd -f packaging/Containerfile target/static

stress: build
	$(CARGO) build --locked --release $(STRESS) --target-dir target
	target/release/hexz-nbd-stress $(STRESS_OPTIONS)

attacks: build
	$(CARGO) build --locked --release $(STRESS) --target-dir target
	target/release/hexz-nbd-attacks $(ATTACKS_OPTIONS)

long-session: build
	$(CARGO) build --locked --release $(STRESS) --target-dir target
	target/release/hexz-nbd-long-session $(LONG_SESSION_OPTIONS)

bench: bench-peers bench-micro

bench-peers: bench-tools build
	$(CARGO) build --locked --release --manifest-path benches/hexz-server/Cargo.toml --target-dir target
	$(CARGO) build --locked --release $(PEERS) --target-dir target
	PATH="$$PATH:/usr/sbin" target/release/hexz-nbd-peers --folder target/bench --output docs/performance $(BENCH_OPTIONS)

bench-micro: bench-tools
	$(CARGO) bench --locked --bench micro
	CARGO='$(CARGO)' benches/count-instructions.sh

PKI := $(CARGO) run --quiet --locked -- pki --dir certs/pki

certs:
	test -e certs/pki/crl.pem || $(PKI) init
	test -e certs/pki/servers/localhost || $(PKI) server localhost 127.0.0.1 ::1
	test -e certs/pki/clients/developer || $(PKI) client developer

clean:
	$(CARGO) clean
	rm -rf certs/pki
