//! A request that is delayed by the rate limit.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use crate::Throttle;
use crate::wire::request::Request;

/// A request that waits in the throttle's queue.
pub(super) struct ThrottledRequest {
    request: Request,
    arrived: Instant,
    admission: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl ThrottledRequest {
    /// Enqueues a request that asks for `bytes` bytes.
    pub(super) fn new(
        request: Request,
        bytes: u32,
        throttle: &Arc<Throttle>,
        arrived: Instant,
    ) -> Self {
        let throttle = Arc::clone(throttle);
        Self { request, arrived, admission: Box::pin(async move { throttle.acquire(bytes).await }) }
    }
}

/// Waits until the throttled request is admitted, takes it, and returns it with its time of
/// arrival. Never completes if no request is throttled.
///
/// Cancel safe: the request keeps its position in the queue.
pub(super) async fn admitted(throttled: &mut Option<ThrottledRequest>) -> (Request, Instant) {
    match throttled {
        Some(ThrottledRequest { admission, request, arrived }) => {
            admission.await;
            let taken = (*request, *arrived);
            *throttled = None;
            taken
        }
        None => pending().await,
    }
}
