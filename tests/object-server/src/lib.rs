//! A scripted object store for tests and benchmarks.
//!
//! [`ObjectServer`] serves objects over HTTP or HTTPS on a loopback port, both as a plain web
//! server (`/folder/key`) and as S3 in path style (`/bucket/key`, `?list-type=2`). It behaves
//! correctly until a [`Script`] says otherwise: a [`Behavior`] describes how one response deviates
//! (late, throttled, truncated, forged, …), and a [`Rule`] which requests it applies to. Every
//! request is recorded in a [`RequestLog`].
//!
//! [`CredentialServer`] imitates the endpoints from which clients in a cloud obtain credentials,
//! and [`DelayProxy`] puts a network's latency and bandwidth between a client and any server.
//!
//! All servers run on a runtime of their own, so that they can be used with and without one. They
//! stop when they are dropped.
//!
//! ```
//! use object_server::{Behavior, ObjectServer, Rule, Script};
//!
//! # fn main() -> std::io::Result<()> {
//! let server = ObjectServer::builder().start()?;
//! server.put("golden/web.hxz", vec![7; 1 << 20]);
//! // Every second range of it is throttled.
//! let throttled = Behavior::status(503).retry_after(1);
//! server.set_script(Script::new().rule(Rule::new(throttled).path("web.hxz").percent(50)));
//! println!("{}", server.url("golden/web.hxz"));
//! // … run a client …
//! assert_eq!(server.log().totals().requests, 0);
//! # Ok(())
//! # }
//! ```

mod answer;
mod body;
mod credential_server;
mod credentials;
mod encoding;
mod frontend;
mod listener;
mod listing;
mod log;
mod object;
mod object_answer;
mod proxy;
mod range;
mod rule;
mod script;
mod server;
mod signature;
mod tls;

pub use credential_server::CredentialServer;
pub use credentials::{Credentials, Issuer};
pub use listener::listen;
pub use log::{LoggedRequest, RequestLog, Totals};
pub use proxy::{DelayProxy, Link};
pub use rule::Rule;
pub use script::{Behavior, ETag, Script};
pub use server::{Builder, Index, ObjectServer};
