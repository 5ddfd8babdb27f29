//! Tests of the engine over in-process streams.

mod handle_client;
