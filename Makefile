# Development tasks; `make test` runs all tests, `make help` lists the rest.

CARGO ?= cargo
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# Clients and other programs that the tests use.
# Not qemu-system-*: those packages would replace a newer qemu-utils with an older one.
PACKAGES := build-essential ca-certificates chromium curl e2fsprogs fdisk fish fuse3 groff-base \
	haproxy iproute2 jq libfaketime libnbd-bin mandoc nbd-client nbd-server nbdkit nginx-light \
	openssl prometheus python3-libnbd python3-venv qemu-utils rsync strace systemd tmux valgrind \
	zsh

# Programs that the test of the Debian package uses.
PACKAGE_PACKAGES := build-essential debootstrap iproute2 libnbd-bin python3 systemd util-linux

# Programs that the test of the first hour uses.
FIRST_HOUR_PACKAGES := debootstrap git python3 util-linux

# Programs that the test of the Debian package in a virtual machine uses. QEMU isn't among them,
# since its package would replace a newer qemu-utils.
VM_PACKAGES := apt e2fsprogs mmdebstrap tar util-linux

# Programs that the test of the RPM package and of the image uses, besides those above.
RELEASE_PACKAGES := $(PACKAGE_PACKAGES) buildah makepkg musl-tools rpm shellcheck

# Programs that the test of the examples uses, besides those above.
EXAMPLE_PACKAGES := binutils haproxy iproute2 libnbd-bin libxml2-utils nginx-light python3-venv \
	systemd util-linux

# Programs that the test of a fleet uses.
FLEET_PACKAGES := binutils build-essential e2fsprogs haproxy iproute2 libnbd-bin nginx-light \
	python3-libnbd qemu-utils runc util-linux

# Servers that the benchmarks measure, and programs that they use.
BENCH_PACKAGES := build-essential e2fsprogs fio libnbd-bin nbd-server nbdkit nginx openssl \
	qemu-utils valgrind

.PHONY: help test check unit fuzz fuzz-short tools client-tools build deb package-test \
	package-tools vm-test vm-tools first-hour first-hour-tools hexz-cli-test static rpm \
	container release release-test release-tools stress store-test examples-test examples-tools \
	fleet-test fleet-tools attacks long-session bench bench-peers \
	bench-micro bench-tools reach-bench costs check-costs certs pictures clean

help:
	@echo 'make test          install the tools that the tests need, and run all tests'
	@echo 'make check         formatting, lints, documentation, the build without stores'
	@echo 'make check-costs   instruction counts of the hot paths, compared with benches/costs.txt'
	@echo 'make unit          unit and integration tests, with the tools that are installed'
	@echo 'make fuzz          each fuzz target for FUZZ_SECONDS (150; some 20 minutes in total)'
	@echo 'make fuzz-short    each fuzz target for 10 seconds'
	@echo 'make tools         install the clients that the tests use (Debian)'
	@echo 'make build         the program, in target/release/hexz-nbd'
	@echo 'make deb           the Debian package, in target/debian'
	@echo 'make package-test  install the package into a clean Debian root and use it; as root'
	@echo 'make first-hour    follow README.md in a clean Debian root, from nothing to verified bytes;'
	@echo '                   builds the program there; FIRST_HOUR_OPTIONS=--help; as root'
	@echo 'make hexz-cli-test follow docs/create-snapshots.md there, which builds the Hexz tools; as root'
	@echo 'make vm-test       the package and its units under systemd in an emulated machine; ten'
	@echo '                   minutes, or some of it with TOPICS=...; as root'
	@echo 'make static        the program without shared libraries, in target/static; rustup and musl'
	@echo 'make rpm           an RPM package with the static program, in target/generate-rpm'
	@echo 'make container     a container image with the static program; buildah'
	@echo 'make release       all packages, archives and the image, with checksums and an SBOM, in'
	@echo '                   target/release-artifacts; for another processor: ARCH=aarch64'
	@echo 'make release-test  install and use the RPM package and the image; as root'
	@echo 'make stress        hundreds of clients while faults are injected; two minutes, or'
	@echo '                   STRESS_SECONDS=...'
	@echo 'make store-test    archives in object stores that others have written: moto, s3s-fs (S3),'
	@echo '                   azurite, fake-gcs-server, nginx; installs them into target/stores'
	@echo 'make examples-test the examples for Kubernetes, Compose, nginx, libvirt, cloud-init, Ansible:'
	@echo '                   schemas, and what can be run here; installs tools; as root'
	@echo 'make fleet-test    gateways behind HAProxy that are killed and restarted, bytes from the store,'
	@echo '                   a container, a damaged disk cache; ten minutes; as root'
	@echo 'make long-session  258 GiB over one TLS 1.2 connection; some minutes, and both cores'
	@echo 'make attacks       effect of hostile archives and clients on an honest reader'
	@echo 'make bench         comparison with other servers, into docs/performance; half an hour'
	@echo '                   on an otherwise idle machine'
	@echo 'make reach-bench   archives in an object store across a network; ten minutes, or'
	@echo '                   REACH_OPTIONS=...'
	@echo 'make bench-micro   parts of the hot paths, and their instruction counts'
	@echo 'make costs         instruction counts of the hot paths, in the form of benches/costs.txt'
	@echo 'make pictures      pictures of the status page in three states and five widths, in'
	@echo '                   target/status-page; 20 minutes, on an otherwise idle machine'
	@echo 'make certs         a CA for experiments, and certificates for localhost, in certs/pki'
	@echo 'make clean         remove what was built'

test: tools check unit check-costs fuzz-short package-test

# The benchmarks, the fuzz targets and the stress test are workspaces of their own. They share the
# target folder, since most of their dependencies are the same.
PEERS := --manifest-path benches/peers/Cargo.toml
REACH := --manifest-path benches/reach/Cargo.toml
FUZZ := --manifest-path fuzz/Cargo.toml
FUZZ_SECONDS ?= 150
STRESS := --manifest-path tests/stress/Cargo.toml

check:
	$(CARGO) fmt --all --check
	$(CARGO) fmt $(PEERS) --check
	$(CARGO) fmt $(REACH) --check
	$(CARGO) fmt $(FUZZ) --check
	$(CARGO) fmt $(STRESS) --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --all-targets --no-default-features -- -D warnings
	$(CARGO) test --locked --bin hexz-nbd --no-default-features -- without_the_feature
	$(CARGO) clippy --locked $(PEERS) --target-dir target -- -D warnings
	$(CARGO) clippy --locked $(REACH) --target-dir target -- -D warnings
	$(CARGO) clippy --locked $(FUZZ) --target-dir target -- -D warnings
	$(CARGO) clippy --locked $(STRESS) --target-dir target -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --exclude hexz-nbd --no-deps

unit:
	$(CARGO) test --locked --workspace

fuzz:
	CARGO='$(CARGO)' fuzz/run.sh $(FUZZ_SECONDS)

fuzz-short:
	CARGO='$(CARGO)' fuzz/run.sh 10

# Installs only missing packages, so that no network is needed if there are none.
bench-tools: PACKAGES := $(BENCH_PACKAGES)
package-tools: PACKAGES := $(PACKAGE_PACKAGES)
first-hour-tools: PACKAGES := $(FIRST_HOUR_PACKAGES)
vm-tools: PACKAGES := $(VM_PACKAGES)
release-tools: PACKAGES := $(RELEASE_PACKAGES)
examples-tools: PACKAGES := $(EXAMPLE_PACKAGES)
fleet-tools: PACKAGES := $(FLEET_PACKAGES)
client-tools bench-tools package-tools first-hour-tools vm-tools release-tools examples-tools fleet-tools:
	@missing=''; for package in $(PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}\n' $$package 2>/dev/null | grep -qx installed \
			|| missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -qy --no-install-recommends $$missing; \
	fi

tools: client-tools target/hexz

# The Hexz tools, with which the pages create snapshots; in wheels for the pages that install them.
target/hexz: tests/integration/documents/requirements.txt | client-tools
	rm -rf $@
	python3 -m venv $@
	$@/bin/pip download --quiet --require-hashes --only-binary :all: --dest $@/wheels \
		--requirement $< && $@/bin/pip install --quiet --no-index $@/wheels/*.whl \
		|| { rm -rf $@; exit 1; }

build:
	$(CARGO) build --locked --release

# Builds the Debian package. The version is pinned.
CARGO_DEB := target/tools/bin/cargo-deb
$(CARGO_DEB):
	$(CARGO) install cargo-deb --version 3.8.0 --locked --root target/tools

deb: build $(CARGO_DEB)
	packaging/prepare.sh target/release/hexz-nbd target/packaging
	rm -rf target/debian
	$(CARGO_DEB) --no-build

package-test: package-tools deb
	$(SUDO) tests/package/run.sh target/debian/hexz-nbd_*.deb

# Both need a network, and install Rust with rustup unless FIRST_HOUR_OPTIONS has --toolchain.
first-hour: first-hour-tools
	$(SUDO) tests/first-hour/run.py $(FIRST_HOUR_OPTIONS)

hexz-cli-test: first-hour-tools build
	$(SUDO) tests/first-hour/run.py --program target/release/hexz-nbd $(FIRST_HOUR_OPTIONS) \
		docs/create-snapshots.md

vm-test: vm-tools deb
	$(SUDO) tests/package/vm.sh target/debian/hexz-nbd_*.deb $(TOPICS)

# Needs `rustup target add` and Debian's musl-tools, so it isn't part of `make test`. For another
# processor it needs a cross compiler as well: MUSL is the folder of musl for that processor, in which
# Debian's musl-dev installs it (dpkg --add-architecture arm64; apt install musl-dev:arm64).
HOST := $(shell uname -m)
ARCH ?= $(HOST)
STATIC := $(ARCH)-unknown-linux-musl
# On AArch64, kernels have pages of 4, 16 or 64 KiB. jemalloc works with this size or smaller ones.
ifeq ($(HOST),aarch64)
export JEMALLOC_SYS_WITH_LG_PAGE := 16
endif
ifeq ($(ARCH),aarch64)
# The functions for atomics that GCC would call need a function that musl lacks.
STATIC_ENV := JEMALLOC_SYS_WITH_LG_PAGE=16 CFLAGS_aarch64_unknown_linux_musl=-mno-outline-atomics
endif
ifneq ($(ARCH),$(HOST))
CROSS ?= $(ARCH)-linux-gnu-
MUSL ?= /usr/lib/$(ARCH)-linux-musl
# A program of its own, since jemalloc's build drops the arguments in CC.
MUSL_GCC := target/tools/$(ARCH)-musl-gcc
STATIC_ENV += CC_$(ARCH)_unknown_linux_musl=$(CURDIR)/$(MUSL_GCC) \
	AR_$(ARCH)_unknown_linux_musl=$(CROSS)ar \
	CARGO_TARGET_$(shell echo $(ARCH) | tr a-z A-Z)_UNKNOWN_LINUX_MUSL_LINKER=$(CROSS)gcc
$(MUSL_GCC): Makefile
	mkdir -p $(@D)
	printf '#!/bin/sh\nexec $(CROSS)gcc "$$@" -specs=$(MUSL)/musl-gcc.specs\n' > $@
	chmod +x $@
endif
static: $(MUSL_GCC)
	$(STATIC_ENV) $(CARGO) build --locked --release --target $(STATIC)
	mkdir -p target/static
	$(CROSS)strip -s -o target/static/hexz-nbd target/$(STATIC)/release/hexz-nbd

# Builds the RPM package. The version is pinned.
CARGO_RPM := target/tools/bin/cargo-generate-rpm
$(CARGO_RPM):
	$(CARGO) install cargo-generate-rpm --version 0.21.1 --locked --root target/tools

VERSION := $(shell sed -n '/^\[workspace.package\]/,/^$$/s/^version = "\(.*\)"/\1/p' Cargo.toml)
# Not of `build` and `static`, which would build all C libraries anew after each commit.
deb rpm container release: private export SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct 2>/dev/null || date +%s)

rpm: build static $(CARGO_RPM)
	packaging/prepare.sh target/release/hexz-nbd target/packaging
	rm -rf target/generate-rpm && mkdir target/generate-rpm
	$(CARGO_RPM) --arch $(ARCH) --output target/generate-rpm/

container: static
	packaging/container.sh target/static/hexz-nbd target/container
	packaging/image.sh $(ARCH) $(VERSION)

# The Debian package has the dynamically linked program, which is built for this machine only.
release: $(if $(CROSS),,deb) rpm container
	packaging/release.sh $(ARCH) $(VERSION)

release-test: release-tools release
	$(SUDO) tests/package/release.sh target/release-artifacts

stress: build
	$(CARGO) build --locked --release $(STRESS) --target-dir target
	target/release/hexz-nbd-stress $(STRESS_OPTIONS)

# Takes Python, npm, nginx and libnbd's clients, and a network for the first time.
store-test:
	$(CARGO) build --locked
	tests/stores/run.py target/debug/hexz-nbd $(STORES)

# Takes Python and npm, and a network for the first time.
examples-test: examples-tools
	$(CARGO) build --locked
	$(SUDO) tests/examples/run.py target/debug/hexz-nbd $(EXAMPLES)

fleet-test: fleet-tools build
	$(CARGO) build --locked --release --manifest-path benches/hexz-server/Cargo.toml --target-dir target
	$(SUDO) tests/fleet/run.py $(FLEET_OPTIONS)

attacks: build
	$(CARGO) build --locked --release $(STRESS) --target-dir target
	target/release/hexz-nbd-attacks $(ATTACKS_OPTIONS)

pictures: client-tools build
	tests/status-page/pictures.py target/release/hexz-nbd target/status-page --minutes 16

long-session: build
	$(CARGO) build --locked --release $(STRESS) --target-dir target
	target/release/hexz-nbd-long-session $(LONG_SESSION_OPTIONS)

bench: bench-peers bench-micro

bench-peers: bench-tools build
	$(CARGO) build --locked --release --manifest-path benches/hexz-server/Cargo.toml --target-dir target
	$(CARGO) build --locked --release $(PEERS) --target-dir target
	PATH="$$PATH:/usr/sbin" target/release/hexz-nbd-peers --folder target/bench --output docs/performance $(BENCH_OPTIONS)

reach-bench: bench-tools build
	$(CARGO) build --locked --release --manifest-path benches/hexz-server/Cargo.toml --target-dir target
	$(CARGO) build --locked --release $(REACH) --target-dir target
	PATH="$$PATH:/usr/sbin" target/release/hexz-nbd-reach --folder target/bench $(REACH_OPTIONS)

bench-micro: bench-tools
	$(CARGO) bench --locked --bench micro
	CARGO='$(CARGO)' benches/count-instructions.sh

costs: bench-tools
	CARGO='$(CARGO)' benches/count-instructions.sh

# Fails if a hot path takes more instructions than benches/costs.txt allows.
check-costs: tools
	CARGO='$(CARGO)' benches/count-instructions.sh --check

PKI := $(CARGO) run --quiet --locked -- pki --dir certs/pki

certs:
	test -e certs/pki/crl.pem || $(PKI) init
	test -e certs/pki/servers/localhost || $(PKI) server localhost 127.0.0.1 ::1
	test -e certs/pki/clients/developer || $(PKI) client developer

clean:
	$(CARGO) clean
	rm -rf certs/pki
