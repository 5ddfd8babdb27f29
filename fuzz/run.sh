#!/usr/bin/env bash
# Fuzzes each target for so many seconds, one after the other:
#
#     fuzz/run.sh SECONDS [TARGET...]
#
# The committed inputs come first: those in corpus/ show the way, those in regressions/ once
# showed a fault. What is found goes on from there in target/fuzz/corpus; an input that ends
# a run is kept in target/fuzz/artifacts, and ends this.
set -euo pipefail
cd "$(dirname "$0")"
seconds=$1
shift
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
	targets=(header index blocks references plaintext options requests proxy addresses rules
		responses listings trees)
fi

# Built where the gateway is, as most of it is the same. With the variable RUSTC_WRAPPER instead
# of the setting, all C code would be compiled anew, and then again for the gateway.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/../target}"
unset RUSTC_WRAPPER
"${CARGO:-cargo}" build --locked --bins --config "build.rustc-wrapper='$PWD/rustc-with-coverage.sh'"

# Nothing that an input can say makes the program allocate more than some blocks of 32 MiB.
# Address space is what is limited, since memory that is never written to wouldn't show.
ulimit -v $((1024 * 1024))
export RUST_BACKTRACE=1
for target in "${targets[@]}"; do
	echo "== $target, $seconds seconds"
	found="$CARGO_TARGET_DIR/fuzz/corpus/$target"
	artifacts="$CARGO_TARGET_DIR/fuzz/artifacts/$target"
	mkdir -p "$found" "$artifacts"
	inputs=("$found")
	for folder in "corpus/$target" "regressions/$target"; do
		if [ -d "$folder" ]; then
			inputs+=("$folder")
		fi
	done
	"$CARGO_TARGET_DIR/debug/$target" "${inputs[@]}" \
		-max_total_time="$seconds" -timeout=60 -rss_limit_mb=600 -max_len=4096 -len_control=10 \
		-artifact_prefix="$artifacts/" -print_final_stats=1 -verbosity=0
done
