#!/bin/sh
# Builds the gateway's packages and their fuzz targets with what libFuzzer needs to see which code an input
# has reached. Everything else is built as always, so that it needn't be built twice.
#
# cargo calls this (build.rustc-wrapper) with the compiler and its arguments.
set -eu
case "${CARGO_PKG_NAME:-}" in
hexz-nbd-fuzz | hexz-reader | nbd-gateway | nbd-server | object-reader)
	exec "$@" --cfg fuzzing -C passes=sancov-module \
		-C llvm-args=-sanitizer-coverage-level=4 \
		-C llvm-args=-sanitizer-coverage-inline-8bit-counters \
		-C llvm-args=-sanitizer-coverage-pc-table \
		-C llvm-args=-sanitizer-coverage-trace-compares
	;;
*)
	exec "$@"
	;;
esac
