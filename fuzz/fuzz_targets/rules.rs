//! Fuzzes who may open what.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hexz_nbd_fuzz::rules::check(data));
