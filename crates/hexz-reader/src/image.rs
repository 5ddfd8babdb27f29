//! Detection, by signature, of disk image formats and compressed files, which are not raw disks.

use std::fmt;

/// Number of bytes at the start of a stream that contain all signatures.
pub(super) const SIGNATURES_END: usize = 0x44;

/// A container format for disks. Clients can't find the disk in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageFormat {
    name: &'static str,
    offset: usize,
    signature: &'static [u8],
    convert: &'static str,
}

const FORMATS: [ImageFormat; 18] = [
    image("qcow2", b"QFI\xfb", "qemu-img convert -O raw IMAGE disk.img"),
    image("VMDK", b"KDMV", "qemu-img convert -O raw IMAGE disk.img"),
    image("VMDK", b"COWD", "qemu-img convert -O raw IMAGE disk.img"),
    image("VMDK", b"# Disk DescriptorFile", "qemu-img convert -O raw IMAGE disk.img"),
    image("VHDX", b"vhdxfile", "qemu-img convert -O raw IMAGE disk.img"),
    image("VHD", b"conectix", "qemu-img convert -O raw IMAGE disk.img"),
    image("QED", b"QED\0", "qemu-img convert -O raw IMAGE disk.img"),
    image("Parallels", b"WithoutFreeSpace", "qemu-img convert -O raw IMAGE disk.img"),
    image("Parallels", b"WithouFreSpacExt", "qemu-img convert -O raw IMAGE disk.img"),
    ImageFormat {
        offset: 0x40,
        ..image("VDI", b"\x7f\x10\xda\xbe", "qemu-img convert -O raw IMAGE disk.img")
    },
    image("EWF", b"EVF\x09\x0d\x0a\xff\0", "ewfexport -f raw -t disk IMAGE"),
    image("gzip", b"\x1f\x8b\x08", "gunzip -c IMAGE > disk.img"),
    image("xz", b"\xfd7zXZ\0", "xz -dc IMAGE > disk.img"),
    image("Zstandard", b"\x28\xb5\x2f\xfd", "zstd -dc IMAGE > disk.img"),
    image("bzip2", b"BZh", "bunzip2 -c IMAGE > disk.img"),
    image("LZ4", b"\x04\x22\x4d\x18", "lz4 -dc IMAGE > disk.img"),
    image("zip", b"PK\x03\x04", "unzip IMAGE"),
    image("Hexz", b"HEXZ\x01\0\0\0", "serve the inner archive itself"),
];

const fn image(name: &'static str, signature: &'static [u8], convert: &'static str) -> ImageFormat {
    ImageFormat { name, offset: 0, signature, convert }
}

impl ImageFormat {
    /// Returns the format whose signature is in the first bytes of a stream.
    pub(super) fn of(start: &[u8]) -> Option<Self> {
        let is_there = |format: &&Self| {
            start.get(format.offset..).is_some_and(|rest| rest.starts_with(format.signature))
        };
        FORMATS.iter().find(is_there).copied()
    }

    /// Returns the usual name of the format.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

/// Names the format, and describes how to convert it.
impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, convert, .. } = self;
        write!(
            f,
            "the main stream is a {name} file, not a raw disk image, and is used unchanged; \
             convert the original before packing it ({convert})"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_detected_at_their_offsets() {
        let name = |start: &[u8]| ImageFormat::of(start).map(|format| format.name());
        assert_eq!(name(b"QFI\xfb\0\0\0\x03"), Some("qcow2"));
        assert_eq!(name(b"vhdxfileM\0i\0"), Some("VHDX"));
        assert_eq!(name(b"KDMV\x01"), Some("VMDK"));
        let mut vdi = [0; SIGNATURES_END];
        vdi[0x40..].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert_eq!(name(&vdi), Some("VDI"));
        assert_eq!(name(&vdi[..0x43]), None);
        for raw in [&b""[..], b"QFI", &[0; 512], b"\xeb\x63\x90"] {
            assert_eq!(name(raw), None, "{raw:?}");
        }
        let end = FORMATS.iter().map(|format| format.offset + format.signature.len()).max();
        assert_eq!(end, Some(SIGNATURES_END));
    }
}
