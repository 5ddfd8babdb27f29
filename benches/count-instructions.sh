#!/bin/sh
# Prints how many instructions the hot paths take, as counted by callgrind. With --check, fails if
# one takes over 5 % more than benches/costs.txt says.
set -eu
cd "$(dirname "$0")/.."

program=$(${CARGO:-cargo} bench --locked --no-run --bench hot_paths 2>&1 |
	sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
test -x "$program" || { echo "benches/hot_paths.rs can't be built" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Callgrind counts each byte of `rep movsb`, which glibc uses for long copies if the processor is
# good at it: the figures would depend on the processor and on how buffers are aligned.
export GLIBC_TUNABLES=glibc.cpu.x86_rep_movsb_threshold=0x1000000

# count FUNCTION TIMES WHAT
count() {
	valgrind --tool=callgrind --callgrind-out-file="$work/$1" \
		--toggle-collect="hot_paths::$1" "$program" "$1" "$2" 2>"$work/log" ||
		{ cat "$work/log" >&2; exit 1; }
	instructions=$(sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$work/log")
	test "${instructions:-0}" -gt 0 || { cat "$work/log" >&2; exit 1; }
	printf '%7d instructions  %s\n' "$((instructions / $2))" "$3" | tee -a "$work/counted"
}

count warm_reads 20000 'a 4 KiB read from the cache, 32 at a time'
count warm_reads_tls 20000 'a 4 KiB read from the cache, 32 at a time, over TLS 1.3'
count cold_blocks 200 'a block of 64 KiB that is read, checked and decoded (Zstandard)'

test "${1-}" = --check || exit 0
while read -r instructions _ what; do
	recorded=$(sed -n "s/^ *\([0-9]*\) instructions  $what\$/\1/p" benches/costs.txt)
	if test "$((instructions * 100))" -gt "$((${recorded:-0} * 105))"; then
		echo "$instructions instead of ${recorded:-no} instructions: $what;" \
			"if that has a good reason, record it in benches/costs.txt" >&2
		failed=1
	fi
done <"$work/counted"
test -z "${failed-}"
