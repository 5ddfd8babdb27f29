//! Parents of which a part can't be read.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hexz_reader::{ErrorKind, Layout, OpenOptions, Snapshot, StreamKind, VerifyProgress};

use crate::archive_writer::{ArchiveWriter, Piece, Written, block_entry, page_entry, text};
use crate::support::read;

const BLOCK: usize = 1000;

fn block(number: u64) -> Vec<u8> {
    text(number, BLOCK)
}

/// Pages of one block each: 0, 1, 2, 3, 4.
fn parent() -> Written {
    let main = (0..5).map(|number| Piece::Data(block(number))).collect();
    ArchiveWriter { main, blocks_per_page: 1, ..ArchiveWriter::default() }.write()
}

fn damage(archive: &mut Written, page: usize) {
    let entry = archive.main[page].blocks[0].entry;
    archive.put(entry + block_entry::LENGTH, &0_u32.to_le_bytes());
}

/// A child of parents with these blocks in this order.
fn child(folder: &Path, parents: &[&str], blocks: &[u64]) -> Snapshot {
    let child = ArchiveWriter {
        parents: parents.iter().map(|&name| name.to_owned()).collect(),
        main: blocks.iter().map(|&number| Piece::InParent(block(number))).collect(),
        ..ArchiveWriter::default()
    };
    let path = folder.join("child.hxz");
    child.write().save(&path);
    Snapshot::open(&path, &OpenOptions::default()).unwrap()
}

fn read_block(snapshot: &Snapshot, position: u64) -> Result<Vec<u8>, ErrorKind> {
    let at = position * BLOCK as u64;
    read(snapshot, StreamKind::Main, at, BLOCK).map_err(|error| error.kind)
}

/// Making the index of all hashes failed with the first page that was damaged, and with it
/// each block that had to be looked up.
#[test]
fn a_damaged_page_of_a_parent_hides_its_own_blocks_alone() {
    let folder = tempfile::tempdir().unwrap();
    for damaged in 0..5 {
        let mut parent = parent();
        damage(&mut parent, damaged);
        parent.save(&folder.path().join("parent.hxz"));
        // None is where the parent has it, and each place is once that of the damaged page.
        let order = [1, 2, 3, 4, 0];
        let snapshot = child(folder.path(), &["parent.hxz"], &order);
        for (position, &number) in order.iter().enumerate() {
            let outcome = read_block(&snapshot, position as u64);
            if number as usize == damaged {
                assert!(outcome.is_err(), "{damaged} {position}");
            } else {
                assert!(outcome.unwrap() == block(number), "{damaged} {position}");
            }
        }
    }
}

/// The block at the same place can be had from another parent.
#[test]
fn a_damaged_page_does_not_hide_another_parents_block() {
    let folder = tempfile::tempdir().unwrap();
    let mut broken = parent();
    damage(&mut broken, 2);
    broken.save(&folder.path().join("broken.hxz"));
    parent().save(&folder.path().join("sound.hxz"));
    let snapshot = child(folder.path(), &["broken.hxz", "sound.hxz"], &[0, 1, 2, 3, 4]);
    for number in 0..5 {
        assert!(read_block(&snapshot, number).unwrap() == block(number));
    }
}

/// When the block isn't found, the damage is the better reason to give.
#[test]
fn the_damage_is_named_when_it_hides_a_block() {
    let folder = tempfile::tempdir().unwrap();
    let mut broken = parent();
    damage(&mut broken, 2);
    broken.save(&folder.path().join("parent.hxz"));
    let snapshot = child(folder.path(), &["parent.hxz"], &[0, 1, 2, 3]);
    assert!(matches!(read_block(&snapshot, 2), Err(ErrorKind::Invalid(_))));
    assert!(read_block(&snapshot, 3).unwrap() == block(3));
    // Nothing at the place of this one is damaged.
    let snapshot = child(folder.path(), &["parent.hxz"], &[9, 1]);
    assert!(matches!(read_block(&snapshot, 0), Err(ErrorKind::Unresolvable { .. })));
}

/// It was made again, from all pages of all parents, for each block that was not found.
#[test]
fn the_index_of_hashes_is_made_once() {
    use std::fmt::Debug;
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber};

    /// Counts what is logged as an error: making the index says once what can't be found.
    #[derive(Debug, Default)]
    struct Errors(AtomicUsize);

    impl Subscriber for &'static Errors {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            *metadata.level() == tracing::Level::ERROR
        }
        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn event(&self, _: &Event<'_>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn enter(&self, _: &Id) {}
        fn exit(&self, _: &Id) {}
    }

    let folder = tempfile::tempdir().unwrap();
    let mut broken = parent();
    damage(&mut broken, 4);
    broken.save(&folder.path().join("parent.hxz"));
    // Such lines are limited for the whole process, in which other tests cause many at times.
    for _ in 0..20 {
        let snapshot = Arc::new(child(folder.path(), &["parent.hxz"], &[10, 11, 12, 13]));
        let errors: &'static Errors = Box::leak(Box::default());
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    tracing::subscriber::with_default(errors, || {
                        for _ in 0..3 {
                            for position in 0..4 {
                                assert!(read_block(&snapshot, position).is_err());
                            }
                        }
                    });
                });
            }
        });
        match errors.0.load(Ordering::Relaxed) {
            0 => std::thread::sleep(std::time::Duration::from_millis(200)),
            said => return assert_eq!(said, 1),
        }
    }
    panic!("it never says what can't be found");
}

/// The child refers to the parent's bytes by offset.
#[test]
fn a_fault_of_the_child_ends_where_that_of_the_parent_does() {
    let bytes: Vec<u8> = (0..3).flat_map(block).collect();
    let faults = |change: fn(&mut Written)| {
        let folder = tempfile::tempdir().unwrap();
        let main = bytes.chunks(BLOCK).map(|chunk| Piece::Data(chunk.to_vec())).collect();
        let mut parent = ArchiveWriter {
            layout: Layout::C,
            main,
            blocks_per_page: 1,
            ..ArchiveWriter::default()
        }
        .write();
        change(&mut parent);
        parent.save(&folder.path().join("parent.hxz"));
        let child = ArchiveWriter {
            layout: Layout::C,
            parents: vec!["parent.hxz".to_owned()],
            main: vec![Piece::ByOffset { bytes: bytes.clone(), hash: [0; 32] }],
            ..ArchiveWriter::default()
        };
        let path = folder.path().join("child.hxz");
        child.write().save(&path);
        let snapshot = Snapshot::open(&path, &OpenOptions::default()).unwrap();
        let mut ranges = Vec::new();
        snapshot.verify(NonZeroUsize::MIN, &VerifyProgress::default(), |fault| {
            ranges.push((fault.error.kind.label(), fault.blocks, fault.ranges));
        });
        ranges
    };
    assert_eq!(faults(|_| ()), []);
    for (change, label, range) in [
        ((|parent| damage(parent, 0)) as fn(&mut Written), "invalid", 0..1000),
        (|parent| damage(parent, 1), "invalid", 1000..2000),
        (|parent| damage(parent, 2), "invalid", 2000..3000),
        // No block covers the first bytes.
        (
            |parent| {
                for (page, start) in (0..3).map(|page| (page, page as u64 * 1000 + 10)) {
                    let entry = parent.main[page].entry + page_entry::START_LOGICAL;
                    parent.put(entry, &start.to_le_bytes());
                }
                parent.set("main size", &3010_u64.to_le_bytes());
            },
            "uncovered",
            0..10,
        ),
    ] {
        let found = faults(change);
        assert_eq!(found, [(label, 1, vec![range])]);
    }
}
