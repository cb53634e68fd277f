# What people and CI call. `make` alone says what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# Every cargo command runs with the RocksDB that was compiled once for this machine.
CARGO := .ci/rocksdb cargo

.PHONY: help
help: ## says what there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

.PHONY: run
run: setup ## starts a gateway and a simulated fleet, until Ctrl-C
	@$(CARGO) build --locked --release --bins
	@.ci/demo "$${CARGO_TARGET_DIR:-target}/release"

.PHONY: test
test: setup ## everything that proves the promises; what CI runs
	@.ci/python
	@.ci/prometheus
	$(CARGO) build --locked --workspace --bins --examples
	$(CARGO) test --locked --workspace --no-fail-fast

.PHONY: soak
soak: setup ## an hour of the same with random seeds: crashes, power cuts, bad disks, networks and peers
	@.ci/soak 60

.PHONY: check
check: setup ## formatting, lints, documentation, dependencies
	cargo fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps
	.ci/deny

.PHONY: bench
bench: setup ## Waypost as ratios of what RocksDB and QUIC alone do on this machine
	@$(CARGO) build --locked --release --bins
	@"$${CARGO_TARGET_DIR:-target}/release/loadtest" limits --dir "$${CARGO_TARGET_DIR:-target}"

.PHONY: setup
setup: ## installs what this machine lacks (Debian, Ubuntu), and compiles RocksDB once
	@.ci/setup
	@.ci/rocksdb true
