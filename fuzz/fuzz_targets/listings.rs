//! Fuzzes listings of folders.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hexz_nbd_fuzz::listings::check(data));
