//! A request that has come too soon.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use crate::nbd::Throttle;
use crate::nbd::wire::request::Request;

/// A request that stands in the throttle's queue.
pub(super) struct Held {
    request: Request,
    arrived: Instant,
    turn: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Held {
    /// Holds back a request that asks for so many bytes.
    pub(super) fn new(
        request: Request,
        bytes: u32,
        throttle: &Arc<Throttle>,
        arrived: Instant,
    ) -> Self {
        let throttle = Arc::clone(throttle);
        Self { request, arrived, turn: Box::pin(async move { throttle.pass(bytes).await }) }
    }
}

/// Takes the request that is held back when its turn has come, and says when it came; if there
/// is none, its turn never comes.
///
/// Cancel safe: it keeps its place in the queue.
pub(super) async fn next(held: &mut Option<Held>) -> (Request, Instant) {
    match held {
        Some(Held { turn, request, arrived }) => {
            turn.await;
            let taken = (*request, *arrived);
            *held = None;
            taken
        }
        None => pending().await,
    }
}
