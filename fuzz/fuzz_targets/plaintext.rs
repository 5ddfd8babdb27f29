//! Fuzzes the greeting and the leg in clear.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hexz_nbd_fuzz::plaintext::check(data));
