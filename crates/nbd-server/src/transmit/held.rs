//! A request that is delayed by the rate limit.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use crate::Throttle;
use crate::wire::request::Request;

/// A request that waits in the throttle's queue.
pub(super) struct Held {
    request: Request,
    arrived: Instant,
    turn: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Held {
    /// Enqueues a request that asks for `bytes` bytes.
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

/// Waits until the held request is admitted, takes it, and returns it with its time of arrival.
/// Never completes if no request is held.
///
/// Cancel safe: the request keeps its position in the queue.
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
