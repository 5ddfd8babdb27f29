//! The archive: its header, parents and tree file.

use std::path::Path;
use std::sync::Arc;

use hexz_reader::{DigestTree, parent_names, tree_path};
use object_reader::{ByteRange, Response, StoreErrorKind};

use super::super::report::{Report, Step, escape_and_cut};
use super::{Session, advice};

/// Length of a group of a tree file, in bytes.
const GROUP_LEN: u64 = 256 * 1024;
/// Maximum size of a tree file that is read, in bytes: that of an archive of 64 GiB.
const MAX_TREE: u64 = 8 * 1024 * 1024;
/// Maximum number of parents that are searched for.
const MAX_PARENTS: usize = 16;

pub(super) async fn examine(
    session: &Session,
    object: &Response,
    report: &mut Report,
) -> Result<(), Step> {
    let names = parent_names(&object.bytes, object.version.length)
        .map_err(|kind| advice::not_an_archive(&kind, &object.bytes))?;
    report.add(advice::header(names.len()));
    if !names.is_empty() {
        report.add(parents(session, &names).await);
    }
    report.add(tree(session, object).await);
    Ok(())
}

/// Looks for the parents beside the archive, under their file names.
async fn parents(session: &Session, names: &[String]) -> Step {
    let mut found = Vec::new();
    for name in names.iter().take(MAX_PARENTS) {
        let file = Path::new(name).file_name().and_then(|file| file.to_str());
        let url = file.and_then(|file| session.url.with_name(file).ok());
        let problem = match url {
            None => Some("not a file name".to_owned()),
            Some(url) => {
                let read = session.get(url.key(), ByteRange::Bounded(0..1), None).await;
                read.result.err().map(|error| escape_and_cut(&error.message))
            }
        };
        found.push((escape_and_cut(file.unwrap_or(name)), problem));
    }
    advice::parents(&found, names.len())
}

/// Reads the tree file beside the archive, and checks it against the beginning of the archive.
async fn tree(session: &Session, object: &Response) -> Step {
    let length = object.version.length;
    if length <= GROUP_LEN {
        return Step::good("tree file", "none is needed for so small an archive");
    }
    let path = tree_path(Path::new(session.url.key()));
    let key = path.to_string_lossy();
    let expected = 16 + 32 * length.div_ceil(GROUP_LEN);
    let read = session.get(&key, ByteRange::Bounded(0..expected.min(MAX_TREE)), None).await;
    let file = match read.result {
        Ok(file) => file,
        Err(error) => {
            // S3 reports missing objects as forbidden to those who may not list.
            let is_absent = matches!(error.kind, StoreErrorKind::NotFound | StoreErrorKind::Denied);
            return advice::no_tree(&error, is_absent);
        }
    };
    if file.version.length != expected {
        return advice::wrong_tree(&format!(
            "it has {} bytes instead of {expected}",
            file.version.length
        ));
    }
    if expected > MAX_TREE {
        return Step::good("tree file", format!("{expected} bytes, as long as expected"));
    }
    let bytes: Arc<[u8]> = Arc::from(&*file.bytes);
    match DigestTree::read(&bytes, length) {
        Ok(Some(tree)) if tree.matches(0, &object.bytes) => {
            let digest = tree.digest().to_string();
            Step::good("tree file", format!("{expected} bytes, for the BLAKE3 {digest}"))
                .detail("blake3", digest)
                .took(read.took)
        }
        Ok(Some(_)) => advice::wrong_tree("the archive's first 256 KiB have another hash"),
        _ => advice::wrong_tree("it isn't that of an archive of this length"),
    }
}
