//! Fuzzes tree files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hexz_nbd_fuzz::trees::check(data));
