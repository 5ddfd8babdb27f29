//! Fuzzes responses of object stores.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hexz_nbd_fuzz::responses::check(data));
