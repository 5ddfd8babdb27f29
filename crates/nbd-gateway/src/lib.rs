//! The network front end: listens, admits and authenticates clients, hands them to the NBD engine,
//! and shuts down gracefully.

mod accept;
pub mod access;
mod admission;
pub mod audit;
pub mod config;
mod control;
mod gateway;
pub mod inherited;
pub mod listen;
mod observer;
mod outcome;
mod policy;
pub mod proxy;
mod registry;
mod reloads;
mod report;
mod route;
mod session;
mod stats;
pub mod stdio;
pub mod tls;
mod unix;
mod vsock;
pub mod zone;

pub use control::Control;
pub use gateway::{AcceptLoopFailed, Gateway};
pub use nbd_telemetry::Counts;
pub use policy::Policy;
pub use report::{
    ConnectionCounts, ConnectionReport, DurationHistogram, ExportReport, FAILURES, GatewayReport,
    MAX_LISTED, REFUSALS, ReloadsReport, TlsReport, unix_seconds,
};
