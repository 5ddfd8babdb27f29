//! Memory for replies is shared between clients.

use super::{plain, tls};
use crate::support::client::Request;
use crate::support::{IMAGE_SIZE, image};

/// One client could hold all memory for answers, until it was dropped for that: others
/// waited, and it was dropped for asking much at once.
#[test]
fn one_client_can_not_hold_all_memory() {
    for server in [plain(), tls()] {
        let server = server.start();
        let mut greedy = server.go("");
        // More than sockets have room for.
        let requests: Vec<u8> = (0..8)
            .flat_map(|cookie| Request::read(cookie, 0, IMAGE_SIZE as u32).encode())
            .collect();
        greedy.send(&requests);
        greedy.expect(&[0x67]);
        let mut other = server.go("");
        for _ in 0..3 {
            assert!(other.read_ok(0, IMAGE_SIZE as u32) == image());
        }
        other.disconnect();
        // The first one is still there, and gets all that it asked for.
        greedy.expect(&[0x44, 0x66, 0x98]);
        for left in (0..8).rev() {
            greedy.receive(12);
            assert!(greedy.receive(IMAGE_SIZE as usize) == image());
            if left > 0 {
                greedy.expect(&[0x67, 0x44, 0x66, 0x98]);
            }
        }
        greedy.disconnect();
        assert!(!server.log_text().contains("\"stalled\""));
    }
}
