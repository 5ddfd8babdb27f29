//! draft
pub mod cache;
pub mod config;
pub mod exports;
pub mod gateway;
mod limited;
pub mod nbd;
pub mod snapshot;
pub mod storage;
