//! The audit log: a [`Recorder`] that takes events and writes them to a [`Target`], one JSON object
//! a line, from its own thread.

#[cfg(test)]
mod documented;
mod line;
mod queue;
mod recorder;
mod target;

pub(crate) use recorder::{Recorder, StartError};
pub(crate) use target::{Target, TargetError};
