//! Fuzzes references to parents.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hexz_nbd_fuzz::references::check(data));
