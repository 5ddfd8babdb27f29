//! What the fuzz targets check: each feeds a parser of hexz-nbd with bytes and compares what
//! comes of it with a naive judge, written from the specification and as simple as can be.
//!
//! An archive: [`header`], [`index`], [`blocks`], judged by [`naive`]. A chain of them:
//! [`references`], judged by [`chain`].
//! A connection: [`plaintext`], [`options`], [`requests`], over a [`script`] of what the
//! client sends; exports are [`export`]'s, replies are read by [`replies`].
//! An object store: its [`responses`] and [`listings`]; and [`trees`], the files beside archives.
//! Who may come in: [`proxy`], where a load balancer says who it is, [`addresses`] and [`rules`].
//!
//! A judge that doesn't agree panics, and so ends the run with the input that showed it.
#![allow(missing_docs, reason = "this is no library for anybody else")]

pub mod addresses;
pub mod archive;
pub mod blocks;
pub mod chain;
pub mod export;
pub mod header;
pub mod index;
pub mod listings;
pub mod lz4;
pub mod naive;
pub mod options;
pub mod plaintext;
pub mod proxy;
pub mod references;
pub mod replies;
pub mod requests;
pub mod responses;
pub mod rules;
pub mod script;
pub mod trees;
