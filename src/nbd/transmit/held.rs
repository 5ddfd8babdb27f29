//! A request that has come too soon.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;

use crate::nbd::Throttle;
use crate::nbd::wire::request::Request;

/// A request that stands in the throttle's queue.
pub(super) struct Held {
    request: Request,
    turn: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Held {
    /// Holds back a request that asks for so many bytes.
    pub(super) fn new(request: Request, bytes: u32, throttle: &Arc<Throttle>) -> Self {
        let throttle = Arc::clone(throttle);
        Self { request, turn: Box::pin(async move { throttle.pass(bytes).await }) }
    }

    /// Leaves the queue.
    pub(super) fn into_request(self) -> Request {
        self.request
    }
}

/// Takes the request that is held back when its turn has come; if there is none, it never
/// does.
///
/// Cancel safe: it keeps its place in the queue.
pub(super) async fn next(held: &mut Option<Held>) -> Request {
    match held {
        Some(Held { turn, request }) => {
            turn.await;
            let request = *request;
            *held = None;
            request
        }
        None => pending().await,
    }
}
