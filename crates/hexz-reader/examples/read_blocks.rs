//! Lists the blocks at the beginning of a snapshot, and how each reads.
//!
//!     cargo run -p hexz-reader --example read_blocks -- tests/archives/grandchild-zstd.hxz
//!
//! The password of an encrypted one comes from the environment variable HEXZ_PASSWORD.

use std::error::Error;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use hexz_reader::{OpenOptions, Password, Snapshot, StreamKind};

const SHOWN: usize = 40;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("which archive?")?;
    let password = std::env::var_os("HEXZ_PASSWORD");
    let options = OpenOptions {
        password: password.map(|value| Password::new(value.into_vec()).into()),
        raw: true,
        ..OpenOptions::default()
    };
    let snapshot = Snapshot::open(Path::new(&path), &options)?;
    for parent in snapshot.parents() {
        println!("thin over {}", parent.display());
    }

    let size = snapshot.size(StreamKind::Main);
    println!("{size} bytes; the first blocks:");
    let mut at = 0;
    for _ in 0..SHOWN {
        if at >= size {
            break;
        }
        let block = snapshot.locate(StreamKind::Main, at)?;
        let kind = match block.stored_offset() {
            _ if block.is_zeros() => "zeros".to_owned(),
            Some(offset) => format!("stored at byte {offset}"),
            None => "in a parent".to_owned(),
        };
        // Reading checks everything that the format can check.
        let bytes = snapshot.read_block(&block)?;
        let first: String = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        println!("{at:>12} {:>8} bytes, {kind}, begins with {first}", block.length());
        at = block.end();
    }
    Ok(())
}
