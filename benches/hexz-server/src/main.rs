//! `hexz-peer`: the peer that the gateway's benchmarks compare it with.
//!
//! Hexz brings an NBD server of its own, `hexz_server::serve_nbd`, but 0.8.2's command line
//! has no way to reach it. This is a thin runner around Hexz's own crates that does: it packs
//! an image as `hexz pack` would, serves the archive as `hexz serve` would if it spoke NBD,
//! and adds nothing to either. It is a workspace of its own so that the many dependencies of
//! those crates stay out of the gateway's.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use hexz_core::Archive;
use hexz_ops::pack::{PackAnalysisFlags, PackConfig, PackTransformFlags, pack_archive};
use hexz_store::local::MmapBackend;
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str = "\
usage: hexz-peer pack IMAGE ARCHIVE   pack a raw disk image
       hexz-peer serve ARCHIVE PORT   serve an archive over NBD on 127.0.0.1
       hexz-peer version              print the version of Hexz";

fn main() -> ExitCode {
    hexz_common::logging::init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ended = match args.as_slice() {
        ["pack", image, archive] => pack(Path::new(image), Path::new(archive)),
        ["serve", archive, port] => serve(Path::new(archive), port),
        ["version"] => {
            println!("hexz-server {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hexz-peer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Packs as `hexz pack IMAGE ARCHIVE --compression zstd` does.
///
/// The defaults are those of hexz-cli 0.8.2, `Commands::Pack` in its src/args.rs and
/// src/main.rs and `run` in src/cmd/data/pack.rs. What they leave to hexz-ops comes from its
/// src/pack.rs: without sizes of its own asked for, and without `--dcam` to derive them from
/// the image, FastCDC cuts chunks of at least 16 KiB, 64 KiB on average and at most 256 KiB
/// (`CDC_DEFAULT_MIN`, `_AVG` and `_MAX`). Equal chunks are stored once.
///
/// The one option that isn't a default is zstd, which would be lz4. No option sets a level:
/// hexz-core's `create_compressor_from_str` takes hexz-common's `DEFAULT_ZSTD_LEVEL`, 3.
fn pack(image: &Path, archive: &Path) -> anyhow::Result<()> {
    let config = PackConfig {
        input: image.to_path_buf(),
        base: None,
        output: archive.to_path_buf(),
        compression: "zstd".to_owned(),
        password: None,
        // Goes into the header; the chunks are cut by content whatever it says.
        block_size: 65536,
        min_chunk: None,
        avg_chunk: None,
        max_chunk: None,
        // One for each core.
        num_workers: 0,
        transform: PackTransformFlags { encrypt: false, train_dict: false, parallel: true },
        // The progress bar is all that differs from the command line.
        analysis: PackAnalysisFlags { show_progress: false, use_dcam: false, dcam_optimal: false },
    };
    pack_archive(&config, None::<&fn(u64, u64)>).with_context(|| format!("{}", image.display()))
}

/// Serves as `run` in hexz-cli 0.8.2's src/cmd/sys/serve.rs does when its `nbd` is true,
/// which its main.rs never passes: the archive mapped into memory, tokio's default number of
/// threads, and neither a cache size nor a prefetch window asked for. That leaves hexz-core's
/// cache of 1000 chunks (`DEFAULT_L1_CAPACITY`), which prefetching alone ever fills, so each
/// read decompresses every chunk that it touches. SIGTERM ends it without an error.
fn serve(archive: &Path, port: &str) -> anyhow::Result<()> {
    let port: u16 = port.parse().with_context(|| format!("port {port}"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate())?;
        let backend =
            MmapBackend::new(archive).with_context(|| format!("{}", archive.display()))?;
        let snapshot = Archive::open(Arc::new(backend), None)?;
        tokio::select! {
            ended = hexz_server::serve_nbd(snapshot, port, "127.0.0.1") => ended,
            _ = terminated.recv() => Ok(()),
        }
    })
}
