//! The password of encrypted archives.

use std::fmt;

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
