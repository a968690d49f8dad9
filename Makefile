# Two commands need nothing but root and Rust on Debian or Ubuntu: `make test` and `make demo`. docs/testing.md says what they do.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

# One profile and one set of flags for everything: unit tests, end-to-end tests and the guests, which have no libraries, run the same
# static artifacts, so dependencies are compiled once. Naming the target keeps the flags off build scripts and macros.
TRIPLE := $(shell rustc -vV | sed -n 's/^host: //p')
PROFILE := --locked --profile ci --target $(TRIPLE)
BIN := $(abspath $(or $(CARGO_TARGET_DIR),target)/$(TRIPLE)/ci)
export RUSTFLAGS := -Ctarget-feature=+crt-static
export RUSTDOCFLAGS := -D warnings -A rustdoc::private-intra-doc-links -Ctarget-feature=+crt-static
export CARGO_TERM_PROGRESS_WHEN := never
LANES := lanes
RELEASE_BIN := $(dir $(BIN))release
RELEASE := $(RELEASE_BIN)/ublkimg
# Its name, once it is built.
PACKAGE = $$(packaging/deb.sh $(RELEASE) target/package)

# What is measured is built as users get it.
bench bench-ab bench-convert bench-convert-wheels starts starts-vm: PROFILE := --locked --release --target $(TRIPLE)
bench bench-ab bench-convert bench-convert-wheels starts starts-vm: BIN := $(RELEASE_BIN)

WHEELS := numpy scipy

FUZZ_SECONDS := 600

POWERCUT_SEEDS := 200
SIMULATION_SEEDS := 2000
N := 500
MINUTES := 60

.PHONY: broken package reboot podman recipes deb simulation bench bench-ab powercut faults kills soak build programs deps fmt clippy deny doc unit fuzz fuzz-build fuzz-long guest-tests lanes lanes-full test test-full simulate bench-convert bench-convert-wheels debian-images demo demo-vm starts starts-vm pictures docs uml-kernel clean-caches

build: deps ## the program, for use: target/release/ublkimg
	env -u RUSTFLAGS cargo build --locked --release -p ublkimg

programs: deps # what tests and demos run
	cargo build --workspace --bins $(PROFILE)

starts: programs ## scipy, nginx and node, started in several ways over one shaped link; docs/starts.md
	@bench/starts/prepare.sh $(BIN)
	@$(BIN)/start $(STARTS_FLAGS)

starts-vm: programs ## the same over /dev/ublkb0 in a User-Mode-Linux guest
	@bench/starts/prepare.sh $(BIN)
	@bench/starts/vm.sh $(BIN) $(STARTS_FLAGS)

bench: programs ## how fast a device is, beside the bars that it is to meet; docs/performance.md. On a host without ublk: in a guest
	@bench/performance/prepare.sh $(BIN)
	@if [[ -e /dev/ublk-control || '$(BENCH_FLAGS)' == *'--transport fuse'* ]]; then $(BIN)/performance $(BENCH_FLAGS); else bench/performance/vm.sh $(BIN) $(BENCH_FLAGS); fi

bench-ab: programs ## the same of BASE=REVISION and of what is here, one after the other, with the programs of here that measure
	@test -n '$(BASE)' || { echo 'usage: make bench-ab BASE=REVISION [BENCH_FLAGS="hits"]'; exit 2; }
	@bench/performance/prepare.sh $(BIN)
	@bench/performance/ab.sh $(BIN) '$(BASE)' $(BENCH_FLAGS)

bench-convert: programs ## converting a tree beside `tar | zstd -3`; bench/README.md. BENCH_TREE=DIR for another tree
	@$(if $(BENCH_TREE),,bench/convert/prepare.sh target/bench/python-tree)
	@$(BIN)/convert --tree '$(or $(BENCH_TREE),target/bench/python-tree)' --program $(BIN)/ublkimg $(BENCH_FLAGS)

bench-convert-wheels: programs ## the same with wheels from PyPI: WHEELS='numpy scipy', or WHEELS=torch BENCH_FLAGS='--rounds 1 --layers 4' (5 GB; 15 GB of disk)
	@bench/convert/wheels.sh target/bench/wheels-$(firstword $(WHEELS)) $(WHEELS)
	@$(BIN)/convert --tree target/bench/wheels-$(firstword $(WHEELS)) --program $(BIN)/ublkimg $(BENCH_FLAGS)

debian-images: deps ## images made of Debian packages, converted and compared with what umoci unpacks; ten minutes
	@tests/debian-images.sh target/debian-images
	UBLKIMG_IMAGES=$(abspath target/debian-images) cargo test -p ublkimg-convert $(PROFILE) --test convert -- --nocapture images_of_packages

pictures: programs ## the pictures of the README, from two starts of the scipy image made for them
	@bench/starts/prepare.sh $(BIN)
	@bench/starts/pictures.sh $(BIN) $(STARTS_FLAGS)

deb: deps ## a Debian package of the program, in target/package
	cargo build --locked --release --target $(TRIPLE) -p ublkimg
	@packaging/deb.sh $(RELEASE) target/package

docs: programs ## man pages and shell completions, in target/docs
	$(BIN)/ublkimg docs target/docs

deps: ## installs missing packages with apt
	@tests/deps.sh

fmt:
	cargo fmt --all -- --check
	cargo fmt --manifest-path fuzz/Cargo.toml -- --check

clippy: deps
	cargo clippy --workspace --all-targets $(PROFILE) -- -D warnings
	@fuzz/run.sh --clippy

# Without the advisory database: it is not among the things that a test may download.
deny:
	@if cargo deny --version >/dev/null 2>&1; then cargo deny --locked check bans licenses sources; \
	else echo 'SKIP deny: no cargo-deny here (cargo install --locked cargo-deny)'; fi

doc: deps
	@tests/doc-links.sh
	# cli's doc comments are help texts, where [:TAG] is no link
	cargo doc --workspace --exclude ublkimg --no-deps --document-private-items $(PROFILE)

# Twice as many at a time as there are processors to a small machine: they mostly wait.
unit: deps
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-4} cargo test --workspace $(PROFILE)

# From the seeds alone, so it starts the same everywhere.
fuzz: deps ## fuzzes each target for ten SECONDS, from its seeds
	@UBLKIMG_FUZZ_FRESH=1 fuzz/run.sh --seconds $(or $(SECONDS),10)

fuzz-build: deps
	@fuzz/run.sh --build

fuzz-long: deps ## fuzzes each target for FUZZ_SECONDS, going on where the last run ended
	@fuzz/run.sh --seconds $(FUZZ_SECONDS)

simulation: deps ## the whole path of a read in orders that SIMULATION_SEEDS seeds choose, with faults; `make unit` tries a few
	UBLKIMG_SIMULATION_SEEDS=$(SIMULATION_SEEDS) cargo test -p ublkimg-driver --lib $(PROFILE) -- --nocapture simulation

powercut: deps ## cuts the power after every step of POWERCUT_SEEDS workloads of the store; `make unit` does three
	UBLKIMG_POWERCUT_SEEDS=$(POWERCUT_SEEDS) cargo test -p ublkimg-driver --lib $(PROFILE) -- --nocapture power_cut

faults: guest-tests ## every fault with its outcome and the time to it, as tests and lanes see them, written into docs/guarantees.md
	@tests/faults.sh $(BIN) $(PROFILE)

broken: deps ## breaks the program on purpose in a copy, and shows that the test which stands guard fails; ten minutes
	@tests/broken.sh target/broken $(PROFILE)

kills: programs ## kills the daemon N times under load, in a guest; `make lanes` does twenty
	@tests/vm/long.sh kills.sh $(BIN) $(N) $$((300 + 5 * $(N)))

soak: programs ## adds, removes, kills, outages and evictions at once for MINUTES, in a guest; `make lanes` does five
	@tests/vm/long.sh soak.sh $(BIN) $$((60 * $(MINUTES))) $$((300 + 60 * $(MINUTES)))

guest-tests: programs
	@tests/vm/guest-tests.sh $(BIN) $(PROFILE)

lanes: guest-tests ## tests on kernels with ublk, in guests where the host has none
	@tests/vm/lanes.sh --bin $(BIN)

lanes-full: guest-tests
	@tests/vm/lanes.sh --bin $(BIN) --full

test: deps ## everything that must hold; less than half an hour on two cores, most of them compiling
	@tests/all.sh $(LANES)

test-full: export UBLKIMG_STACKS := 400
test-full: ## and what takes long: broken builds, the package in a clean root and on a system that reboots, podman, docker and Slurm, the whole demo image on the stock kernels, ten times as many stacks of layers
	@$(MAKE) --no-print-directory debian-images
	@$(MAKE) --no-print-directory broken
	@$(MAKE) --no-print-directory package
	@$(MAKE) --no-print-directory reboot
	@$(MAKE) --no-print-directory podman
	@$(MAKE) --no-print-directory recipes
	@$(MAKE) --no-print-directory test LANES=lanes-full

package: deb programs ## installs the package in a clean Debian root, uses it there as docs/tutorial.md says, and purges it; two minutes
	@tests/package.sh target/debian-images $(PACKAGE) $(BIN)

reboot: deb programs ## a Debian system with the package that reboots in an emulated machine; docs/testing.md; ten minutes
	@tests/vm/reboot.sh target/vm $(PACKAGE) $(BIN)

recipes: programs ## runs the recipes for docker and Slurm in a clean Debian root; three minutes
	@tests/recipes.sh target/debian-images $(BIN)

podman: programs ## runs the recipes for podman; skipped where there is none
	@tests/podman.sh $(BIN)

simulate: ## how near recorded starts come to their bound: TRACES=DIR [OUT=FILE.json] [WRONG=FILE.json]
	@test -n '$(TRACES)' || { echo 'usage: make simulate TRACES=DIR [OUT=FILE.json] [WRONG=FILE.json]; bench/README.md says what DIR holds'; exit 2; }
	@cargo run -q -p ublkimg-bench --bin simulate $(PROFILE) -- --traces '$(TRACES)' --out '$(or $(OUT),target/bench/simulate.json)' $(if $(WRONG),--wrong '$(WRONG)')

demo: programs ## a container from an image that is not here, pulled whole and pulled lazily
	@tests/demo/build-image.sh
	@$(BIN)/demo $(DEMO_FLAGS)

demo-vm: programs ## the same over /dev/ublkb0 in a User-Mode-Linux guest
	@tests/demo/build-image.sh
	@tests/demo/demo-vm.sh $(BIN) $(DEMO_FLAGS)

uml-kernel: ## builds that guest's kernel; 8 minutes, once
	@tests/vm/build-uml.sh target/vm/linux-uml

clean-caches: ## the built image and kernels, which `cargo clean` removes too
	rm -rf target/demo target/starts target/vm
