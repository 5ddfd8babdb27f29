//! Fuzzes who may connect.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hexz_nbd_fuzz::addresses::check(data));
