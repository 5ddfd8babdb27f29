//! Password of encrypted archives.

use std::fmt;
use std::io;
use std::sync::Arc;

use zeroize::Zeroizing;

/// A password. It never appears in messages, and is wiped when dropped.
#[derive(Clone)]
pub struct Password(Zeroizing<Vec<u8>>);

impl Password {
    /// Takes ownership of the bytes, which are wiped when the password is dropped.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Takes ownership of a file's content, and strips one trailing line break.
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

    /// Returns true if the password has no bytes.
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

/// Callback that provides a password whenever an archive is opened, so that it needn't be kept in
/// memory in between.
#[derive(Clone)]
pub struct PasswordSource(Arc<dyn Fn() -> io::Result<Password> + Send + Sync>);

impl PasswordSource {
    /// Creates a source that calls `source` whenever a password is needed.
    pub fn new(source: impl Fn() -> io::Result<Password> + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }

    pub(super) fn password(&self) -> io::Result<Password> {
        (self.0)()
    }
}

impl From<Password> for PasswordSource {
    /// Keeps the password in memory, and returns it each time.
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
    fn one_trailing_line_break_is_stripped() {
        for (content, password) in [("a b\n", "a b"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("", "")] {
            let read = Password::from_file_content(content.into());
            assert_eq!(read.bytes(), password.as_bytes());
        }
        assert_eq!(format!("{:?}", Password::new(b"secret".into())), "Password(…)");
    }
}
