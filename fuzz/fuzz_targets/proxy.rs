//! Fuzzes the header that a load balancer sends.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hexz_nbd_fuzz::proxy::check(data));
