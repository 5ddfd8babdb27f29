//! Messages after a `pki` command: the location of the result, and the commands that use it.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nbd_telemetry::escape;

use super::PkiError;
use super::authority::IssuedCertificate;
use super::certificate::CertificateInfo;
use super::folder::{CA_CERTIFICATE, CA_KEY, CaFolder, REVOCATION_LIST};
use super::names::SubjectName;
use super::revocations::Revocations;
use super::show::format_date;

/// Server name in example commands, as long as no server has been issued a certificate.
const EXAMPLE_SERVER: &str = "nbd.example.org";

pub(super) fn ca_created(
    out: &mut impl Write,
    folder: &CaFolder,
    authority: &CertificateInfo,
) -> Result<(), PkiError> {
    let option = dir_option(folder);
    let [certificate, key, list] =
        [CA_CERTIFICATE, CA_KEY, REVOCATION_LIST].map(|name| folder.path(name));
    writeln!(
        out,
        "created the CA {:?}, valid until {}\n\
         \x20   {}: its certificate, for all clients and servers\n\
         \x20   {}: its private key; keep it here, and back it up\n\
         \x20   {}: its revocation list, still empty, for all servers\n\
         next:\n\
         \x20   hexz-nbd pki{option} server nbd.example.org 192.0.2.7\n\
         \x20   hexz-nbd pki{option} client backup.example.org",
        authority.names_for_display(),
        format_date(authority.not_after),
        escape::name(&certificate),
        escape::name(&key),
        escape::name(&list),
    )?;
    Ok(())
}

pub(super) fn server_issued(
    out: &mut impl Write,
    folder: &CaFolder,
    bundle: &Path,
    server: &CertificateInfo,
) -> Result<(), PkiError> {
    issued(out, bundle, server)?;
    let file = |name: &str| shell_quote_path(&absolute(bundle).join(name));
    writeln!(
        out,
        "on the server (adapt the paths if you copy the folder):\n\
         \x20   hexz-nbd --tls-cert {} \\\n\
         \x20       --tls-key {} \\\n\
         \x20       --allow 192.0.2.0/24 snap.hexz\n\
         to require client certificates from this CA, add:\n\
         \x20       --tls-client-ca {} \\\n\
         \x20       --tls-client-crl {}",
        file("server-cert.pem"),
        file("server-key.pem"),
        file(CA_CERTIFICATE),
        shell_quote_path(&absolute(&folder.path(REVOCATION_LIST))),
    )?;
    Ok(())
}

pub(super) fn client_issued(
    out: &mut impl Write,
    bundle: &Path,
    client: &CertificateInfo,
    server: Option<&CertificateInfo>,
) -> Result<(), PkiError> {
    issued(out, bundle, client)?;
    let host = server.and_then(host_of_server).unwrap_or_else(|| EXAMPLE_SERVER.to_owned());
    // An IPv6 address needs brackets, since its colons would be taken for a port.
    let authority = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let folder = absolute(bundle);
    let uri = |host: &str| format!("nbds://{host}/snap.hexz");
    let with_folder =
        shell_quote(&format!("{}?tls-certificates={}", uri(&authority), percent_encode(&folder)));
    let mut credentials = OsString::from("tls-creds-x509,id=tls,endpoint=client,dir=");
    credentials.push(escape_for_qemu(&folder));
    let credentials = shell_quote(&credentials);
    let image =
        shell_quote(&format!("driver=nbd,host={host},port=10809,export=snap.hexz,tls-creds=tls"));
    let file = |name: &str| shell_quote_path(&folder.join(name));
    writeln!(
        out,
        "on the client (adapt the paths if you copy the folder):\n\
         \x20   nbdinfo {with_folder}\n\
         \x20   nbdcopy {with_folder} disk.img\n\
         \x20   qemu-img convert -O qcow2 --object {credentials} \\\n\
         \x20       --image-opts {image} disk.qcow2\n\
         \x20   nbd-client {host} 10809 /dev/nbd0 -N snap.hexz -x -H {host} \\\n\
         \x20       -A {} \\\n\
         \x20       -certfile {} \\\n\
         \x20       -keyfile {}\n\
         nbdfuse reads the files from ~/.pki/libnbd, or as root from /etc/pki/libnbd; without them\n\
         it doesn't verify the server:\n\
         \x20   mkdir -p -m 700 ~/.pki/libnbd mnt && cp {}/*.pem ~/.pki/libnbd\n\
         \x20   nbdfuse mnt {}",
        file(CA_CERTIFICATE),
        file("client-cert.pem"),
        file("client-key.pem"),
        shell_quote_path(&folder),
        shell_quote(&uri(&authority)),
    )?;
    Ok(())
}

pub(super) fn revoked(
    out: &mut impl Write,
    folder: &CaFolder,
    revocations: &Revocations,
    old: &[CertificateInfo],
    new: &[CertificateInfo],
) -> Result<(), PkiError> {
    for (certificates, done) in [(old, "was already revoked"), (new, "revoked")] {
        for certificate in certificates {
            let names = certificate.names_for_display();
            writeln!(out, "{done}: {} {names} ({})", certificate.kind, certificate.serial)?;
        }
    }
    let path = folder.path(REVOCATION_LIST);
    let count = revocations.entries.len();
    if !new.is_empty() {
        writeln!(
            out,
            "{} now has {count}; to make a server use it, copy it there (--tls-client-crl), and\n\
             reload: systemctl reload hexz-nbd, or kill -HUP PID (not needed with --watch)",
            escape::name(&path)
        )?;
    }
    Ok(())
}

/// Reports a renewed certificate, and what to do with it.
pub(super) fn renewed(
    out: &mut impl Write,
    folder: &CaFolder,
    bundle: &Path,
    former: &CertificateInfo,
    issued: &IssuedCertificate,
) -> Result<(), PkiError> {
    let certificate = &issued.certificate;
    let name = former.names.first().map(ToString::to_string).unwrap_or_default();
    writeln!(
        out,
        "renewed {} for the {} {}, valid until {}\n\
         copy it to the {kind}; the former one stays valid until {}, or until it is revoked:\n\
         \x20   hexz-nbd pki{} revoke --reason superseded {}",
        escape::name(bundle),
        certificate.kind,
        certificate.names_for_display(),
        format_date(certificate.not_after),
        format_date(former.not_after),
        dir_option(folder),
        shell_quote_name(&name),
        kind = certificate.kind,
    )?;
    Ok(())
}

pub(super) fn nothing_to_renew(out: &mut impl Write) -> Result<(), PkiError> {
    writeln!(out, "nothing to renew")?;
    Ok(())
}

/// Reports the certificates that aren't revoked because nothing supersedes them.
pub(super) fn kept(out: &mut impl Write, kept: &[CertificateInfo]) -> Result<(), PkiError> {
    for certificate in kept {
        let names = certificate.names_for_display();
        let CertificateInfo { kind, serial, .. } = certificate;
        writeln!(out, "kept, as the newest: {kind} {names} ({serial})")?;
    }
    Ok(())
}

fn issued(
    out: &mut impl Write,
    bundle: &Path,
    certificate: &CertificateInfo,
) -> Result<(), PkiError> {
    writeln!(
        out,
        "created {} for the {} {}, valid until {}",
        escape::name(bundle),
        certificate.kind,
        certificate.names_for_display(),
        format_date(certificate.not_after),
    )?;
    Ok(())
}

/// Returns the option that names the CA's folder, unless it is the default.
fn dir_option(folder: &CaFolder) -> String {
    match folder.root() {
        path if path == Path::new("pki") => String::new(),
        path => format!(" --dir {}", shell_quote_path(path)),
    }
}

/// Quotes a name as an argument; one that begins with a hyphen isn't an option.
fn shell_quote_name(name: &str) -> String {
    let quoted = shell_quote_path(Path::new(name));
    if name.starts_with('-') { format!("-- {quoted}") } else { quoted }
}

/// Returns a name or address by which clients can connect to the server.
fn host_of_server(server: &CertificateInfo) -> Option<String> {
    server.names.iter().find_map(|name| match name {
        SubjectName::Dns(name) if !name.starts_with('*') => Some(name.clone()),
        SubjectName::Ip(address) => Some(address.to_string()),
        _ => None,
    })
}

/// Makes a path absolute, so that the printed commands work in every folder.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn shell_quote_path(path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-=@+:,".contains(byte);
    match path.to_str() {
        Some(text) if bytes.iter().all(plain) => text.to_owned(),
        _ => shell_quote(path.as_os_str()),
    }
}

/// Quotes one word for the shell. Hidden characters and bytes that aren't UTF-8 take the form
/// `$'\x1b'`, which bash, zsh and POSIX.1-2024 support.
fn shell_quote(word: &(impl AsRef<OsStr> + ?Sized)) -> String {
    let word = word.as_ref();
    match word.to_str() {
        Some(text) if !text.contains(escape::is_hidden) => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        _ => {
            let mut quoted = String::from("$'");
            for byte in word.as_bytes() {
                match byte {
                    b'\'' | b'\\' => quoted.extend(['\\', char::from(*byte)]),
                    b' '..=b'~' => quoted.push(char::from(*byte)),
                    other => quoted += &format!("\\x{other:02x}"),
                }
            }
            quoted + "'"
        }
    }
}

fn percent_encode(path: &Path) -> String {
    let mut uri = String::new();
    for byte in path.as_os_str().as_bytes().iter().copied() {
        if byte.is_ascii_alphanumeric() || b"/._-=@~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri += &format!("%{byte:02X}");
        }
    }
    uri
}

fn escape_for_qemu(path: &Path) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    OsString::from_vec(bytes.split(|byte| *byte == b',').collect::<Vec<_>>().join(&b",,"[..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted_as_one_word() {
        let odd = Path::new("/a b/it's,100%/ü&?");
        assert_eq!(shell_quote_path(odd), r"'/a b/it'\''s,100%/ü&?'");
        assert_eq!(percent_encode(odd), "/a%20b/it%27s%2C100%25/%C3%BC%26%3F");
        assert_eq!(escape_for_qemu(odd), "/a b/it's,,100%/ü&?");
        assert_eq!(shell_quote_path(Path::new("pki/a=2Fb@c")), "pki/a=2Fb@c");
        let hostile = Path::new(OsStr::from_bytes(b"/a'\\\n\x1b[2J\xff"));
        assert_eq!(shell_quote_path(hostile), r"$'/a\'\\\x0a\x1b[2J\xff'");
        assert_eq!(percent_encode(hostile), "/a%27%5C%0A%1B%5B2J%FF");
    }
}
