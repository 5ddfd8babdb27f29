use super::*;

/// Computes what is readable in a file system that has the paths in `there`. Folders end with a
/// slash, block devices with an exclamation mark, pipes with a bar; links have an arrow. All
/// parents of these paths are folders.
fn readable(there: &[&str], plan: &SandboxPlan) -> AllowedPaths {
    let look = |path: &Path| {
        let path = path.to_str().unwrap();
        for entry in there {
            match entry.split_once(" -> ") {
                Some((link, target)) if link == path => return FileKind::Link(target.into()),
                None if entry.trim_end_matches('/') == path && entry.ends_with('/') => {
                    return FileKind::Folder;
                }
                None if *entry == path => return FileKind::File,
                None if *entry == format!("{path}!") => return FileKind::Device,
                None if *entry == format!("{path}|") => return FileKind::Other,
                _ => {}
            }
        }
        let above = format!("{}/", path.trim_end_matches('/'));
        let is_above = there.iter().any(|entry| entry.starts_with(&above));
        if is_above { FileKind::Folder } else { FileKind::Nothing }
    };
    AllowedPaths::with(plan, Path::new("/home/me"), look)
}

fn of_files(there: &[&str], files: &[&str]) -> (Vec<String>, Vec<String>, usize) {
    let files = files.iter().map(PathBuf::from).collect();
    listed(readable(there, &SandboxPlan { files, ..SandboxPlan::default() }))
}

fn of_folders(there: &[&str], folders: &[&str]) -> (Vec<String>, Vec<String>, usize) {
    let folders = folders.iter().map(PathBuf::from).collect();
    listed(readable(there, &SandboxPlan { folders, ..SandboxPlan::default() }))
}

fn listed(readable: AllowedPaths) -> (Vec<String>, Vec<String>, usize) {
    let list =
        |set: BTreeSet<PathBuf>| set.iter().map(|path| path.to_str().unwrap().to_owned()).collect();
    (list(readable.folders), list(readable.files), readable.notes.len())
}

fn folders(paths: &[&str]) -> (Vec<String>, Vec<String>, usize) {
    (paths.iter().map(ToString::to_string).collect(), vec![], 0)
}

#[test]
fn file_makes_its_folder_readable() {
    assert_eq!(of_files(&["/s/a.hxz", "/s/b.hxz"], &["/s/a.hxz", "/s/b.hxz"]), folders(&["/s"]));
    assert_eq!(of_files(&["/home/me/x/a.hxz"], &["x/a.hxz"]), folders(&["/home/me/x"]));
    assert_eq!(of_files(&["/home/a.hxz", "/home/me/"], &["../a.hxz"]), folders(&["/home"]));
    // The file may be created later.
    assert_eq!(of_files(&["/s/"], &["/s/a.hxz"]), folders(&["/s"]));
    // A path may end with a `..` behind a folder or a link to one.
    assert_eq!(of_folders(&["/s/t/u/"], &["/s/t/u/.."]), folders(&["/s/t"]));
    assert_eq!(of_folders(&["/l -> /s/t", "/s/t/"], &["/l/.."]), folders(&["/s"]));
    // A folder below another one isn't listed.
    assert_eq!(of_files(&["/s/a.hxz", "/s/t/b"], &["/s/a.hxz", "/s/t/b"]), folders(&["/s"]));
}

#[test]
fn folders_of_switchable_links_stay_readable() {
    let there = ["/s/a.hxz -> ../t/b.hxz", "/t/b.hxz -> /u/c.hxz", "/u/c.hxz"];
    assert_eq!(of_files(&there, &["/s/a.hxz"]), folders(&["/s", "/t", "/u"]));
    // Kubernetes mounts secrets this way.
    let there = ["/k/tls.crt -> ..data/tls.crt", "/k/..data -> ..7", "/k/..7/tls.crt"];
    assert_eq!(of_files(&there, &["/k/tls.crt"]), folders(&["/k"]));
    // A parent link that leads elsewhere doesn't make its own folder readable.
    let there = ["/var/run -> /run", "/run/pw/key"];
    assert_eq!(of_files(&there, &["/var/run/pw/key"]), folders(&["/run/pw"]));
    let there = ["/s/current -> v1", "/s/v1/a.hxz"];
    assert_eq!(of_files(&there, &["/s/current/a.hxz"]), folders(&["/s"]));
    assert_eq!(of_folders(&there, &["/s/current"]), folders(&["/s"]));
    let there = ["/s/current -> /mnt/v1", "/mnt/v1/a.hxz"];
    assert_eq!(of_folders(&there, &["/s/current"]), folders(&["/mnt/v1"]));
    // A cycle of links ends.
    assert_eq!(of_files(&["/s/a -> b", "/s/b -> a"], &["/s/a"]).0, ["/s"]);
}

#[test]
fn device_and_root_folders_are_not_made_readable() {
    let there = ["/dev/vg/snap -> ../dm-3", "/dev/dm-3!"];
    assert_eq!(of_files(&there, &["/dev/vg/snap"]), (vec![], vec!["/dev/dm-3".into()], 0));
    assert_eq!(of_files(&["/a.hxz"], &["/a.hxz"]), (vec![], vec!["/a.hxz".into()], 1));
    let there = ["/a.hxz -> s/a.hxz", "/s/a.hxz"];
    assert_eq!(of_files(&there, &["/a.hxz"]), folders(&["/s"]));
    // The root folder is readable if it is named explicitly.
    assert_eq!(of_folders(&["/s/"], &["/"]), folders(&["/"]));
    assert_eq!(of_folders(&["/s/"], &["/none"]), (vec![], vec![], 1));
}

#[test]
fn anywhere_makes_the_root_folder_readable() {
    let plan = SandboxPlan {
        anywhere: true,
        files: vec!["/s/a".into(), "/b".into()],
        ..SandboxPlan::default()
    };
    let readable = readable(&["/s/a", "/b"], &plan);
    assert!(readable.to_string().starts_with("everywhere"));
    assert_eq!(listed(readable).0, ["/"]);
}

#[test]
fn folders_of_appended_files_allow_creation() {
    let plan = |paths: &[&str]| SandboxPlan {
        appended: paths.iter().map(PathBuf::from).collect(),
        folders: vec!["/srv/s".into()],
        ..SandboxPlan::default()
    };
    let there = ["/var/log -> /mnt/log", "/mnt/log/h/", "/srv/s/", "/p|", "/dev/x|"];
    let appends = |paths: &[&str]| {
        let readable = readable(&there, &plan(paths));
        (readable.describe_appendable(), readable.notes.len())
    };
    assert_eq!(appends(&["/var/log/h/a"]), (", appends to /mnt/log/h/".to_owned(), 0));
    assert_eq!(appends(&["/dev/x", "/p"]), (", appends to /dev/x, /p".to_owned(), 0));
    assert_eq!(appends(&["/a"]), (", appends to /a".to_owned(), 1));
    // In or above a folder that is served.
    for path in ["/srv/s/a", "/srv/a"] {
        assert_eq!(appends(&[path]).1, 1, "{path}");
    }
    assert_eq!(appends(&[]), (String::new(), 0));
}

#[test]
fn new_paths_outside_the_sandbox_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["in", "out"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    std::os::unix::fs::symlink("../out/a", path("in/link")).unwrap();
    let plan = |files: &[&str], folders: &[&str]| SandboxPlan {
        files: files.iter().map(|name| path(name)).collect(),
        folders: folders.iter().map(|name| path(name)).collect(),
        ..SandboxPlan::default()
    };
    // Paths named at the start aren't new, even if they couldn't be read.
    let start = plan(&["in/a"], &["none"]);
    let confines = ReadableSet::new(&start, &AllowedPaths::for_plan(&start));
    let closed = |files: &[&str], folders: &[&str]| confines.unreadable(&plan(files, folders));
    assert!(closed(&["in/a", "in/b", "in/../in/c/d"], &["in", "none"]).is_empty());
    let elsewhere = closed(&["in/b", "out/a", "in/link", "in/../x"], &["out", "."]);
    assert_eq!(elsewhere, ["out/a", "in/link", "in/../x", "out", "."].map(path));
    let anywhere = SandboxPlan { anywhere: true, ..SandboxPlan::default() };
    assert_eq!(confines.unreadable(&anywhere), [Path::new("/")]);
    assert!(ReadableSet::default().unreadable(&anywhere).is_empty());
}

#[test]
fn socket_folders_allow_removal() {
    let plan = SandboxPlan {
        sockets: vec!["/var/run/x/s".into(), "/s".into(), "t".into()],
        ..SandboxPlan::default()
    };
    let readable = readable(&["/var/run -> /run", "/run/x/", "/home/me/"], &plan);
    let removable: Vec<PathBuf> = vec!["/home/me".into(), "/run/x".into()];
    assert!(readable.removable.iter().eq(&removable));
    assert_eq!((readable.to_string().as_str(), readable.notes.len()), ("no file", 1));
}
