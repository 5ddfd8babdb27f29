//! The password of encrypted archives.

use std::fmt;
use std::io;
use std::sync::Arc;

use zeroize::Zeroizing;

/// A password. It never shows up in messages, and is wiped when it is dropped.
#[derive(Clone)]
pub struct Password(Zeroizing<Vec<u8>>);

impl Password {
    /// Takes over the bytes; they are wiped when this is dropped.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Takes over a file's content: one line break at its end doesn't belong to it.
    pub fn from_file_content(bytes: Vec<u8>) -> Self {
        let mut password = Self::new(bytes);
        if password.0.last() == Some(&b'\n') {
            password.0.pop();
            if password.0.last() == Some(&b'\r') {
                password.0.pop();
            }
        }
        password
    }

    /// Whether it has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

/// Where a password comes from each time that an archive is opened, so that nobody has to
/// keep it in between.
#[derive(Clone)]
pub struct PasswordSource(Arc<dyn Fn() -> io::Result<Password> + Send + Sync>);

impl PasswordSource {
    /// Asks `source` each time.
    pub fn new(source: impl Fn() -> io::Result<Password> + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }

    pub(super) fn password(&self) -> io::Result<Password> {
        (self.0)()
    }
}

impl From<Password> for PasswordSource {
    /// Keeps the password, and hands it out each time.
    fn from(password: Password) -> Self {
        Self::new(move || Ok(password.clone()))
    }
}

impl fmt::Debug for PasswordSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordSource(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_break_is_cut_off() {
        for (content, password) in [("a b\n", "a b"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("", "")] {
            let read = Password::from_file_content(content.into());
            assert_eq!(read.bytes(), password.as_bytes());
        }
        assert_eq!(format!("{:?}", Password::new(b"secret".into())), "Password(…)");
    }
}
