#!/bin/sh
# Prints how many instructions the hot paths take, as callgrind counts them: a figure
# that is the same whatever else the machine does.
set -eu
cd "$(dirname "$0")/.."

program=$(${CARGO:-cargo} bench --locked --no-run --bench hot_paths 2>&1 |
	sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
test -x "$program" || { echo "benches/hot_paths.rs can't be built" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# count FUNCTION TIMES WHAT
count() {
	valgrind --tool=callgrind --callgrind-out-file="$work/$1" \
		--toggle-collect="hot_paths::$1" "$program" "$1" "$2" 2>"$work/log" ||
		{ cat "$work/log" >&2; exit 1; }
	instructions=$(sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$work/log")
	test "${instructions:-0}" -gt 0 || { cat "$work/log" >&2; exit 1; }
	echo "$((instructions / $2)) instructions for $3"
}

count warm_reads 20000 'each read of 4 KiB from the cache, 32 at a time, without TLS'
count warm_reads_tls 20000 'the same with TLS 1.3'
count cold_blocks 200 'each block of 64 KiB that is read, checked and decoded (Zstandard)'
