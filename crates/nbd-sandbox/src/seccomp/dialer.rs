//! The filter of the dialer: it resolves names, connects, and passes connections to its parent.
//!
//! Which TCP ports it may connect to is up to Landlock, since a filter can't read addresses. The
//! filter therefore refuses what would evade Landlock: `MSG_FASTOPEN`, and protocols other than TCP
//! and UDP.

use std::os::fd::RawFd;

use seccompiler::{Error, SeccompRule};

use super::{
    Calls, FIOCLEX, FIONBIO, TCGETS, add, bits, both, clear, common_calls, is, is_clear, is_option,
    is_so, only,
};

// C libraries disagree about the type of this number.
const FIONREAD: u64 = 0x541b;

/// Options that the dialer and resolvers set, each with its level.
const SOCKET_OPTIONS: [[libc::c_int; 2]; 4] = [
    [libc::IPPROTO_TCP, libc::TCP_NODELAY],
    [libc::IPPROTO_IP, libc::IP_RECVERR],
    [libc::IPPROTO_IPV6, libc::IPV6_RECVERR],
    [libc::IPPROTO_IPV6, libc::IPV6_V6ONLY],
];

/// Restricts all threads to the system calls of a dialer, whose parent is at the other end of
/// `socket`.
pub(crate) fn restrict(socket: RawFd) -> Result<(), String> {
    super::apply(calls(socket))
}

pub(super) fn calls(socket: RawFd) -> Result<Calls, Error> {
    let mut calls = common_calls()?;
    let mut add = |call, rules| add(&mut calls, call, rules);

    // TCP and UDP. Without Unix sockets, nscd and systemd-resolved are queried by DNS instead.
    let kinds = [libc::SOCK_STREAM, libc::SOCK_DGRAM];
    let sockets =
        [libc::AF_INET, libc::AF_INET6].map(|domain| kinds.map(|kind| is_socket(domain, kind)));
    add(libc::SYS_socket, sockets.into_iter().flatten().collect())?;
    add(libc::SYS_connect, vec![])?;
    let not_fast_open = |flags: u8| clear(flags, libc::MSG_FASTOPEN);
    add(libc::SYS_sendto, vec![not_fast_open(3)])?;
    add(libc::SYS_sendmmsg, vec![not_fast_open(3)])?;
    add(libc::SYS_setsockopt, SOCKET_OPTIONS.map(is_option).into())?;
    add(libc::SYS_ioctl, [TCGETS, FIONBIO, FIOCLEX, FIONREAD].map(|it| is(1, it)).into())?;
    if cfg!(target_env = "musl") {
        // Its resolver binds its UDP sockets, and receives with recvmsg. Landlock prevents that TCP
        // sockets are bound.
        add(libc::SYS_bind, vec![])?;
        add(libc::SYS_recvmsg, vec![])?;
    } else {
        // glibc loads modules: files can be executable, but neither writable nor anonymous memory.
        let module = both(is_clear(2, libc::PROT_WRITE)?, is_clear(3, libc::MAP_ANONYMOUS)?);
        add(libc::SYS_mmap, vec![clear(2, libc::PROT_EXEC), module])?;
    }
    // Connections are passed to the parent.
    let to_parent = both(is_so(0, bits(socket))?, is_clear(2, libc::MSG_FASTOPEN)?);
    add(libc::SYS_sendmsg, vec![to_parent])?;
    Ok(calls)
}

/// Matches a socket of the default protocol of its kind, the arguments of `socket`.
fn is_socket(domain: libc::c_int, kind: libc::c_int) -> Result<SeccompRule, Error> {
    let kind = only(1, libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, bits(kind))?;
    Ok(SeccompRule::new(vec![is_so(0, bits(domain))?, kind, is_so(2, 0)?])?)
}
