//! Archives whose only size is that of their index.

use std::fs::{File, rename};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Result;

/// Index pages of an archive of 1 TiB.
pub(super) const PAGES: u64 = 4096;

/// Blocks on a page, as the format has it, and the length of each in bytes.
const BLOCKS: u64 = 4096;
const BLOCK: u32 = 64 * 1024;

const HEADER_REGION: u64 = 4096;
const PAGE: u64 = 8 + 52 * BLOCKS;

/// The length of the stream in an archive of so many pages, in bytes.
pub(super) fn size(pages: u64) -> u64 {
    pages * BLOCKS * u64::from(BLOCK)
}

/// Writes an archive of so many pages. All its blocks share one stored copy, and of its
/// pages only the first is written: nobody reads the others. They have their places all the
/// same, which are holes in a sparse file.
pub(super) fn write(path: &Path, pages: u64) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    let file = File::create(&unfinished)?;
    let block: Vec<u8> = (0..BLOCK).map(|at| (at / 7 % 251) as u8).collect();
    let stored = zstd::bulk::compress(&block, 3)?;
    let first_page = HEADER_REGION + stored.len() as u64;
    let index = first_page + pages * PAGE;
    file.write_all_at(&header(index), 0)?;
    file.write_all_at(&stored, HEADER_REGION)?;
    file.write_all_at(&page(&block, &stored), first_page)?;
    file.write_all_at(&master_index(first_page, pages), index)?;
    rename(unfinished, path)?;
    Ok(())
}

fn header(index: u64) -> Vec<u8> {
    let mut header = b"HEXZ".to_vec();
    header.extend(1_u32.to_le_bytes());
    header.extend(BLOCK.to_le_bytes());
    header.extend(index.to_le_bytes());
    // No parents, no dictionary, no metadata, no signature, no encryption.
    header.extend(0_u64.to_le_bytes());
    header.extend([0; 7]);
    const ZSTANDARD: u32 = 1;
    header.extend(ZSTANDARD.to_le_bytes());
    // A main stream alone, of blocks of one length.
    header.extend([1, 0, 0]);
    header.push(0);
    header
}

/// A page whose blocks are all the same.
fn page(block: &[u8], stored: &[u8]) -> Vec<u8> {
    let mut entry = HEADER_REGION.to_le_bytes().to_vec();
    entry.extend((stored.len() as u32).to_le_bytes());
    entry.extend(BLOCK.to_le_bytes());
    entry.extend(crc32fast::hash(stored).to_le_bytes());
    entry.extend(blake3::hash(block).as_bytes());
    let mut page = BLOCKS.to_le_bytes().to_vec();
    page.extend(entry.repeat(BLOCKS as usize));
    page
}

fn master_index(first_page: u64, pages: u64) -> Vec<u8> {
    let mut index = pages.to_le_bytes().to_vec();
    for page in 0..pages {
        index.extend((first_page + page * PAGE).to_le_bytes());
        index.extend((PAGE as u32).to_le_bytes());
        index.extend((page * BLOCKS).to_le_bytes());
        index.extend(size(page).to_le_bytes());
    }
    // Pages of the auxiliary stream, and the two streams' sizes.
    index.extend(0_u64.to_le_bytes());
    index.extend(size(pages).to_le_bytes());
    index.extend(0_u64.to_le_bytes());
    index
}
